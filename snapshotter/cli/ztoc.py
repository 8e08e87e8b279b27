"""`soci ztoc ls|info|diff|get-file`: the zTOCs that were made here."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from snapshotter.cli.context import Context, digest_argument
from snapshotter.cli.options import Commands, add_always_json, add_json
from snapshotter.cli.output import print_json, print_table
from snapshotter.errors import InvalidZtoc, NotFound, SnapshotterError, UsageError
from snapshotter.soci.artifacts import ZtocRow
from snapshotter.soci.compare import differences
from snapshotter.soci.content import ContentSource, read_verified
from snapshotter.soci.create import MAX_ZTOC_SIZE
from snapshotter.soci.extract import find_file, read_file
from snapshotter.soci.index import parse as parse_index
from snapshotter.units import Digest
from snapshotter.ztoc.model import FileEntry, Ztoc
from snapshotter.ztoc.parse import parse
from snapshotter.ztoc.spans import covering, spans_of

_HEADER = ("DIGEST", "SIZE", "LAYER DIGEST")


def add_parser(commands: Commands, shared: argparse.ArgumentParser) -> None:
    """Add the command group."""
    group = commands.add_parser("ztoc", help="manage zTOCs").add_subparsers(
        title="commands", metavar="COMMAND", required=True
    )
    listing = group.add_parser("list", aliases=["ls"], parents=[shared], help="list zTOCs")
    listing.add_argument("--ztoc-digest", metavar="DIGEST", help="only this zTOC")
    listing.add_argument("--image-ref", metavar="IMAGE", help="only zTOCs of this image")
    listing.add_argument("--quiet", "-q", action="store_true", help="print only digests")
    add_json(listing)
    listing.set_defaults(command=run_list)
    info = group.add_parser("info", parents=[shared], help="print what a zTOC holds, as JSON")
    info.add_argument("digest", metavar="DIGEST")
    add_always_json(info)
    info.set_defaults(command=run_info)
    diff = group.add_parser(
        "diff", parents=[shared], help="say how two zTOCs differ; exit code 1 when they do"
    )
    diff.add_argument("one", metavar="A", help="a digest, or a file that holds a zTOC")
    diff.add_argument("other", metavar="B")
    add_json(diff)
    diff.set_defaults(command=run_diff)
    get_file = group.add_parser(
        "get-file", parents=[shared], help="read one file of a local layer through its zTOC"
    )
    get_file.add_argument("digest", metavar="DIGEST")
    get_file.add_argument("file", metavar="FILE")
    get_file.add_argument("--output", "-o", type=Path, metavar="PATH", help="where to write it (stdout)")
    get_file.set_defaults(command=run_get_file)


def run_list(context: Context) -> None:
    """Print a line per zTOC."""
    arguments = context.arguments
    digest = digest_argument(arguments.ztoc_digest) if arguments.ztoc_digest else None
    rows = context.database.ztocs(digest=digest)
    if arguments.image_ref:
        of_image = _ztocs_of_image(context, arguments.image_ref)
        rows = [row for row in rows if row.digest in of_image]
        if digest is not None and not rows:
            raise UsageError(f"zTOC {digest}: not one of image {arguments.image_ref}")
    if arguments.quiet:
        for row in rows:
            print(row.digest)
    elif arguments.json:
        print_json([dataclasses.asdict(row) for row in rows])
    else:
        print_table(_HEADER, [(row.digest, row.size, row.layer_digest) for row in rows])


def run_info(context: Context) -> None:
    """Print versions, sizes and every file with the spans that hold it."""
    row, _, ztoc = _load(context)
    print_json(_describe(row, ztoc))


def run_diff(context: Context) -> None:
    """Print a line per difference. Raises UsageError, for the exit code, when there are any."""
    arguments = context.arguments
    found = differences(_read_any(context, arguments.one), _read_any(context, arguments.other))
    if arguments.json:
        print_json(found)
    else:
        for line in found:
            print(line)
    if found:
        raise UsageError(f"{arguments.one} and {arguments.other} differ")


def _read_any(context: Context, name: str) -> Ztoc:
    """Return the zTOC that `name` is the digest or the file of. Raises UsageError, NotFound, InvalidZtoc."""
    if name.startswith("sha256:"):
        return parse(read_verified(context.artifacts, digest_argument(name), limit=MAX_ZTOC_SIZE))
    try:
        return parse(Path(name).read_bytes())
    except OSError as error:
        raise UsageError(f"zTOC {name}: {error.strerror}") from None
    except InvalidZtoc as error:
        raise InvalidZtoc(f"file {name}: {error}") from None


def run_get_file(context: Context) -> None:
    """Write one file's content, each span verified on the way."""
    arguments = context.arguments
    row, data, ztoc = _load(context)
    entry = find_file(ztoc, arguments.file)
    pieces = read_file(entry, ztoc, data, row.layer_digest, _layer_source(context, row.layer_digest))
    if arguments.output is None:
        for piece in pieces:
            sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
        return
    try:
        _write(arguments.output, pieces)
    except OSError as error:
        raise SnapshotterError(f"cannot write {arguments.output}: {error.strerror}") from error


def _write(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file that is there in full or as it was; what is no file, a device say, is written to as it goes."""
    if path.exists() and not path.is_file():
        with path.open("wb") as output:
            output.writelines(pieces)
        return
    target = path.resolve()
    with tempfile.NamedTemporaryFile(prefix=f".{target.name}.", dir=target.parent, delete=False) as output:
        try:
            output.writelines(pieces)
            output.flush()
            os.chmod(output.fileno(), target.stat().st_mode if target.exists() else 0o666 & ~_umask())
            os.replace(output.name, target)
        except BaseException:
            os.unlink(output.name)
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _load(context: Context) -> tuple[ZtocRow, bytes, Ztoc]:
    """Return row, bytes and value of the zTOC that the command names."""
    digest = digest_argument(context.arguments.digest)
    rows = context.database.ztocs(digest=digest)
    if not rows:
        if context.database.indices(digest=digest):
            raise UsageError(f"{digest} is a SOCI index and not a zTOC: see `soci index info`")
        raise UsageError(f"zTOC {digest}: not known here; `soci ztoc ls` lists those that are")
    data = read_verified(context.artifacts, digest, limit=MAX_ZTOC_SIZE)
    return rows[0], data, parse(data)


def _describe(row: ZtocRow, ztoc: Ztoc) -> dict[str, Any]:
    starts = [span.uncompressed_start for span in spans_of(ztoc)]
    files = [_describe_file(entry, starts) for entry in ztoc.entries]
    return {
        "version": ztoc.version,
        "build_tool": ztoc.build_tool,
        "size": row.size,
        "span_size": row.span_size,
        "num_spans": len(starts),
        "num_files": len(files),
        "num_multi_span_files": sum(file["start_span"] != file["end_span"] for file in files),
        "files": files,
    }


def _describe_file(entry: FileEntry, starts: Sequence[int]) -> dict[str, Any]:
    # An entry without data still has a place: the span where its data would begin.
    length = entry.size if entry.kind == "reg" else 0
    spans = covering(starts, entry.offset, entry.offset + max(length, 1))
    return {
        "filename": entry.name.decode("utf-8", "replace"),
        "offset": entry.offset,
        "size": entry.size,
        "type": entry.kind,
        "start_span": spans[0],
        "end_span": spans[-1],
    }


def _ztocs_of_image(context: Context, name: str) -> set[Digest]:
    """Return the zTOCs in the image's indices; an index that is gone from the store has none."""
    found: set[Digest] = set()
    for row in context.database.indices(image_digest=context.locate(name).root.digest):
        try:
            index = parse_index(read_verified(context.artifacts, row.digest))
        except NotFound:
            continue
        found.update(entry.ztoc for entry in index.ztocs)
    return found


def _layer_source(context: Context, layer: Digest) -> ContentSource:
    """Return where the layer's blob is: with the artifacts, or else in containerd. Raises UsageError."""
    for source in (context.artifacts, context.containerd.content):
        try:
            source.size(layer)
        except NotFound:
            continue
        return source
    raise UsageError(f"layer {layer}: not in a local content store; pull its image first")
