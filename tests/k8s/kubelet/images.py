"""PURE: what stands for container images, and which names of images are valid."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_HOST = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?(?:\.[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?)*(?::[0-9]+)?"
_NAME = re.compile(
    rf"(?:{_HOST}/)?{_PART}(?:/{_PART})*(?::[A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}})?(?:@[a-z0-9]+:[0-9a-f]{{32,}})?"
)


@dataclass(frozen=True, kw_only=True)
class Image:
    """What a container of this image finds. Its files are always those of the machine."""

    path: tuple[str, ...] = ()
    """Directories that come first in PATH."""
    environ: Mapping[str, str] = field(default_factory=dict)
    """Further variables."""
    kept: tuple[str, ...] = ()
    """Directories that a volume does not hide which is mounted above them."""
    cwd: str = "/"
    """Working directory, unless the container names one."""
    command: tuple[str, ...] = ()
    """What runs if the container names no command."""

    def mounts(self, volumes: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """What is mounted after the volumes."""
        targets = [f"{str(volume['target']).rstrip('/')}/" for volume in volumes]
        hidden = [kept for kept in self.kept if any(f"{kept}/".startswith(target) for target in targets)]
        return [{"source": place, "target": place, "read_only": True, "size_bytes": None} for place in hidden]

    def variables(self) -> dict[str, str]:
        return {"PATH": ":".join([*self.path, _PATH]), "HOME": "/root", **self.environ}


def valid_name(name: str) -> bool:
    """Whether it could be an image of any registry."""
    return _NAME.fullmatch(name) is not None


def missing(container: Mapping[str, Any], attempts: int) -> tuple[str, str]:
    """Why a container waits whose image is not there: reason and message, after so many attempts before."""
    name = container["image"]
    if not valid_name(name):
        return "InvalidImageName", f'Failed to apply default image tag "{name}": invalid reference format'
    if container.get("imagePullPolicy") == "Never":
        return "ErrImageNeverPull", f'Container image "{name}" is not present with pull policy of Never'
    text = f'failed to pull and unpack image "{name}": failed to resolve reference: not found'
    if attempts % 2 == 0:
        return "ErrImagePull", text
    return "ImagePullBackOff", f'Back-off pulling image "{name}": ErrImagePull: {text}'
