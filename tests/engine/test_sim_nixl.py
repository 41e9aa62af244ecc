"""Two simulated engines in two processes, KV moved by NIXL: the bytes that arrive are those that left."""

import asyncio
import json
import multiprocessing
import random
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from engine.base import DecodeLeg, EngineOptions, PrefillLeg, PrefillResult, Sampling
from engine.sim import SimEngine

VOCAB = 800
CONFIG = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 256,
}


def options(model: str, name: str) -> EngineOptions:
    return EngineOptions(
        name=name,
        model=model,
        served_model_name="nano",
        cluster_secret=b"secret" * 6,
        transports=("nixl",),
        kv_cache_bytes=32 << 20,
        staging_bytes=16 << 20,
        prefix_caching=False,
    )


def run_owner(model: str, pipe: Connection) -> None:
    """A prefill worker: says its address, answers legs until it is sent None, then says how many blocks are taken."""
    asyncio.run(serve(SimEngine(options(model, "owner")), pipe))


async def serve(owner: SimEngine, pipe: Connection) -> None:
    info = await owner.start()
    pipe.send(info.kv_address)
    while (leg := await asyncio.to_thread(pipe.recv)) is not None:
        pipe.send(await owner.prefill(leg))
    async with asyncio.timeout(20):
        while (load := await owner.load()).leases_held:  # noqa: ASYNC110 - the last release is on its way
            await asyncio.sleep(0.005)
    pipe.send(load.kv_blocks_total - load.kv_blocks_free)
    await owner.stop()


async def test_answers_across_processes_are_those_of_one_engine(tmp_path: Path) -> None:
    pytest.importorskip("nixl_cu12", reason="NIXL is not installed")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    ours, theirs = multiprocessing.Pipe()
    owner = multiprocessing.get_context("spawn").Process(target=run_owner, args=(str(tmp_path), theirs), daemon=True)
    owner.start()
    theirs.close()
    reader = SimEngine(options(str(tmp_path), "reader"))
    try:
        await reader.start()
        lane = await reader.connect("owner", await asyncio.to_thread(ours.recv))
        assert (lane.transport, lane.refusal) == ("nixl/cma", "")
        draw = random.Random(0)
        for index, count in enumerate([1, 31, 32, 33, 3000, *(draw.randint(1, 3000) for _ in range(20))]):
            prompt = tuple(draw.choices(range(VOCAB), k=count))
            sampling = Sampling(max_tokens=12, temperature=1.0, seed=index if index % 2 else None)
            whole = DecodeLeg(
                leg_id=f"{index}/whole", tenant="t", token_ids=prompt, prompt_tokens=count, sampling=sampling
            )
            prefill = PrefillLeg(
                leg_id=f"{index}/p", tenant="t", token_ids=prompt, sampling=sampling, hand_off=True, reader="reader"
            )
            ours.send(prefill)
            result: PrefillResult = await asyncio.to_thread(ours.recv)
            assert result.handle is not None
            staged = await reader.fetch(result.handle, 60)
            got = await collect(reader, replace(whole, leg_id=f"{index}/d", staged=staged))
            assert got[0] == result.token_id
            assert got == await collect(reader, whole), f"{count} tokens"
        load = await reader.load()
        assert load.transfer_bytes_total > 0
        assert load.extra["kv_mismatches_total"] == load.staged_pages == 0
        ours.send(None)
        assert await asyncio.to_thread(ours.recv) == 0
        await asyncio.to_thread(owner.join, 60)
        assert owner.exitcode == 0
    finally:
        await reader.stop()
        owner.kill()
        owner.join()


async def collect(engine: SimEngine, leg: DecodeLeg) -> list[int]:
    return [token async for output in engine.decode(leg) for token in output.token_ids]
