"""Each kind of wrong request gets the status that says what is wrong, and the cluster goes on serving."""

from collections.abc import Callable, Iterator

import grpc
import pytest

from tandem import Client, DeadlineExceeded, InvalidArgument, NotFound, OutOfRange, ResourceExhausted, TandemError
from tandem.errors import error_from_rpc
from tests.cluster.harness import ON_SIM, Cluster

pytestmark = ON_SIM


@pytest.fixture(autouse=True)
def stays_up(shared: Cluster) -> Iterator[None]:
    pids = shared.pids()
    yield
    assert shared.pids() == pids, "a process was restarted"
    with shared.client() as client:
        assert client.generate("x", max_tokens=2, timeout_s=60).result().finished.usage.completion_tokens >= 1


@pytest.fixture
def client(shared: Cluster) -> Iterator[Client]:
    with shared.client() as client:
        yield client


def test_unknown_model(client: Client) -> None:
    with pytest.raises(NotFound, match="no-such-model"):
        client.generate("x", model="no-such-model").result()


@pytest.mark.parametrize(("prompt", "field"), [("", "text"), ([], "token_ids")])
def test_empty_prompt(client: Client, prompt: str | list[int], field: str) -> None:
    with pytest.raises(InvalidArgument, match="empty") as caught:
        client.generate(prompt).result()
    assert caught.value.field == field


def test_prompt_past_the_context_names_the_limit(client: Client) -> None:
    (model,) = client.models()
    with pytest.raises(OutOfRange, match=str(model.max_model_len)) as caught:
        client.generate([5] * (model.max_model_len + 1), max_tokens=1).result()
    assert caught.value.field


def test_prompt_and_answer_past_the_context_names_the_limit(client: Client) -> None:
    (model,) = client.models()
    with pytest.raises((OutOfRange, InvalidArgument), match=str(model.max_model_len)) as caught:
        client.generate([5] * 10, max_tokens=model.max_model_len).result()
    assert "max_tokens" in caught.value.field


def test_token_id_outside_the_vocabulary(client: Client) -> None:
    (model,) = client.models()
    with pytest.raises((OutOfRange, InvalidArgument), match=str(model.vocab_size)) as caught:
        client.generate([5, model.vocab_size, 6]).result()
    assert "token_ids" in caught.value.field


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", 0),
        ("max_tokens", 2**31 - 1),
        ("min_tokens", -1),
        ("temperature", -0.5),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 1e30),
        ("top_p", 0.0),
        ("top_p", -1.0),
        ("top_p", 1.5),
        ("top_k", -5),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("presence_penalty", 100.0),
        ("frequency_penalty", -100.0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("logprobs", -1),
        ("logprobs", 1_000_000),
        ("stop", [""]),
        ("stop", ["x"] * 10_000),
        ("stop_token_ids", [2**31]),
    ],
)
def test_absurd_parameters(client: Client, option: str, value: object) -> None:
    with pytest.raises(InvalidArgument, match=option) as caught:
        client.generate("x", **{option: value}).result()  # type: ignore[arg-type]
    assert option in caught.value.field


def test_more_tokens_at_least_than_at_most(client: Client) -> None:
    with pytest.raises(InvalidArgument, match="min_tokens"):
        client.generate("x", min_tokens=9, max_tokens=3).result()


def test_unknown_lane(client: Client) -> None:
    with pytest.raises(InvalidArgument, match="lane") as caught:
        client.generate("x", lane="fast").result()
    assert caught.value.field == "lane"


def test_request_id_too_long(client: Client) -> None:
    with pytest.raises(InvalidArgument, match="128") as caught:
        client.generate("x", request_id="r" * 129).result()
    assert caught.value.field == "request_id"


def test_deadline_already_past(client: Client) -> None:
    for timeout_s in (0.0, 1e-6, -1.0):
        with pytest.raises(DeadlineExceeded):
            client.generate("x", timeout_s=timeout_s).result()


def test_deadline_too_short_for_the_answer(client: Client) -> None:
    with pytest.raises(DeadlineExceeded):
        client.generate("x", max_tokens=3000, ignore_eos=True, timeout_s=0.3).result()


def test_message_of_100_megabytes(client: Client) -> None:
    with pytest.raises(ResourceExhausted, match="larger than max"):
        client.generate("x" * 100_000_000).result()


Send = Callable[[bytes], TandemError]


@pytest.fixture
def send_raw(shared: Cluster) -> Iterator[Send]:
    """Sends bytes as a GenerateRequest, past any client's checks; the error that comes back."""
    with grpc.insecure_channel(shared.address) as channel:
        call: grpc.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream("/tandem.v1.Inference/Generate")

        def send(request: bytes) -> TandemError:
            with pytest.raises(grpc.RpcError) as caught:
                list(call(request, timeout=60))
            return error_from_rpc(caught.value)

        yield send


def test_text_that_is_not_utf8(send_raw: Send) -> None:
    error = send_raw(b"\x1a\x02\xff\xfe")  # field 3, two bytes
    assert error.code == "INVALID_ARGUMENT"
    assert error.field
    assert "UTF-8" in error.message


def test_bytes_that_are_no_request(send_raw: Send) -> None:
    assert send_raw(b"\xff\xff\xff\xff").code == "INVALID_ARGUMENT"


def test_a_request_without_a_prompt(send_raw: Send) -> None:
    error = send_raw(b"")
    assert error.code == "INVALID_ARGUMENT"
    assert error.field in ("prompt", "text")
