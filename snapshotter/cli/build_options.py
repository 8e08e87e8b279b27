"""The options of the commands that build indices, `create` and `convert`, and what they mean."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from snapshotter.cli.options import Several, add_json, add_platforms
from snapshotter.errors import UsageError
from snapshotter.soci.create import DEFAULT_MIN_LAYER_SIZE, CreateOptions
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
    parser.add_argument(
        "--optimizations",
        action=Several,
        default=[],
        metavar="NAME",
        help="xattr: say which layers have no extended attributes, so that mounts need not look for them",
    )
    parser.add_argument(
        "--prefetch-file",
        action="append",
        default=[],
        metavar="PATH",
        help="a file, directory or glob to fetch first when the image is mounted; may be repeated",
    )
    parser.add_argument(
        "--prefetch-files-json", type=Path, metavar="FILE", help="the same as a JSON array of strings"
    )
    parser.add_argument(
        "--strict", action="store_true", help="make a layer that cannot be indexed an error, not a line"
    )
    add_json(parser)
    add_platforms(parser)


def create_options(arguments: argparse.Namespace) -> CreateOptions:
    """Return what the options say. Raises UsageError."""
    for name in arguments.optimizations:
        if name != "xattr":
            raise UsageError(f"--optimizations {name}: there is xattr")
    return CreateOptions(
        span_size=arguments.span_size,
        min_layer_size=arguments.min_layer_size,
        build_tool=arguments.build_tool_identifier,
        force=arguments.force,
        optimize_xattrs="xattr" in arguments.optimizations,
        prefetch=(*arguments.prefetch_file, *_listed(arguments.prefetch_files_json)),
        strict=arguments.strict,
    )


def _listed(path: Path | None) -> list[str]:
    """Return the strings in the JSON array at `path`. Raises UsageError."""
    if path is None:
        return []
    try:
        listed = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"--prefetch-files-json {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--prefetch-files-json {path}: not JSON: {error}") from None
    if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
        raise UsageError(f"--prefetch-files-json {path}: not an array of strings")
    return listed
