"""`soci index verify REF`: whether the indices of an image tell the truth about its layers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from snapshotter.cli.context import Context
from snapshotter.cli.options import Commands, add_json, add_layout, add_platforms
from snapshotter.cli.output import print_json
from snapshotter.errors import CorruptData, NotFound, UsageError
from snapshotter.soci.content import ContentSource, read_verified
from snapshotter.soci.content_overlay import Overlay
from snapshotter.soci.index import INDEX_DIGEST, SociIndex, parse
from snapshotter.soci.platforms import PlatformImage
from snapshotter.soci.verify import Finding, verify
from snapshotter.units import Digest, parse_digest


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What was found about one index; an index that could not be read has only that as its finding."""

    image: PlatformImage
    digest: Digest
    findings: Sequence[Finding]


def add_command(group: Commands, shared: argparse.ArgumentParser) -> None:
    """Add the command to the group `index`."""
    parser = group.add_parser(
        "verify", parents=[shared], help="compare an image's indices with its layers, every byte of them"
    )
    parser.add_argument("image", metavar="REF")
    add_platforms(parser)
    add_layout(parser)
    add_json(parser)
    parser.set_defaults(command=run)


def run(context: Context) -> None:
    """Verify each index of each platform. Raises CorruptData at the end when something is wrong."""
    arguments = context.arguments
    with context.time_limit():
        image = context.locate(arguments.image)
        artifacts = Overlay(context.artifacts, image.source)
        verdicts = [
            _verdict(digest, one, artifacts, image.source)
            for one in image.platforms(context.platforms())
            for digest in _indices(context, one)
        ]
    if not verdicts:
        raise UsageError(f"image {arguments.image}: no SOCI index is known; `soci create` makes one")
    if arguments.json:
        print_json([_describe(one) for one in verdicts])
    else:
        for one in verdicts:
            for finding in one.findings:
                print(finding)
            print(f"index {one.digest} ({one.image.platform}): {'WRONG' if one.findings else 'ok'}")
    wrong = sum(bool(one.findings) for one in verdicts)
    if wrong:
        raise CorruptData(f"image {arguments.image}: {wrong} of {len(verdicts)} indices wrong")


def _indices(context: Context, image: PlatformImage) -> list[Digest]:
    """Return the indices of one platform: the one that its manifest points to, and those in the database."""
    found = [row.digest for row in context.database.indices(manifest_digest=image.descriptor.digest)]
    linked = image.manifest.annotations.get(INDEX_DIGEST)
    if linked is not None:
        try:
            found.insert(0, parse_digest(linked))
        except ValueError as error:
            raise CorruptData(f"manifest {image.descriptor.digest}: {INDEX_DIGEST}: {error}") from None
    return list(dict.fromkeys(found))


def _verdict(
    digest: Digest, image: PlatformImage, artifacts: ContentSource, layers: ContentSource
) -> _Verdict:
    try:
        index: SociIndex = parse(read_verified(artifacts, digest))
    except (NotFound, CorruptData) as error:
        return _Verdict(image, digest, [Finding(f"index {digest}", str(error))])
    return _Verdict(image, digest, list(verify(index, image, artifacts, layers)))


def _describe(verdict: _Verdict) -> dict[str, object]:
    return {
        "digest": verdict.digest,
        "platform": str(verdict.image.platform),
        "ok": not verdict.findings,
        "findings": [{"where": one.where, "what": one.what} for one in verdict.findings],
    }
