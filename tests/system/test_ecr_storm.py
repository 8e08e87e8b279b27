"""A container's reads while everything of ECR's expires all the time: tokens of five seconds, URLs of two."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from snapshotter.errors import AlreadyExists
from tests.support.ecr import Aws
from tests.support.indexed import SPAN_SIZE, publish
from tests.support.lazylayer import make_tar
from tests.support.process import Daemon
from tests.support.registry import Registry
from tests.support.snapshots_client import RemoteSnapshotter

TOKEN_SECONDS = 5.0
URL_SECONDS = 2.0
READ_SECONDS = 12.0

CONTENT = random.Random(31).randbytes(300 * SPAN_SIZE)

# Reads a file to its end, a span's length at a time in an order that nothing foretells, and says what it read.
READER = """
import hashlib, json, os, random, sys, time
path, piece, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
fd = os.open(path, os.O_RDONLY)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
starts = list(range(0, os.fstat(fd).st_size, piece))
parts = {}
for start in random.Random(3).sample(starts, len(starts)):
    parts[start] = os.pread(fd, piece, start)
    time.sleep(seconds / len(starts))
print(hashlib.sha256(b"".join(parts[start] for start in starts)).hexdigest())
"""


class EcrDaemon(Daemon):
    """The daemon for which the test's registry is ECR."""

    program = "tests.support.ecrdaemon"


@pytest.fixture
def aws() -> Iterator[Aws]:
    with Aws(ttl=TOKEN_SECONDS) as aws:
        yield aws


def test_a_whole_layer_is_read_through_its_mount_while_everything_expires(
    workdir: Path, aws: Aws, fuse: None
) -> None:
    environ = {**aws.environ("environment", workdir), "DOCKER_CONFIG": str(workdir)}
    with Registry(auth=aws.registry, presigned_ttl=URL_SECONDS) as registry, ExitStack() as stack:
        image = publish(registry, [make_tar({"big": CONTENT})])
        config = {"fetch": {"background": False}, "snapshotter": {"min_layer_size": 0}}
        daemon = EcrDaemon(workdir / "soci", config, env=environ)
        stack.callback(daemon.cleanup)
        daemon.start()
        channel = stack.enter_context(grpc.insecure_channel(f"unix:{daemon.address}"))
        snapshotter = RemoteSnapshotter(channel)
        with pytest.raises(AlreadyExists):  # which says that the layer is lazy
            snapshotter.prepare("extract", labels=image.labels())
        (mount,) = snapshotter.view("view", image.labels()["containerd.io/snapshot.ref"])
        told = subprocess.run(
            [sys.executable, "-c", READER, f"{mount.source}/big", str(SPAN_SIZE), str(READ_SECONDS)],
            check=True, capture_output=True, text=True, timeout=120,
        ).stdout  # fmt: skip
        assert told.split() == [hashlib.sha256(CONTENT).hexdigest()]
        numbers = daemon.metrics()
        assert numbers["soci_fetch_source_renewals_total"] >= 3
        assert numbers["soci_fetch_failures_total"] == 0
        assert len(aws.registry.issued) >= READ_SECONDS / TOKEN_SECONDS
        assert not [each for each in daemon.records() if each.get("level") == "error"]
        text = json.dumps([daemon.records(), daemon.metrics()])
        assert not [secret for secret in aws.registry.secrets if secret in text]
