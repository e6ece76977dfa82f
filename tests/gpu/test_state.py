"""A training state on a real GPU: made equal, snapped amid training, handed over, saved and restored."""

from __future__ import annotations

import gc
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

import ringps
from ringps.checkpoint.contents import Source, compose
from ringps.checkpoint.host_copies import accelerator_among, host_copies
from ringps.checkpoint.peer import fetch
from ringps.checkpoint.snapshot import Arena, take
from ringps.checkpoint.state_server import StateServer
from ringps.checkpoint.tree import flatten, unflatten
from ringps.collectives import Communicator, current
from ringps.config import Config
from ringps.optim import randomness
from ringps.optim.replicate import replicate
from ringps.transport.keys import JobKey
from tests.formed import FormedRing
from tests.launching import ROOT, run
from tests.same import assert_same
from tests.support import require

pytestmark = pytest.mark.timeout(170)  # processes that load torch and start CUDA

DEVICE = "cuda"
LONG_CYCLES = 2_000_000_000
"""About a second of a GPU's time."""


@pytest.fixture(autouse=True)
def gpu() -> None:
    require(torch.cuda.is_available(), "there is no GPU")


def on_gpu(values: torch.Tensor) -> torch.Tensor:
    return values.to(DEVICE)


def busy(cycles: int = LONG_CYCLES // 5) -> None:
    """Have the current stream do nothing for some time."""
    torch.cuda._sleep(cycles)


# Made equal.


def some_tensors(seed: int) -> list[torch.Tensor]:
    """Of all kinds: small and large, on both sides, of no dimensions and of odd lengths."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(64, 33, generator=generator)
    large = torch.randint(-(2**31), 2**31 - 1, (3 * 2**20,), generator=generator, dtype=torch.int32)
    return [
        on_gpu(wide),
        torch.tensor(float(seed)),
        on_gpu(torch.tensor([seed % 2 == 0] * 5)),
        on_gpu(wide.bfloat16()).mT,
        on_gpu(large),
        wide.double(),
        on_gpu(torch.full((7,), seed, dtype=torch.uint8)),
        on_gpu(torch.full((1, 4), seed, dtype=torch.int64)).expand(3, 4),
        on_gpu(torch.randn(2, 3, 4, 4, generator=generator)).to(memory_format=torch.channels_last),
    ]


def test_all_ranks_get_the_sources_values() -> None:
    def work(ring: Communicator) -> list[torch.Tensor]:
        tensors = some_tensors(ring.rank)
        busy()
        tensors[0].add_(1)  # what the GPU has yet to do counts
        replicate(ring, tensors, src=1)
        return [tensor.cpu() for tensor in tensors]

    expected = [tensor.cpu() for tensor in some_tensors(1)]
    expected[0] += 1
    with FormedRing(["here", "there"], Config(transport="tcp")) as ring:
        for found in ring.run(work):
            assert_same(found, expected)


# Snapped.


def image_of(tensor: torch.Tensor, arena: Arena) -> torch.Tensor:
    """A snapshot of a tensor of int32."""
    (image,) = take(arena, [Source("state.bin", "state", [tensor])])
    return torch.frombuffer(image.memory, dtype=torch.int32)


@pytest.mark.parametrize("own_stream", [False, True], ids=["default stream", "own stream"])
def test_a_snapshot_is_of_its_moment(own_stream: bool) -> None:
    tensor = torch.zeros(16 * 2**20, dtype=torch.int32, device=DEVICE)
    arena = Arena()
    stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for moment in (1, 2, 3):
            busy()
            tensor.fill_(moment)
            image = image_of(tensor, arena)
            tensor.fill_(-1)  # the next step, in place
            assert image.eq(moment).all()
            del image
            arena.release()
    stream.synchronize()


def test_a_snapshot_does_not_wait_for_other_streams() -> None:
    tensor = torch.ones(2**20, dtype=torch.int32, device=DEVICE)
    arena = Arena()
    image_of(tensor, arena)  # so that there is room, and that is pinned
    arena.release()
    other, done = torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(other):
        torch.cuda._sleep(LONG_CYCLES)
        done.record()
    image = image_of(tensor, arena)
    assert not done.query(), "the other stream's work was waited for"
    assert image.eq(1).all()
    other.synchronize()


def test_the_arena_is_pinned_while_it_lives() -> None:
    arena = Arena()
    arena.reserve(4096, accelerator_among([torch.ones(1, device=DEVICE)]))
    memory = arena._memory
    assert memory.is_pinned()
    arena.reserve(16_384)
    assert not memory.is_pinned()
    take(arena, [Source("a", "state", [torch.ones(5, device=DEVICE)])])
    memory = arena._memory
    assert memory.is_pinned()
    del arena
    gc.collect()
    assert not memory.is_pinned()


def test_host_copies_hold_the_same_bits() -> None:
    tensors = [one.contiguous() for one in some_tensors(3)] + [torch.empty(0, 3, device=DEVICE)]
    expected = [one.cpu() for one in tensors]
    busy()
    tensors[0].mul_(2)
    copies = host_copies(tensors)
    tensors[0].zero_()
    assert_same(copies, [expected[0] * 2, *expected[1:]])
    assert all(copy.is_cpu and not copy.is_pinned() for copy in copies)
    assert copies[1] is tensors[1]


def test_all_files_of_a_checkpoint_hold_what_is_on_the_gpu() -> None:
    tensors = some_tensors(4)
    model = {f"w{number}": tensor for number, tensor in enumerate(tensors)}
    here = {"model": {name: tensor.cpu() for name, tensor in model.items()}, "rest": [tensors[4].cpu()]}
    for rank in range(2):
        there = take(Arena(), compose({"model": model, "rest": [tensors[4]]}, None, rank, 2).sources)
        expected = take(Arena(), compose(here, None, rank, 2).sources)
        assert [image.name for image in there] == [image.name for image in expected]
        assert [bytes(image.memory) for image in there] == [bytes(image.memory) for image in expected]


# Handed over.


def adam(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)  # counts its steps on the CPU


def fused(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)


def capturable(model: torch.nn.Module) -> torch.optim.Optimizer:
    rate = torch.tensor(0.01, device=DEVICE)
    return torch.optim.Adam(model.parameters(), lr=rate, capturable=True)


class Average:
    """A part that takes tensors as they are given."""

    def __init__(self, value: float) -> None:
        self.tensor = torch.full((5,), value, device=DEVICE)

    def state_dict(self) -> dict[str, Any]:
        return {"tensor": self.tensor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tensor = state_dict["tensor"]


class Job:
    """A script's objects."""

    def __init__(self, make: Callable[[torch.nn.Module], torch.optim.Optimizer], seed: int) -> None:
        torch.manual_seed(seed)
        layers = (torch.nn.Linear(3, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 1))
        self.model = torch.nn.Sequential(*layers).to(DEVICE)
        self.optimizer = ringps.DistributedOptimizer(make(self.model), self.model)
        self.scaler = torch.amp.GradScaler(DEVICE, init_scale=64.0 * (1 + seed), growth_interval=3)
        self.state = ringps.TrainState(
            model=self.model, optimizer=self.optimizer, scaler=self.scaler, average=Average(float(seed))
        )

    def step(self, inputs: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        self.scaler.scale(self.model(inputs).square().mean()).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()


@pytest.fixture
def ring() -> Iterator[None]:
    ringps.init()
    yield
    ringps.shutdown()


@pytest.mark.usefixtures("ring")
@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")
@pytest.mark.parametrize("make", [adam, fused, capturable])
def test_one_that_joins_goes_on_with_the_same_bits(
    make: Callable[[torch.nn.Module], torch.optim.Optimizer],
) -> None:
    member, joiner = Job(make, 0), Job(make, 1)
    inputs = torch.randn(9, 8, 3, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    for number in range(5):
        member.step(inputs[number])
    skeleton, tensors = flatten(member.state.shared(current().raw), devices=True)
    token = JobKey.generate()
    with closing(StateServer("127.0.0.1", token)) as server:
        server.offer(skeleton, host_copies(tensors), 5)
        fetched = fetch([server.address], token, 5)
    joiner.step(inputs[0])  # it has a state of its own before
    joiner.state.load_state_dict(unflatten(fetched.skeleton, fetched.tensors))
    for number in range(5, 9):
        member.step(inputs[number])
        joiner.step(inputs[number])
    expected = flatten(member.state.state_dict(), devices=True)
    found = flatten(joiner.state.state_dict(), devices=True)
    assert found.skeleton == expected.skeleton
    assert [one.device for one in found.tensors] == [one.device for one in expected.tensors]
    assert_same(host_copies(found.tensors), host_copies(expected.tensors))


ELASTIC = f"""
import json, os, signal, sys
import torch
from torch.utils.data import DataLoader, TensorDataset
import ringps
from ringps.checkpoint.host_copies import host_copies
from ringps.checkpoint.tree import flatten
from ringps.kernels.digest import digest

ringps.init()
if "{DEVICE}" == "cuda":
    torch.cuda.set_device(ringps.local_rank() % torch.cuda.device_count())
first_life = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
torch.manual_seed(os.getpid())
model = torch.nn.Sequential(
    torch.nn.Linear(3, 64), torch.nn.Dropout(0.3), torch.nn.Linear(64, 1)
).to("{DEVICE}")
sampler = ringps.ElasticBatchSampler(48, 8, seed=2)
optimizer = ringps.DistributedOptimizer(torch.optim.Adam(model.parameters(), lr=0.01), model, sampler=sampler)
scaler = torch.amp.GradScaler("{DEVICE}", init_scale=64.0, growth_interval=20)
loader = DataLoader(TensorDataset(torch.randn(48, 3)), batch_sampler=sampler)
state = ringps.TrainState(model=model, optimizer=optimizer, sampler=sampler, scaler=scaler)
together = 0
for step, (batch,) in state.steps(loader, until=1_000_000):
    if step == 5 and first_life and ringps.worker_id() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    optimizer.zero_grad()
    scaler.scale(model(batch.to("{DEVICE}")).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    together = together + 1 if step > 5 and ringps.world_size() == 2 else 0
    ends = torch.tensor([float(together >= 5)])
    ringps.all_reduce(ends, "min")
    if ends:
        break
skeleton, tensors = flatten(
    [state.state_dict()[part] for part in ("model", "optimizer", "scaler")], devices=True
)
found = dict(worker=ringps.worker_id(), first_life=first_life, skeleton=skeleton.hex(),
             tensors=digest(*host_copies(tensors)).hex(), on=[tensor.device.type for tensor in tensors])
with open(os.path.join(sys.argv[1], f"rank-{{ringps.rank()}}.json"), "w") as file:
    json.dump(found, file)
ringps.shutdown()
"""


def test_a_worker_takes_the_place_of_one_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(ELASTIC)
    ended = run("run", "-n", "2", tmp_path / "train.py", tmp_path)
    assert ended.code == 0, (ended.out[-3000:], ended.err[-3000:])
    found = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert sorted(one.pop("first_life") for one in found) == [False, True]
    assert len({one.pop("worker") for one in found}) == 2
    assert found[0] == found[1]
    assert DEVICE in found[0]["on"]


# Saved and restored.

TRAIN = f"""
import json, os, random, signal, sys
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
import torch
from torch.utils.data import DataLoader, TensorDataset
import ringps
from ringps.checkpoint.host_copies import host_copies
from ringps.checkpoint.tree import flatten
from ringps.kernels.digest import digest
from tests.checkpoint_job import settle

directory, until, die_at, fused = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "fused"
torch.use_deterministic_algorithms(True)
ringps.init()
if "{DEVICE}" == "cuda":
    torch.cuda.set_device(ringps.local_rank() % torch.cuda.device_count())
torch.manual_seed(1 + ringps.rank())
random.seed(ringps.rank())
model = torch.nn.Sequential(
    torch.nn.Linear(3, 64), torch.nn.BatchNorm1d(64), torch.nn.Dropout(0.3), torch.nn.Linear(64, 1)
).to("{DEVICE}")
sampler = ringps.ElasticBatchSampler(48, 8, seed=2)
inner = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
optimizer = ringps.DistributedOptimizer(inner, model, sampler=sampler)
schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)
scaler = torch.amp.GradScaler("{DEVICE}", init_scale=64.0, growth_interval=3)
inputs = torch.randn(48, 3, generator=torch.Generator().manual_seed(0))
loader = DataLoader(TensorDataset(inputs), batch_sampler=sampler)
state = ringps.TrainState(
    model=model, optimizer=optimizer, sampler=sampler, scheduler=schedule, scaler=scaler
)
with ringps.Checkpointer(os.path.join(directory, "ckpt"), state, every_steps=4) as ckpt:
    for step, (batch,) in ckpt.steps(loader, until=until):
        optimizer.zero_grad()
        with torch.autocast("{DEVICE}", dtype=torch.bfloat16):
            loss = model(batch.to("{DEVICE}")).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        settle()  # a checkpoint is whole two steps after it was begun
        if step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
    restored = ckpt.restored_step
skeleton, tensors = flatten(state.state_dict(), devices=True)
buffers = host_copies([buffer for _, buffer in model.named_buffers()])
draws = [random.random(), float(torch.rand(())), float(torch.rand((), device="{DEVICE}"))]
parameter, *_ = inner.state.values()
found = dict(restored=restored, tensors=digest(*host_copies(tensors)).hex(), skeleton=skeleton.hex(),
             buffers=digest(*buffers).hex(), draws=draws, scale=scaler.get_scale(),
             step_on=parameter["step"].device.type)
with open(os.path.join(directory, f"rank-{{ringps.rank()}}.json"), "w") as file:
    json.dump(found, file)
ringps.shutdown()
"""


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", ["fused", "plain"])
def test_a_job_that_was_killed_goes_on_with_the_same_bits(tmp_path: Path, workers: int, kind: str) -> None:
    def train(directory: str, die_at: int) -> int:
        where = tmp_path / directory
        where.mkdir(exist_ok=True)
        ring = ("-n", str(workers), "--min-workers", str(workers), "--max-restarts", "0")
        ended = run("run", *ring, tmp_path / "train.py", where, "10", str(die_at), kind)
        print(ended.out[-3000:], ended.err[-3000:])
        return ended.code

    (tmp_path / "train.py").write_text(TRAIN)
    assert train("whole", 0) == 0
    assert train("killed", 7) == 128 + signal.SIGKILL
    assert not list((tmp_path / "killed").glob("rank-*"))
    assert train("killed", 0) == 0
    for rank in range(workers):
        whole, killed = (
            json.loads((tmp_path / name / f"rank-{rank}.json").read_text()) for name in ("whole", "killed")
        )
        assert (whole.pop("restored"), killed.pop("restored")) == (None, 4)
        assert killed == whole
        assert killed["scale"] > 64, "it has grown, and is a part of the state"
        assert killed["step_on"] == (DEVICE if kind == "fused" else "cpu")


# Random numbers.


def test_the_gpus_random_numbers_go_on() -> None:
    parameter = torch.ones(3, device=DEVICE)
    torch.cuda.manual_seed(7)
    torch.rand(5, device=DEVICE)
    captured = randomness.capture(None, [parameter])
    assert len(captured["cuda"]) == 1 and captured["cuda"][0].is_cpu
    expected = torch.rand(9, device=DEVICE).cpu()
    torch.cuda.manual_seed(8)
    randomness.restore(captured, None, [parameter])
    assert_same(torch.rand(9, device=DEVICE).cpu(), expected)


CPU_ONLY = """
import sys
import torch
import ringps
ringps.init()
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
optimizer = ringps.DistributedOptimizer(torch.optim.Adam(model.parameters()), model)
state = ringps.TrainState(model=model, optimizer=optimizer)
with ringps.Checkpointer(sys.argv[1], state, every_steps=1) as ckpt:
    for step, batch in ckpt.steps([torch.ones(2, 3)], until=3 + (ckpt.restored_step or 0)):
        optimizer.zero_grad()
        model(batch).square().sum().backward()
        optimizer.step()
ringps.shutdown()
assert not torch.cuda.is_initialized()
"""


def test_a_job_on_the_cpu_does_not_start_cuda(tmp_path: Path) -> None:
    for _ in range(2):  # anew, and restored
        subprocess.run([sys.executable, "-c", CPU_ONLY, tmp_path / "ckpt"], cwd=ROOT, check=True, timeout=100)
