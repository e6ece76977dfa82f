"""Manifests and the names of entries, asides and claims."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringps.checkpoint import manifest as names
from ringps.checkpoint.manifest import Aside, Entry, FileEntry, Manifest
from tests.conftest import Golden

FILES = (
    FileEntry(name="model.safetensors", size_bytes=4096, digest="0123456789abcdef" * 2, kind="weights"),
    FileEntry(name="rank-00000-of-00001.bin.zst", size_bytes=0, digest="f" * 32, kind="rank"),
)
MANIFEST = Manifest(
    step=100,
    run=7,
    generation=3,
    world_size=4,
    torch="2.6.0+cu124",
    ringps="0.1.0",
    saved_at="2025-01-31T12:00:00Z",
    compression="zstd",
    files=FILES,
)


def sealed(members: dict[str, Any]) -> bytes:
    """Any members with the hash that belongs to them."""
    body = json.dumps(members, indent=2).encode().removesuffix(b"\n}")
    digest = hashlib.blake2b(body, digest_size=16).hexdigest()
    return body + f',\n  "hash": "{digest}"\n}}\n'.encode()


def members(**changed: Any) -> dict[str, Any]:
    found = json.loads(MANIFEST.encode())
    del found["hash"]
    return {**found, **changed}


def with_file(**changed: Any) -> bytes:
    return sealed(members(files=[{**members()["files"][0], **changed}]))


def test_what_is_encoded_is_decoded(golden: Golden) -> None:
    raw = MANIFEST.encode()
    assert Manifest.decode(raw) == MANIFEST
    assert MANIFEST.size_bytes == 4096
    golden("manifest.json", raw)


def test_the_hash_is_the_last_member_and_covers_the_rest() -> None:
    raw = MANIFEST.encode()
    assert list(json.loads(raw))[-1] == "hash"
    assert sealed(members()) == raw


def test_every_flipped_bit_is_noticed() -> None:
    raw = MANIFEST.encode()
    for position in range(len(raw)):
        for bit in range(8):
            flipped = bytearray(raw)
            flipped[position] ^= 1 << bit
            with pytest.raises(ValueError):
                Manifest.decode(bytes(flipped))


def test_every_cut_is_noticed() -> None:
    raw = MANIFEST.encode()
    for length in range(len(raw)):
        with pytest.raises(ValueError):
            Manifest.decode(raw[:length])


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "it is empty"),
        (b"\0" * 100, "it is not JSON"),
        (b"[" * 100_000, "it is not JSON"),
        (b"[1]", "not a JSON object"),
        (b"{}", "altered"),
        (MANIFEST.encode().replace(b"100", b"101"), "altered, or is damaged"),
        (MANIFEST.encode() + b"\n", "altered"),
        (b" " * (names.MAX_MANIFEST_BYTES + 1), "longer than"),
        (sealed({"step": 1}), "format None"),
        (sealed(members(format=True)), "format True"),
        (sealed(members(format=0)), "format 0, which does not exist"),
        (sealed({"format": 2}), "format 2, written by a newer ringps; this one reads 1"),
        (sealed({"format": 1}), "it lacks the member step"),
        (sealed(members(more=1)), "unknown member more"),
        (sealed(members(step=-1)), "step -1"),
        (sealed(members(step=1.0)), "step 1.0"),
        (sealed(members(step=2**60)), "step"),
        (sealed(members(run=0)), "run 0"),
        (sealed(members(world_size=0)), "world_size 0"),
        (sealed(members(generation="1")), "generation '1'"),
        (sealed(members(torch=None)), "torch None is no version"),
        (sealed(members(ringps="a\nb")), "is no version"),
        (sealed(members(saved_at="yesterday")), "'yesterday' is no time"),
        (sealed(members(compression="lzma")), "'lzma' is unknown"),
        (sealed(members(compression=[])), "is unknown"),
        (sealed(members(files={})), "files are not a list"),
        (sealed(members(files=["a"])), "not an object"),
        (sealed(members(files=[members()["files"][0]] * 2)), "two files of the name model.safetensors"),
        (sealed(members(files=[{"name": "a"}])), "one of its files lacks the member size_bytes"),
        (with_file(more=1), "one of its files has the unknown member more"),
        (with_file(name="../model"), "no name for a file"),
        (with_file(name=".."), "no name for a file"),
        (with_file(name="a/b"), "no name for a file"),
        (with_file(name="a\\b"), "no name for a file"),
        (with_file(name=""), "no name for a file"),
        (with_file(name="manifest.json"), "no name for a file"),
        (with_file(name="a" * 200), "no name for a file"),
        (with_file(name=3), "no name for a file"),
        (with_file(size_bytes=-1), "size_bytes -1"),
        (with_file(size_bytes=2**60), "size_bytes"),
        (with_file(digest="F" * 32), "32 hex digits"),
        (with_file(digest="f" * 31), "32 hex digits"),
        (with_file(kind="other"), "kind 'other'"),
        (with_file(kind=[]), "kind"),
    ],
)
def test_what_is_not_exactly_right_is_refused_with_a_reason(raw: bytes, reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        Manifest.decode(raw)
    assert reason in str(caught.value)


def test_nothing_can_be_encoded_that_would_not_be_decoded() -> None:
    with pytest.raises(ValueError, match="this ringps writes 1"):
        replace(MANIFEST, format=2)
    with pytest.raises(ValueError, match="two files"):
        replace(MANIFEST, files=(FILES[0], FILES[0]))


@given(st.binary(max_size=300))
def test_no_bytes_crash_the_decoder(raw: bytes) -> None:
    with pytest.raises(ValueError):
        Manifest.decode(raw)


NUMBERS = st.integers(0, 10**12)


@given(NUMBERS, NUMBERS, NUMBERS)
def test_names_are_parsed_back(step: int, run: int, generation: int) -> None:
    assert names.parse_entry(names.entry_name(step, run)) == Entry(step, run)
    assert names.parse_aside(names.aside_name(step, run, generation)) == Aside(step, run, generation)
    assert names.parse_claim(names.claim_name(run)) == run


def test_names_sort_by_step_and_asides_are_hidden() -> None:
    assert names.entry_name(9, 1) < names.entry_name(10, 1) == "step-00000010.1"
    assert names.aside_name(100, 7, 3) == ".aside-step-00000100.7.3"
    assert names.claim_name(7) == "run-0000007.json"


@pytest.mark.parametrize(
    "name",
    [
        "step-00000100",
        "step-100.7",
        "step-000000100.7",
        "step-00000100.07",
        "step-00000100.7.3",
        "step-00000100.-7",
        "step-00000100.7 ",
        "step-0000010\u0660.7",
        ".aside-step-00000100.7",
        ".aside-step-100.7.3",
        ".aside-step-00000100.7.03",
        "run-7.json",
        "run-00000007.json",
        "run-0000007.json.part",
        "",
    ],
)
def test_other_names_are_nobodys(name: str) -> None:
    assert names.parse_entry(name) is None
    assert names.parse_aside(name) is None
    assert names.parse_claim(name) is None
