"""What all stores have in common, and what is particular to each."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from ringps import probe
from ringps.checkpoint import local_store, remote_store
from ringps.checkpoint.directory import Directory
from ringps.checkpoint.lineage import NOTHING, UNKNOWN, Point
from ringps.checkpoint.local_store import LocalStore
from ringps.checkpoint.manifest import Aside, Entry, FileEntry, Manifest
from ringps.checkpoint.remote_store import FsspecStore
from ringps.checkpoint.retention import Retention
from ringps.checkpoint.store import Store, open_store, place
from ringps.errors import CheckpointError
from tests.object_store import new_bucket, object_store, unfinished_uploads

KINDS = ("local", "memory", "file", "s3")
ENTRY, ASIDE = "step-00000100.7", ".aside-step-00000100.7.3"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with object_store() as address:
        yield address


@pytest.fixture
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Store]:
    """Opens the same store as another process would."""
    if request.param == "local":
        return lambda: open_store(tmp_path / "new" / "ckpt")
    if request.param == "memory":
        return lambda: open_store(f"memory://{tmp_path}/ckpt")
    if request.param == "file":
        root, url = f"{tmp_path}/new/ckpt", f"file://{tmp_path}/new/ckpt"
        return lambda: FsspecStore(fsspec.filesystem("file"), root, url, url, directories=True)
    request.getfixturevalue("server")
    url = new_bucket()
    return lambda: open_store(url)


@pytest.fixture
def store(reopen: Callable[[], Store]) -> Store:
    return reopen()


every_store = pytest.mark.parametrize("reopen", KINDS, indirect=True)
remote_stores = pytest.mark.parametrize("reopen", KINDS[1:], indirect=True)
local_only = pytest.mark.parametrize("reopen", ["local"], indirect=True)
s3_only = pytest.mark.parametrize("reopen", ["s3"], indirect=True)


def content(store: Store, path: str) -> bytes:
    found, block = b"", bytearray(100_000)
    with store.read(path) as file:
        while count := file.readinto(block):
            found += block[:count]
        assert file.size_bytes == len(found)
        assert file.readinto(block) == 0
    return found


@pytest.fixture
def listen(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str, dict[str, Any]], None]], None]:
    return lambda listener: monkeypatch.setattr(probe, "listener", listener)


# What all have in common.


@every_store
def test_what_is_written_is_read_by_others(store: Store, reopen: Callable[[], Store]) -> None:
    blocks = [b"ab", memoryview(b"cd"), bytearray(b"e" * 3_000_000), b""]
    store.write("a/b/file", blocks)
    store.write("a/empty", [])
    other = reopen()
    assert content(other, "a/b/file") == b"abcd" + b"e" * 3_000_000
    assert content(other, "a/empty") == b""
    store.write("a/b/file", [b"new"])
    assert content(other, "a/b/file") == b"new"


@every_store
def test_names_are_those_that_others_have_written_meanwhile(
    store: Store, reopen: Callable[[], Store]
) -> None:
    other = reopen()
    assert other.names() == []
    assert other.names("no/where") == []
    store.write("b/2", [b"x"])
    assert other.names() == ["b"]
    store.write("b/10", [b"x"])
    store.write("a", [b"x"])
    assert other.names() == ["a", "b"]
    assert other.names("b") == ["10", "2"]
    store.remove("b/2")
    assert other.names("b") == ["10"]


@every_store
def test_a_missing_file_is_file_not_found(store: Store) -> None:
    store.write("there", [b"x"])
    for path in ("missing", "no/where"):
        with pytest.raises(FileNotFoundError, match=path), store.read(path) as file:
            file.readinto(bytearray(1))


@every_store
def test_one_creation_succeeds(store: Store, reopen: Callable[[], Store]) -> None:
    other = reopen()
    assert store.create("runs/run-0000001.json", b"first")
    assert not store.create("runs/run-0000001.json", b"second")
    assert not other.create("runs/run-0000001.json", b"third")
    assert content(other, "runs/run-0000001.json") == b"first"
    assert other.create("runs/run-0000002.json", b"next")


@pytest.mark.parametrize("reopen", ["local", "s3"], indirect=True)
def test_of_many_creations_at_once_one_succeeds(reopen: Callable[[], Store]) -> None:
    stores = [reopen() for _ in range(4)]
    start = threading.Barrier(len(stores))
    created = []

    def create(number: int) -> None:
        start.wait()
        if stores[number].create("runs/run", b"%d" % number):
            created.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(len(stores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(created) == 1
    assert content(stores[0], "runs/run") == b"%d" % created[0]


@every_store
def test_a_checkpoint_is_visible_when_it_is_published(store: Store, reopen: Callable[[], Store]) -> None:
    where = place(store, ASIDE, ENTRY)
    store.write(f"{where}/state.bin", [b"state"])
    other = reopen()
    assert "manifest.json" not in other.names(ENTRY)
    store.publish(ASIDE, ENTRY, b"{}")
    assert other.names() == [ENTRY]
    assert other.names(ENTRY) == ["manifest.json", "state.bin"]
    assert content(other, f"{ENTRY}/manifest.json") == b"{}"
    assert content(other, f"{ENTRY}/state.bin") == b"state"


@every_store
def test_a_checkpoint_that_is_there_is_not_replaced(store: Store) -> None:
    store.write(f"{place(store, ASIDE, ENTRY)}/a", [b"one"])
    store.publish(ASIDE, ENTRY, b"{1}")
    store.write(f"{place(store, ASIDE, ENTRY)}/b", [b"two"])
    with pytest.raises(FileExistsError, match="exists already"):
        store.publish(ASIDE, ENTRY, b"{2}")
    assert content(store, f"{ENTRY}/manifest.json") == b"{1}"
    assert content(store, f"{ENTRY}/a") == b"one"


@every_store
def test_what_is_removed_is_gone_and_need_not_exist(store: Store) -> None:
    store.write(f"{ENTRY}/manifest.json", [b"{}"])
    store.write(f"{ENTRY}/sub/file", [b"x"])
    store.write("step-00000200.7/manifest.json", [b"{}"])
    store.remove(ENTRY)
    assert store.names() == ["step-00000200.7"]
    assert store.names(ENTRY) == []
    store.remove(ENTRY)
    store.remove("no/where")
    store.remove("step-00000200.7/manifest.json")
    assert "manifest.json" not in store.names("step-00000200.7")


@every_store
def test_blocks_that_fail_leave_nothing_that_counts(store: Store, reopen: Callable[[], Store]) -> None:
    def blocks() -> Iterator[bytes]:
        yield b"x" * 1000
        raise CheckpointError("not wanted any more")

    with pytest.raises(CheckpointError, match="not wanted any more"):
        store.write(f"{place(store, ASIDE, ENTRY)}/state.bin", blocks())
    other = reopen()
    assert "manifest.json" not in other.names(ENTRY)
    assert other.names(ASIDE) == []
    store.write(f"{place(store, ASIDE, ENTRY)}/state.bin", [b"again"])
    assert content(other, f"{place(store, ASIDE, ENTRY)}/state.bin") == b"again"


@every_store
def test_fault_plans_see_every_block_and_stage(
    store: Store, listen: Callable[[Callable[[str, dict[str, Any]], None]], None]
) -> None:
    seen: list[tuple[Any, ...]] = []
    listen(lambda point, passed: seen.append((point, *passed.values())))
    where = place(store, ASIDE, ENTRY)
    store.write(f"{where}/state.bin", [b"abc", b"de"])
    store.publish(ASIDE, ENTRY, b"{}")
    assert seen[:2] == [("save_write", f"{where}/state.bin", 0), ("save_write", f"{where}/state.bin", 3)]
    stages = [stage for point, _, stage in seen if point == "save_publish"]
    assert stages == (["manifest", "rename", "done"] if store.renames else ["manifest", "done"])


@every_store
def test_a_disk_that_is_full_is_passed_on(
    store: Store, listen: Callable[[Callable[[str, dict[str, Any]], None]], None]
) -> None:
    def full(point: str, passed: dict[str, Any]) -> None:
        if passed.get("written"):
            raise OSError(errno.ENOSPC, "No space left on device")

    listen(full)
    with pytest.raises(OSError, match="No space left") as caught:
        store.write("file", [b"a", b"b"])
    assert caught.value.errno == errno.ENOSPC


# Of this machine.


@local_only
def test_nothing_is_created_before_something_is_written(store: Store) -> None:
    assert isinstance(store, LocalStore)
    assert store.names() == []
    store.remove("step-00000001.1")
    assert not os.path.exists(store.where)


@local_only
def test_a_file_is_replaced_as_a_whole(
    store: Store, listen: Callable[[Callable[[str, dict[str, Any]], None]], None]
) -> None:
    store.write("runs/claim", [b"before"])

    def fail(point: str, passed: dict[str, Any]) -> None:
        assert content(store, "runs/claim") == b"before"
        if passed["written"]:
            raise OSError(errno.EIO, "broken")

    listen(fail)
    with pytest.raises(OSError, match="broken"):
        store.write("runs/claim", [b"af", b"ter"])
    assert content(store, "runs/claim") == b"before"
    assert store.names("runs") == ["claim"]


@local_only
@pytest.mark.parametrize(("stage", "visible"), [("manifest", False), ("rename", False), ("done", True)])
def test_a_process_killed_while_it_publishes_leaves_all_or_nothing(
    store: Store, stage: str, visible: bool
) -> None:
    program = f"""
import os, signal
from ringps import probe
from ringps.checkpoint.store import open_store

def listener(point, passed):
    if passed.get("stage") == {stage!r}:
        os.kill(os.getpid(), signal.SIGKILL)

probe.listener = listener
store = open_store({store.where!r})
store.write("{ASIDE}/state.bin", [b"state"])
store.publish("{ASIDE}", "{ENTRY}", b"{{}}")
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, timeout=50)
    assert done.returncode == -9
    assert store.names() == [ENTRY if visible else ASIDE]
    assert ("manifest.json" in store.names(ENTRY)) == visible


@local_only
def test_files_and_their_names_are_made_durable_in_order(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file before its name, and all names in a checkpoint before that of the checkpoint."""
    happened: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def note_fsync(descriptor: int) -> None:
        happened.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def note_rename(source: Path, target: Path) -> None:
        happened.append(("rename", os.path.basename(target)))
        rename(source, target)

    monkeypatch.setattr(local_store.os, "fsync", note_fsync)
    monkeypatch.setattr(local_store.os, "rename", note_rename)
    store.write(f"{ASIDE}/state.bin", [b"state"])
    assert [what for what in happened if what[1] in ("state.bin.part", "state.bin", ASIDE)] == [
        ("fsync", "state.bin.part"),
        ("rename", "state.bin"),
        ("fsync", ASIDE),
    ]
    assert ("fsync", os.path.basename(store.where)) in happened  # the name of the aside
    happened.clear()
    store.publish(ASIDE, ENTRY, b"{}")
    assert happened == [
        ("fsync", "manifest.json.part"),
        ("rename", "manifest.json"),
        ("fsync", ASIDE),
        ("rename", ENTRY),
        ("fsync", os.path.basename(store.where)),
    ]


@local_only
def test_a_removal_that_fails_leaves_no_checkpoint(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write(f"{ENTRY}/manifest.json", [b"{}"])
    store.write(f"{ENTRY}/state.bin", [b"x"])

    def fail(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(local_store.shutil, "rmtree", fail)
    with pytest.raises(PermissionError):
        store.remove(ENTRY)
    assert store.names(ENTRY) == []
    monkeypatch.undo()
    store.write(f"{ENTRY}/state.bin", [b"x"])
    store.remove(ENTRY)
    assert store.names() == [], "what was left then goes with the next"


@local_only
def test_two_that_remove_at_once_do_not_fail(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write(f"{ENTRY}/state.bin", [b"x"])
    unlink, other = os.unlink, open_store(store.where)

    def unlink_after_the_other(path: Any, **options: Any) -> None:
        if "state.bin" in str(path):
            monkeypatch.setattr(os, "unlink", unlink)
            other.remove(ENTRY)
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", unlink_after_the_other)
    store.remove(ENTRY)
    assert store.names() == []


@local_only
def test_files_are_not_inherited_and_modes_follow_the_umask(store: Store) -> None:
    store.write("file", [b"x"])
    assert stat.S_IMODE(os.stat(f"{store.where}/file").st_mode) & 0o600 == 0o600
    with store.read("file") as file:
        assert isinstance(file, local_store.LocalReader)
        assert not os.get_inheritable(file.fileno())


@local_only
def test_a_file_in_the_way_is_an_error(store: Store) -> None:
    store.write("file", [b"x"])
    with pytest.raises(NotADirectoryError):
        store.write("file/below", [b"x"])


def test_the_store_stays_where_it_was_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store("ckpt")
    monkeypatch.chdir("/")
    store.write("file", [b"x"])
    assert store.where == str(tmp_path / "ckpt")
    assert (tmp_path / "ckpt" / "file").exists()


# Remote.


@remote_stores
def test_errors_of_libraries_are_oserrors(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    class LibraryError(Exception):
        pass

    def fail(*_: object, **__: object) -> None:
        raise LibraryError("the service is on holiday")

    assert isinstance(store, FsspecStore)
    for name in ("ls", "open", "pipe_file", "rm"):
        monkeypatch.setattr(store._fs, name, fail)
    for call in (
        lambda: store.names(),
        lambda: store.write("file", [b"x"]),
        lambda: store.read("file"),
        lambda: store.create("file", b"x"),
        lambda: store.remove("file"),
        lambda: store.publish(ASIDE, ENTRY, b"x"),
    ):
        with pytest.raises(OSError, match="LibraryError: the service is on holiday") as caught:
            call()
        assert store.where in str(caught.value)
        assert isinstance(caught.value.__cause__, LibraryError)


@s3_only
def test_large_files_are_sent_in_parts(
    store: Store, reopen: Callable[[], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_store, "_BLOCK_BYTES", 5 * 1024 * 1024)
    block = os.urandom(1024 * 1024)
    store.write("large", (block for _ in range(12)))
    assert content(reopen(), "large") == block * 12


@s3_only
def test_a_large_file_that_fails_is_given_up(
    store: Store, reopen: Callable[[], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_store, "_BLOCK_BYTES", 5 * 1024 * 1024)

    def blocks() -> Iterator[bytes]:
        for _ in range(6):
            yield bytes(1024 * 1024)
        assert unfinished_uploads(store.where) == 1
        raise CheckpointError("enough")

    with pytest.raises(CheckpointError, match="enough"):
        store.write("large", blocks())
    assert unfinished_uploads(store.where) == 0
    assert reopen().names() == []


@s3_only
def test_a_bucket_that_is_missing_is_not_made(store: Store) -> None:
    other = open_store("s3://no-such-bucket-anywhere/ckpt")
    assert other.names() == []
    with pytest.raises(OSError, match="s3://no-such-bucket-anywhere/ckpt/file"):
        other.write("file", [b"x"])
    with pytest.raises(OSError, match="no-such-bucket"):
        other.create("file", b"x")


@s3_only
def test_an_answer_that_was_lost_does_not_hide_that_we_published(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(store, FsspecStore)
    store.write(f"{ENTRY}/state.bin", [b"x"])
    send = store._fs.pipe_file

    def send_twice(*arguments: Any, **options: Any) -> None:
        send(*arguments, **options)
        send(*arguments, **options)

    monkeypatch.setattr(store._fs, "pipe_file", send_twice)
    store.publish(ASIDE, ENTRY, b"{}")
    assert content(store, f"{ENTRY}/manifest.json") == b"{}"


def test_a_service_that_does_not_answer_is_an_oserror(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_MAX_ATTEMPTS": "1",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    with pytest.raises(OSError, match=r"^s3://bucket/ckpt: .*127\.0\.0\.1:9"):
        open_store("s3://bucket/ckpt").names()


# Opening.


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("/data/ckpt", "/data/ckpt"),
        ("file:///data/ckpt", "/data/ckpt"),
        ("local:///data/ckpt", "/data/ckpt"),
        ("FILE:///data/./x/../ckpt/", "/data/ckpt"),
        (Path("/data/ckpt"), "/data/ckpt"),
        ("/odd:name//x", "/odd:name/x"),
    ],
)
def test_paths_are_local(where: str, expected: str) -> None:
    store = open_store(where)
    assert isinstance(store, LocalStore)
    assert store.where == expected


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("", "needs a path or URL"),
        ("nosuch://bucket/path", "knows no scheme nosuch://"),
        ("file://host/path", "names a machine"),
        ("memory://", "has no path"),
        ("simplecache::s3://bucket/ckpt", "chain of file systems"),
        ("zip://x::s3://bucket/ckpt", "chain of file systems"),
    ],
)
def test_what_cannot_be_opened_is_refused(where: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        open_store(where)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(CheckpointError, match=r"gs://bucket/ckpt needs a package.*pip install gcsfs"):
        open_store("gs://bucket/ckpt")


def test_passwords_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(url: str, **_: object) -> None:
        raise RuntimeError(f"cannot log in to {url} as user with s3cret")

    monkeypatch.setattr(remote_store, "url_to_fs", fail)
    with pytest.raises(CheckpointError) as caught:
        open_store("ftp://user:s3cret@host/ckpt")
    assert "ftp://host/ckpt cannot be reached: RuntimeError: cannot log in" in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_containers_are_no_passwords() -> None:
    from ringps.checkpoint.store import without_password

    assert without_password("abfs://box@account/ckpt") == "abfs://box@account/ckpt"
    assert without_password("ftp://user:p%40ss@host:21/a:b@c") == "ftp://host:21/a:b@c"


# The checkpoint directory on top of them.


def manifest(step: int, run: int = 1) -> Manifest:
    file = FileEntry(name="state.bin", size_bytes=5, digest="0" * 32, kind="state")
    return Manifest(
        step=step,
        run=run,
        generation=2,
        world_size=1,
        torch="2.6",
        ringps="0.1",
        saved_at="2025-01-31T12:00:00Z",
        compression="",
        files=(file,),
    )


def save(directory: Directory, step: int, run: int = 1) -> None:
    where = directory.place(step, run, 2)
    directory.store.write(f"{where}/state.bin", [b"state"])
    directory.publish(manifest(step, run), where)


@every_store
def test_checkpoints_claims_and_pruning(store: Store, reopen: Callable[[], Store]) -> None:
    directory, other = Directory(store), Directory(reopen())
    assert (other.newest_run(), other.claims(), other.checkpoints()) == (0, {}, [])
    assert directory.claim(1)
    assert not other.claim(1)
    assert other.claims() == {1: UNKNOWN}
    directory.complete_claim(1, None)
    for step in (10, 20, 30):
        save(directory, step)
    assert other.claims() == {1: NOTHING}
    assert [found.name for found in other.checkpoints()] == [f"step-000000{step}.1" for step in (10, 20, 30)]
    assert other.manifest("step-00000020.1") == manifest(20)
    assert other.claim(2)
    other.complete_claim(2, (1, 20))
    assert other.newest_run() == 2
    assert other.lineage(other.contents()).history == [Point(1, 20), Point(1, 10)]
    retention = Retention(keep=1)
    (problem,) = directory.prune(retention, (1, 30))
    assert "nothing was deleted, for run 2 has begun, and this is run 1" in problem
    save(other, 25, run=2)
    assert other.prune(retention, (2, 25), busy=["step-00000020.1"]) == []
    assert [found.name for found in directory.checkpoints()] == ["step-00000020.1", "step-00000025.2"]
    assert directory.files("step-00000025.2") == ["manifest.json", "state.bin"]
    assert directory.files("step-00000010.1") == []


@every_store
def test_what_is_unfinished_is_told_apart_and_pruned(store: Store) -> None:
    directory = Directory(store)
    directory.claim(1)
    directory.complete_claim(1, None)
    store.write(f"{directory.place(10, 1, 2)}/state.bin", [b"sta"])
    store.write("notes/mine.txt", [b"keep this"])
    store.write("step-20", [b"and this"])
    save(directory, 30)
    contents = directory.contents()
    assert [found.step for found in contents.checkpoints] == [30]
    unfinished: tuple[list[Aside], list[Entry]] = ([], [Entry(10, 1)])
    if store.renames:
        unfinished = ([Aside(10, 1, 2)], [])
    assert (contents.asides, contents.torn) == unfinished
    assert directory.prune(Retention(), (1, 30)) == []
    assert store.names() == ["notes", "runs", "step-00000030.1", "step-20"]


@every_store
def test_a_claim_that_was_cut_off_counts_as_not_completed(store: Store) -> None:
    directory = Directory(store)
    directory.claim(1)
    store.write("runs/run-0000001.json", [b'{"run": 1, "ba'])
    store.write("runs/other.txt", [b"x"])
    assert directory.claims() == {1: UNKNOWN}
    save(directory, 10)
    assert directory.lineage(directory.contents()).history == [Point(1, 10)]


@every_store
@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (None, "is missing"),
        (b"", "it is empty"),
        (manifest(11).encode(), "it is that of step 11 of run 1"),
        (manifest(10).encode()[:-9], "it is not JSON"),
    ],
)
def test_a_manifest_that_is_wrong_is_an_error(store: Store, raw: bytes | None, reason: str) -> None:
    directory = Directory(store)
    store.write("step-00000010.1/state.bin", [b"x"])
    if raw is not None:
        store.write("step-00000010.1/manifest.json", [raw])
    with pytest.raises(CheckpointError, match=reason) as caught:
        directory.manifest("step-00000010.1")
    assert f"{store.where}/step-00000010.1/manifest.json: " in str(caught.value)


@local_only
def test_what_cannot_be_deleted_is_reported_and_the_rest_goes(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = Directory(store)
    directory.claim(1)
    directory.complete_claim(1, None)
    for step in (10, 20, 30):
        save(directory, step)
    remove = store.remove

    def stubborn(path: str) -> None:
        if path == "step-00000010.1":
            raise PermissionError(errno.EACCES, "not allowed")
        remove(path)

    monkeypatch.setattr(store, "remove", stubborn)
    (problem,) = directory.prune(Retention(keep=1), (1, 30))
    expected = f"{store.where}/step-00000010.1 could not be deleted (1 newer ones are kept)"
    assert problem.startswith(expected)
    assert "not allowed" in problem
    assert [found.step for found in directory.checkpoints()] == [10, 30]
