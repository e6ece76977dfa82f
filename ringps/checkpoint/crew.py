"""Does the same with several sources at once, a thread for each."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from ringps.checkpoint.source import Source, SourceLost
from ringps.errors import FrameError, SetupError

_GLANCE_S = 0.05
"""How often the calling thread looks up."""

T = TypeVar("T")


class Crew:
    """The sources that are left, and the limits on their work."""

    def __init__(self, sources: Sequence[Source], deadline_s: float, check: Callable[[], None]) -> None:
        """
        Args:
            sources: closed by `close`.
            deadline_s: on `time.monotonic`'s clock, when to give up.
            check: called by the calling thread now and then; raises to give up.
        """
        self.sources = list(sources)
        self.lost: dict[str, str] = {}
        """Addresses of those that are not left, and why."""
        self._all = list(sources)
        self._deadline_s = deadline_s
        self._check = check
        self._failure: Exception | None = None

    def glance(self) -> None:
        """See whether to go on; to be called every now and then.

        Raises:
            SetupError: time is up.
            Exception: what `check` raised, or a thread other than `SourceLost`.
        """
        self._check()
        if self._failure is not None:
            raise self._failure
        if time.monotonic() > self._deadline_s:
            raise SetupError(
                "the training state did not come from its servers in time; raise feed_timeout_s "
                f"(RINGPS_FEED_TIMEOUT_S) if the network is slow{self._said()}"
            )

    def each(
        self,
        job: Callable[[Source], T],
        *,
        only: int | None = None,
        meanwhile: Callable[[], None] = lambda: None,
        stop: Callable[[], None] = lambda: None,
    ) -> dict[Source, T]:
        """Do `job` with each source, or with the first `only`. A source that fails is one no more.

        Args:
            job: raises `SourceLost` or `FrameError` if the source fails.
            only: how many to do it with.
            meanwhile: what the calling thread does; it should call `glance`.
            stop: makes the jobs end that do not wait for their source; called before an exception leaves.

        Returns:
            What `job` returned, for the sources that did not fail.

        Raises:
            SetupError: no source is left, or as `glance`.
            Exception: as `glance`.
        """
        results: dict[Source, T] = {}
        threads = [
            threading.Thread(target=self._do, args=(job, source, results), name="ringps-fetch", daemon=True)
            for source in self.sources[:only]
        ]
        for thread in threads:
            thread.start()
        try:
            meanwhile()
            for thread in threads:
                while thread.is_alive():
                    thread.join(_GLANCE_S)
                    self.glance()
            self.glance()
        except BaseException:
            stop()
            while any(thread.is_alive() for thread in threads):
                # Again and again: a thread may be just about to connect.
                for source in self.sources:
                    source.end()
                threads[0].join(_GLANCE_S)
                threads = [thread for thread in threads if thread.is_alive()]
            raise
        self.sources = [source for source in self.sources if source.address not in self.lost]
        if not self.sources:
            raise SetupError(f"no server is left to get the training state from{self._said()}")
        return results

    def close(self) -> None:
        """Close all connections."""
        for source in self._all:
            source.close()

    def _do(self, job: Callable[[Source], T], source: Source, results: dict[Source, T]) -> None:
        try:
            results[source] = job(source)
        except SourceLost as loss:
            self.lost[source.address] = str(loss)
        except FrameError as error:
            self.lost[source.address] = f"it does not follow the protocol ({error.reason})"
        except Exception as error:
            self._failure = error

    def _said(self) -> str:
        return "".join(f"; {address}: {reason}" for address, reason in self.lost.items())
