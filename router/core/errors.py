"""What can go wrong, by what the caller may do next. Edges map these to their protocol; nothing here knows one."""

from __future__ import annotations


class TandemError(Exception):
    """`reason` is for machines (UPPER_SNAKE), the message for people; neither names another tenant's data."""

    reason = "INTERNAL"
    #: Wait this long, then the same call may succeed; None: waiting alone does not help.
    retry_after_s: float | None = None

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class Invalid(TandemError):
    """The request is wrong and will be wrong again. Names the field and, where there is one, the limit."""

    reason = "INVALID_FIELD"

    def __init__(self, field: str, message: str, *, limit: str = "") -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.description = message
        self.limit = limit


class OutOfRange(Invalid):
    """A value is past what the model or the server has."""

    reason = "OUT_OF_RANGE"


class NotFound(TandemError):
    reason = "NOT_FOUND"

    def __init__(self, kind: str, name: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.name = name


class AlreadyExists(TandemError):
    def __init__(self, message: str, *, reason: str = "REQUEST_ID_IN_USE") -> None:
        super().__init__(message)
        self.reason = reason


class Unauthenticated(TandemError):
    """Nobody that we know: a credential is missing or does not hold. `reason` says which."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class PermissionDenied(TandemError):
    """Somebody that we know, who may not do this."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Rejected(TandemError):
    """A limit is reached; `reason` names it."""

    def __init__(self, reason: str, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s


class Unavailable(TandemError):
    """Nobody can serve this now and nothing was begun."""

    def __init__(self, reason: str, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s


class Lost(TandemError):
    """Work was begun and could not be finished in the attempts allowed. Doing it again may succeed."""

    reason = "ATTEMPTS_EXHAUSTED"

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Expired(TandemError):
    reason = "DEADLINE_EXCEEDED"


class Cancelled(TandemError):
    reason = "CANCELLED"


class Misfit(TandemError):
    """A worker whose model or KV layout differs from its pool's."""

    reason = "WORKER_MISFIT"


class ManagedElsewhere(TandemError):
    """This router may not change what it was asked to change."""

    reason = "MANAGED_ELSEWHERE"


class Internal(TandemError):
    """A fault of ours. The message says nothing of the inside."""

    reason = "INTERNAL"
