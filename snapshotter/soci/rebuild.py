"""Making the artifact database agree with what a content store holds.

Rows whose content is gone go; indices that are there, with their zTOCs and prefetch artifacts, come back. Which image
a v1 index is for it says itself; a v2 index is found from the image that points to it.

Concurrency: one thread; another command may write to the database meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from snapshotter.errors import CorruptData, NotFound
from snapshotter.oci.descriptor import Descriptor, Platform
from snapshotter.oci.manifest import ImageIndex, parse
from snapshotter.oci.media_types import OCI_MANIFEST
from snapshotter.soci.artifacts import ArtifactDatabase, IndexRow, PrefetchRow, ZtocRow
from snapshotter.soci.content import ContentSource, read_verified
from snapshotter.soci.index import INDEX_DIGEST, SociIndex
from snapshotter.soci.index import parse as parse_index
from snapshotter.soci.platforms import load_image
from snapshotter.units import Digest
from snapshotter.ztoc.build import DEFAULT_SPAN_SIZE

_MAX_INDEX_SIZE: Final = 4 << 20
_MARK: Final = b"application/vnd.amazon.soci.index."


class ListedStore(ContentSource, Protocol):
    """A content source that can say what it has."""

    def digests(self) -> Iterable[Digest]:
        """Return the digest of everything."""


@dataclass(frozen=True, slots=True)
class _Use:
    """An image that an index is for."""

    image: Digest
    manifest: Digest
    platform: Platform


@dataclass(slots=True)
class Rebuilt:
    """What was changed."""

    dropped: list[Digest] = field(default_factory=list)
    added: list[Digest] = field(default_factory=list)


def rebuild(
    database: ArtifactDatabase, store: ListedStore, images: ContentSource, roots: Iterable[Descriptor]
) -> Rebuilt:
    """Make `database` agree with `store`; `roots` are the images that are known, with their content in `images`."""
    done = Rebuilt()
    known = {row.digest for row in database.indices()}
    known |= {row.digest for row in database.ztocs()} | {row.digest for row in database.prefetches()}
    for digest in sorted(known):
        if not _has(store, digest):
            database.forget(digest)
            done.dropped.append(digest)
    uses = _uses(images, roots)
    for index in _indices(store):
        if index.digest not in known:
            for use in _uses_of(index, uses):
                database.add_index(_row(index, use))
                done.added.append(index.digest)
        for row in _artifact_rows(index):
            if row.digest in known or not _has(store, row.digest):
                continue
            if isinstance(row, ZtocRow):
                database.add_ztoc(row)
            else:
                database.add_prefetch(row)
            known.add(row.digest)
            done.added.append(row.digest)
    return done


def _indices(store: ListedStore) -> Iterator[SociIndex]:
    for digest in store.digests():
        try:
            if store.size(digest) > _MAX_INDEX_SIZE:
                continue
            data = read_verified(store, digest)
            if _MARK in data:
                yield parse_index(data)
        except (NotFound, CorruptData):
            # Collected meanwhile, damaged, or a document that only speaks of indices.
            continue


def _uses(images: ContentSource, roots: Iterable[Descriptor]) -> Mapping[Digest, list[_Use]]:
    """Return, by the digest of a manifest and of the v2 index that it points to, what images they are part of."""
    found: dict[Digest, list[_Use]] = {}
    for root in roots:
        for entry in _manifests(images, root):
            try:
                image = load_image(images, entry)
            except (NotFound, CorruptData):
                continue
            use = _Use(root.digest, entry.digest, image.platform)
            found.setdefault(entry.digest, []).append(use)
            linked = image.manifest.annotations.get(INDEX_DIGEST)
            if linked is not None:
                found.setdefault(Digest(linked), []).append(use)
    return found


def _manifests(images: ContentSource, root: Descriptor) -> list[Descriptor]:
    try:
        document = parse(read_verified(images, root.digest), root.media_type or None)
    except (NotFound, CorruptData):
        return []
    if isinstance(document, ImageIndex):
        return [entry for entry in document.manifests if not entry.artifact_type]
    return [root]


def _uses_of(index: SociIndex, uses: Mapping[Digest, list[_Use]]) -> list[_Use]:
    """Return what an index is for; a v1 index whose image is not known here is for its subject."""
    if index.subject is None:
        return uses.get(index.digest, [])
    subject = index.subject.digest
    return uses.get(subject) or [_Use(subject, subject, Platform("unknown", "unknown"))]


def _row(index: SociIndex, use: _Use) -> IndexRow:
    return IndexRow(
        digest=index.digest,
        image_digest=use.image,
        platform=str(use.platform),
        size=len(index.data),
        manifest_digest=use.manifest,
        version=index.version,
        media_type=OCI_MANIFEST,
    )


def _artifact_rows(index: SociIndex) -> Iterator[ZtocRow | PrefetchRow]:
    for entry in index.ztocs:
        span_size = DEFAULT_SPAN_SIZE if entry.span_size is None else entry.span_size
        yield ZtocRow(entry.ztoc, entry.ztoc_size, entry.layer, span_size, index.build_tool)
    for layer, descriptor in index.prefetch:
        yield PrefetchRow(descriptor.digest, descriptor.size, layer)


def _has(store: ContentSource, digest: Digest) -> bool:
    try:
        store.size(digest)
    except NotFound:
        return False
    return True
