"""What lies on a device and is saved or served: copied down after the device's work, once, and in order."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
import torch

from ringps import device
from ringps.checkpoint import contents
from ringps.checkpoint.contents import Source
from ringps.checkpoint.host_copies import accelerator_among, host_copies
from ringps.checkpoint.peer import fetch
from ringps.checkpoint.snapshot import Arena, take
from ringps.checkpoint.state_server import StateServer
from ringps.checkpoint.tree import State, flatten, unflatten
from ringps.device import Mark, Stream
from ringps.transport.keys import JobKey
from tests.same import assert_same


class LazyMark:
    """Waiting for it has the stream do all its work."""

    def __init__(self, owner: LazyDevice, upto: int) -> None:
        self._owner = owner
        self._upto = upto

    def done(self) -> bool:
        return self._owner.done >= self._upto

    def wait(self) -> None:
        self._owner.log.append("wait")
        self._owner.work(self._upto)


class LazyDevice:
    """A device, and its only stream, that does nothing before somebody waits for it."""

    identity = "lazy"
    key = 1
    peer_memory = None

    def __init__(self) -> None:
        self.log: list[str] = []
        self.done = 0
        self._queue: list[Callable[[], object]] = []
        self._places: set[int] = set()

    def tensor(self, values: torch.Tensor) -> torch.Tensor:
        """A copy that lies in the device's memory."""
        there = values.detach().clone()
        self._places.add(there.untyped_storage().data_ptr())
        return there

    def owns(self, tensor: torch.Tensor) -> bool:
        return tensor.is_cpu and tensor.untyped_storage().data_ptr() in self._places

    def here(self) -> Stream:
        return self

    def stream(self, name: str) -> Stream:
        return self

    def run(self, work: Callable[[], object]) -> None:
        self._queue.append(work)

    def mark(self) -> Mark:
        return LazyMark(self, len(self._queue))

    def work(self, upto: int) -> None:
        while self.done < upto:
            self._queue[self.done]()
            self.done += 1

    def after(self, mark: Mark) -> None:
        self.run(mark.wait)

    def notify(self, call: Callable[[], None]) -> None:
        self.run(call)

    def keep(self, tensor: torch.Tensor) -> None:
        """Nothing is ever given back here."""

    def capturing(self) -> bool:
        return False

    def nccl(self) -> Any:
        raise AssertionError("nobody exchanges anything here")

    def pin(self, memory: torch.Tensor) -> Callable[[], None]:
        self.log.append(f"pin {memory.numel()}")
        return lambda: self.log.append("unpin")


@pytest.fixture
def lazy() -> Iterator[LazyDevice]:
    found = LazyDevice()
    forget = device.use(found)
    yield found
    forget()


SOME = [
    torch.arange(1000, dtype=torch.float32).view(10, 100),
    torch.tensor(7, dtype=torch.int64),
    torch.empty(0, 3, dtype=torch.bfloat16),
    torch.tensor([True, False, True]),
    torch.tensor([1 + 2j], dtype=torch.complex128),
]


def test_copies_come_after_the_devices_work_and_before_what_follows(lazy: LazyDevice) -> None:
    there = [lazy.tensor(one) for one in SOME]
    live = torch.ones(3)
    lazy.run(lambda: there[0].add_(1))
    copies = host_copies([there[0], live, *there[1:]])
    there[0].zero_()
    assert lazy.log == [f"pin {4032 + 3 * 64}", "wait", "unpin"]
    assert copies[1] is live
    assert_same([copies[0], *copies[2:]], [SOME[0] + 1, *SOME[1:]])
    assert not any(map(lazy.owns, copies))
    assert all(copy.data_ptr() % 64 == 0 for copy in copies if copy.numel())


def test_what_the_cpu_has_is_taken_as_it_is(lazy: LazyDevice) -> None:
    for one, given in zip(host_copies(SOME), SOME, strict=True):
        assert one is given
    assert host_copies([]) == []
    assert lazy.log == []


def test_a_device_is_found_among_tensors(lazy: LazyDevice) -> None:
    assert accelerator_among([torch.ones(1), lazy.tensor(torch.ones(1)), torch.ones(1)]) is lazy
    assert accelerator_among([torch.ones(1)]) is None
    with pytest.raises(ValueError, match="on the CPU and on CUDA GPUs; this one is on meta"):
        accelerator_among([torch.ones(1), torch.ones(1, device="meta")])


def test_a_snapshot_is_of_the_state_after_the_devices_work(lazy: LazyDevice) -> None:
    there, here = lazy.tensor(torch.zeros(50_000)), torch.full((50_000,), 3.0)
    lazy.run(lambda: there.add_(1))
    images = take(Arena(), [Source("a", "state", [there, here]), Source("b", "state", [here, there])])
    lazy.run(lambda: there.add_(1))
    lazy.work(3)
    there.add_(1)
    here.zero_()
    ones, threes = torch.ones(50_000), torch.full((50_000,), 3.0)
    for image, expected in zip(images, ((ones, threes), (threes, ones)), strict=True):
        assert image.memory.tobytes() == b"".join(one.numpy().tobytes() for one in expected)
    assert lazy.log.count("wait") == 1


def test_the_arena_is_pinned_once_and_anew_when_it_grows(lazy: LazyDevice) -> None:
    small, large = (Source("a", "state", [lazy.tensor(torch.zeros(n))]) for n in (1024, 2048))
    host = Source("a", "state", [torch.zeros(4096)])
    arena = Arena()
    arena.reserve(4096, lazy)
    for source in (small, small, large, host, large):
        take(arena, [source])
        arena.release()
    steps = [one for one in lazy.log if one != "wait"]
    # Memory that grew for the CPU alone is pinned when the device comes back to it.
    assert steps == ["pin 4096", "unpin", "pin 8192", "unpin", "pin 16384"]
    del arena
    gc.collect()
    assert lazy.log[-1] == "unpin"


def test_a_job_without_a_device_pins_nothing(lazy: LazyDevice) -> None:
    arena = Arena()
    arena.reserve(10_000)
    take(arena, [Source("a", "state", [torch.zeros(100)])])
    assert lazy.log == []


def test_a_joining_worker_gets_what_the_device_has(lazy: LazyDevice) -> None:
    weight = lazy.tensor(torch.arange(500_000.0))
    state = {"model": {"w": weight}, "optimizer": [{"step": torch.tensor(3.0), "m": lazy.tensor(SOME[0])}]}
    lazy.run(lambda: weight.mul_(2))
    skeleton, tensors = flatten(state, devices=True)
    token = JobKey.generate()
    with closing(StateServer("127.0.0.1", token)) as server:
        server.offer(skeleton, host_copies(tensors), 5)
        weight.zero_()  # it goes on with its work
        fetched = fetch([server.address], token, 5)
    found = unflatten(fetched.skeleton, fetched.tensors)
    expected = {
        "model": {"w": torch.arange(500_000.0) * 2},
        "optimizer": [{"step": torch.tensor(3.0), "m": SOME[0]}],
    }
    assert_same(found, expected)


def test_which_gpu_it_was_is_not_in_a_state() -> None:
    states: list[State] = [flatten({"where": torch.device("cuda", index)}) for index in (0, 1)]
    assert states[0] == states[1]
    assert unflatten(*states[0]) == {"where": torch.device("cuda")}


def test_a_rank_makes_only_those_weights_contiguous_that_it_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    inner = contents._resolved
    monkeypatch.setattr(contents, "_resolved", lambda one: made.append(one.numel()) or inner(one))
    state = {"model": {"w": torch.arange(6.0).view(2, 3).mT}, "rest": torch.zeros(2**22, dtype=torch.uint8)}
    kinds = []
    for rank in range(3):
        sources = contents.compose(state, None, rank, 3).sources
        kinds.append([source.kind for source in sources])
        assert all(one.is_contiguous() for source in sources for one in source.tensors)
    assert [("weights" in kind) for kind in kinds] == [True, False, False]
    assert made == [6]
