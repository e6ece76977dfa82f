"""The HTTPS server of a node, which the API server asks for logs of containers."""

from __future__ import annotations

import contextlib
import datetime
import http.server
import ipaddress
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.k8s.kubelet import logs

_LOOK_S = 0.1


@dataclass(frozen=True)
class Log:
    """The log of one run of a container."""

    path: Path
    over: Callable[[], bool]
    """Whether nothing more comes."""


Find = Callable[[str, str, str, bool], Log]
"""(namespace, pod, container, previous) -> the log. Raises `LookupError` with what to tell the user."""


class Server:
    """Listens on `address` at a free port, `port`, until it is closed."""

    def __init__(self, address: str, certificate: Path, find: Find) -> None:
        ended = threading.Event()
        handler = type("Handler", (_Handler,), {"find": staticmethod(find), "ended": ended})
        self._ended = ended
        self._server = _Server((address, 0), handler)
        self._server.tls.load_cert_chain(certificate)
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(
            target=self._server.serve_forever,
            kwargs={"poll_interval": 0.1},
            name="kubelet-server",
            daemon=True,
        )
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, *arguments: Any) -> None:
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        super().__init__(*arguments)

    def finish_request(self, request: Any, client_address: Any) -> None:
        # In the thread of this connection: a slow handshake holds up nobody else.
        request.settimeout(10)
        try:
            with self.tls.wrap_socket(request, server_side=True) as secured:
                self.RequestHandlerClass(secured, client_address, self)
        except (OSError, ValueError):
            pass  # the API server went away

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    find: Find
    ended: threading.Event

    def do_GET(self) -> None:
        address = urllib.parse.urlsplit(self.path)
        parts = address.path.strip("/").split("/")
        query = dict(urllib.parse.parse_qsl(address.query))
        self.close_connection = True
        if len(parts) != 4 or parts[0] != "containerLogs":
            return self._refuse(404, "not found")
        try:
            wanted = logs.wanted(query, time.time())
            log = self.find(parts[1], parts[2], parts[3], query.get("previous") == "true")
        except ValueError as error:
            return self._refuse(400, str(error))
        except LookupError as error:
            return self._refuse(400, str(error.args[0]))
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._stream(log, logs.Reader(wanted), follow=query.get("follow") == "true")
        self.wfile.write(b"0\r\n\r\n")
        return None

    def _stream(self, log: Log, reader: logs.Reader, *, follow: bool) -> None:
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(open(log.path, "rb"))
            except FileNotFoundError:
                return
            self._send(reader.first(file.read()))
            while follow and not reader.full:
                over = log.over()  # before reading: then all has been written
                self._send(reader.more(file.read()))
                if over or self.ended.wait(_LOOK_S):
                    return

    def _send(self, data: bytes) -> None:
        if data:
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()

    def _refuse(self, code: int, text: str) -> None:
        body = text.encode()
        self.send_response(code)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def write_certificate(path: Path, addresses: list[str]) -> None:
    """A self-signed certificate with its key, as a kubelet makes one for itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "kubelet")])
    now = datetime.datetime.now(datetime.UTC)
    hosts = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(a)) for a in addresses])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=7))
        .add_extension(hosts, critical=False)
        .sign(key, hashes.SHA256())
    )
    path.touch(mode=0o600)
    path.write_bytes(
        certificate.public_bytes(Encoding.PEM)
        + key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    )
