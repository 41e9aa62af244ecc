"""The commands that talk to a cluster, against a scripted server."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from typer.testing import CliRunner, Result

from tandem.cli import app
from tests.cluster.harness import TANDEM, clean_environment
from tests.tandem.scripted_server import Script, refusal, serving


@pytest.fixture
def server() -> Iterator[Script]:
    with serving(Script()) as script:
        yield script


def tandem(*arguments: str, address: str = "", stdin: bytes = b"", **environ: str) -> Result:
    """In this process, which spares starting one; what only a process can show has its own tests below."""
    env: dict[str, str | None] = {name: None for name in os.environ if name.startswith("TANDEM_")}
    return CliRunner().invoke(app, arguments, input=stdin, env=env | {"TANDEM_ADDRESS": address} | environ)


@contextmanager
def process(*arguments: str, address: str) -> Iterator[subprocess.Popen[bytes]]:
    env = clean_environment() | {"TANDEM_ADDRESS": address}
    with subprocess.Popen(
        [*TANDEM, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=env,
        # A shell's background jobs ignore SIGINT, and so would all that is started from them.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as started:
        yield started


def test_generate_puts_the_answer_on_stdout_and_how_it_came_about_on_stderr(server: Script) -> None:
    done = tandem("generate", "hi", "-n", "7", "--temperature", "0", "--stop", "X", address=server.address)
    assert (done.exit_code, done.stdout) == (0, "one two\n")
    assert "prefill  p-0" in done.stderr
    assert "first token after 250 ms" in done.stderr
    (request,) = server.requests
    assert (request.text, request.sampling.max_tokens, list(request.sampling.stop)) == ("hi", 7, ["X"])
    assert not request.sampling.HasField("top_p")


def test_generate_quietly_says_the_answer_alone(server: Script) -> None:
    done = tandem("generate", "hi", "-q", address=server.address)
    assert (done.exit_code, done.stdout, done.stderr) == (0, "one two\n", "")


def test_the_command_is_a_process_like_any_other(server: Script) -> None:
    with process("generate", "hi", address=server.address) as done:
        out, err = done.communicate(timeout=60)
    assert (done.returncode, out) == (0, b"one two\n")
    assert b"prefill  p-0" in err


def test_generate_reads_a_prompt_from_standard_input(server: Script) -> None:
    assert tandem("generate", "-", address=server.address, stdin="déjà\n".encode()).exit_code == 0
    assert server.requests[0].text == "déjà\n"


def test_generate_says_events_as_json(server: Script) -> None:
    done = tandem("generate", "hi", "--json", address=server.address)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["event"] for event in events] == ["delta", "delta", "finished"]
    assert events[0]["text"] == "one"
    assert events[0]["token_ids"] == [3]
    assert events[0]["at_s"] <= events[1]["at_s"] <= events[2]["at_s"]
    assert events[2]["reason"] == "stop"
    assert events[2]["timings"]["ttft_s"] == 0.25
    assert events[2]["route"]["prefill_worker"] == "p-0"
    assert events[2]["usage"]["completion_tokens"] == 2
    assert server.requests[0].return_token_ids


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, 2),
        (grpc.StatusCode.OUT_OF_RANGE, 2),
        (grpc.StatusCode.NOT_FOUND, 2),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 3),
        (grpc.StatusCode.UNAVAILABLE, 4),
        (grpc.StatusCode.DEADLINE_EXCEEDED, 5),
        (grpc.StatusCode.CANCELLED, 6),
        (grpc.StatusCode.PERMISSION_DENIED, 7),
        (grpc.StatusCode.INTERNAL, 1),
    ],
)
def test_an_error_is_one_line_and_an_exit_code_of_its_class(
    server: Script, code: grpc.StatusCode, exit_code: int
) -> None:
    server.refuse = refusal(code, "no such thing", error_details_pb2.ErrorInfo(reason="BECAUSE"))
    done = tandem("generate", "hi", address=server.address)
    assert (done.exit_code, done.stdout) == (exit_code, "")
    assert done.stderr == f"error: no such thing ({code.name})\n"


def test_an_error_says_when_to_try_again(server: Script) -> None:
    retry = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=40))
    server.refuse = refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue is full", retry)
    done = tandem("generate", "hi", "--deadline", "20", address=server.address)
    assert "try again in 40 s" in done.stderr


def test_an_error_is_a_json_event_too(server: Script) -> None:
    bad = error_details_pb2.BadRequest()
    bad.field_violations.add(field="sampling.top_p", description="must be in (0, 1]")
    server.refuse = refusal(grpc.StatusCode.INVALID_ARGUMENT, "top_p: no", bad)
    done = tandem("generate", "hi", "--json", address=server.address)
    (event,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.exit_code == 2
    assert (event["event"], event["code"], event["field"]) == ("error", "INVALID_ARGUMENT", "sampling.top_p")


def test_nobody_there_is_said_with_what_to_do(tmp_path: Path) -> None:
    done = tandem("generate", "hi", "--state-dir", str(tmp_path), address="127.0.0.1:1")
    assert done.exit_code == 4
    assert done.stderr.count("\n") == 1
    assert "`tandem up` starts one" in done.stderr


def test_a_deadline_is_kept(server: Script) -> None:
    server.hang = True
    done = tandem("generate", "hi", "--deadline", "0.5", address=server.address)
    assert done.exit_code == 5
    assert "DEADLINE_EXCEEDED" in done.stderr


@pytest.mark.parametrize("stdin", [b"\xff\xfe"])
def test_input_that_is_not_text_is_refused_before_it_is_sent(server: Script, stdin: bytes) -> None:
    done = tandem("generate", "-", address=server.address, stdin=stdin)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert "not UTF-8" in done.stderr
    assert server.requests == []


def test_interrupting_cancels_at_the_server(server: Script) -> None:
    server.hang = True
    with process("generate", "hi", address=server.address) as done:
        assert done.stdout is not None
        assert done.stdout.read(7) == b"one two"
        done.send_signal(signal.SIGINT)
        assert done.wait(30) == 130
        assert server.ended.wait(30)
        assert done.stderr is not None
        assert done.stderr.read() == b""


def test_a_reader_that_goes_away_is_no_crash(server: Script) -> None:
    server.deltas = ["x" * 100_000] * 10
    with process("generate", "hi", address=server.address) as done:
        assert done.stdout is not None
        done.stdout.read(1)
        done.stdout.close()
        assert done.wait(30) == 141
        assert done.stderr is not None
        assert done.stderr.read() == b""


def test_status_shows_workers_lanes_and_requests(server: Script) -> None:
    done = tandem("status", address=server.address, COLUMNS="160")
    assert done.exit_code == 0
    for words in ("p-0", "prefill", "ready", "nano", "lane d-0 → p-0: nixl, 3.5 GB/s", "3 finished", "decoding"):
        assert words in done.stdout


def test_status_as_json_is_the_whole_of_it(server: Script) -> None:
    status = json.loads(tandem("status", "--json", address=server.address).stdout)
    assert status["workers"][0]["role"] == "prefill"
    assert status["workers"][0]["load"]["kv_blocks_free"] == 10
    assert status["outcomes"] == {"finished": 3}


def test_operators_commands_give_their_orders(server: Script) -> None:
    assert tandem("drain", "p-0", address=server.address).exit_code == 0
    assert tandem("role", "p-0", "decode", address=server.address).exit_code == 0
    assert len(server.orders) == 2
    assert tandem("role", "p-0", "king", address=server.address).exit_code == 2
    done = tandem("drain", "nobody", address=server.address)
    assert (done.exit_code, done.stderr) == (2, "error: no worker is called nobody (NOT_FOUND)\n")


def test_version_names_what_it_stands_on() -> None:
    out = tandem("version").stdout
    assert out.startswith("tandem ")
    assert "grpcio " in out
