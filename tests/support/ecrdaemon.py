"""The daemon in a world in which ECR is at 127.0.0.1, where tests have their registry.

`python -m tests.support.ecrdaemon` takes the daemon's arguments. Tokens are asked for as in production, by botocore, in
the name of a registry of ECR's: only the address that they are for is another one.
"""

from __future__ import annotations

import sys
from functools import partial

from snapshotter.daemon import credentials
from snapshotter.registry.ecr import EcrKeychain
from snapshotter.registry.ecrnames import EcrRegistry

HOST = "123456789012.dkr.ecr.eu-west-1.amazonaws.com"


def parse(host: str) -> EcrRegistry | None:
    """Return what the name of the test's registry says, None for another host."""
    return EcrRegistry("eu-west-1", "1") if host.startswith("127.0.0.1:") else None


if __name__ == "__main__":
    from snapshotter.daemon.main import main

    helper = ("sh", "-c", f"exec {sys.executable} -m snapshotter.registry.ecrtoken {HOST}")
    setattr(credentials, EcrKeychain.__name__, partial(EcrKeychain, command=helper, parse=parse))
    sys.exit(main())
