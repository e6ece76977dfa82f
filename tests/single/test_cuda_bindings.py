"""The bindings of CUDA's driver, of NCCL and of torch's streams, as far as they show without a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ringps.device import cuda, driver, nccl_library
from ringps.device.cuda import CudaAccelerator, CudaStream
from ringps.device.driver import GRAIN_BYTES, CudaError, CudaPeerMemory, Driver
from ringps.device.nccl_library import Nccl, NcclCommunicator, NcclError
from ringps.device.nccl_symbols import CommConfig, UniqueId
from ringps.errors import SetupError

SUCCESS, REMOTE_ERROR, IN_PROGRESS = 0, 6, 7


class Lost(Exception):
    """What a test's `check` raises."""


def nothing() -> None:
    """A check that finds nothing."""


class FakeNccl:
    """NCCL's C functions. `answers` are the codes of each function's next calls; then it succeeds."""

    def __init__(self, version: int = 23007) -> None:
        self.number = version
        self.answers: dict[str, list[int]] = {}
        self.state: list[int] = []
        """What is in progress meanwhile, call by call."""
        self.calls: list[tuple[Any, ...]] = []
        self.during: dict[str, Callable[[], None]] = {}
        self.config: CommConfig | None = None
        self.gives_handle = True

    def names(self) -> list[str]:
        return [name for name, *_ in self.calls]

    def _answer(self, name: str, *arguments: Any) -> int:
        self.calls.append((name, *arguments))
        self.during.get(name, nothing)()
        queue = self.answers.get(name)
        return queue.pop(0) if queue else SUCCESS

    def ncclGetVersion(self, number: Any) -> int:
        number.contents.value = self.number
        return SUCCESS

    def ncclGetUniqueId(self, made: Any) -> int:
        made.contents.internal[:] = range(128)
        return self._answer("ncclGetUniqueId")

    def ncclGetErrorString(self, code: int) -> bytes:
        return b"remote process exited" if code == REMOTE_ERROR else b"no such code"

    def ncclGetLastError(self, comm: None) -> bytes:
        return b"socket closed by peer\n"

    def ncclCommInitRankConfig(self, comm: Any, size: int, unique: UniqueId, rank: int, config: Any) -> int:
        if self.gives_handle:
            comm.contents.value = 77
        self.config = config.contents
        return self._answer("ncclCommInitRankConfig", size, bytes(unique.internal), rank)

    def ncclCommGetAsyncError(self, comm: Any, state: Any) -> int:
        assert comm.value == 77
        state.contents.value = self.state.pop(0) if self.state else SUCCESS
        return self._answer("ncclCommGetAsyncError")

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nccl"):
            raise AttributeError(name)
        return lambda *arguments: self._answer(
            name, *(one.value if isinstance(one, ctypes.c_void_p) else one for one in arguments)
        )


def connected(fake: FakeNccl, size: int = 2, check: Callable[[], None] = nothing) -> NcclCommunicator:
    return Nccl(fake).connect(bytes(range(128)), size, 0, check, 5.0)


def test_the_installed_nccl_tells_its_version_and_explains_codes() -> None:
    nccl = Nccl.load()
    assert nccl.version >= (2, 18, 0)
    assert "invalid argument" in nccl.describe(4)
    assert nccl.version == Nccl.load("libnccl.so.2").version


def test_the_installed_nccl_makes_ids_and_misses_a_gpu() -> None:
    nccl = Nccl.load()
    unique = nccl.unique_id()
    assert len(unique) == 128 and unique != nccl.unique_id()
    # Where there is a GPU, tests/gpu go further.
    if not torch.cuda.is_available():
        with pytest.raises(NcclError, match="ncclCommInitRankConfig: unhandled cuda error"):
            nccl.connect(unique, 1, 0, nothing, 5.0)


def test_what_is_missing_of_nccl_is_named() -> None:
    with pytest.raises(SetupError, match="no_such_file"):
        Nccl.load("/no_such_file.so")
    with pytest.raises(SetupError, match="has no nccl"):
        Nccl.load("libc.so.6")
    with pytest.raises(SetupError, match=r"2\.17\.1 is too old"):
        Nccl(FakeNccl(21701))
    with pytest.raises(SetupError, match=r"2\.7\.8 is too old"):
        Nccl(FakeNccl(2708))


def test_versions() -> None:
    assert Nccl(FakeNccl(23007)).version == (2, 30, 7)
    assert Nccl(FakeNccl(21801)).version == (2, 18, 1)


def test_the_configuration_is_that_of_2_18_and_undefined_but_for_blocking() -> None:
    fake = FakeNccl()
    connected(fake)
    config = fake.config
    assert config is not None
    assert (config.size, config.magic, config.version, config.blocking) == (48, 0xCAFEBEEF, 21801, 0)
    undefined = -(2**31)
    assert {config.min_ctas, config.max_ctas, config.split_share, config.traffic_class} == {undefined}
    assert config.net_name is None
    assert CommConfig.split_share.offset == 40 and CommConfig.traffic_class.offset == 44


def test_connecting_waits_while_it_is_in_progress() -> None:
    fake = FakeNccl()
    fake.answers["ncclCommInitRankConfig"] = [IN_PROGRESS]
    fake.state = [IN_PROGRESS, IN_PROGRESS, SUCCESS]
    looks: list[int] = []
    connected(fake, check=lambda: looks.append(len(fake.calls)))
    assert fake.names() == ["ncclCommInitRankConfig"] + ["ncclCommGetAsyncError"] * 3
    assert fake.calls[0][1:] == (2, bytes(range(128)), 0)
    assert looks == [1, 2, 3]


def test_what_check_raises_while_connecting_aborts_once() -> None:
    fake = FakeNccl()
    fake.answers["ncclCommInitRankConfig"] = [IN_PROGRESS]
    fake.state = [IN_PROGRESS] * 5

    def check() -> None:
        if len(fake.calls) == 3:
            raise Lost

    with pytest.raises(Lost):
        connected(fake, check=check)
    assert fake.names()[3:] == ["ncclCommAbort"]
    assert fake.calls[-1] == ("ncclCommAbort", 77)


def test_connecting_has_a_limit() -> None:
    fake = FakeNccl()
    fake.answers["ncclCommInitRankConfig"] = [IN_PROGRESS]
    fake.state = [IN_PROGRESS] * 1000
    with pytest.raises(NcclError, match="did not come in time"):
        Nccl(fake).connect(bytes(128), 2, 1, nothing, 0.02)
    assert fake.names().count("ncclCommAbort") == 1


def test_a_failure_while_connecting_is_explained_and_aborts() -> None:
    fake = FakeNccl()
    fake.answers["ncclCommInitRankConfig"] = [IN_PROGRESS]
    fake.state = [REMOTE_ERROR]
    with pytest.raises(
        NcclError, match=r"remote process exited \(code 6\): socket closed by peer$"
    ) as raised:
        connected(fake)
    assert raised.value.code == REMOTE_ERROR
    assert fake.names().count("ncclCommAbort") == 1


def test_a_communicator_that_never_was_is_not_aborted() -> None:
    fake = FakeNccl()
    fake.gives_handle = False
    fake.answers["ncclCommInitRankConfig"] = [1]
    with pytest.raises(NcclError, match="ncclCommInitRankConfig"):
        connected(fake)
    assert fake.names() == ["ncclCommInitRankConfig"]


def test_ranks_and_ids_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="128 bytes"):
        Nccl(FakeNccl()).connect(bytes(127), 1, 0, nothing, 1.0)
    with pytest.raises(ValueError, match="no rank 2"):
        Nccl(FakeNccl()).connect(bytes(128), 2, 2, nothing, 1.0)


def test_collectives_hand_over_places_counts_and_codes() -> None:
    fake = FakeNccl()
    ring = connected(fake)
    long, short = torch.zeros(6), torch.zeros(3)
    ring.all_reduce(long, long, "mean", 5)
    ring.reduce_scatter(long, short, "sum", 5)
    ring.all_gather(short.bfloat16(), gathered := long.bfloat16(), 0)
    ring.broadcast(whole := torch.zeros(2, 2, dtype=torch.int16).view(torch.uint8), 1, 5)
    a, b = long.data_ptr(), short.data_ptr()
    assert fake.calls[1:3] == [
        ("ncclAllReduce", a, a, 6, 7, 4, 77, 5),
        ("ncclReduceScatter", a, b, 3, 7, 0, 77, 5),
    ]
    assert fake.calls[3][2:] == (gathered.data_ptr(), 3, 9, 77, 0)
    assert fake.calls[4] == ("ncclBroadcast", whole.data_ptr(), whole.data_ptr(), 8, 1, 1, 77, 5)


@pytest.mark.parametrize(
    ("dtype", "op", "expected"),
    [
        (torch.float32, "mean", True),
        (torch.int32, "mean", False),
        (torch.int64, "prod", True),
        (torch.int16, "sum", False),
        (torch.bool, "max", True),
        (torch.bool, "sum", False),
        (torch.float32, "median", False),
        (torch.complex64, "sum", False),
    ],
)
def test_what_nccl_can_reduce(dtype: torch.dtype, op: str, expected: bool) -> None:
    fake = FakeNccl()
    ring = connected(fake)
    tensor = torch.zeros(2, dtype=dtype)
    assert Nccl(fake).supports(dtype, op) is expected
    if expected:
        ring.all_reduce(tensor, tensor, op, 0)
    else:
        with pytest.raises(ValueError, match="NCCL has no"):
            ring.all_reduce(tensor, tensor, op, 0)
    assert ("ncclAllReduce" in fake.names()) is expected


def test_tensors_that_do_not_match_are_refused() -> None:
    fake = FakeNccl()
    ring = connected(fake)
    with pytest.raises(ValueError, match="NCCL has no int16"):
        ring.broadcast(torch.zeros(2, dtype=torch.int16), 0, 0)
    with pytest.raises(ValueError, match="elements do not go"):
        ring.all_reduce(torch.zeros(2), torch.zeros(3), "sum", 0)
    with pytest.raises(ValueError, match="elements do not go"):
        ring.all_gather(torch.zeros(2), torch.zeros(3), 0)
    with pytest.raises(ValueError, match="elements do not go"):
        ring.reduce_scatter(torch.zeros(2), torch.zeros(4), "sum", 0)
    with pytest.raises(ValueError, match=r"send torch\.float32"):
        ring.all_reduce(torch.zeros(2), torch.zeros(2).half(), "sum", 0)
    with pytest.raises(ValueError, match="contiguous"):
        ring.broadcast(torch.zeros(4, 4).t()[1:], 0, 0)
    with pytest.raises(ValueError, match="no rank 2"):
        ring.broadcast(torch.zeros(4), 2, 0)
    assert fake.names() == ["ncclCommInitRankConfig"]


def test_a_collective_waits_until_it_is_taken() -> None:
    fake = FakeNccl()
    ring = connected(fake)
    fake.answers["ncclAllReduce"] = [IN_PROGRESS]
    fake.state = [IN_PROGRESS, SUCCESS]
    ring.all_reduce(torch.zeros(2), torch.zeros(2), "sum", 0)
    assert fake.names()[1:] == ["ncclAllReduce", "ncclCommGetAsyncError", "ncclCommGetAsyncError"]


def test_what_check_raises_while_a_collective_waits_aborts() -> None:
    fake = FakeNccl()
    lost = threading.Event()

    def check() -> None:
        if lost.is_set():
            raise Lost

    ring = connected(fake, check=check)
    lost.set()
    fake.answers["ncclAllReduce"] = [IN_PROGRESS]
    with pytest.raises(Lost):
        ring.all_reduce(torch.zeros(2), torch.zeros(2), "sum", 0)
    assert fake.names()[1:] == ["ncclAllReduce", "ncclCommAbort"]


def test_an_error_that_comes_later_is_told_in_words() -> None:
    fake = FakeNccl()
    ring = connected(fake)
    fake.state = [SUCCESS, IN_PROGRESS, REMOTE_ERROR]
    assert ring.error() is None
    assert ring.error() is None
    assert ring.error() == "remote process exited (code 6): socket closed by peer"


def test_after_an_abort_every_call_raises() -> None:
    fake = FakeNccl()
    ring = connected(fake)
    ring.abort()
    ring.abort()
    ring.close()
    tensor = torch.zeros(2)
    calls = [
        lambda: ring.all_reduce(tensor, tensor, "sum", 0),
        lambda: ring.reduce_scatter(tensor, tensor[:1], "sum", 0),
        lambda: ring.all_gather(tensor[:1], tensor, 0),
        lambda: ring.broadcast(tensor, 0, 0),
    ]
    for call in calls:
        with pytest.raises(NcclError, match="it was aborted"):
            call()
    assert "it was aborted" in (ring.error() or "")
    assert fake.names() == ["ncclCommInitRankConfig", "ncclCommAbort"]


def test_an_abort_waits_for_a_call_to_come_out() -> None:
    fake = FakeNccl()
    ring = connected(fake)
    aborter = threading.Thread(target=ring.abort)
    inside = threading.Event()

    def launch() -> None:
        aborter.start()
        while not ring._ended:
            inside.wait(0.001)
        assert "ncclCommAbort" not in fake.names()

    fake.during["ncclAllReduce"] = launch
    with pytest.raises(NcclError, match="it was aborted"):
        ring.all_reduce(torch.zeros(2), torch.zeros(2), "sum", 0)
    aborter.join()
    assert fake.names()[1:] == ["ncclAllReduce", "ncclCommAbort"]


def test_an_abort_frees_a_call_that_is_stuck() -> None:
    fake = FakeNccl()
    ring = NcclCommunicator(Nccl(fake), fake, ctypes.c_void_p(77), 2, nothing, abort_grace_s=0.02)
    stuck, freed = threading.Event(), threading.Event()

    def launch() -> None:
        stuck.set()
        assert freed.wait(30)

    fake.during["ncclAllReduce"] = launch
    fake.during["ncclCommAbort"] = freed.set
    raised: list[BaseException] = []

    def reduce() -> None:
        try:
            ring.all_reduce(torch.zeros(2), torch.zeros(2), "sum", 0)
        except NcclError as error:
            raised.append(error)

    thread = threading.Thread(target=reduce)
    thread.start()
    assert stuck.wait(30)
    ring.abort()
    thread.join()
    assert "it was aborted" in str(raised[0])
    assert fake.names().count("ncclCommAbort") == 1


def test_closing_waits_for_the_others_and_frees() -> None:
    fake = FakeNccl()
    ring = connected(fake)
    fake.answers["ncclCommFinalize"] = [IN_PROGRESS]
    fake.state = [IN_PROGRESS, SUCCESS]
    ring.close()
    ring.close()
    ring.abort()
    asked = ["ncclCommGetAsyncError"] * 2
    assert fake.names()[1:] == ["ncclCommFinalize", *asked, "ncclCommDestroy"]
    assert "it was closed" in (ring.error() or "")


def test_closing_that_fails_aborts_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    fake = FakeNccl()
    ring = connected(fake)
    fake.answers["ncclCommFinalize"] = [REMOTE_ERROR]
    ring.close()
    assert fake.names()[1:] == ["ncclCommFinalize", "ncclCommAbort"]
    assert "aborted instead of closed" in caplog.text


def test_closing_has_a_limit(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(nccl_library, "_CLOSE_LIMIT_S", 0.01)
    fake = FakeNccl()
    ring = connected(fake)
    fake.answers["ncclCommFinalize"] = [IN_PROGRESS]
    fake.state = [IN_PROGRESS] * 1000
    ring.close()
    assert fake.names()[-1] == "ncclCommAbort"
    assert "did not come in time" in caplog.text


class FakeCuda:
    """The driver's C functions, over the host's memory."""

    def __init__(self) -> None:
        self.codes: dict[str, int] = {}
        self.calls: list[str] = []
        self.contexts: list[int] = []
        self.handle = bytes(range(64))

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name not in ("cuInit", "cuDeviceGet", "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain"):
                assert self.contexts == [99], "no context"
            return self.codes.get(name) or self._carry_out(name, arguments)

        return call

    def cuCtxPushCurrent_v2(self, context: ctypes.c_void_p) -> int:
        self.contexts.append(context.value or 0)
        return 0

    def cuCtxPopCurrent_v2(self, context: Any) -> int:
        context.contents.value = self.contexts.pop()
        return 0

    def cuGetErrorName(self, code: int, words: Any) -> int:
        words.contents.value = {1: b"CUDA_ERROR_INVALID_VALUE", 2: b"CUDA_ERROR_OUT_OF_MEMORY"}.get(code)
        return 0

    def cuGetErrorString(self, code: int, words: Any) -> int:
        words.contents.value = {1: b"invalid argument", 2: b"out of memory"}.get(code)
        return 0

    def _carry_out(self, name: str, arguments: tuple[Any, ...]) -> int:
        if name == "cuDeviceGet":
            arguments[0].contents.value = arguments[1] + 10
        elif name == "cuDevicePrimaryCtxRetain":
            assert arguments[1] == 11
            arguments[0].contents.value = 99
        elif name == "cuDeviceGetAttribute":
            assert arguments[1:] == (125, 11)
            arguments[0].contents.value = 1
        elif name == "cuMemAlloc_v2":
            arguments[0].contents.value = 2**40 + arguments[1]
        elif name == "cuIpcGetMemHandle":
            arguments[0].contents.reserved[:] = self.handle
        elif name == "cuIpcOpenMemHandle_v2":
            assert bytes(arguments[1].reserved) == self.handle and arguments[2] == 1
            arguments[0].contents.value = 4096
        elif name == "cuMemHostRegister_v2":
            assert arguments == (8192, 100, 1)
        return 0


def test_the_drivers_calls_are_made_in_the_primary_context() -> None:
    fake = FakeCuda()
    device = Driver(fake, 1)
    assert device.shares_memory()
    assert device.allocate(5) == 2**40 + 5
    assert device.export(2**40) == fake.handle
    assert device.open(fake.handle) == 4096
    device.close(4096)
    device.register(8192, 100)
    device.unregister(8192)
    device.free(2**40)
    assert fake.contexts == []
    assert fake.calls[-3:] == ["cuMemHostRegister_v2", "cuMemHostUnregister", "cuMemFree_v2"]


def test_what_the_driver_refuses_is_named_and_leaves_no_context() -> None:
    fake = FakeCuda()
    device = Driver(fake, 1)
    fake.codes["cuMemAlloc_v2"] = 2
    with pytest.raises(CudaError, match="cuMemAlloc_v2: CUDA_ERROR_OUT_OF_MEMORY: out of memory") as raised:
        device.allocate(5)
    assert raised.value.name == driver.OUT_OF_MEMORY
    assert fake.contexts == []
    fake.codes["cuMemFree_v2"] = 12345
    with pytest.raises(CudaError, match="cuMemFree_v2: 12345"):
        device.free(1)


def test_a_driver_too_old_for_the_question_shares() -> None:
    fake = FakeCuda()
    fake.codes["cuDeviceGetAttribute"] = 1
    assert Driver(fake, 1).shares_memory()
    fake.codes["cuDeviceGetAttribute"] = 2
    with pytest.raises(CudaError):
        Driver(fake, 1).shares_memory()


def test_a_driver_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_SONAME", "libno_such_driver.so.1")
    with pytest.raises(SetupError, match="libno_such_driver"):
        Driver.load(0)
    monkeypatch.setattr(driver, "_SONAME", "libc.so.6")
    with pytest.raises(SetupError, match="has no cuInit"):
        Driver.load(0)


class FakeDriver:
    """A `Driver` whose device is memory of the host; addresses are not the memory's own."""

    def __init__(self, room_bytes: int = 2**40) -> None:
        self.room_bytes = room_bytes
        self.sizes: dict[int, int] = {}
        self.next = 2**32
        self.log: list[tuple[str, int]] = []
        self.fails = ""

    def allocate(self, size_bytes: int) -> int:
        if self.fails or sum(self.sizes.values()) + size_bytes > self.room_bytes:
            raise CudaError("cuMemAlloc_v2", self.fails or driver.OUT_OF_MEMORY, "no")
        address = self.next
        # One follows the other without a gap.
        self.next += size_bytes
        self.sizes[address] = size_bytes
        self.log.append(("allocate", address))
        return address

    def free(self, address: int) -> None:
        del self.sizes[address]
        self.log.append(("free", address))

    def export(self, address: int) -> bytes:
        assert address in self.sizes
        self.log.append(("export", address))
        return b"own" + address.to_bytes(61, "big")

    def open(self, handle: bytes) -> int:
        freed = handle.startswith(b"own") and int.from_bytes(handle[3:], "big") not in self.sizes
        if handle.startswith(b"gone") or freed:
            raise CudaError("cuIpcOpenMemHandle_v2", "CUDA_ERROR_INVALID_HANDLE", "gone")
        assert not handle.startswith(b"own"), "CUDA opens no memory of the same process"
        address = int.from_bytes(handle[4:], "big")
        self.log.append(("open", address))
        return address

    def close(self, address: int) -> None:
        self.log.append(("close", address))


class Placed(torch.Tensor):
    """A tensor that says it lies elsewhere; slices of it, and views, lie accordingly."""

    start: int

    def data_ptr(self) -> int:
        return self.start + self.storage_offset() * self.element_size()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(result, Placed):
            result.start = args[0].start
            result.owner = args[0].owner  # as a storage keeps its own
        return result


def placed(address: int, size_bytes: int, owner: object) -> torch.Tensor:
    tensor = torch.from_numpy(np.zeros(size_bytes, np.uint8)).as_subclass(Placed)
    tensor.start, tensor.owner = address, owner
    return tensor


def peer_memory(fake: FakeDriver, make_room: Callable[[], None] = nothing) -> CudaPeerMemory:
    return CudaPeerMemory(fake, placed, make_room)  # type: ignore[arg-type]


def peers(address: int) -> bytes:
    return b"peer" + address.to_bytes(60, "big")


def test_blocks_are_whole_grains_and_tensors_have_the_size_asked() -> None:
    fake = FakeDriver()
    memory = peer_memory(fake)
    sizes = [0, 1, GRAIN_BYTES, GRAIN_BYTES + 1]
    tensors = [memory.allocate(size) for size in sizes]
    assert [tensor.numel() for tensor in tensors] == sizes
    assert {tensor.dtype for tensor in tensors} == {torch.uint8}
    assert list(fake.sizes.values()) == [GRAIN_BYTES, GRAIN_BYTES, GRAIN_BYTES, 2 * GRAIN_BYTES]


def test_memory_goes_back_with_its_last_tensor_and_is_used_again() -> None:
    fake = FakeDriver()
    memory = peer_memory(fake)
    tensor = memory.allocate(100)
    part = tensor[10:20]
    place = tensor.data_ptr()
    del tensor
    gc.collect()
    other = memory.allocate(100)
    assert other.data_ptr() != place
    assert part.data_ptr() == place + 10
    del part
    gc.collect()
    assert memory.allocate(5000).data_ptr() == place
    assert [what for what, _ in fake.log] == ["allocate", "allocate"]


def test_a_block_that_is_much_too_large_is_left() -> None:
    fake = FakeDriver()
    memory = peer_memory(fake)
    places = {}
    for grains in (5, 9):
        tensor = memory.allocate(grains * GRAIN_BYTES)
        places[grains] = tensor.data_ptr()
        del tensor
    assert memory.allocate(3 * GRAIN_BYTES).data_ptr() not in places.values()
    assert memory.allocate(4 * GRAIN_BYTES).data_ptr() == places[5]
    assert memory.allocate(8 * GRAIN_BYTES).data_ptr() == places[9]


def test_find_tells_the_block_and_where_in_it() -> None:
    fake = FakeDriver()
    memory = peer_memory(fake)
    assert memory.find(torch.zeros(3)) is None
    first, second = memory.allocate(GRAIN_BYTES), memory.allocate(100)
    assert second.data_ptr() == first.data_ptr() + GRAIN_BYTES, "else the test shows less"
    assert memory.find(first) == (b"own" + first.data_ptr().to_bytes(61, "big"), 0)
    assert memory.find(first[-1:]) == (b"own" + first.data_ptr().to_bytes(61, "big"), GRAIN_BYTES - 1)
    assert memory.find(second[8:16].view(torch.int32)) == (b"own" + second.data_ptr().to_bytes(61, "big"), 8)
    assert memory.find(placed(first.data_ptr() - 1, 1, None)) is None
    assert memory.find(placed(second.data_ptr() + GRAIN_BYTES, 1, None)) is None
    assert memory.find(second[:0]) is None
    assert memory.find(placed(first.data_ptr() + 1, GRAIN_BYTES, None)) is None
    assert [what for what, _ in fake.log].count("export") == 2, "each block is exported once"


def test_peers_memory_is_opened_once_until_it_is_forgotten() -> None:
    fake = FakeDriver()
    memory = peer_memory(fake)
    assert memory.open(peers(4096), 10).numel() == 10
    assert memory.open(peers(4096), 20).numel() == 20
    assert memory.open(peers(8192), 10).data_ptr() == 8192
    memory.forget()
    memory.forget()
    assert memory.open(peers(4096), 10).data_ptr() == 4096
    assert sorted(fake.log[2:4]) == [("close", 4096), ("close", 8192)]
    assert [fake.log[at] for at in (0, 1, 4)] == [("open", 4096), ("open", 8192), ("open", 4096)]
    assert len(fake.log) == 5


def test_ones_own_memory_is_found_without_the_driver() -> None:
    fake = FakeDriver()
    memory = peer_memory(fake)
    tensor = memory.allocate(100)
    found = memory.find(tensor)
    assert found is not None
    opened = memory.open(found.handle, 50)
    assert opened.data_ptr() == tensor.data_ptr() and opened.numel() == 50
    memory.forget()
    assert "close" not in [what for what, _ in fake.log]


def test_memory_that_cannot_be_opened_is_an_error_that_says_why() -> None:
    memory = peer_memory(FakeDriver())
    with pytest.raises(RuntimeError, match=r"CUDA_ERROR_INVALID_HANDLE.*process may be gone"):
        memory.open(b"gone" + bytes(60), 10)
    with pytest.raises(RuntimeError, match="64 bytes, not 3"):
        memory.open(b"abc", 10)
    elsewhere = CudaPeerMemory(
        FakeDriver(),  # type: ignore[arg-type]
        lambda address, size_bytes, owner: placed(1, size_bytes, owner),
        nothing,
    )
    with pytest.raises(RuntimeError, match="on another GPU"):
        elsewhere.open(peers(4096), 10)


def test_without_room_kept_blocks_are_freed_those_that_no_peer_saw_first() -> None:
    fake = FakeDriver(room_bytes=4 * GRAIN_BYTES)
    rooms: list[int] = []
    memory = peer_memory(fake, lambda: rooms.append(1))
    shown, unseen = memory.allocate(1), memory.allocate(1)
    seen, hidden = shown.data_ptr(), unseen.data_ptr()
    found = memory.find(shown)
    assert found is not None
    del shown, unseen
    gc.collect()
    first = memory.allocate(3 * GRAIN_BYTES)
    assert [address for what, address in fake.log if what == "free"] == [hidden]
    assert memory.find(placed(hidden, 1, None)) is None
    assert memory.open(found.handle, 1).data_ptr() == seen
    del first
    gc.collect()
    kept = memory.allocate(4 * GRAIN_BYTES)
    assert seen in [address for what, address in fake.log if what == "free"]
    assert kept.numel() == 4 * GRAIN_BYTES
    with pytest.raises(RuntimeError, match="cannot open"):
        memory.open(found.handle, 1)
    assert len(rooms) == 2
    with pytest.raises(MemoryError, match="no room for 7 bytes"):
        memory.allocate(7)


def test_torchs_unused_memory_is_given_back_before_any_block_is_freed() -> None:
    fake = FakeDriver(room_bytes=2 * GRAIN_BYTES)

    def make_room() -> None:
        fake.room_bytes *= 2

    memory = peer_memory(fake, make_room)
    tensor = memory.allocate(1)
    del tensor
    gc.collect()
    memory.allocate(2 * GRAIN_BYTES)
    assert "free" not in [what for what, _ in fake.log]


def test_another_error_than_no_room_is_not_taken_for_it() -> None:
    fake = FakeDriver()
    fake.fails = "CUDA_ERROR_LAUNCH_FAILED"
    with pytest.raises(CudaError, match="LAUNCH_FAILED"):
        peer_memory(fake).allocate(1)


def test_memory_may_be_dropped_on_any_thread() -> None:
    fake = FakeDriver()
    memory = peer_memory(fake)
    lost: list[BaseException] = []

    def use() -> None:
        try:
            for _ in range(200):
                tensor = memory.allocate(1)
                assert memory.find(tensor) is not None
        except BaseException as error:
            lost.append(error)
            raise

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lost == []
    assert len(fake.sizes) <= 8


class FakeEvent:
    """An event of torch's; a test sets it off."""

    made: list[FakeEvent]

    def __init__(self, blocking: bool) -> None:
        assert blocking, "it would spin"
        self.reached = threading.Event()
        self.error: RuntimeError | None = None
        self.made.append(self)

    def record(self, stream: Any) -> None:
        self.stream = stream

    def synchronize(self) -> None:
        assert self.reached.wait(30)
        if self.error is not None:
            raise self.error

    def query(self) -> bool:
        return self.reached.is_set()


class FakeTorchStream:
    """A stream of torch's."""

    def __init__(self, handle: int = 16, priority: int = 0) -> None:
        self.cuda_stream = handle
        self.priority = priority
        self.device = torch.device("cuda", 0)
        self.waits: list[Any] = []

    def wait_event(self, event: Any) -> None:
        self.waits.append(event)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[FakeEvent]:
    """torch.cuda, as far as streams need it; the events that were made."""
    made: list[FakeEvent] = []
    current = [FakeTorchStream(0)]

    @contextlib.contextmanager
    def stream(one: FakeTorchStream) -> Iterator[None]:
        current.append(one)
        yield
        current.pop()

    handles = iter(range(100, 200))
    monkeypatch.setattr(FakeEvent, "made", made, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current[-1])
    monkeypatch.setattr(
        torch.cuda, "Stream", lambda device, priority: FakeTorchStream(next(handles), priority)
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-1"))
    return made


def test_calls_come_in_order_when_the_work_before_them_is_done(events: list[FakeEvent]) -> None:
    stream = CudaStream(FakeTorchStream(), "reduce")  # type: ignore[arg-type]
    called: list[tuple[int, str]] = []
    done = threading.Event()

    def call(number: int) -> None:
        called.append((number, threading.current_thread().name))
        if number == 1:
            done.set()

    stream.notify(lambda: call(0))
    stream.notify(lambda: call(1))
    events[1].reached.set()
    assert not done.wait(0.05), "the first one's work is not done"
    assert called == []
    events[0].reached.set()
    assert done.wait(30)
    assert called == [(0, "ringps-cuda-reduce"), (1, "ringps-cuda-reduce")]


def test_work_goes_into_the_stream_and_after_marks(events: list[FakeEvent]) -> None:
    raw = FakeTorchStream()
    stream, other = CudaStream(raw, "up"), CudaStream(FakeTorchStream(32), "down")  # type: ignore[arg-type]
    mark = other.mark()
    stream.after(mark)
    assert raw.waits == [events[0]] and events[0].stream.cuda_stream == other.key == 32
    seen: list[int] = []
    stream.run(lambda: seen.append(torch.cuda.current_stream().cuda_stream))
    assert seen == [16]
    assert not mark.done()
    events[0].reached.set()
    mark.wait()
    assert mark.done()


def test_after_an_error_of_the_gpu_no_call_is_made_and_all_is_refused(
    events: list[FakeEvent], caplog: pytest.LogCaptureFixture
) -> None:
    stream = CudaStream(FakeTorchStream(), "failing")  # type: ignore[arg-type]
    called: list[int] = []
    stream.notify(lambda: called.append(0))
    stream.notify(lambda: called.append(1))
    (thread,) = [one for one in threading.enumerate() if one.name == "ringps-cuda-failing" and one.daemon]
    for event in events:
        event.error = RuntimeError("CUDA error: an illegal memory access was encountered")
        event.reached.set()
    thread.join()
    assert called == []
    assert caplog.text.count("the GPU's work in stream failing has failed") == 1
    with pytest.raises(RuntimeError, match="illegal memory access"):
        stream.run(nothing)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        stream.notify(nothing)


class FakePinning(FakeDriver):
    """Pins until told not to."""

    refuses = False

    def shares_memory(self) -> bool:
        return True

    def register(self, address: int, size_bytes: int) -> None:
        if self.refuses:
            raise CudaError("cuMemHostRegister_v2", "CUDA_ERROR_NOT_PERMITTED", "operation not permitted")
        self.log.append(("register", size_bytes))

    def unregister(self, address: int) -> None:
        self.log.append(("unregister", address))


@pytest.fixture
def fake_driver(monkeypatch: pytest.MonkeyPatch, events: list[FakeEvent]) -> FakePinning:
    fake = FakePinning()
    monkeypatch.setattr(Driver, "load", lambda ordinal: fake)
    return fake


def test_the_accelerator_keeps_its_streams(fake_driver: FakePinning) -> None:
    gpu = CudaAccelerator(torch.device("cuda", 0))
    assert gpu.identity == "GPU-1"
    reduce, up, down = (gpu.stream(name) for name in ("reduce", "up", "down"))
    assert gpu.stream("reduce") is reduce
    assert len({reduce.key, up.key, down.key}) == 3
    assert [one._stream.priority for one in (reduce, up, down)] == [-1, 0, 0]  # type: ignore[attr-defined]
    assert gpu.here().key == 0 and gpu.here() is gpu.here()
    inside: list[object] = []
    reduce.run(lambda: inside.append(gpu.here()))
    assert inside == [reduce]
    assert not gpu.owns(torch.zeros(1))
    assert gpu.peer_memory is not None


def test_pinning_is_undone_once(fake_driver: FakePinning) -> None:
    gpu = CudaAccelerator(torch.device("cuda", 0))
    memory = torch.zeros(100, dtype=torch.int32)
    undo = gpu.pin(memory)
    undo()
    undo()
    assert fake_driver.log == [("register", 400), ("unregister", memory.data_ptr())]
    gpu.pin(memory[:0])()
    assert len(fake_driver.log) == 2


def test_pinning_that_is_not_allowed_warns_once(
    fake_driver: FakePinning, caplog: pytest.LogCaptureFixture
) -> None:
    fake_driver.refuses = True
    gpu = CudaAccelerator(torch.device("cuda", 0))
    for _ in range(2):
        gpu.pin(torch.zeros(10))()
    assert caplog.text.count("cannot pin 40 bytes") == 1
    assert "CUDA_ERROR_NOT_PERMITTED" in caplog.text
    assert fake_driver.log == []


def test_without_the_drivers_library_there_is_no_peer_memory(
    monkeypatch: pytest.MonkeyPatch, events: list[FakeEvent], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(driver, "_SONAME", "libno_such_driver.so.1")
    gpu = CudaAccelerator(torch.device("cuda", 0))
    assert gpu.peer_memory is None
    assert "libno_such_driver" in caplog.text
    gpu.pin(torch.zeros(1))()
    assert "cannot pin" in caplog.text


def test_a_driver_that_shares_nothing_gives_no_peer_memory(
    monkeypatch: pytest.MonkeyPatch, fake_driver: FakePinning, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(FakePinning, "shares_memory", lambda self: False)
    with caplog.at_level(logging.INFO, logger="ringps"):
        assert CudaAccelerator(torch.device("cuda", 0)).peer_memory is None
    assert "its driver says so" in caplog.text


def test_nccl_is_loaded_once_for_the_device(fake_driver: FakePinning) -> None:
    gpu = CudaAccelerator(torch.device("cuda", 0))
    assert gpu.nccl() is gpu.nccl()
    assert gpu.nccl().version == cuda.Nccl.load().version
