"""The job key: one CURVE key pair (https://rfc.zeromq.org/spec/26/) that all parts of a job hold.

Whoever holds the pair belongs to the job. Servers use its secret half as their own; clients
present the same pair and pin the server to its public half.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from ringps.errors import SetupError

_HEADER = "ringps-job-key-1"
_Z85 = frozenset(b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#")


@dataclass(frozen=True)
class JobKey:
    """A CURVE key pair, each half 40 Z85 characters. Its secret half never shows in a repr."""

    public: bytes
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        for half in (self.public, self.secret):
            if len(half) != 40 or not _Z85.issuperset(half):
                raise ValueError("each half of a job key is 40 Z85 characters")

    @classmethod
    def generate(cls) -> JobKey:
        """A fresh pair from the system's source of randomness."""
        public, secret = zmq.curve_keypair()
        return cls(public, secret)

    @classmethod
    def load(cls, path: str | Path) -> JobKey:
        """Read a key file.

        Raises:
            SetupError: the file is missing, unreadable, open to other users, or no key file.
        """
        path = Path(path)
        try:
            status = path.stat()
            # In a pod, root gives the file to the group that the pod's processes are in (fsGroup);
            # root's own group is what every other file of root's has.
            given = status.st_uid == 0 and status.st_gid in {os.getegid(), *os.getgroups()} - {0}
            if status.st_mode & (0o037 if given else 0o077):
                raise SetupError(f"key file {path} can be read by other users; run: chmod 600 {path}")
            header, public, secret = path.read_text(encoding="ascii").split()
            if header != _HEADER:
                raise ValueError("wrong header")
            return cls(public.encode("ascii"), secret.encode("ascii"))
        except OSError as error:
            raise SetupError(f"cannot read key file {path}: {error.strerror}") from error
        except ValueError as error:
            raise SetupError(
                f"{path} is not a ringps key file; `ringps coordinator --key-file {path}` "
                "writes one when the file does not exist"
            ) from error

    def save(self, path: str | Path) -> None:
        """Write a key file that only this user can read.

        Raises:
            SetupError: the file exists already or cannot be written.
        """
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise SetupError(f"cannot write key file {path}: {error.strerror}") from error
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write("\n".join([_HEADER, self.public.decode(), self.secret.decode()]) + "\n")

    def secure_server(self, socket: zmq.Socket[bytes]) -> None:
        """Make `socket` a CURVE server; call before it binds."""
        socket.curve_server = True
        socket.curve_secretkey = self.secret
        socket.curve_publickey = self.public

    def secure_client(self, socket: zmq.Socket[bytes]) -> None:
        """Make `socket` a CURVE client of a server with this key; call before it connects."""
        socket.curve_serverkey = self.public
        socket.curve_publickey = self.public
        socket.curve_secretkey = self.secret
