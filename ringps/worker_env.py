"""The launch contract: what a launcher tells a worker through its environment.

This is the only module that reads `os.environ`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from ringps.config import Config, Exchange, Recovery, Timeouts, TransportName

SUSPENDED_CODE = 75
"""What a worker exits with, and then the launcher and the coordinator, when the job stopped at a checkpoint
and the same command goes on from there: EX_TEMPFAIL of sysexits.h, "try again later"."""

FAILED_CODE = 70
"""What the launcher in a pod exits with when the whole job failed for good, whatever its worker exited with:
EX_SOFTWARE of sysexits.h."""

CHECKPOINT_DIR = "RINGPS_CHECKPOINT_DIR"
"""The variable that `checkpoint_dir` reads."""

_PREFIX = "RINGPS_"


@dataclass(frozen=True, kw_only=True)
class WorkerEnv:
    """Who this worker is and where its job's coordinator listens."""

    coordinator: str
    """`HOST:PORT` of the coordinator's control socket."""

    key_file: str | None
    """File that holds the job key, or None for a loopback job without one."""

    worker_id: int
    """Stable for the job; the rank may change with the generation."""

    host: str
    """The name by which messages call this machine."""

    address: str
    """IP address at which the other workers reach this one."""

    local_rank: int
    """Position among the workers of this machine, 0 to local_world_size - 1."""

    local_world_size: int
    """Number of workers on this machine."""

    transport: TransportName = "auto"
    """The transport that the launcher was asked for."""

    def to_environ(self) -> dict[str, str]:
        """The `RINGPS_*` variables that `read` turns back into this object."""
        return {
            _PREFIX + entry.name.upper(): str(value)
            for entry in fields(self)
            if (value := getattr(self, entry.name)) is not None
        }


def read(environ: Mapping[str, str] | None = None) -> WorkerEnv | None:
    """This worker's launch contract, or None if no launcher started this process.

    Raises:
        ValueError: the contract is incomplete or malformed; the message names the variable.
    """
    environ = os.environ if environ is None else environ
    if _PREFIX + "COORDINATOR" not in environ:
        return None

    def text(name: str) -> str:
        try:
            return environ[_PREFIX + name]
        except KeyError:
            raise ValueError(
                f"{_PREFIX}COORDINATOR is set but {_PREFIX}{name} is not; "
                "start workers with `ringps run`, which sets them all"
            ) from None

    def whole(name: str) -> int:
        return int(_number(_PREFIX + name, text(name), int))

    return WorkerEnv(
        coordinator=text("COORDINATOR"),
        key_file=environ.get(_PREFIX + "KEY_FILE"),
        worker_id=whole("WORKER_ID"),
        host=text("HOST"),
        address=text("ADDRESS"),
        local_rank=whole("LOCAL_RANK"),
        local_world_size=whole("LOCAL_WORLD_SIZE"),
        transport=environ.get(_PREFIX + "TRANSPORT", "auto"),  # type: ignore[arg-type]
    )


def checkpoint_dir(environ: Mapping[str, str] | None = None) -> str | None:
    """Where the launcher was told to save checkpoints: a path or a URL, or None if it was told nothing."""
    environ = os.environ if environ is None else environ
    return environ.get(CHECKPOINT_DIR) or None


def configure(environ: Mapping[str, str] | None = None) -> Config:
    """The default settings, changed by `RINGPS_<SETTING>` variables.

    Every field of `Timeouts`, `Exchange` and `Recovery` has one: `RINGPS_OP_TIMEOUT_S=60`,
    `RINGPS_CHUNK_BYTES=524288`, and so on.

    Raises:
        ValueError: a value is not a number or out of range; the message names the variable.
    """
    environ = os.environ if environ is None else environ
    timeouts, exchange = Timeouts(), Exchange()
    timeouts = replace(timeouts, **_overrides(environ, timeouts))  # type: ignore[arg-type]
    exchange = replace(exchange, **_overrides(environ, exchange))  # type: ignore[arg-type]
    recovery = Recovery()
    recovery = replace(recovery, **_overrides(environ, recovery))  # type: ignore[arg-type]
    transport = environ.get(_PREFIX + "TRANSPORT", "auto")
    return Config(
        transport=transport,  # type: ignore[arg-type]
        timeouts=timeouts,
        exchange=exchange,
        recovery=recovery,
    )


def _overrides(
    environ: Mapping[str, str], defaults: Timeouts | Exchange | Recovery
) -> dict[str, float | str]:
    changed: dict[str, float | str] = {}
    for entry in fields(defaults):
        name = _PREFIX + entry.name.upper()
        if name in environ:
            kind = type(getattr(defaults, entry.name))
            changed[entry.name] = environ[name] if kind is str else _number(name, environ[name], kind)
    return changed


def _number(name: str, value: str, kind: type[int] | type[float]) -> float:
    try:
        return kind(value)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name} must be {wanted}, not {value!r}") from None
