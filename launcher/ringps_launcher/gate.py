"""Run by path between fork and the worker's own program: waits until the guard knows this process.

The launcher writes one byte to our standard input once the guard has been told our process group.
If the launcher dies first, the pipe ends and so do we. There is hence no moment at which a worker
runs that nobody would kill. Imports nothing but `os` and `sys`: started with `python -I -S`.
"""

from __future__ import annotations

import os
import sys


def main(command: list[str]) -> None:
    if not os.read(0, 1):
        os._exit(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"cannot start {command[0]}: {error.strerror}\n".encode())
        os._exit(127)


if __name__ == "__main__":
    main(sys.argv[1:])
