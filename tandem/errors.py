"""What can go wrong, by what the caller may do next, and the one function that reads it off a gRPC status."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

_DETAILS_KEY = "grpc-status-details-bin"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field of the request that is at fault, and what it may be."""

    field: str
    description: str


class TandemError(Exception):
    """A call failed. `code` is the gRPC status' name, `reason` and `metadata` the server's machine-readable cause."""

    code = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        violations: tuple[FieldViolation, ...] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.reason = reason
        self.metadata: Mapping[str, str] = metadata or {}
        self.violations = violations
        #: How long the server asks to wait before trying again; None when it named no time.
        self.retry_after_s = retry_after_s

    @property
    def field(self) -> str:
        """The first field at fault; empty when the error is not about a field."""
        return self.violations[0].field if self.violations else ""


class InvalidArgument(TandemError):
    """The request is wrong and will be wrong again."""

    code = "INVALID_ARGUMENT"


class OutOfRange(InvalidArgument):
    """A value is past a limit of the model or the server, for example a prompt past the context."""

    code = "OUT_OF_RANGE"


class NotFound(TandemError):
    code = "NOT_FOUND"


class AlreadyExists(TandemError):
    """A request with this id is open already."""

    code = "ALREADY_EXISTS"


class Unauthenticated(TandemError):
    code = "UNAUTHENTICATED"


class PermissionDenied(TandemError):
    code = "PERMISSION_DENIED"


class FailedPrecondition(TandemError):
    """The cluster is not in a state for this; something else has to change first."""

    code = "FAILED_PRECONDITION"


class ResourceExhausted(TandemError):
    """A limit is reached: the message names which. Waiting `retry_after_s` helps, where it is set."""

    code = "RESOURCE_EXHAUSTED"


class Unavailable(TandemError):
    """Nobody can serve this now; the same call may succeed later."""

    code = "UNAVAILABLE"


class DeadlineExceeded(TandemError):
    code = "DEADLINE_EXCEEDED"


class Cancelled(TandemError):
    code = "CANCELLED"


class InternalError(TandemError):
    """The server failed; a fault of Tandem's or of an engine's."""

    code = "INTERNAL"


_BY_CODE: Mapping[str, type[TandemError]] = {
    kind.code: kind
    for kind in (
        InvalidArgument,
        OutOfRange,
        NotFound,
        AlreadyExists,
        Unauthenticated,
        PermissionDenied,
        FailedPrecondition,
        ResourceExhausted,
        Unavailable,
        DeadlineExceeded,
        Cancelled,
        InternalError,
    )
}


def error_from_status(
    code: grpc.StatusCode, message: str, trailers: Iterable[tuple[str, str | bytes]] = ()
) -> TandemError:
    """The exception for a gRPC status; `google.rpc` details in the trailers fill its attributes."""
    reason = ""
    metadata: dict[str, str] = {}
    violations: list[FieldViolation] = []
    retry_after_s: float | None = None
    for detail in _details(trailers):
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
            reason = info.reason
            metadata.update(info.metadata)
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad = error_details_pb2.BadRequest()
            detail.Unpack(bad)
            violations += [FieldViolation(v.field, v.description) for v in bad.field_violations]
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
            retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
    return _BY_CODE.get(code.name, TandemError)(
        message,
        code=code.name,
        reason=reason,
        metadata=metadata,
        violations=tuple(violations),
        retry_after_s=retry_after_s,
    )


def error_from_rpc(error: grpc.RpcError) -> TandemError:
    """For what a gRPC call, sync or aio, raised."""
    if not isinstance(error, grpc.Call | grpc.aio.AioRpcError):
        return InternalError(str(error))
    return error_from_status(error.code(), error.details() or error.code().name, error.trailing_metadata() or ())


def _details(trailers: Iterable[tuple[str, str | bytes]]) -> list:  # of google.protobuf.any_pb2.Any
    for key, value in trailers:
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                return list(status_pb2.Status.FromString(value).details)
            except DecodeError:
                return []  # a proxy's own trailer; the code and message still tell the caller what to do
    return []
