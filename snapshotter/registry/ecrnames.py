"""What the host name of an ECR registry says: account, region, and the kind of endpoint. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_PRIVATE: Final = re.compile(
    r"(?P<account>\d{12})\.dkr(?P<dual>-|\.)ecr(?P<fips>-fips)?\.(?P<region>[a-z0-9]+(?:-[a-z0-9]+)+)"
    r"\.(?P<suffix>[a-z0-9.-]+)"
)
_SUFFIXES: Final = frozenset({
    "amazonaws.com", "amazonaws.com.cn", "amazonaws.eu",
    "c2s.ic.gov", "sc2s.sgov.gov", "cloud.adc-e.uk", "csp.hci.ic.gov",
})  # fmt: skip
"""Of the partitions aws and aws-us-gov, aws-cn, aws-eusc, aws-iso, -iso-b, -iso-e, -iso-f."""
_DUAL_STACK_SUFFIXES: Final = frozenset({"on.aws", "on.amazonwebservices.com.cn"})
_PUBLIC: Final = frozenset({"public.ecr.aws", "ecr-public.aws.com"})
PUBLIC_REGION: Final = "us-east-1"
"""Where tokens for public ECR are given out, wherever they are used."""


@dataclass(frozen=True, slots=True)
class EcrRegistry:
    """A registry of ECR, as its name tells it."""

    region: str
    account: str = ""
    """Empty for public ECR."""
    fips: bool = False
    dual_stack: bool = False

    @property
    def is_public(self) -> bool:
        """Whether it is public ECR."""
        return not self.account


def parse_host(host: str) -> EcrRegistry | None:
    """Return what `host` says, None when it is not ECR."""
    if host in _PUBLIC:
        return EcrRegistry(PUBLIC_REGION)
    match = _PRIVATE.fullmatch(host)
    if match is None:
        return None
    # `dkr-ecr` is the spelling of names that have IPv6 addresses too; they lie in domains of their own.
    dual_stack = match["dual"] == "-"
    if match["suffix"] not in (_DUAL_STACK_SUFFIXES if dual_stack else _SUFFIXES):
        return None
    return EcrRegistry(match["region"], match["account"], match["fips"] is not None, dual_stack)
