"""Who may read a job key's file."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

import pytest

from ringps.errors import SetupError
from ringps.transport.keys import JobKey


@pytest.mark.parametrize(
    ("mode", "owner", "groups", "taken"),
    [
        (0o440, 4711, [1, 4711], True),
        (0o440, 4711, [1], False),
        (0o444, 4711, [1, 4711], False),
        (0o440, 0, [0, 4711], False),
    ],
    ids=["ours", "another's", "everybody's", "root's"],
)
def test_a_key_that_a_kubelet_gave_to_the_group_of_the_pod(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, owner: int, groups: list[int], taken: bool
) -> None:
    """A kubelet lets the pod's group (fsGroup) read Secrets, which belong to root."""
    key = tmp_path / "job.key"
    JobKey.generate().save(key)
    key.chmod(mode)
    found = key.stat()
    given = os.stat_result((*found[:4], 0, owner, *found[6:]))
    monkeypatch.setattr(Path, "stat", lambda self: given)
    monkeypatch.setattr(os, "getgroups", lambda: groups)
    with nullcontext() if taken else pytest.raises(SetupError, match="can be read by other users"):
        JobKey.load(key)
