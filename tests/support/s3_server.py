"""An S3 server (moto's) with a bucket, and the variables that a machine needs to reach it."""

from collections.abc import Iterator

import boto3
import pytest
from moto.server import ThreadedMotoServer

AWS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "eu-central-1"}


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of an S3 server that has a bucket `bucket`."""
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    client = boto3.client("s3", endpoint_url=endpoint, aws_access_key_id="key", aws_secret_access_key="secret",
                          region_name="us-east-1")  # fmt: skip
    client.create_bucket(Bucket="bucket")
    yield endpoint
    server.stop()
