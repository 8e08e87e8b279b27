"""The options of the commands that build indices, `create` and `convert`, and what they mean."""

from __future__ import annotations

import argparse

from snapshotter.cli.options import add_platforms
from snapshotter.soci.create import DEFAULT_MIN_LAYER_SIZE, CreateOptions, LayerOutcome
from snapshotter.ztoc.build import DEFAULT_BUILD_TOOL, DEFAULT_SPAN_SIZE


def add_build(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--span-size",
        type=int,
        default=DEFAULT_SPAN_SIZE,
        metavar="BYTES",
        help="uncompressed bytes per span (%(default)s)",
    )
    parser.add_argument(
        "--min-layer-size",
        type=int,
        default=DEFAULT_MIN_LAYER_SIZE,
        metavar="BYTES",
        help="smaller layers are not indexed (%(default)s)",
    )
    parser.add_argument("--force", "-f", action="store_true", help="build zTOCs anew that exist already")
    parser.add_argument(
        "--build-tool-identifier",
        default=DEFAULT_BUILD_TOOL,
        metavar="TEXT",
        help="stored in the artifacts, hence part of every digest (%(default)s)",
    )
    add_platforms(parser)


def create_options(arguments: argparse.Namespace) -> CreateOptions:
    """Return what the options say. Raises UsageError."""
    return CreateOptions(
        span_size=arguments.span_size,
        min_layer_size=arguments.min_layer_size,
        build_tool=arguments.build_tool_identifier,
        force=arguments.force,
    )


def print_layer(outcome: LayerOutcome) -> None:
    """Print the line of one layer."""
    print(outcome, flush=True)
