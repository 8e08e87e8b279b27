"""Images in OCI layouts, in and out: what a layout's image is, and a new layout that holds one image and no more.

A new layout appears by rename, complete, or not at all. Every blob that goes into it is verified on the way.

Concurrency: one thread; the scratch names are unique, so two programs that write one destination do not mix.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Final

from snapshotter.errors import DigestMismatch, NotFound, SnapshotterError, UsageError
from snapshotter.oci.descriptor import Descriptor
from snapshotter.oci.manifest import ImageIndex, ImageManifest, go_json, parse
from snapshotter.oci.media_types import INDEX_TYPES, MANIFEST_TYPES, OCI_INDEX
from snapshotter.soci.content import ArtifactStore, ContentSource, read_verified
from snapshotter.soci.layout import OciLayout
from snapshotter.units import Digest, digest_hex

ARCHIVE: Final = "oci-archive"
DIRECTORY: Final = "oci-dir"

_LAYOUT: Final = b'{"imageLayoutVersion":"1.0.0"}'
_BLOCK: Final = 512
_RECORD: Final = 20 * _BLOCK


def layout_image(layout: OciLayout, scratch: ArtifactStore, path: Path) -> Descriptor:
    """Return the descriptor of the image in `layout`, which is at `path`.

    A layout with several entries is one image, with its index.json as the list. Of a list, entries whose content is
    not there are left out, for no complete layout could be made of them; a list that changes so, and one that is
    index.json, is written to `scratch`. Raises UsageError when nothing is left.
    """
    entries = layout.index.manifests
    if len(entries) == 1 and entries[0].media_type not in INDEX_TYPES:
        layout.size(entries[0].digest)
        return entries[0]
    if len(entries) == 1:
        document = parse(read_verified(layout, entries[0].digest), entries[0].media_type)
        assert isinstance(document, ImageIndex)
        listing, names = document, entries[0].annotations
    else:
        listing, names = replace(layout.index, media_type=layout.index.media_type or OCI_INDEX), {}
    present = tuple(entry for entry in listing.manifests if _has(layout, entry.digest))
    if not present:
        raise UsageError(f"OCI layout {path}: none of its manifests is there")
    if len(present) == 1:
        return present[0]
    if len(entries) == 1 and len(present) == len(listing.manifests):
        return entries[0]
    data = go_json(replace(listing, manifests=present).to_json())
    return Descriptor(listing.media_type, scratch.write(data), len(data), names)


def reachable(source: ContentSource, root: Descriptor) -> dict[Digest, Descriptor]:
    """Return all content of the image `root`, which is in `source`: each after what it names, its size as stored.

    Layers that may stay elsewhere (they have URLs) are left out where they are not there. Raises NotFound.
    """
    found: dict[Digest, Descriptor] = {}

    def visit(entry: Descriptor) -> None:
        if entry.digest in found or (entry.urls and not _has(source, entry.digest)):
            return
        if entry.media_type in MANIFEST_TYPES | INDEX_TYPES:
            document = parse(read_verified(source, entry.digest), entry.media_type)
            if isinstance(document, ImageManifest):
                children = (document.config, *document.layers)
            else:
                children = document.manifests
            for child in children:
                visit(child)
        found[entry.digest] = replace(entry, size=source.size(entry.digest))

    visit(root)
    return found


def write_layout(form: str, target: Path, source: ContentSource, root: Descriptor) -> None:
    """Write a layout of the form ARCHIVE or DIRECTORY with the image `root`, which is in `source`.

    What is at `target` is replaced if it is a file or a layout. Raises UsageError when it is something else,
    NotFound and DigestMismatch for content, SnapshotterError when the disk refuses.
    """
    check_target(form, target)
    blobs = reachable(source, root)
    listing = ImageIndex(OCI_INDEX, (root,))
    index = go_json(listing.to_json())
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if form == ARCHIVE:
            _write_archive(target, source, blobs, index)
        else:
            _write_directory(target, source, blobs, index)
    except OSError as error:
        raise SnapshotterError(f"cannot write {target}: {error.strerror}") from error


def check_target(form: str, target: Path) -> None:
    """Raise UsageError when something is at `target` that must not be replaced by a layout of this form."""
    if form == ARCHIVE and target.is_dir():
        raise UsageError(f"destination {target}: is a directory; name a file, or use --format {DIRECTORY}")
    if form == DIRECTORY and target.exists():
        if not target.is_dir():
            raise UsageError(f"destination {target}: is a file; name a directory, or use --format {ARCHIVE}")
        if any(target.iterdir()) and not (target / "index.json").is_file():
            raise UsageError(f"destination {target}: is a directory, but not an OCI layout to be replaced")


def _write_directory(
    target: Path, source: ContentSource, blobs: dict[Digest, Descriptor], index: bytes
) -> None:
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    new, old = scratch / "new", scratch / "old"
    try:
        directory = new / "blobs/sha256"
        directory.mkdir(parents=True)
        for digest in blobs:
            with (directory / digest_hex(digest)).open("wb") as file:
                for chunk in _verified(source, digest):
                    file.write(chunk)
        (new / "oci-layout").write_bytes(_LAYOUT)
        (new / "index.json").write_bytes(index)
        if target.exists():
            target.rename(old)
        new.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)  # interrupted between the two
        shutil.rmtree(scratch)


def _write_archive(
    target: Path, source: ContentSource, blobs: dict[Digest, Descriptor], index: bytes
) -> None:
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with open(descriptor, "wb") as file:
            _write_member(file, "oci-layout", len(_LAYOUT), iter([_LAYOUT]))
            _write_member(file, "index.json", len(index), iter([index]))
            for digest, entry in blobs.items():
                _write_member(
                    file, f"blobs/sha256/{digest_hex(digest)}", entry.size, _verified(source, digest)
                )
            end = file.tell() + 2 * _BLOCK
            file.write(bytes(2 * _BLOCK + -end % _RECORD))
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise


def _write_member(file: BinaryIO, name: str, size: int, chunks: Iterator[bytes]) -> None:
    """Append a file to a tar; the same content gives the same bytes whenever it is written."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    file.write(info.tobuf(tarfile.PAX_FORMAT))
    start = file.tell()
    for chunk in chunks:
        file.write(chunk)
    if file.tell() - start != size:
        raise SnapshotterError(f"content of {name} changed while it was read")
    file.write(bytes(-size % _BLOCK))


def _verified(source: ContentSource, digest: Digest) -> Iterator[bytes]:
    """Yield a blob. Raises DigestMismatch after its last piece when it is not what its digest says."""
    found = hashlib.sha256()
    for chunk in source.chunks(digest):
        found.update(chunk)
        yield chunk
    if found.hexdigest() != digest_hex(digest):
        raise DigestMismatch(f"content {digest}: the stored bytes have digest sha256:{found.hexdigest()}")


def _has(source: ContentSource, digest: Digest) -> bool:
    try:
        source.size(digest)
    except NotFound:
        return False
    return True
