"""Jobs that are killed, stopped and started again go on as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ringps
from ringps.testing.job import FaultyJob, run_job
from ringps.testing.nursery import Nursery
from ringps.testing.plan import Fault, FaultPlan, Moment
from tests.checkpoint_job import TRAIN, Ledgers, Script, digest_of, settle, whole
from tests.checkpoint_ring import Ring, importing_nursery
from tests.launching import Ringps, eventually_gone, start
from tests.support import require

pytestmark = pytest.mark.timeout(170)  # jobs of several processes that load torch, on busy cores

QUICK = {"RINGPS_HEARTBEAT_TIMEOUT_S": "2", "RINGPS_HEARTBEAT_INTERVAL_S": "0.1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with importing_nursery() as one:
        yield one


class Site:
    """Where a job's files are."""

    def __init__(self, directory: Path, nursery: Nursery) -> None:
        self.directory = directory
        self.ckpt = directory / "ckpt"
        self.program = directory / "train.py"
        self.program.write_text(TRAIN)
        self.events = directory / "events.jsonl"
        self.nursery = nursery

    def job(self, *options: str, workers: int = 2) -> Ringps:
        """Some workers under `ringps run`, of which two must remain."""
        where = ("-n", str(workers), "--min-workers", "2", "--events", self.events)
        arguments: list[str | Path] = [self.program, str(self.directory), str(self.ckpt), *options]
        temporary = self.directory / "temporary"  # those of loaders that are killed stay
        temporary.mkdir(exist_ok=True)
        return start("run", *where, *arguments, environ={**QUICK, "TMPDIR": str(temporary)})

    def ring(self, workers: int, *options: str, name: str = "", ckpt: str = "ckpt") -> tuple[list[int], str]:
        """A ring of forks, with its ledgers in the directory `name`: exit codes, and what they printed."""
        root = self.directory / name
        root.mkdir(exist_ok=True)
        for log in root.glob("log-*"):
            log.unlink()
        ring = Ring(self.nursery, root)
        codes = ring.live(self.program, *([[str(root), str(root / ckpt), *options]] * workers))
        return codes, ring.logs()

    @property
    def ledgers(self) -> Ledgers:
        return Ledgers(self.directory)

    def straight(self, until: int, *options: str, workers: int = 2) -> Ledgers:
        """What workers note that nothing happens to."""
        codes, logs = self.ring(workers, "--until", str(until), *options, name="straight")
        assert {*codes} == {0}, logs
        return Ledgers(self.directory / "straight")

    def happened(self, event: str) -> list[dict[str, Any]]:
        entries = [json.loads(line) for line in self.events.read_text().splitlines()]
        return [entry for entry in entries if entry["event"] == event]


@pytest.fixture
def site(tmp_path: Path, nursery: Nursery) -> Site:
    return Site(tmp_path, nursery)


def test_a_job_that_is_killed_stopped_and_loses_a_worker(site: Site) -> None:
    """Its samples, in their order, its parameters and everything else are those of one that was not."""
    loaders = ("--loaders", "1")
    with site.job("--hold", "20", *loaders) as command:
        command.expect_all("[0] held", "[1] held")
        pids = {line["pid"] for line in site.ledgers.lines}
        command.process.kill()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        command.finish()
        assert all(eventually_gone(pid) for pid in pids)
    assert [one.step for one in whole(site.ckpt)] == [8, 12, 16]
    assert (site.ckpt / ".aside-step-00000020.1.1").is_dir(), "a save was under way"
    with site.job("--slow", *loaders) as command:
        command.expect_all("[0] at step 30", "[1] at step 30")
        command.send(signal.SIGTERM)
        done = command.finish()
    assert done.code == 75, done
    stopped = re.fullmatch(
        r"ringps: stopped after step (\d+), which is saved in .*; .* \(exit code 75\)", done.last
    )
    assert stopped, done.last
    step = int(stopped[1])
    assert step >= 30
    assert [line["step"] for line in site.ledgers.of("restored")] == [None, None, 16, 16]
    assert whole(site.ckpt)[-1].step == step
    assert not list(site.ckpt.glob(".aside*"))
    until, die_at = step + 25, step + 17
    with site.job("--until", str(until), "--die-at", str(die_at), *loaders) as command:
        done = command.finish()
    assert done.code == 0, done
    assert (
        f"failed: process killed by signal {signal.SIGKILL:d} (SIGKILL); starting the whole ring again"
        in done.err
    )
    assert [entry["step"] for entry in site.happened("restored")[:2]] == [16, step]
    [*_, restored] = site.happened("restored")
    assert step < restored["step"] < die_at
    straight = site.straight(until, *loaders)
    assert site.ledgers.samples == straight.samples
    assert site.ledgers.parameters == straight.parameters
    assert site.ledgers.ends == straight.ends
    assert digest_of(whole(site.ckpt)[-1].weights) == digest_of(
        whole(site.directory / "straight" / "ckpt")[-1].weights
    )


def test_an_elastic_job_of_which_too_few_remain(site: Site) -> None:
    """It is started again as a whole, and stops when it is asked to."""
    with site.job("--slow", "--die-at", "17", workers=3) as command:
        command.expect_all(*(f"[{rank}] at step 20" for rank in range(3)))
        command.send(signal.SIGTERM)
        done = command.finish()
    assert done.code == 75, done
    assert "starting the whole ring again from the latest checkpoint (2 of 3 restarts left)" in done.err
    restored = [line["step"] for line in site.ledgers.of("restored")]
    assert restored[:3] == [None] * 3
    assert restored[3] in (8, 12)  # that of step 16 was under way
    assert restored[3:] == [restored[3]] * 3
    last = whole(site.ckpt)[-1]
    assert last.step >= 20
    straight = site.straight(last.step, workers=3)
    assert site.ledgers.samples == straight.samples
    assert site.ledgers.parameters == straight.parameters


def test_fewer_ranks_train_the_same_samples(site: Site) -> None:
    codes, logs = site.ring(3, "--until", "7")
    assert codes == [0, 0, 0], logs
    [saved] = [
        json.loads((one.path / "manifest.json").read_text()) for one in whole(site.ckpt) if one.step == 7
    ]
    assert saved["world_size"] == 3
    codes, logs = site.ring(2, "--until", "14")
    assert codes == [0, 0], logs
    assert (
        "3 ranks saved it, and there are 2 now: the samples are the same, rounding and random numbers" in logs
    )
    straight = site.straight(14)
    found = {line["step"]: set[int]() for line in site.ledgers.of("batch")}
    for line in site.ledgers.of("batch"):
        assert not found[line["step"]] & {*line["samples"]}, "nothing twice"
        found[line["step"]] |= {*line["samples"]}
    assert found == {step: {*sum(shares.values(), [])} for step, shares in straight.samples.items()}
    assert {**found}.keys() == {*range(1, 15)}


def test_a_directory_for_each_rank(site: Site) -> None:
    """As machines have that share none."""
    own = "ckpt-{worker}"
    names = [site.directory / "ckpt-0", site.directory / "ckpt-1"]
    codes, logs = site.ring(2, "--until", "10", ckpt=own)
    assert codes == [0, 0], logs
    entries = [{path.name for path in (name / "step-00000010.1").iterdir()} for name in names]
    assert "manifest.json" in entries[0] & entries[1]
    assert entries[0] & entries[1] == {"manifest.json"}, "each has its part"
    durable = ("--durable", str(site.directory / "durable"))
    codes, logs = site.ring(2, "--until", "14", *durable, ckpt=own)
    assert codes == [0, 0], logs
    assert whole(site.directory / "durable")[-1].step == 14
    shutil.rmtree(names[1])
    codes, logs = site.ring(2, "--until", "18", *durable, ckpt=own)
    assert codes == [0, 0], logs
    assert [line["step"] for line in site.ledgers.of("restored")] == [None, None, 10, 10, 14, 14]
    assert site.ledgers.parameters == site.straight(18).parameters
    shutil.rmtree(names[1])
    codes, logs = site.ring(2, "--until", "22", ckpt=own)
    assert codes != [0, 0]
    lost = r"there are 3 checkpoints in \S+ckpt-\d, and none is whole: step-00000018\.3: no rank can"
    assert re.search(lost, logs), logs
    assert len(site.ledgers.of("restored")) == 6, "it does not begin anew"


def test_a_replaced_worker_saves_its_part(site: Site) -> None:
    """In an elastic ring: its losses, and whom it gains, do not keep checkpoints from being whole."""
    root = site.directory
    plan = FaultPlan((Fault(kind="kill", at=Moment(point="boundary", step=10), worker_id=1),))
    arguments = (str(root), str(site.ckpt), "--every", "3", "--slow", "--through", "3,2,3")
    ended = run_job(
        FaultyJob(
            script=site.program, workers=3, plan=plan, directory=root, arguments=arguments, environ=QUICK
        ),
        site.nursery,
    )
    assert ended.failure is None
    plan.check_fired((root / "fired.jsonl").read_text())
    assert [len(event["members"]) for event in ended.events if event["event"] == "generation"][:3] == [
        3,
        2,
        3,
    ]
    found = whole(site.ckpt)
    manifests = [json.loads((one.path / "manifest.json").read_text()) for one in found]
    assert manifests[-1]["world_size"] == 3
    assert manifests[-1]["generation"] > 1
    assert {one.run for one in found} == {1}
    assert {*(entry["name"] for entry in manifests[-1]["files"])} >= {
        f"rank-0000{rank}-of-00003.bin" for rank in range(3)
    }
    noted = [line for line in site.ledgers.of("step") if line["step"] == found[-1].step]
    parameters = digest_of(
        {name: one for name, one in found[-1].weights.items() if "running" not in name and "num_" not in name}
    )
    assert {line["parameters"] for line in noted} == {parameters}
    assert len(noted) == 3


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of a few hundred kilobytes."""
    require(os.geteuid() == 0, "needs root to mount a file system")
    where = tmp_path / "disk"
    where.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", where], capture_output=True, text=True
    )
    require(mounted.returncode == 0, f"cannot mount a file system: {mounted.stderr}")
    yield where
    subprocess.run(["umount", "--lazy", where], check=True)


@pytest.fixture
def alone() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ringps.init()
    yield
    ringps.shutdown()
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("alone")
def test_a_disk_that_is_full_then_read_only_then_cleared(
    disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory, filler = disk / "ckpt", disk / "filler"
    script = Script()
    saves: dict[int, list[int]] = {}

    def fill() -> None:
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(1000))

    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how},size=300k", disk], check=True)

    events: dict[int, Callable[[], object]] = {
        5: fill,
        15: filler.unlink,
        25: lambda: remount("ro"),
        35: lambda: remount("rw"),
        45: lambda: shutil.rmtree(directory),
    }
    with ringps.Checkpointer(directory, script.state, every_steps=2) as ckpt:
        for step, (inputs, _) in ckpt.steps(script.loader, until=55):
            script.train(inputs)
            settle()
            if step % 5 == 0:
                saves[step] = [one.step for one in whole(directory)]
            events.get(step, lambda: None)()
        statistics = ckpt.statistics()
    print(saves)
    assert saves[5] == saves[10] == saves[15] == [2], "full"
    assert saves[20][-1] >= 16
    assert saves[35] == saves[30] == saves[25], "read-only"
    assert saves[40][-1] >= 36
    assert saves[50][-1] >= 46, "cleared"
    assert whole(directory)[-1].step == 55
    assert statistics.failed >= 4
    assert f"could not be saved in {directory}: rank 0: No space left on device" in caplog.text
    assert f"could not be saved in {directory}: rank 0: Read-only file system" in caplog.text
    again = Script(seed=3)
    with ringps.Checkpointer(directory, again.state) as ckpt:
        assert ckpt.restored_step == 55
    assert again.parameters() == script.parameters()
