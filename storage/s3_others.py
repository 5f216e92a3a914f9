"""Every other request to S3, through s3fs's client: rare ones, and all of a bucket whose requests need another signer.

Imported where it is needed, because s3fs takes most of a second to import.
"""

import asyncio
import os
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Any

import s3fs
from aiohttp import ClientError
from botocore.exceptions import HTTPClientError
from fsspec.asyn import sync

from tidemill.storage.remote import Transient
from tidemill.storage.s3_answers import check_body
from tidemill.storage.s3_session import aws_region


def ask(
    aws_variables: frozenset[tuple[str, str]], method: str, params: dict[str, Any], seconds: float, *, anonymous: bool
) -> dict[str, Any]:
    """One request, with the names of botocore; the `Body` of an answer is bytes, and checked.

    Raises:
        FAILURES, Transient: see `s3_errors`.
    """
    fs = _filesystem(os.getpid(), aws_variables, anonymous)
    answer: dict[str, Any] = sync(fs.loop, _request, fs, method, params, seconds)
    return answer


async def _request(fs: s3fs.S3FileSystem, method: str, params: dict[str, Any], seconds: float) -> dict[str, Any]:
    # aiohttp has no limit of its own for an upload: a server that stops reading would hold it for ever
    try:
        async with asyncio.timeout(seconds):
            answer: dict[str, Any] = await fs._call_s3(method, **params)
        if "Body" in answer:
            async with answer["Body"] as body:
                answer["Body"] = await body.read()
            check_body(answer)
    except TimeoutError as error:
        raise Transient(f"no answer within {seconds:.0f} s") from error
    except ClientError as error:
        raise HTTPClientError(error=error) from error
    if method in ("put_object", "complete_multipart_upload"):
        answer["Date"] = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
    if method == "list_objects_v2" and "IsTruncated" not in answer:
        raise Transient("an empty answer came")
    if method in ("get_object", "head_object", "put_object", "upload_part") and "ETag" not in answer:
        raise Transient("an answer without an ETag came, unlike any of S3: the port of a web server?")
    return answer


@lru_cache(maxsize=8)
def _filesystem(pid: int, aws_variables: frozenset[tuple[str, str]], anonymous: bool) -> s3fs.S3FileSystem:
    """One for each process, as it does not survive a fork, and each set of AWS variables, which it reads itself."""
    fs = s3fs.S3FileSystem(
        anon=anonymous,
        use_listings_cache=False,
        client_kwargs={"region_name": region} if (region := aws_region()) else {},
        skip_instance_cache=True,  # the cache ignores the AWS variables
        config_kwargs={
            "connect_timeout": 5,
            "read_timeout": 30,
            "max_pool_connections": 32,
            "retries": {"total_max_attempts": 1},  # S3Store retries; layers would multiply
        },
    )
    fs.retries = 1
    return fs
