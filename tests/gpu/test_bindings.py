"""The bindings of CUDA's driver, of NCCL and of torch's streams, on a GPU."""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import pytest
import torch

from ringps.device.cuda import CudaAccelerator, CudaStream
from ringps.device.driver import GRAIN_BYTES, HANDLE_BYTES
from tests.support import require

A_WHILE = 1_000_000_000
"""Cycles: about half a second."""
LIMIT_S = 50.0
DEVICE = torch.device("cuda", 0)


@pytest.fixture
def gpu() -> CudaAccelerator:
    require(torch.cuda.is_available(), "no GPU")
    return CudaAccelerator(DEVICE)


def nothing() -> None:
    """A check that finds nothing."""


def in_another_process(target: Callable[..., None], *arguments: object) -> bytes:
    """What `target(connection, *arguments)` sends from a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *arguments))
    process.start()
    theirs.close()
    try:
        assert ours.poll(LIMIT_S), "the other process says nothing"
        answer = ours.recv_bytes()
        process.join(LIMIT_S)
        assert process.exitcode == 0
        return answer
    finally:
        process.kill()
        process.join()
        ours.close()


def _tell_identity(connection: Connection) -> None:
    connection.send_bytes(CudaAccelerator(DEVICE).identity.encode())


def test_processes_that_share_a_gpu_call_it_alike(gpu: CudaAccelerator) -> None:
    assert len(gpu.identity) > 30
    assert in_another_process(_tell_identity) == gpu.identity.encode()


def _double(connection: Connection, handle: bytes, offset_bytes: int, numel: int) -> None:
    memory = CudaAccelerator(DEVICE).peer_memory
    assert memory is not None
    end = offset_bytes + 4 * numel
    for _ in range(2):
        theirs = memory.open(handle, end)[offset_bytes:end].view(torch.float32)
        theirs *= 2
    torch.cuda.synchronize()
    total = theirs.sum().item()
    del theirs
    memory.forget()
    connection.send_bytes(str(total).encode())


def test_another_process_reads_and_writes_what_it_was_shown(gpu: CudaAccelerator) -> None:
    memory = gpu.peer_memory
    assert memory is not None
    tensor = memory.allocate(3 * GRAIN_BYTES).view(torch.float32)
    assert gpu.owns(tensor)
    tensor.fill_(1)
    part = tensor[1000:1500]
    found = memory.find(part)
    assert found is not None and len(found.handle) == HANDLE_BYTES and found.offset_bytes == 4000
    torch.cuda.synchronize()
    answer = in_another_process(_double, found.handle, found.offset_bytes, part.numel())
    assert float(answer) == 2000.0
    assert (tensor[:1000] == 1).all() and (tensor[1500:] == 1).all()
    assert (part == 4).all()


def test_memory_that_is_gone_cannot_be_opened(gpu: CudaAccelerator) -> None:
    memory = gpu.peer_memory
    assert memory is not None
    with pytest.raises(RuntimeError, match="cannot open another process's GPU memory"):
        memory.open(bytes(HANDLE_BYTES), 10)


def test_memory_is_used_again_and_found_only_where_it_is_ours(gpu: CudaAccelerator) -> None:
    memory = gpu.peer_memory
    assert memory is not None
    tensor = memory.allocate(100)
    place, view = tensor.data_ptr(), tensor[:8].view(torch.int64)
    del tensor
    gc.collect()
    assert memory.allocate(100).data_ptr() != place
    assert memory.find(view) is not None
    del view
    gc.collect()
    places = {one.data_ptr() for one in [memory.allocate(100), memory.allocate(100)]}
    assert place in places
    assert memory.find(torch.zeros(8, device=DEVICE)) is None
    assert memory.allocate(0).numel() == 0


def test_ones_own_handle_opens(gpu: CudaAccelerator) -> None:
    memory = gpu.peer_memory
    assert memory is not None
    tensor = memory.allocate(100)
    found = memory.find(tensor)
    assert found is not None
    assert memory.open(found.handle, 100).data_ptr() == tensor.data_ptr()


def test_a_thread_that_never_used_cuda_can_allocate(gpu: CudaAccelerator) -> None:
    memory = gpu.peer_memory
    assert memory is not None
    sums: list[float] = []

    def use() -> None:
        tensor = memory.allocate(5 * GRAIN_BYTES).view(torch.float32)
        assert memory.find(tensor) is not None
        sums.append(tensor.fill_(0.5)[:10].sum().item())

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert sums == [5.0]


def test_no_room_is_a_memory_error(gpu: CudaAccelerator) -> None:
    memory = gpu.peer_memory
    assert memory is not None
    with pytest.raises(MemoryError, match="no room for"):
        memory.allocate(2**45)


def _take_what_torch_holds(connection: Connection) -> None:
    memory = CudaAccelerator(DEVICE).peer_memory
    assert memory is not None
    free_bytes, _ = torch.cuda.mem_get_info(DEVICE)
    held = torch.empty(free_bytes * 3 // 4, dtype=torch.uint8, device=DEVICE)
    del held
    connection.send_bytes(str(memory.allocate(free_bytes // 2).numel() == free_bytes // 2).encode())


def test_what_torch_holds_unused_makes_room(gpu: CudaAccelerator) -> None:
    # In another process, whose end gives back what this takes.
    assert in_another_process(_take_what_torch_holds) == b"True"


def test_pinned_memory_is_pinned_until_it_is_undone(gpu: CudaAccelerator) -> None:
    memory = torch.arange(2**20, dtype=torch.float32)
    undo = gpu.pin(memory)
    assert memory.is_pinned()
    there = torch.empty_like(memory, device=DEVICE)
    back = torch.zeros_like(memory)
    undo_back = gpu.pin(back)
    stream = gpu.stream("up")
    stream.run(lambda: there.copy_(memory, non_blocking=True))
    stream.run(lambda: back.copy_(there, non_blocking=True))
    stream.mark().wait()
    assert torch.equal(back, memory)
    undo()
    undo()
    undo_back()
    assert not memory.is_pinned()


def test_memory_that_is_pinned_already_warns(gpu: CudaAccelerator, caplog: pytest.LogCaptureFixture) -> None:
    memory = torch.zeros(2**20)
    undo = gpu.pin(memory)
    gpu.pin(memory)()
    assert "ALREADY_REGISTERED" in caplog.text
    assert memory.is_pinned()
    undo()


def test_calls_come_in_order_after_the_work(gpu: CudaAccelerator) -> None:
    stream = gpu.stream("reduce")
    called: list[tuple[int, bool]] = []
    done = threading.Event()
    numbers = torch.zeros(1, device=DEVICE)
    stream.after(gpu.here().mark())
    for number in range(20):
        stream.run(lambda: torch.cuda._sleep(A_WHILE // 100))
        stream.run(lambda: numbers.add_(1))
        mark = stream.mark()
        stream.notify(lambda number=number, mark=mark: called.append((number, mark.done())))
    stream.notify(done.set)
    assert done.wait(LIMIT_S)
    assert called == [(number, True) for number in range(20)]
    assert numbers.item() == 20


def test_streams_run_beside_each_other_and_wait_where_told(gpu: CudaAccelerator) -> None:
    down, up = gpu.stream("down"), gpu.stream("up")
    assert len({down.key, up.key, gpu.stream("reduce").key, gpu.here().key}) == 4
    small = torch.zeros(8, device=DEVICE)
    for stream in (down, up):  # kernels are loaded at their first launch, which waits for the device
        stream.run(lambda: torch.cuda._sleep(1))
        stream.run(lambda: small.add_(1))
    torch.cuda.synchronize()
    down.run(lambda: torch.cuda._sleep(4 * A_WHILE))
    long = down.mark()
    up.run(lambda: small.add_(1))
    up.mark().wait()
    assert not long.done()
    up.after(long)
    late = up.mark()
    assert not late.done()
    late.wait()
    assert long.done()


def test_whoever_waits_lets_other_threads_run(gpu: CudaAccelerator) -> None:
    stream = gpu.stream("down")
    stream.run(lambda: torch.cuda._sleep(A_WHILE))
    mark = stream.mark()
    rounds = [0]

    def count() -> None:
        while not mark.done():
            rounds[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    mark.wait()
    thread.join()
    assert rounds[0] > 1000


def test_here_is_the_stream_that_torch_uses(gpu: CudaAccelerator) -> None:
    assert gpu.here().key == torch.cuda.current_stream(DEVICE).cuda_stream
    keys: list[int] = []
    stream = gpu.stream("up")
    stream.run(lambda: keys.append(gpu.here().key))
    assert keys == [stream.key]
    assert not gpu.capturing()
    graph = torch.cuda.CUDAGraph()
    tensor = torch.zeros(1, device=DEVICE)
    with torch.cuda.graph(graph):
        tensor.add_(1)
        captured = gpu.capturing()
    assert captured
    graph.replay()
    assert tensor.item() == 1


def test_kept_memory_is_not_given_out_while_it_is_read(gpu: CudaAccelerator) -> None:
    stream = gpu.stream("up")
    stream.run(lambda: torch.cuda._sleep(1))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    source = torch.ones(2**20, device=DEVICE)
    place, copy = source.data_ptr(), torch.zeros(2**20, device=DEVICE)
    stream.after(gpu.here().mark())
    stream.run(lambda: torch.cuda._sleep(A_WHILE))
    stream.run(lambda source=source: copy.copy_(source))
    stream.keep(source)
    del source
    other = torch.zeros(2**20, device=DEVICE)
    assert other.data_ptr() != place
    stream.mark().wait()
    assert (copy == 1).all()


def _fail(connection: Connection) -> None:
    stream = CudaAccelerator(DEVICE).stream("reduce")
    assert isinstance(stream, CudaStream)
    wrong = torch.full((4,), 1000, device=DEVICE)
    few = torch.zeros(3, device=DEVICE)
    torch.cuda.synchronize()
    called: list[int] = []
    stream.run(lambda: torch.cuda._sleep(A_WHILE))
    stream.run(lambda: few.index_select(0, wrong))
    stream.notify(lambda: called.append(1))
    for thread in threading.enumerate():
        if thread.name == "ringps-cuda-reduce":
            thread.join(LIMIT_S)
    assert stream.failure is not None and not called
    with pytest.raises(RuntimeError, match="the GPU's work has failed"):
        stream.run(nothing)
    connection.send_bytes(str(stream.failure).encode())
    os._exit(0)  # torch may abort the process while it frees what CUDA has given up


def test_after_an_error_in_a_kernel_no_call_is_made(gpu: CudaAccelerator) -> None:
    assert b"assert" in in_another_process(_fail)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool],
)
def test_an_nccl_ring_of_one_gives_back_what_it_got(gpu: CudaAccelerator, dtype: torch.dtype) -> None:
    nccl = gpu.nccl()
    ops = [op for op in ("sum", "mean", "min", "max", "prod") if nccl.supports(dtype, op)]
    assert "max" in ops
    ring = nccl.connect(nccl.unique_id(), 1, 0, nothing, LIMIT_S)
    stream = gpu.stream("reduce")
    send = torch.arange(100, device=DEVICE).to(dtype)
    outputs = [torch.zeros_like(send) for _ in range(2 * len(ops) + 1)]
    stream.after(gpu.here().mark())

    def launch() -> None:
        for op, reduced, part in zip(ops, outputs[::2], outputs[1::2], strict=False):
            ring.all_reduce(send, reduced, op, stream.key)
            ring.reduce_scatter(send, part, op, stream.key)
        ring.all_gather(send, outputs[-1], stream.key)
        ring.broadcast(send, 0, stream.key)

    stream.run(launch)
    stream.mark().wait()
    assert ring.error() is None
    for output in outputs:
        assert torch.equal(output, send)
    ring.abort()


def test_nccl_says_no_after_an_abort_and_connects_again(gpu: CudaAccelerator) -> None:
    nccl = gpu.nccl()
    assert nccl.version >= (2, 18, 0)
    tensor = torch.ones(10, device=DEVICE)
    for _ in range(3):
        ring = nccl.connect(nccl.unique_id(), 1, 0, nothing, LIMIT_S)
        ring.all_reduce(tensor, tensor, "sum", gpu.here().key)
        ring.abort()
        ring.abort()
        with pytest.raises(RuntimeError, match="it was aborted"):
            ring.all_reduce(tensor, tensor, "sum", gpu.here().key)
    torch.cuda.synchronize()
    assert (tensor == 1).all()


def test_an_nccl_communicator_closes(gpu: CudaAccelerator, caplog: pytest.LogCaptureFixture) -> None:
    nccl = gpu.nccl()
    ring = nccl.connect(nccl.unique_id(), 1, 0, nothing, LIMIT_S)
    tensor = torch.ones(10, device=DEVICE)
    ring.all_reduce(tensor, tensor, "sum", gpu.here().key)
    ring.close()  # type: ignore[attr-defined]
    ring.close()  # type: ignore[attr-defined]
    assert "was closed" in (ring.error() or "")
    assert caplog.text == ""


class Lost(Exception):
    """What `check` raises."""


def test_a_member_that_never_comes_does_not_hold_up_who_is_told(gpu: CudaAccelerator) -> None:
    nccl = gpu.nccl()
    begin_s = time.monotonic()

    def check() -> None:
        if time.monotonic() > begin_s + 1.0:
            raise Lost

    with pytest.raises(Lost):
        nccl.connect(nccl.unique_id(), 2, 0, check, LIMIT_S)
    with pytest.raises(RuntimeError, match="did not come in time"):
        nccl.connect(nccl.unique_id(), 2, 0, nothing, 0.5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU, and NCCL wants one for each member")
def test_an_abort_ends_a_kernel_that_waits_for_a_member() -> None:
    gpus = [CudaAccelerator(torch.device("cuda", index)) for index in range(2)]
    unique = gpus[0].nccl().unique_id()
    rings = {}

    def connect(rank: int) -> None:
        rings[rank] = gpus[rank].nccl().connect(unique, 2, rank, nothing, LIMIT_S)

    threads = [threading.Thread(target=connect, args=[rank]) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tensor = torch.ones(2**20, device=DEVICE)
    stream = gpus[0].stream("reduce")
    stream.after(gpus[0].here().mark())
    stream.run(lambda: rings[0].all_reduce(tensor, tensor, "sum", stream.key))
    mark = stream.mark()
    assert not mark.done()
    rings[0].abort()
    mark.wait()
    rings[1].abort()
