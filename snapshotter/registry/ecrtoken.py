"""A process that asks AWS for one ECR token: `python -m snapshotter.registry.ecrtoken HOST`, JSON on stdout.

botocore finds the credentials (environment, profile, web identity, container, IMDSv2) and the endpoint. It costs some
30 MB and a second, for an answer that is good for hours: so it lives and dies in here, and one that hangs is killed.

    {"username": ..., "secret": ..., "expires_at": seconds since the epoch}
    {"error": "none" | "failed" | "missing", "message": ...}
"""

from __future__ import annotations

import base64
import binascii
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from snapshotter.registry.ecrnames import EcrRegistry, parse_host


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the answer for the host that is the only argument."""
    (host,) = sys.argv[1:] if arguments is None else arguments
    registry = parse_host(host)
    if registry is None:
        answer: Mapping[str, object] = {"error": "failed", "message": f"{host} is not a host of ECR"}
    else:
        answer = _answer(registry)
    json.dump(answer, sys.stdout)
    return 0


def client_options(registry: EcrRegistry) -> dict[str, Any]:
    """Return what botocore's Config is told for `registry`."""
    return {
        "connect_timeout": 3,
        "read_timeout": 5,
        "retries": {"max_attempts": 2},
        "use_fips_endpoint": registry.fips,
        "use_dualstack_endpoint": registry.dual_stack,
    }


def _answer(registry: EcrRegistry) -> Mapping[str, object]:
    try:
        import botocore.exceptions  # noqa: PLC0415  an optional extra
        import botocore.session  # noqa: PLC0415
        from botocore.config import Config  # noqa: PLC0415
    except ImportError:
        return {"error": "missing", "message": "botocore is not installed (the extra `ecr`)"}
    service = "ecr-public" if registry.is_public else "ecr"
    try:
        client = botocore.session.get_session().create_client(
            service, region_name=registry.region, config=Config(**client_options(registry))
        )
        data = client.get_authorization_token()["authorizationData"]
        # Private ECR answers with a list of one, public ECR with that one.
        entry = data[0] if isinstance(data, list) else data
        username, _, secret = base64.b64decode(entry["authorizationToken"]).decode().partition(":")
        return {"username": username, "secret": secret, "expires_at": entry["expiresAt"].timestamp()}
    except botocore.exceptions.NoCredentialsError:
        return {
            "error": "none",
            "message": "no AWS credentials in environment, profile, container or instance",
        }
    except botocore.exceptions.ClientError as error:
        # Its text may hold what was sent; the code says enough.
        code = error.response.get("Error", {}).get("Code", "")
        return {"error": "failed", "message": f"{service} in {registry.region} answered {code or 'an error'}"}
    except (
        botocore.exceptions.BotoCoreError,
        LookupError,
        AttributeError,
        binascii.Error,
        ValueError,
    ) as error:
        return {"error": "failed", "message": f"{service} in {registry.region}: {type(error).__name__}"}


if __name__ == "__main__":
    sys.exit(main())
