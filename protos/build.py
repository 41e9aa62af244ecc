"""Rebuilds the code generated from the .proto files: `make protos`, or `python -m protos.build [FOLDER]`.

The paths given to protoc start at the repository's root, so that generated modules import each other as
`from protos import ...` and no descriptor can collide with one of another library. grpcio-tools stays below 1.82:
what it generates must load on protobuf 6, which vLLM environments may have.
"""

import sys
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parent.parent


def sources() -> list[Path]:
    """Every .proto file, relative to the root."""
    return sorted(path.relative_to(ROOT) for path in ROOT.glob("protos/**/*.proto"))


def generate(target: Path) -> None:
    """Write `protos/**/*_pb2*.py[i]` under `target`."""
    google = Path(protoc.__file__).parent / "_proto"  # google/protobuf/*.proto
    stubs = Path(sys.executable).parent / "protoc-gen-mypy_grpc"
    status = protoc.main(
        [
            "protoc",
            f"-I{ROOT}",
            f"-I{google}",
            f"--plugin=protoc-gen-mypy_grpc={stubs}",
            f"--python_out={target}",
            f"--pyi_out={target}",
            f"--grpc_python_out={target}",
            f"--mypy_grpc_out={target}",
            *map(str, sources()),
        ]
    )
    if status != 0:
        raise SystemExit(f"protoc ended with status {status}")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
