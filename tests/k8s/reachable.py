"""A cluster as tests see it: who may do what in it, and how they say so."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ringps_launcher.kubernetes.client import Cluster
from tests.k8s.certificates import write

Manifest = dict[str, Any]

_KUBECTL_S = 30.0


class Reachable:
    """A cluster that a kubeconfig leads to. What files it needs lie in `directory`."""

    def __init__(self, directory: Path, kubeconfig: Path, kubectl: Path) -> None:
        self.directory = directory
        self.kubeconfig = kubeconfig
        """Leads to the cluster as its administrator."""
        self._kubectl = kubectl
        self._admin: Cluster | None = None

    @property
    def api(self) -> Cluster:
        """The cluster as its administrator sees it; its namespace is `default`."""
        if self._admin is None:
            self._admin = self.connect()
        return self._admin

    def connect(self, namespace: str | None = None, kubeconfig: Path | None = None) -> Cluster:
        """Another connection, as whom the kubeconfig says."""
        return Cluster.connect(namespace=namespace, kubeconfig=str(kubeconfig or self.kubeconfig))

    def kubectl(
        self,
        *arguments: str | Path,
        namespace: str | None = None,
        kubeconfig: Path | None = None,
        stdin: str | None = None,
        check: bool = True,
        limit_s: float = _KUBECTL_S,
    ) -> subprocess.CompletedProcess[str]:
        """Run kubectl; with `check`, an `AssertionError` with what it said if it fails."""
        where = ["--kubeconfig", str(kubeconfig or self.kubeconfig)]
        if namespace is not None:
            where += ["--namespace", namespace]
        environ = {k: v for k, v in os.environ.items() if k != "KUBECONFIG"}
        done = subprocess.run(
            [self._kubectl, *where, "--cache-dir", self.directory / "kubectl", *arguments],
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            env=environ,
            capture_output=True,
            text=True,
            timeout=limit_s,
        )
        assert not check or done.returncode == 0, f"kubectl {arguments}: {done.stdout}{done.stderr}"
        return done

    def apply(self, *manifests: Manifest, namespace: str | None = None) -> None:
        """Make objects, or change them to be like this."""
        whole = {"apiVersion": "v1", "kind": "List", "items": list(manifests)}
        self.kubectl("apply", "--filename", "-", namespace=namespace, stdin=json.dumps(whole))

    def service_account(
        self, namespace: str, name: str, rules: Sequence[Mapping[str, Sequence[str]]] = ()
    ) -> Path:
        """A kubeconfig of a service account, made here, that may do in its namespace what the `rules` of a
        Role say and nothing else. Its token is one that `TokenRequest` gave, good for an hour."""
        role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name}
        self.apply(
            _object("v1", "ServiceAccount", name),
            _object("rbac.authorization.k8s.io/v1", "Role", name, rules=[dict(rule) for rule in rules]),
            _object(
                "rbac.authorization.k8s.io/v1",
                "RoleBinding",
                name,
                roleRef=role,
                subjects=[{"kind": "ServiceAccount", "name": name, "namespace": namespace}],
            ),
            namespace=namespace,
        )
        token = self.kubectl("create", "token", name, "--duration", "1h", namespace=namespace).stdout.strip()
        return self._kubeconfig(f"{namespace}-{name}", {"token": token}, namespace)

    def _kubeconfig(self, name: str, user: Mapping[str, str], namespace: str = "default") -> Path:
        """A kubeconfig like the administrator's, but for another user."""
        found = self.kubectl("config", "view", "--raw", "--minify", "--output", "json").stdout
        cluster = json.loads(found)["clusters"][0]["cluster"]
        path = self.directory / f"{re.sub(r'[^a-z0-9-]', '-', name)}.kubeconfig"
        write_kubeconfig(path, cluster, user, namespace)
        return path


def write_kubeconfig(
    path: Path, cluster: Mapping[str, Any], user: Mapping[str, str], namespace: str = "default"
) -> None:
    """A kubeconfig file with one context; `cluster` and `user` are as they stand in such a file."""
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": dict(cluster)}],
        "users": [{"name": "test", "user": dict(user)}],
        "contexts": [
            {"name": "test", "context": {"cluster": "test", "user": "test", "namespace": namespace}}
        ],
        "current-context": "test",
    }
    write(path, json.dumps(content, indent=1).encode())  # JSON is YAML


def _object(version: str, kind: str, name: str, **rest: Any) -> Manifest:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name}, **rest}
