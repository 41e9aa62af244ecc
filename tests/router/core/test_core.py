"""One decision at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from router.core import effects as fx
from router.core import events as ev
from router.core.errors import Cancelled, Expired, Invalid, Lost, NotFound, Rejected, TandemError, Unavailable
from router.core.lifecycle import IllegalTransition, State, Trigger, next_state
from router.core.request import FinishReason, Sampling, Structure, StructureKind
from router.core.worker import Role
from tests.router.core.world import EOS, Client, FakeWorker, World, facts, next_token, undisturbed

P, D, B = Role.PREFILL, Role.DECODE, Role.BOTH
PROMPT = (7, 8, 9, 10, 11)
GREEDY = Sampling(max_tokens=8, temperature=0.0, ignore_eos=True)
SEEDED = Sampling(max_tokens=8, temperature=1.0, seed=5, ignore_eos=True)


def pair(**limits: Any) -> tuple[World, FakeWorker, FakeWorker]:
    world = World(**limits)
    prefill, decode = world.join("p", P), world.join("d", D)
    world.settle()  # they have met
    return world, prefill, decode


def failure(client: Client) -> TandemError:
    assert isinstance(client.end, fx.Failed)
    return client.end.error


def finished(client: Client) -> fx.Finished:
    assert isinstance(client.end, fx.Finished)
    return client.end


def only_leg(worker: FakeWorker) -> str:
    (leg_id,) = worker.legs
    return leg_id


class TestTheWayThrough:
    def test_the_first_token_goes_out_before_the_transfer(self) -> None:
        world, p, _ = pair()
        client = world.submit("r", PROMPT, sampling=GREEDY)
        world.step(p)
        assert len(client.tokens) == 1
        assert world.core.state.requests["default/r"].state is State.HANDING_OFF

    def test_the_decode_leg_gets_prompt_and_first_token_and_what_is_left_to_generate(self) -> None:
        world, p, d = pair()
        sampling = Sampling(max_tokens=8, min_tokens=3, temperature=0.0)
        client = world.submit("r", PROMPT, sampling=sampling)
        world.step(p)
        (order,) = d.inbox
        assert isinstance(order, fx.SendDecode)
        assert order.token_ids == (*PROMPT, client.tokens[0])
        assert order.prompt_tokens == len(PROMPT)
        assert (order.sampling.max_tokens, order.sampling.min_tokens) == (7, 2)
        assert order.handle in p.leases

    @pytest.mark.parametrize(
        "sampling",
        [
            SEEDED,
            Sampling(max_tokens=8, presence_penalty=0.1, ignore_eos=True),
            Sampling(max_tokens=8, frequency_penalty=-0.1, ignore_eos=True),
        ],
    )
    def test_what_feeding_back_would_change_is_sampled_by_the_decode_leg(self, sampling: Sampling) -> None:
        world, p, d = pair()
        client = world.submit("r", PROMPT, sampling=sampling)
        (order,) = p.inbox
        assert isinstance(order, fx.SendPrefill)
        assert order.resample
        world.step(p)
        assert client.tokens == []
        (decode,) = d.inbox
        assert isinstance(decode, fx.SendDecode)
        assert decode.token_ids == PROMPT
        assert decode.sampling == sampling

    @pytest.mark.parametrize(
        "sampling",
        [
            Sampling(max_tokens=8, temperature=0.0, seed=1),
            Sampling(max_tokens=8, repetition_penalty=1.3),
            Sampling(max_tokens=1, temperature=1.0, seed=1),
        ],
    )
    def test_what_feeding_back_does_not_change_is_not_sampled_again(self, sampling: Sampling) -> None:
        world, p, _ = pair()
        world.submit("r", PROMPT, sampling=sampling)
        (order,) = p.inbox
        assert isinstance(order, fx.SendPrefill)
        assert not order.resample

    def test_an_answer_of_one_token_needs_no_hand_off(self) -> None:
        world, p, d = pair()
        client = world.submit("r", PROMPT, sampling=Sampling(max_tokens=1, temperature=0.0, ignore_eos=True))
        (order,) = p.inbox
        assert isinstance(order, fx.SendPrefill)
        assert not order.hand_off
        world.step(p)
        assert finished(client).reason is FinishReason.LENGTH
        assert not d.inbox

    def test_a_first_token_that_ends_the_answer_ends_it_at_the_router(self) -> None:
        world, p, d = pair()
        sampling = Sampling(max_tokens=8, temperature=0.0)
        prompt = next((1, 2, n) for n in range(1, 500) if next_token((1, 2, n), 0, sampling) == EOS)
        client = world.submit("r", prompt, sampling=sampling)
        world.step(p)
        assert finished(client).reason is FinishReason.STOP
        assert finished(client).usage.completion_tokens == 1
        assert not d.inbox

    def test_finished_tells_usage_timings_and_route(self) -> None:
        world, p, d = pair()
        client = world.submit("r", PROMPT, sampling=GREEDY)
        world.now = 1.0
        world.step(p)
        world.now = 1.5
        world.settle()
        end = finished(client)
        assert (end.usage.prompt_tokens, end.usage.completion_tokens) == (5, 8)
        assert end.timings.queue_s == 0.0
        assert end.timings.prefill_s == end.timings.ttft_s == 1.0
        assert end.timings.handoff_s == 0.5
        assert end.timings.transfer_s == 0.001
        assert end.timings.total_s == 1.5
        assert (end.route.prefill_worker, end.route.decode_worker, end.route.transport) == ("p", "d", "memory")
        assert (end.route.retries, end.route.local_prefill) == (0, False)

    def test_a_worker_that_says_too_much_is_cut_off_at_max_tokens(self) -> None:
        world = World()
        worker = world.join("b", B)
        client = world.submit("r", PROMPT, sampling=GREEDY)
        world.deliver(worker)
        leg_id = only_leg(worker)
        answer = undisturbed(client.request)
        effects = world.post(ev.StepOutputs("b", (ev.StepOutput(leg_id, (*answer, 3, 4)),)))
        assert fx.CancelLeg("b", leg_id) in effects
        assert tuple(client.tokens) == answer

    def test_a_stop_string_found_by_the_edge_finishes_the_answer_and_cancels_its_leg(self) -> None:
        world, p, d = pair()
        client = world.submit("r", PROMPT, sampling=GREEDY)
        world.step(p)
        world.step(d)
        world.step(d)
        client.stopped_after = 1
        world.post(ev.StopMatched("default/r", 1))
        assert finished(client).reason is FinishReason.STOP
        assert finished(client).usage.completion_tokens == 1
        world.check_nothing_left()

    def test_a_whole_batch_of_outputs_is_one_event(self) -> None:
        world = World()
        worker = world.join("b", B)
        clients = [world.submit(f"r{i}", (i, 2, 3), sampling=GREEDY) for i in range(1, 3)]
        while worker.inbox:
            world.deliver(worker)
        outputs = tuple(
            ev.StepOutput(leg_id, undisturbed(client.request)[:2])
            for leg_id, client in zip(worker.legs, clients, strict=True)
        )
        effects = world.post(ev.StepOutputs("b", outputs))
        assert [effect.key for effect in effects if isinstance(effect, fx.Emit)] == ["default/r1", "default/r2"]


class TestPlacement:
    def test_the_prefill_worker_with_the_least_before_it_is_chosen(self) -> None:
        world = World()
        world.join("p1", P), world.join("p2", P), world.join("d", D)
        world.submit("long", tuple(range(1, 21)))
        world.submit("short", (1, 2))
        world.submit("next", (3, 4))
        at = {opened.request.request_id: opened.prefill_worker for opened in world.core.state.requests.values()}
        assert at == {"long": "p1", "short": "p2", "next": "p2"}

    def test_the_decode_worker_with_the_most_room_is_chosen(self) -> None:
        world = World()
        world.join("p", P, prefill_legs=4), world.join("small", D, kv_blocks=20), world.join("large", D, kv_blocks=30)
        for i in range(1, 4):
            world.submit(f"r{i}", (i,) * 12, sampling=Sampling(max_tokens=20))  # 8 blocks each
        at = {opened.request.request_id: opened.slot_at for opened in world.core.state.requests.values()}
        assert at == {"r1": "large", "r2": "large", "r3": "small"}

    def test_two_whole_engines_take_turns(self) -> None:
        world = World()
        world.join("b1", B), world.join("b2", B)
        for i in range(1, 5):
            world.submit(f"r{i}", (i, 2))
        at = [opened.slot_at or "" for opened in world.core.state.requests.values()]
        assert sorted(at[:2]) == sorted(at[2:]) == ["b1", "b2"]

    def test_a_decode_worker_alone_computes_prompts_itself_within_its_budget(self) -> None:
        world = World(local_prefill_tokens_max=8)
        d = world.join("d", D)
        clients = [world.submit(f"r{i}", PROMPT, sampling=GREEDY) for i in range(2)]
        assert len(d.inbox) == 1
        assert world.core.state.queued == 1
        world.step(d)  # its first token: the prompt is computed, the budget free again
        assert world.core.state.queued == 0
        world.settle()
        assert [finished(client).route.local_prefill for client in clients] == [True, True]

    def test_a_prompt_past_the_budget_is_computed_alone(self) -> None:
        world = World(local_prefill_tokens_max=4)
        world.join("d", D)
        client = world.submit("r", PROMPT)
        world.settle()
        assert isinstance(client.end, fx.Finished)

    def test_with_a_prefill_worker_there_a_request_waits_for_it_rather_than_for_luck(self) -> None:
        world = World()
        world.join("p", P, prefill_legs=1), world.join("d", D)
        world.submit("r1"), world.submit("r2")
        assert world.core.state.requests["default/r2"].state is State.QUEUED

    def test_a_pair_that_cannot_exchange_blocks_is_not_used(self) -> None:
        world, p, d = pair()
        world.join("p2", P)
        world.say_lane(d, "p", "dtype: f32 here, bf16 there")
        world.settle()
        for i in range(3):
            world.submit(f"r{i}")
        assert not p.inbox

    def test_when_no_pair_can_the_decode_worker_serves_alone(self) -> None:
        world, _, d = pair()
        world.say_lane(d, "p", "no transport in common")
        world.settle()
        client = world.submit("r")
        world.settle()
        assert finished(client).route.local_prefill

    def test_legs_and_kv_room_bound_what_a_worker_gets(self) -> None:
        world = World()
        world.join("p", P, prefill_legs=9, kv_blocks=7), world.join("d", D, decode_legs=9)
        for i in range(9):
            world.submit(f"r{i}", PROMPT)  # pins 2 blocks
        assert len(world.core.state.workers["p"].pinned) == 3

    def test_a_prompt_too_large_for_every_prefill_worker_goes_to_a_decode_worker(self) -> None:
        world = World()
        world.join("p", P, kv_blocks=1), world.join("d", D)
        client = world.submit("r", PROMPT)
        world.settle()
        assert finished(client).route.local_prefill

    def test_what_no_worker_could_ever_hold_is_refused_at_once(self) -> None:
        world = World()
        world.join("d", D, kv_blocks=2)
        client = world.submit("r", PROMPT, sampling=Sampling(max_tokens=100))
        error = failure(client)
        assert error.reason == "KV_ROOM"
        assert error.retry_after_s is None

    def test_requests_are_dispatched_first_come_first_served(self) -> None:
        world = World()
        b = world.join("b", B, prefill_legs=1, decode_legs=1)
        order = []
        for i in range(4):
            world.submit(f"r{i}", sampling=Sampling(max_tokens=1, temperature=0.0))
        while b.inbox or b.legs:
            order += [effect.leg_id.split("/")[1] for effect in b.inbox if isinstance(effect, fx.SendDecode)]
            world.step(b)
        assert order == ["r0", "r1", "r2", "r3"]


class TestAdmission:
    def test_a_full_queue_refuses_by_name_with_a_time(self) -> None:
        world = World(queue_requests_max=2)
        for i in range(2):
            world.submit(f"r{i}")
        error = failure(world.submit("r2"))
        assert isinstance(error, Rejected)
        assert error.reason == "QUEUE_REQUESTS"
        assert error.retry_after_s == 1.0
        assert "2 requests" in error.message

    def test_a_queue_full_of_tokens_refuses_too(self) -> None:
        world = World(queue_tokens_max=8)
        world.submit("r0", PROMPT)
        assert failure(world.submit("r1", PROMPT)).reason == "QUEUE_TOKENS"
        assert world.submit("r2", (1, 2)).end is None

    def test_an_unknown_model_is_not_found(self) -> None:
        assert isinstance(failure(World().submit("r", model="other")), NotFound)

    def test_a_deadline_that_passed_is_expired_before_any_work(self) -> None:
        world, p, _ = pair()
        assert isinstance(failure(world.submit("r", timeout_s=0.0)), Expired)
        assert not p.inbox
        assert world.core.stats.outcomes[State.EXPIRED] == 1

    def test_without_workers_requests_wait_a_while_then_fail_and_new_ones_are_refused(self) -> None:
        world = World(path_wait_s=5.0)
        waiting = world.submit("r1")
        world.advance(4.9)
        assert waiting.end is None
        world.advance(0.2)
        error = failure(waiting)
        assert isinstance(error, Unavailable)
        assert error.reason == "NO_WORKERS"
        assert error.retry_after_s is not None
        assert failure(world.submit("r2")).reason == "NO_WORKERS"

    def test_a_worker_that_comes_in_time_serves_what_waited(self) -> None:
        world = World(path_wait_s=5.0)
        waiting = world.submit("r1")
        world.advance(4.0)
        world.join("b", B)
        world.settle()
        assert isinstance(waiting.end, fx.Finished)

    def test_prefill_workers_alone_are_no_path(self) -> None:
        world = World()
        world.join("p", P)
        assert not world.core.serves("tiny")
        world.join("d", D)
        assert world.core.serves("tiny")

    def test_a_router_that_shuts_down_refuses_and_at_the_end_fails_the_rest(self) -> None:
        world, _, _ = pair()
        running = world.submit("r1")
        world.post(ev.ShutdownRequested())
        assert failure(world.submit("r2")).reason == "SHUTTING_DOWN"
        assert running.end is None
        world.post(ev.ShutdownRequested(final=True))
        assert failure(running).reason == "SHUTTING_DOWN"
        world.check_nothing_left()


class TestFailures:
    def test_a_failed_prefill_runs_again_elsewhere_and_keeps_its_slot(self) -> None:
        world = World()
        p1, p2, _ = world.join("p1", P), world.join("p2", P), world.join("d1", D)
        world.join("d2", D)
        client = world.submit("r")
        slot = world.core.state.requests["default/r"].slot_at
        world.deliver(p1)
        world.fail(p1, only_leg(p1), ev.Failure.ENGINE)
        world.report(p1)
        assert len(p2.inbox) == 1
        assert world.core.state.requests["default/r"].slot_at == slot
        world.settle()
        assert finished(client).route.retries == 1
        assert finished(client).route.prefill_worker == "p2"

    def test_a_failed_transfer_runs_the_prefill_again_with_the_tokens_so_far(self) -> None:
        world, p, d = pair()
        client = world.submit("r", PROMPT, sampling=GREEDY)
        world.step(p)
        p.leases.clear()
        world.step(d)
        world.step(d)
        order = p.inbox[-1]
        assert isinstance(order, fx.SendPrefill)
        assert order.token_ids == (*PROMPT, client.tokens[0])
        world.settle()
        assert finished(client).route.retries == 1
        assert not finished(client).route.local_prefill

    def test_after_too_many_failed_transfers_the_decode_worker_computes_the_prompt(self) -> None:
        world, p, _ = pair(prefill_attempts_max=2)
        client = world.submit("r", PROMPT, sampling=GREEDY)
        while client.end is None:
            p.leases.clear()
            for worker in tuple(world.workers.values()):
                world.step(worker)
                p.leases.clear()
        end = finished(client)
        assert end.route.local_prefill
        assert end.route.retries == 2
        assert end.route.transport == ""

    def test_a_handle_that_nobody_reads_is_released_when_the_decode_leg_fails(self) -> None:
        world, p, d = pair()
        world.submit("r", PROMPT, sampling=GREEDY)
        world.step(p)
        (handle,) = p.leases
        world.deliver(d)
        world.fail(d, only_leg(d), ev.Failure.ENGINE)
        world.report(d)
        assert fx.ReleaseLease("p", handle) in p.inbox

    def test_a_worker_that_refuses_rests_before_it_is_asked_again(self) -> None:
        world, p, _ = pair(rest_s_min=0.5)
        world.submit("r")
        world.deliver(p)
        world.fail(p, only_leg(p), ev.Failure.REJECTED)
        world.report(p)
        assert not p.inbox
        world.advance(0.4)
        assert not p.inbox
        world.advance(0.2)
        assert len(p.inbox) == 1

    def test_the_pause_doubles_and_a_success_ends_it(self) -> None:
        world, p, _ = pair(rest_s_min=0.5, prefill_attempts_max=9)
        world.submit("r")
        for expected in (0.5, 1.0, 2.0):
            world.deliver(p)
            world.fail(p, only_leg(p), ev.Failure.REJECTED)
            world.report(p)
            assert world.core.state.workers["p"].rest_until - world.now == expected
            world.advance(expected)
        world.step(p)
        assert world.core.state.workers["p"].strikes == 0

    def test_a_lost_prefill_worker_costs_latency_not_an_error(self) -> None:
        world, p, _ = pair()
        client = world.submit("r")
        world.deliver(p)
        world.lose("p")
        world.join("p2", P)
        world.settle()
        assert isinstance(client.end, fx.Finished)

    def test_a_prefill_worker_lost_while_its_blocks_are_fetched_is_not_waited_for(self) -> None:
        world, p, d = pair()
        client = world.submit("r", PROMPT, sampling=GREEDY)
        world.step(p)
        world.deliver(d)
        leg_id = only_leg(d)
        world.join("p2", P)
        world.lose("p")
        assert fx.CancelLeg("d", leg_id) in d.inbox
        world.settle()
        assert finished(client).route.prefill_worker == "p2"

    @pytest.mark.parametrize("sampling", [GREEDY, SEEDED])
    def test_a_decode_worker_lost_in_mid_stream_does_not_break_the_stream(self, sampling: Sampling) -> None:
        world, p, d = pair()
        client = world.submit("r", PROMPT, sampling=sampling)
        world.step(p)
        for _ in range(5):
            world.step(d)
        sent = len(client.tokens)
        assert 3 <= sent < 8
        world.lose("d")
        world.join("d2", D)
        world.settle()
        assert tuple(client.tokens) == undisturbed(client.request)
        assert finished(client).route.decode_worker == "d2"

    def test_what_may_be_fed_back_is_continued_and_what_may_not_is_replayed(self) -> None:
        for sampling, given in ((GREEDY, 3), (SEEDED, 0)):
            world, p, d = pair()
            client = world.submit("r", PROMPT, sampling=sampling)
            world.step(p)
            while len(client.tokens) < 3:
                world.step(d)
            world.lose("d")
            world.join("d2", D)
            order = p.inbox[-1]
            assert isinstance(order, fx.SendPrefill)
            assert order.token_ids == PROMPT + tuple(client.tokens[:given])
            assert order.sampling.max_tokens == 8 - given

    def test_a_replay_that_gives_other_tokens_is_dropped_and_the_stream_continues_from_what_was_sent(self) -> None:
        world = World()
        b = world.join("b", B)
        client = world.submit("r", PROMPT, sampling=SEEDED)
        for _ in range(3):
            world.step(b)
        world.lose("b")
        b2 = world.join("b2", B)
        world.deliver(b2)
        world.post(ev.StepOutputs("b2", (ev.StepOutput(only_leg(b2), ((client.tokens[0] + 1) % 50,)),)))
        assert client.end is None
        order = b2.inbox[-1]
        assert isinstance(order, fx.SendDecode)
        assert order.token_ids == PROMPT + tuple(client.tokens)
        assert order.sampling.max_tokens == 5

    def test_an_answer_with_a_form_begins_at_the_decode_worker_and_is_only_ever_replayed(self) -> None:
        formed = dataclasses.replace(SEEDED, structure=Structure(StructureKind.JSON_OBJECT))
        world, p, d = pair()
        client = world.submit("r", PROMPT, sampling=formed)
        world.step(p)
        assert not client.tokens
        for _ in range(3):
            world.step(d)
        world.lose("d")
        d2 = world.join("d2", D)
        world.step(p)
        order = next(order for order in d2.inbox if isinstance(order, fx.SendDecode))
        assert (order.token_ids, order.sampling) == (PROMPT, formed)
        world.post(ev.StepOutputs("d2", (ev.StepOutput(order.leg_id, ((client.tokens[0] + 1) % 50,)),)))
        assert isinstance(failure(client), Lost)

    def test_a_form_that_the_engine_cannot_follow_is_named(self) -> None:
        world, p, _ = pair()
        client = world.submit("r", sampling=dataclasses.replace(GREEDY, structure=Structure(StructureKind.REGEX, "(")))
        world.deliver(p)
        world.fail(p, only_leg(p), ev.Failure.INVALID)
        world.report(p)
        error = failure(client)
        assert isinstance(error, Invalid)
        assert error.field == "sampling.structure"

    def test_attempts_are_bounded_and_their_end_is_typed(self) -> None:
        world = World(decode_attempts_max=2)
        client = world.submit("r")
        for i in range(2):
            b = world.join(f"b{i}", B)
            world.deliver(b)
            world.lose(f"b{i}")
        error = failure(client)
        assert isinstance(error, Lost)
        assert error.retry_after_s is not None

    def test_an_order_at_fault_fails_without_another_attempt(self) -> None:
        world, p, _ = pair()
        client = world.submit("r")
        world.deliver(p)
        world.fail(p, only_leg(p), ev.Failure.INVALID)
        world.report(p)
        assert isinstance(failure(client), Invalid)
        world.check_nothing_left()

    def test_a_silent_worker_is_lost_and_its_link_closed(self) -> None:
        world, p, d = pair(silence_s_max=3.0)
        world.submit("r", timeout_s=60.0)
        for _ in range(4):
            world.say_load(d)
            world.report(d)
            world.advance(1.0)
        assert "p" not in world.workers
        assert "d" in world.workers

    def test_a_new_incarnation_replaces_the_old_one(self) -> None:
        world, p, _ = pair()
        client = world.submit("r")
        world.deliver(p)
        world.join("p", P, incarnation="i1")
        world.settle()
        assert isinstance(client.end, fx.Finished)

    def test_messages_about_unknown_legs_are_ignored(self) -> None:
        world, p, d = pair()
        client = world.submit("r")
        (order,) = p.inbox
        assert isinstance(order, fx.SendPrefill)
        world.post(ev.PrefillDone(worker_id="d", leg_id=order.leg_id, token_id=3))  # not its leg
        world.post(ev.LegFailed("d", order.leg_id, ev.Failure.ENGINE))
        world.post(ev.StepOutputs("p", (ev.StepOutput(order.leg_id, (4,)), ev.StepOutput("x/1/d", (4,)))))
        world.post(ev.StepOutputs("nobody", (ev.StepOutput(order.leg_id, (4,)),)))
        world.post(ev.Fetched(worker_id="d", leg_id="x/1/d", transport="", nbytes=0, fetch_s=0.0))
        assert client.tokens == []
        assert world.core.state.requests["default/r"].state is State.PREFILLING


class TestEnds:
    @pytest.mark.parametrize("steps", [0, 1, 2, 3, 4])
    def test_cancel_reaches_both_sides_and_leaves_nothing(self, steps: int) -> None:
        world, p, d = pair()
        client = world.submit("r", PROMPT, sampling=GREEDY)
        for worker in (p, d, d, d)[:steps]:
            world.step(worker)
        world.post(ev.Cancel("default/r"))
        assert isinstance(failure(client), Cancelled)
        world.check_nothing_left()

    def test_a_cancel_while_blocks_wait_to_be_fetched_releases_their_lease(self) -> None:
        world, p, d = pair()
        world.submit("r", PROMPT, sampling=GREEDY)
        world.step(p)
        (handle,) = p.leases
        effects = world.post(ev.Cancel("default/r"))
        assert fx.ReleaseLease("p", handle) in effects
        assert any(isinstance(effect, fx.CancelLeg) and effect.worker_id == "d" for effect in effects)

    @pytest.mark.parametrize("steps", [0, 1, 2, 3])
    def test_the_deadline_ends_a_request_in_every_state(self, steps: int) -> None:
        world, p, d = pair()
        client = world.submit("r", PROMPT, sampling=GREEDY, timeout_s=2.0)
        for worker in (p, d, d)[:steps]:
            world.step(worker)
        world.advance(2.0)
        assert isinstance(failure(client), Expired)
        world.check_nothing_left()

    def test_a_request_that_waits_expires_in_the_queue(self) -> None:
        world = World()
        client = world.submit("r", timeout_s=2.0)
        world.advance(2.0)
        assert isinstance(failure(client), Expired)
        assert world.core.state.queued == 0

    def test_a_client_that_leaves_at_its_deadline_is_counted_expired(self) -> None:
        world, _, _ = pair()
        world.submit("r", timeout_s=2.0)
        world.now = 2.0
        world.post(ev.Cancel("default/r"))
        assert world.core.stats.outcomes[State.EXPIRED] == 1

    def test_a_reader_that_never_reads_is_cut_off(self) -> None:
        world, p, _ = pair()
        client = world.submit("r")
        world.step(p)
        world.post(ev.Overrun("default/r"))
        assert failure(client).reason == "STREAM_BUFFER"
        world.check_nothing_left()

    def test_the_stories_of_ended_requests_are_kept_within_a_bound(self) -> None:
        world = World(history_max=3)
        world.join("b", B)
        for i in range(5):
            world.submit(f"r{i}")
            world.settle()
        told = [world.story(f"r{i}") for i in range(5)]
        assert [story is not None for story in told] == [False, False, True, True, True]
        story = [what for _, what in told[4].lines]  # type: ignore[union-attr]
        assert story[0].startswith("queued")
        assert story[-1] == "finished"

    def test_a_missing_pair_raises_with_the_story(self) -> None:
        with pytest.raises(IllegalTransition, match=r"(?s)fetched in queued.*once upon a time"):
            next_state(State.QUEUED, Trigger.FETCHED, "once upon a time")

    def test_stale_deadlines_are_not_kept(self) -> None:
        world = World()
        world.join("b", B)
        for i in range(1_000):
            world.submit(f"r{i}", sampling=Sampling(max_tokens=1))
            world.post(ev.Cancel(f"default/r{i}"))
        assert len(world.core._timers) < 200
        assert world.core.next_deadline() == 15.0  # the look for silent workers


class TestMembership:
    @pytest.mark.parametrize(
        ("change", "name"),
        [
            ({"revision": "other"}, "model.revision: r in the pool, other offered"),
            ({"vocab_size": 9}, "model.vocab_size: 50 in the pool, 9 offered"),
            ({"name": "giant"}, "model.name: 'giant' offered, this router serves tiny"),
        ],
    )
    def test_a_worker_of_another_model_is_refused_naming_the_difference(
        self, change: dict[str, object], name: str
    ) -> None:
        world, _, _ = pair()
        other = facts("x", D)
        model = dataclasses.replace(other.model, **change)  # type: ignore[arg-type]
        assert name in world.core.misfit(dataclasses.replace(other, model=model))

    def test_a_worker_of_another_layout_is_refused_naming_the_difference(self) -> None:
        world, _, _ = pair()
        other = facts("x", D)
        other = dataclasses.replace(other, kv=dataclasses.replace(other.kv, layout={"dtype": "bf16"}))
        assert world.core.misfit(other) == "kv.layout.dtype: f32 in the pool, bf16 offered"

    def test_its_own_former_incarnation_has_no_say(self) -> None:
        world = World()
        world.join("b", B)
        other = facts("b", B, incarnation="i1")
        other = dataclasses.replace(other, model=dataclasses.replace(other.model, revision="next"))
        assert world.core.misfit(other) == ""

    def test_decode_workers_hear_of_each_prefill_worker_once(self) -> None:
        world = World()
        p1, d1 = world.join("p1", P), world.join("d1", D)
        d2 = world.join("d2", D)
        world.join("p2", P)
        world.join("b", B)
        assert not p1.inbox
        assert [[peer.worker_id for peer in order.peers] for order in d1.inbox if isinstance(order, fx.SendPeers)] == [
            ["p1"],
            ["p2"],
        ]
        assert [[peer.worker_id for peer in order.peers] for order in d2.inbox if isinstance(order, fx.SendPeers)] == [
            ["p1"],
            ["p2"],
        ]

    def test_a_worker_that_takes_a_role_meets_its_peers(self) -> None:
        world = World()
        world.join("p", P)
        x = world.join("x", P)
        effects = world.post(ev.RoleChanged("x", D))
        assert [effect for effect in effects if isinstance(effect, fx.SendPeers)] == [
            fx.SendPeers("x", (world.workers["p"].facts,))
        ]
        assert x.inbox

    def test_a_draining_worker_finishes_its_legs_and_gets_no_more(self) -> None:
        world = World()
        b1 = world.join("b1", B)
        running = world.submit("r1")
        world.step(b1)
        world.post(ev.DrainRequested("b1"))
        b2 = world.join("b2", B)
        world.submit("r2")
        assert len(b2.inbox) == 1
        world.settle()
        assert isinstance(running.end, fx.Finished)

    def test_a_decode_worker_that_drains_before_the_hand_off_is_replaced(self) -> None:
        world, p, d = pair()
        client = world.submit("r")
        world.join("d2", D)
        world.deliver(p)
        world.announce_drain(d)
        world.report(d)
        world.settle()
        assert finished(client).route.decode_worker == "d2"

    def test_a_slot_is_not_kept_at_a_worker_that_decodes_no_more(self) -> None:
        world, p, d = pair()
        client = world.submit("r", PROMPT, sampling=GREEDY)
        world.step(p)
        world.deliver(d)  # fetching
        world.post(ev.RoleChanged("d", P))
        p.leases.clear()
        world.step(d)
        world.join("d2", D)
        world.settle()
        assert finished(client).route.decode_worker == "d2"

    def test_a_role_changes_when_the_worker_says_so(self) -> None:
        world, _, d = pair()
        world.post(ev.SetRoleRequested("d", P))
        assert d.inbox[-1] == fx.SendSetRole("d", P)
        assert world.core.state.workers["d"].role is D
        world.deliver(d)
        world.report(d)
        assert world.core.state.workers["d"].role is P


class TestOverlap:
    LONG = tuple(range(1, 20))

    def test_blocks_that_are_offered_early_are_fetched_ahead_by_whoever_will_decode(self) -> None:
        world, p, d = pair()
        client = world.submit("r", self.LONG, sampling=GREEDY)
        world.deliver(p)
        leg_id = only_leg(p)
        world.compute(p, leg_id)
        world.report(p)
        (hint,) = d.inbox
        assert isinstance(hint, fx.FetchAhead)
        assert (hint.leg_id, hint.handle, hint.timeout_s) == (leg_id, next(iter(p.leases)), 60.0)
        world.step(p)
        order = d.inbox[-1]
        assert isinstance(order, fx.SendDecode)
        assert order.handle == hint.handle
        world.settle()
        assert finished(client).reason is FinishReason.LENGTH
        world.check_nothing_left()

    @pytest.mark.parametrize("prefill_is_done", [False, True])
    def test_a_cancel_gives_up_what_is_fetched_ahead(self, prefill_is_done: bool) -> None:
        world, p, d = pair()
        world.submit("r", self.LONG, sampling=GREEDY)
        world.step(p)
        if prefill_is_done:
            world.step(p)
        world.deliver(d)
        assert d.ahead
        world.post(ev.Cancel("default/r"))
        world.settle()
        world.check_nothing_left()

    def test_a_decode_worker_that_goes_is_not_told_of_what_it_took_with_it(self) -> None:
        world, p, _ = pair()
        world.submit("r", self.LONG, sampling=GREEDY)
        world.step(p)
        world.lose("d")
        cancels = [effect for effect in world.effects if isinstance(effect, fx.CancelLeg)]
        assert [effect.worker_id for effect in cancels] == ["p"]

    def test_an_offer_of_a_leg_that_was_given_up_is_no_hint(self) -> None:
        world, p, d = pair()
        world.submit("r", self.LONG, sampling=GREEDY)
        world.deliver(p)
        leg_id = only_leg(p)
        world.compute(p, leg_id)
        world.post(ev.Cancel("default/r"))
        world.report(p)
        assert not d.inbox
