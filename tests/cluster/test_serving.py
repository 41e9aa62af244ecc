"""What a healthy cluster owes its clients, on the simulated engine and on real vLLM."""

import asyncio
import json
import random
import signal
import subprocess
from collections import Counter

import pytest

from tandem import AsyncClient, Client, FinishReason, TandemError
from tests.cluster.harness import ON_BOTH, TANDEM, Cluster, clean_environment, wait_idle

REQUESTS = 200
AT_ONCE = 16


pytestmark = ON_BOTH


def test_a_prompt_goes_through_both_pools(shared: Cluster) -> None:
    with shared.client() as client:
        result = client.generate("def fibonacci(n):\n", max_tokens=24, temperature=0.0, ignore_eos=True).result()

    finished = result.finished
    assert result.text
    assert finished.reason is FinishReason.LENGTH
    assert finished.usage.completion_tokens == 24
    assert finished.usage.prompt_tokens > 1
    assert (finished.route.prefill_worker, finished.route.decode_worker) == ("prefill-0", "decode-0")
    assert finished.route.transport
    assert finished.route.transfer_bytes > 0
    assert finished.route.retries == 0
    assert not finished.route.local_prefill
    assert 0 < finished.timings.ttft_s <= finished.timings.total_s


def test_the_same_prompt_has_the_same_greedy_answer_and_deltas_add_up(shared: Cluster) -> None:
    prompt = "class Stack:\n    def __init__(self):\n"
    with shared.client() as client:
        generation = client.generate(prompt, max_tokens=32, temperature=0.0, ignore_eos=True, return_token_ids=True)
        deltas = list(generation)
        first = generation.result()
        second = client.generate(prompt, max_tokens=32, temperature=0.0, ignore_eos=True, return_token_ids=True)
        assert second.result().token_ids == first.token_ids
    assert "".join(delta.text for delta in deltas) == first.text
    assert sum((delta.token_ids for delta in deltas), ()) == first.token_ids
    assert len(first.token_ids) == 32


def test_the_command_says_events_as_json(shared: Cluster) -> None:
    done = shared.tandem("generate", "import os\n", "--json", "-n", "12", "-t", "0", "--ignore-eos")
    assert done.returncode == 0, done.stderr
    *deltas, end = (json.loads(line) for line in done.stdout.splitlines())
    assert {delta["event"] for delta in deltas} == {"delta"}
    assert sum(len(delta["token_ids"]) for delta in deltas) == 12
    assert end["event"] == "finished"
    assert end["usage"]["completion_tokens"] == 12
    assert end["route"]["prefill_worker"] == "prefill-0"
    assert end["route"]["decode_worker"] == "decode-0"
    assert end["timings"]["handoff_s"] > 0


def test_the_status_command_shows_both_pools(shared: Cluster) -> None:
    status = json.loads(shared.tandem("status", "--json").stdout)
    workers = {worker["worker_id"]: worker for worker in status["workers"]}
    assert {name: worker["role"] for name, worker in workers.items()} == {"prefill-0": "prefill", "decode-0": "decode"}
    assert {worker["state"] for worker in workers.values()} == {"ready"}
    table = shared.tandem("status").stdout.decode()
    assert "prefill-0" in table
    assert "decode-0" in table


async def test_nothing_is_left_after_many_requests_of_which_some_were_cancelled_or_abandoned(shared: Cluster) -> None:
    rng = random.Random(20)
    outcomes: Counter[str] = Counter()
    async with shared.async_client() as client:
        (model,) = await client.models()
        seeds = iter([rng.getrandbits(64) for _ in range(REQUESTS)])

        async def ask_in_turn() -> None:
            for seed in seeds:
                outcomes[await _one(client, shared.address, model.vocab_size, seed)] += 1

        await asyncio.gather(*(ask_in_turn() for _ in range(AT_ONCE)))
        print(dict(outcomes))
        assert outcomes["finished"] > REQUESTS // 4
        assert outcomes["cancelled"] > REQUESTS // 10
        assert outcomes["disconnected"] > REQUESTS // 10
        assert sum(outcomes.values()) == REQUESTS, "an error is not an outcome of a healthy cluster"
        status = await wait_idle(client)
        assert status.outcomes["finished"] >= outcomes["finished"]
        assert status.outcomes["cancelled"] > REQUESTS // 5, "too few were cancelled after they had reached the router"
        # And what is free can be used.
        await client.generate("x", max_tokens=2, timeout_s=60).result()


async def _one(client: AsyncClient, address: str, vocab_size: int, seed: int) -> str:
    """One request of any kind, and what its client did: let it finish, cancel it, or disconnect without a word."""
    rng = random.Random(seed)
    how = rng.choice(["finished", "finished", "cancelled", "disconnected"])
    prompt = [rng.randrange(2, vocab_size) for _ in range(int(2 ** rng.uniform(0, 10.5)))]
    deltas_taken = rng.choice([0, 0, 1, rng.randrange(2, 30)])
    own = AsyncClient(address) if how == "disconnected" else client
    try:
        generation = own.generate(
            prompt,
            max_tokens=rng.randrange(1, 64) if how == "finished" else 2000,  # not done before it is cancelled
            temperature=rng.choice([0.0, 1.0]),
            seed=rng.choice([None, rng.getrandbits(31)]),
            presence_penalty=rng.choice([None, 0.5]),
            ignore_eos=how != "finished",
            timeout_s=100,
        )
        if how == "finished":
            await generation.result()
            return how
        if deltas_taken == 0:
            await asyncio.sleep(rng.uniform(0, 0.1))
            generation.close()
            return how
        async for _ in generation:
            deltas_taken -= 1
            if deltas_taken == 0:
                if how == "cancelled":
                    break
                await own.close()
                return how
        generation.close()
        return how
    finally:
        if own is not client:
            await own.close()


def test_nothing_is_left_of_clients_that_were_killed(shared: Cluster) -> None:
    command = [*TANDEM, "generate", "x", "-n", "3000", "--ignore-eos", "--address", shared.address]
    children = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=clean_environment())
        for _ in range(3)
    ]
    for child in children:
        with child:
            assert child.stdout is not None
            child.stdout.read(1)
            child.send_signal(signal.SIGKILL)

    async def wait() -> None:
        async with shared.async_client() as client:
            await wait_idle(client)

    asyncio.run(wait())


def test_many_clients_in_threads_and_tasks_see_their_own_answers(shared: Cluster) -> None:
    """Answers depend on the prompt alone, whatever runs beside them."""
    prompts = [f"def f{n}(x):\n    return" for n in range(8)]

    def alone(client: Client, prompt: str) -> str:
        return client.generate(prompt, max_tokens=16, temperature=0.0, ignore_eos=True).result().text

    async def together() -> list[str]:
        async with shared.async_client() as client:
            generations = [client.generate(p, max_tokens=16, temperature=0.0, ignore_eos=True) for p in prompts]
            return [result.text for result in await asyncio.gather(*(g.result() for g in generations))]

    with shared.client() as client:
        expected = [alone(client, prompt) for prompt in prompts]
    if shared.engine == "sim":  # a real engine's numerics may depend on the batch
        assert asyncio.run(together()) == expected
        assert len(set(expected)) == len(prompts)
    else:
        assert all(asyncio.run(together()))


def test_a_finished_answer_is_counted_as_such(shared: Cluster) -> None:
    before = shared.status().outcomes.get("finished", 0)
    with shared.client() as client:
        client.generate("x", max_tokens=1).result()
        with pytest.raises(TandemError):
            client.generate("x", model="nobody").result()
    assert shared.status().outcomes["finished"] == before + 1
