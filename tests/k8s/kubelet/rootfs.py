"""The root file system of a container: a private copy-on-write view of this machine's.

Imported by the shim only, by path, in a process that has a mount namespace of its own. Mount points that the
machine lacks are made in the copy, so nothing of it stays.
"""

from __future__ import annotations

import os
from typing import Any

from system import (
    BIND,
    NO_SUID,
    PRIVATE,
    READ_ONLY,
    RECURSIVE,
    REMOUNT,
    mount,
    pivot_root,
    unmount,
)

_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_OWN = ("/proc", "/sys", "/dev", "/run")
_SHM_BYTES = 64 << 20
_OLD = "/.old-root"


def enter(base: str, files: dict[str, str], mounts: list[dict[str, Any]], cwd: str, read_only: bool) -> None:
    """Make the root in the empty directory `base`, and move this process into it, to `cwd`."""
    mount("none", "/", flags=RECURSIVE | PRIVATE)
    others = _other_mounts(base)
    mount("tmpfs", base, "tmpfs", NO_SUID, "mode=755")
    root = f"{base}/root"
    os.mkdir(root)
    _overlay("/", root, f"{base}/layers")
    layered = ["/"]
    for place in others:
        if os.path.isdir(root + place):
            try:
                _overlay(place, root + place, f"{base}/layers{len(layered)}")
            except OSError:  # some kinds of file system cannot be the lower layer
                mount(place, root + place, flags=BIND)
                _remount_read_only(root + place)
            else:
                layered.append(place)
    os.mkdir(root + _OLD)
    pivot_root(root, root + _OLD)
    os.chdir("/")
    _own_places()
    for path, text in files.items():
        if os.path.lexists(path):
            os.unlink(path)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    for wanted in sorted(mounts, key=lambda m: str(m["target"]).count("/")):
        _mount_volume(**wanted)
    os.makedirs(cwd, exist_ok=True)
    unmount(_OLD)
    os.rmdir(_OLD)
    if read_only:
        for place in ["/run", *layered]:
            _remount_read_only(place)
    os.chdir(cwd)


def _own_places() -> None:
    """What a container has of its own, whatever its image."""
    mount("proc", "/proc", "proc", NO_SUID)
    mount(f"{_OLD}/sys", "/sys", flags=BIND)
    _remount_read_only("/sys")
    os.makedirs("/run", exist_ok=True)
    mount("tmpfs", "/run", "tmpfs", NO_SUID, "mode=755")
    mount("tmpfs", "/dev", "tmpfs", NO_SUID, "mode=755")
    for name in [*_DEVICES, *(n for n in os.listdir(f"{_OLD}/dev") if n.startswith("nvidia"))]:
        if not os.path.isdir(f"{_OLD}/dev/{name}"):
            open(f"/dev/{name}", "w").close()
            mount(f"{_OLD}/dev/{name}", f"/dev/{name}", flags=BIND)
    for name, target in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
        os.symlink(f"/proc/self/fd{target}", f"/dev/{name}")
    os.mkdir("/dev/shm")
    mount("tmpfs", "/dev/shm", "tmpfs", NO_SUID, f"mode=1777,size={_SHM_BYTES}")


def _mount_volume(source: str | None, target: str, read_only: bool, size_bytes: int | None) -> None:
    """A volume at `target`: a file or directory of the machine, or without `source` memory."""
    if source is not None and not os.path.isdir(_OLD + source):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        open(target, "a").close()
    else:
        os.makedirs(target, exist_ok=True)
    if source is None:
        size = "" if size_bytes is None else f",size={size_bytes}"
        mount("tmpfs", target, "tmpfs", NO_SUID, f"mode=1777{size}")
    else:
        mount(_OLD + source, target, flags=BIND | RECURSIVE)
    if read_only:
        _remount_read_only(target)


def _overlay(lower: str, target: str, layers: str) -> None:
    os.makedirs(f"{layers}/upper")
    os.makedirs(f"{layers}/work")
    options = f"lowerdir={lower},upperdir={layers}/upper,workdir={layers}/work"
    mount("overlay", target, "overlay", 0, options)
    stat = os.stat(lower)
    os.chmod(target, stat.st_mode & 0o7777)


def _remount_read_only(place: str) -> None:
    mount("none", place, flags=BIND | REMOUNT | READ_ONLY)


def _other_mounts(base: str) -> list[str]:
    """Where other file systems of the machine are mounted; an overlay of / does not show these."""
    found = set()
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            place = line.split(" ")[4]
            own = any(place == own or place.startswith(own + "/") for own in _OWN)
            strange = any(
                character in place for character in "\\,:"
            )  # escaped, or means something to overlay
            if place != "/" and not own and not strange and not place.startswith(base):
                found.add(place)
    return sorted(found)
