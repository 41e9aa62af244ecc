"""Engines that were given certificates move KV between each other over TLS, and meet nobody without."""

from contextlib import AsyncExitStack
from pathlib import Path

from engine.base import EngineOptions
from engine.sim import SimEngine
from tests.certificates import Authority
from trust.tls import TlsFiles

MODEL = Path(__file__).parents[2] / "models" / "tandem-nano"


def options(name: str, tls: TlsFiles) -> EngineOptions:
    return EngineOptions(
        name=name,
        model=str(MODEL),
        served_model_name="nano",
        cluster_secret=b"secret" * 6,
        transports=("tcp",),
        tls=tls,
        kv_cache_bytes=8 << 20,
        staging_bytes=4 << 20,
    )


async def test_the_clusters_certificates_are_those_of_kv(tmp_path: Path) -> None:
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    async with AsyncExitStack() as stack:

        async def start(name: str, tls: TlsFiles) -> tuple[SimEngine, str]:
            engine = SimEngine(options(name, tls))
            stack.push_async_callback(engine.stop)
            return engine, (await engine.start()).kv_address

        _, address = await start("owner", ours.issue("owner", require_client_cert=True))
        reader, _ = await start("reader", ours.issue("reader", require_client_cert=True))
        lane = await reader.connect("owner", address)
        assert (lane.transport, lane.refusal) == ("tcp/tls", "")
        for name, tls in (("plain", TlsFiles()), ("stranger", theirs.issue("stranger"))):
            engine, _ = await start(name, tls)
            assert "can't be reached" in (await engine.connect("owner", address)).refusal
