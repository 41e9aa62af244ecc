"""How the commands look: tables, sizes, sentences. Values in, renderables or text out; nothing here talks to anyone."""

from __future__ import annotations

from datetime import datetime

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tandem.values import (
    Charge,
    ClusterStatus,
    Figures,
    Finished,
    RequestStatus,
    RequestStory,
    Waited,
    WorkerStatus,
)

_WIDE = 110
_REQUESTS_SHOWN = 20

_STATE_STYLES = {"ready": "green", "joining": "yellow", "draining": "yellow"}


def duration(seconds: float) -> str:
    if seconds < 0.0995:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def plural(count: int, noun: str) -> str:
    if count == 1:
        return f"1 {noun}"
    return f"{count:,} {noun[:-1]}ies" if noun.endswith("y") else f"{count:,} {noun}s"


def story(request_id: str, finished: Finished) -> str:
    """Which workers served an answer, what the hand-off between them cost, how long it all took: a few lines."""
    usage, timings, route = finished.usage, finished.timings, finished.route
    rows: list[tuple[str, str, str]] = []
    if route.prefill_worker:
        cached = f", {usage.cached_prompt_tokens:,} of them cached" if usage.cached_prompt_tokens else ""
        tokens = plural(usage.prompt_tokens, "token")
        rows.append(("prefill", route.prefill_worker, f"{tokens}{cached}, in {duration(timings.prefill_s)}"))
    if route.transport:
        moved = f"{size(route.transfer_bytes)} by {route.transport}, {duration(timings.transfer_s)} of it on the move"
        rows.append(("hand-off", duration(timings.handoff_s), moved))
    if route.decode_worker:
        tokens = plural(usage.completion_tokens, "token")
        own = ", the prompt too" if route.local_prefill else ""
        rows.append(("decode", route.decode_worker, f"{tokens}{_rate(finished)}{own}"))
    if route.retries:
        rows.append(("again", plural(route.retries, "leg"), "run again after a failure"))
    ended = f"ended by {finished.reason.value}"
    rows.append(("total", duration(timings.total_s), f"first token after {duration(timings.ttft_s)}, {ended}"))
    rows.append(("more", "", f"tandem why {request_id}"))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{what:<{widths[0]}}  {who:<{widths[1]}}  {how}" for what, who, how in rows)


def request_story(told: RequestStory) -> str:
    """Why a request was served as it was, one line per question."""
    when = datetime.fromtimestamp(told.arrived_at).astimezone().isoformat(" ", "milliseconds")
    rows = [("request", f"{told.request_id} of {told.tenant}, lane {told.lane}, {told.state}"), ("arrived", when)]
    if told.other_tenants:
        rows.append(("also of", f"{', '.join(told.other_tenants)} (--tenant NAME shows theirs); this is the latest"))
    if told.trace_id:
        rows.append(("trace", told.trace_id))
    if told.error:
        again = f"; try again in {duration(told.retry_after_s)}" if told.retry_after_s is not None else ""
        rows.append(("because", f"{told.error} ({told.reason}){again}"))
    rows.append(("waited", _waited(told.waited)))
    if (placed := told.placement) is not None:
        where = placed.chosen.worker_id + ("" if placed.local_prefill else f", then {placed.decode_worker}")
        rows.append(("placed", f"at {where}: {placed.why}"))
        rows.append(("predicted", _predicted(placed.chosen)))
        if placed.runner_up is not None:
            rows.append(("next best", _predicted(placed.runner_up)))
    if (moved := told.handoff) is not None:
        how = f"{size(moved.nbytes)} by {moved.transport} in {duration(moved.transfer_s)}"
        rows.append(("hand-off", f"{moved.prefill_worker} → {moved.decode_worker}: {how}"))
    if told.ttft_s is not None:
        rows.append(("first token", f"after {duration(told.ttft_s)}"))
    if told.preemptions or told.retries:
        rows.append(("again", f"gave way {told.preemptions} times, {plural(told.retries, 'leg')} failed"))
    rows.append(("charged", _charged(told.charge)))
    rows += [("" if at else "story", f"{duration(when):>8}  {what}") for at, (when, what) in enumerate(told.lines)]
    return "\n".join(f"{what:<12} {text}" for what, text in rows)


def _waited(waited: Waited) -> str:
    parts = []
    if waited.own_requests or waited.others_requests:
        parts.append(
            f"behind {waited.own_requests:,} of its own (cost {waited.own_cost:,.0f}) and {waited.others_requests:,} "
            f"of others (cost {waited.others_cost:,.0f}), {duration(waited.predicted_s)} predicted"
        )
    if waited.queue_s is None:
        return ", ".join(["not dispatched", *parts])
    reasons = [
        f"{duration(seconds)} {why}"
        for seconds, why in (
            (waited.capped_s, "for its own tokens in flight (tokens_in_flight_max)"),
            (waited.stuck_s, "as the next in line, for room at a worker"),
        )
        if seconds
    ]
    return "; ".join([duration(waited.queue_s), *reasons, *parts])


def _predicted(figures: Figures) -> str:
    cached = f", {figures.cached_tokens:,} tokens cached" if figures.cached_tokens else ""
    first = f", first token in {duration(figures.ttft_s)}" if figures.ttft_s is not None else ""
    return f"{figures.worker_id}: {plural(figures.tokens, 'token')} to compute{cached}{first}"


def _charged(charge: Charge) -> str:
    money = f" and {charge.money_micros / 1e6:.6f} by plan {charge.price_plan}" if charge.price_plan else ""
    reserved = f"{charge.reserved_tokens:,} tokens reserved" if charge.reserved_tokens else "nothing reserved"
    if not charge.settled:
        return f"{reserved}, nothing settled"
    prompt = f"{charge.prompt_tokens:,} prompt ({charge.cached_prompt_tokens:,} cached)"
    return f"{prompt} + {charge.completion_tokens:,} generated{money}; {reserved}; {charge.cost:,.0f} of its share"


def _rate(finished: Finished) -> str:
    """Tokens per second once the first was there; empty where that says nothing."""
    seconds = finished.timings.total_s - finished.timings.ttft_s
    tokens = finished.usage.completion_tokens - 1
    return f" at {tokens / seconds:,.0f} tokens/s" if tokens > 0 and seconds > 0 else ""


def status(cluster: ClusterStatus, address: str, width: int = 80) -> RenderableType:
    """For a terminal `width` columns wide; what is of less interest is left out of a narrow one."""
    wide = width >= _WIDE
    parts: list[RenderableType] = [_headline(cluster, address)]
    if cluster.workers:
        parts.append(_workers(cluster.workers, wide=wide))
        parts.append(_lanes(cluster.workers))
    else:
        parts.append(Text("no workers have joined", style="yellow"))
    if cluster.requests:
        parts.append(_requests(cluster.requests, wide=wide))
    return Group(*parts)


def _headline(cluster: ClusterStatus, address: str) -> Text:
    models = ", ".join(sorted({worker.model for worker in cluster.workers}))
    outcomes = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(cluster.outcomes.items()) if count)
    text = Text(f"{cluster.router_id} at {address}", style="bold")
    text.append(f", up {duration(cluster.uptime_s)}" + (f", serving {models}" if models else ""), style="not bold")
    text.append(
        f"\nrequests: {cluster.requests_running:,} running, {cluster.requests_queued:,} queued; "
        f"ended: {outcomes or 'none yet'}",
        style="not bold",
    )
    if cluster.unauthenticated:
        text.append("\nUNAUTHENTICATED: whoever reaches the router may use and steer this cluster", style="red")
    return text


def _workers(workers: tuple[WorkerStatus, ...], *, wide: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column in ("worker", "role", "state", "engine"):
        table.add_column(column, no_wrap=True)
    for column in ("prefill", "decode", "KV blocks", "leases", *(("staged", "moved", "pid") if wide else ())):
        table.add_column(column, justify="right", no_wrap=True)
    for worker in sorted(workers, key=lambda worker: worker.worker_id):
        load = worker.load
        row = [
            worker.worker_id,
            worker.role.value if worker.role else "?",
            Text(worker.state, style=_STATE_STYLES.get(worker.state, "red")),
            worker.engine,
            f"{worker.prefill_legs}/{worker.prefill_legs_max}",
            f"{worker.decode_legs}/{worker.decode_legs_max}",
            f"{load.kv_blocks_total - load.kv_blocks_free:,}/{load.kv_blocks_total:,}",
            f"{load.leases_held:,}",
        ]
        if wide:
            failed = f", {load.transfer_failures_total:,} failed" if load.transfer_failures_total else ""
            row += [f"{load.staged_pages:,}", size(load.transfer_bytes_total) + failed, str(worker.pid)]
        table.add_row(*row)
    return table


def _lanes(workers: tuple[WorkerStatus, ...]) -> Text:
    lines = []
    for worker in sorted(workers, key=lambda worker: worker.worker_id):
        for lane in worker.lanes:
            how = (
                Text(f"cannot exchange KV: {lane.refusal}", style="red")
                if lane.refusal
                else Text(f"{lane.transport}, {lane.gigabytes_per_s:.1f} GB/s")
            )
            lines.append(Text.assemble(f"lane {lane.peer} → {worker.worker_id}: ", how))
    return Text("\n").join(lines)


def _requests(requests: tuple[RequestStatus, ...], *, wide: bool) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column in ("request", *(("tenant",) if wide else ()), "state", "prefill", "decode", *(("by",) if wide else ())):
        table.add_column(column, no_wrap=True)
    for column in ("age", "prompt", "answer"):
        table.add_column(column, justify="right", no_wrap=True)
    for request in requests[:_REQUESTS_SHOWN]:
        table.add_row(
            request.request_id if wide else request.request_id[:12],
            *((request.tenant,) if wide else ()),
            request.state,
            request.prefill_worker,
            request.decode_worker,
            *((request.transport,) if wide else ()),
            duration(request.age_s),
            f"{request.prompt_tokens:,}",
            f"{request.completion_tokens:,}",
        )
    more = len(requests) - _REQUESTS_SHOWN
    return Group(table, Text(f"and {more:,} more", style="dim")) if more > 0 else table
