"""Which module may import which. The lines are drawn in docs/architecture.md; this is how they are held.

`violations(path, source)` judges one file from its text alone, so the rules can be tried on invented files.
"""

import ast
from collections.abc import Iterator
from pathlib import PurePosixPath

#: The packages of the product, each with those it may import besides itself, `protos` and `trust`.
MAY_IMPORT = {
    "protos": set(),
    "trust": set(),
    "kv_transfer": set(),
    "engine": {"kv_transfer"},
    "prefill": {"engine", "kv_transfer"},
    "decode": {"engine", "kv_transfer"},
    "worker": {"prefill", "decode", "engine", "kv_transfer"},
    # These reach workers over the wire only.
    "router": set(),
    "autoscaler": set(),
    "loadtest": {"tandem"},
    # These put the others together.
    "simulator": {"router", "autoscaler", "loadtest", "worker", "prefill", "decode", "engine", "kv_transfer", "tandem"},
    "tandem": {"router", "autoscaler", "loadtest", "simulator", "worker", "prefill", "decode", "engine", "kv_transfer"},
}

#: Library -> the only files and folders that may import it. What is heavy must not reach the router's image.
ONLY_IN = {
    "vllm": ("engine/vllm_process.py", "engine/vllm_cpu_worker.py", "kv_transfer/vllm_connector.py"),
    "torch": ("kv_transfer/vllm_connector.py",),
    "transformers": (),
    "nixl": ("kv_transfer/",),
    "nixl_cu12": ("kv_transfer/",),
    "ucxx": ("kv_transfer/",),
}

#: Where protobuf's messages may be seen: a package's wire.py, one for each further protocol (*_wire.py), and the ends
#: of services that are hardly more than wire.
SEES_MESSAGES = ("kv_transfer/peer.py", "router/edge/reflection.py")

#: A core is told the time and what happened, and answers with what it wants done.
# fmt: off
NOT_IN_A_CORE = {
    "asyncio", "concurrent", "google", "grpc", "http", "logging", "multiprocessing", "os", "pathlib",
    "prometheus_client", "protos", "secrets", "select", "selectors", "signal", "socket", "ssl", "starlette",
    "subprocess", "tempfile", "threading", "time", "urllib", "uuid", "uvicorn", "uvloop",
}
# fmt: on
CLOCKS = {"now", "today", "utcnow"}


def violations(path: str, source: str) -> list[str]:
    """One line for each import (or call, in a core) that `path` may not have; `path` is relative to the root."""
    tree = ast.parse(source, path)
    found = [(line, why) for line, module in imports(tree, path) for why in judge_import(path, module)]
    if in_core(path):
        found += [
            (line, f"calls {name}: a core is told the time and draws from its own Random")
            for line, name in impure(tree)
        ]
    return [f"{path}:{line} {why}" for line, why in sorted(set(found))]


def in_core(path: str) -> bool:
    return "core" in PurePosixPath(path).parts[1:-1]


def imports(tree: ast.Module, path: str) -> Iterator[tuple[int, str]]:
    """Every module imported anywhere in the file, as an absolute dotted name; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                yield from ((node.lineno, alias.name) for alias in node.names)
            case ast.ImportFrom():
                package = PurePosixPath(path).parent.parts
                base = package[: len(package) - node.level + 1] if node.level else ()
                prefix = ".".join([*base, *filter(None, [node.module])])
                yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)
            case ast.Call(args=[ast.Constant(value=str(name)), *_]) if called(node).endswith(
                ("import_module", "__import__")
            ):
                yield node.lineno, name


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def judge_import(path: str, module: str) -> Iterator[str]:
    """Why this file may not import this module: nothing if it may."""
    package, file = PurePosixPath(path).parts[0], PurePosixPath(path).name
    library = module.split(".")[0]

    if library in MAY_IMPORT and library not in {package, "protos", "trust"} | MAY_IMPORT[package]:
        yield f"imports {module}: {package} may not depend on {library}"
    if library in ONLY_IN and not path.startswith(ONLY_IN[library]):
        yield f"imports {module}: {library} is for {' and '.join(ONLY_IN[library])}"
    if in_core(path):
        if library in NOT_IN_A_CORE:
            yield f"imports {module}: a core does no I/O and tells no time"
        elif library in MAY_IMPORT and "core" not in module.split("."):
            yield f"imports {module}: of ours, a core imports only cores"
        elif library == "random" and module not in ("random", "random.Random"):
            yield f"imports {module}: a core draws from its own random.Random"
    elif library == "protos" and package != "protos" and not file.endswith("wire.py") and "_pb2_grpc" not in module:
        if path in SEES_MESSAGES:
            return
        yield f"imports {module}: messages stop at wire.py; elsewhere only a *_pb2_grpc, to make a server or stub"


def impure(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Calls that would make a core's answer depend on more than what it was told."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            *owner, name = called(node).split(".")
            module_random = owner == ["random"] and name != "Random"
            clock = name in CLOCKS and owner[-1:] in (["datetime"], ["date"])
            if module_random or clock or (name in ("open", "print", "input") and not owner):
                yield node.lineno, called(node)
