"""Requests to the API server and their answers: JSON, or lines that come one after the other. Whatever goes
wrong on the way is raised as a `ClusterError`; every wait has a limit."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar
from urllib.parse import urlencode

from ringps_launcher.kubernetes.errors import ClusterError, UnreachableError, from_answer
from ringps_launcher.kubernetes.login import brief
from ringps_launcher.kubernetes.stream import Stream, lines

T = TypeVar("T")
Object = dict[str, Any]

_CONNECT_S = 5.0
_READ_S = 30.0
_FIRST_LOG_BYTE_S = 15.0
_CHUNK_BYTES = 64 << 10
_JSON = "application/json"


class Requests:
    """Sends requests with the credentials of an `ApiClient`. May be used from several threads.

    `what` is the request in words, for messages. A request is never repeated, but for one that only reads and
    found its connection closed.
    """

    def __init__(self, client: Any, read_s: float = _READ_S) -> None:
        self._client = client
        self._configuration = client.configuration
        self._read_s = read_s
        self._login_lock = threading.Lock()

    def within(self, read_s: float) -> Requests:
        """The same with another limit on how long an answer may take."""
        other = Requests(self._client, read_s)
        other._login_lock = self._login_lock
        return other

    @property
    def server(self) -> str:
        """The API server's URL."""
        return str(self._configuration.host)

    def close(self) -> None:
        """Drop the idle connections."""
        self._client.close()

    def json(
        self,
        method: str,
        path: str,
        what: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        content: str = _JSON,
    ) -> Object:
        """The answer's JSON. Entries of `query` that are "" are left out."""
        response = self._open(method, path, what, query or {}, body, content, self._read_s)
        data = self._mapped(what, lambda: response.read(decode_content=True))
        response.release_conn()
        if not 200 <= response.status < 300:
            raise from_answer(what, response.status, data)
        return loads(data, what)

    def lines(
        self,
        stream: Stream[Any],
        path: str,
        what: str,
        query: Mapping[str, str],
        *,
        wait_s: float | None = None,
    ) -> Iterator[bytes]:
        """The answer's lines, until it ends or `stream` is closed. Waits at most `wait_s` for each piece;
        None waits for ever."""
        response = self._open_stream(stream, path, what, query, wait_s)
        if response is None:
            return
        try:
            if not stream.attach(response):
                return
            if response.status != 200:
                data = self._mapped(what, lambda: response.read(decode_content=True))
                raise from_answer(what, response.status, data)
            if wait_s is None:
                _wait_for_ever(response)
            chunks = iter(lambda: self._mapped(what, lambda: response.read1(_CHUNK_BYTES)), b"")
            for line in lines(chunks):
                if stream.closed:
                    return
                yield line
        except UnreachableError:
            if not stream.closed:
                raise
        finally:
            stream.detach()
            response.close()

    def _open_stream(
        self, stream: Stream[Any], path: str, what: str, query: Mapping[str, str], wait_s: float | None
    ) -> Any:
        """Of a log, the answer's head comes with the log's first byte: until then, ask again."""
        while not stream.closed:
            try:
                return self._open("GET", path, what, query, None, _JSON, wait_s or _FIRST_LOG_BYTE_S)
            except _SilentError:
                if wait_s is not None:
                    raise
        return None

    def _open(
        self,
        method: str,
        path: str,
        what: str,
        query: Mapping[str, str],
        body: Any,
        content: str,
        read_s: float,
    ) -> Any:
        import urllib3

        given = {key: value for key, value in query.items() if value}
        url = self.server + path + ("?" + urlencode(given) if given else "")
        headers = {"Accept": _JSON, "User-Agent": "ringps", **self._mapped(what, self._authorization)}
        if body is not None:
            headers["Content-Type"] = content

        def ask() -> Any:
            return self._client.rest_client.pool_manager.request(
                method,
                url,
                body=None if body is None else json.dumps(body),
                headers=headers,
                timeout=urllib3.Timeout(connect=min(_CONNECT_S, read_s), read=read_s),
                retries=False,
                redirect=False,
                preload_content=False,
            )

        def ask_again_if_closed() -> Any:
            try:
                return ask()
            except urllib3.exceptions.ProtocolError:  # the server closed an idle connection just now
                if method != "GET":
                    raise
                return ask()

        return self._mapped(what, ask_again_if_closed)

    def _authorization(self) -> dict[str, str]:
        with self._login_lock:  # it may read a token again, or run a plugin
            settings = self._configuration.auth_settings()
        return {
            one["key"]: one["value"] for one in settings.values() if one["in"] == "header" and one["value"]
        }

    def _mapped(self, what: str, action: Callable[[], T]) -> T:
        """Do it; what urllib3 and the client raise becomes an error of ours."""
        import urllib3
        from kubernetes.config import ConfigException

        server = self.server
        try:
            return action()
        except urllib3.exceptions.ReadTimeoutError as error:
            raise _SilentError(
                f"{what}: the API server at {server} did not answer in time; try again"
            ) from error
        except urllib3.exceptions.SSLError as error:
            raise UnreachableError(
                f"{what}: no trusted connection to the API server at {server}: {brief(error)}; check the "
                "certificates in the kubeconfig"
            ) from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise UnreachableError(
                f"{what}: the API server at {server} cannot be reached: {brief(error)}; check the address in "
                "the kubeconfig, and the network"
            ) from error
        except ConfigException as error:
            raise ClusterError(f"{what}: cannot log in to {server}: {brief(error)}") from error


def loads(data: bytes, what: str) -> Object:
    """A JSON object from the API server."""
    try:
        value = json.loads(data) if data else {}
    except ValueError as error:
        raise UnreachableError(f"{what}: the answer is no JSON: is this an API server?") from error
    return value if isinstance(value, dict) else {"items": value}


class _SilentError(UnreachableError):
    """Connected, but no answer within the time."""


def _wait_for_ever(response: Any) -> None:
    connection = response.connection
    if connection is not None and connection.sock is not None:
        connection.sock.settimeout(None)
