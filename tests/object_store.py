"""An S3 server on this machine, and URLs of empty roots in each kind of store."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def s3_server() -> Iterator[str]:
    """Run a server with an empty bucket; yield the URL of the bucket."""
    boto3 = pytest.importorskip("boto3", reason="no S3 client: `pip install 'moenas[test]'`")
    moto = pytest.importorskip("moto.server", reason="no S3 server: `pip install 'moenas[test]'`")
    s3fs = pytest.importorskip("s3fs", reason="no S3 file system: `pip install 'moenas[test]'`")
    server = moto.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        boto3.client("s3").create_bucket(Bucket="runs")
        yield "s3://runs"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def empty_root(bucket: str) -> str:
    """Return a URL below which nothing lies."""
    return f"{bucket}/{uuid.uuid4().hex}"
