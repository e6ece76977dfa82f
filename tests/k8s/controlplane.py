"""A control plane for tests: the real etcd, API server, controllers and scheduler, as processes.

There are no nodes, no kube-proxy and no cluster DNS; nothing listens but on a loopback address and on sockets
in the directory given. Every process is killed if this one dies, and the directory is removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import re
import signal
import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ringps_launcher.guard import Guard
from tests.k8s.certificates import Authority, Pair, write, write_signing_key
from tests.k8s.component import Component, StartError, free_ports
from tests.k8s.reachable import Reachable, write_kubeconfig

BINARIES = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl")

HOST = "127.0.0.1"
SERVICES = "10.96.0.0/16"
START_S = 60.0
"""For a component to be ready; seconds suffice but on a very busy machine."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What a test may want otherwise."""

    gates: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    """Feature gates, for all components."""
    apis: tuple[str, ...] = ()
    """API versions to serve besides the usual ones, such as `scheduling.k8s.io/v1alpha3`."""
    scheduler: Path | Mapping[str, Any] | None = None
    """A `KubeSchedulerConfiguration` as a file or as its content; without it, the scheduler's defaults.
    Where its API server is and that it elects no leader are filled in."""
    node_grace_s: float = 6.0
    """After how long without a sign a node counts as dead."""


class ControlPlane(Reachable):
    """Starts with `start`, ends with `stop`; in between its parts can be stopped and started alone."""

    def __init__(self, directory: Path, assets: Path, settings: Settings | None = None) -> None:
        super().__init__(directory, directory / "admin.kubeconfig", assets / "kubectl")
        self.assets = assets
        self.settings = settings or Settings()
        api, controllers, scheduler = free_ports(3, HOST)
        self.host = HOST
        self.port = api
        """Where pods and kubelets find the API server, over TLS."""
        self.server = f"https://{HOST}:{api}"
        self._ports = {
            "kube-apiserver": api,
            "kube-controller-manager": controllers,
            "kube-scheduler": scheduler,
        }
        self._authority = Authority(directory)
        self.ca_file = self._authority.file
        names = ("kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost")
        self._serving = self._authority.issue("serving", "kube-apiserver", hosts=(HOST, "10.96.0.1", *names))
        self._admin_pair = self._authority.issue("admin", "admin", ("system:masters",))
        self._to_kubelets = self._authority.issue("to-kubelets", "kube-apiserver", ("system:masters",))
        write_signing_key(directory / "accounts.key")
        self._trust = ssl.create_default_context(cafile=str(self.ca_file))
        self._trust.load_cert_chain(self._admin_pair.certificate, self._admin_pair.key)
        self._write_kubeconfig(self.kubeconfig, self._admin_pair)
        self._scheduler_kubeconfig = self.kubeconfig_of("system:kube-scheduler")
        self._guard = Guard()
        self._guard.remove(str(directory))
        self._components = {name: self._component(name) for name in BINARIES[:-1]}

    def start(self) -> None:
        """Start everything; `StartError` if a part does not. Then `stop` is called already."""
        try:
            self._components["etcd"].start()
            self._start("kube-apiserver")
            self._start("kube-controller-manager", "kube-scheduler")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End everything, at once: nobody needs what it holds."""
        try:
            if self._admin is not None:
                self._admin.close()
            for name in reversed(BINARIES[:-1]):
                self._components[name].stop(signal.SIGKILL)
        finally:
            self._guard.close()

    def stop_api(self, number: int = signal.SIGKILL) -> None:
        """End the API server. The other parts go on, and wait for it."""
        self._components["kube-apiserver"].stop(number)

    def start_api(self) -> None:
        """Start the API server again, at the same address and with all that it held."""
        self._start("kube-apiserver")

    def stop_controllers(self) -> None:
        self._components["kube-controller-manager"].stop()

    def start_controllers(self) -> None:
        self._start("kube-controller-manager")

    def stop_scheduler(self) -> None:
        self._components["kube-scheduler"].stop()

    def start_scheduler(self) -> None:
        self._start("kube-scheduler")

    def mend(self) -> None:
        """Start whatever does not run."""
        for name in BINARIES[:-1]:
            if not self._components[name].running:
                self._components[name].stop()  # waits for one that ended by itself
                self._start(name)

    @contextlib.contextmanager
    def configured(self, **changes: Any) -> Iterator[None]:
        """With other `Settings` inside; the parts that they concern are restarted, before and after."""
        before = self.settings
        try:
            self._configure(dataclasses.replace(before, **changes))
            yield
        finally:
            self._configure(before)

    def kubeconfig_of(self, user: str, *groups: str) -> Path:
        """A kubeconfig of a user with a client certificate. What he may do is up to RBAC; a node's user is
        `system:node:NAME` in the group `system:nodes`."""
        name = user.replace(":", "-")
        path = self.directory / f"{name}.kubeconfig"
        self._write_kubeconfig(path, self._authority.issue(name, user, groups))
        return path

    def _write_kubeconfig(self, path: Path, pair: Pair) -> None:
        # Files, not their content: of that, the client would make temporary files that stay to the end.
        cluster = {"server": self.server, "certificate-authority": str(self.ca_file)}
        user = {"client-certificate": str(pair.certificate), "client-key": str(pair.key)}
        write_kubeconfig(path, cluster, user)

    def _configure(self, settings: Settings) -> None:
        self.settings = settings
        changed = []
        for name in BINARIES[1:-1]:
            other = self._component(name)
            if name == "kube-scheduler" or other.command != self._components[name].command:
                self._components[name].stop(signal.SIGKILL)
                self._components[name] = other
                changed.append(name)
        if "kube-apiserver" in changed:
            changed.remove("kube-apiserver")
            self._start("kube-apiserver")  # the others end if they find none
        self._start(*changed)

    def _start(self, *names: str) -> None:
        for name in names:
            self._components[name].start()
        for name in names:
            self._components[name].wait_until(lambda name=name: self._ready(name), START_S)

    def _ready(self, name: str) -> bool:
        if name == "etcd":
            return True
        path = "/healthz" if name == "kube-controller-manager" else "/readyz"
        connection = http.client.HTTPSConnection(HOST, self._ports[name], timeout=2, context=self._trust)
        try:
            connection.request("GET", path)
            return connection.getresponse().status == 200
        except (http.client.HTTPException, OSError):
            return False
        finally:
            connection.close()

    def _component(self, name: str) -> Component:
        arguments = {
            "etcd": self._etcd,
            "kube-apiserver": self._api_server,
            "kube-controller-manager": self._controllers,
            "kube-scheduler": self._scheduler,
        }[name]()
        log = self.directory / f"{name}.log"
        return Component(name, [self.assets / name, *arguments], guard=self._guard, log=log, environ={})

    def _etcd(self) -> list[str]:
        client, peer = (f"unix://{self.directory}/etcd-{which}" for which in ("client", "peer"))
        return [
            f"--data-dir={self.directory}/etcd",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--unsafe-no-fsync",
            "--log-level=warn",
        ]

    def _api_server(self) -> list[str]:
        return [
            f"--etcd-servers=unix://{self.directory}/etcd-client",
            *self._serving_flags("kube-apiserver"),
            "--advertise-address=" + HOST,
            f"--client-ca-file={self.ca_file}",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            f"--requestheader-client-ca-file={self.ca_file}",
            "--requestheader-allowed-names=nobody",
            "--allow-privileged=false",
            f"--service-cluster-ip-range={SERVICES}",
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
            f"--service-account-key-file={self.directory}/accounts.key",
            f"--service-account-signing-key-file={self.directory}/accounts.key",
            # The nodes of tests have addresses in 127.0.0.0/8, and certificates of their own making.
            "--kubelet-preferred-address-types=InternalIP",
            f"--kubelet-client-certificate={self._to_kubelets.certificate}",
            f"--kubelet-client-key={self._to_kubelets.key}",
            # Endpoints may not be loopback addresses, so there are none of the API server.
            "--endpoint-reconciler-type=none",
            *(f"--runtime-config={api}=true" for api in self.settings.apis),
            *self._gate_flags(),
        ]

    def _controllers(self) -> list[str]:
        return [
            f"--kubeconfig={self.kubeconfig}",
            f"--authentication-kubeconfig={self.kubeconfig}",
            f"--authorization-kubeconfig={self.kubeconfig}",
            *self._serving_flags("kube-controller-manager"),
            "--leader-elect=false",
            "--controllers=*",
            f"--root-ca-file={self.ca_file}",
            f"--service-account-private-key-file={self.directory}/accounts.key",
            "--kube-api-qps=500",
            "--kube-api-burst=1000",
            "--node-monitor-period=500ms",
            f"--node-monitor-grace-period={self.settings.node_grace_s:g}s",
            f"--node-startup-grace-period={self.settings.node_grace_s:g}s",
            # Few nodes are no small cluster here: however many die, each is tainted, and at once.
            "--node-eviction-rate=100",
            "--secondary-node-eviction-rate=100",
            "--large-cluster-size-threshold=0",
            "--pvclaimbinder-sync-period=1s",
            *self._gate_flags(),
        ]

    def _scheduler(self) -> list[str]:
        config = self.settings.scheduler
        content: dict[str, Any] = {
            "apiVersion": "kubescheduler.config.k8s.io/v1",
            "kind": "KubeSchedulerConfiguration",
        }
        if isinstance(config, Path):
            content = yaml.safe_load(config.read_text())
        elif config is not None:
            content |= config
        content["leaderElection"] = {"leaderElect": False}
        content["clientConnection"] = {
            "kubeconfig": str(self._scheduler_kubeconfig),
            "qps": 500,
            "burst": 1000,
        }
        path = self.directory / "scheduler.json"
        write(path, json.dumps(content, indent=1).encode())
        return [
            f"--config={path}",
            f"--authentication-kubeconfig={self._scheduler_kubeconfig}",
            f"--authorization-kubeconfig={self._scheduler_kubeconfig}",
            *self._serving_flags("kube-scheduler"),
            *self._gate_flags(),
        ]

    def _serving_flags(self, name: str) -> list[str]:
        return [
            f"--bind-address={HOST}",
            f"--secure-port={self._ports[name]}",
            f"--tls-cert-file={self._serving.certificate}",
            f"--tls-private-key-file={self._serving.key}",
            "--profiling=false",
        ]

    def _gate_flags(self) -> list[str]:
        gates = ",".join(f"{gate}={str(on).lower()}" for gate, on in sorted(self.settings.gates.items()))
        return [f"--feature-gates={gates}"] if gates else []


def find_assets() -> Path:
    """The directory with the binaries; `StartError` says what is missing and how to get it."""
    directory = os.environ.get("KUBEBUILDER_ASSETS", "")
    assets = Path(directory) if directory else _cache()
    missing = [name for name in BINARIES if not os.access(assets / name, os.X_OK)]
    if missing:
        raise StartError(
            f"no Kubernetes control plane: {assets} lacks {', '.join(missing)}; run `make k8s-testenv`, or "
            "name a directory with KUBEBUILDER_ASSETS, or a running cluster with RINGPS_TEST_KUBECONFIG"
        )
    return assets


def _cache() -> Path:
    """Where `scripts/k8s_testenv` puts the binaries."""
    if named := os.environ.get("RINGPS_K8S_CACHE"):
        return Path(named)
    requirements = Path(__file__).with_name("controlplane") / "go.mod"
    version = re.search(r"^\s*k8s\.io/kubernetes (v\S+)", requirements.read_text(), re.MULTILINE)
    assert version is not None
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser() / "ringps" / f"k8s-{version[1]}"
