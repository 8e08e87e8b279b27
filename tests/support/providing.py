"""The layer provider with everything below it real: registry, holder, zygote, fetcher and mounts, without containerd.

    with Registry() as registry:
        image = publish(registry, [make_tar({"a": b"A"})])

        async def test(rig: Providing) -> None:
            provided = await rig.prepare(image, 0)
            assert await rig.read(1, "a") == b"A"

        providing(workdir, registry, test)

Lazy files are read by child processes only, because this process has the descriptors of their mounts.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio

from snapshotter.daemon import diffids
from snapshotter.daemon.artifacts import ArtifactLimits, LayerArtifacts
from snapshotter.daemon.catalog import Catalog
from snapshotter.daemon.config import Config
from snapshotter.daemon.discovery import Modes
from snapshotter.daemon.fetching import FetcherProcess
from snapshotter.daemon.parallelpull import ParallelPulls, ParallelSettings, settings_of
from snapshotter.daemon.phases import Phases
from snapshotter.daemon.provider import Provider, ProviderSettings
from snapshotter.daemon.sources import BlobSources
from snapshotter.daemon.unpacking import Unpacker
from snapshotter.fuse.forker import Forker
from snapshotter.fuse.holding import HolderClient
from snapshotter.fuse.keeper import Keeper
from snapshotter.fuse.mountpoint import State
from snapshotter.layer.store import LayerStore
from snapshotter.registry.client import RegistryClient
from snapshotter.registry.hosts import Hosts
from snapshotter.registry.retry import DEFAULT_RETRY, DEFAULT_TIMEOUTS
from snapshotter.snapshot.directories import metadata_path, snapshots_path
from snapshotter.snapshot.layers import LayerRequest, Provided
from snapshotter.snapshot.store import SnapshotStore
from snapshotter.units import Digest
from tests.support.background import background
from tests.support.indexed import IndexedImage
from tests.support.registry import Registry
from tests.support.registry_clients import client_for


@dataclass(frozen=True)
class Options:
    """How the provider is set up; times in seconds."""

    background: bool = False
    mount_timeout: float = 20.0
    min_layer_size: int = 0
    read_budget: float = 10.0
    modes: Modes = field(default_factory=lambda: Modes(v1=True, v2=True))
    processes: bool = True
    """Whether there are a zygote and a fetcher; what is left to the client needs none."""
    parallel: ParallelSettings = field(
        default_factory=lambda: settings_of(Config(), DEFAULT_RETRY, DEFAULT_TIMEOUTS)
    )
    leave: bool = False
    """Only stop at the end, as a daemon does: mounts and holder stay."""
    hosts: Hosts | None = None
    """The registry and its mirrors, where there are some."""


@dataclass
class Providing:
    """What a test has in hand."""

    root: Path
    provider: Provider
    keeper: Keeper
    fetcher: FetcherProcess
    forker: Forker
    store: SnapshotStore
    layers: LayerStore
    holder: HolderClient
    client: RegistryClient

    def directory(self, snapshot_id: int) -> Path:
        """Return the top directory of a snapshot."""
        return snapshots_path(self.root) / str(snapshot_id) / "fs"

    async def prepare(
        self,
        image: IndexedImage,
        layer: int = 0,
        *,
        snapshot_id: int = 0,
        parents: tuple[int, ...] = (),
        labels: Mapping[str, str] | None = None,
    ) -> Provided:
        """Ask for a layer as the snapshotter does; its id is its position plus one unless given."""
        number = snapshot_id or layer + 1
        self.directory(number).mkdir(parents=True, exist_ok=True)
        request = LayerRequest(
            number,
            self.directory(number),
            parents,
            image.labels(layer) if labels is None else labels,
            "default",
        )
        return await trio.to_thread.run_sync(self.provider.provide, request)

    async def release(self, snapshot_id: int) -> bool:
        """Take a snapshot's directory away, as Cleanup does."""
        return await trio.to_thread.run_sync(self.provider.release, snapshot_id, self.directory(snapshot_id))

    async def read(self, snapshot_id: int, name: str, seconds: float = 60) -> bytes:
        """Return a file's content; raises CalledProcessError when it cannot be read."""
        with trio.fail_after(seconds):
            result = await trio.run_process(
                ["cat", str(self.directory(snapshot_id) / name)], capture_stdout=True, capture_stderr=True
            )
        return result.stdout

    async def failure(self, snapshot_id: int, name: str) -> str:
        """Return what `cat` says of a file that must not be readable."""
        try:
            content = await self.read(snapshot_id, name)
        except subprocess.CalledProcessError as error:
            return str(error.stderr.decode())
        raise AssertionError(f"{name} could be read: {content[:100]!r}")

    def cached(self) -> list[Digest]:
        """Return the layers that have files."""
        return self.layers.layers()


def providing(
    root: Path,
    registry: Registry,
    test: Callable[[Providing], Awaitable[None]],
    options: Options | None = None,
) -> None:
    """Run `test` with a provider on `root`; at the end nothing of it is left, unless the options say so."""

    async def main() -> None:
        async with provider_on(root, registry, options or Options()) as rig:
            with trio.fail_after(180):
                await test(rig)

    trio.run(main)


@asynccontextmanager
async def provider_on(root: Path, registry: Registry, options: Options) -> AsyncIterator[Providing]:
    """Run a provider below `root`."""
    snapshots_path(root).mkdir(parents=True, exist_ok=True)
    holder = HolderClient(str(root / "h.sock"))
    await trio.to_thread.run_sync(holder.connect)
    store = SnapshotStore(metadata_path(root))
    keepers: list[Keeper] = []
    try:
        async with client_for(registry, hosts=options.hosts) as client, background() as nursery:
            rig = _compose(root, client, holder, store, options, nursery)
            keepers.append(rig.keeper)
            await nursery.start(rig.keeper.run)
            if options.processes:
                nursery.start_soon(rig.forker.run)
                nursery.start_soon(rig.fetcher.run)
            try:
                yield rig
            finally:
                with trio.CancelScope(shield=True), trio.move_on_after(60):
                    await (_settle if options.leave else _take_down)(rig.keeper)
    finally:
        for mountpoint in keepers[0].mounts.values():
            os.close(mountpoint.fd)
            os.close(mountpoint.counters_fd)
        pid = holder.pid
        holder.close()
        store.close()
        if not options.leave:
            os.kill(pid, signal.SIGKILL)


def _compose(
    root: Path,
    client: RegistryClient,
    holder: HolderClient,
    store: SnapshotStore,
    options: Options,
    nursery: trio.Nursery,
) -> Providing:
    parts: list[Providing] = []
    phases = Phases()
    sources = BlobSources(client, phases)
    forker = Forker(str(root / "empty"), log_level="fatal")
    fetcher = FetcherProcess(
        root,
        options=json.dumps({"read_budget_s": options.read_budget, "log_level": "fatal"}),
        source_of=sources.answer,
        on_restart=lambda: parts[0].keeper.fetcher_changed(),  # noqa: PLW0108 - the keeper is made after
        on_complete=partial(diffids.note_complete, store),
    )
    keeper = Keeper(
        holder=holder,
        forker=forker,
        gate=fetcher,
        idle_timeout=60.0,
        read_budget=options.read_budget,
        read_ahead_kb=128,
        on_gone=lambda spec, _counters: parts[0].provider.gone(spec),
        mend=lambda spec: parts[0].provider.mend(spec),  # noqa: PLW0108 - the provider is made after
    )
    layers = LayerStore(root, tidy=True)
    unpacker = Unpacker(root, client)
    provider = Provider(
        ProviderSettings(options.background, options.mount_timeout, options.min_layer_size, 8),
        root=root,
        layers=layers,
        store=store,
        catalog=Catalog(root, client, options.modes, nursery, phases),
        artifacts=LayerArtifacts(layers, client, forker, ArtifactLimits(1 << 30, 30.0), nursery, phases),
        sources=sources,
        fetcher=fetcher,
        keeper=keeper,
        unpacker=unpacker,
        parallel=ParallelPulls(
            options.parallel, root=root, client=client, unpacker=unpacker, nursery=nursery
        ),
        nursery=nursery,
        phases=phases,
    )
    provider.tested.set()
    parts.append(Providing(root, provider, keeper, fetcher, forker, store, layers, holder, client))
    return parts[0]


async def _settle(keeper: Keeper) -> None:
    """Wait for the servers that were woken."""
    while any(each.state is not State.AWAKE for each in keeper.mounts.values()):
        await trio.sleep(0.01)


async def _take_down(keeper: Keeper) -> None:
    for snapshot_id in list(keeper.mounts):
        await keeper.unmount(snapshot_id)
    while keeper.mounts:
        await trio.sleep(0.01)
