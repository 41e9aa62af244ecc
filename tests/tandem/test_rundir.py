import os
import stat
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from tandem import rundir

NOW = datetime(2026, 1, 2, 3, 4, 5)


def test_a_run_has_a_private_folder_of_its_own_and_is_found_while_it_lasts(tmp_path: Path) -> None:
    state = tmp_path / "state"
    assert rundir.running(state) is None
    with rundir.new_run(state, "127.0.0.1:1", NOW) as run_dir:
        assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
        assert (state / "latest").resolve() == run_dir.resolve()
        assert rundir.running(state) == rundir.Running(os.getpid(), "127.0.0.1:1", str(run_dir))
    assert rundir.running(state) is None


def test_a_second_run_is_told_of_the_first(tmp_path: Path) -> None:
    with rundir.new_run(tmp_path, "127.0.0.1:1", NOW) as run_dir:
        with (
            pytest.raises(rundir.AlreadyUp, match=r"127\.0\.0\.1:1 .*--state-dir") as caught,
            rundir.new_run(tmp_path, "127.0.0.1:2", NOW),
        ):
            pass
        assert caught.value.running is not None
        assert caught.value.running.run_dir == str(run_dir)
    with rundir.new_run(tmp_path, "127.0.0.1:2", NOW + timedelta(seconds=1)):
        pass


def test_a_killed_run_does_not_keep_the_next_one_out(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from datetime import datetime
from pathlib import Path
from tandem import rundir
with rundir.new_run(Path(sys.argv[1]), "127.0.0.1:1", datetime.now()):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -9
    assert rundir.running(tmp_path) is None
    with rundir.new_run(tmp_path, "127.0.0.1:2", NOW):
        pass


def test_only_the_last_runs_are_kept(tmp_path: Path) -> None:
    for second in range(15):
        with rundir.new_run(tmp_path, "127.0.0.1:1", NOW + timedelta(seconds=second)) as run_dir:
            os.utime(run_dir, (second, second))
    kept = sorted(path.name for path in tmp_path.glob("run-*"))
    assert len(kept) == 10
    assert kept[-1].startswith("run-20260102-030419")


def test_private_files_are_private(tmp_path: Path) -> None:
    rundir.write_private(tmp_path / "secret", b"x")
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600
