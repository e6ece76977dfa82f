"""Rings of workers that start in milliseconds, with a real coordinator."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from ringps import worker_env
from ringps.membership import Coordinator, CoordinatorSettings, LauncherLink
from ringps.testing.nursery import Exit, Nursery
from ringps.testing.plan import FaultPlan
from ringps.worker_env import WorkerEnv
from tests.launching import ROOT

_LONG_S = 40.0


class Ring:
    """Rings of a fixed size whose workers are forks of a nursery, one ring after the other."""

    def __init__(self, nursery: Nursery, root: Path) -> None:
        """
        Args:
            nursery: has this project's root in its PYTHONPATH.
            root: for logs and other files.
        """
        self._nursery, self._root = nursery, root
        self._exits: queue.SimpleQueue[Exit] = queue.SimpleQueue()
        (root / "plan.json").write_text(FaultPlan(()).to_json())

    def live(self, script: Path, *arguments: list[str]) -> list[int]:
        """Start a worker for each of `arguments`; when one fails, kill the others. Their exit codes."""
        orders = [[str(script), *one] for one in arguments]
        if len(orders) == 1:
            return self._bury([self._start(orders[0], {})])
        timeouts = worker_env.configure().timeouts
        settings = CoordinatorSettings(world_size=len(orders), min_workers=len(orders), timeouts=timeouts)
        coordinator = Coordinator(settings, None, lambda event: None)
        coordinator.start()
        link = LauncherLink(coordinator.address, None, timeouts, lambda message: None)
        try:
            link.register("here", "127.0.0.1", len(orders), 1, False)
            pids = []
            for rank, order in enumerate(orders):
                contract = WorkerEnv(
                    coordinator=coordinator.address,
                    key_file=None,
                    worker_id=rank,
                    host="here",
                    address="127.0.0.1",
                    local_rank=rank,
                    local_world_size=len(orders),
                )
                pids.append(self._start(order, contract.to_environ(), rank))
                link.worker_started(rank)
            return self._bury(pids)
        finally:
            link.close()
            coordinator.close()

    def sleep(self, script: Path, arguments: list[str]) -> int:
        """Start a ring of one, which stops itself (SIGSTOP), and wait until it has; its process id."""
        pid = self._start([str(script), *arguments], {"MORTAL_SIGNAL": "SIGSTOP"})
        end_s = time.monotonic() + _LONG_S
        while _state(pid) != "T":
            assert time.monotonic() < end_s, self.logs()
            time.sleep(0.002)
        return pid

    def wake(self, pid: int) -> int:
        """Let it go on to its end; its exit code."""
        os.kill(pid, signal.SIGCONT)
        ended = self._exits.get(timeout=_LONG_S)
        assert ended.pid == pid
        return ended.code

    def _start(self, order: list[str], environ: Mapping[str, str], rank: int = 0) -> int:
        self._nursery.on_exit = self._exits.put
        plan = ["--plan", str(self._root / "plan.json"), "--record", str(self._root / "fired")]
        return self._nursery.start([*plan, *order], environ, self._root / f"log-{rank}")

    def _bury(self, pids: list[int]) -> list[int]:
        codes: dict[int, int] = {}
        while len(codes) < len(pids):
            ended = self._exits.get(timeout=_LONG_S)
            if ended.code and not any(codes.values()):
                for pid in pids:
                    if pid != ended.pid and pid not in codes:
                        with contextlib.suppress(ProcessLookupError):  # its end is about to be reported
                            os.kill(pid, signal.SIGKILL)
            codes[ended.pid] = ended.code
        return [codes[pid] for pid in pids]

    def logs(self) -> str:
        """The end of what each rank has printed."""
        return "\n".join(path.read_text()[-3000:] for path in sorted(self._root.glob("log-*")))


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@contextlib.contextmanager
def importing_nursery() -> Iterator[Nursery]:
    """A nursery whose workers can import `tests`."""
    with pytest.MonkeyPatch.context() as patch:
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        with Nursery() as one:
            yield one
