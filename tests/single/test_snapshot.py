"""Snapshots of a state, and their files on the way into a store and back."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from ringps.checkpoint import files
from ringps.checkpoint.contents import Source, assemble, compose
from ringps.checkpoint.local_store import LocalStore
from ringps.checkpoint.manifest import FileEntry
from ringps.checkpoint.snapshot import Arena, Image, room_for, take
from ringps.errors import CheckpointError
from tests.same import assert_same


def some_bytes(size_bytes: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, size_bytes, np.uint8))


def content(tensors: list[torch.Tensor]) -> bytes:
    return b"".join(tensor.numpy().tobytes() for tensor in tensors)


# Snapshots.


@settings(max_examples=50)
@given(
    st.lists(
        st.lists(
            st.sampled_from([0, 1, 60, 4096, 16 * 1024, 16 * 1024 + 1, 32 * 1024, 100_000]), max_size=12
        ),
        max_size=5,
    )
)
def test_images_hold_the_bytes_of_their_sources(sizes: list[list[int]]) -> None:
    sources = [
        Source(f"file{number}", "state", [some_bytes(size, seed) for seed, size in enumerate(of_file)])
        for number, of_file in enumerate(sizes)
    ]
    arena = Arena()
    images = take(arena, sources)
    assert [(image.name, image.kind) for image in images] == [(source.name, "state") for source in sources]
    for image, source in zip(images, sources, strict=True):
        assert image.memory.tobytes() == content(source.tensors)
    assert arena.size_bytes == room_for(sources)


def source_of(tensor: torch.Tensor) -> Source:
    return Source("state.bin", "state", [tensor])


def test_a_snapshot_stays_as_it_was() -> None:
    live = some_bytes(100_000)
    before = live.numpy().tobytes()
    (image,) = take(Arena(), [source_of(live)])
    live.zero_()
    assert image.memory.tobytes() == before


def address(image: Image) -> int:
    found: int = np.frombuffer(image.memory, np.uint8).ctypes.data
    return found


def test_the_memory_is_used_again_and_only_grows() -> None:
    arena = Arena()
    arena.reserve(204_800)
    places = set()
    for size in (200_000, 100, 150_000):
        (image,) = take(arena, [source_of(some_bytes(size))])
        places.add(address(image))
        arena.release()
        assert arena.size_bytes == 204_800
    assert len(places) == 1
    take(arena, [source_of(some_bytes(300_032))])
    assert arena.size_bytes == 303_104, "whole pages"


def test_a_snapshot_in_use_is_not_overwritten() -> None:
    arena = Arena()
    assert not arena.in_use
    (image,) = take(arena, [source_of(some_bytes(10))])
    assert arena.in_use
    with pytest.raises(AssertionError, match="not been released"):
        take(arena, [source_of(some_bytes(5))])
    with pytest.raises(AssertionError, match="not been released"):
        arena.reserve(10_000)
    arena.reserve(5)  # there is room for so many: nothing changes
    assert image.memory.tobytes() == some_bytes(10).numpy().tobytes()
    arena.release()
    assert not arena.in_use


def test_an_image_cannot_be_used_after_its_release() -> None:
    arena = Arena()
    (image,) = take(arena, [source_of(some_bytes(10))])
    arena.release()
    with pytest.raises(ValueError, match="released"):
        image.memory.tobytes()


def test_room_is_made_in_another_thread() -> None:
    arena = Arena()
    maker = threading.Thread(target=arena.reserve, args=(50_000_000,))
    maker.start()
    maker.join()
    assert arena.size_bytes == 50_000_000
    take(arena, [source_of(some_bytes(1000))])
    assert arena.size_bytes == 50_000_000


# Files.


class MemoryStore:
    """Files by path."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.blocks: list[int] = []

    def write(self, path: str, blocks: Iterable[bytes | memoryview]) -> None:
        copies = [bytes(block) for block in blocks]
        self.blocks = list(map(len, copies))
        self.files[path] = b"".join(copies)

    @contextlib.contextmanager
    def read(self, path: str) -> Iterator[io.BytesIO]:
        if path not in self.files:
            raise FileNotFoundError(path)
        yield io.BytesIO(self.files[path])


class Dribble(MemoryStore):
    """Gives a few bytes at a time, as a network does."""

    @contextlib.contextmanager
    def read(self, path: str) -> Iterator[Any]:
        with super().read(path) as whole:

            class Slow:
                def readinto(self, buffer: memoryview) -> int:
                    return whole.readinto(buffer[:1000])

            yield Slow()


def image_of(raw: torch.Tensor, name: str = "state.bin", kind: str = "state") -> Image:
    return Image(name, kind, raw.numpy().data)


COMPRESSIBLE = torch.arange(3_000_000, dtype=torch.int32).view(torch.uint8)
COMPRESSION = pytest.mark.parametrize("compression", ["", "zstd"])


@COMPRESSION
@pytest.mark.parametrize("store", [MemoryStore(), Dribble()], ids=["whole", "dribble"])
@pytest.mark.parametrize("size", [1, files.BLOCK_BYTES, COMPRESSIBLE.numel()])
def test_a_file_comes_back(compression: str, store: MemoryStore, size: int) -> None:
    image = image_of(COMPRESSIBLE[:size])
    entry = files.write(store, "step", image, compression)
    stored = store.files[f"step/{entry.name}"]
    assert entry == FileEntry(
        name="state.bin.zst" if compression else "state.bin",
        size_bytes=len(stored),
        digest=xxhash.xxh3_128_hexdigest(stored),
        kind="state",
    )
    assert max(store.blocks) <= files.BLOCK_BYTES
    back = files.read(store, "step", entry)
    assert back.dtype is torch.uint8
    assert back.numpy().tobytes() == image.memory.tobytes()


def test_an_empty_file_comes_back() -> None:
    store = MemoryStore()
    entry = files.write(store, "step", image_of(torch.empty(0, dtype=torch.uint8)))
    assert files.read(store, "step", entry).numel() == 0


def test_compressed_files_are_shorter_and_other_tools_read_them() -> None:
    store = MemoryStore()
    entry = files.write(store, "step", image_of(COMPRESSIBLE, "rank-00000-of-00001.bin", "rank"), "zstd")
    assert entry.name == "rank-00000-of-00001.bin.zst"
    assert entry.size_bytes < COMPRESSIBLE.numel() * 0.7
    plain = zstandard.ZstdDecompressor().decompress(store.files["step/rank-00000-of-00001.bin.zst"])
    assert plain == COMPRESSIBLE.numpy().tobytes()


@pytest.mark.parametrize("kind", ["weights", "index"])
def test_what_other_tools_read_is_never_compressed(kind: str) -> None:
    store = MemoryStore()
    entry = files.write(store, "step", image_of(COMPRESSIBLE, "model.safetensors", kind), "zstd")
    assert (entry.name, entry.size_bytes) == ("model.safetensors", COMPRESSIBLE.numel())
    assert store.files["step/model.safetensors"] == COMPRESSIBLE.numpy().tobytes()


def test_a_file_is_read_into_memory_that_is_there() -> None:
    store = MemoryStore()
    entry = files.write(store, "step", image_of(some_bytes(1000)))
    room = torch.zeros(1200, dtype=torch.uint8)
    back = files.read(store, "step", entry, room[100:1100])
    assert back.data_ptr() == room.data_ptr() + 100
    assert room[100:1100].equal(some_bytes(1000))


def shorter(stored: bytes) -> bytes:
    return stored[:-4096]


def longer(stored: bytes) -> bytes:
    return stored + b"\0"


def flipped(at: int) -> Callable[[bytes], bytes]:
    def change(stored: bytes) -> bytes:
        changed = bytearray(stored)
        changed[at] ^= 1
        return bytes(changed)

    return change


@COMPRESSION
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shorter, ": 4096 bytes are missing"),
        (lambda stored: stored[:-1], ": 1 byte is missing"),
        (lambda stored: b"", r": \d+ bytes are missing"),
        (longer, r": is longer than the \d+ bytes that the manifest says"),
        (flipped(0), ": its bytes do not have the hash"),
        (flipped(10_000), ": its bytes do not have the hash"),
        (flipped(-1), ": its bytes do not have the hash"),
    ],
)
def test_damage_is_noticed_and_named(
    compression: str, change: Callable[[bytes], bytes], message: str
) -> None:
    store = MemoryStore()
    raw = torch.cat([COMPRESSIBLE, some_bytes(9_000_000)])  # several blocks, compressed or not
    entry = files.write(store, "step", image_of(raw), compression)
    path = f"step/{entry.name}"
    store.files[path] = change(store.files[path])
    with pytest.raises(CheckpointError, match=entry.name + message):
        files.read(store, "step", entry)


@COMPRESSION
def test_a_missing_file_is_named(compression: str) -> None:
    store = MemoryStore()
    entry = files.write(store, "step", image_of(some_bytes(10)), compression)
    with pytest.raises(CheckpointError, match=f"{entry.name}: is missing"):
        files.read(store, "other", entry)


def test_other_errors_of_the_store_are_passed_on() -> None:
    class Broken(MemoryStore):
        def read(self, path: str) -> Any:
            raise PermissionError(path)

    entry = files.write(Broken(), "step", image_of(some_bytes(10)))
    with pytest.raises(PermissionError):
        files.read(Broken(), "step", entry)


def compressed(raw: bytes, **options: Any) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(raw)


def claiming(size_bytes: int) -> bytes:
    """A frame that says that it is as long as this, and holds one byte."""
    head = (0xFD2FB528).to_bytes(4, "little") + b"\xc0\x38" + size_bytes.to_bytes(8, "little")
    assert zstandard.get_frame_parameters(head).content_size == size_bytes
    return head + b"\x09\0\0x"  # the last block, raw, of one byte


@pytest.mark.parametrize(
    "stored",
    [
        b"no zstd at all",
        b"(",
        compressed(b"x" * 100, write_content_size=False),
        claiming(2**60),
        claiming(10**6),
        claiming(0),
        compressed(bytes(50_000))[:-3],
        compressed(b"x" * 100) + compressed(b"y" * 100),
    ],
    ids=["no zstd", "short", "no size", "absurd", "too long", "empty", "cut", "two frames"],
)
def test_a_strangers_compressed_file_is_refused(stored: bytes) -> None:
    store = MemoryStore()
    store.files["step/state.bin.zst"] = stored
    entry = FileEntry(
        name="state.bin.zst", size_bytes=len(stored), digest=xxhash.xxh3_128_hexdigest(stored), kind="state"
    )
    with pytest.raises(CheckpointError, match=r"state\.bin\.zst: cannot be decompressed"):
        files.read(store, "step", entry)


def test_a_frame_that_says_the_truth_is_read() -> None:
    store = MemoryStore()
    stored = claiming(1)
    store.files["step/state.bin.zst"] = stored
    entry = FileEntry(
        name="state.bin.zst", size_bytes=len(stored), digest=xxhash.xxh3_128_hexdigest(stored), kind="state"
    )
    assert files.read(store, "step", entry).numpy().tobytes() == b"x"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    entry = files.write(store, "step", image_of(some_bytes(10)), "zstd")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    for attempt in (
        lambda: files.check_compression("zstd"),
        lambda: files.write(store, "step", image_of(some_bytes(10)), "zstd"),
        lambda: files.read(store, "step", entry),
    ):
        with pytest.raises(CheckpointError, match=r"pip install 'ringps\[zstd\]'"):
            attempt()
    files.check_compression("")


def test_an_unknown_compression_is_refused() -> None:
    with pytest.raises(ValueError, match="compression must be"):
        files.check_compression("gzip")


# All the way.


@COMPRESSION
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_state_goes_to_a_directory_and_comes_back(
    tmp_path: Path, compression: str, world_size: int
) -> None:
    model = {f"layer{number}.weight": torch.randn(500, 500) for number in range(8)}
    state = {"step": 3, "model": model, "optimizer": {"exp_avg": [torch.randn(500, 500) for _ in range(8)]}}
    store, entries = LocalStore(tmp_path), []
    for rank in range(world_size):
        arena = Arena()
        images = take(arena, compose(state, {"rank": rank}, rank, world_size).sources)
        entries += [files.write(store, "step", image, compression) for image in images]
        del images
        arena.release()
    found = files.read_all(store, "step", entries)
    assert list(found) == [entry.name for entry in entries]
    contents = assemble(found)
    assert_same(contents.state["optimizer"], state["optimizer"])
    assert_same(dict(contents.state["model"]), model)
    assert contents.ranks == {rank: {"rank": rank} for rank in range(world_size)}


def test_slices_of_the_state_are_read_into_one_piece_of_memory() -> None:
    store = MemoryStore()
    images = [image_of(some_bytes(10 * number), f"state-0000{number}-of-00003.bin") for number in (1, 2, 3)]
    entries = [files.write(store, "step", image) for image in images]
    found = files.read_all(store, "step", entries[::-1])
    places = [found[entry.name].data_ptr() for entry in entries]
    assert places == [places[0], places[0] + 10, places[0] + 30]


def test_the_first_damaged_file_is_named() -> None:
    store = MemoryStore()
    entries = [files.write(store, "step", image_of(some_bytes(9), f"{name}.bin")) for name in "abc"]
    wrong = [dataclasses.replace(entry, digest="0" * 32) for entry in entries[1:]]
    with pytest.raises(CheckpointError, match=r"^b\.bin: its bytes"):
        files.read_all(store, "step", [entries[0], *wrong])
