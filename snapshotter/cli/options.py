"""Options that several commands share, each written once."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001
"""What `add_parser` of a command is given to add itself to; argparse has no public name for it."""

DEFAULT_UPLOADS = 3
"""At the same time."""


class Several(argparse.Action):
    """An option that may be repeated, and may hold several values separated by commas."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,  # noqa: ARG002
    ) -> None:
        """Add the values to those there are."""
        before: list[str] = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*before, *str(values).split(",")])


def add_platforms(parser: argparse.ArgumentParser) -> None:
    """--platform and --all-platforms."""
    parser.add_argument(
        "--platform",
        "-p",
        action=Several,
        default=[],
        metavar="OS/ARCH",
        help="a platform to work on, may be repeated (this host's)",
    )
    parser.add_argument("--all-platforms", action="store_true", help="work on every platform of the image")


def add_registry(parser: argparse.ArgumentParser) -> None:
    """--user, and how the registry's host is reached and known."""
    parser.add_argument(
        "--user", "-u", metavar="NAME[:PASSWORD]", help="credentials (those of docker's config.json)"
    )
    parser.add_argument("--plain-http", action="store_true", help="speak HTTP to the registry, not HTTPS")
    parser.add_argument(
        "--hosts-dir",
        metavar="DIR[,DIR]",
        default="",
        help="containerd's directories of hosts.toml: mirrors and certificates, besides those of the options below",
    )
    parser.add_argument("--tlscacert", metavar="FILE", help="authorities to trust besides the system's")
    parser.add_argument("--tlscert", metavar="FILE", help="certificate to show to the registry")
    parser.add_argument("--tlskey", metavar="FILE", help="its key (in the certificate's file)")
    parser.add_argument("--skip-verify", "-k", action="store_true", help="believe any certificate")
    # What the field's tools declare and do not use; their callers pass it.
    for name in ("--refresh", "--http-dump", "--http-trace"):
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help="print one JSON document, for programs")


def add_always_json(parser: argparse.ArgumentParser) -> None:
    """--json where the output is a JSON document in any case."""
    parser.add_argument("--json", action="store_true", help="print one JSON document, as without it")


def add_layout(parser: argparse.ArgumentParser) -> None:
    """--oci-layout."""
    parser.add_argument(
        "--oci-layout",
        type=Path,
        metavar="PATH",
        help="take the image from this OCI layout, a directory or tar, and not from containerd",
    )


def add_remote(parser: argparse.ArgumentParser) -> None:
    """--registry."""
    parser.add_argument(
        "--registry",
        action="store_true",
        help="work on the image in its registry: no containerd, no layer on disk"
        " (also so where containerd is not installed)",
    )
