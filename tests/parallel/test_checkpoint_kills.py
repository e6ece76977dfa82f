"""Killed at any moment, a job goes on from the newest checkpoint that it has called saved, or a newer one."""

from __future__ import annotations

import random
import re
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ringps.testing.nursery import Nursery
from tests.checkpoint_job import MORTAL, Whole, whole
from tests.checkpoint_ring import Ring, importing_nursery

pytestmark = pytest.mark.timeout(170)  # on busy cores


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with importing_nursery() as one:
        yield one


@dataclass
class Life:
    """What one start of the whole ring noted."""

    restored: tuple[int, str] | None = None
    """The step, and a hash of the parameters."""
    steps: dict[int, str] = field(default_factory=dict)
    saved: dict[int, int] = field(default_factory=lambda: {0: 0, 1: 0})
    """The newest step that was said to be saved: in the first directory, and in the durable one."""
    killed: str = ""


class Chain:
    """Starts of a ring, one after the other, on the same directory."""

    def __init__(self, nursery: Nursery, root: Path, name: str, *, durable: bool, workers: int) -> None:
        self.directory = root / name
        self.durable = root / f"{name}-durable" if durable else None
        self._ring, self._workers = Ring(nursery, root), workers
        self._script = root / "mortal.py"
        self._script.write_text(MORTAL)
        self._read = 0

    def live(self, seed: int, until: int, every: int = 1) -> Life:
        """One start. As soon as one of its processes is gone, all are killed."""
        arguments = [self._arguments(seed and seed + rank, until, every) for rank in range(self._workers)]
        codes = self._ring.live(self._script, *arguments)
        life = self._account()
        # Of several, another may notice the loss, and end with an error, before it is killed too.
        expected = {0, -signal.SIGKILL} if self._workers == 1 else {0, 1, -signal.SIGKILL}
        assert {*codes} <= expected and (life.killed or not any(codes)), (codes, self._ring.logs())
        return life

    def sleep(self, seed: int, until: int) -> int:
        """A start that comes to rest (SIGSTOP) at a random moment; its process id."""
        pid = self._ring.sleep(self._script, self._arguments(seed, until, 1))
        self._account()  # the next life is another's
        return pid

    def wake(self, pid: int) -> tuple[int, str]:
        """Let it go on to its end: its exit code, and what it printed."""
        code = self._ring.wake(pid)
        self._account()
        return code, self._ring.logs()

    def _arguments(self, seed: int, until: int, every: int) -> list[str]:
        return [str(self.directory), str(self.durable or ""), str(seed), str(until), str(every)]

    def _account(self) -> Life:
        lines = self.directory.with_name(f"{self.directory.name}.ledger").read_text().splitlines()
        life = Life()
        for line in lines[self._read :]:
            match line.split():
                case ["restored", step, digest]:
                    assert life.restored in (None, (int(step), digest)), "all ranks the same"
                    life.restored = int(step), digest
                case ["step", step, digest]:
                    assert life.steps.setdefault(int(step), digest) == digest
                case ["saved", step, lane]:
                    life.saved[int(lane)] = int(step)
                case ["killed", *words]:
                    life.killed = " ".join(words)
        self._read = len(lines)
        return life

    def all(self) -> list[Whole]:
        """The whole checkpoints of both directories, oldest first, by their files alone."""
        wheres = [self.directory] if self.durable is None else [self.directory, self.durable]
        return sorted((one for where in wheres for one in whole(where)), key=lambda one: (one.run, one.step))

    def newest(self) -> Whole | None:
        """The last of them."""
        return next(reversed(self.all()), None)


def reference(nursery: Nursery, root: Path, until: int, workers: int) -> dict[int, str]:
    """The parameters after each step of a job that nothing happens to."""
    return Chain(nursery, root, "straight", durable=False, workers=workers).live(0, until, every=1000).steps


def kill(chain: Chain, expected: dict[int, str], kills: int, seed: int, *, lose_every: int = 0) -> list[str]:
    """Start a job again and again, and have it killed each time. At which moments that was.

    Args:
        lose_every: after so many kills the first directory is lost too.
    """
    draw = random.Random(seed)
    moments: list[str] = []
    promised, reached = [0, 0], 0
    while len(moments) < kills:
        before = chain.newest()
        life = chain.live(draw.randrange(1, 2**30), until=10_000)
        if life.restored is not None:
            step, digest = life.restored
            assert step == (before.step if before else 0), life
            assert step == 0 or digest == expected[step]
        for step, digest in life.steps.items():
            assert digest == expected[step], f"step {step} has other bits than in a run that was not killed"
        reached = max(reached, *life.steps, 0)
        assert life.killed
        moments.append(life.killed)
        promised = [max(one, other) for one, other in zip(promised, life.saved.values(), strict=True)]
        after = chain.newest()
        assert (after.step if after else 0) >= max(promised), life
        if before is not None:
            assert after is not None and (after.run, after.step) >= (before.run, before.step)
        if lose_every and not len(moments) % lose_every:
            shutil.rmtree(chain.directory, ignore_errors=True)
            promised[0] = 0
            after = chain.newest()
            assert (after.step if after else 0) >= promised[1]
    assert reached >= kills / 2, "it gets on"
    return moments


def kinds(moments: list[str]) -> set[str]:
    """Without ranks and paths."""
    return {
        " ".join(word for word in moment.split()[1:] if word.replace("_", "").isalpha()) for moment in moments
    }


def test_two_hundred_kills(nursery: Nursery, tmp_path: Path) -> None:
    expected = reference(nursery, tmp_path, 500, workers=1)
    alone = Chain(nursery, tmp_path, "alone", durable=False, workers=1)
    moments = kill(alone, expected, 120, seed=1)
    both = Chain(nursery, tmp_path, "both", durable=True, workers=1)
    moments += kill(both, expected, 80, seed=2, lose_every=7)
    assert len(moments) == 200
    found = kinds(moments)
    assert {"save_write", "boundary", "at fsync"} <= found
    for some in (r"save_publish \w+", r"\w+ rename", r"\w+ (unlink|rmdir)", r"\w+ mkdir"):
        assert any(re.fullmatch(some, kind) for kind in found), (some, found)


def test_two_workers(nursery: Nursery, tmp_path: Path) -> None:
    expected = reference(nursery, tmp_path, 150, workers=2)
    pair = Chain(nursery, tmp_path, "pair", durable=False, workers=2)
    moments = kill(pair, expected, 16, seed=3)
    assert {moment.split()[0] for moment in moments} == {"0", "1"}, "both ranks"


def test_a_run_that_was_taken_for_lost_and_goes_on(nursery: Nursery, tmp_path: Path) -> None:
    """It was asleep while another began: it does no harm to what that one saves, and ends."""
    expected = reference(nursery, tmp_path, 300, workers=1)
    chain = Chain(nursery, tmp_path, "chain", durable=False, workers=1)
    draw = random.Random(4)
    superseded = 0
    for _ in range(16):
        asleep = chain.sleep(draw.randrange(1, 2**30), until=250)
        begun = chain.newest()
        step = begun.step if begun else 0
        life = chain.live(0, until=step + 3)
        assert life.steps[step + 3] == expected[step + 3]
        saved = chain.all()
        code, printed = chain.wake(asleep)
        newest = chain.newest()
        assert newest is not None
        if not code:  # it had no number yet, and went on from what the other had saved
            assert newest.run > saved[-1].run
            break
        superseded += 1
        assert f"run {saved[-1].run} has begun in {chain.directory}" in printed, printed
        assert newest.path == saved[-1].path
        assert {one.path for one in chain.all()} >= {one.path for one in saved if one.run == newest.run}
    assert superseded > 8
