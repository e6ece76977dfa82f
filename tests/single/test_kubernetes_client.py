"""The client of the API server against a small HTTP server that answers as it is told."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from ringps_launcher.kubernetes.client import Cluster
from ringps_launcher.kubernetes.errors import (
    ClusterError,
    ConflictError,
    ExistsError,
    ExpiredError,
    ForbiddenError,
    InvalidError,
    NotFoundError,
    UnreachableError,
    from_answer,
)
from ringps_launcher.kubernetes.kinds import kind_of
from ringps_launcher.kubernetes.stream import lines

pytest.importorskip("kubernetes")

TOKEN = "a-token-that-nobody-may-see"


class Server:
    """Answers each request by `answer(handler)`, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, dict[str, list[str]], Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answer: Callable[[Handler], None] = lambda handler: handler.say(200, {})
        outer = self

        class Bound(Handler):
            server_of = outer

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: Server

    def log_message(self, *_: Any) -> None: ...

    def handle_any(self) -> None:
        where = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        entry = (self.command, where.path, parse_qs(where.query), json.loads(body) if body else None)
        self.server_of.asked.append(entry)
        self.server_of.headers.append({key.lower(): value for key, value in self.headers.items()})
        with contextlib.suppress(ConnectionError):
            self.server_of.answer(self)

    do_GET = do_POST = do_PATCH = do_DELETE = handle_any

    def say(self, code: int, body: Any) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def begin(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


def write_kubeconfig(path: Path, url: str, **context: str) -> Path:
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": url}}],
        "users": [{"name": "u", "user": {"token": TOKEN}}],
        "contexts": [
            {"name": "one", "context": {"cluster": "c", "user": "u", **context}},
            {"name": "two", "context": {"cluster": "c", "user": "u"}},
        ],
        "current-context": "one",
    }
    path.write_text(json.dumps(config))
    return path


@pytest.fixture
def cluster(server: Server, tmp_path: Path) -> Iterator[Cluster]:
    path = write_kubeconfig(tmp_path / "config", server.url, namespace="team")
    with Cluster.connect(kubeconfig=str(path)) as connected:
        yield connected


def status(code: int, reason: str, message: str) -> dict[str, Any]:
    return {"kind": "Status", "status": "Failure", "code": code, "reason": reason, "message": message}


# -- requests


def test_paths(server: Server, cluster: Cluster) -> None:
    cluster.get("Pod", "a")
    cluster.get("Job", "a", "other")
    cluster.get("Node", "n")
    cluster.list("Pod", labels="a=b", fields="spec.nodeName=n")
    cluster.list("Job", all_namespaces=True)
    cluster.raw("/version")
    cluster.get("Pod", "../a b")
    assert [(method, path) for method, path, _, _ in server.asked] == [
        ("GET", "/api/v1/namespaces/team/pods/a"),
        ("GET", "/apis/batch/v1/namespaces/other/jobs/a"),
        ("GET", "/api/v1/nodes/n"),
        ("GET", "/api/v1/namespaces/team/pods"),
        ("GET", "/apis/batch/v1/jobs"),
        ("GET", "/version"),
        ("GET", "/api/v1/namespaces/team/pods/..%2Fa%20b"),
    ]
    assert server.asked[3][2] == {
        "labelSelector": ["a=b"],
        "fieldSelector": ["spec.nodeName=n"],
        "limit": ["500"],
    }
    assert all(headers["authorization"] == f"Bearer {TOKEN}" for headers in server.headers)


def test_changes(server: Server, cluster: Cluster) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}}
    cluster.create(pod)
    cluster.create(pod, dry_run=True)
    cluster.create({**pod, "kind": "Eviction"}, subresource="eviction")
    cluster.patch("Job", "a", {"spec": {"suspend": True}})
    cluster.patch("Pod", "a", [{"op": "remove", "path": "/x"}], subresource="status")
    cluster.delete("Pod", "a", grace_s=0, uid="u")
    cluster.delete_all("Pod", labels="a=b")
    assert [(method, path, query) for method, path, query, _ in server.asked] == [
        ("POST", "/api/v1/namespaces/team/pods", {}),
        ("POST", "/api/v1/namespaces/team/pods", {"dryRun": ["All"]}),
        ("POST", "/api/v1/namespaces/team/pods/a/eviction", {}),
        ("PATCH", "/apis/batch/v1/namespaces/team/jobs/a", {}),
        ("PATCH", "/api/v1/namespaces/team/pods/a/status", {}),
        ("DELETE", "/api/v1/namespaces/team/pods/a", {}),
        ("DELETE", "/api/v1/namespaces/team/pods", {"labelSelector": ["a=b"]}),
    ]
    assert [headers["content-type"] for headers in server.headers[3:5]] == [
        "application/merge-patch+json",
        "application/json-patch+json",
    ]
    assert server.asked[5][3]["gracePeriodSeconds"] == 0
    assert server.asked[5][3]["preconditions"] == {"uid": "u"}
    assert server.asked[5][3]["propagationPolicy"] == "Background"
    with pytest.raises(ValueError):
        cluster.delete_all("Pod", labels="")


def test_a_list_of_several_pages(server: Server, cluster: Cluster) -> None:
    def answer(handler: Handler) -> None:
        last = server.asked[-1][2].get("continue") == ["more"]
        metadata = {"resourceVersion": "7"} if last else {"resourceVersion": "7", "continue": "more"}
        handler.say(200, {"apiVersion": "v1", "metadata": metadata, "items": [{"n": len(server.asked)}]})

    server.answer = answer
    assert cluster.list_with_version("Pod") == (
        [{"apiVersion": "v1", "kind": "Pod", "n": 1}, {"apiVersion": "v1", "kind": "Pod", "n": 2}],
        "7",
    )


def test_a_list_whose_pages_expire_is_taken_at_once(server: Server, cluster: Cluster) -> None:
    def answer(handler: Handler) -> None:
        query = server.asked[-1][2]
        if "continue" in query:
            handler.say(410, status(410, "Expired", "too old"))
        elif "limit" in query:
            handler.say(200, {"metadata": {"continue": "more"}, "items": [{"n": 1}]})
        else:
            handler.say(200, {"metadata": {"resourceVersion": "9"}, "items": [{"n": 1}, {"n": 2}]})

    server.answer = answer
    items, version = cluster.list_with_version("Pod")
    assert ([item["n"] for item in items], version) == ([1, 2], "9")


def test_the_version_of_an_api_that_has_several(server: Server, cluster: Cluster) -> None:
    def answer(handler: Handler) -> None:
        preferred = {"preferredVersion": {"version": "v1beta2"}}
        handler.say(200, preferred if handler.path == "/apis/kueue.x-k8s.io" else {"items": []})

    server.answer = answer
    cluster.list("Workload")
    cluster.get("LocalQueue", "q")
    assert [path for _, path, _, _ in server.asked] == [
        "/apis/kueue.x-k8s.io",
        "/apis/kueue.x-k8s.io/v1beta2/namespaces/team/workloads",
        "/apis/kueue.x-k8s.io/v1beta2/namespaces/team/localqueues/q",
    ]


def test_may_i(server: Server, cluster: Cluster) -> None:
    server.answer = lambda handler: handler.say(201, {"status": {"allowed": False, "reason": "no"}})
    assert cluster.can_i("create", "Job") == (False, "no")
    assert server.asked[0][3]["spec"]["resourceAttributes"] == {
        "verb": "create",
        "group": "batch",
        "resource": "jobs",
        "subresource": "",
        "name": "",
        "namespace": "team",
    }


# -- errors


@pytest.mark.parametrize(
    ("code", "reason", "message", "kind", "words"),
    [
        (401, "Unauthorized", "Unauthorized", ForbiddenError, "log in again"),
        (403, "Forbidden", "User x cannot get pods", ForbiddenError, "ask the cluster's administrator"),
        (403, "Forbidden", "exceeded quota: team", ForbiddenError, "ask for less"),
        (403, "Forbidden", "violates PodSecurity", ForbiddenError, "Pod Security level"),
        (404, "NotFound", 'pods "a" not found', NotFoundError, 'pods "a" not found'),
        (404, "NotFound", "the server could not find the requested resource", NotFoundError, "does not know"),
        (409, "AlreadyExists", "already exists", ExistsError, "already exists"),
        (409, "Conflict", "modified", ConflictError, "modified"),
        (410, "Expired", "too old", ExpiredError, "too old"),
        (422, "Invalid", "bad\n  name", InvalidError, "bad name"),
        (400, "BadRequest", "is waiting to start", InvalidError, "waiting"),
        (429, "TooManyRequests", "slow down", UnreachableError, "try again"),
        (500, "InternalError", "etcd", UnreachableError, "try again"),
        (418, "", "", ClusterError, "HTTP 418"),
    ],
)
def test_answers_that_are_errors(
    server: Server,
    cluster: Cluster,
    code: int,
    reason: str,
    message: str,
    kind: type[ClusterError],
    words: str,
) -> None:
    server.answer = lambda handler: handler.say(code, status(code, reason, message))
    with pytest.raises(ClusterError) as caught:
        cluster.get("Pod", "a")
    assert type(caught.value) is kind
    said = str(caught.value)
    assert words in said and "get Pod team/a: " in said and "\n" not in said
    assert (caught.value.status, caught.value.reason) == (code, reason)


def test_an_answer_that_is_no_status() -> None:
    error = from_answer("get x", 404, b"404 page not found\n")
    assert isinstance(error, NotFoundError)
    assert str(error) == "get x: 404 page not found; the API server does not know this kind of object"
    assert len(str(from_answer("get x", 422, b"y" * 5000))) < 800


def test_deleting_what_is_not_there_is_no_error(server: Server, cluster: Cluster) -> None:
    server.answer = lambda handler: handler.say(404, status(404, "NotFound", "none"))
    cluster.delete("Pod", "a")


def test_what_is_no_api_server(server: Server, cluster: Cluster) -> None:
    server.answer = lambda handler: handler.say(200, b"<html>")
    with pytest.raises(UnreachableError, match="is this an API server"):
        cluster.get("Pod", "a")


def test_nobody_listens(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        path = write_kubeconfig(tmp_path / "config", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with Cluster.connect(kubeconfig=str(path)) as cluster, pytest.raises(UnreachableError) as caught:
            cluster.list("Pod")
    said = str(caught.value)
    assert "list Pod objects in namespace default: the API server at http://127.0.0.1:" in said
    assert "Connection refused" in said and "kubeconfig" in said


def test_a_server_that_does_not_answer(server: Server, cluster: Cluster) -> None:
    release = threading.Event()
    server.answer = lambda handler: [release.wait(30), handler.say(200, {})][1]  # type: ignore[func-returns-value]
    before = time.monotonic()
    with pytest.raises(UnreachableError, match="did not answer in time"):
        cluster.within(0.2).get("Pod", "a")
    assert time.monotonic() - before < 10
    release.set()


def test_only_what_reads_goes_again_after_a_closed_connection(server: Server, cluster: Cluster) -> None:
    def close_the_first(handler: Handler) -> None:
        if len(server.asked) % 2:
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)
        else:
            handler.say(200, {"n": 1})

    server.answer = close_the_first
    assert cluster.get("Pod", "a") == {"n": 1}
    with pytest.raises(UnreachableError):
        cluster.create({"kind": "Pod", "metadata": {"name": "a"}})
    assert [method for method, *_ in server.asked] == ["GET", "GET", "POST"]


def test_the_token_is_in_no_message(server: Server, cluster: Cluster, tmp_path: Path) -> None:
    server.answer = lambda handler: handler.say(401, status(401, "Unauthorized", "Unauthorized"))
    with pytest.raises(ForbiddenError) as caught:
        cluster.get("Pod", "a")
    assert TOKEN not in repr(caught.value)
    damaged = tmp_path / "damaged"
    damaged.write_text(f"users: [{{token: {TOKEN}\n  x")
    with pytest.raises(ClusterError) as caught_too:
        Cluster.connect(kubeconfig=str(damaged))
    assert TOKEN not in str(caught_too.value)
    assert str(damaged) in str(caught_too.value)


# -- streams


def event(kind: str, name: str) -> bytes:
    return json.dumps({"type": kind, "object": {"metadata": {"name": name}}}).encode() + b"\n"


def test_watch(server: Server, cluster: Cluster) -> None:
    def answer(handler: Handler) -> None:
        handler.begin()
        whole = event("ADDED", "a") + event("DELETED", "b")
        for part in (whole[:10], whole[10:70], whole[70:], b""):
            handler.chunk(part)

    server.answer = answer
    seen = list(cluster.watch("Pod", labels="a=b", resource_version="5", timeout_s=3))
    assert [(kind, found["metadata"]["name"]) for kind, found in seen] == [("ADDED", "a"), ("DELETED", "b")]
    assert server.asked[0][2] == {
        "watch": ["true"],
        "labelSelector": ["a=b"],
        "resourceVersion": ["5"],
        "timeoutSeconds": ["3"],
    }


def test_a_watch_that_is_too_old(server: Server, cluster: Cluster) -> None:
    server.answer = lambda handler: handler.say(410, status(410, "Expired", "too old"))
    with pytest.raises(ExpiredError):
        list(cluster.watch("Pod", resource_version="1", timeout_s=3))
    gone = {"type": "ERROR", "object": status(410, "Expired", "too old resource version")}
    server.answer = lambda handler: handler.say(200, json.dumps(gone).encode() + b"\n")
    with pytest.raises(ExpiredError):
        list(cluster.watch("Pod", resource_version="1", timeout_s=3))


def test_a_watch_that_breaks(server: Server, cluster: Cluster) -> None:
    def answer(handler: Handler) -> None:
        handler.begin()
        handler.chunk(event("ADDED", "a"))
        handler.close_connection = True
        handler.connection.shutdown(socket.SHUT_RDWR)

    server.answer = answer
    watch = cluster.watch("Pod", timeout_s=3)
    assert next(watch)[0] == "ADDED"
    with pytest.raises(UnreachableError):
        next(watch)


@pytest.mark.parametrize("kind", ["watch", "logs"])
def test_another_thread_ends_a_stream(server: Server, cluster: Cluster, kind: str) -> None:
    release = threading.Event()

    def answer(handler: Handler) -> None:
        handler.begin()
        handler.chunk(event("ADDED", "a"))
        release.wait(30)

    server.answer = answer
    stream: Any = (
        cluster.watch("Pod", timeout_s=60)
        if kind == "watch"
        else cluster.logs("a", container="c", follow=True)
    )
    got: list[Any] = []
    first = threading.Event()

    def read() -> None:
        for item in stream:
            got.append(item)
            first.set()

    thread = threading.Thread(target=read)
    thread.start()
    assert first.wait(10)
    stream.close()
    thread.join(5)
    release.set()
    assert not thread.is_alive()
    assert len(got) == 1
    stream.close()
    assert list(stream) == []


def test_a_stream_that_was_closed_before_asks_nothing(server: Server, cluster: Cluster) -> None:
    with cluster.watch("Pod", timeout_s=3) as watch:
        pass
    assert list(watch) == []
    assert not server.asked


def test_logs(server: Server, cluster: Cluster) -> None:
    server.answer = lambda handler: handler.say(200, b"one\ntwo \xff\n\nthree")
    stream = cluster.logs("a", container="c", previous=True, tail=5, since_s=9, timestamps=True)
    assert list(stream) == [b"one", b"two \xff", b"", b"three"]
    assert server.asked[0][1] == "/api/v1/namespaces/team/pods/a/log"
    assert server.asked[0][2] == {
        "container": ["c"],
        "previous": ["true"],
        "tailLines": ["5"],
        "sinceSeconds": ["9"],
        "timestamps": ["true"],
    }
    server.answer = lambda handler: handler.say(400, status(400, "BadRequest", "is waiting to start"))
    with pytest.raises(InvalidError, match="waiting to start"):
        list(cluster.logs("a", container="c"))


def test_a_log_that_is_silent_at_first(
    server: Server, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer's head comes with the first byte of the log, however late."""
    monkeypatch.setattr("ringps_launcher.kubernetes.api._FIRST_LOG_BYTE_S", 0.2)
    release = threading.Event()

    def answer(handler: Handler) -> None:
        if len(server.asked) < 3:
            release.wait(30)
            return
        handler.begin()
        handler.chunk(b"at last\n")
        time.sleep(0.5)  # longer than what the head may take
        handler.chunk(b"and more\n")
        handler.chunk(b"")

    server.answer = answer
    assert list(cluster.logs("a", container="c", follow=True)) == [b"at last", b"and more"]
    release.set()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_lines_are_the_same_however_they_are_cut(size: int) -> None:
    data = b"one\n\ntwo\nthree\r\n\nfour"
    chunks = [data[start : start + size] for start in range(0, len(data), size)]
    assert list(lines(iter(chunks))) == [b"one", b"", b"two", b"three\r", b"", b"four"]


def test_a_line_without_an_end_is_handed_on_in_pieces() -> None:
    chunks = [b"x" * (5 << 20)] * 4 + [b"\nlast\n"]
    got = list(lines(iter(chunks)))
    assert got[-1] == b"last"
    assert sum(map(len, got[:-1])) == 20 << 20
    assert max(map(len, got)) <= 13 << 20


# -- who we are


def test_the_namespace_is_ours_then_the_contexts_then_default(tmp_path: Path) -> None:
    path = str(write_kubeconfig(tmp_path / "config", "http://127.0.0.1:1", namespace="team"))
    for settings, wanted in (({}, "team"), ({"namespace": "mine"}, "mine"), ({"context": "two"}, "default")):
        with Cluster.connect(kubeconfig=path, **settings) as cluster:  # type: ignore[arg-type]
            assert cluster.namespace == wanted


def test_the_kubeconfig_is_that_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_kubeconfig(tmp_path / "config", "http://127.0.0.1:1", namespace="team")
    monkeypatch.setenv("KUBECONFIG", str(path))
    with Cluster.connect() as cluster:
        assert (cluster.namespace, cluster.server) == ("team", "http://127.0.0.1:1")


def test_kubeconfigs_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="there is no kubeconfig at"):
        Cluster.connect(kubeconfig=str(tmp_path / "none"))
    path = write_kubeconfig(tmp_path / "config", "http://127.0.0.1:1")
    with pytest.raises(ClusterError, match="has no context 'three'; it has: one, two"):
        Cluster.connect("three", kubeconfig=str(path))
    for text in ("", "a: [", "kind: Config\n", "[]", "contexts: 3\ncurrent-context: a\n"):
        path.write_text(text)
        with pytest.raises(ClusterError) as caught:
            Cluster.connect(kubeconfig=str(path))
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_outside_of_a_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ClusterError, match="this is no pod that may talk to its API server"):
        Cluster.connect(in_cluster=True)


def test_kinds_that_we_do_not_use() -> None:
    with pytest.raises(ValueError, match="'Ingress'"):
        kind_of("Ingress")
