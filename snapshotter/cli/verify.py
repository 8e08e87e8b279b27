"""`soci index verify REF`: whether the indices of an image tell the truth about its layers."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from snapshotter.cli.context import Context
from snapshotter.cli.options import Commands, add_json, add_layout, add_platforms, add_registry, add_remote
from snapshotter.cli.output import print_json
from snapshotter.errors import CorruptData, NotFound, RegistryError, UsageError
from snapshotter.oci.media_types import SOCI_INDEX_V1
from snapshotter.oci.reference import Reference
from snapshotter.soci.content import ArtifactStore, ContentSource, read_verified
from snapshotter.soci.content_overlay import Overlay
from snapshotter.soci.index import INDEX_DIGEST, SociIndex, parse
from snapshotter.soci.platforms import PlatformImage, find_images
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
    add_remote(parser)
    add_registry(parser)
    add_json(parser)
    parser.set_defaults(command=run)


def run(context: Context) -> None:
    """Verify each index of each platform. Raises CorruptData at the end when something is wrong."""
    arguments = context.arguments
    if context.is_remote:
        verdicts = context.run(lambda: _in_registry(context))
    else:
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


async def _in_registry(context: Context) -> list[_Verdict]:
    """Verify an image and its indices where they are: the one that its manifest points to, and its referrers."""
    import trio

    from snapshotter.cli.remotecontent import RegistryContent

    reference = Reference.parse(context.arguments.image)
    platforms = context.platforms()
    async with context.registry(reference) as registry:
        content = RegistryContent(registry, reference, await registry.resolve(reference))

        def work() -> list[_Verdict]:
            verdicts = []
            for one in find_images(content, content.root, platforms, str(reference)):
                subject = reference.with_digest(one.descriptor.digest)
                found = list(content.call(lambda: registry.referrers(subject, SOCI_INDEX_V1)))  # noqa: B023
                linked = _linked(one)
                if linked is not None:
                    found.insert(0, content.call(lambda: registry.resolve(subject.with_digest(linked))))  # noqa: B023
                for entry in found:
                    content.add(entry)
                    verdicts.append(_verdict(entry.digest, one, content, content))
            return verdicts

        with contextlib.closing(content):
            return await trio.to_thread.run_sync(work, abandon_on_cancel=True)


def _indices(context: Context, image: PlatformImage) -> list[Digest]:
    """Return the indices of one platform: the one that its manifest points to, and those known that are still there."""
    rows = context.database.indices(manifest_digest=image.descriptor.digest)
    found = [row.digest for row in rows if _is_kept(context.artifacts, row.digest)]
    linked = _linked(image)
    return list(dict.fromkeys(found if linked is None else [linked, *found]))


def _is_kept(artifacts: ArtifactStore, digest: Digest) -> bool:
    """Whether an index is there; one that a newer index has replaced is containerd's to collect."""
    try:
        artifacts.size(digest)
    except NotFound:
        return False
    return True


def _linked(image: PlatformImage) -> Digest | None:
    """Return the index that the image's manifest points to, if it does."""
    text = image.manifest.annotations.get(INDEX_DIGEST)
    try:
        return None if text is None else parse_digest(text)
    except ValueError as error:
        raise CorruptData(f"manifest {image.descriptor.digest}: {INDEX_DIGEST}: {error}") from None


def _verdict(
    digest: Digest, image: PlatformImage, artifacts: ContentSource, layers: ContentSource
) -> _Verdict:
    try:
        index: SociIndex = parse(read_verified(artifacts, digest))
    except (NotFound, CorruptData, RegistryError) as error:
        return _Verdict(image, digest, [Finding(f"index {digest}", str(error))])
    return _Verdict(image, digest, list(verify(index, image, artifacts, layers)))


def _describe(verdict: _Verdict) -> dict[str, object]:
    return {
        "digest": verdict.digest,
        "platform": str(verdict.image.platform),
        "ok": not verdict.findings,
        "findings": [{"where": one.where, "what": one.what} for one in verdict.findings],
    }
