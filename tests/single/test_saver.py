"""Several ranks' `Saver`s in one process: what they tell each other, and what comes of it on disk."""

from __future__ import annotations

import errno
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ringps import CheckpointError, Retention, Saving, probe
from ringps.checkpoint import files
from ringps.checkpoint.background import Background
from ringps.checkpoint.contents import assemble, compose
from ringps.checkpoint.directory import Directory
from ringps.checkpoint.lanes import Stage, Task
from ringps.checkpoint.saver import Saver, _Lane
from ringps.checkpoint.saving import Happening, Place
from ringps.checkpoint.store import open_store
from tests.saved import begin


def state_of(step: int) -> dict[str, Any]:
    return {"step": step, "model": {"weight": torch.full((700,), float(step))}, "optimizer": {"lr": 0.5}}


class Ring:
    """The savers of one generation after the other, and what they are told between two steps."""

    def __init__(
        self, places: Sequence[Sequence[Path]], *, run: int = 1, saving: Saving | None = None, keep: int = 3
    ) -> None:
        self.savers = [
            Saver(
                run,
                [Directory(open_store(where)) for where in own],
                saving or Saving(),
                Retention(keep=keep),
                step=0,
            )
            for own in places
        ]
        self.generation = 1
        self.happenings: list[Happening] = []

    def place(self, rank: int) -> Place:
        return Place(rank, len(self.savers), self.generation)

    def meet(self) -> None:
        """Between two steps, with all threads at rest: exchange reports, if that is due."""
        lanes = range(len(self.savers[0].busy))
        busy = [any(saver.busy[lane] for saver in self.savers) for lane in lanes]
        due = {saver.must_meet(busy, self.generation) for saver in self.savers}
        assert len(due) == 1, "all ranks or none"
        if due == {True}:
            self.exchange()

    def exchange(self) -> None:
        reports = [saver.report() for saver in self.savers]
        told = [saver.absorb(reports, self.place(rank)) for rank, saver in enumerate(self.savers)]
        assert all([one.event for one in other] == [one.event for one in told[0]] for other in told)
        self.happenings += told[0]

    def begin(self, step: int, *, states: Callable[[int], dict[str, Any]] | None = None) -> None:
        for rank, saver in enumerate(self.savers):
            state = state_of(step) if states is None else states(rank)
            composed = compose(state, {"rank": rank}, rank, len(self.savers))
            saver.begin(composed, step, self.place(rank), time.perf_counter())

    def rest(self) -> None:
        """Go on until nothing is under way."""
        for _ in range(20):
            for saver in self.savers:
                saver.wait()
            self.exchange()
            if all(saver.at_rest for saver in self.savers):
                return
        raise AssertionError("the savers do not come to rest")

    def save(self, step: int) -> None:
        self.rest()
        self.begin(step)
        self.rest()

    def events(self) -> list[tuple[str, int, bool | None]]:
        return [(one.event, one.details["step"], one.details.get("durable")) for one in self.happenings]


def steps_in(*places: Path) -> list[int]:
    """The steps of which all files are whole in at least one of these, independent of who published."""
    steps = set()
    for where in places:
        directory = Directory(open_store(where))
        for found in directory.checkpoints():
            manifest = directory.manifest(found.name)
            raw = {}
            for entry in manifest.files:
                for other in places:
                    if (other / found.name / entry.name).exists():
                        raw[entry.name] = files.read(open_store(other), found.name, entry)
                        break
            assert assemble(raw).state["model"]["weight"][0] == found.step
            steps.add(found.step)
    return sorted(steps)


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    begin(tmp_path / "shared")
    return tmp_path / "shared"


@pytest.fixture
def gate() -> Iterator[Callable[..., threading.Event]]:
    """Holds threads at a point until an event is set."""
    opened: list[threading.Event] = []

    def hold(point: str, where: Callable[[dict[str, Any]], bool]) -> threading.Event:
        event = threading.Event()
        opened.append(event)
        before = probe.listener

        def listen(reached: str, passed: dict[str, Any]) -> None:
            if before is not None:
                before(reached, passed)
            if reached == point and where(passed):
                assert event.wait(30)

        probe.listener = listen
        return event

    yield hold
    for event in opened:
        event.set()
    probe.listener = None


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_all_ranks_write_and_one_publishes(shared: Path, world_size: int) -> None:
    ring = Ring([[shared]] * world_size)
    for step in (10, 20, 30, 40):
        ring.save(step)
    assert ring.events() == [("checkpoint_saved", step, True) for step in (10, 20, 30, 40)]
    assert steps_in(shared) == [20, 30, 40]
    manifest = Directory(open_store(shared)).manifest("step-00000040.1")
    assert manifest.world_size == world_size
    assert [one.name for one in manifest.files if one.kind == "rank"] == [
        f"rank-{rank:05}-of-{world_size:05}.bin" for rank in range(world_size)
    ]


def test_machines_with_directories_of_their_own(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    begin(one), begin(other)
    ring = Ring([[one], [one], [other], [other]])
    for step in (1, 2, 3, 4):
        ring.save(step)
    assert ring.events() == [("checkpoint_saved", step, True) for step in (1, 2, 3, 4)]
    assert steps_in(one, other) == [2, 3, 4]
    for where in (one, other):
        names = {path.name for path in (where / "step-00000004.1").iterdir()}
        assert "manifest.json" in names, (
            "each machine has what its ranks wrote, and says what there is in all"
        )
        assert not list(where.glob(".aside*"))


def test_a_copy_becomes_durable(shared: Path, tmp_path: Path) -> None:
    durable = tmp_path / "durable"
    begin(durable)
    ring = Ring([[shared, durable]] * 3, keep=2)
    for step in (1, 2, 3):
        ring.save(step)
    assert ring.events() == [
        ("checkpoint_saved", step, durable) for step in (1, 2, 3) for durable in (False, True)
    ]
    assert steps_in(shared) == steps_in(durable) == [2, 3]


def test_what_waits_is_left_out_if_a_newer_one_is_whole(shared: Path, tmp_path: Path) -> None:
    durable = tmp_path / "durable"
    begin(durable)
    ring = Ring([[shared, durable]] * 2)
    held = threading.Event()

    def listen(point: str, passed: dict[str, Any]) -> None:
        if point == "save_write" and threading.current_thread().name == "ringps-upload":
            assert held.wait(30)

    probe.listener = listen
    try:
        ring.meet()
        for step in (1, 2, 3):
            ring.begin(step)
            for _ in range(4):
                for saver in ring.savers:
                    saver._lanes[0].background.wait()
                ring.meet()
        assert [step for _, step, _ in ring.events()] == [1, 2, 3], "saving does not wait for copying"
        held.set()
        ring.rest()
    finally:
        held.set()
        probe.listener = None
    assert steps_in(durable) == [1, 3]


def test_a_rank_that_cannot_write_makes_it_fail_for_all(shared: Path) -> None:
    ring = Ring([[shared]] * 3, saving=Saving(max_failed=1))
    ring.save(1)

    def full(point: str, passed: dict[str, Any]) -> None:
        if point == "save_write" and "rank-00001" in passed["path"]:
            raise OSError(errno.ENOSPC, "No space left on device", "disk")

    probe.listener = full
    try:
        ring.save(2)
        assert ring.events()[-1] == ("checkpoint_failed", 2, None)
        assert ring.happenings[-1].details["reason"] == "rank 1: No space left on device (disk)"
        assert {saver.last for saver in ring.savers} == {1}
        ring.begin(3)
        for saver in ring.savers:
            saver.wait()
        reports = [saver.report() for saver in ring.savers]
        for rank, saver in enumerate(ring.savers):
            with pytest.raises(CheckpointError, match=r"failed in a row: 2; Saving\(max_failed=1\) allows"):
                saver.absorb(reports, ring.place(rank))
    finally:
        probe.listener = None
    assert steps_in(shared) == [1]


def test_a_save_that_succeeds_ends_the_count_of_failures(shared: Path) -> None:
    ring = Ring([[shared]] * 2, saving=Saving(max_failed=1))
    for step in (1, 2, 3, 4):
        if step % 2:
            shutil.rmtree(shared)
            shared.write_text("in the way")
        else:
            shared.unlink()
        ring.save(step)
    assert [event for event, _, _ in ring.events()] == ["checkpoint_failed", "checkpoint_saved"] * 2


def test_states_that_differ_are_not_put_together(shared: Path) -> None:
    ring = Ring([[shared]] * 3)
    ring.meet()
    ring.begin(5, states=lambda rank: {**state_of(5), "counter": rank == 2})
    ring.rest()
    assert ring.events() == [("checkpoint_failed", 5, None)]
    assert "rank 2 differs from that of rank 0" in ring.happenings[0].details["reason"]
    assert steps_in(shared) == []


def test_a_change_of_the_ring_drops_the_save_and_a_new_one_follows(shared: Path) -> None:
    ring = Ring([[shared]] * 3)
    ring.save(1)
    ring.begin(2)
    del ring.savers[1]
    ring.generation = 2
    ring.rest()
    assert ring.events() == [("checkpoint_saved", 1, True)]
    assert {saver.attempted for saver in ring.savers} == {1}, "it is due again"
    ring.save(3)
    assert steps_in(shared) == [1, 3]
    assert not list(shared.glob(".aside*")), "what was given up is cleared away"


def test_a_thread_that_goes_on_with_what_was_given_up_is_waited_for(shared: Path, gate: Any) -> None:
    ring = Ring([[shared]] * 2)
    ring.rest()
    held = gate("save_write", lambda passed: "rank-00001" in passed["path"])
    ring.begin(1)
    ring.savers[0].wait()
    ring.generation = 2
    ring.meet()
    assert not any(saver.at_rest for saver in ring.savers), "on no rank, though rank 0 has nothing to do"
    held.set()
    ring.rest()
    ring.save(2)
    assert steps_in(shared) == [2]


def test_one_that_joins_learns_how_far_the_others_are(shared: Path, tmp_path: Path) -> None:
    durable = tmp_path / "durable"
    begin(durable)
    ring = Ring([[shared, durable]] * 2)
    ring.save(10)
    begin(tmp_path / "elsewhere")
    joining = Ring([[tmp_path / "elsewhere", durable]], run=0).savers
    ring.savers = [*joining, *ring.savers]  # as rank 0, on a machine of its own
    ring.generation = 2
    ring.rest()
    assert [saver.last for saver in ring.savers] == [10, 10, 10]
    assert [saver.run for saver in ring.savers] == [1, 1, 1]
    ring.save(20)
    assert ring.events()[-2:] == [("checkpoint_saved", 20, False), ("checkpoint_saved", 20, True)]
    assert steps_in(durable) == [10, 20]


def test_one_that_joined_goes_on_alone_with_what_the_others_knew(shared: Path, tmp_path: Path) -> None:
    durable = tmp_path / "durable"
    begin(durable)
    ring = Ring([[shared, durable]] * 2)
    ring.save(10)
    ring.save(20)
    known = [saver.knows() for saver in ring.savers]
    assert known[0] == known[1]
    joined = Ring([[shared, durable]], run=0)
    joined.savers[0].learn(known[0])  # and those it has it from are lost before reports are exchanged
    joined.generation = 3
    joined.rest()
    assert (joined.savers[0].run, joined.savers[0].last) == (1, 20)
    joined.save(30)
    assert steps_in(shared) == steps_in(durable) == [10, 20, 30]


def test_a_copy_is_begun_again_by_those_that_are_left(shared: Path, tmp_path: Path) -> None:
    durable = tmp_path / "durable"
    begin(durable)
    ring = Ring([[shared, durable]] * 3)
    ring.meet()
    ring.begin(1)
    while not ring.happenings:
        for saver in ring.savers:
            saver._lanes[0].background.wait()
        ring.meet()
    ring.savers = ring.savers[1:]
    ring.generation = 2
    ring.rest()
    assert ring.events() == [("checkpoint_saved", 1, False), ("checkpoint_saved", 1, True)]
    assert steps_in(durable) == [1]


def test_a_copy_that_nobody_can_finish_is_given_up(tmp_path: Path) -> None:
    one, other, durable = tmp_path / "one", tmp_path / "other", tmp_path / "durable"
    begin(one), begin(other), begin(durable)
    ring = Ring([[one, durable], [other, durable]])
    ring.meet()
    ring.begin(1)
    while not ring.happenings:
        for saver in ring.savers:
            saver._lanes[0].background.wait()
        ring.meet()
    ring.savers = ring.savers[1:]  # with the machine whose files nobody else has
    ring.generation = 2
    ring.rest()
    assert ring.events() == [("checkpoint_saved", 1, False), ("checkpoint_failed", 1, None)]
    assert ring.happenings[-1].details["reason"].startswith("no rank can read")
    ring.save(2)
    assert steps_in(durable) == [2]


def test_a_task_that_ends_while_a_report_is_made_is_busy_or_has_a_result(shared: Path) -> None:
    class Ending(Background[dict[str, Any]]):
        """Has ended when it is looked at for the second time."""

        looks = 0

        @property
        def busy(self) -> bool:
            self.looks += 1
            return self.looks == 1

    lane = _Lane(Directory(open_store(shared)), Ending("save"), task=Task(Stage.WRITE, 1, 1))
    lane.background._result = {"files": []}
    for _ in range(2):
        said = lane.said()
        assert said["busy"] or said["result"]


class TestWhoeverIsCutOff:
    """A rank that the others went on without, and whose threads are still at work."""

    def test_finishes_without_harm_to_what_is_newer(self, shared: Path, gate: Any) -> None:
        ring = Ring([[shared]] * 3, keep=1)
        ring.save(1)
        held = gate("save_publish", lambda passed: passed["stage"] == "manifest" and "0002" in passed["path"])
        ring.begin(2)
        for saver in ring.savers:
            saver.wait()
        ring.meet()  # rank 0 begins to publish step 2, and is cut off before it has
        cut_off = ring.savers.pop(0)
        ring.generation = 2
        ring.rest()
        ring.save(3)
        assert steps_in(shared) == [3]
        held.set()
        cut_off.wait()
        assert steps_in(shared) == [3], "its files were cleared away as given up, so it cannot publish"
        ring.save(4)
        assert steps_in(shared) == [4]

    def test_of_an_earlier_run_neither_publishes_nor_deletes(self, shared: Path) -> None:
        old = Ring([[shared]] * 2, keep=1)
        old.save(1)
        old.begin(2)
        for saver in old.savers:
            saver.wait()
        new = Ring([[shared]] * 2, run=2, keep=2)
        begin(shared, run=2, base=(1, 1))
        new.save(2)
        old.meet()
        for saver in old.savers:
            saver.wait()
        reports = [saver.report() for saver in old.savers]
        for rank, saver in enumerate(old.savers):
            with pytest.raises(CheckpointError, match=r"run 2 has begun in .*, and this is run 1"):
                saver.absorb(reports, old.place(rank))
        names = sorted(path.name for path in shared.glob("step-*"))
        assert names == ["step-00000001.1", "step-00000002.2"]
