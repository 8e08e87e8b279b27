"""A kernel before Linux 6.9, as far as we can tell: FUSE_NOTIFY_RESEND is not offered, so it is never used.

`python -m tests.support.oldkernel` is the daemon on such a kernel, with the daemon's arguments.
"""

from __future__ import annotations

import sys

from snapshotter.fuse import kernel

_parse_init = kernel.parse_init


def parse_init(data: bytes) -> tuple[int, kernel.Init]:
    """Return what `kernel.parse_init` does, without the offer."""
    unique, init = _parse_init(data)
    return unique, init._replace(flags=init.flags & ~kernel.Flag.HAS_RESEND)


if __name__ == "__main__":
    from snapshotter.daemon.main import main

    kernel.parse_init = parse_init
    sys.exit(main())
