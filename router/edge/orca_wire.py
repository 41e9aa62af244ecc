"""ORCA's messages <-> values."""

from __future__ import annotations

from collections.abc import Mapping

from protos.compat import orca_report_pb2, orca_service_pb2
from router.edge.wire import parse


def interval_s(data: bytes) -> float:
    """How far apart reports are to be; 0 when the request does not say. Raises Invalid."""
    interval = parse(orca_service_pb2.OrcaLoadReportRequest, data).report_interval
    return interval.seconds + interval.nanos / 1e9


def report(
    *,
    cpu: float,
    memory: float,
    application: float,
    requests_per_s: float,
    errors_per_s: float,
    named: Mapping[str, float],
) -> bytes:
    return orca_report_pb2.OrcaLoadReport(
        cpu_utilization=cpu,
        mem_utilization=memory,
        application_utilization=application,
        rps_fractional=requests_per_s,
        eps=errors_per_s,
        named_metrics=named,
    ).SerializeToString()
