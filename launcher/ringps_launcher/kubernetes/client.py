"""The API server, as far as we use it: plain dicts in and out, every failure one of ours. A `Cluster` may be
used from several threads."""

from __future__ import annotations

import builtins
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from ringps_launcher.kubernetes import login
from ringps_launcher.kubernetes.api import Object, Requests, loads
from ringps_launcher.kubernetes.errors import ExpiredError, NotFoundError, from_answer
from ringps_launcher.kubernetes.kinds import Kind, kind_of
from ringps_launcher.kubernetes.stream import Stream

_READ_S = 30.0
_WATCH_SLACK_S = 10.0
_PAGE = 500


class Cluster:
    """A connection to one API server, with a namespace that is meant where none is given.

    Every method raises `ClusterError` or a subclass of it, with a one-line message, and nothing else."""

    def __init__(self, requests: Requests, namespace: str) -> None:
        self._requests = requests
        self._versions: dict[str, str] = {}
        self.namespace = namespace

    @classmethod
    def connect(
        cls,
        context: str | None = None,
        namespace: str | None = None,
        in_cluster: bool = False,
        *,
        kubeconfig: str | None = None,
    ) -> Cluster:
        """By the kubeconfig (`kubeconfig`, else $KUBECONFIG, else ~/.kube/config) and its context, or by the
        pod's own ServiceAccount. Nothing is sent yet. The namespace is `namespace`, else the context's (or
        the pod's), else "default"."""
        if in_cluster:
            client, own = login.from_pod()
        else:
            client, own = login.from_kubeconfig(kubeconfig, context)
        return cls(Requests(client), namespace or own or "default")

    def within(self, read_s: float) -> Cluster:
        """The same connection, with another limit on how long an answer may take (but for streams)."""
        return Cluster(self._requests.within(read_s), self.namespace)

    @property
    def server(self) -> str:
        """The API server's URL."""
        return self._requests.server

    def close(self) -> None:
        """Drop the idle connections. Another request would open one again."""
        self._requests.close()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- objects

    def get(self, kind: str, name: str, namespace: str | None = None, *, subresource: str = "") -> Object:
        """One object. Raises `NotFoundError`."""
        path = self._path(kind, namespace, name, subresource)
        return self._requests.json("GET", path, f"get {kind} {self._named(kind, name, namespace)}")

    def list(
        self,
        kind: str,
        *,
        labels: str = "",
        fields: str = "",
        namespace: str | None = None,
        all_namespaces: bool = False,
    ) -> builtins.list[Object]:
        """The objects that match the label selector and the field selector."""
        return self.list_with_version(
            kind, labels=labels, fields=fields, namespace=namespace, all_namespaces=all_namespaces
        )[0]

    def list_with_version(
        self,
        kind: str,
        *,
        labels: str = "",
        fields: str = "",
        namespace: str | None = None,
        all_namespaces: bool = False,
    ) -> tuple[builtins.list[Object], str]:
        """The same, and the resource version from which `watch` goes on without a gap."""
        path = self._collection(kind, namespace, all_namespaces)
        what = f"list {kind} objects{self._where(kind, namespace, all_namespaces)}"
        selectors = {"labelSelector": labels, "fieldSelector": fields}
        try:
            return self._pages(kind, path, what, {**selectors, "limit": str(_PAGE)})
        except ExpiredError:  # it took so long that the rest of the pages is of another age
            return self._pages(kind, path, what, selectors)

    def create(
        self,
        manifest: Mapping[str, Any],
        *,
        dry_run: bool = False,
        namespace: str | None = None,
        subresource: str = "",
    ) -> Object:
        """Create the object, in the namespace that it names, else in ours. Raises `ExistsError`.

        A `subresource` ("eviction", "binding", "token") is one of the object that the manifest names. With
        `dry_run`, the API server does all but store it."""
        kind, metadata = str(manifest.get("kind")), manifest.get("metadata") or {}
        name, place = str(metadata.get("name", "")), namespace or metadata.get("namespace")
        if subresource:
            owner = "ServiceAccount" if subresource == "token" else "Pod"
            path = self._path(owner, place, name, subresource)
        else:
            path = self._path(kind, place)
        what = f"create {kind} {self._named(kind if not subresource else 'Pod', name, place)}"
        return self._requests.json("POST", path, what, query=_dry(dry_run), body=manifest)

    def patch(
        self,
        kind: str,
        name: str,
        patch: Mapping[str, Any] | builtins.list[Any],
        *,
        subresource: str = "",
        dry_run: bool = False,
        namespace: str | None = None,
    ) -> Object:
        """Change parts of an object: a mapping is a merge patch, a list is a JSON patch. With
        `metadata.resourceVersion` in a merge patch, `ConflictError` if the object has changed since."""
        form = "json-patch" if isinstance(patch, list) else "merge-patch"
        path = self._path(kind, namespace, name, subresource)
        what = f"change {kind} {self._named(kind, name, namespace)}"
        return self._requests.json(
            "PATCH", path, what, query=_dry(dry_run), body=patch, content=f"application/{form}+json"
        )

    def delete(
        self,
        kind: str,
        name: str,
        *,
        grace_s: int | None = None,
        uid: str | None = None,
        propagation: str = "Background",
        namespace: str | None = None,
    ) -> None:
        """Delete the object; that it is not there is no error. With `uid`, `ConflictError` if another object
        has the name by now."""
        path = self._path(kind, namespace, name)
        what = f"delete {kind} {self._named(kind, name, namespace)}"
        try:
            self._requests.json("DELETE", path, what, body=_delete_options(grace_s, uid, propagation))
        except NotFoundError:
            pass

    def delete_all(
        self, kind: str, *, labels: str, namespace: str | None = None, propagation: str = "Background"
    ) -> None:
        """Delete the objects that match the label selector; needs no right to read them."""
        if not labels:
            raise ValueError("without a label selector, this would delete everything")
        path = self._collection(kind, namespace, False)
        what = f"delete {kind} objects with {labels}{self._where(kind, namespace, False)}"
        options = _delete_options(None, None, propagation)
        self._requests.json("DELETE", path, what, query={"labelSelector": labels}, body=options)

    # -- streams

    def watch(
        self,
        kind: str,
        *,
        labels: str = "",
        fields: str = "",
        resource_version: str | None = None,
        timeout_s: float,
        namespace: str | None = None,
        all_namespaces: bool = False,
    ) -> Stream[tuple[str, Object]]:
        """(ADDED | MODIFIED | DELETED, object), until the server ends it after `timeout_s`.

        Without `resource_version`, it begins with an ADDED for every object that there is. It raises
        `ExpiredError` when the version is too old, `UnreachableError` when the connection breaks. `close()`
        from another thread ends it."""
        path = self._collection(kind, namespace, all_namespaces)
        what = f"watch {kind} objects{self._where(kind, namespace, all_namespaces)}"
        query = {
            "watch": "true",
            "labelSelector": labels,
            "fieldSelector": fields,
            "resourceVersion": resource_version or "",
            "timeoutSeconds": str(max(1, round(timeout_s))),
        }

        def events(stream: Stream[tuple[str, Object]]) -> Iterator[tuple[str, Object]]:
            for line in self._requests.lines(stream, path, what, query, wait_s=timeout_s + _WATCH_SLACK_S):
                event = loads(line, what)
                if event.get("type") == "ERROR":
                    status = event.get("object") or {}
                    raise from_answer(what, int(status.get("code") or 500), status)
                yield str(event.get("type")), dict(event.get("object") or {})

        return Stream(events)

    def logs(
        self,
        pod: str,
        *,
        container: str,
        previous: bool = False,
        follow: bool = False,
        tail: int | None = None,
        since_s: int | None = None,
        timestamps: bool = False,
        namespace: str | None = None,
    ) -> Stream[bytes]:
        """The lines of a container's output, without their ends. With `follow`, it ends with the container,
        or by `close()` from another thread. `InvalidError` if the container has not started."""
        path = self._path("Pod", namespace, pod, "log")
        what = f"read the log of pod {self._named('Pod', pod, namespace)}"
        query = {
            "container": container,
            "previous": "true" if previous else "",
            "follow": "true" if follow else "",
            "tailLines": "" if tail is None else str(tail),
            "sinceSeconds": "" if since_s is None else str(since_s),
            "timestamps": "true" if timestamps else "",
        }
        wait_s = None if follow else _READ_S
        return Stream(lambda stream: self._requests.lines(stream, path, what, query, wait_s=wait_s))

    # -- questions about ourselves and the server

    def can_i(
        self,
        verb: str,
        kind: str,
        name: str | None = None,
        namespace: str | None = None,
        subresource: str = "",
    ) -> tuple[bool, str]:
        """Whether we may, and the server's words about it. Of a namespaced kind, `namespace` "" means all."""
        found = kind_of(kind)
        place = (self.namespace if namespace is None else namespace) if found.namespaced else ""
        attributes = {
            "verb": verb,
            "group": found.group,
            "resource": found.plural,
            "subresource": subresource,
            "name": name or "",
            "namespace": place,
        }
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": attributes},
        }
        status = self.create(review).get("status") or {}
        return bool(status.get("allowed")), str(status.get("reason") or "")

    def raw(self, path: str) -> Object:
        """What the API server has at `path`, e.g. "/version"."""
        return self._requests.json("GET", path, f"get {path}")

    def request(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        query: Mapping[str, str] | None = None,
        content: str = "application/json",
    ) -> Object:
        """Any request that the methods above do not cover."""
        return self._requests.json(method, path, f"{method} {path}", query=query, body=body, content=content)

    # -- paths and words

    def _path(self, kind: str, namespace: str | None, name: str = "", subresource: str = "") -> str:
        found = kind_of(kind)
        return _joined(found.path(self._version(found), namespace or self.namespace, name, subresource))

    def _collection(self, kind: str, namespace: str | None, all_namespaces: bool) -> str:
        found = kind_of(kind)
        place = "" if all_namespaces else namespace or self.namespace
        return _joined(found.path(self._version(found), place))

    def _version(self, kind: Kind) -> str:
        """Of an API that may have no fixed version, the one that the server prefers."""
        if kind.version:
            return kind.version
        if kind.group not in self._versions:
            group = self._requests.json("GET", f"/apis/{kind.group}", f"look for the API {kind.group}")
            self._versions[kind.group] = str((group.get("preferredVersion") or {}).get("version", "v1"))
        return self._versions[kind.group]

    def _named(self, kind: str, name: str, namespace: str | None) -> str:
        place = namespace or self.namespace
        return f"{place}/{name}" if _is_namespaced(kind) else name

    def _where(self, kind: str, namespace: str | None, all_namespaces: bool) -> str:
        if all_namespaces or not _is_namespaced(kind):
            return ""
        return f" in namespace {namespace or self.namespace}"

    # -- requests

    def _pages(
        self, kind: str, path: str, what: str, query: Mapping[str, str]
    ) -> tuple[builtins.list[Object], str]:
        items: builtins.list[Object] = []
        token = ""
        while True:
            page = self._requests.json("GET", path, what, query={**query, "continue": token})
            api_version = page.get("apiVersion")
            items += [{"apiVersion": api_version, "kind": kind, **item} for item in page.get("items") or ()]
            metadata = page.get("metadata") or {}
            token = metadata.get("continue") or ""
            if not token:
                return items, str(metadata.get("resourceVersion") or "")


def _joined(parts: tuple[str, ...]) -> str:
    return "".join(f"/{quote(part, safe='')}" for part in parts)


def _is_namespaced(kind: str) -> bool:
    return kind_of(kind).namespaced


def _delete_options(grace_s: int | None, uid: str | None, propagation: str) -> Object:
    options: Object = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": propagation}
    if grace_s is not None:
        options["gracePeriodSeconds"] = grace_s
    if uid is not None:
        options["preconditions"] = {"uid": uid}
    return options


def _dry(dry_run: bool) -> dict[str, str]:
    return {"dryRun": "All"} if dry_run else {}
