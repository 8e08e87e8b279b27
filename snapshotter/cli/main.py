"""The entry point of `soci`: global options, the list of commands, and how an error reaches the user.

What talks to containerd and to registries takes longer to import than most commands run: a command's module imports
it when the command is run.

An error is one line on stderr and exit code 1; an interrupt is exit code 130. With --debug the traceback comes too.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

from snapshotter import __version__
from snapshotter.cli import convert, create, image, index, prefetch, push, rebuild, trace, ztoc
from snapshotter.cli.context import DEFAULT_ROOT, Context
from snapshotter.containerd import DEFAULT_ADDRESS, DEFAULT_NAMESPACE
from snapshotter.errors import SnapshotterError, UsageError

_COMMANDS: Final = (create, convert, push, rebuild, image, index, ztoc, prefetch, trace)
REFERENCE_VERSION: Final = "0.15.0"
"""Of the reference whose commands these are: nerdctl reads it from --version, and asks for 0.10 before it converts."""

_DURATION_PART: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
_SECONDS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


class _Parser(argparse.ArgumentParser):
    """A parser whose errors leave as ours."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    debug = False
    try:
        options = build_parser().parse_args(arguments)
        debug = options.debug
        with Context(options) as context:
            options.command(context)
    except SnapshotterError as error:
        if debug:
            traceback.print_exc()
        print(f"soci: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("soci: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has seen enough; without this the interpreter complains at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if debug:
            traceback.print_exc()
        where = f"{error.filename}: " if error.filename is not None else ""
        print(f"soci: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole program."""
    parser = _Parser(prog="soci", description="Make, publish and inspect the SOCI artifacts of images.")
    version = f"soci version v{REFERENCE_VERSION} snapshotter-{__version__}"
    parser.add_argument("--version", "-v", action="version", version=version)
    _add_global_options(parser, defaults=True)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    # Global options are understood on both sides of the command's name; the later one wins.
    shared = _Parser(add_help=False)
    _add_global_options(shared, defaults=False)
    for module in _COMMANDS:
        module.add_parser(commands, shared)
    return parser


def _add_global_options(parser: argparse.ArgumentParser, *, defaults: bool) -> None:
    group = parser.add_argument_group("global options")

    def add(*names: str, default: object, **settings: Any) -> None:
        group.add_argument(*names, default=default if defaults else argparse.SUPPRESS, **settings)

    add(
        *("--address", "-a"),
        metavar="SOCKET",
        default=os.environ.get("CONTAINERD_ADDRESS") or DEFAULT_ADDRESS,
        help=f"containerd's socket (CONTAINERD_ADDRESS; {DEFAULT_ADDRESS})",
    )
    add(
        *("--namespace", "-n"),
        metavar="NAME",
        default=os.environ.get("CONTAINERD_NAMESPACE") or DEFAULT_NAMESPACE,
        help=f"containerd's namespace (CONTAINERD_NAMESPACE; {DEFAULT_NAMESPACE})",
    )
    add("--timeout", metavar="DURATION", type=_duration, default=None, help="limit of the command: 30s, 5m")
    add("--debug", action="store_true", default=False, help="print the traceback of an error")
    add(
        "--content-store",
        choices=("containerd", "soci"),
        default=None,
        help="where artifacts are kept (containerd; soci with --oci-layout)",
    )
    add("--root", metavar="DIRECTORY", type=Path, default=DEFAULT_ROOT, help=f"local state ({DEFAULT_ROOT})")


def _duration(text: str) -> float | None:
    """Return seconds for `90`, `1m30s` or `500ms`; None, no limit, for zero."""
    parts = _DURATION_PART.findall(text)
    if parts and "".join(map("".join, parts)) == text:
        seconds = sum(float(number) * _SECONDS[unit] for number, unit in parts)
    elif re.fullmatch(r"\d+(\.\d+)?", text):
        seconds = float(text)
    else:
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration; write 30s, 1m30s or 500ms")
    return seconds or None


def _one_line(error: SnapshotterError) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
