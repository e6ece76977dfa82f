"""`Checkpointer` in a ring of one: when it saves, what comes back, and what goes wrong."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ringps
from ringps import probe
from ringps.checkpoint.contents import COMPRESSED_SUFFIX
from ringps.optim import admission, checkpointer
from tests.checkpoint_job import Script, seed_all, settle, whole
from tests.same import assert_same
from tests.saved import begin

ALL = ringps.Retention(keep=100)


@pytest.fixture(autouse=True)
def ring(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # the machine will not crash
    monkeypatch.delenv("RINGPS_CHECKPOINT_DIR", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # there is too little to do for two
    ringps.init()
    yield
    ringps.shutdown()
    settle()
    torch.set_num_threads(threads)


class Notes:
    """Stands in for what tells the launcher."""

    def __init__(self) -> None:
        self.all: list[tuple[str, dict[str, Any]]] = []

    def note(self, event: str, **details: Any) -> None:
        self.all.append((event, details))

    def suspend(self) -> None:
        self.all.append(("suspend", {}))

    def of(self, event: str, detail: str = "step") -> list[Any]:
        return [details[detail] for name, details in self.all if name == event]


@pytest.fixture
def notes(ring: None) -> Iterator[Notes]:
    found = Notes()
    admission.use(found)  # type: ignore[arg-type]
    yield found
    admission.use(None)


class Disk:
    """Listens to what is written, and may fail or block there."""

    def __init__(self) -> None:
        self.error: OSError | None = None
        self.at = ""
        """The point, and a part of the path, separated by a blank."""
        self.failed = 0
        self.blocked: threading.Event | None = None

    def __call__(self, point: str, passed: dict[str, Any]) -> None:
        where = f"{point} {passed.get('path', '')} {passed.get('stage', '')}"
        if not point.startswith("save_") or not all(part in where for part in self.at.split()):
            return
        if self.blocked is not None:
            assert self.blocked.wait(30)
        if self.error is not None:
            self.failed += 1
            raise self.error


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    found = Disk()
    monkeypatch.setattr(probe, "listener", found)
    return found


def train(
    script: Script, ckpt: ringps.Checkpointer, until: int, *, wait: bool = True
) -> Iterator[tuple[int, list[int]]]:
    """Train, and yield each step and its samples. By default, what was being written is written then."""
    for step, (inputs, samples) in ckpt.steps(script.loader, until=until):
        script.train(inputs)
        if wait:
            settle()
        yield step, samples.tolist()


def finish(script: Script, ckpt: ringps.Checkpointer, until: int) -> list[tuple[int, list[int]]]:
    return list(train(script, ckpt, until))


def work(script: Script, ckpt: ringps.Checkpointer, until: int, at: dict[int, Callable[[], object]]) -> None:
    """A script's whole loop, in which something happens at some steps."""
    with ckpt:
        for step, _ in train(script, ckpt, until):
            at.get(step, lambda: None)()


def saved(directory: Path) -> list[int]:
    """Steps of the whole checkpoints; nothing else is left there."""
    found = whole(directory)
    names = {one.path.name for one in found} | {"runs"}
    assert {path.name for path in directory.iterdir()} == names
    return [one.step for one in found]


class TestWhen:
    def test_after_every_so_many_steps_and_the_last(self, tmp_path: Path, notes: Notes) -> None:
        script = Script()
        with ringps.Checkpointer(tmp_path, script.state, every_steps=3, retention=ALL) as ckpt:
            finish(script, ckpt, 10)
            statistics = ckpt.statistics()
        assert saved(tmp_path) == [3, 6, 9, 10] == notes.of("checkpoint_saved")
        assert (statistics.saved, statistics.failed, statistics.dropped) == (4, 0, 0)
        assert len(statistics.stall_s) == 4
        assert statistics.bytes_written == sum(notes.of("checkpoint_saved", "bytes"))
        assert notes.of("checkpoint_saved", "durable") == [True] * 4
        assert notes.of("checkpoint_saved", "directory")[0] == str(tmp_path / "step-00000003.1")

    def test_the_last_step_once_and_only_if_wanted(self, tmp_path: Path) -> None:
        script = Script()
        with ringps.Checkpointer(tmp_path / "a", script.state, every_steps=2, retention=ALL) as ckpt:
            finish(script, ckpt, 4)
        assert saved(tmp_path / "a") == [2, 4]
        script, saving = Script(), ringps.Saving(final=False)
        with ringps.Checkpointer(
            tmp_path / "b", script.state, every_steps=2, retention=ALL, saving=saving
        ) as ckpt:
            finish(script, ckpt, 5)
        assert saved(tmp_path / "b") == [2, 4], "and what is under way at the end is awaited"

    def test_after_so_many_seconds(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        class Clock:
            now_s = 1000.0

            def monotonic(self) -> float:
                return self.now_s

            perf_counter = monotonic

        clock, script = Clock(), Script()
        monkeypatch.setattr(checkpointer, "time", clock)
        saving = ringps.Saving(final=False)
        with ringps.Checkpointer(tmp_path, script.state, every_s=3, retention=ALL, saving=saving) as ckpt:
            for step, _ in train(script, ckpt, 15):
                clock.now_s += 1.0 if step < 8 else 0.25
        assert saved(tmp_path) == [3, 6, 15]

    def test_on_request(self, tmp_path: Path) -> None:
        script = Script()
        with ringps.Checkpointer(tmp_path, script.state, retention=ALL) as ckpt:
            for step, _ in train(script, ckpt, 9):
                if step in (2, 5):
                    ckpt.save()
        assert saved(tmp_path) == [2, 5, 9]

    @pytest.mark.parametrize("how", ["accumulate_steps", "no_sync"])
    def test_not_before_gradients_are_applied(self, tmp_path: Path, how: str) -> None:
        script = Script(accumulate_steps=3 if how == "accumulate_steps" else 1)

        def run(ckpt: ringps.Checkpointer, until: int) -> None:
            for step, (inputs, _) in ckpt.steps(script.loader, until=until):
                applied = step % 3 == 0
                if how == "no_sync" and not applied:
                    with script.optimizer.no_sync():
                        script.model(inputs).square().mean().backward()
                else:
                    script.model(inputs).square().mean().backward()
                if applied:
                    script.optimizer.step()
                    script.optimizer.zero_grad()
                settle()

        with ringps.Checkpointer(tmp_path, script.state, every_steps=4, retention=ALL) as ckpt:
            run(ckpt, 8)
        assert saved(tmp_path) == [6], "at the end, gradients of steps 7 and 8 would be lost"
        script = Script(accumulate_steps=3 if how == "accumulate_steps" else 1)
        with ringps.Checkpointer(tmp_path, script.state, every_steps=4, retention=ALL) as ckpt:
            assert ckpt.restored_step == 6
            run(ckpt, 12)
        assert saved(tmp_path) == [6, 9, 12]

    def test_what_is_kept(self, tmp_path: Path) -> None:
        script, retention = Script(), ringps.Retention(keep=2, keep_every=4)
        with ringps.Checkpointer(tmp_path, script.state, every_steps=2, retention=retention) as ckpt:
            seen = [saved(tmp_path) for step, _ in train(script, ckpt, 14) if step % 4 == 0]
        assert seen == [[2], [4, 6], [4, 8, 10]]
        assert saved(tmp_path) == [4, 8, 12, 14]


class TestGoingOn:
    @pytest.mark.parametrize(("cut", "loaders", "compression"), [(3, 0, ""), (4, 2, ""), (5, 0, "zstd")])
    def test_is_as_if_nothing_had_happened(
        self, tmp_path: Path, cut: int, loaders: int, compression: Any
    ) -> None:
        """In the middle of an epoch, before its last batch, and at its end."""
        saving = ringps.Saving(compression=compression)
        seed_all(1)
        straight = Script(loaders=loaders)
        with ringps.Checkpointer(tmp_path / "straight", straight.state, every_steps=2) as ckpt:
            samples = finish(straight, ckpt, 11)
        draws = straight.draw()
        seed_all(1)
        first = Script(loaders=loaders)
        with ringps.Checkpointer(tmp_path / "cut", first.state, every_steps=2, saving=saving) as ckpt:
            assert ckpt.restored_step is None
            before = finish(first, ckpt, cut)
        names = {path.name for path in (whole(tmp_path / "cut")[-1].path).iterdir()}
        assert (f"state.bin{COMPRESSED_SUFFIX}" in names) == bool(compression)
        seed_all(99)
        second = Script(seed=7, loaders=loaders)
        with ringps.Checkpointer(tmp_path / "cut", second.state, every_steps=2, saving=saving) as ckpt:
            assert ckpt.restored_step == second.state.step == cut
            after = finish(second, ckpt, 11)
        assert before + after == samples
        assert_same(second.state.state_dict(), straight.state.state_dict())
        assert second.draw() == draws

    def test_the_users_own_state(self, tmp_path: Path) -> None:
        class Own:
            def __init__(self, value: Any) -> None:
                self.value = value

            def state_dict(self) -> dict[str, Any]:
                return {"value": self.value}

            def load_state_dict(self, state: dict[str, Any]) -> None:
                self.value = state["value"]

        value = {"seen": [1, 2.5, None, "é", b"\x00"], "mean": torch.arange(3, dtype=torch.bfloat16), 7: True}
        script = Script(own=Own(value))
        with ringps.Checkpointer(tmp_path, script.state) as ckpt:
            finish(script, ckpt, 2)
        own = Own(None)
        with ringps.Checkpointer(tmp_path, Script(own=own).state):
            assert_same(own.value, value)

    def test_weights_are_for_everybody(self, tmp_path: Path) -> None:
        script = Script()
        with ringps.Checkpointer(tmp_path, script.state) as ckpt:
            finish(script, ckpt, 4)
        loaded = load_file(tmp_path / "step-00000004.1" / "model.safetensors")
        expected = script.model.state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], expected[name]) for name in loaded)

    def test_after_a_break(self, tmp_path: Path) -> None:
        script = Script()
        with ringps.Checkpointer(tmp_path, script.state, every_steps=2, retention=ALL) as ckpt:
            for step, (inputs, _) in ckpt.steps(script.loader, until=9):
                if step == 5:
                    break
                script.train(inputs)
                ckpt.save()
        # Saves of steps 2 to 4 may have to wait for each other, and the loop's end does not save.
        assert {*saved(tmp_path)} <= {1, 2, 3, 4}
        script = Script()
        with ringps.Checkpointer(tmp_path, script.state) as ckpt:
            steps = [step for step, _ in finish(script, ckpt, 6)]
        assert ckpt.restored_step == steps[0] - 1 == whole(tmp_path)[-2].step
        assert steps[-1] == 6

    def test_after_an_error(self, tmp_path: Path) -> None:
        script = Script()
        ckpt = ringps.Checkpointer(tmp_path, script.state, every_steps=2)
        with pytest.raises(ZeroDivisionError):
            work(script, ckpt, 9, {7: lambda: 1 // 0})
        settle()
        script = Script()
        with ringps.Checkpointer(tmp_path, script.state, every_steps=2) as ckpt:
            assert ckpt.restored_step == whole(tmp_path)[-1].step == 4
            assert [step for step, _ in finish(script, ckpt, 6)] == [5, 6]

    def test_a_second_time_in_the_same_process(self, tmp_path: Path) -> None:
        script = Script()
        ckpt = ringps.Checkpointer(tmp_path, script.state, every_steps=2)
        with ckpt:
            finish(script, ckpt, 3)
        with ckpt:
            assert ckpt.restored_step == 3
            assert [step for step, _ in finish(script, ckpt, 5)] == [4, 5]
        assert saved(tmp_path) == [3, 4, 5]
        assert [one.run for one in whole(tmp_path)] == [1, 2, 2]
        claims = [json.loads(path.read_text()) for path in sorted((tmp_path / "runs").iterdir())]
        assert claims == [{"run": 1, "base": None}, {"run": 2, "base": [1, 3]}]

    def test_nothing_is_done_outside_of_with(self, tmp_path: Path) -> None:
        script = Script()
        ckpt = ringps.Checkpointer(tmp_path / "ckpt", script.state)
        for use in (lambda: ckpt.steps(script.loader, until=3), ckpt.statistics):
            with pytest.raises(ringps.ClosedError, match="inside its `with` block only"):
                use()
        with ckpt:
            ckpt.statistics()
        with pytest.raises(ringps.ClosedError):
            ckpt.statistics()
        assert list((tmp_path / "ckpt").iterdir()) == [tmp_path / "ckpt" / "runs"]

    def test_on_sigterm_it_is_saved_and_the_process_ends(
        self, tmp_path: Path, notes: Notes, capsys: pytest.CaptureFixture[str]
    ) -> None:
        script = Script()
        ckpt = ringps.Checkpointer(tmp_path, script.state, every_steps=4)
        with pytest.raises(SystemExit) as ended:
            work(script, ckpt, 100, {6: lambda: os.kill(os.getpid(), signal.SIGTERM)})
        assert ended.value.code == 75
        assert saved(tmp_path) == [4, 6]
        assert notes.all[-1] == ("suspend", {})
        assert f"stopped after step 6, which is saved in {tmp_path}" in capsys.readouterr().err
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    def test_sigterm_is_for_the_loop_that_runs(self, tmp_path: Path) -> None:
        abandoned = Script()
        with ringps.Checkpointer(tmp_path / "a", abandoned.state) as ckpt:
            loops = [ckpt.steps(abandoned.loader, until=9)]  # lives on, as in the traceback of an error
            next(loops[0])
        script = Script()
        ckpt = ringps.Checkpointer(tmp_path / "b", script.state)
        with pytest.raises(SystemExit) as ended:
            work(script, ckpt, 9, {1: loops.clear, 2: lambda: os.kill(os.getpid(), signal.SIGTERM)})
        assert ended.value.code == 75
        assert saved(tmp_path / "b") == [2]
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


class TestWhatDoesNotFit:
    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        script = Script()
        with ringps.Checkpointer(tmp_path, script.state) as ckpt:
            finish(script, ckpt, 2)
        return tmp_path

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"width": 5}, r'step-00000002\.1 is of another model: it has float32\[4, 3\] as "0\.weight"'),
            ({"batch": 6}, r"global_batch_size=5, but it is 6 now"),
            ({"own": torch.nn.Linear(1, 1)}, r"has no state of own, which this TrainState has; leave it out"),
        ],
    )
    def test_it_is_said(self, directory: Path, changes: dict[str, Any], words: str) -> None:
        script = Script(**changes)
        with (
            pytest.raises(ringps.CheckpointError, match=words),
            ringps.Checkpointer(directory, script.state),
        ):
            pytest.fail("entered")
        assert saved(directory) == [2]

    def test_what_is_not_wanted_any_more_is_no_matter(self, directory: Path) -> None:
        script = Script(scheduled=False)
        with ringps.Checkpointer(directory, script.state) as ckpt:
            assert ckpt.restored_step == 2

    def test_wrong_arguments(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        state = Script().state
        with pytest.raises(ValueError, match="name a directory for checkpoints"):
            ringps.Checkpointer(None, state)
        with pytest.raises(ValueError, match="every_steps must be at least 1, not 0"):
            ringps.Checkpointer(tmp_path, state, every_steps=0)
        with pytest.raises(ValueError, match="every_s must be greater than 0"):
            ringps.Checkpointer(tmp_path, state, every_s=float("nan"))
        with pytest.raises(ValueError, match="max_failed must be 0 or more, not -1"):
            ringps.Saving(max_failed=-1)
        with pytest.raises(ValueError, match="stop_window_s must be 0 or more"):
            ringps.Saving(stop_window_s=float("nan"))
        monkeypatch.setenv("RINGPS_CHECKPOINT_DIR", str(tmp_path / "named"))
        with ringps.Checkpointer(None, state):
            pass
        assert (tmp_path / "named").is_dir()


class TestADurableDirectory:
    def test_gets_a_copy_from_which_to_go_on(self, tmp_path: Path, notes: Notes) -> None:
        fast, durable = tmp_path / "fast", tmp_path / "durable"
        script = Script()
        with ringps.Checkpointer(fast, script.state, every_steps=4, durable=durable) as ckpt:
            finish(script, ckpt, 9)
        assert saved(fast) == [4, 8, 9]
        # Step 8 is being copied when the loop ends; that of step 9 follows.
        assert saved(durable) == [4, 8, 9]
        for one, other in zip(whole(fast), whole(durable), strict=True):
            for path in one.path.iterdir():
                assert path.read_bytes() == (other.path / path.name).read_bytes()
        durable_steps = [
            details["step"]
            for event, details in notes.all
            if event == "checkpoint_saved" and details["durable"]
        ]
        assert durable_steps == [4, 8, 9]
        shutil.rmtree(fast)
        script = Script()
        with ringps.Checkpointer(fast, script.state, every_steps=4, durable=durable) as ckpt:
            assert ckpt.restored_step == 9
            finish(script, ckpt, 11)
        assert notes.of("restored", "directory") == [str(durable / "step-00000009.1")]
        assert saved(fast) == [11]
        assert saved(durable) == [8, 9, 11]
        assert [one.run for one in whole(durable)] == [1, 1, 2]

    def test_may_fail_alone(self, tmp_path: Path, notes: Notes, disk: Disk) -> None:
        fast, durable = tmp_path / "fast", tmp_path / "durable"
        script = Script()
        with ringps.Checkpointer(fast, script.state, every_steps=4, durable=durable) as ckpt:
            for step, _ in train(script, ckpt, 18):
                if step == 6:  # step 4 is whole in the first
                    disk.at = "save_publish 00000004 rename"
                    disk.error = OSError(errno.ENOSPC, "No space left on device")
        assert disk.failed == 1
        failed = [details for event, details in notes.all if event == "checkpoint_failed"]
        assert [one["directory"] for one in failed] == [str(durable)]
        assert [one.step for one in whole(durable)][-2:] == [16, 18]
        assert whole(fast)[-1].step == 18


class TestWhatGoesWrong:
    @pytest.mark.parametrize(
        ("at", "number"),
        [
            ("save_write state.bin", errno.ENOSPC),
            ("save_write manifest.json", errno.EROFS),
            ("save_publish manifest", errno.EROFS),
            ("save_publish rename", errno.EIO),
            ("save_publish done", errno.EIO),
        ],
    )
    def test_a_failing_disk_does_not_end_the_training(
        self,
        tmp_path: Path,
        notes: Notes,
        disk: Disk,
        caplog: pytest.LogCaptureFixture,
        at: str,
        number: int,
    ) -> None:
        script = Script()
        with (
            caplog.at_level(logging.WARNING, "ringps"),
            ringps.Checkpointer(tmp_path, script.state, every_steps=4) as ckpt,
        ):
            disk.at, disk.error = at, OSError(number, os.strerror(number))
            for step, _ in train(script, ckpt, 12):
                if step == 8:
                    disk.error = None
            statistics = ckpt.statistics()
        assert disk.failed == statistics.failed >= 1
        assert notes.of("checkpoint_failed")[0] == 4
        assert notes.of("checkpoint_failed", "reason")[0] == f"rank 0: {os.strerror(number)}"
        assert f"step 4 could not be saved in {tmp_path}: rank 0: {os.strerror(number)}" in caplog.text
        assert saved(tmp_path)[-1] == 12
        script = Script()
        with ringps.Checkpointer(tmp_path, script.state) as ckpt:
            assert ckpt.restored_step == 12

    def test_too_many_failures_end_it(self, tmp_path: Path, notes: Notes, disk: Disk) -> None:
        script, saving = Script(), ringps.Saving(max_failed=2)
        disk.at = "save_write state.bin"
        full = OSError(errno.ENOSPC, "No space left on device", "state.bin")
        ckpt = ringps.Checkpointer(tmp_path, script.state, every_steps=2, saving=saving)
        with pytest.raises(
            ringps.CheckpointError, match=r"failed in a row: 3; Saving\(max_failed=2\)"
        ) as told:
            work(script, ckpt, 100, {4: lambda: setattr(disk, "error", full)})
        assert "No space left on device (state.bin)" in str(told.value)
        assert script.state.step < 20
        assert notes.of("checkpoint_failed", "failed_in_a_row") == [1, 2]
        assert len(notes.of("checkpoints_given_up", "reason")) == 1
        assert whole(tmp_path)

    def test_a_last_step_that_cannot_be_saved_is_an_error(self, tmp_path: Path, disk: Disk) -> None:
        script = Script()
        disk.at, disk.error = "save_write 00000005", OSError(errno.ENOSPC, "No space left on device")
        ckpt = ringps.Checkpointer(tmp_path, script.state, every_steps=2)
        with pytest.raises(ringps.CheckpointError, match=r"step 5 could not be saved in .* that of step 4"):
            work(script, ckpt, 5, {})

    def test_a_hanging_disk_does_not_hold_up_the_training(
        self, tmp_path: Path, notes: Notes, disk: Disk
    ) -> None:
        script = Script()
        with ringps.Checkpointer(tmp_path, script.state, every_steps=2) as ckpt:
            disk.at, disk.blocked = "save_write model.safetensors", threading.Event()
            for step, _ in train(script, ckpt, 12, wait=False):
                if step == 9:
                    assert notes.of("checkpoint_saved") == []
                    assert notes.of("checkpoint_late") == [4], "once, not at each step from then on"
                    disk.blocked.set()
                if step > 9:
                    settle()
        assert notes.of("checkpoint_saved")[0] == 2
        assert notes.of("checkpoint_saved")[-1] == 12
        assert saved(tmp_path)[-1] == 12

    @pytest.mark.parametrize("what", ["", ".aside*", ".aside*/model.safetensors"])
    def test_what_is_written_goes_away(self, tmp_path: Path, notes: Notes, what: str) -> None:
        directory, script = tmp_path / "ckpt", Script()

        def clear() -> None:
            [found] = [directory] if not what else directory.glob(what)
            if found.is_dir():
                shutil.rmtree(found)
            else:
                found.unlink()

        ckpt = ringps.Checkpointer(directory, script.state, every_steps=4, retention=ALL)
        work(script, ckpt, 12, {5: clear})  # step 4 is written, and not published
        assert notes.of("checkpoint_failed") == [4]
        assert notes.of("checkpoint_failed", "reason")[0].endswith(" and is gone")
        (directory / "runs").mkdir(exist_ok=True)
        assert saved(directory) == notes.of("checkpoint_saved")
        assert saved(directory)[-1] == 12
        script = Script()
        with ringps.Checkpointer(directory, script.state) as ckpt:
            assert ckpt.restored_step == 12

    def test_a_directory_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "ckpt").write_text("")
        with (
            pytest.raises(ringps.CheckpointError, match=r"rank 0 cannot use .*ckpt: Not a directory"),
            ringps.Checkpointer(tmp_path / "ckpt", Script().state),
        ):
            pytest.fail("entered")

    def test_a_run_that_was_superseded_ends_and_deletes_nothing(self, tmp_path: Path) -> None:
        script, retention = Script(), ringps.Retention(keep=1)
        ckpt = ringps.Checkpointer(tmp_path, script.state, every_steps=2, retention=retention)
        with pytest.raises(
            ringps.CheckpointError, match=r"run 5 has begun in .*, and this is run 1: another"
        ):
            work(script, ckpt, 100, {5: lambda: begin(tmp_path, run=5, base=(1, 2))})
        assert [one.step for one in whole(tmp_path)] == [2]
        script = Script()
        with ringps.Checkpointer(tmp_path, script.state) as ckpt:
            assert ckpt.restored_step == 2
        assert (tmp_path / "runs" / "run-0000006.json").exists()

    def test_what_a_superseded_run_saved_late_is_not_restored(self, tmp_path: Path) -> None:
        script = Script()
        with ringps.Checkpointer(tmp_path, script.state, every_steps=2, retention=ALL) as ckpt:
            finish(script, ckpt, 6)
        begin(tmp_path, run=2, base=(1, 4))
        script = Script()
        with ringps.Checkpointer(tmp_path, script.state) as ckpt:
            assert ckpt.restored_step == 4
