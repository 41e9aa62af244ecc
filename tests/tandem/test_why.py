"""`tandem why` and `tandem usage`, as people read them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from typer.testing import CliRunner

from router.core.lifecycle import State
from router.core.request import Lane
from router.core.usage import UsageFacts
from router.metering.ledger import Ledger
from tandem import show
from tandem.cli import app
from tandem.values import Charge, Figures, Handoff, Placement, RequestStory, Waited

STORY = RequestStory(
    request_id="r",
    tenant="acme",
    model="m",
    lane="realtime",
    state="finished",
    arrived_at=1_800_000_000.0,
    reason="",
    error="",
    retry_after_s=None,
    waited=Waited(
        queue_s=2.5,
        capped_s=1.0,
        stuck_s=0.25,
        own_requests=3,
        own_cost=1200.0,
        others_requests=40,
        others_cost=50_000.0,
        predicted_s=2.0,
    ),
    placement=Placement(
        why="the earliest predicted first token",
        decode_worker="d-1",
        chosen=Figures(worker_id="p-0", cached_tokens=64, tokens=448, ttft_s=0.01),
        runner_up=Figures(worker_id="p-1", cached_tokens=0, tokens=512, ttft_s=0.02),
        local_prefill=False,
    ),
    handoff=Handoff(prefill_worker="p-0", decode_worker="d-1", transport="shm", nbytes=1 << 20, transfer_s=0.002),
    ttft_s=2.6,
    preemptions=1,
    retries=0,
    charge=Charge(
        reserved_tokens=768,
        reserved_money_micros=900,
        settled=True,
        prompt_tokens=512,
        cached_prompt_tokens=64,
        completion_tokens=100,
        money_micros=450,
        price_plan="list",
        cost=648.0,
    ),
    lines=((0.0, "queued"), (2.5, "prefill ordered")),
)


def test_a_story_answers_the_questions_in_order() -> None:
    said = show.request_story(STORY)
    heads = [line[:12].strip() for line in said.splitlines() if line[:12].strip()]
    assert heads == [
        *("request", "arrived", "waited", "placed", "predicted", "next best", "hand-off", "first token", "again"),
        *("charged", "story"),
    ]
    for words in (
        "1.0 s for its own tokens in flight",
        "behind 3 of its own",
        "40 of others",
        "p-0, then d-1",
        "1.0 MiB by shm",
        "448 tokens to compute, 64 tokens cached",
        "768 tokens reserved",
        "0.000450 by plan list",
    ):
        assert words in said


def test_a_refusal_is_said_with_its_limit_and_time() -> None:
    refused = replace(
        STORY,
        state="refused",
        reason="TOKENS_PER_MINUTE",
        error="600 tokens per minute are reached",
        retry_after_s=3.0,
        waited=replace(STORY.waited, queue_s=None),
        placement=None,
        handoff=None,
        ttft_s=None,
        charge=replace(STORY.charge, settled=False, reserved_tokens=0),
    )
    said = show.request_story(refused)
    assert "600 tokens per minute are reached (TOKENS_PER_MINUTE); try again in 3.0 s" in said
    assert "nothing reserved, nothing settled" in said


def test_usage_is_summed_by_tenant(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for number, (tenant, tokens) in enumerate((("a", 1000), ("b", 10), ("a", 500))):
        ledger.append(
            UsageFacts(
                record_id=str(number),
                request_id=str(number),
                tenant=tenant,
                model="m",
                lane=Lane.STANDARD,
                outcome=State.FINISHED,
                ended_wall_s=1_800_000_000.0,
                prompt_tokens=tokens,
                cached_prompt_tokens=0,
                completion_tokens=7,
                money_micros=2_000_000,
                price_plan="list",
            )
        )
    ledger.close()
    said = CliRunner().invoke(app, ["usage", "--file", str(tmp_path)])
    assert said.exit_code == 0, said.output
    assert re.search(r"^a +2 +1,500 +0 +14 +4\.000000 +list", said.output, re.MULTILINE)
    assert "b" in said.output
    only = CliRunner().invoke(app, ["usage", "--file", str(tmp_path), "--tenant", "b", "--since", "2027-01-01"])
    assert "1,500" not in only.output
    wrong = CliRunner().invoke(app, ["usage", "--file", str(tmp_path), "--since", "yesterday"])
    assert wrong.exit_code == 2
    assert "--since" in wrong.output
