"""What a refusal says over gRPC: the limit, the time, and what gRPC's own retry policy is told."""

import pytest
from google.rpc import error_details_pb2, status_pb2

from router.core import errors
from router.core.quota import OverQuota, QuotaFacts
from router.edge.errors import grpc_status

FACTS = QuotaFacts(tenant="acme", limit="tokens_per_minute", unit="tokens", value=600.0, in_use=590.0, asked=32.0)


def details(error: errors.TandemError) -> tuple[dict[str, object], dict[str, str | bytes]]:
    trailers = dict(grpc_status(error).trailers)
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    found: dict[str, object] = {}
    for detail in status.details:
        kind = getattr(error_details_pb2, detail.TypeName().rpartition(".")[2])
        message = kind()
        detail.Unpack(message)
        found[kind.__name__] = message
    return found, trailers


def test_a_tenants_limit_is_named_with_its_value() -> None:
    found, _ = details(OverQuota("over", FACTS, retry_after_s=2.5))
    info, quota, retry = found["ErrorInfo"], found["QuotaFailure"], found["RetryInfo"]
    assert isinstance(info, error_details_pb2.ErrorInfo)
    assert isinstance(quota, error_details_pb2.QuotaFailure)
    assert isinstance(retry, error_details_pb2.RetryInfo)
    assert (info.reason, dict(info.metadata)) == (
        "TOKENS_PER_MINUTE",
        {"limit": "tokens_per_minute", "tenant": "acme"},
    )
    (violation,) = quota.violations
    assert (violation.subject, violation.quota_id, violation.quota_value) == ("tenant:acme", "tokens_per_minute", 600)
    assert retry.retry_delay.ToTimedelta().total_seconds() == 2.5


@pytest.mark.parametrize(
    ("error", "pushback"),
    [
        pytest.param(OverQuota("over", FACTS, retry_after_s=2.5), "2500", id="wait"),
        pytest.param(OverQuota("over", FACTS, retry_after_s=None), "-1", id="waiting does not help"),
        pytest.param(OverQuota("over", FACTS, retry_after_s=7200.0), "-1", id="tomorrow is no wait"),
        pytest.param(errors.Unavailable("NO_WORKERS", "none", retry_after_s=1.0), "1000", id="away for a moment"),
        pytest.param(errors.Lost("lost"), None, id="the policy's own backoff"),
        pytest.param(errors.Invalid("text", "is empty"), None, id="not retried anyway"),
    ],
)
def test_grpcs_retry_policy_is_told_what_helps(error: errors.TandemError, pushback: str | None) -> None:
    assert details(error)[1].get("grpc-retry-pushback-ms") == pushback
