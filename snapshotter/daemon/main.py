"""`soci-snapshotter-grpc`: the daemon, and the commands an operator runs beside it.

    soci-snapshotter-grpc                          the daemon
    soci-snapshotter-grpc status [--json]          processes and lazy mounts of the daemon on --root
    soci-snapshotter-grpc config default|dump|check
    soci-snapshotter-grpc install-check [--json]   what this host lacks, and how to mend it
    soci-snapshotter-grpc unmount --all            takes away what a stopped daemon left mounted
    soci-snapshotter-grpc holder                   keeps descriptors while the daemon is away; a unit of its own

Exit codes: 0, 1 for what went wrong (or is missing: install-check), 78 for a mistake in the configuration. A service
ends with 78 only after a while: what starts it again at once, and for ever, need not burn a core over a mistake, and the
unit cannot give up (RestartPreventExitStatus=), because then mending the mistake would not bring the mounts' readers back.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack

from snapshotter import logs, reports
from snapshotter.daemon.beginning import HOLDER_SOCKET, Beginning, begin
from snapshotter.daemon.config import ACTIONS, EXIT_CONFIG, Config, Settings, build_parser, run_config_command
from snapshotter.errors import ConfigError, SnapshotterError
from snapshotter.heap import use_one_heap
from snapshotter.sdnotify import Notifier

_log = logging.getLogger(__name__)

_MISTAKE_PAUSE_S = 3.0
"""Before a service that cannot start ends; a start costs some 0.3 s of processor time."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    try:
        settings = Settings.from_args(argv, parser=_parser())
        return _run(settings)
    except ConfigError as error:
        print(f"soci-snapshotter-grpc: {error}", file=sys.stderr, flush=True)
        if Notifier.from_environ().status(str(error)):
            time.sleep(_MISTAKE_PAUSE_S)
        return EXIT_CONFIG
    except (SnapshotterError, OSError) as error:
        print(f"soci-snapshotter-grpc: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = build_parser()
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    shown = commands.add_parser("status", help="processes and lazy mounts of a running daemon")
    shown.add_argument("--json", action="store_true", help="as one JSON object")
    configuration = commands.add_parser("config", help="show or check the configuration")
    configuration.add_argument("action", choices=ACTIONS)
    checked = commands.add_parser("install-check", help="what this host lacks, and how to mend it")
    checked.add_argument("--json", action="store_true", help="as one JSON object")
    unmounting = commands.add_parser("unmount", help="take the lazy mounts of a stopped daemon away")
    unmounting.add_argument(
        "--all", action="store_true", required=True, help="all of them; there is no other way"
    )
    unmounting.add_argument("--force", action="store_true", help="even those that containers read from")
    commands.add_parser("holder", help="keep descriptors while the daemon is away")
    return parser


def _run(settings: Settings) -> int:
    match settings.namespace.command:
        case "status":
            from snapshotter.daemon import status

            report = reports.ask(settings.root, reports.STATUS)
            print(json.dumps(report) if settings.namespace.json else status.render(report))
        case "config":
            path = settings.config_path if settings.is_config_explicit else None
            return run_config_command(settings.namespace.action, path)
        case "install-check":
            from snapshotter.daemon.install import install_check

            return install_check(settings, as_object=settings.namespace.json)
        case "unmount":
            from snapshotter.daemon.unmounting import unmount_all

            count = unmount_all(settings.root, settings.root / HOLDER_SOCKET, force=settings.namespace.force)
            print(f"{count} lazy mounts taken away")
        case "holder":
            settings.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            # In a fresh interpreter of the same pid: a holder needs next to nothing of what this one has read to get here.
            program = [sys.executable, "-m", "snapshotter.fuse.holder", str(settings.root / HOLDER_SOCKET)]
            os.execv(program[0], program)  # noqa: S606 - no shell is wanted
        case _:
            _daemon(settings)
    return 0


def _daemon(settings: Settings) -> None:
    loaded = settings.load()
    config = loaded.config
    logs.setup(settings.log_level or config.log_level, log_format=config.log_format, role="daemon")
    use_one_heap()  # a pull's large replies come to many threads, and would stay in the heap of each
    faulthandler.enable()  # the watchdog ends a stuck daemon by SIGABRT: then the journal says where it hung
    for warning in loaded.warnings:
        _log.warning("configuration", extra={"warning": warning})
    with ExitStack() as cleanup:
        beginning = begin(settings.root, settings.log_level or config.log_level, cleanup)
        _run_app(settings, config, beginning)


def _run_app(settings: Settings, config: Config, beginning: Beginning) -> None:
    import trio

    from snapshotter.daemon.app import App

    try:
        trio.run(App(settings, config, beginning).run)
    except BaseExceptionGroup as group:
        known = _known_cause(group)
        if known is None:
            raise
        raise known from group


def _known_cause(group: BaseExceptionGroup[BaseException]) -> SnapshotterError | OSError | None:
    """Return the error that ended the daemon, out of the nurseries' groups; None when it is a surprise."""
    cause: BaseException = group
    while isinstance(cause, BaseExceptionGroup) and len(cause.exceptions) == 1:
        cause = cause.exceptions[0]
    return cause if isinstance(cause, SnapshotterError | OSError) else None


if __name__ == "__main__":
    sys.exit(main())
