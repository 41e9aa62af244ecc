"""One table from our errors to what each protocol says. Messages of `Internal` are ours; nothing else of the inside
leaves the process."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Iterator
from typing import NamedTuple, NoReturn, TypeVar

import grpc
import msgspec
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as details
from google.rpc import status_pb2

from router.core import errors
from router.core.quota import OverQuota
from router.edge.admit import PastContext
from router.grpc_server.call import Call

DOMAIN = "tandem"

#: gRPC's own retry policy waits as long as it is told to, inside the call. Past this, a client had better be told.
_PUSHBACK_MAX_S = 120.0

T = TypeVar("T")


class BodyTooLarge(errors.Invalid):
    reason = "BODY_TOO_LARGE"


class BodyTooSlow(errors.TandemError):
    reason = "BODY_TOO_SLOW"


class MethodNotAllowed(errors.TandemError):
    reason = "METHOD_NOT_ALLOWED"

    def __init__(self, path: str, method: str, allowed: str) -> None:
        super().__init__(f"{path} takes {allowed}, not {method}")
        self.allowed = allowed


class UnknownEncoding(errors.TandemError):
    """Of a request's body."""

    reason = "UNSUPPORTED_MEDIA_TYPE"


class Unimplemented(errors.TandemError):
    """A method of somebody else's protocol that there is nothing for here."""

    reason = "UNIMPLEMENTED"

    def __init__(self, method: str, why: str) -> None:
        super().__init__(f"{method} is not supported: {why}")


class Answers(NamedTuple):
    """How each protocol calls a kind of error."""

    grpc: grpc.StatusCode
    http: int
    #: OpenAI's `error.type`.
    openai: str


#: The nearest class of an error's own counts.
_TABLE: dict[type[errors.TandemError], Answers] = {
    errors.OutOfRange: Answers(grpc.StatusCode.OUT_OF_RANGE, 400, "invalid_request_error"),
    errors.Invalid: Answers(grpc.StatusCode.INVALID_ARGUMENT, 400, "invalid_request_error"),
    errors.NotFound: Answers(grpc.StatusCode.NOT_FOUND, 404, "not_found"),
    errors.AlreadyExists: Answers(grpc.StatusCode.ALREADY_EXISTS, 409, "conflict"),
    errors.Unauthenticated: Answers(grpc.StatusCode.UNAUTHENTICATED, 401, "authentication_error"),
    errors.PermissionDenied: Answers(grpc.StatusCode.PERMISSION_DENIED, 403, "permission_error"),
    errors.Rejected: Answers(grpc.StatusCode.RESOURCE_EXHAUSTED, 429, "rate_limit_error"),
    errors.Unavailable: Answers(grpc.StatusCode.UNAVAILABLE, 503, "service_unavailable"),
    errors.Lost: Answers(grpc.StatusCode.UNAVAILABLE, 503, "service_unavailable"),
    errors.Expired: Answers(grpc.StatusCode.DEADLINE_EXCEEDED, 504, "timeout"),
    errors.Cancelled: Answers(grpc.StatusCode.CANCELLED, 499, "cancelled"),
    errors.Misfit: Answers(grpc.StatusCode.FAILED_PRECONDITION, 409, "conflict"),
    errors.ManagedElsewhere: Answers(grpc.StatusCode.FAILED_PRECONDITION, 409, "conflict"),
    errors.Internal: Answers(grpc.StatusCode.INTERNAL, 500, "server_error"),
    Unimplemented: Answers(grpc.StatusCode.UNIMPLEMENTED, 501, "invalid_request_error"),
    # Of HTTP only: gRPC refuses these by itself.
    BodyTooLarge: Answers(grpc.StatusCode.RESOURCE_EXHAUSTED, 413, "invalid_request_error"),
    BodyTooSlow: Answers(grpc.StatusCode.DEADLINE_EXCEEDED, 408, "timeout"),
    MethodNotAllowed: Answers(grpc.StatusCode.UNIMPLEMENTED, 405, "invalid_request_error"),
    UnknownEncoding: Answers(grpc.StatusCode.UNIMPLEMENTED, 415, "invalid_request_error"),
}

_log = logging.getLogger(__name__)


class GrpcStatus(NamedTuple):
    code: grpc.StatusCode
    message: str
    trailers: tuple[tuple[str, str | bytes], ...]


def answers(error: errors.TandemError) -> Answers:
    return next((_TABLE[kind] for kind in type(error).__mro__ if kind in _TABLE), _TABLE[errors.Internal])


def grpc_status(error: errors.TandemError) -> GrpcStatus:
    """Code, message and trailers: `google.rpc` details, and gRPC's own retry hint where waiting helps."""
    code = answers(error).grpc
    status = status_pb2.Status(code=code.value[0], message=error.message, details=map(_packed, _details(error)))
    trailers: list[tuple[str, str | bytes]] = [("grpc-status-details-bin", status.SerializeToString())]
    if (pushback := _pushback_ms(error)) is not None:
        trailers.append(("grpc-retry-pushback-ms", str(pushback)))
    return GrpcStatus(code, error.message, tuple(trailers))


def _pushback_ms(error: errors.TandemError) -> int | None:
    """What gRPC's retry policy is told: to wait, not to try again (-1), or nothing, so that its own backoff counts."""
    if error.retry_after_s is not None and error.retry_after_s <= _PUSHBACK_MAX_S:
        return round(error.retry_after_s * 1000)
    return -1 if error.retry_after_s is not None or isinstance(error, errors.Rejected) else None


class HttpStatus(NamedTuple):
    status: int
    body: bytes
    headers: tuple[tuple[bytes, bytes], ...]


def http_status(error: errors.TandemError) -> HttpStatus:
    """Status, OpenAI's body, and what says when to try again."""
    headers = tuple(_retry_headers(error))
    if isinstance(error, errors.Unauthenticated):
        headers += ((b"www-authenticate", b"Bearer"),)
    elif isinstance(error, MethodNotAllowed):
        headers += ((b"allow", error.allowed.encode()),)
    elif isinstance(error, UnknownEncoding):
        headers += ((b"accept-encoding", b"gzip, deflate"),)
    return HttpStatus(answers(error).http, openai_error(error), headers)


def openai_error(error: errors.TandemError) -> bytes:
    message, param = error.message, None
    if isinstance(error, errors.Invalid):
        param = error.field.removeprefix("sampling.") or None  # our grouping, which OpenAI's protocol does not have
        message = f"{param}: {error.description}" if param else error.description
    said = {"message": message, "type": answers(error).openai, "param": param, "code": _openai_code(error)}
    return msgspec.json.encode({"error": said})


def kserve_error(error: errors.TandemError) -> str:
    """For a stream that goes on: JSON, as there is no status to carry details."""
    said: dict[str, str | float] = {
        "error": error.message,
        "code": answers(error).grpc.name,
        "reason": error.reason,
    }
    if isinstance(error, errors.Invalid):
        said["field"] = error.field
    if error.retry_after_s is not None:
        said["retry_after_s"] = error.retry_after_s
    return msgspec.json.encode(said).decode()


def _openai_code(error: errors.TandemError) -> str:
    """OpenAI's own where there is one that clients look for; else our reason, in its spelling."""
    if isinstance(error, PastContext):
        return "context_length_exceeded"
    if isinstance(error, errors.NotFound) and error.kind == "model":
        return "model_not_found"
    return error.reason.lower()


def _retry_headers(error: errors.TandemError) -> Iterator[tuple[bytes, bytes]]:
    if error.retry_after_s is not None:
        yield b"retry-after", str(max(1, math.ceil(error.retry_after_s))).encode()
        yield b"retry-after-ms", str(round(error.retry_after_s * 1000)).encode()
    elif isinstance(error, errors.Expired | errors.Rejected):
        yield b"x-should-retry", b"false"  # OpenAI's clients would, and waiting alone does not help


async def abort(context: grpc.aio.ServicerContext | Call, error: errors.TandemError) -> NoReturn:
    status = grpc_status(error)
    await context.abort(status.code, status.message, status.trailers)


async def answer(context: grpc.aio.ServicerContext | Call, work: Callable[[], Awaitable[T]]) -> T:
    """Runs a method's work and tells the client how it failed. Of a fault of ours the log gets the story, the client
    a sentence."""
    try:
        return await work()
    except errors.TandemError as error:
        await abort(context, error)
    except Exception:
        await abort(context, internal())


def internal() -> errors.Internal:
    """For whom a fault of ours, the one being handled, hit."""
    _log.exception("internal error")
    return errors.Internal("internal error; the server's log has the details")


def _details(error: errors.TandemError) -> list[Message]:
    info = details.ErrorInfo(reason=error.reason, domain=DOMAIN)
    found: list[Message] = [info]
    if isinstance(error, errors.Invalid):
        info.metadata["field"] = error.field
        if error.limit:
            info.metadata["limit"] = error.limit
        violation = details.BadRequest.FieldViolation(field=error.field, description=error.description)
        found.append(details.BadRequest(field_violations=[violation]))
    elif isinstance(error, errors.NotFound):
        found.append(details.ResourceInfo(resource_type=error.kind, resource_name=error.name))
    elif isinstance(error, OverQuota):
        quota = error.quota
        info.metadata.update(limit=quota.limit, tenant=quota.tenant)
        violation = details.QuotaFailure.Violation(
            subject=f"tenant:{quota.tenant}",
            description=error.message,
            quota_metric=f"{DOMAIN}/{quota.unit}",
            quota_id=quota.limit,
            quota_value=round(quota.value),
        )
        found.append(details.QuotaFailure(violations=[violation]))
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromNanoseconds(round(error.retry_after_s * 1e9))
        found.append(details.RetryInfo(retry_delay=delay))
    return found


def _packed(detail: Message) -> Any:
    packed = Any()
    packed.Pack(detail)
    return packed
