"""What people type and import: the `tandem` command, the Python client, configuration."""

from tandem.client import AsyncClient, AsyncGeneration, Client, Generation
from tandem.errors import (
    AlreadyExists,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    InternalError,
    InvalidArgument,
    NotFound,
    OutOfRange,
    PermissionDenied,
    ResourceExhausted,
    TandemError,
    Unauthenticated,
    Unavailable,
)
from tandem.values import Delta, Finished, FinishReason, Result, Role

__all__ = [
    "AlreadyExists",
    "AsyncClient",
    "AsyncGeneration",
    "Cancelled",
    "Client",
    "DeadlineExceeded",
    "Delta",
    "FailedPrecondition",
    "FinishReason",
    "Finished",
    "Generation",
    "InternalError",
    "InvalidArgument",
    "NotFound",
    "OutOfRange",
    "PermissionDenied",
    "ResourceExhausted",
    "Result",
    "Role",
    "TandemError",
    "Unauthenticated",
    "Unavailable",
]
