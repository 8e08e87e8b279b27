"""The composition root: makes every part, hands each what it needs, and runs them in order.

    root lock, former generation gone, zygote started (daemon/beginning.py) -> holder -> fetcher, keeper
      -> mounts restored (no network) -> /metrics, status -> gRPC (who sees it may ask for those) -> ready, watchdog
      -> start-up test, which the first pull waits for

SIGHUP reads the configuration again (daemon/reloading.py).

Everything ends when the process does: mounts stay (the holder has their descriptors), servers, fetcher and
zygote end with this generation.

Concurrency: one trio loop on the main thread; gRPC and /metrics bring threads of their own.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

import grpc
import trio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import HealthServicer

from snapshotter import __version__, heap, logs, reports
from snapshotter.api import snapshots_pb2, snapshots_pb2_grpc
from snapshotter.daemon import (
    diffids,
    generation,
    imageservice,
    inherited,
    reloading,
    selftest,
    status,
    timeline,
    watchdog,
    web,
)
from snapshotter.daemon.artifacts import ArtifactLimits, LayerArtifacts
from snapshotter.daemon.beginning import EMPTY_ROOT, HOLDER_SOCKET, Beginning
from snapshotter.daemon.catalog import Catalog
from snapshotter.daemon.config import Config, Settings
from snapshotter.daemon.credentials import Credentials, configured_hosts, registry_numbers
from snapshotter.daemon.discovery import Modes
from snapshotter.daemon.fetching import FetcherProcess
from snapshotter.daemon.health import Health
from snapshotter.daemon.localcontent import ContainerdArtifacts, LayoutArtifacts, LocalFirst, LocalStore
from snapshotter.daemon.metrics import Collector
from snapshotter.daemon.numbers import Numbers
from snapshotter.daemon.parallelpull import ParallelPulls, settings_of
from snapshotter.daemon.phases import Phases
from snapshotter.daemon.provider import Provider, ProviderSettings
from snapshotter.daemon.reference_metrics import ReferenceCollector
from snapshotter.daemon.service import SnapshotsService
from snapshotter.daemon.sockets import PATH_MAX, make_way
from snapshotter.daemon.sources import BlobSources
from snapshotter.daemon.unpacking import Unpacker
from snapshotter.errors import ConfigError, ProcessFailed
from snapshotter.fuse.forker import Forker
from snapshotter.fuse.holding import HolderClient
from snapshotter.fuse.keeper import Keeper
from snapshotter.fuse.mountpoint import MountSpec
from snapshotter.layer.store import LayerStore
from snapshotter.registry.client import RegistryClient
from snapshotter.registry.retry import RetryPolicy, Timeouts
from snapshotter.rest import Rest
from snapshotter.sdnotify import Notifier, watchdog_interval
from snapshotter.snapshot.directories import metadata_path
from snapshotter.snapshot.snapshotter import Snapshotter
from snapshotter.snapshot.store import SnapshotStore

_log = logging.getLogger(__name__)

_GRPC_SOCKET = "grpc.sock"
"""In the root: where gRPC listens when systemd has the socket that containerd knows."""

_PREPARED_AT_ONCE = 8
"""The most layers of an index that are prepared ahead at the same time: each may have a zTOC of 256 MiB in memory."""

_GRPC_THREADS = 32
"""containerd prepares one layer of an image after another; this is how many images may be pulled at once."""

_HOLDER_WAIT_S = 1.0

_GRACE_S = 2.0
"""For calls that are under way at the end; what waits for the network or for us is ended at once."""

_FIRST_RETEST_S = 2.0
"""After a start-up test that failed; doubles up to `_MAX_RETEST_S`. A test costs some 50 ms."""

_MAX_RETEST_S = 300.0


class App:
    """The daemon on one root."""

    def __init__(self, settings: Settings, config: Config, beginning: Beginning) -> None:
        self._settings = settings
        self._config = config
        self._lock = beginning.generation
        self._zygote = beginning.zygote
        self._root = root = settings.root
        self._address = settings.address.path or root / _GRPC_SOCKET
        self._log_level = settings.log_level or config.log_level
        self._inherited: socket.socket | None = None
        self._accepting = trio.CancelScope()
        self._phases = Phases()
        self._rest = Rest()
        self._numbers: Numbers
        self._hosts = configured_hosts(config)
        self._credentials = Credentials(config)
        self._keeper: Keeper
        self._fetcher: FetcherProcess
        self._provider: Provider
        self._stop_grpc: Callable[[], object]

    async def run(self) -> None:
        """Run until SIGTERM or SIGINT. Raises ConfigError, ProcessFailed, OSError, also in groups."""
        if len(os.fsencode(self._root / reports.STATUS)) > PATH_MAX:
            raise ConfigError(f"--root: its path is too long for the sockets in it: {str(self._root)!r}")
        if self._settings.address.is_inherited:
            self._inherited = inherited.take_listener()
        with ExitStack() as cleanup:
            make_way(str(self._address), "--address")
            holder = HolderClient(str(self._root / HOLDER_SOCKET))
            await trio.to_thread.run_sync(holder.connect)
            cleanup.callback(holder.close)
            async with RegistryClient(
                keychain=self._credentials.keychain,
                hosts=self._hosts,
                timeouts=self._timeouts(),
                retry=self._retry(),
            ) as client:
                await self._run(client, holder, cleanup)

    async def _run(self, client: RegistryClient, holder: HolderClient, cleanup: ExitStack) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            async with trio.open_nursery() as nursery:
                await self._start(client, holder, cleanup, nursery)
                async for number in signals:
                    if number == signal.SIGHUP:
                        await self._reload()
                        continue
                    _log.info("ending; mounts stay", extra={"signal": signal.Signals(number).name})
                    Notifier.from_environ().stopping()
                    break
                generation.become_the_last()
                self._accepting.cancel()
                self._provider.end()
                await trio.to_thread.run_sync(self._stop_grpc)
                nursery.cancel_scope.cancel()

    async def _start(
        self, client: RegistryClient, holder: HolderClient, cleanup: ExitStack, nursery: trio.Nursery
    ) -> None:
        """Make the parts and run them, in the order of the module's docstring."""
        root = self._root
        forker = Forker(
            str(root / EMPTY_ROOT), inherited_fds=[self._lock], log_level=self._log_level, first=self._zygote
        )
        sources = BlobSources(client, self._phases)
        store = SnapshotStore(metadata_path(root))
        self._fetcher = self._make_fetcher(sources, store)
        self._keeper = self._make_keeper(holder, forker)
        self._provider = self._make_provider(client, sources, forker, store, nursery)
        self._numbers = Numbers(
            keeper=self._keeper,
            fetcher=self._fetcher,
            provider=self._provider,
            store=store,
            phases=self._phases,
            registry=lambda: registry_numbers(client, self._hosts, self._credentials),
        )
        report = status.Status(
            holder=holder,
            forker=forker,
            fetcher=self._fetcher,
            keeper=self._keeper,
            not_lazy=self._why_not_lazy,
            resting=lambda: [name for name, host in client.statistics().hosts.items() if host.is_resting],
        )
        await nursery.start(self._keeper.run)
        nursery.start_soon(forker.run)
        nursery.start_soon(self._credentials.run)
        nursery.start_soon(self._fetcher.run)
        nursery.start_soon(self._watch_holder, holder)
        await self._provider.restore()
        nursery.start_soon(self._test_laziness)
        health = Health(self._address, store.last_id, self._fetcher, self._provider)
        self._serve_metrics(health, cleanup)
        events = timeline.Timeline(phases=self._phases, fetcher=self._fetcher, store=store)
        await nursery.start(status.serve, root / reports.STATUS, report.collect, self._provider.tested)
        await nursery.start(status.serve, root / reports.TRACE, events.collect)
        self._serve_grpc(Snapshotter(root, store, self._provider), cleanup)
        if self._inherited is not None:
            nursery.start_soon(inherited.forward, self._inherited, self._address, nursery, self._accepting)
        notifier = Notifier.from_environ()
        _log.info(
            "ready",
            extra={
                "address": str(self._settings.address),
                "version": __version__,
                "mounts": len(self._keeper.mounts),
            },
        )
        notifier.ready()
        nursery.start_soon(watchdog.watch, health, notifier, watchdog_interval())
        nursery.start_soon(self._rest.run)
        await trio.to_thread.run_sync(heap.settle)

    async def _reload(self) -> None:
        """Read the configuration again. Never raises: a running daemon is worth more than a new setting."""
        notifier = Notifier.from_environ()
        notifier.reloading()
        try:
            loaded = await trio.to_thread.run_sync(self._settings.load)
        except (ConfigError, OSError) as error:
            _log.error("configuration not reloaded; the old one stays", extra={"error": str(error)})
        else:
            for warning in loaded.warnings:
                _log.warning("configuration", extra={"warning": warning})
            self._apply(loaded.config)
        notifier.ready()

    def _apply(self, new: Config) -> None:
        changed = reloading.changed(self._config, new)
        self._config = reloading.with_live(self._config, new)
        self._log_level = self._settings.log_level or new.log_level
        logs.setup(self._log_level, log_format=self._config.log_format, role="daemon")
        self._provider.settings = self._provider_settings()
        self._keeper.set_limits(idle_timeout=new.fuse.idle_timeout_sec, read_budget=new.fuse.read_budget_sec)
        _log.info("configuration reloaded", extra={"changed": sorted(changed & reloading.LIVE)})
        if waiting := sorted(changed - reloading.LIVE):
            _log.warning("these keys take a restart, which disturbs no container", extra={"keys": waiting})

    def _make_fetcher(self, sources: BlobSources, store: SnapshotStore) -> FetcherProcess:
        return FetcherProcess(
            self._root,
            options=self._fetcher_options(),
            source_of=sources.answer,
            on_restart=lambda: self._keeper.fetcher_changed(),  # noqa: PLW0108 - the keeper is made after
            on_complete=partial(diffids.note_complete, store),
            inherited_fds=[self._lock],
        )

    def _make_keeper(self, holder: HolderClient, forker: Forker) -> Keeper:
        fuse = self._config.fuse
        return Keeper(
            holder=holder,
            forker=forker,
            gate=self._fetcher,
            idle_timeout=fuse.idle_timeout_sec,
            read_budget=fuse.read_budget_sec,
            read_ahead_kb=fuse.read_ahead_kb,
            getxattr_unsupported=fuse.getxattr_unsupported,
            on_gone=self._note_gone,
            mend=lambda spec: self._provider.mend(spec),  # noqa: PLW0108 - the provider is made after
        )

    def _make_provider(
        self,
        client: RegistryClient,
        sources: BlobSources,
        forker: Forker,
        store: SnapshotStore,
        nursery: trio.Nursery,
    ) -> Provider:
        config, root = self._config, self._root
        layers = LayerStore(root, tidy=True)
        artifacts = LocalFirst(self._local_store(), client)
        modes = Modes(v1=config.pull_modes.soci_v1.enable, v2=config.pull_modes.soci_v2.enable)
        limits = ArtifactLimits(
            config.layer.compile_memory_max_bytes, config.layer.compile_timeout_sec, config.prefetch.enable
        )
        pulls = settings_of(config, self._retry(), self._timeouts())
        unpacker = Unpacker(
            root, client, limits=pulls.limits, inherited_fds=[self._lock], programs=pulls.programs
        )
        return Provider(
            self._provider_settings(),
            root=root,
            layers=layers,
            store=store,
            catalog=Catalog(root, artifacts, modes, nursery, self._phases),
            artifacts=LayerArtifacts(layers, artifacts, forker, limits, nursery, self._phases),
            sources=sources,
            fetcher=self._fetcher,
            keeper=self._keeper,
            unpacker=unpacker,
            parallel=ParallelPulls(pulls, root=root, client=client, unpacker=unpacker, nursery=nursery),
            nursery=nursery,
            phases=self._phases,
            on_work=self._rest.disturb,
        )

    async def _test_laziness(self) -> None:
        """Test once, then until it succeeds: what was in the way may pass (memory, a module, a full disk).

        A start does not wait for that (the zygote is not there yet), the first pull does.
        """
        self._provider.not_lazy = await selftest.find_obstacle(self._keeper, self._root / "selftest")
        self._provider.tested.set()
        if not self._provider.not_lazy:
            return
        _log.error(
            "nothing is lazy on this host; images are pulled in full",
            extra={"reason": self._provider.not_lazy},
        )
        wait = _FIRST_RETEST_S
        while self._provider.not_lazy:
            await trio.sleep(wait)
            wait = min(2 * wait, _MAX_RETEST_S)
            self._provider.not_lazy = await selftest.find_obstacle(self._keeper, self._root / "selftest")
        _log.info("images are lazy on this host from now on")

    def _why_not_lazy(self) -> str:
        return self._provider.not_lazy if self._provider.tested.is_set() else "the start-up test is not over"

    async def _watch_holder(self, holder: HolderClient) -> None:
        """Give a holder that was started again what the old one had. While there is none, the mounts go on."""
        while True:
            await _ended(holder.pid)
            _log.error("holder ended; connecting to another", extra={"pid": holder.pid})
            try:
                holder.close()
                await trio.to_thread.run_sync(holder.connect)
                await self._keeper.holder_changed()
            except (ProcessFailed, OSError) as error:
                _log.error("no holder: mounts would not survive this daemon", extra={"error": str(error)})
                await trio.sleep(_HOLDER_WAIT_S)

    def _serve_grpc(self, snapshotter: Snapshotter, cleanup: ExitStack) -> None:
        cri = self._credentials.cri
        threads = _GRPC_THREADS + (0 if cri is None else imageservice.MAX_CALLS)
        server = grpc.server(ThreadPoolExecutor(threads, thread_name_prefix="grpc"))
        if cri is not None:
            images = imageservice.ImageService(self._config.cri_keychain.image_service_path, cri)
            server.add_generic_rpc_handlers([images])
            cleanup.callback(images.close)
        snapshots_pb2_grpc.add_SnapshotsServicer_to_server(SnapshotsService(snapshotter), server)
        health = HealthServicer()
        for name in ("", snapshots_pb2.DESCRIPTOR.services_by_name["Snapshots"].full_name):
            health.set(name, health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        self._address.parent.mkdir(parents=True, exist_ok=True)
        old = os.umask(0o117)
        try:
            server.add_insecure_port(f"unix://{self._address}")
        except RuntimeError as error:
            raise ConfigError(f"--address: cannot listen on {self._address}: {error}") from error
        finally:
            os.umask(old)
        server.start()
        self._stop_grpc = lambda: server.stop(_GRACE_S).wait()
        cleanup.callback(snapshotter.close)
        cleanup.callback(lambda: server.stop(grace=0).wait())

    def _serve_metrics(self, health: Health, cleanup: ExitStack) -> None:
        config = self._config
        if not config.metrics_address or config.no_prometheus:
            return
        collectors = Collector(self._numbers), ReferenceCollector(self._numbers)
        try:
            stop = web.serve(collectors, health.report, config.metrics_network, config.metrics_address)
        except OSError as error:
            raise ConfigError(
                f"metrics_address: cannot listen on {config.metrics_address}: {error.strerror or error}"
            ) from error
        cleanup.callback(stop)

    def _note_gone(self, spec: MountSpec, counters: Mapping[str, int]) -> None:
        self._numbers.retire(counters)
        if spec.snapshot_id != selftest.SELFTEST_ID:
            self._provider.gone(spec)

    def _local_store(self) -> LocalStore:
        content_store = self._config.content_store
        if content_store.type == "containerd":
            return ContainerdArtifacts(content_store.containerd_address)
        return LayoutArtifacts(self._root)

    # --- configuration, in the parts' own terms ---------------------------------------------------------------

    def _provider_settings(self) -> ProviderSettings:
        config = self._config
        return ProviderSettings(
            background=config.fetch.background,
            mount_timeout_s=config.mount_timeout_sec,
            min_layer_size=config.snapshotter.min_layer_size,
            prepared_at_once=min(max(config.max_concurrency, 0) or _PREPARED_AT_ONCE, _PREPARED_AT_ONCE),
        )

    def _timeouts(self) -> Timeouts:
        http = self._config.http
        return Timeouts(
            connect=http.dial_timeout_msec / 1000,
            read=http.response_header_timeout_msec / 1000,
            total=http.request_timeout_msec / 1000,
        )

    def _retry(self) -> RetryPolicy:
        retry = self._config.blob_retry
        return RetryPolicy(attempts=retry.attempts, first_wait=retry.first_wait, max_wait=retry.max_wait)

    def _fetcher_options(self) -> str:
        config = self._config
        return json.dumps(
            {
                "read_budget_s": config.fuse.read_budget_sec,
                "on_demand_connections": config.fetch.ondemand_connections,
                "background_connections": config.fetch.background_connections,
                "memory_bytes": config.fetch.inflight_max_bytes,
                "unreachable": config.fetch.unreachable,
                "background_bytes_per_s": config.fetch.max_background_bytes_per_sec,
                "background_bytes_per_s_per_image": config.fetch.max_background_bytes_per_sec_per_image,
                "range_timeout_s": float(config.blob.fetching_timeout_sec),
                "span_tries": 1 + config.blob.span_refetches,
                "cache_max_bytes": config.cache.max_bytes,
                "cache_min_free_bytes": config.cache.min_free_bytes,
                "log_level": self._log_level,
            }
        )


async def _ended(pid: int) -> None:
    """Return when the process has ended, which it may have long ago."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        await trio.lowlevel.wait_readable(pidfd)
    finally:
        os.close(pidfd)
