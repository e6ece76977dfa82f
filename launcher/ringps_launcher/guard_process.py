"""The guard: kills and removes what a launcher that was itself killed would leave behind.

Run by path with `python -I -S`, in a session of its own, with a pipe from the launcher as standard
input. Each line of it is `watch PGID`, `unwatch PGID` or `remove HEXPATH`. When the pipe ends, the
groups still watched are killed and the paths removed. A launcher that ends in order has unwatched
everything by then. Imports nothing beyond `os` and `signal`, so that it is small and starts fast.
"""

from __future__ import annotations

import os
import signal


def main() -> None:
    # Ctrl-C, a closing terminal or a shutdown must not take the guard before the launcher.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    groups: set[int] = set()
    paths: set[bytes] = set()
    rest = b""
    while data := os.read(0, 65536):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            order, _, operand = line.partition(b" ")
            if order == b"watch":
                groups.add(int(operand))
            elif order == b"unwatch":
                groups.discard(int(operand))
            elif order == b"remove":
                paths.add(bytes.fromhex(operand.decode("ascii")))
    for group in groups:
        try:
            os.killpg(group, signal.SIGKILL)
        except OSError:
            continue  # gone already
    for path in paths:
        remove(path)


def remove(path: bytes) -> None:
    """Delete a directory and all that is in it; what is gone already does not matter."""
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    remove(entry.path)
                else:
                    os.unlink(entry.path)
        os.rmdir(path)
    except OSError:
        return


if __name__ == "__main__":
    main()
