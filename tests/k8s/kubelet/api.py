"""The API server, as the kubelet talks to it: plain requests over connections that are kept, and watches."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import socket
import ssl
import tempfile
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]

MERGE = "application/merge-patch+json"
STRATEGIC = "application/strategic-merge-patch+json"
_LIMIT_S = 15.0
_WATCH_S = 300
_AGAIN_S = 0.25


class ApiError(Exception):
    """The API server refused (`code`), or could not be reached (`code` 0)."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Api:
    """One API server, as one user; from any thread."""

    def __init__(self, kubeconfig: Path) -> None:
        config = yaml.safe_load(kubeconfig.read_text())
        names = {c["name"]: c["context"] for c in config["contexts"]}[config["current-context"]]
        cluster = {c["name"]: c["cluster"] for c in config["clusters"]}[names["cluster"]]
        user = {c["name"]: c["user"] for c in config["users"]}[names["user"]]
        server = urllib.parse.urlsplit(cluster["server"])
        assert server.hostname is not None
        self.host = server.hostname
        self.port = server.port or 443
        self._headers = {"Authorization": f"Bearer {user['token']}"} if "token" in user else {}
        self._tls = ssl.create_default_context()
        if (authority := _content(cluster, "certificate-authority")) is not None:
            self._tls.load_verify_locations(cadata=authority)
        if (certificate := _content(user, "client-certificate")) is not None:
            with tempfile.NamedTemporaryFile(
                "w", suffix=".pem"
            ) as pem:  # there is no way to load it from memory
                pem.write(certificate + "\n" + (_content(user, "client-key") or ""))
                pem.flush()
                self._tls.load_cert_chain(pem.name)
        self._idle: list[http.client.HTTPSConnection] = []
        self._lock = threading.Lock()

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def get(self, path: str) -> Object:
        return self.request("GET", path)

    def post(self, path: str, body: Object) -> Object:
        return self.request("POST", path, body)

    def patch(self, path: str, body: Object, kind: str = MERGE) -> Object:
        return self.request("PATCH", path, body, kind)

    def delete(self, path: str, uid: str | None = None) -> None:
        """Delete at once; with `uid`, only that very object. It is no error if it is gone."""
        options: Object = {"kind": "DeleteOptions", "apiVersion": "v1", "gracePeriodSeconds": 0}
        if uid is not None:
            options["preconditions"] = {"uid": uid}
        try:
            self.request("DELETE", path, options)
        except ApiError as error:
            if error.code not in (404, 409):
                raise

    def request(
        self, method: str, path: str, body: Object | None = None, kind: str = "application/json"
    ) -> Object:
        """Raises `ApiError`."""
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        kept = connection is not None
        try:
            if connection is None:
                connection = self._connection(_LIMIT_S)
            try:
                answer = self._ask(connection, method, path, body, kind)
            except (ConnectionError, http.client.HTTPException):
                connection.close()
                if not kept:
                    raise
                connection = self._connection(_LIMIT_S)  # the one kept was closed meanwhile
                answer = self._ask(connection, method, path, body, kind)
            text = answer.read()
        except (OSError, http.client.HTTPException) as error:
            if connection is not None:
                connection.close()
            raise ApiError(0, f"{method} {path}: {str(error) or type(error).__name__}") from error
        with self._lock:
            self._idle.append(connection)
        if answer.status >= 400:
            raise ApiError(answer.status, f"{method} {path}: {answer.status}: {_message(text)}")
        found: Object = json.loads(text)
        return found

    def watch(self, path: str, version: str) -> Watch:
        """What changes from a resource version on. Raises `ApiError`."""
        joint = "&" if "?" in path else "?"
        whole = f"{path}{joint}watch=1&resourceVersion={version}&timeoutSeconds={_WATCH_S}"
        connection = None
        try:
            connection = self._connection(_WATCH_S + _LIMIT_S)
            answer = self._ask(connection, "GET", whole, None, "")
            if answer.status >= 400:
                raise ApiError(answer.status, f"watch {path}: {answer.status}: {_message(answer.read())}")
        except (OSError, http.client.HTTPException, ApiError) as error:
            if connection is not None:
                connection.close()
            if isinstance(error, ApiError):
                raise
            raise ApiError(0, f"watch {path}: {error}") from error
        return Watch(connection, answer)

    def _connection(self, limit_s: float) -> http.client.HTTPSConnection:
        connection = http.client.HTTPSConnection(self.host, self.port, timeout=limit_s, context=self._tls)
        connection.connect()
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def _ask(
        self, connection: http.client.HTTPSConnection, method: str, path: str, body: Object | None, kind: str
    ) -> http.client.HTTPResponse:
        headers = {"Accept": "application/json", **self._headers}
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            headers["Content-Type"] = kind
        connection.request(method, path, data, headers)
        return connection.getresponse()


class Watch:
    """An open watch. `close` ends it, from any thread."""

    def __init__(self, connection: http.client.HTTPSConnection, answer: http.client.HTTPResponse) -> None:
        self._connection = connection
        self._answer = answer
        self._socket = socket.socket(fileno=os.dup(connection.sock.fileno()))

    def __iter__(self) -> Iterator[tuple[str, Object]]:
        """Ends when the API server ends it, for whatever reason."""
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException, AttributeError):
            while line := self._answer.readline():
                event = json.loads(line)
                yield event["type"], event["object"]

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def release(self) -> None:
        """Once nobody iterates."""
        self._connection.close()
        self._answer.close()
        self._socket.close()


class Follower:
    """A thread that follows a collection: lists it, watches it, and begins again whenever that breaks."""

    def __init__(
        self,
        api: Api,
        path: str,
        *,
        listed: Callable[[list[Object]], None],
        changed: Callable[[str, Object], None],
    ) -> None:
        """`listed` gets all objects there are, `changed` the type of an event and the object."""
        self._api = api
        self._path = path
        self._listed = listed
        self._changed = changed
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._watch: Watch | None = None
        self.synced = threading.Event()
        """Set once the collection was listed."""
        self._thread = threading.Thread(target=self._run, name="kubelet-follower", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        with self._lock:
            if self._watch is not None:
                self._watch.close()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                found = self._api.get(self._path)
                self._listed(found["items"])
                self.synced.set()
                self._follow(found["metadata"]["resourceVersion"])
            except ApiError:
                pass  # away, or the version is too old
            self._ended.wait(_AGAIN_S)

    def _follow(self, version: str) -> None:
        while not self._ended.is_set():
            watch = self._api.watch(self._path, version)
            with self._lock:
                self._watch = watch
                if self._ended.is_set():
                    watch.close()
            seen = False
            try:
                for kind, found in watch:
                    if kind not in ("ADDED", "MODIFIED", "DELETED"):
                        return
                    version = found["metadata"]["resourceVersion"]
                    seen = True
                    self._changed(kind, found)
            finally:
                with self._lock:
                    self._watch = None
                watch.release()
            if not seen:
                return


def _content(section: dict[str, str], name: str) -> str | None:
    """An entry of a kubeconfig, which may be a file's name or its content."""
    if f"{name}-data" in section:
        return base64.b64decode(section[f"{name}-data"]).decode()
    return Path(section[name]).read_text() if name in section else None


def _message(text: bytes) -> str:
    try:
        return str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200].decode(errors="replace")
