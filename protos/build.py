"""Rebuilds the code generated from the .proto files: `make protos`, or `python -m protos.build [FOLDER]`.

The paths given to protoc start at the repository's root, so that generated modules import each other as
`from protos import ...` and no descriptor can collide with one of another library. grpcio-tools stays below 1.82:
what it generates must load on protobuf 6, which vLLM environments may have.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

#: Protocols that others define are loaded into a pool of their own, see protos/compat/pool.py.
_DEFAULT_POOL = "from google.protobuf import descriptor_pool as _descriptor_pool\n"
_OWN_POOL = "from protos.compat import pool as _descriptor_pool\n"


def sources() -> list[Path]:
    """Every .proto file, relative to the root."""
    return sorted(path.relative_to(ROOT) for path in ROOT.glob("protos/**/*.proto"))


def generate(target: Path) -> None:
    """Write `protos/**/*_pb2*.py[i]` under `target`."""
    stubs = Path(sys.executable).parent / "protoc-gen-mypy_grpc"
    # In a process of its own: two C++ protobuf runtimes, protoc's and NIXL's, do not share one.
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            f"-I{ROOT}",
            f"--plugin=protoc-gen-mypy_grpc={stubs}",
            f"--python_out={target}",
            f"--pyi_out={target}",
            f"--grpc_python_out={target}",
            f"--mypy_grpc_out={target}",
            *map(str, sources()),
        ],
        cwd=ROOT,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"protoc ended with status {done.returncode}")
    for module in target.glob("protos/compat/*_pb2.py"):
        code = module.read_text()
        module.write_text(code.replace(_DEFAULT_POOL, _OWN_POOL))


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
