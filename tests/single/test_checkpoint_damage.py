"""Whatever happens to checkpoints: the newest that is whole is restored, or it is said why not."""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import ringps
from ringps.checkpoint.directory import Directory
from ringps.checkpoint.store import open_store
from ringps.collectives import current
from ringps.optim.restoring import Restored, restore
from tests.checkpoint_job import Script, Whole, digest_of, seed_all, whole

STEPS = (2, 4, 6)


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with checkpoints of these steps."""
    directory = tmp_path_factory.mktemp("intact")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ringps.init()
    seed_all(1)
    script = Script()
    for step in STEPS:  # the last step of a loop is saved for sure
        with ringps.Checkpointer(directory, script.state) as ckpt:
            for _, (inputs, _) in ckpt.steps(script.loader, until=step):
                script.train(inputs)
    assert [one.step for one in whole(directory)] == [*STEPS]
    yield directory
    ringps.shutdown()
    torch.set_num_threads(threads)


@pytest.fixture
def directory(intact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to be damaged."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # the machine will not crash
    return copied(intact, tmp_path / "ckpt")


def copied(intact: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(intact, to))


def restored(directory: Path) -> Restored:
    """Restore, and forget about it: the next restoration is not of a run that went on from this one."""
    found = restore(current(), [Directory(open_store(directory))])
    (directory / "runs" / f"run-{found.run:07}.json").unlink()
    return found


def check(directory: Path, damaged: str, why: str = "") -> None:
    """What is restored is the newest that is whole, as its files alone tell; newer ones are named."""
    left = whole(directory)
    found = restored(directory)
    expect(found, left[-1])
    newer = [step for step in STEPS if step > left[-1].step]
    assert [int(re.findall(r"step-(\d+)", words)[0]) for words in found.skipped] == newer[::-1], damaged
    for words in found.skipped:
        assert re.fullmatch(r"step-0000000\d\.\d: .*\w.*", words), words
        assert why in words, (damaged, words)


def expect(found: Restored, one: Whole) -> None:
    assert found.manifest is not None and found.contents is not None
    assert (found.manifest.step, found.manifest.run) == (one.step, one.run)
    assert found.contents.state["step"] == one.step
    assert digest_of(found.contents.state["model"]) == digest_of(one.weights)
    assert found.where == str(one.path)


def names(directory: Path) -> list[str]:
    found = sorted(path.name for path in newest(directory).iterdir())
    assert found == ["manifest.json", "model.safetensors", "rank-00000-of-00001.bin", "state.bin"]
    return found


def newest(directory: Path) -> Path:
    return max(directory.glob("step-*"))


def test_nothing_is_wrong_with_the_newest(directory: Path) -> None:
    found = restored(directory)
    expect(found, whole(directory)[-1])
    assert found.skipped == ()
    assert found.run == len(STEPS) + 1


def test_files_that_are_cut_off(directory: Path, intact: Path) -> None:
    for name in names(intact):
        size = (newest(intact) / name).stat().st_size
        for length in sorted({0, 1, 7, 8, size // 3, size // 2, size - 4096, size - 1}):
            if 0 <= length < size:
                os.truncate(newest(directory) / name, length)
                bare = name == "manifest.json"
                check(directory, f"{name} of {length} bytes", "manifest.json: it" if bare else name)
                shutil.copy(newest(intact) / name, newest(directory) / name)


def test_files_that_are_longer(directory: Path, intact: Path) -> None:
    for name in names(intact):
        with open(newest(directory) / name, "ab") as file:
            file.write(b"\n")
        check(directory, name, name)
        shutil.copy(newest(intact) / name, newest(directory) / name)


def test_single_bits_that_have_changed(directory: Path, intact: Path) -> None:
    draw = random.Random(5)
    for name in names(intact):
        content = (newest(intact) / name).read_bytes()
        for place in [0, len(content) - 1, *(draw.randrange(len(content)) for _ in range(25))]:
            bit = 1 << draw.randrange(8)
            flipped = content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]
            (newest(directory) / name).write_bytes(flipped)
            assert whole(directory)[-1].step == STEPS[-2]
            check(directory, f"bit {bit} of byte {place} of {name}", name)
        (newest(directory) / name).write_bytes(content)


def test_files_that_are_missing_or_something_else(directory: Path, intact: Path) -> None:
    elsewhere = directory / f"step-{STEPS[1]:08}.2"

    def missing(path: Path) -> None:
        path.unlink()

    def swapped(path: Path) -> None:
        shutil.copy(elsewhere / path.name, path)

    def a_directory(path: Path) -> None:
        path.unlink()
        path.mkdir()

    def a_loop(path: Path) -> None:
        path.unlink()
        path.symlink_to(path)

    def all_zero(path: Path) -> None:
        path.write_bytes(bytes(path.stat().st_size))

    for name in names(intact):
        for damage in (missing, swapped, a_directory, a_loop, all_zero):
            damage(newest(directory) / name)
            if damage is missing and name == "manifest.json":
                # It was never finished, or is half removed: no checkpoint at all.
                found = restored(directory)
                expect(found, whole(directory)[-1])
                assert found.skipped == ()
            else:
                check(directory, f"{name}: {damage.__name__}", name)
            shutil.rmtree(newest(directory))
            shutil.copytree(newest(intact), directory / newest(intact).name)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda raw: raw.replace(b'"format": 1', b'"format": 2'), "it was altered, or is damaged"),
        (lambda raw: raw[: len(raw) // 2], "it is not JSON: it was cut off, or is damaged"),
        (lambda raw: b"[]", "it is not a JSON object"),
        (lambda raw: b"{" * 100_000, "it is not JSON"),
        (lambda raw: b"\xff\xfe" + raw, "it is not JSON"),
        (lambda raw: raw * 2, "it is not JSON"),
    ],
)
def test_manifests_that_say_nothing(directory: Path, change: Callable[[bytes], bytes], why: str) -> None:
    path = newest(directory) / "manifest.json"
    path.write_bytes(change(path.read_bytes()))
    check(directory, "manifest", why)


def test_a_manifest_of_a_newer_format(directory: Path) -> None:
    path = newest(directory) / "manifest.json"
    body = path.read_bytes().rpartition(b',\n  "hash": ')[0].replace(b'"format": 1', b'"format": 2')
    ending = hashlib.blake2b(body, digest_size=16).hexdigest()
    path.write_bytes(body + b',\n  "hash": "%s"\n}\n' % ending.encode())
    found = restored(directory)
    assert found.manifest is not None and found.manifest.step == STEPS[-2]
    assert "format 2, written by a newer ringps; this one reads 1" in found.skipped[0]


def test_a_checkpoint_under_another_name(directory: Path) -> None:
    os.rename(directory / "step-00000006.3", directory / "step-00000009.3")
    found = restored(directory)
    assert found.manifest is not None and found.manifest.step == STEPS[-2]
    assert found.skipped[0].startswith("step-00000009.3: ")
    assert "it is that of step 6 of run 3" in found.skipped[0]


def test_two_are_damaged(directory: Path) -> None:
    os.truncate(directory / "step-00000006.3" / "state.bin", 10)
    (directory / "step-00000004.2" / "model.safetensors").unlink()
    found = restored(directory)
    expect(found, whole(directory)[-1])
    assert len(found.skipped) == 2
    assert re.fullmatch(r"step-00000006\.3: state\.bin: \d+ bytes are missing", found.skipped[0])
    assert found.skipped[1] == "step-00000004.2: no rank can read model.safetensors any more"


def test_all_are_damaged(directory: Path) -> None:
    for path in directory.glob("step-*/state.bin"):
        os.truncate(path, 10)
    with pytest.raises(ringps.CheckpointError) as told:
        restored(directory)
    words = str(told.value)
    assert words.startswith(
        f"there are 3 checkpoints in {directory}, and none is whole: step-00000006.3: state.bin: "
    )
    assert words.endswith("Training does not begin anew by itself: move the directory away if it is to")
    assert all(f"step-0000000{step}.{step // 2}: state.bin: " in words for step in STEPS)
    with pytest.raises(ringps.CheckpointError, match="none is whole"):
        restored(directory)


def test_claims_that_are_damaged_or_lost(directory: Path, intact: Path) -> None:
    draw = random.Random(6)
    for _ in range(30):
        for path in (directory / "runs").glob("run-000000[123].json"):
            content = path.read_bytes()
            match draw.randrange(5):
                case 0:
                    path.unlink()
                case 1:
                    path.write_bytes(content[: draw.randrange(len(content))])
                case 2:
                    path.write_bytes(bytes(draw.randrange(256) for _ in range(40)))
                case 3:
                    path.write_bytes(content.replace(b"[", b"[7"))
        found = restored(directory)
        expect(found, whole(directory)[-1])
        assert found.skipped == ()
        assert found.run > 3
        copied(intact, directory)


def test_what_others_have_put_there_is_left_alone(directory: Path) -> None:
    strangers = [
        "notes.txt",
        "step-9.1",
        "step-00000099.1.bak",
        "runs/mine",
        ".aside-step-x",
        "step-00000008.0x",
    ]
    for name in strangers:
        (directory / name).mkdir()
    expect(restored(directory), whole(directory)[-1])
    assert all((directory / name).is_dir() for name in strangers)


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("step-00000088.9", "file", "Not a directory"),
        ("runs/run-0000077.json", "directory", "Is a directory"),
        ("runs", "file", "Not a directory"),
    ],
)
def test_names_that_cannot_be_what_they_say(directory: Path, name: str, kind: str, words: str) -> None:
    """Whether there is something newer cannot be known then."""
    path = directory / name
    shutil.rmtree(path, ignore_errors=True)
    if kind == "file":
        path.write_text("")
    else:
        path.mkdir()
    with pytest.raises(ringps.CheckpointError, match=f"cannot use {directory}: {words} .*{name}"):
        restored(directory)


def test_any_damage_to_any_of_them(directory: Path, intact: Path) -> None:
    """Many things at once, drawn by a seed."""
    draw = random.Random(7)
    restored_steps = set()
    for _ in range(60):
        for _ in range(draw.randint(1, 4)):
            path = draw.choice([path for path in sorted(directory.glob("step-*/*")) if path.is_file()])
            size = path.stat().st_size
            match draw.randrange(4):
                case 0:
                    os.truncate(path, draw.randrange(size) if size else 0)
                case 1:
                    path.unlink()
                case 2 if size:
                    content = bytearray(path.read_bytes())
                    content[draw.randrange(size)] ^= 1 << draw.randrange(8)
                    path.write_bytes(content)
                case _:
                    other = draw.choice(sorted(intact.glob(f"step-*/{path.name}")))
                    shutil.copy(other, path)
        left = whole(directory)
        if left:
            expect(restored(directory), left[-1])
        elif list(directory.glob("step-*/manifest.json")):
            with pytest.raises(ringps.CheckpointError, match="none is whole"):
                restored(directory)
        restored_steps.add(left[-1].step if left else None)
        copied(intact, directory)
    assert restored_steps >= {*STEPS}
