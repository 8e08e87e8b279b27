"""Everything expires while a layer is read: ECR's token, and the presigned URLs behind it. No read may notice."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from snapshotter.errors import RegistryError
from snapshotter.fetch import control
from snapshotter.registry.client import RegistryClient
from snapshotter.registry.ecr import EcrKeychain
from snapshotter.registry.ecrnames import EcrRegistry
from snapshotter.registry.keychains import ChainKeychain
from tests.fetch.rig import Rig, make_layer
from tests.support.ecr import Aws
from tests.support.registry import Registry

TOKEN_SECONDS = 3.0
URL_SECONDS = 1.0
READ_SECONDS = 5.0
"""More than one token's life, and several URLs'."""

_HOST = "123456789012.dkr.ecr.eu-west-1.amazonaws.com"
# The helper goes by the name of ECR, the test's registry has an address.
_HELPER = ("sh", "-c", f"exec {sys.executable} -m snapshotter.registry.ecrtoken {_HOST}")


@contextmanager
def daemon_side(rig: Rig, registry: Registry) -> Iterator[RegistryClient]:
    """Answer the fetcher as the daemon does: one client, its keychain renewed in the background."""
    ready, stop = threading.Event(), trio.Event()
    parts: list[tuple[RegistryClient, trio.lowlevel.TrioToken]] = []

    async def main() -> None:
        ecr = EcrKeychain(command=_HELPER, timeout=30.0, parse=lambda _: EcrRegistry("eu-west-1", "1"))
        async with (
            RegistryClient(keychain=ChainKeychain(ecr=ecr)) as client,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(ecr.run)
            parts.append((client, trio.lowlevel.current_trio_token()))
            ready.set()
            await stop.wait()
            nursery.cancel_scope.cancel()

    thread = threading.Thread(target=trio.run, args=(main,))
    thread.start()
    assert ready.wait(60)
    client, token = parts[0]

    async def find(question: control.NeedSource) -> control.FromDaemon:
        try:
            source = await client.blob_source(registry.reference("app"), question.layer, renew=question.renew)
        except RegistryError as error:
            return control.NoSource(question.layer, str(error), error.temporary)
        return control.Source(question.layer, source)

    rig.source = lambda question: trio.from_thread.run(find, question, trio_token=token)
    try:
        yield client
    finally:
        rig.stop()
        token.run_sync_soon(stop.set)
        thread.join(60)


def test_a_whole_layer_is_read_while_tokens_and_urls_expire(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Aws(ttl=TOKEN_SECONDS) as aws:
        for name, value in aws.environ("environment", tmp_path).items():
            monkeypatch.setenv(name, value)
        with (
            Registry(auth=aws.registry, presigned_ttl=URL_SECONDS) as registry,
            # One span per request, so that each of them may find everything expired.
            Rig(tmp_path / "root", registry, options={"range_max_bytes": 1}) as rig,
            daemon_side(rig, registry),
        ):
            layer = rig.add(make_layer())
            server = rig.connect(layer)
            pause = READ_SECONDS / len(layer.spans)
            for span in range(len(layer.spans)):
                assert server.read(span) == layer.content(span)
                time.sleep(pause)  # a program that reads slowly is the subject
            assert rig.count("failures") == 0
            assert rig.count("source_renewals") >= 1
            assert len(aws.registry.issued) >= 2
