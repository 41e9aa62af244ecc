"""One table from our errors to what each protocol says. Messages of `Internal` are ours; nothing else of the inside
leaves the process."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import NamedTuple, NoReturn, TypeVar

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as details
from google.rpc import status_pb2

from router.core import errors

DOMAIN = "tandem"

T = TypeVar("T")

_STATUS: dict[type[errors.TandemError], grpc.StatusCode] = {
    errors.OutOfRange: grpc.StatusCode.OUT_OF_RANGE,
    errors.Invalid: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.Rejected: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.Lost: grpc.StatusCode.UNAVAILABLE,
    errors.Expired: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Cancelled: grpc.StatusCode.CANCELLED,
    errors.Misfit: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Internal: grpc.StatusCode.INTERNAL,
}

_log = logging.getLogger(__name__)


class GrpcStatus(NamedTuple):
    code: grpc.StatusCode
    message: str
    trailers: tuple[tuple[str, str | bytes], ...]


def status_code(error: errors.TandemError) -> grpc.StatusCode:
    for kind in type(error).__mro__:
        if kind in _STATUS:
            return _STATUS[kind]
    return grpc.StatusCode.INTERNAL


def grpc_status(error: errors.TandemError) -> GrpcStatus:
    """Code, message and trailers: `google.rpc` details, and gRPC's own retry hint where waiting helps."""
    code = status_code(error)
    status = status_pb2.Status(code=code.value[0], message=error.message, details=map(_packed, _details(error)))
    trailers: list[tuple[str, str | bytes]] = [("grpc-status-details-bin", status.SerializeToString())]
    if error.retry_after_s is not None:
        trailers.append(("grpc-retry-pushback-ms", str(round(error.retry_after_s * 1000))))
    return GrpcStatus(code, error.message, tuple(trailers))


async def abort(context: grpc.aio.ServicerContext, error: errors.TandemError) -> NoReturn:
    status = grpc_status(error)
    await context.abort(status.code, status.message, status.trailers)


async def answer(context: grpc.aio.ServicerContext, work: Callable[[], Awaitable[T]]) -> T:
    """Runs a method's work and tells the client how it failed. Of a fault of ours the log gets the story, the client
    a sentence."""
    try:
        return await work()
    except errors.TandemError as error:
        await abort(context, error)
    except Exception:
        _log.exception("internal error")
        await abort(context, errors.Internal("internal error; the server's log has the details"))


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
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromNanoseconds(round(error.retry_after_s * 1e9))
        found.append(details.RetryInfo(retry_delay=delay))
    return found


def _packed(detail: Message) -> Any:
    packed = Any()
    packed.Pack(detail)
    return packed
