"""The generated code in the repository is what the .proto files give."""

from pathlib import Path

from protos.build import ROOT, generate


def generated_files(root: Path) -> dict[str, str]:
    paths = [path for pattern in ("*_pb2*.py", "*_pb2*.pyi") for path in (root / "protos").rglob(pattern)]
    return {path.relative_to(root).as_posix(): path.read_text() for path in paths}


def test_generated_code_is_current(tmp_path: Path) -> None:
    generate(tmp_path)
    committed, fresh = generated_files(ROOT), generated_files(tmp_path)
    assert committed.keys() == fresh.keys(), "run `make protos` and commit; remove what has no .proto any more"
    stale = [name for name in fresh if committed[name] != fresh[name]]
    assert not stale, f"stale: {stale}; run `make protos` and commit"
