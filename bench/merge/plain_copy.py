"""The floor: copy objects through boto3 and this machine, without looking at them.

`python -m bench.merge.plain_copy SOURCE TARGET`, both s3:// URIs. Parts of 16 MiB, eight at a time: each is read and
sent on at once. What a merge does besides is to compute, to hash, and to keep an order.
"""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import boto3
from botocore.config import Config

from bench.machine import peak_bytes
from bench.merge.place import ENDPOINT

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

PART_BYTES = 16 * 1024 * 1024
THREADS = 8


def main() -> None:
    """Copy, and print the peak of resident memory."""
    (source, prefix), (target, target_prefix) = (uri.removeprefix("s3://").split("/", 1) for uri in sys.argv[1:])
    config = Config(
        s3={"addressing_style": "path"},
        max_pool_connections=2 * THREADS,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    client = boto3.client("s3", endpoint_url=os.environ[ENDPOINT], region_name="us-east-1", config=config)
    total = 0
    with ThreadPoolExecutor(THREADS) as pool:
        for entry in client.list_objects_v2(Bucket=source, Prefix=f"{prefix}/")["Contents"]:
            name = entry["Key"].removeprefix(f"{prefix}/")
            copy(client, pool, (source, entry["Key"], entry["Size"]), (target, f"{target_prefix}/{name}"))
            total += entry["Size"]
    print(json.dumps({"peak_bytes": peak_bytes(), "bytes": total}))


def copy(client: S3Client, pool: ThreadPoolExecutor, source: tuple[str, str, int], target: tuple[str, str]) -> None:
    """Copy one object."""
    bucket, key, size = source
    if size <= PART_BYTES:
        body = client.get_object(Bucket=bucket, Key=key)["Body"].read()
        client.put_object(Bucket=target[0], Key=target[1], Body=body)
        return
    upload = client.create_multipart_upload(Bucket=target[0], Key=target[1])["UploadId"]

    def part(number: int) -> str:
        start = number * PART_BYTES
        span = f"bytes={start}-{min(start + PART_BYTES, size) - 1}"
        body = client.get_object(Bucket=bucket, Key=key, Range=span)["Body"].read()
        answer = client.upload_part(Bucket=target[0], Key=target[1], UploadId=upload, PartNumber=number + 1, Body=body)
        return answer["ETag"]

    tags = list(pool.map(part, range(-(-size // PART_BYTES))))
    client.complete_multipart_upload(
        Bucket=target[0],
        Key=target[1],
        UploadId=upload,
        MultipartUpload={"Parts": [{"PartNumber": n, "ETag": tag} for n, tag in enumerate(tags, 1)]},
    )


if __name__ == "__main__":
    main()
