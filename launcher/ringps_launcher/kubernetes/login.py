"""Who we are to the API server: by a kubeconfig, or by the pod's own ServiceAccount. The official client does
what is hard about it: certificates, exec plugins, token refresh, proxies."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterator
from typing import Any

from ringps_launcher.kubernetes.errors import ClusterError

_CONNECTIONS = 64
_IN_POD_NAMESPACE = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"


def require_client() -> None:
    """Raises if the optional packages for Kubernetes are not installed."""
    try:
        import kubernetes.config  # noqa: F401
        import yaml  # noqa: F401
    except ImportError as error:
        raise ClusterError(
            f"this command needs packages that are not installed ({error}): pip install 'ringps[kubernetes]'"
        ) from error


def from_kubeconfig(path: str | None, context: str | None) -> tuple[Any, str]:
    """The official `ApiClient` and the context's namespace ("" if it names none)."""
    require_client()
    from kubernetes import config

    path = _path(path)
    found = _contexts(path, context)
    with _reading(path):
        client = config.new_client_from_config(path, context=context, client_configuration=_configuration())
    return client, _namespace_in(found)


def context_namespace(context: str | None) -> str:
    """The namespace of the context, or of the current one; "" if it names none, or there is no kubeconfig."""
    require_client()
    try:
        found = _contexts(_path(None), context)
    except _NoKubeconfigError:
        if context is not None:
            raise
        return ""
    return _namespace_in(found)


def from_pod() -> tuple[Any, str]:
    """The same by the ServiceAccount of the pod that we run in."""
    require_client()
    from kubernetes import client, config

    configuration = _configuration()
    try:
        config.load_incluster_config(configuration)
        with open(_IN_POD_NAMESPACE, encoding="utf-8") as file:
            namespace = file.read().strip()
    except (config.ConfigException, OSError) as error:
        raise ClusterError(
            f"this is no pod that may talk to its API server: {brief(error)}; its ServiceAccount's token "
            "must be mounted"
        ) from error
    return client.ApiClient(configuration), namespace


def brief(error: BaseException) -> str:
    """An error's text in one line, without the Python object that urllib3 puts before it."""
    text = re.sub(r"^(<.*?>|\w+\(host=.*?\)): ", "", str(error), count=1, flags=re.DOTALL)
    return " ".join(text.split())[:300]


class _NoKubeconfigError(ClusterError):
    """There is no such file."""


def _path(path: str | None) -> str:
    return path or os.environ.get("KUBECONFIG") or "~/.kube/config"


def _contexts(path: str, context: str | None) -> Any:
    """The context called `context`, or the current one."""
    from kubernetes import config

    if not any(os.path.exists(os.path.expanduser(part)) for part in path.split(os.pathsep)):
        raise _NoKubeconfigError(
            f"there is no kubeconfig at {path}: set KUBECONFIG to the file that your cluster's administrator "
            "or its provider's tool gave you"
        )
    with _reading(path):
        contexts, active = config.list_kube_config_contexts(path)
        if context is None:
            return active
        known = {str(one["name"]): one for one in contexts}
    if context not in known:
        listed = ", ".join(sorted(known)) or "none"
        raise ClusterError(f"the kubeconfig {path} has no context {context!r}; it has: {listed}")
    return known[context]


def _namespace_in(context: Any) -> str:
    return str((context.get("context") or {}).get("namespace") or "")


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    """Whatever is wrong with the file, its text is not quoted: there are tokens in it."""
    import yaml
    from kubernetes import config

    try:
        yield
    except config.ConfigException as error:
        raise ClusterError(f"the kubeconfig {path} cannot be used: {brief(error)}") from error
    except yaml.YAMLError:
        raise ClusterError(f"the kubeconfig {path} is no YAML") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ClusterError(f"the kubeconfig {path} is damaged ({type(error).__name__})") from None


def _configuration() -> Any:
    from kubernetes import client

    configuration = client.Configuration()
    configuration.connection_pool_maxsize = _CONNECTIONS
    configuration.retries = False
    # Of a machine that is gone without a word, an open watch or log would not hear otherwise.
    configuration.socket_options = [
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    ]
    return configuration
