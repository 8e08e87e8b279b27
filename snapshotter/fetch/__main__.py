"""The fetcher process: `python -m snapshotter.fetch --control FD --root PATH --counters FD --events FD --options JSON`.

It lives as long as the daemon at the other end of its control socket: when that hangs up, or on SIGTERM, the
span files are marked clean and the process is gone, whatever its threads are doing. Killed in any other way it
leaves every span valid or missing; the next fetcher hashes what it finds before anybody reads it.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import trio

from snapshotter import logs
from snapshotter.counters import CounterPage
from snapshotter.errors import ConfigError
from snapshotter.events import EventRing
from snapshotter.fetch.counters import NAMES
from snapshotter.fetch.options import Options
from snapshotter.fetch.service import Service
from snapshotter.heap import settle, use_one_heap
from snapshotter.layer.store import LayerStore

SWITCH_INTERVAL = 0.0005
"""Seconds for which a thread may keep the interpreter from another. The default of 5 ms is what a message would
wait for behind a thread that computes; with 0.5 ms the p50 beside a download falls from 57 to 36 us."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a fetcher until its daemon hangs up; return the exit code."""
    parser = argparse.ArgumentParser(prog="snapshotter.fetch")
    parser.add_argument("--control", type=int, required=True, help="descriptor of the control socket")
    parser.add_argument("--root", type=Path, required=True, help="state directory of the daemon")
    parser.add_argument("--counters", type=int, required=True, help="descriptor of the counter page")
    parser.add_argument("--events", type=int, required=True, help="descriptor of the ring of events")
    parser.add_argument("--options", default="{}", help="options as a JSON object")
    chosen = parser.parse_args(arguments)
    try:
        options = Options.from_json(chosen.options)
        logs.setup(options.log_level, role="fetcher")
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 78
    sys.setswitchinterval(SWITCH_INTERVAL)
    use_one_heap()
    counters = CounterPage(chosen.counters, NAMES, writable=True)
    events = EventRing(chosen.events, writable=True)
    service = Service(
        socket.socket(fileno=chosen.control), LayerStore(chosen.root), counters, events, options
    )
    settle()
    trio.run(_until_terminated, service)
    logging.shutdown()
    return 0


async def _until_terminated(service: Service) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_terminate, service)
        await service.run()
        nursery.cancel_scope.cancel()


async def _terminate(service: Service) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            service.stop()
            return


if __name__ == "__main__":
    # Not sys.exit: threads may be in the middle of a request that takes long, and nobody waits for it.
    code = main()
    sys.stderr.flush()
    os._exit(code)
