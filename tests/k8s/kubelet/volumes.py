"""The volumes of a pod: what the API server holds becomes files, claims become directories of the machine."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import floor
from pathlib import Path
from typing import Any

from tests.k8s.kubelet.api import Api, ApiError
from tests.k8s.kubelet.environment import ConfigError, Facts
from tests.k8s.kubelet.quantity import amount

_ACCOUNT_TOKEN_S = 3607


class VolumeError(Exception):
    """A volume cannot be had yet; why."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What can be mounted: a file or directory, or without `path` memory of that size."""

    path: Path | None
    read_only: bool = False
    size_bytes: int | None = None


class Objects:
    """The Secrets and ConfigMaps that a pod asks for."""

    def __init__(self, api: Api, namespace: str) -> None:
        self._api = api
        self._namespace = namespace

    def content(self, kind: str, name: str) -> dict[str, bytes] | None:
        """The entries; None if there is no such object. Raises `ApiError`."""
        try:
            found = self._api.get(f"/api/v1/namespaces/{self._namespace}/{kind.lower()}s/{name}")
        except ApiError as error:
            if error.code == 404:
                return None
            raise
        plain = {} if kind == "Secret" else (found.get("data") or {})
        encoded = found.get("data" if kind == "Secret" else "binaryData") or {}
        return {
            **{key: text.encode() for key, text in plain.items()},
            **{key: base64.b64decode(text) for key, text in encoded.items()},
        }

    def text(self, kind: str, name: str) -> dict[str, str] | None:
        """The same as text, for environment variables."""
        found = self.content(kind, name)
        return (
            None if found is None else {key: value.decode(errors="replace") for key, value in found.items()}
        )


class Volumes:
    """Sets up the volumes of one pod under `directory`."""

    def __init__(self, api: Api, pod: Mapping[str, Any], directory: Path, facts: Facts) -> None:
        self._api = api
        self._pod = pod
        self._directory = directory
        self._facts = facts
        self._objects = Objects(api, pod["metadata"]["namespace"])

    def set_up(self) -> dict[str, Source]:
        """Every volume by its name. Raises `VolumeError` or `ApiError`; then it can be tried again."""
        return {volume["name"]: self._one(volume) for volume in self._pod["spec"].get("volumes") or ()}

    def _one(self, volume: Mapping[str, Any]) -> Source:
        directory = self._directory / volume["name"]
        try:
            if "emptyDir" in volume:
                return self._empty(volume["emptyDir"], directory)
            if "persistentVolumeClaim" in volume:
                return self._claimed(volume["persistentVolumeClaim"])
            if "hostPath" in volume:
                return _of_host(Path(volume["hostPath"]["path"]), volume["hostPath"].get("type", ""))
            for kind in ("secret", "configMap", "downwardAPI", "projected"):
                if kind in volume:
                    sources = volume[kind]["sources"] if kind == "projected" else [{kind: volume[kind]}]
                    self._write(directory, sources, volume[kind].get("defaultMode", 0o644))
                    return Source(path=directory, read_only=True)
        except ConfigError as error:
            raise VolumeError(str(error)) from error
        kinds = ", ".join(key for key in volume if key != "name")
        raise VolumeError(f"the kubelet for tests does not support volumes of kind {kinds}")

    @staticmethod
    def _empty(wanted: Mapping[str, Any], directory: Path) -> Source:
        if wanted.get("medium") == "Memory":
            limit = wanted.get("sizeLimit")
            return Source(path=None, size_bytes=None if limit is None else floor(amount(limit)))
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o777)
        return Source(path=directory)

    def _claimed(self, wanted: Mapping[str, Any]) -> Source:
        name, namespace = wanted["claimName"], self._pod["metadata"]["namespace"]
        try:
            claim = self._api.get(f"/api/v1/namespaces/{namespace}/persistentvolumeclaims/{name}")
            if claim.get("status", {}).get("phase") != "Bound":
                raise VolumeError(f'PersistentVolumeClaim "{name}" is not bound')
            volume = self._api.get(f"/api/v1/persistentvolumes/{claim['spec']['volumeName']}")["spec"]
        except ApiError as error:
            if error.code == 404:
                raise VolumeError(f'persistentvolumeclaim "{name}" not found') from error
            raise
        kind = "hostPath" if "hostPath" in volume else "local"
        if kind not in volume:
            raise VolumeError(f'the volume of claim "{name}" is neither of type hostPath nor local')
        found = _of_host(Path(volume[kind]["path"]), volume[kind].get("type", ""))
        return Source(path=found.path, read_only=bool(wanted.get("readOnly")))

    def _write(self, directory: Path, sources: list[Mapping[str, Any]], mode: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for source in sources:
            for path, content, own_mode in self._files(source):
                target = directory / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.unlink(missing_ok=True)
                target.touch(mode=0o600)
                target.write_bytes(content)
                group = (self._pod["spec"].get("securityContext") or {}).get("fsGroup")
                if group is not None:  # which the pod's processes are in
                    os.chown(target, -1, group)
                target.chmod((own_mode or mode) | (0 if group is None else 0o440))

    def _files(self, source: Mapping[str, Any]) -> Iterator[tuple[str, bytes, int | None]]:
        """Path, content and mode of each file that a source gives."""
        for kind, field in (("Secret", "secret"), ("ConfigMap", "configMap")):
            if field in source:
                wanted = source[field]
                name = wanted.get("secretName") or wanted["name"]
                optional = bool(wanted.get("optional"))
                found = self._objects.content(kind, name)
                if found is None and not optional:
                    raise VolumeError(f'{kind.lower()} "{name}" not found')
                if not wanted.get("items"):
                    yield from ((key, content, None) for key, content in (found or {}).items())
                for item in wanted.get("items") or ():
                    if item["key"] in (found or {}):
                        yield item["path"], (found or {})[item["key"]], item.get("mode")
                    elif not optional:
                        raise VolumeError(f"references non-existent {kind.lower()} key: {item['key']}")
        for item in source.get("downwardAPI", {}).get("items") or ():
            if "fieldRef" in item:
                text = self._facts.field(item["fieldRef"]["fieldPath"])
            else:
                text = self._facts.resource(item["resourceFieldRef"], {})
            yield item["path"], text.encode(), item.get("mode")
        if "serviceAccountToken" in source:
            wanted = source["serviceAccountToken"]
            yield wanted["path"], self._token(wanted).encode(), 0o600

    def _token(self, wanted: Mapping[str, Any]) -> str:
        """A token for the pod's service account that ends with the pod."""
        about = self._pod["metadata"]
        account = self._pod["spec"].get("serviceAccountName") or "default"
        bound = {"kind": "Pod", "apiVersion": "v1", "name": about["name"], "uid": about["uid"]}
        spec: dict[str, Any] = {
            "expirationSeconds": wanted.get("expirationSeconds", _ACCOUNT_TOKEN_S),
            "boundObjectRef": bound,
            "audiences": [wanted["audience"]] if "audience" in wanted else [],
        }
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
        path = f"/api/v1/namespaces/{about['namespace']}/serviceaccounts/{account}/token"
        try:
            return str(self._api.post(path, body)["status"]["token"])
        except ApiError as error:
            raise VolumeError(f"failed to fetch token: {error}") from error


def mounts_of(container: Mapping[str, Any], sources: Mapping[str, Source]) -> list[dict[str, Any]]:
    """What the shim has to mount. Raises `VolumeError`."""
    found = []
    for mount in container.get("volumeMounts") or ():
        source = sources[mount["name"]]
        path = source.path
        if path is not None and mount.get("subPath"):
            path = path / mount["subPath"]
            if not path.exists():
                if source.read_only:
                    raise VolumeError(f"subPath {mount['subPath']} of volume {mount['name']} does not exist")
                path.mkdir(parents=True)
        found.append(
            {
                "source": None if path is None else os.path.realpath(path),
                "target": mount["mountPath"],
                "read_only": source.read_only or bool(mount.get("readOnly")),
                "size_bytes": source.size_bytes,
            }
        )
    return found


def _of_host(path: Path, kind: str) -> Source:
    if not path.exists() and kind in ("DirectoryOrCreate", ""):
        path.mkdir(parents=True)
    if not path.exists():
        raise VolumeError(f"hostPath type check failed: {path} is not there")
    return Source(path=path)
