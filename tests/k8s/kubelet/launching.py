"""How a container is to be run: its spec, with all that it refers to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.k8s.kubelet import environment, volumes
from tests.k8s.kubelet.container import Launch
from tests.k8s.kubelet.environment import ConfigError, Facts
from tests.k8s.kubelet.network import Attachment
from tests.k8s.kubelet.surroundings import Surroundings

Object = Mapping[str, Any]


class NoImageError(Exception):
    """There is no such image."""


def plan(
    pod: Object,
    spec: Object,
    *,
    around: Surroundings,
    facts: Facts,
    attachment: Attachment,
    sources: Mapping[str, volumes.Source],
    log: Path,
) -> Launch:
    """Raises `NoImageError`, `ConfigError`, `VolumeError` or `ApiError`: it cannot be run, or not yet."""
    image = around.images.get(spec["image"])
    if image is None:
        raise NoImageError(spec["image"])
    problem = environment.security_problem(pod, spec)
    if problem is not None:
        raise ConfigError(problem)
    assert attachment.namespace is not None
    values = environment.variables(
        spec,
        image=image.variables(),
        services=around.services,
        facts=facts,
        lookup=volumes.Objects(around.api, pod["metadata"]["namespace"]).text,
    )
    context = spec.get("securityContext") or {}
    mounts = volumes.mounts_of(spec, sources)
    return Launch(
        argv=environment.command(spec, image.command, values),
        environ=values,
        cwd=spec.get("workingDir") or image.cwd,
        hostname=facts.hostname,
        network=attachment.namespace,
        root=log.parent / "root",
        log=log,
        files=_files(pod, facts.hostname, attachment.address, around.dns),
        mounts=[*mounts, *image.mounts(mounts)],
        read_only=bool(context.get("readOnlyRootFilesystem")),
        drop_capabilities="ALL" in ((context.get("capabilities") or {}).get("drop") or ()),
        no_new_privileges=context.get("allowPrivilegeEscalation") is False,
        groups=_groups(pod["spec"].get("securityContext") or {}),
    )


def _groups(context: Object) -> list[int]:
    group = context.get("fsGroup")
    return [*(context.get("supplementalGroups") or ()), *([] if group is None else [group])]


def _files(pod: Object, hostname: str, address: str, dns: str) -> dict[str, str]:
    """What kubelets write into every container."""
    domain = f"{pod['metadata']['namespace']}.svc.cluster.local"
    subdomain = pod["spec"].get("subdomain")
    names = f"{hostname}.{subdomain}.{domain}\t{hostname}" if subdomain else hostname
    search = f"search {domain} svc.cluster.local cluster.local"
    return {
        "/etc/hostname": f"{hostname}\n",
        "/etc/hosts": f"127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost\n{address}\t{names}\n",
        "/etc/resolv.conf": f"{search}\nnameserver {dns}\noptions ndots:5\n",
    }
