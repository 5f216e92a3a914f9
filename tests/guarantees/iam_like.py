"""The tests' proxy as the door of an AWS bucket: what a policy of docs/policies/ does not allow, or denies, is answered 403.

Only what those policies use of IAM is known here: `Allow` and `Deny`, actions, resources with `*`, and the condition `Null` on
s3:if-match and s3:if-none-match. As on AWS

- a deny goes before each allow, and what nothing allows is denied;
- a DELETE with If-Match needs s3:GetObject as well, and so does a PUT with it;
- a GET or HEAD of nothing is 403, not 404, without s3:ListBucket on the bucket.

https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes-enforce.html and conditional-delete-enforce.html there.
"""

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from aiohttp import hdrs, web

from tests.guarantees.minio_like import denied
from tests.guarantees.proxy import Answer, FaultProxy

POLICIES: Final = Path(__file__).parents[2] / "docs/policies"
CONDITIONS: Final = {"s3:if-match": hdrs.IF_MATCH, "s3:if-none-match": hdrs.IF_NONE_MATCH}
BUCKET: Final = "my-bucket"
"""The bucket's name in docs/policies/."""


def policy(name: str, place: str) -> list[dict[str, Any]]:
    """The statements of docs/policies/`name`.json, about `place` (bucket/prefix) in place of the bucket that they name."""
    text = (POLICIES / f"{name}.json").read_text()
    bucket = place.partition("/")[0]
    text = text.replace(f'"arn:aws:s3:::{BUCKET}"', f'"arn:aws:s3:::{bucket}"')
    return json.loads(text.replace(f"arn:aws:s3:::{BUCKET}/", f"arn:aws:s3:::{place}/"))["Statement"]


def actions(request: web.Request) -> list[tuple[str, str]]:
    """(action, resource) of each permission that AWS asks for."""
    bucket, _, key = request.path[1:].partition("/")
    place = f"arn:aws:s3:::{bucket}"
    if not key:
        assert request.method in (hdrs.METH_GET, hdrs.METH_HEAD), f"{request.method} {request.path_qs}"
        listed = {"versions": "s3:ListBucketVersions", "uploads": "s3:ListBucketMultipartUploads"}
        return [(next((action for name, action in listed.items() if name in request.query), "s3:ListBucket"), place)]
    if request.method == hdrs.METH_DELETE and "uploadId" in request.query:
        return [("s3:AbortMultipartUpload", f"{place}/{key}")]
    version = "Version" if "versionId" in request.query else ""
    verb = {"GET": "Get", "HEAD": "Get", "PUT": "Put", "POST": "Put", "DELETE": "Delete"}[request.method]
    needed = [(f"s3:{verb}Object{version}", f"{place}/{key}")]
    if verb in ("Put", "Delete") and hdrs.IF_MATCH in request.headers:
        needed.append(("s3:GetObject", f"{place}/{key}"))
    return needed


def allowed(statements: Sequence[Mapping[str, Any]], action: str, resource: str, headers: Mapping[str, str]) -> bool:
    """What IAM decides of one permission."""
    holding = [statement for statement in statements if _holds(statement, action, resource, headers)]
    return bool(holding) and all(statement["Effect"] == "Allow" for statement in holding)


def _holds(statement: Mapping[str, Any], action: str, resource: str, headers: Mapping[str, str]) -> bool:
    conditions = statement.get("Condition", {"Null": {}})
    assert conditions.keys() == {"Null"}
    return (
        action in several(statement["Action"])
        and any(fnmatchcase(resource, pattern) for pattern in several(statement["Resource"]))
        and all((CONDITIONS[name] not in headers) == (absent == "true") for name, absent in conditions["Null"].items())
    )


def several(one_or_more: str | list[str]) -> list[str]:
    return [one_or_more] if isinstance(one_or_more, str) else one_or_more


class IamLike(FaultProxy):
    """Forwards what its `statements` allow."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint)
        self.statements: list[dict[str, Any]] = []
        self.used: set[str] = set()
        """The actions of all requests so far."""
        self.refused: list[str] = []
        """`METHOD /bucket/key` of each request that was not forwarded."""

    async def _forward(self, request: web.Request, data: bytes) -> Answer:
        needed = actions(request)
        self.used |= {action for action, _ in needed}
        if not all(allowed(self.statements, action, place, request.headers) for action, place in needed):
            self.refused.append(f"{request.method} {request.path}")
            return denied(request)
        answer = await super()._forward(request, data)
        bucket = f"arn:aws:s3:::{request.path[1:].partition('/')[0]}"
        if answer.status == 404 and not allowed(self.statements, "s3:ListBucket", bucket, request.headers):
            return denied(request)
        return answer
