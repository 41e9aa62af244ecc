"""The socket between a core and an edge: what crosses it, and what ends it."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from router.core import errors
from router.core.effects import Finished
from router.core.errors import TandemError, Unavailable
from router.core.quota import OverQuota, QuotaFacts
from router.core.request import (
    FinishReason,
    GenerationRequest,
    Lane,
    Route,
    Sampling,
    Structure,
    StructureKind,
    Timings,
    TokenLogprobs,
    Usage,
)
from router.core.stats import Stats
from router.edges import link as link_module
from router.edges import wire
from router.edges.link import Link

WAIT_S = 60.0
REQUEST = GenerationRequest(
    request_id="r",
    model="m",
    prompt=(1, 2, 4095),
    sampling=Sampling(
        max_tokens=4,
        seed=2**63 - 1,
        stop_token_ids=(7,),
        structure=Structure(StructureKind.REGEX, "a+"),
        logit_bias=((3, -1.5),),
    ),
    arrival=1.5,
    deadline=float("inf"),
    tenant="acme",
    lane=Lane.BATCH,
    cache_salt=b"\0\xff",
)
FINISHED = Finished(
    reason=FinishReason.STOP,
    usage=Usage(prompt_tokens=3, cached_prompt_tokens=0, completion_tokens=2),
    timings=Timings(ttft_s=0.25),
    route=Route(decode_worker="d"),
)
QUOTA = QuotaFacts(tenant="acme", limit="budgets.day.tokens", unit="tokens", value=10.0, in_use=9.0, asked=2.0)
ERRORS: list[TandemError] = [
    errors.Invalid("prompt", "is empty", limit="1"),
    errors.OutOfRange("prompt[0]", "is too high"),
    errors.NotFound("worker", "w", "no worker 'w'"),
    errors.AlreadyExists("in use"),
    errors.Rejected("QUEUE_FULL", "full", retry_after_s=2.0),
    errors.Unavailable("NO_WORKERS", "none"),
    errors.Lost("gone", retry_after_s=0.5),
    errors.Expired("too late"),
    errors.Cancelled("the client left"),
    errors.Internal("a fault"),
    OverQuota("spent", QUOTA, retry_after_s=60.0),
]


def crossed(message: wire.Message, kind: Any) -> Any:
    (found,) = wire.messages(bytearray(wire.frame(message)), kind)
    return found


class TestValues:
    def test_a_request_crosses_as_it_is(self) -> None:
        assert crossed(wire.Submit(7, REQUEST), wire.FromEdge) == wire.Submit(7, REQUEST)

    def test_what_is_said_to_requests_crosses_as_it_is(self) -> None:
        said = wire.Said(1, (5, 6), (TokenLogprobs(5, -0.5, ((5, -0.5),)), TokenLogprobs(6, float("-inf"))))
        turn = wire.Turn([said], [wire.Ended(1, FINISHED, None)], b"report")
        assert crossed(turn, wire.FromCore) == turn

    @pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
    def test_an_error_says_the_same_on_the_other_side(self, error: TandemError) -> None:
        turn = crossed(wire.Turn([], [wire.Ended(1, None, error)]), wire.FromCore)
        there = turn.ended[0].error
        assert type(there) is type(error)
        assert (str(there), there.reason, there.retry_after_s) == (str(error), error.reason, error.retry_after_s)
        assert vars(there) == vars(error)

    def test_an_error_that_only_edges_know_crosses_as_the_kind_that_it_is_of(self) -> None:
        class Odd(errors.Invalid):
            pass

        assert type(crossed(wire.Told(1, error=Odd("x", "y")), wire.FromCore).error) is errors.Invalid

    def test_counters_cross(self) -> None:
        stats = Stats(completion_tokens=3)
        stats.ttft_s.observe(0.2, times=2)
        there = wire.read_answer(crossed(wire.answer(1, stats), wire.FromCore), Stats)
        assert (there.completion_tokens, there.ttft_s.counts, there.ttft_s.sum) == (3, stats.ttft_s.counts, 0.4)

    def test_frames_may_come_in_pieces(self) -> None:
        whole = wire.frame(wire.Cancel(1)) + wire.frame(wire.Submit(2, REQUEST)) + wire.frame(wire.Overrun(3))
        unread, found = bytearray(), list[wire.Message]()
        for byte in whole:
            unread.append(byte)
            found += wire.messages(unread, wire.FromEdge)
        assert found == [wire.Cancel(1), wire.Submit(2, REQUEST), wire.Overrun(3)]
        assert not unread

    @pytest.mark.parametrize(
        "frame",
        [
            b"\0\0\0\1\xc1",
            wire.frame(wire.Stop()),
            (wire.FRAME_BYTES_MAX + 1).to_bytes(4),
            wire.frame(wire.Cancel(1))[:-1] + b"\xc3",
        ],
        ids=["no message", "for an edge", "too long", "of another type"],
    )
    def test_what_an_edge_would_not_say_is_malformed(self, frame: bytes) -> None:
        with pytest.raises(wire.Malformed):
            list(wire.messages(bytearray(frame), wire.FromEdge))


class End:
    """A link, and what came of it."""

    def __init__(self, kind: Any) -> None:
        self.taken: list[Any] = []
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.link = Link(kind, self.taken.append, self.answer, lost=self.lost.set_result)

    async def answer(self, question: wire.Question) -> object:
        match question:
            case wire.GetRefused():
                return {"KEY_UNKNOWN": 2}
            case wire.GetRates():
                raise errors.NotFound("tenant", question.tenant, "no such tenant")
            case wire.GetStats():
                raise RuntimeError("a fault")
        await asyncio.Event().wait()
        return None


async def pair() -> tuple[End, End]:
    ours, theirs = socket.socketpair()
    core, edge = End(wire.FromEdge), End(wire.FromCore)
    loop = asyncio.get_running_loop()
    await loop.create_unix_connection(lambda: core.link, sock=ours)
    await loop.create_unix_connection(lambda: edge.link, sock=theirs)
    return core, edge


class TestLinks:
    async def test_questions_are_answered_or_refused_as_the_other_side_says(self) -> None:
        core, edge = await pair()
        assert await core.link.ask(wire.GetRefused(), dict[str, int], WAIT_S) == {"KEY_UNKNOWN": 2}
        with pytest.raises(errors.NotFound, match="no such tenant"):
            await edge.link.ask(wire.GetRates("x"), tuple[int, ...], WAIT_S)
        with pytest.raises(errors.Internal, match="log"):
            await edge.link.ask(wire.GetStats(), Stats, WAIT_S)
        with pytest.raises(Unavailable):
            await edge.link.ask(wire.GetMetrics(), bytes, 0.01)
        core.link.cut("the test is over")
        await edge.lost

    async def test_what_is_said_before_there_is_a_connection_waits_for_it(self) -> None:
        ours, theirs = socket.socketpair()
        core, edge = End(wire.FromEdge), End(wire.FromCore)
        core.link.say(wire.Draining())
        core.link.flush()
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: core.link, sock=ours)
        await loop.create_unix_connection(lambda: edge.link, sock=theirs)
        await edge.link.ask(wire.GetRefused(), dict[str, int], WAIT_S)  # answered after it
        assert edge.taken == [wire.Draining()]
        core.link.cut("the test is over")
        await edge.lost

    async def test_when_it_ends_what_waits_for_answers_is_told(self) -> None:
        core, edge = await pair()
        asking = asyncio.create_task(edge.link.ask(wire.GetMetrics(), bytes, WAIT_S))
        await asyncio.sleep(0)
        core.link.cut("the test says so")
        with pytest.raises(Unavailable):
            await asking
        assert await core.lost == "the test says so"
        await edge.lost
        with pytest.raises(Unavailable):
            await edge.link.ask(wire.GetMetrics(), bytes, WAIT_S)

    async def test_an_end_that_leaves_too_much_unread_is_cut(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(link_module, "BACKLOG_BYTES_MAX", 1 << 20)
        ours, theirs = socket.socketpair()  # nobody reads theirs
        core = End(wire.FromEdge)
        await asyncio.get_running_loop().create_unix_connection(lambda: core.link, sock=ours)
        while not core.lost.done():
            core.link.say(wire.Now([], b"x" * 65_536))
            await asyncio.sleep(0)
            assert core.link.backlog_bytes < 2 << 20
        assert "unread" in await core.lost
        theirs.close()

    async def test_an_end_that_says_what_nobody_should_is_cut(self) -> None:
        core, edge = await pair()
        edge.link.say(wire.Stop())
        assert "nobody should" in await core.lost
        await edge.lost
