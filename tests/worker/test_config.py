from dataclasses import replace
from typing import Any

import pytest

from decode.admission import DecodeLimits
from engine.base import EngineOptions
from prefill.admission import PrefillLimits
from tests.worker.running import worker_config
from worker.config import LinkSettings, LogSettings, Role, WorkerConfig, from_json, to_json

CONFIG = worker_config("127.0.0.1:7000", "localhost:7000")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"routers": ()}, "routers: must name at least one"),
        ({"routers": ("a:1", "a:1")}, "routers: names one twice"),
        ({"routers": ("nowhere",)}, "routers: 'nowhere' is not host:port"),
        ({"routers": ("host:70000",)}, "routers: 'host:70000' is not host:port"),
        ({"health_address": "8080"}, "health_address: '8080' is not host:port"),
        ({"metrics_address": ":"}, "metrics_address: ':' is not host:port"),
        ({"peers_met_at_once": 0}, "peers_met_at_once: must be at least 1, is 0"),
        ({"drain_grace_s": -1}, "drain_grace_s: must not be negative, is -1"),
        ({"stop_timeout_s": 0}, "stop_timeout_s: must be more than 0, is 0"),
        ({"prefill": PrefillLimits(running=0)}, "prefill.running: must be at least 1, is 0"),
        ({"prefill": PrefillLimits(running_tokens=0)}, "prefill.running_tokens: must be at least 1, is 0"),
        ({"prefill": PrefillLimits(queued=-1)}, "prefill.queued: must not be negative, is -1"),
        ({"prefill": PrefillLimits(lease_ttl_s=0)}, "prefill.lease_ttl_s: must be more than 0, is 0"),
        ({"decode": DecodeLimits(legs=0)}, "decode.legs: must be at least 1, is 0"),
        ({"decode": DecodeLimits(fetches=0)}, "decode.fetches: must be at least 1, is 0"),
        ({"decode": DecodeLimits(fetch_timeout_s=float("inf"))}, "decode.fetch_timeout_s: must be more than 0"),
        ({"link": LinkSettings(retry_first_s=9, retry_max_s=1)}, "link.retry_first_s: 9 is more than link.retry_max_s"),
        ({"link": LinkSettings(outbox_max=0)}, "link.outbox_max: must be more than 0, is 0"),
        ({"log": LogSettings(level="LOUD")}, "log.level: must be one of DEBUG, INFO, WARNING, ERROR, is 'LOUD'"),
        # Relations.
        (
            {"decode": DecodeLimits(fetch_timeout_s=6)},
            "decode.fetch_timeout_s: 6 is more than prefill.lease_ttl_s: 5",
        ),
        ({"drain_grace_s": 4}, "drain_grace_s: 4 is less than prefill.lease_ttl_s: 5"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_key(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match="(?m)^" + problem.replace(".", r"\.")):
        replace(CONFIG, **change)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ValueError, match="routers") as error:
        replace(CONFIG, routers=(), peers_met_at_once=0, decode=DecodeLimits(legs=0, fetch_timeout_s=1))
    assert len(str(error.value).splitlines()) == 3


def test_only_a_worker_with_leases_needs_grace_for_them() -> None:
    replace(CONFIG, role=Role.DECODE, drain_grace_s=0)


def test_the_worker_is_called_as_its_engine_is() -> None:
    assert CONFIG.worker_id == "w0"
    with pytest.raises(ValueError, match=r"engine_options\.name"):
        replace(CONFIG, engine_options=replace(CONFIG.engine_options, name=""))


def test_a_configuration_survives_the_way_to_its_process() -> None:
    assert from_json(to_json(CONFIG)) == CONFIG


def test_a_configuration_that_is_wrong_does_not_arrive() -> None:
    text = to_json(CONFIG)
    with pytest.raises(ValueError, match=r"peers_met_at_once: must be at least 1"):
        from_json(text.replace(b'"peers_met_at_once":4', b'"peers_met_at_once":0'))
    with pytest.raises(ValueError, match=r"Invalid enum value 'prefiller'"):
        from_json(text.replace(b'"both"', b'"prefiller"'))
    with pytest.raises(ValueError, match="malformed"):
        from_json(b"role = 'both'")


def test_the_secret_is_not_shown() -> None:
    options = EngineOptions(name="w", model="/m", served_model_name="m", cluster_secret=b"hush")
    config = WorkerConfig(role=Role.BOTH, routers=("localhost:1",), engine="sim", engine_options=options)
    assert "hush" not in repr(config)
