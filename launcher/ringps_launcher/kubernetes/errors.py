"""PURE: what can go wrong between us and the API server, and how its answer becomes one of these errors.

::

    RingpsError
    └── ClusterError                 the cluster did not do what it was asked
        ├── UnreachableError         nobody answered, or the API server cannot work just now: try again
        ├── NotFoundError            no such object, namespace or kind
        ├── ExistsError              an object of this name is there already
        ├── ConflictError            somebody else changed the object meanwhile
        ├── ExpiredError             this resource version is too old to watch from: list again
        ├── ForbiddenError           not allowed: rights, credentials, quota, or an admission rule
        └── InvalidError             the API server does not accept the object or the request

A message is one line: what was asked, what the server said, and what to do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ringps.errors import RingpsError

_LONGEST_ANSWER = 700


class ClusterError(RingpsError):
    """The cluster did not do what it was asked. `reason` is the server's own word ("Forbidden"), or ""."""

    def __init__(self, message: str, *, reason: str = "", status: int = 0) -> None:
        super().__init__(message)
        self.reason = reason
        self.status = status


class UnreachableError(ClusterError):
    """Nobody answered in time, or the API server cannot work just now; the same request may succeed later."""


class NotFoundError(ClusterError):
    """There is no such object, no such namespace, or the API server does not know the kind."""


class ExistsError(ClusterError):
    """An object of this kind and name is there already."""


class ConflictError(ClusterError):
    """The object is not (or no longer) the version or the uid that the request was about."""


class ExpiredError(ClusterError):
    """The resource version to go on from is too old: list again, and watch from there."""


class ForbiddenError(ClusterError):
    """Refused: no rights, bad credentials, a full quota, or an admission rule such as Pod Security."""


class InvalidError(ClusterError):
    """The API server does not accept the object, or cannot answer this request."""


def from_answer(what: str, status: int, body: bytes | Mapping[str, Any]) -> ClusterError:
    """The error for the answer with code `status` and `body` to the request described by `what`."""
    answer = body if isinstance(body, Mapping) else _parsed(body)
    reason, said = str(answer.get("reason") or ""), _one_line(str(answer.get("message") or ""))
    kind, advice = _kind_of(status, reason, said)
    words = said or f"HTTP {status}"
    return kind(f"{what}: {words}{advice}", reason=reason, status=status)


def _kind_of(status: int, reason: str, said: str) -> tuple[type[ClusterError], str]:
    if status == 401:
        return ForbiddenError, "; the credentials in the kubeconfig are not accepted (expired?): log in again"
    if status == 403:
        return ForbiddenError, _advice_when_forbidden(said)
    if status == 404:
        if reason == "NotFound" and "could not find the requested resource" not in said:
            return NotFoundError, ""
        return NotFoundError, "; the API server does not know this kind of object"
    if status == 409:
        return (ExistsError, "") if reason == "AlreadyExists" else (ConflictError, "")
    if status == 410:
        return ExpiredError, ""
    if status in (400, 405, 406, 413, 415, 422):
        return InvalidError, ""
    if status == 429 or status in (500, 502, 503, 504):
        return UnreachableError, "; try again in a moment"
    return ClusterError, ""


def _advice_when_forbidden(said: str) -> str:
    if "exceeded quota" in said:
        return "; ask for less, or wait until other jobs end"
    if "violates PodSecurity" in said:
        return "; the namespace's Pod Security level does not allow this pod"
    if " cannot " in said:
        return "; ask the cluster's administrator for this right"
    return ""


def _parsed(body: bytes) -> Mapping[str, Any]:
    try:
        answer = json.loads(body)
    except ValueError:
        return {"message": body.decode("utf-8", "replace")}
    return answer if isinstance(answer, dict) else {}


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_ANSWER else line[: _LONGEST_ANSWER - 3] + "..."
