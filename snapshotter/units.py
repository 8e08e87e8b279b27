"""Types of the quantities that are easiest to confuse, so that mypy keeps them apart.

Every range in the project is half open, `[start, end)`; sizes are bytes, times are seconds.
"""

from __future__ import annotations

import hashlib
import re
from typing import NewType

Digest = NewType("Digest", str)
"""An OCI digest, `sha256:<64 lower-case hex digits>`; the only algorithm in use."""

SpanId = NewType("SpanId", int)
"""Number of a span within its layer, from 0."""

CompressedOffset = NewType("CompressedOffset", int)
"""Byte offset in the layer blob as the registry stores it."""

UncompressedOffset = NewType("UncompressedOffset", int)
"""Byte offset in the tar stream."""

NodeId = NewType("NodeId", int)
"""Inode number within one layer; 1 is the root."""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def parse_digest(text: str) -> Digest:
    """Return `text` as a digest. Raises ValueError when it is not `sha256:<64 hex>`."""
    if _DIGEST.fullmatch(text) is None:
        raise ValueError(f"not a sha256 digest: {text!r}")
    return Digest(text)


def sha256_digest(data: bytes | bytearray | memoryview) -> Digest:
    """Return the digest of `data`."""
    return Digest("sha256:" + hashlib.sha256(data).hexdigest())


def digest_hex(digest: Digest) -> str:
    """Return the hex half of a digest, as used in file names."""
    return digest.partition(":")[2]
