"""Answers libzmq's question who may connect (ZAP, https://rfc.zeromq.org/spec/27/).

One responder serves all server sockets of a ZeroMQ context. pyzmq ships one too, but it writes
PLAIN passwords to its debug log.
"""

from __future__ import annotations

import hmac
import threading
from collections.abc import Sequence

import zmq
from zmq.utils import z85

from ringps.transport.keys import JobKey

_ENDPOINT = "inproc://zeromq.zap.01"
_STOP = b"stop"


class ZapResponder:
    """Admits whoever proves to hold `key`: by CURVE, or as the password in PLAIN.

    Start it before the context's first server socket binds, and close it before the context.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], key: JobKey) -> None:
        self._key = key
        self._refused = 0
        self._socket = context.socket(zmq.REP)
        self._socket.linger = 0
        self._socket.bind(_ENDPOINT)
        self._stop = context.socket(zmq.PAIR)
        self._stopped = context.socket(zmq.PAIR)
        endpoint = f"inproc://zap-stop-{id(self)}"
        self._stopped.bind(endpoint)
        self._stop.connect(endpoint)
        self._thread = threading.Thread(target=self._serve, name="ringps-zap", daemon=True)
        self._thread.start()

    @property
    def refused(self) -> int:
        """Connections refused so far."""
        return self._refused

    def close(self) -> None:
        """Stop answering; connections that come later are refused by libzmq."""
        self._stop.send(_STOP)
        self._thread.join()
        for socket in (self._socket, self._stop, self._stopped):
            socket.close(linger=0)

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._stopped, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._stopped in ready:
                return
            request = self._socket.recv_multipart()
            status, reason = decide(request, self._key)
            if status != b"200":
                self._refused += 1
            version, request_id, *_ = [*request, b"", b""]
            self._socket.send_multipart([version, request_id, status, reason, b"", b""])


def decide(request: Sequence[bytes], key: JobKey) -> tuple[bytes, bytes]:
    """ZAP status code and text for one request: `version, id, domain, address, identity,
    mechanism, credentials...`."""
    if len(request) < 6 or request[0] != b"1.0":
        return b"500", b"malformed request"
    mechanism, credentials = request[5], request[6:]
    if mechanism == b"CURVE" and len(credentials) == 1:
        known = hmac.compare_digest(z85.encode(credentials[0]), key.public)
    elif mechanism == b"PLAIN" and len(credentials) == 2:
        known = hmac.compare_digest(credentials[1], key.secret)
    else:
        known = False
    return (b"200", b"OK") if known else (b"400", b"not a member of this job")
