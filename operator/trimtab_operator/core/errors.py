"""Errors of the Kubernetes API, one class a cause; both implementations of `Kube` raise these."""

from __future__ import annotations


class KubeError(Exception):
    """The API server refused or failed. `code` is the HTTP status, `reason` the Status object's reason."""

    def __init__(self, code: int, reason: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(f"{reason} ({code}): {message}")
        self.code = code
        self.reason = reason
        self.message = message
        self.retry_after = retry_after
        """Seconds that the server asked to wait; None where it said nothing."""


class NotFound(KubeError):
    """404: no such object, or no such namespace or kind."""


class AlreadyExists(KubeError):
    """409 AlreadyExists: an object of that name is there."""


class Conflict(KubeError):
    """409 Conflict: the resource version or uid of the precondition is not the live one."""


class Invalid(KubeError):
    """400 or 422: the object breaks its schema, an immutable field or an admission rule."""


class Forbidden(KubeError):
    """403: RBAC, admission, or an exceeded quota."""


class Unavailable(KubeError):
    """429, 5xx, a time-out or a broken connection: try again later."""


def kube_error(code: int, reason: str, message: str, retry_after: float | None = None) -> KubeError:
    """The error class for an HTTP status and the reason of the Status object in its body."""
    kind: type[KubeError]
    match code:
        case 404:
            kind = NotFound
        case 409:
            kind = AlreadyExists if reason == "AlreadyExists" else Conflict
        case 400 | 422:
            kind = Invalid
        case 403:
            kind = Forbidden
        case 429 | 500 | 502 | 503 | 504:
            kind = Unavailable
        case _:
            kind = KubeError
    return kind(code, reason, message, retry_after)
