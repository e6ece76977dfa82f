"""The check for leftovers sees them."""

from __future__ import annotations

import os
import socket
import subprocess
import uuid

from tests.leftovers import MARKER, eventually_none, own_listening_sockets, processes_with


def test_a_process_and_its_children_are_seen_while_they_live() -> None:
    marker = uuid.uuid4().hex
    child = ["sh", "-c", "sleep 1000 & echo $!; wait"]
    environ = {**os.environ, MARKER: marker}
    with subprocess.Popen(child, env=environ, stdout=subprocess.PIPE, start_new_session=True) as shell:
        try:
            assert shell.stdout is not None
            grandchild = int(shell.stdout.readline())
            expected = {shell.pid, grandchild}
            # A process amid its exec shows no environment yet.
            assert eventually_none(lambda: expected ^ set(processes_with(marker))) == set()
        finally:
            os.killpg(shell.pid, 9)
    assert processes_with(uuid.uuid4().hex) == {}


def test_listening_sockets_are_seen_and_others_are_not() -> None:
    before = own_listening_sockets()
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix, socket.socket() as bound:
        tcp.bind(("127.0.0.1", 0))
        bound.bind(("127.0.0.1", 0))
        unix.bind(f"\0ringps-test-{uuid.uuid4().hex}")
        tcp.listen()
        unix.listen()
        found = own_listening_sockets() - before
        assert sorted(name.split()[0] for name in found) == ["tcp", "unix"]
    assert own_listening_sockets() == before
