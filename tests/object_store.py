"""An S3 server on this machine, in a process of its own."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

_RUNNING = re.compile(r"Running on (http://127\.0\.0\.1:\d+)")


@contextlib.contextmanager
def object_store() -> Iterator[str]:
    """Start a server; its address. Meanwhile the environment of this process leads S3's clients there."""
    command = [sys.executable, "-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stderr is not None
            seen = []
            for line in server.stderr:
                seen.append(line)
                if found := _RUNNING.search(line):
                    break
            else:
                raise AssertionError(f"the server did not start: {''.join(seen)}")
            # It logs every request, and blocks when nobody reads that.
            threading.Thread(target=server.stderr.read, daemon=True).start()
            with pytest.MonkeyPatch.context() as patch:
                for name, value in {
                    "AWS_ENDPOINT_URL": found[1],
                    "AWS_ACCESS_KEY_ID": "testing",
                    "AWS_SECRET_ACCESS_KEY": "testing",
                    "AWS_DEFAULT_REGION": "us-east-1",
                    "AWS_CONFIG_FILE": "/dev/null",
                    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
                    "NO_PROXY": "127.0.0.1",
                    "no_proxy": "127.0.0.1",
                }.items():
                    patch.setenv(name, value)
                yield found[1]
        finally:
            server.kill()


def new_bucket() -> str:
    """Make a bucket on the server that the environment names; the URL of a place in it."""
    name = f"bucket-{uuid.uuid4().hex}"
    _client().mkdir(f"s3://{name}")
    return f"s3://{name}/jobs/one"


def unfinished_uploads(url: str) -> int:
    """Uploads in the bucket of a URL that were begun and neither completed nor given up."""
    bucket = url.removeprefix("s3://").partition("/")[0]
    return len(_client().list_multipart_uploads(bucket))


def _client() -> Any:
    import s3fs

    return s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
