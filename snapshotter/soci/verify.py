"""Whether a SOCI index tells the truth about its image: every claim in it is compared with the layers themselves.

Of each layer: its digest and diffID, its zTOC's digest, every span's digest, and the TOC against the real tar. A zTOC
that the same rules give again, byte for byte, needs no more. One that they do not (of another tool) is looked at
claim by claim, and each of its spans is inflated from its checkpoint.

Concurrency: one thread; layers are read one after another, a span at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from snapshotter.errors import CorruptData, NotFound, RegistryError, SnapshotterError, UnsupportedLayer
from snapshotter.oci.descriptor import Descriptor
from snapshotter.soci.compare import entry_differences
from snapshotter.soci.content import ContentSource, read_verified
from snapshotter.soci.create import MAX_SPAN_SIZE, MAX_ZTOC_SIZE
from snapshotter.soci.index import IndexVersion, LayerZtoc, SociIndex
from snapshotter.soci.platforms import PlatformImage
from snapshotter.soci.prefetch import parse as parse_prefetch
from snapshotter.units import Digest, sha256_digest
from snapshotter.ztoc.build import DEFAULT_SPAN_SIZE
from snapshotter.ztoc.build import build as build_ztoc
from snapshotter.ztoc.inflate import decompress_stream, inflate_span
from snapshotter.ztoc.model import Algorithm, Ztoc, xattrs
from snapshotter.ztoc.parse import parse as parse_ztoc
from snapshotter.ztoc.spans import spans_of

WINDOW_SIZE = 32768


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong, and where."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def verify(
    index: SociIndex, image: PlatformImage, artifacts: ContentSource, layers: ContentSource
) -> Iterator[Finding]:
    """Yield what is wrong with `index`, made for `image`; zTOCs are in `artifacts`, layers in `layers`."""
    name = f"index {index.digest}"
    if index.version is IndexVersion.V1:
        subject = None if index.subject is None else index.subject.digest
        if subject != image.descriptor.digest:
            yield Finding(name, f"its subject is {subject}, not the image manifest {image.descriptor.digest}")
    by_digest = {
        layer.digest: (layer, diff_id)
        for layer, diff_id in zip(image.manifest.layers, image.config.diff_ids, strict=True)
    }
    positions = [layer.digest for layer in image.manifest.layers]
    order = [positions.index(entry.layer) for entry in index.ztocs if entry.layer in by_digest]
    if order != sorted(order):
        yield Finding(name, "its zTOCs are not in the order of the image's layers")
    spans: dict[Digest, int] = {}
    for entry in index.ztocs:
        if entry.layer not in by_digest:
            yield Finding(
                name, f"zTOC {entry.ztoc} is for layer {entry.layer}, which the image does not have"
            )
            continue
        for what in _verify_layer(entry, *by_digest[entry.layer], artifacts, layers, spans):
            yield Finding(f"layer {entry.layer}", what)
    for layer, artifact in index.prefetch:
        try:
            ranges = parse_prefetch(read_verified(artifacts, artifact.digest))
        except SnapshotterError as error:
            yield Finding(f"prefetch artifact {artifact.digest}", str(error))
            continue
        if any(one.last >= spans.get(layer, 0) for one in ranges):
            yield Finding(
                f"prefetch artifact {artifact.digest}", f"names a span that layer {layer} does not have"
            )


def _verify_layer(
    entry: LayerZtoc,
    layer: Descriptor,
    diff_id: Digest,
    artifacts: ContentSource,
    layers: ContentSource,
    spans: dict[Digest, int],
) -> Iterator[str]:
    try:
        data = read_verified(artifacts, entry.ztoc, limit=MAX_ZTOC_SIZE)
        ztoc = parse_ztoc(data)
    except (NotFound, CorruptData, RegistryError) as error:
        yield f"zTOC {entry.ztoc}: {error}"
        return
    spans[entry.layer] = len(spans_of(ztoc))
    if entry.layer_media_type not in {"", layer.media_type}:
        yield f"the index calls it {entry.layer_media_type}, the image {layer.media_type}"
    if len(data) != entry.ztoc_size:
        yield f"zTOC {entry.ztoc}: {len(data)} bytes, not the {entry.ztoc_size} of the index"
    if entry.disable_xattrs and any(xattrs(one) for one in ztoc.entries):
        yield "the index says that it has no extended attributes, but it has"
    span_size = DEFAULT_SPAN_SIZE if entry.span_size is None else entry.span_size
    # Every block of a gzip stream may begin a span; in a plain tar nothing else says where one ends.
    least = 0 if ztoc.compression.algorithm is Algorithm.GZIP else 1
    if not least <= span_size <= MAX_SPAN_SIZE:
        yield f"the index gives it a span size of {span_size} bytes, which cannot be"
        span_size = DEFAULT_SPAN_SIZE
    try:
        built = build_ztoc(
            layers.chunks(layer.digest),
            algorithm=ztoc.compression.algorithm,
            span_size=span_size,
            build_tool=ztoc.build_tool,
        )
    except (NotFound, CorruptData, UnsupportedLayer, RegistryError) as error:
        yield str(error)
        yield from _verify_digests(ztoc, layer.digest, layers)
        return
    if built.layer_digest != layer.digest:
        yield f"its bytes have digest {built.layer_digest}"
    if built.diff_id != diff_id:
        yield f"uncompressed it has digest {built.diff_id}, but the image's config says {diff_id}"
    if built.digest == entry.ztoc:
        return
    if (built.layer_size, built.ztoc.uncompressed_size) != (ztoc.compressed_size, ztoc.uncompressed_size):
        yield (
            f"its sizes are {built.layer_size} and {built.ztoc.uncompressed_size},"
            f" the zTOC says {ztoc.compressed_size} and {ztoc.uncompressed_size}"
        )
    yield from (f"zTOC -> tar: {line}" for line in entry_differences(ztoc.entries, built.ztoc.entries))
    yield from _verify_digests(ztoc, layer.digest, layers)
    yield from _verify_spans(ztoc, data, layer.digest, layers)


def _verify_digests(ztoc: Ztoc, layer: Digest, layers: ContentSource) -> Iterator[str]:
    for span in spans_of(ztoc):
        try:
            found = sha256_digest(layers.read_range(layer, span.compressed_start, span.compressed_end))
        except (NotFound, CorruptData, RegistryError) as error:
            yield f"span {span.id}: {error}"
            return
        if found != span.digest:
            yield f"span {span.id}: its bytes have digest {found}, the zTOC says {span.digest}"


def _verify_spans(ztoc: Ztoc, data: bytes, layer: Digest, layers: ContentSource) -> Iterator[str]:
    """Inflate every span from its checkpoint, and compare that with what the layer is from its beginning."""
    compression = "gzip" if ztoc.compression.algorithm is Algorithm.GZIP else "uncompressed"
    truth = _Truth(decompress_stream(layers.chunks(layer), compression))
    for span in spans_of(ztoc):
        window = None
        if span.window_offset >= 0:
            window = memoryview(data)[span.window_offset : span.window_offset + WINDOW_SIZE]
        try:
            inflated = inflate_span(
                layers.read_range(layer, span.compressed_start, span.compressed_end),
                algorithm=ztoc.compression.algorithm,
                bits=span.bits,
                window=window,
                length=span.uncompressed_end - span.uncompressed_start,
            )
        except (NotFound, CorruptData, RegistryError) as error:
            yield f"span {span.id}: {error}"
            continue
        if inflated != truth.read(span.uncompressed_start, span.uncompressed_end):
            yield f"span {span.id}: from its checkpoint it inflates to other bytes than the layer has there"


class _Truth:
    """A tar stream that is read forwards, in ranges."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._kept = bytearray()
        self._start = 0
        """Where in the stream what is kept begins."""

    def read(self, start: int, end: int) -> bytes:
        """Return the bytes `[start, end)`, fewer at the end; `start` must not be behind that of the last call."""
        while self._start + len(self._kept) < end and (piece := next(self._pieces, None)) is not None:
            self._kept += piece
            self._drop(start)
        self._drop(start)
        return bytes(self._kept[: end - start])

    def _drop(self, start: int) -> None:
        passed = min(max(start - self._start, 0), len(self._kept))
        del self._kept[:passed]
        self._start += passed
