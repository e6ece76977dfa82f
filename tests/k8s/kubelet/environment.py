"""PURE: the command and the environment of a container, resolved as the kubelet does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import ceil
from typing import Any

from tests.k8s.kubelet.quantity import amount

Object = Mapping[str, Any]
Lookup = Callable[[str, str], "Mapping[str, str] | None"]
"""(kind, name) -> the entries of a Secret or ConfigMap of the pod's namespace, None if there is none."""


class ConfigError(Exception):
    """The container cannot be made from what there is (`CreateContainerConfigError`)."""


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Replace $(NAME) where there is such a variable; $$ stands for a dollar sign."""
    out, position = "", 0
    while position < len(text):
        if text[position] != "$" or position + 1 == len(text):
            out += text[position]
            position += 1
            continue
        following = text[position + 1]
        end = text.find(")", position)
        if following == "$":
            out += "$"
            position += 2
        elif following == "(" and end >= 0:
            name = text[position + 2 : end]
            out += variables.get(name, f"$({name})")
            position = end + 1
        else:
            out += "$" + following
            position += 2
    return out


def variables(
    container: Object, *, image: Mapping[str, str], services: Mapping[str, str], facts: Facts, lookup: Lookup
) -> dict[str, str]:
    """All variables of a container; later ones win. Raises `ConfigError`."""
    own: dict[str, str] = {}
    for source in container.get("envFrom") or ():
        for kind, field in (("ConfigMap", "configMapRef"), ("Secret", "secretRef")):
            if field in source:
                own |= {
                    source.get("prefix", "") + k: v for k, v in _entries(kind, source[field], lookup).items()
                }
    for entry in container.get("env") or ():
        if "valueFrom" in entry:
            value = _from(entry["valueFrom"], container, facts, lookup)
            if value is not None:
                own[entry["name"]] = value
        else:
            own[entry["name"]] = expand(entry.get("value", ""), {**services, **own})
    return {**image, "HOSTNAME": facts.hostname, **services, **own}


def command(container: Object, image: tuple[str, ...], values: Mapping[str, str]) -> list[str]:
    """What to execute. Raises `ConfigError`."""
    argv = [expand(part, values) for part in container.get("command") or image]
    argv += [expand(part, values) for part in container.get("args") or ()]
    if not argv:
        raise ConfigError("no command specified")
    return argv


def security_problem(pod: Object, container: Object) -> str | None:
    """Why the container may not be what it would be: its image runs as root."""
    context = {**(pod["spec"].get("securityContext") or {}), **(container.get("securityContext") or {})}
    if not context.get("runAsNonRoot"):
        return None
    if "runAsUser" not in context:
        return "container has runAsNonRoot and image will run as root"
    return "container's runAsUser breaks non-root policy" if context["runAsUser"] == 0 else None


class Facts:
    """What fields of a pod the downward API can name."""

    def __init__(
        self, pod: Object, *, node: str, host_ip: str, pod_ip: str, allocatable: Mapping[str, str]
    ) -> None:
        self._pod = pod
        self._allocatable = allocatable
        self.hostname = hostname(pod)
        account = pod["spec"].get("serviceAccountName", "")
        self._plain = {
            "metadata.name": pod["metadata"]["name"],
            "metadata.namespace": pod["metadata"]["namespace"],
            "metadata.uid": pod["metadata"]["uid"],
            "spec.nodeName": node,
            "spec.serviceAccountName": account,
            "status.hostIP": host_ip,
            "status.hostIPs": host_ip,
            "status.podIP": pod_ip,
            "status.podIPs": pod_ip,
        }

    def field(self, path: str) -> str:
        """The value of a `fieldRef`. Raises `ConfigError`."""
        if path in self._plain:
            return str(self._plain[path])
        for kind in ("labels", "annotations"):
            entries = self._pod["metadata"].get(kind) or {}
            if path == f"metadata.{kind}":
                return "".join(f'{k}="{v}"\n' for k, v in sorted(entries.items()))
            if path.startswith(f"metadata.{kind}['") and path.endswith("']"):
                return str(entries.get(path.removeprefix(f"metadata.{kind}['").removesuffix("']"), ""))
        raise ConfigError(f"unsupported fieldPath: {path}")

    def resource(self, reference: Object, container: Object) -> str:
        """The value of a `resourceFieldRef`, rounded up to whole divisors. Raises `ConfigError`."""
        if "containerName" in reference:
            named = [c for c in self._pod["spec"]["containers"] if c["name"] == reference["containerName"]]
            if not named:
                raise ConfigError(f"container {reference['containerName']} not found")
            container = named[0]
        kind, _, name = reference["resource"].partition(".")
        resources = container.get("resources") or {}
        found = (resources.get(kind) or {}).get(name)
        if found is None and kind == "limits":
            found = self._allocatable.get(name)
        divisor = amount(reference.get("divisor") or "1") or 1
        return str(ceil(amount(found or "0") / divisor))


def hostname(pod: Object) -> str:
    return str(pod["spec"].get("hostname") or pod["metadata"]["name"])[:63].rstrip("-.")


def _from(source: Object, container: Object, facts: Facts, lookup: Lookup) -> str | None:
    """The value that an entry takes from elsewhere; None if that is missing and may be."""
    if "fieldRef" in source:
        return facts.field(source["fieldRef"]["fieldPath"])
    if "resourceFieldRef" in source:
        return facts.resource(source["resourceFieldRef"], container)
    for kind, field in (("ConfigMap", "configMapKeyRef"), ("Secret", "secretKeyRef")):
        if field in source:
            reference = source[field]
            entries = _entries(kind, reference, lookup)
            if reference["key"] in entries:
                return entries[reference["key"]]
            if not reference.get("optional"):
                raise ConfigError(f"couldn't find key {reference['key']} in {kind} {reference['name']}")
            return None
    raise ConfigError(f"unsupported valueFrom: {', '.join(source)}")


def _entries(kind: str, reference: Object, lookup: Lookup) -> Mapping[str, str]:
    found = lookup(kind, reference["name"])
    if found is None:
        if not reference.get("optional"):
            raise ConfigError(f'{kind.lower()} "{reference["name"]}" not found')
        return {}
    return found
