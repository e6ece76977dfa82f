"""Listing, verifying and exporting checkpoints, whatever has happened to them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import state_dict_loader

from ringps.checkpoint import inspection, portable
from ringps.checkpoint.directory import Directory
from ringps.checkpoint.inspection import Damage
from ringps.checkpoint.manifest import MANIFEST, Manifest
from ringps.errors import CheckpointError
from tests.same import assert_same
from tests.saved import KINDS, begin, save_bytes, save_state

NEWEST = "step-00000030.1"


@pytest.fixture
def where(tmp_path: Path) -> Path:
    """A directory with the steps 10, 20 and 30 of run 1."""
    directory = begin(tmp_path / "ckpt")
    for step in (10, 20, 30):
        save_bytes(directory, step)
    return tmp_path / "ckpt"


def test_importing_it_does_not_load_torch() -> None:
    program = "import sys, ringps.checkpoint.inspection; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=50).returncode == 0


def test_whole_ones_are_listed_newest_first(where: Path) -> None:
    for listing in (inspection.ls(where), inspection.verify(where)):
        assert [listed.step for listed in listing.checkpoints] == [30, 20, 10]
        assert all(listed.restorable for listed in listing.checkpoints)
        assert listing.damage == listing.leftovers == ()
        assert listing.where == str(where)
        newest = listing.checkpoints[0]
        assert listing.restored is newest
        assert newest.manifest is not None
        assert (newest.name, newest.run, newest.manifest.world_size) == (NEWEST, 1, 2)
        assert len(newest.manifest.files) == len(KINDS)


def test_one_step_is_verified_alone(where: Path) -> None:
    (where / NEWEST / "state.bin").unlink()
    listing = inspection.verify(where, 20)
    assert [listed.step for listed in listing.checkpoints] == [20]
    assert listing.damage == ()
    assert listing.restored is None  # others were not looked at
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 25 in .*; the newest is of step 30"):
        inspection.verify(where, 25)


@pytest.mark.parametrize("name", KINDS)
def test_every_flipped_bit_is_found_by_verifying(where: Path, name: str) -> None:
    path = where / NEWEST / name
    original = path.read_bytes()
    for position in (0, len(original) // 2, len(original) - 1):
        flipped = bytearray(original)
        flipped[position] ^= 0x10
        path.write_bytes(flipped)
        listing = inspection.verify(where)
        assert listing.damage == (
            Damage(NEWEST, name, "its bytes do not have the hash that the manifest says"),
        )
        assert listing.restored is not None
        assert listing.restored.step == 20
        assert inspection.ls(where).damage == ()  # looks at sizes only


@pytest.mark.parametrize("look", [inspection.ls, inspection.verify])
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: os.truncate(path, path.stat().st_size - 1), "1 of its {size} bytes are missing"),
        (lambda path: os.truncate(path, 0), "{size} of its {size} bytes are missing"),
        (lambda path: path.write_bytes(path.read_bytes() + b"xy"), "it has 2 bytes too many"),
        (lambda path: path.unlink(), "is missing"),
    ],
)
def test_files_of_another_size_are_found_by_both(
    where: Path,
    look: Callable[[Path], inspection.Listing],
    name: str,
    damage: Callable[[Path], object],
    reason: str,
) -> None:
    path = where / NEWEST / name
    size = path.stat().st_size
    damage(path)
    listing = look(where)
    assert listing.damage == (Damage(NEWEST, name, reason.format(size=size)),)
    assert listing.restored is not None
    assert listing.restored.step == 20


@pytest.mark.parametrize("look", [inspection.ls, inspection.verify])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda raw: b"", "it is empty"),
        (lambda raw: raw[:-20], "it is not JSON: it was cut off, or is damaged"),
        (lambda raw: b"\0" * len(raw), "it is not JSON: it was cut off, or is damaged"),
        (lambda raw: raw.replace(b'"run": 1', b'"run": 3'), "its bytes do not have the hash at its end"),
        (lambda raw: raw.replace(b"model-00001", b"model-00003"), "its bytes do not have the hash"),
        (
            lambda raw: replace(Manifest.decode(raw), step=31).encode(),
            "it is that of step 31 of run 1",
        ),
    ],
)
def test_a_wrong_manifest_is_found_by_both(
    where: Path, look: Callable[[Path], inspection.Listing], change: Callable[[bytes], bytes], reason: str
) -> None:
    path = where / NEWEST / MANIFEST
    path.write_bytes(change(path.read_bytes()))
    listing = look(where)
    (damage,) = listing.damage
    assert damage[:2] == (NEWEST, MANIFEST)
    assert damage.reason.startswith(reason)
    assert listing.checkpoints[0].manifest is None
    assert listing.restored is not None
    assert listing.restored.step == 20


def test_a_manifest_of_a_newer_format_is_found(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = where / NEWEST / MANIFEST
    manifest = Manifest.decode(path.read_bytes())
    with monkeypatch.context() as newer:
        newer.setattr("ringps.checkpoint.manifest.FORMAT", 2)
        path.write_bytes(replace(manifest, format=2).encode())
    (damage,) = inspection.verify(where).damage
    assert damage.reason == "it has format 2, written by a newer ringps; this one reads 1"


def test_all_damage_is_found(where: Path) -> None:
    (where / NEWEST / "state.bin").unlink()
    os.truncate(where / NEWEST / "rank-00001-of-00002.bin", 5)
    (where / "step-00000010.1" / MANIFEST).write_bytes(b"{}")
    listing = inspection.verify(where)
    assert [damage[:2] for damage in listing.damage] == [
        (NEWEST, "state.bin"),
        (NEWEST, "rank-00001-of-00002.bin"),
        ("step-00000010.1", MANIFEST),
    ]


def test_a_directory_in_the_place_of_a_file_is_damage(where: Path) -> None:
    (where / NEWEST / "state.bin").unlink()
    (where / NEWEST / "state.bin").mkdir()
    (damage,) = inspection.verify(where).damage
    assert damage.reason.startswith("cannot be read: ")


def test_extra_files_are_no_damage(where: Path) -> None:
    (where / NEWEST / "notes.txt").write_text("mine")
    listing = inspection.verify(where)
    assert listing.damage == ()
    assert [listed.extra_files for listed in listing.checkpoints] == [("notes.txt",), (), ()]


def test_what_is_unfinished_is_no_checkpoint(where: Path) -> None:
    shutil.copytree(where / NEWEST, where / ".aside-step-00000040.1.3")
    (where / NEWEST / MANIFEST).unlink()
    (where / "step-99").mkdir()
    listing = inspection.verify(where)
    assert [listed.step for listed in listing.checkpoints] == [20, 10]
    assert [leftover.name for leftover in listing.leftovers] == [".aside-step-00000040.1.3", NEWEST]
    assert listing.damage == ()


def test_those_outside_of_the_history_say_why(where: Path) -> None:
    directory = begin(where, 2, (1, 20))
    save_bytes(directory, 25, run=2)
    listing = inspection.ls(where)
    left_out = {listed.name: listed.left_out for listed in listing.checkpoints if listed.left_out}
    assert left_out == {NEWEST: "run 2 went on from step 20"}
    assert listing.restored is not None
    assert listing.restored.name == "step-00000025.2"


def test_one_that_is_deleted_meanwhile_is_not_damaged(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_manifest = Directory.read_manifest

    def delete_and_read(directory: Directory, entry: str) -> Any:
        if entry == "step-00000010.1":
            directory.store.remove(entry)
        return read_manifest(directory, entry)

    monkeypatch.setattr(Directory, "read_manifest", delete_and_read)
    listing = inspection.verify(where)
    assert [listed.step for listed in listing.checkpoints] == [30, 20]
    assert listing.damage == ()


def test_where_nothing_is_that_is_said(tmp_path: Path) -> None:
    for look in (inspection.ls, inspection.verify, lambda where: inspection.export(where, tmp_path / "out")):
        with pytest.raises(CheckpointError, match=f"^there is no checkpoint in {tmp_path}/none$"):
            look(tmp_path / "none")
    (tmp_path / "none" / ".aside-step-00000040.1.3").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*, but 1 unfinished$"):
        inspection.ls(tmp_path / "none")


def test_looking_changes_nothing(where: Path) -> None:
    def everything() -> dict[str, Any]:
        paths = sorted(where.rglob("*"))
        return {str(path): path.read_bytes() if path.is_file() else None for path in paths}

    before = everything()
    inspection.ls(where)
    inspection.verify(where)
    assert everything() == before


# Exporting.


def training_state(step: int) -> dict[str, Any]:
    torch.manual_seed(step)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    return {
        "step": step,
        "model": dict(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "sampler": {"epoch": 1, "owed": [[1, 2, 3]]},
        "member": {"layout": [["weight", "float32"]]},
    }


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A directory with real training states of steps 10 and 20 of run 1."""
    directory = begin(tmp_path / "ckpt")
    for step in (10, 20):
        save_state(directory, training_state(step))
    return tmp_path / "ckpt"


def expected(step: int) -> dict[str, Any]:
    state = training_state(step)
    del state["member"]
    return state


def loaded(out: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(out, weights_only=True)
    return {**state, "model": dict(state["model"])}


def test_the_newest_is_exported_for_torch(trained: Path, tmp_path: Path) -> None:
    exported = inspection.export(trained, tmp_path / "out.pt")
    assert exported == ((20, 1), [])
    assert_same(loaded(tmp_path / "out.pt"), expected(20))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "out.pt"]


def test_an_exported_model_and_optimizer_can_be_loaded(trained: Path, tmp_path: Path) -> None:
    inspection.export(trained, tmp_path / "out.pt")
    state = loaded(tmp_path / "out.pt")
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    assert_same(optimizer.state_dict()["state"], training_state(20)["optimizer"]["state"])


def test_the_file_is_not_larger_than_what_is_in_it(tmp_path: Path) -> None:
    """Tensors that were read from one file share its memory; torch would save all of that for each."""
    directory = begin(tmp_path / "ckpt")
    weights = {str(number): torch.randn(1000) for number in range(50)}
    save_state(directory, {"step": 1, "model": weights, "optimizer": {}})
    inspection.export(tmp_path / "ckpt", tmp_path / "out.pt")
    assert (tmp_path / "out.pt").stat().st_size < 2 * 50 * 4000


def test_a_step_is_exported_when_asked_for(trained: Path, tmp_path: Path) -> None:
    assert inspection.export(trained, tmp_path / "out.pt", step=10).checkpoint.step == 10
    assert_same(loaded(tmp_path / "out.pt"), expected(10))
    with pytest.raises(CheckpointError, match="no checkpoint of step 15"):
        inspection.export(trained, tmp_path / "other.pt", step=15)


def test_compressed_ones_are_exported(tmp_path: Path) -> None:
    save_state(begin(tmp_path / "ckpt"), training_state(10), compression="zstd")
    inspection.export(tmp_path / "ckpt", tmp_path / "out.pt")
    assert_same(loaded(tmp_path / "out.pt"), expected(10))


def test_damaged_ones_are_passed_over_and_named(trained: Path, tmp_path: Path) -> None:
    path = trained / "step-00000020.1" / "state.bin"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    exported = inspection.export(trained, tmp_path / "out.pt")
    assert exported.checkpoint.step == 10
    (passed_over,) = exported.passed_over
    assert passed_over.startswith("step-00000020.1 is damaged: state.bin: ")
    with pytest.raises(CheckpointError, match=r"no whole checkpoint in .*: step-00000020.1 is damaged"):
        inspection.export(trained, tmp_path / "other.pt", step=20)
    assert not (tmp_path / "other.pt").exists()


def test_one_outside_of_the_history_is_exported_only_when_asked_for(trained: Path, tmp_path: Path) -> None:
    begin(trained, 2, (1, 10))
    assert inspection.export(trained, tmp_path / "newest.pt").checkpoint.step == 10
    assert inspection.export(trained, tmp_path / "20.pt", step=20).checkpoint.step == 20


def test_where_all_are_outside_of_the_history_that_is_said(trained: Path, tmp_path: Path) -> None:
    begin(trained, 2, None)
    with pytest.raises(CheckpointError, match=r"none of the checkpoints in .*; --step 20 names one"):
        inspection.export(trained, tmp_path / "out.pt")


def test_a_target_that_exists_is_refused(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.pt"
    out.write_text("precious")
    with pytest.raises(FileExistsError, match=r"out.pt exists already; --force replaces it"):
        inspection.export(trained, out)
    assert out.read_text() == "precious"
    inspection.export(trained, out, force=True)
    assert loaded(out)["step"] == 20
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        inspection.export(trained, tmp_path / "no" / "where.pt")


@pytest.mark.parametrize("format", inspection.FORMATS)
def test_a_directory_that_was_not_exported_is_never_replaced(
    trained: Path, tmp_path: Path, format: str
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="a directory that was not exported"):
        inspection.export(trained, tmp_path / "home", format=format, force=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize("before", inspection.FORMATS)
@pytest.mark.parametrize("after", inspection.FORMATS)
def test_an_export_replaces_an_export(trained: Path, tmp_path: Path, before: str, after: str) -> None:
    out = tmp_path / "out"
    inspection.export(trained, out, format=before, step=10)
    inspection.export(trained, out, format=after, step=20, force=True)
    assert out.is_dir() == (after == "dcp")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "out"]


def test_an_export_that_fails_leaves_what_was_there(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.pt"
    out.write_text("precious")

    def fail(state: object, file: Any) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(portable.torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        inspection.export(trained, out, force=True)
    assert out.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "out.pt"]


def test_other_formats_are_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format must be one of torch, dcp, not 'onnx'"):
        inspection.export(trained, tmp_path / "out", format="onnx")


def test_distributed_checkpoints_are_loaded_by_torch(trained: Path, tmp_path: Path) -> None:
    inspection.export(trained, tmp_path / "out", format="dcp")
    truth = expected(20)
    model = {name: torch.zeros_like(tensor) for name, tensor in truth["model"].items()}
    zeros = {
        number: {name: torch.zeros_like(tensor) for name, tensor in of.items()}
        for number, of in truth["optimizer"]["state"].items()
    }
    groups = [{**group, "lr": 0.0} for group in truth["optimizer"]["param_groups"]]
    template = {"model": model, "optimizer": {"state": zeros, "param_groups": groups}, "step": 0}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        state_dict_loader.load(template, checkpoint_id=tmp_path / "out")
    assert_same(template, {name: truth[name] for name in template})


def test_everything_that_can_be_saved_can_be_exported(tmp_path: Path) -> None:
    everything = {
        "none": None,
        "whole": [0, -1, 2**63, -(2**200)],
        "float": [0.5, float("inf")],
        "text": "ä\ud800",
        "bytes": b"\0\xff",
        "tuple": (1, (2, [3])),
        "ordered": OrderedDict(a=1, b=torch.ones(2)),
        "counter": Counter("aab"),
        "dtype": torch.bfloat16,
        "size": torch.Size([2, 3]),
        "device": torch.device("cpu"),
        "tensors": [torch.ones(2, dtype=torch.bfloat16), torch.empty(0, 3), torch.tensor(True)],
        7: "a whole number as a key",
    }
    module = torch.nn.BatchNorm1d(2).state_dict()  # with the versions of its layers
    save_state(
        begin(tmp_path / "ckpt"),
        {"step": 1, "model": {}, "optimizer": {}, "others": everything, "module": module},
    )
    inspection.export(tmp_path / "ckpt", tmp_path / "out.pt")
    state = loaded(tmp_path / "out.pt")
    assert_same(state["others"], everything)
    assert state["module"]._metadata == module._metadata  # type: ignore[attr-defined]


def test_numpy_is_exported_as_torch_and_python(tmp_path: Path) -> None:
    values = {
        "float": np.float32(0.5),
        "bool": np.bool_(True),
        "whole": np.uint64(2**63),
        "complex": np.complex64(1 + 2j),
        "array": np.arange(6, dtype=np.int16).reshape(2, 3),
        "swapped": np.arange(3, dtype=">f8"),
        "time": np.datetime64("2025-01-31", "D"),
        "times": np.array([1, 2], dtype="m8[s]"),
        "read-only": np.broadcast_to(np.float32(1), (2, 2)),
    }
    save_state(begin(tmp_path / "ckpt"), {"step": 1, "model": {}, "optimizer": {}, "numpy": values})
    inspection.export(tmp_path / "ckpt", tmp_path / "out.pt")
    assert_same(
        loaded(tmp_path / "out.pt")["numpy"],
        {
            "float": 0.5,
            "bool": True,
            "whole": 2**63,
            "complex": torch.tensor(1 + 2j),
            "array": torch.arange(6, dtype=torch.int16).reshape(2, 3),
            "swapped": torch.arange(3, dtype=torch.float64),
            "time": 20119,
            "times": torch.tensor([1, 2]),
            "read-only": torch.ones(2, 2),
        },
    )


def test_numbers_that_torch_lacks_are_refused_by_name(tmp_path: Path) -> None:
    values = {"deep": [np.longdouble(1)]}
    save_state(begin(tmp_path / "ckpt"), {"step": 1, "model": {}, "optimizer": {}, "numpy": values})
    with pytest.raises(CheckpointError, match=r"numpy\['deep'\]\[0\] is of numpy's float128") as caught:
        inspection.export(tmp_path / "ckpt", tmp_path / "out.pt")
    assert "damaged" not in str(caught.value)
