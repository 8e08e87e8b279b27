"""Names of the counters that layer servers keep, one page per mount (see snapshotter/counters.py)."""

from __future__ import annotations

REQUEST_KINDS = (
    "lookup", "getattr", "readlink", "open", "read", "release", "opendir", "readdir", "releasedir",
    "statfs", "getxattr", "listxattr", "flush", "forget", "other",
)  # fmt: skip

NAMES = (
    "adoptions",  # times a server took the mount over
    "read_bytes",  # bytes handed to the kernel
    "spans_local",  # spans of reads that were inflated already
    "spans_awaited",  # spans that a read had to wait for
    "reads_waiting",  # gauge: reads that wait for a span
    "wait_us",  # microseconds that reads have waited for spans, in all
    "slow_reads_1s",  # reads that waited longer than a second
    "slow_reads_10s",  # … than ten
    "given_up_requests",  # requests that no server survived, answered with EIO by the keeper
    "header_mismatches",  # files whose tar header is not what the zTOC says
    *(f"requests_{kind}" for kind in REQUEST_KINDS),
    *(f"failures_{kind}" for kind in REQUEST_KINDS),
)
