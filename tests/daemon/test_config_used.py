"""No setting is a lie: each is read by somebody."""

import re
from pathlib import Path

import pytest

import snapshotter
from snapshotter.daemon.config import Config
from snapshotter.daemon.config.keys import Table, Value, keys_of

PACKAGE = Path(snapshotter.__file__).parent
OUTSIDE = "\n".join(
    path.read_text()
    for path in PACKAGE.rglob("*.py")
    if not path.is_relative_to(PACKAGE / "daemon" / "config")
)

# Values that are read through a property of their table.
READ_AS: dict[tuple[str, ...], str] = {
    ("http", "max_retries"): r"\.(blob_retry|http\.retry)\b",
    ("http", "min_wait_msec"): r"\.(blob_retry|http\.retry)\b",
    ("http", "max_wait_msec"): r"\.(blob_retry|http\.retry)\b",
    ("blob", "max_retries"): r"\.blob_retry\b",
    ("blob", "min_wait_msec"): r"\.blob_retry\b",
    ("blob", "max_wait_msec"): r"\.blob_retry\b",
    ("pull_modes", "parallel_pull_unpack", "concurrent_download_chunk_size"): r"\.download_chunk_bytes\b",
    ("blob", "max_span_verification_retries"): r"\bblob\.span_refetches\b",
}


def attributes(table: type = Config, at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the attributes that lead to each value."""
    found = []
    for key in keys_of(table):
        path = (*at, key.attribute)
        if isinstance(key.description, Table):
            found += attributes(key.description.type, path)
        elif isinstance(key.description, Value):
            found.append(path)
    return found


def is_read(path: tuple[str, ...]) -> bool:
    """Return whether code outside the package has `table.attribute`, or its property in seconds."""
    attribute = re.sub(r"_msec$", "(_msec)?", path[-1])
    usual = rf"\b{path[-2] if len(path) > 1 else 'config'}\.{attribute}\b"
    return re.search(READ_AS.get(path, usual), OUTSIDE) is not None


@pytest.mark.parametrize("path", attributes(), ids=".".join)
def test_a_value_is_read(path: tuple[str, ...]) -> None:
    assert is_read(path), "read it, or move it to reference.WITHOUT_EFFECT"
