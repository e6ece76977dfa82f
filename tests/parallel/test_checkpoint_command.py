"""`ringps checkpoints`: what a user sees of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from tests.launching import run
from tests.object_store import new_bucket, object_store
from tests.saved import begin, save_bytes, save_state

NEWEST = "step-00000030.1"
HEAD = "STEP  RUN  SAVED (UTC)          RANKS  FILES       SIZE  STATUS"


@pytest.fixture
def where(tmp_path: Path) -> Path:
    """A directory with the steps 10, 20 and 30 of run 1."""
    directory = begin(tmp_path / "ckpt")
    for step in (10, 20, 30):
        save_bytes(directory, step)
    return tmp_path / "ckpt"


def test_ls_prints_a_table(where: Path) -> None:
    done = run("checkpoints", "ls", where)
    row = "  {}    1  2025-01-31 12:00:00      2      6  208.0 KiB  {}"
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines() == [
        HEAD,
        row.format(30, "whole; a restore takes this one"),
        row.format(20, "whole"),
        row.format(10, "whole"),
    ]


def test_ls_says_what_is_of_no_use(where: Path) -> None:
    save_bytes(begin(where, 2, (1, 20)), 25, run=2)
    (where / "step-00000025.2" / "state.bin").unlink()
    (where / "step-00000025.2" / "rank-00000-of-00002.bin").unlink()
    (where / "step-00000010.1" / "manifest.json").write_text("")
    (where / ".aside-step-00000040.1.3").mkdir()
    done = run("checkpoints", "ls", where)
    assert done.code == 0
    _head, *rows = done.out.splitlines()
    assert [row.split()[:2] for row in rows[:4]] == [["25", "2"], ["30", "1"], ["20", "1"], ["10", "1"]]
    assert rows[0].endswith("  damaged: state.bin: is missing (and 1 more)")
    assert rows[1].endswith("  whole; not in the history: run 2 went on from step 20")
    assert rows[2].endswith("  whole; a restore takes this one")
    assert rows[3].split()[2:] == ["?", "?", "?", "?", "damaged:", "manifest.json:", "it", "is", "empty"]
    assert rows[4:] == [
        "no checkpoint: .aside-step-00000040.1.3: run 1 is writing it, or has left it unfinished"
    ]


def test_ls_prints_json(where: Path) -> None:
    (where / "step-00000010.1" / "manifest.json").write_text("")
    done = run("checkpoints", "ls", "--json", where)
    found = json.loads(done.out)
    assert done.code == 0
    assert (found["where"], found["restored"], found["leftovers"]) == (str(where), NEWEST, [])
    first, _, last = found["checkpoints"]
    assert first == {
        "name": NEWEST,
        "step": 30,
        "run": 1,
        "generation": 1,
        "world_size": 2,
        "saved_at": "2025-01-31T12:00:00Z",
        "size_bytes": first["size_bytes"],
        "files": 6,
        "torch": "2.6.0",
        "ringps": "0.1.0",
        "whole": True,
        "damage": [],
        "left_out": "",
        "extra_files": [],
    }
    assert last["damage"] == [{"file": "manifest.json", "reason": "it is empty"}]
    assert (last["whole"], last["saved_at"], last["files"]) == (False, None, None)


def test_verify_is_content_with_whole_ones(where: Path) -> None:
    done = run("checkpoints", "verify", where)
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines() == [
        "3 of 3 checkpoints are whole (624.0 KiB)",
        f"a restore takes {NEWEST}",
    ]
    done = run("checkpoints", "verify", where, "--step", "20")
    assert (done.code, done.out) == (0, "1 of 1 checkpoints are whole (208.0 KiB)\n")


def test_verify_prints_a_line_for_each_damaged_file(where: Path) -> None:
    raw = bytearray((where / NEWEST / "state.bin").read_bytes())
    raw[100] ^= 1
    (where / NEWEST / "state.bin").write_bytes(raw)
    os.truncate(where / NEWEST / "rank-00001-of-00002.bin", 1)
    (where / "step-00000020.1" / "no\nte").touch()
    size = len((where / NEWEST / "rank-00000-of-00002.bin").read_bytes())
    done = run("checkpoints", "verify", where)
    assert (done.code, done.err) == (1, "")
    assert done.out.splitlines() == [
        f"damaged: {NEWEST}: state.bin: its bytes do not have the hash that the manifest says",
        f"damaged: {NEWEST}: rank-00001-of-00002.bin: {size - 1} of its {size} bytes are missing",
        "note: step-00000020.1: 'no\\nte' is not in its manifest",
        "2 of 3 checkpoints are whole (416.0 KiB)",
        "a restore takes step-00000020.1",
    ]
    found = run("checkpoints", "verify", "--json", where)
    assert found.code == 1
    assert json.loads(found.out)["restored"] == "step-00000020.1"


def test_verify_says_when_nothing_is_left(where: Path) -> None:
    for step in (10, 20, 30):
        (where / f"step-{step:08}.1" / "state.bin").unlink()
    done = run("checkpoints", "verify", where)
    assert done.code == 1
    assert done.out.splitlines()[-2:] == [
        "0 of 3 checkpoints are whole (0 B)",
        "a restore finds no checkpoint to take",
    ]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("ls", "{}/none"), "ringps: there is no checkpoint in {}/none"),
        (("verify", "{}/none"), "ringps: there is no checkpoint in {}/none"),
        (("export", "{}/none", "{}/out"), "ringps: there is no checkpoint in {}/none"),
        (
            ("verify", "{}/ckpt", "--step", "15"),
            "ringps: there is no checkpoint of step 15 in {}/ckpt; the newest is of step 30",
        ),
        (("ls", "nosuch://x/y"), None),
        (("export", "{}/ckpt", "{}/ckpt"), "ringps: {}/ckpt exists already; --force replaces it"),
        (
            ("export", "{}/ckpt", "{}/ckpt", "--force"),
            "ringps: {}/ckpt is a directory that was not exported; it is not replaced",
        ),
    ],
)
def test_what_cannot_be_done_is_one_line(
    where: Path, tmp_path: Path, arguments: tuple[str, ...], line: str | None
) -> None:
    done = run("checkpoints", *(argument.replace("{}", str(tmp_path)) for argument in arguments))
    assert (done.code, done.out) == (1, "")
    assert done.err.count("\n") == 1
    if line is not None:
        assert done.err == line.replace("{}", str(tmp_path)) + "\n"


@pytest.mark.parametrize(
    "arguments",
    [(), ("ls",), ("verify", "x", "--step", "last"), ("verify", "x", "--step", "-1"), ("export", "x")],
)
def test_a_wrong_command_line_is_a_usage_error(arguments: tuple[str, ...]) -> None:
    done = run("checkpoints", *arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.count("\n") == 1


def test_export_writes_what_torch_loads(tmp_path: Path) -> None:
    directory = begin(tmp_path / "ckpt")
    for step in (10, 20):
        model = {"weight": torch.full((3,), float(step))}
        save_state(directory, {"step": step, "model": model, "optimizer": {}})
    (tmp_path / "ckpt" / "step-00000020.1" / "state.bin").unlink()
    done = run("checkpoints", "export", tmp_path / "ckpt", tmp_path / "out.pt")
    assert (done.code, done.out) == (0, f"step 10 of run 1 is exported to {tmp_path}/out.pt\n")
    assert done.err == "ringps: step-00000020.1 is damaged: state.bin: is missing\n"
    state = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.equal(state["model"]["weight"], torch.full((3,), 10.0))


def test_a_url_of_an_object_store(tmp_path: Path) -> None:
    with object_store():
        url = new_bucket()
        directory = begin(url)
        save_state(directory, {"step": 10, "model": {"weight": torch.ones(3)}, "optimizer": {}})
        directory.store.write("step-00000020.1/state.bin", [b"not all that there is"])
        listed = run("checkpoints", "ls", url)
        verified = run("checkpoints", "verify", url)
        exported = run("checkpoints", "export", url, tmp_path / "out", "--step", "10", "--format", "dcp")
    assert (listed.code, listed.err) == (0, "")
    assert listed.out.splitlines()[1].endswith("whole; a restore takes this one")
    assert listed.out.splitlines()[2] == (
        "no checkpoint: step-00000020.1: it has no manifest.json: half written or half deleted"
    )
    assert (verified.code, verified.out.splitlines()[-1]) == (0, "a restore takes step-00000010.1")
    assert (exported.code, exported.err) == (0, "")
    assert (tmp_path / "out" / ".metadata").exists()
