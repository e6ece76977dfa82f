"""How long a worker spends on what makes a step a commit: the library's own functions, wrapped."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from ringps.buckets import passes
from ringps.collectives import ElasticCommunicator
from ringps.kernels.digest import EMPTY, Digest
from ringps.optim.watch import CommitWatch

PARTS = ("hash", "account", "vote", "parameters")
"""Hashing reduced buckets; asking which samples took part, and reading the answer (but for the all-gather in
between, in the background); the vote; hashing all parameters, in the steps that compare them."""


class CommitCosts:
    """Wraps them all, in this process, for good. A step's times are those since the one before."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spent = dict.fromkeys(PARTS, (0.0, 0.0))
        self._process_s = time.process_time()
        wrap = self._wrapped
        Digest.add = wrap("hash", Digest.add)  # type: ignore[method-assign]
        passes.Pass._ask_for_account = wrap("account", passes.Pass._ask_for_account)  # type: ignore[method-assign]
        passes.Pass._read_account = wrap("account", passes.Pass._read_account)  # type: ignore[method-assign]
        ElasticCommunicator._vote = wrap("vote", ElasticCommunicator._vote)  # type: ignore[method-assign]
        CommitWatch.parameters = wrap("parameters", CommitWatch.parameters)  # type: ignore[method-assign]

    def take(self) -> dict[str, float]:
        """Seconds of the clock (`PART_s`) and of a core (`PART_cpu_s`) since the last call, and `step_cpu_s`,
        what the whole process took. A part that did not occur is 0."""
        process_s = time.process_time()
        with self._lock:
            spent, self._spent = self._spent, dict.fromkeys(PARTS, (0.0, 0.0))
        found = {"step_cpu_s": process_s - self._process_s}
        self._process_s = process_s
        for part, (clock_s, cpu_s) in spent.items():
            found |= {f"{part}_s": clock_s, f"{part}_cpu_s": cpu_s}
        return found

    def _wrapped(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            start_s, cpu_s = time.perf_counter(), time.thread_time()
            result = function(*arguments)
            if result == EMPTY:  # nothing was hashed
                return result
            took_s, took_cpu_s = time.perf_counter() - start_s, time.thread_time() - cpu_s
            with self._lock:
                before_s, before_cpu_s = self._spent[part]
                self._spent[part] = (before_s + took_s, before_cpu_s + took_cpu_s)
            return result

        return timed
