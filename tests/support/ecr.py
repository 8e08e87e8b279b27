"""AWS as far as ECR's tokens need it: the APIs of ECR and STS, an instance's and a container's metadata.

    with Aws(ttl=5.0) as aws, Registry(auth=aws.registry, presigned_ttl=2.0) as registry:
        os.environ.update(aws.environ("environment"))

`registry` is the registry's side: it takes the tokens that were given out as long as they live, and answers those
that are over as ECR does.
"""

from __future__ import annotations

import base64
import json
import re
import secrets
import time
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs

from tests.support.registry_auth import Ecr, json_reply
from tests.support.registry_faults import Fault
from tests.support.registry_server import HttpServer, Reply, Request

_KEYS = {
    "environment": "AKIAENVIRONMENT0",
    "profile": "AKIAPROFILE00000",
    "web identity": "AKIAWEBIDENTITY0",
    "container": "AKIACONTAINER000",
    "instance": "AKIAINSTANCE0000",
}
_ROLE = "role-of-the-instance"


class TimedEcr(Ecr):
    """The registry's side: any token that was issued is good until its time is over."""

    def __init__(self) -> None:
        super().__init__()
        self.issued: dict[str, float] = {}

    def issue(self, ttl: float) -> str:
        """Return a token that is good for `ttl` seconds."""
        token = secrets.token_urlsafe(24)
        self.issued[base64.b64encode(f"AWS:{token}".encode()).decode()] = time.time() + ttl
        self.secrets.append(token)
        return token

    def check(self, request: Request, repository: str, action: str) -> Reply | None:
        given = request.headers.get("authorization", "").removeprefix("Basic ")
        if time.time() < self.issued.get(given, 0.0):
            return None
        return (
            self.expire(request, repository, action)
            if given in self.issued
            else super().check(request, repository, action)
        )


class Aws:
    """The simulator. `sources` lists whose credentials asked for tokens, oldest first."""

    def __init__(self, ttl: float = 43200.0) -> None:
        self.ttl = ttl
        self.registry = TimedEcr()
        self.sources: list[str] = []
        self.services: list[str] = []
        self.broken = False
        """Whether tokens are refused."""
        self._server = HttpServer("aws", self._answer)
        self._session = secrets.token_urlsafe(12)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()

    def environ(self, source: str, directory: Path) -> dict[str, str]:
        """Return the environment in which botocore finds the credentials of `source` and nothing else."""
        url = self._server.url
        (directory / "none").touch()
        common = {
            "AWS_ENDPOINT_URL_ECR": url,
            "AWS_ENDPOINT_URL_ECR_PUBLIC": url,
            "AWS_ENDPOINT_URL_STS": url,
            "AWS_REGION": "eu-west-1",
            "AWS_CONFIG_FILE": str(directory / "none"),
            "AWS_SHARED_CREDENTIALS_FILE": str(directory / "none"),
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        return common | self._own(source, directory, url)

    def _own(self, source: str, directory: Path, url: str) -> dict[str, str]:
        match source:
            case "environment":
                return {"AWS_ACCESS_KEY_ID": _KEYS[source], "AWS_SECRET_ACCESS_KEY": "x"}
            case "profile":
                file = directory / "credentials"
                file.write_text(f"[mine]\naws_access_key_id={_KEYS[source]}\naws_secret_access_key=x\n")
                return {"AWS_SHARED_CREDENTIALS_FILE": str(file), "AWS_PROFILE": "mine"}
            case "web identity":
                file = directory / "identity"
                file.write_text("identity-token")
                return {"AWS_WEB_IDENTITY_TOKEN_FILE": str(file), "AWS_ROLE_ARN": "arn:aws:iam::1:role/r"}
            case "container":
                return {
                    "AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{url}/container",
                    "AWS_CONTAINER_AUTHORIZATION_TOKEN": "container-token",
                }
            case "instance":
                return {"AWS_EC2_METADATA_DISABLED": "false", "AWS_EC2_METADATA_SERVICE_ENDPOINT": url}
        return {}

    def _answer(self, request: Request, fault: Fault | None) -> Reply:
        target = request.headers.get("x-amz-target", "")
        if target.endswith(".GetAuthorizationToken"):
            return self._token(request, target)
        if request.method == "POST":
            return self._assume_role(request)
        if request.path == "/container":
            if request.headers.get("authorization") != "container-token":
                return json_reply(401, {})
            return self._keys("container")
        return self._metadata(request)

    def _token(self, request: Request, target: str) -> Reply:
        match = re.search(r"Credential=(\w+)/", request.headers.get("authorization", ""))
        known = {key: name for name, key in _KEYS.items()}
        if self.broken or match is None or match[1] not in known:
            return json_reply(400, {"__type": "AccessDeniedException", "message": "secret-looking text"})
        self.sources.append(known[match[1]])
        self.services.append("public" if target.startswith("SpencerFrontendService") else "private")
        token = base64.b64encode(f"AWS:{self.registry.issue(self.ttl)}".encode()).decode()
        entry = {"authorizationToken": token, "expiresAt": time.time() + self.ttl}
        data: object = entry if self.services[-1] == "public" else [entry]
        return Reply(
            200,
            json.dumps({"authorizationData": data}).encode(),
            {"Content-Type": "application/x-amz-json-1.1"},
        )

    def _assume_role(self, request: Request) -> Reply:
        form = {key: values[0] for key, values in parse_qs(request.body.decode()).items()}
        if form.get("Action") != "AssumeRoleWithWebIdentity" or form["WebIdentityToken"] != "identity-token":
            return json_reply(403, {})
        body = (
            '<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">'
            "<AssumeRoleWithWebIdentityResult><Credentials><SessionToken>s</SessionToken>"
            f"<SecretAccessKey>x</SecretAccessKey><Expiration>{_later()}</Expiration>"
            f"<AccessKeyId>{_KEYS['web identity']}</AccessKeyId></Credentials>"
            "</AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
        )
        return Reply(200, body.encode(), {"Content-Type": "text/xml"})

    def _metadata(self, request: Request) -> Reply:
        """IMDSv2: nothing without a session."""
        if request.method == "PUT" and request.path == "/latest/api/token":
            return Reply(200, self._session.encode(), {"X-Aws-Ec2-Metadata-Token-Ttl-Seconds": "60"})
        if request.headers.get("x-aws-ec2-metadata-token") != self._session:
            return json_reply(401, {})
        if request.path == "/latest/meta-data/iam/security-credentials/":
            return Reply(200, _ROLE.encode(), {"Content-Type": "text/plain"})
        if request.path == f"/latest/meta-data/iam/security-credentials/{_ROLE}":
            return self._keys("instance")
        return json_reply(404, {})

    def _keys(self, source: str) -> Reply:
        return json_reply(
            200,
            {
                "Code": "Success",
                "AccessKeyId": _KEYS[source],
                "SecretAccessKey": "x",
                "Token": "s",
                "Expiration": _later(),
            },
        )


def _later() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 3600))
