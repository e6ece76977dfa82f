"""How this launcher meets the others: with a coordinator of its own, or with one that it joins."""

from __future__ import annotations

import os
import secrets
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass

from ringps.errors import SetupError
from ringps.membership import (
    Assignment,
    JobKey,
    LauncherLink,
)
from ringps_launcher import network
from ringps_launcher.guard import Guard
from ringps_launcher.job import Job


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where this launcher is, and where it finds the job's coordinator."""

    host: str
    """Name of this machine, for messages."""

    address: str
    """IP address at which the other machines reach this one."""

    coordinator: str
    """`HOST:PORT` of the coordinator."""

    key_file: str
    """Absolute path of the job key's file on this machine."""


def make_key(guard: Guard) -> tuple[JobKey, str]:
    """A key for a job on this machine alone, and the file that it is in until this process ends.

    Raises:
        SetupError: the job's directory cannot be made.
    """
    directory = os.path.join(tempfile.gettempdir(), f"ringps-{secrets.token_hex(8)}")
    guard.remove(directory)
    try:
        os.mkdir(directory, 0o700)
    except OSError as error:
        raise SetupError(
            f"cannot make a directory for the job key: {error.strerror} ({directory}); TMPDIR says where"
        ) from error
    key_file = os.path.join(directory, "job.key")
    key = JobKey.generate()
    key.save(key_file)
    return key, key_file


def join(coordinator: str, key_file: str, host: str, address: str | None) -> tuple[Site, JobKey]:
    """Prepare to join a coordinator that runs elsewhere.

    Args:
        address: where the other machines reach this one; None means from where the
            coordinator is reached.

    Raises:
        SetupError: the key cannot be read, or no route leads to the coordinator.
    """
    key = JobKey.load(key_file)
    if address is None:
        address = network.address_towards(*network.parse_address(coordinator))
    site = Site(host=host, address=address, coordinator=coordinator, key_file=os.path.abspath(key_file))
    return site, key


class Registration:
    """`LauncherLink.register` on a thread of its own, so that signals are served meanwhile."""

    def __init__(
        self, link: LauncherLink, site: Site, job: Job, master_port: int, on_end: Callable[[], None]
    ) -> None:
        """`on_end` is called on the other thread once there is a result."""
        self._result: Assignment | BaseException | None = None
        self._on_end = on_end
        arguments = (site.host, site.address, job.workers, master_port, job.encrypt_data)
        self._thread = threading.Thread(
            target=self._register, args=(link, arguments), name="ringps-register", daemon=True
        )
        self._thread.start()

    def result(self) -> Assignment | None:
        """This launcher's part of the job, or None while the others are still awaited.

        Raises:
            SetupError: the coordinator cannot be reached, or refused us.
        """
        if isinstance(self._result, BaseException):
            raise self._result
        return self._result

    def join(self) -> None:
        """Wait for the thread; the link must have been closed or be registered."""
        self._thread.join()

    def _register(self, link: LauncherLink, arguments: tuple[str, str, int, int, bool]) -> None:
        try:
            self._result = link.register(*arguments)
        except BaseException as error:
            self._result = error
        self._on_end()
