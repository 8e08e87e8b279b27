"""`soci-snapshotter-grpc status`: which process does what, and how every lazy layer is.

The daemon answers on a socket in its root (0600) with one JSON object and closes; the command asks, and
prints that, or a table.

Concurrency: trio in the daemon; the command is a plain program.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import trio

from snapshotter.daemon.fetching import FetcherProcess
from snapshotter.daemon.selftest import SELFTEST_ID
from snapshotter.daemon.sockets import make_way
from snapshotter.errors import InvalidLayerFile
from snapshotter.fuse.forker import Forker
from snapshotter.fuse.holding import HolderClient
from snapshotter.fuse.keeper import Keeper
from snapshotter.fuse.mountpoint import Mountpoint
from snapshotter.layer.spans import SpanView

_KNOWN_S = 5.0
"""How long an answer waits, after a start, for what is not known yet."""


class Status:
    """Collects what there is to tell."""

    def __init__(
        self,
        *,
        holder: HolderClient,
        forker: Forker,
        fetcher: FetcherProcess,
        keeper: Keeper,
        not_lazy: Callable[[], str],
        resting: Callable[[], Sequence[str]],
    ) -> None:
        self._holder = holder
        self._forker = forker
        self._fetcher = fetcher
        self._keeper = keeper
        self._not_lazy = not_lazy
        self._resting = resting

    def collect(self) -> dict[str, Any]:
        """Return pids by role, why nothing is lazy (if so), what cannot be reached, the cache, and every lazy mount.

        `circuits`: `blob_hosts_away` says how many hosts of blobs are not asked at the moment, `opened` how often
        that began since the daemon's start, `registries` names the registries whose API is left alone. Sizes are bytes.
        The start-up test's mount, which goes when the last mount namespace lets go of it, is none of a layer's.
        """
        fetched = self._fetcher.counters()
        return {
            "pids": {
                "daemon": os.getpid(),
                "holder": self._holder.pid,
                "zygote": self._forker.pid,
                "fetcher": self._fetcher.pid,
            },
            "lazy": not self._not_lazy(),
            "not_lazy_because": self._not_lazy(),
            "circuits": {
                "blob_hosts_away": fetched["hosts_away"],
                "opened": fetched["circuits_opened"],
                "registries": sorted(self._resting()),
            },
            "cache_bytes": fetched["cache_bytes"],
            "mounts": [
                _describe(each) for id_, each in sorted(self._keeper.mounts.items()) if id_ != SELFTEST_ID
            ],
        }


async def serve(
    path: Path,
    collect: Callable[[], Mapping[str, Any]],
    known: trio.Event | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer on the socket at `path` with what `collect` returns, as soon as that is `known`, until cancelled.

    It has started when the socket takes connections. Raises ConfigError, OSError.
    """
    make_way(str(path), "--root")
    listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await listener.bind(str(path))
    path.chmod(0o600)
    listener.listen(8)
    task_status.started()

    async def answer(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            if known is not None:
                with trio.move_on_after(_KNOWN_S):  # sooner than whoever asks gives up
                    await known.wait()
            report = await trio.to_thread.run_sync(collect)
            await stream.send_all(json.dumps(report).encode())
        await stream.aclose()

    with listener:
        await trio.serve_listeners(answer, [trio.SocketListener(listener)])


def _describe(mountpoint: Mountpoint) -> dict[str, Any]:
    spec = mountpoint.spec
    described: dict[str, Any] = {
        "snapshot": spec.snapshot_id,
        "layer": spec.layer,
        "target": spec.target,
        "state": str(mountpoint.state),
        "hibernated": mountpoint.state == "asleep",
        "pid": mountpoint.pid or None,
    }
    try:
        with open(spec.spans, "rb") as file:
            view = SpanView(file.fileno())
    except (OSError, InvalidLayerFile):
        return described | {"spans": None}
    described["spans"] = {state.name.lower(): count for state, count in view.counts().items()}
    described["verified"] = view.verified
    described["offline_after_s"] = view.offline_after
    described["fetched_bytes"], described["inflated_bytes"] = view.fetched_bytes, view.inflated_bytes
    view.close()
    return described


def render(report: Mapping[str, Any]) -> str:
    """Return the report as text for people."""
    lines = ["  ".join(f"{role} {pid or '-'}" for role, pid in report["pids"].items())]
    if not report["lazy"]:
        lines.append(f"NOT LAZY: {report['not_lazy_because']}")
    circuits = report["circuits"]
    if circuits["blob_hosts_away"] or circuits["registries"]:
        away = ", ".join(circuits["registries"]) or "none"
        lines.append(
            f"not asked at the moment: {circuits['blob_hosts_away']} hosts of blobs; registries: {away}"
        )
    lines.append(f"cache {report['cache_bytes'] / 1e6:.1f} MB")
    lines.append(
        f"{'SNAPSHOT':>8}  {'LAYER':19}  {'STATE':7}  {'PID':>8}  {'SPANS':>20}  {'MB':>8}  VERIFIED AFTER"
    )
    for mount in report["mounts"]:
        spans = mount["spans"]
        counts = f"{spans['inflated']}+{spans['fetched']} of {sum(spans.values())}" if spans else "?"
        size = f"{(mount['fetched_bytes'] + mount['inflated_bytes']) / 1e6:.1f}" if spans else "?"
        after = mount.get("offline_after_s")
        verified = "no" if not mount.get("verified") else "yes" if after is None else f"{after:.1f} s"
        lines.append(
            f"{mount['snapshot']:>8}  {mount['layer'][:19]}  {mount['state']:7}  {mount['pid'] or '-':>8}"
            f"  {counts:>20}  {size:>8}  {verified}"
        )
    return "\n".join(lines)
