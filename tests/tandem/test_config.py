import re
import subprocess
from pathlib import Path

import pytest

from tandem import config
from tandem.config import KEYS, SHIPPED_MODEL, Config
from tandem.settings import ConfigError
from tests.cluster.harness import TANDEM, clean_environment
from worker.config import Role

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "deploy" / "local" / "tandem.toml"


def load(
    text: str = "", folder: Path | None = None, flags: dict[str, tuple[str, object]] | None = None, **environ: str
) -> Config:
    file = None
    if folder is not None:
        file = folder / "t.toml"
        file.write_text(text)
    return config.load(file, environ, flags or {})


def problems(*assignments: str, **environ: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        config.load(None, environ, {}, assignments)
    return caught.value.problems


def test_defaults_are_valid_and_name_the_shipped_model() -> None:
    plain = load()
    assert plain.cluster.model == SHIPPED_MODEL
    assert plain.cluster.model_name == plain.router.model_name == "tandem-nano"
    assert plain.router.port == 50051
    assert plain.router.model_dir == str(SHIPPED_MODEL)
    worker = plain.worker(worker_id="decode-1", role=Role.DECODE, routers=("localhost:1",), secret=b"s")
    assert (worker.worker_id, worker.role, worker.routers) == ("decode-1", Role.DECODE, ("localhost:1",))
    assert worker.engine_options.model == str(SHIPPED_MODEL)
    assert worker.engine_options.served_model_name == "tandem-nano"


def test_several_edges_get_workers_a_port_of_their_own() -> None:
    assert load().router.worker_listen == ""
    assert config.load(None, {}, {}, ["router.edges=2"]).router.worker_listen == "127.0.0.1:0"
    chosen = config.load(None, {}, {}, ["router.edges=2", "router.worker_listen=127.0.0.2:7"])
    assert chosen.router.worker_listen == "127.0.0.2:7"
    assert any("router.edges: must be from 1 to 64, is 0" in problem for problem in problems("router.edges=0"))


def test_file_environment_and_flags_win_in_this_order(tmp_path: Path) -> None:
    text = "[router]\nport = 1\nrouter_id = 'file'\nhost = '127.0.0.3'\n[engine]\nseed = 1"
    flags: dict[str, tuple[str, object]] = {"router.port": ("--port", 3)}
    environ = {"TANDEM_ROUTER_PORT": "2", "TANDEM_ROUTER_ROUTER_ID": "env"}
    loaded = config.load(_write(tmp_path, text), environ, flags, ["engine.seed=4"])

    assert (loaded.router.port, loaded.router.router_id, loaded.router.host) == (3, "env", "127.0.0.3")
    assert loaded.given["router.port"].origin == "--port"
    assert loaded.given["router.router_id"].origin == "TANDEM_ROUTER_ROUTER_ID"
    assert loaded.given["router.host"].origin.endswith("t.toml:4")
    worker = loaded.worker(worker_id="w", role=Role.BOTH, routers=("localhost:1",), secret=b"s")
    assert worker.engine_options.seed == 4


def _write(folder: Path, text: str) -> Path:
    (folder / "t.toml").write_text(text)
    return folder / "t.toml"


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("router.port=70000", "--set router.port: router.port: must be from 0 to 65535, is 70000"),
        ("router.prot=1", "router.prot: unknown key; did you mean router.port?"),
        ("router.limits.rest_s_min=-1", "router.limits.rest_s_min must lie between"),
        ("router.requests.logprobs_max=0", "--set router.requests.logprobs_max: router.requests.logprobs_max: must be"),
        ("cluster.engine=vlm", "must be one of auto, vllm, sim; did you mean vllm?"),
        ("cluster.prefill_workers=0", "cluster.prefill_workers: must be from 1 to 64, is 0"),
        ("cluster.model=/nowhere", "cluster.model: /nowhere is not a folder"),
        ("cluster.secret_file=/nowhere", "cluster.secret_file: /nowhere is not a file"),
        ("worker.decode.fetch_timeout_s=31", "worker.decode.fetch_timeout_s: 31.0 is more than prefill.lease_ttl_s"),
        ("worker.log.level=LOUD", "worker.log.level: must be one of DEBUG"),
        ("worker.metrics_address=:9000", "is not host:port"),
        ("worker.metrics_address=0.0.0.0:9000", "cannot serve 2 workers on one machine; use port 0"),
        ("worker.engine_listen=127.0.0.1:9000", "cannot serve 2 workers on one machine; use port 0"),
        ("worker.engine_listen=0.0.0.0:0", "takes certificates"),
        ("worker.decode.legs=65", "worker.decode.legs: 65 is more than engine.max_running: 64"),
        ("engine.block_tokens=0", "engine.block_tokens: must be from 1 to 1,024, is 0"),
        ("engine.kv_cache_bytes=1", "engine.kv_cache_bytes: must be from 1,048,576"),
        ("engine.staging_bytes=1GiB", "engine.staging_bytes: 1,073,741,824 is more than engine.kv_cache_bytes"),
        ("router.shutdown_grace_s=30", "router.shutdown_grace_s: 30 is not less than supervisor.stop_grace_s: 30"),
        ("worker.stop_timeout_s=31", "worker.stop_timeout_s: 31 is not less than supervisor.stop_grace_s: 30"),
        ("supervisor.restarts_max=-1", "supervisor.restarts_max: must not be negative, is -1"),
        ("supervisor.backoff_first_s=11", "supervisor.backoff_first_s: 11.0 is more than backoff_max_s: 10.0"),
    ],
)
def test_what_is_wrong_names_key_value_and_range(assignment: str, words: str) -> None:
    (problem,) = problems(assignment)
    assert words in problem
    assert problem.startswith(f"--set {assignment.partition('=')[0]}: ")


def test_a_secret_that_is_easily_guessed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("hush")
    (problem,) = problems(f"cluster.secret_file={tmp_path / 'secret'}")
    assert "must hold at least 16 bytes, has 4" in problem


def test_everything_wrong_is_said_at_once() -> None:
    found = problems("router.port=-1", "engine.block_tokens=0", "cluster.decode_workers=0", TANDEM_WORKER_LOG_LEVEL="X")
    assert [line.partition(":")[0] for line in found] == [
        "--set engine.block_tokens",
        "--set cluster.decode_workers",
        "--set router.port",
        "TANDEM_WORKER_LOG_LEVEL",
    ]


def test_variables_of_the_command_itself_are_no_unknown_keys() -> None:
    assert load(TANDEM_CONFIG="x", TANDEM_ADDRESS="x", TANDEM_STATE_DIR="x").router.port == 50051


def test_every_variable_means_one_key() -> None:
    assert len({key.env for key in KEYS.values()}) == len(KEYS)


def test_secrets_are_neither_keys_nor_shown() -> None:
    assert not [name for name in KEYS if name.endswith("secret")]
    worker = load().worker(worker_id="w", role=Role.BOTH, routers=("localhost:1",), secret=b"hush")
    assert "hush" not in repr(worker)


def test_the_example_says_the_defaults() -> None:
    example, plain = config.load(EXAMPLE, {}), config.load(None, {})
    defaults = {name: key.default for name, key in KEYS.items()} | {name: it.value for name, it in plain.given.items()}
    wrong = {name: (it.value, defaults[name]) for name, it in example.given.items() if it.value != defaults[name]}
    assert not wrong, "key: (what deploy/local/tandem.toml says, the default)"
    assert len(example.given) > 30


def test_keys_that_the_example_only_mentions_exist() -> None:
    commented = re.findall(r"^# (\w+) = ", EXAMPLE.read_text(), re.MULTILINE)
    assert commented
    assert all(any(name.endswith(f".{key}") for name in KEYS) for key in commented)


def test_what_the_command_prints_is_a_file_that_says_the_same(tmp_path: Path) -> None:
    changed = load(
        "[router.limits]\nretry_after_s = 2\n[worker.labels]\nzone = 'a'\n[engine]\nmax_model_len = 99", tmp_path
    )
    again = config.load(_write(tmp_path, changed.as_toml()), {}, {})
    assert again.router == changed.router
    assert again.router.limits.retry_after_s == 2
    worker = again.worker(worker_id="w", role=Role.BOTH, routers=("localhost:1",), secret=b"s")
    assert worker.labels == {"zone": "a"}
    assert worker.engine_options.max_model_len == 99
    assert re.search(r"^retry_after_s = 2.0 +# .*t.toml:2$", changed.as_toml(), re.MULTILINE)


def test_the_command_reads_the_file_of_the_current_folder_and_says_where_values_come_from(tmp_path: Path) -> None:
    (tmp_path / "tandem.toml").write_text("[router]\nport = 5\n")
    command = [*TANDEM, "config", "--decode", "3"]
    done = subprocess.run(command, cwd=tmp_path, env=clean_environment(), capture_output=True, text=True)
    assert re.search(r"^port = 5 +# tandem.toml:2$", done.stdout, re.MULTILINE), done.stderr
    assert re.search(r"^decode_workers = 3 +# --decode$", done.stdout, re.MULTILINE)


def test_the_command_says_what_is_wrong_and_ends_with_2(tmp_path: Path) -> None:
    environ = clean_environment() | {"TANDEM_ROUTER_PROT": "1"}
    done = subprocess.run([*TANDEM, "up"], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: TANDEM_ROUTER_PROT: unknown; did you mean TANDEM_ROUTER_PORT?\n"


def test_the_configuration_loads_no_engine() -> None:
    code = "import sys, tandem.launch; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([TANDEM[0], "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert "tandem" in loaded
    assert not set(loaded) & {"torch", "vllm", "transformers", "nixl_cu12", "tokenizers"}
