"""Building the SOCI index of one platform's image: one pass over each layer, the artifacts into a store.

Owns nothing. Layers are read from a content source, artifacts go to an artifact store and into the artifact database,
in this order: zTOCs, config, index, rows. So a run that is stopped anywhere leaves no index without its zTOCs, and
the next run takes over the zTOCs that are complete.

Concurrency: `IndexBuilder.build` is called from one thread and runs one worker thread per processor, one layer each;
the heavy parts of a pass (inflate, hashing) run outside the interpreter lock. An interrupt stops the workers at their
next piece of input.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Final, NamedTuple, Protocol

from snapshotter.errors import (
    CorruptData,
    DigestMismatch,
    NotFound,
    SnapshotterError,
    UnsupportedLayer,
    UsageError,
)
from snapshotter.oci.descriptor import Descriptor, Platform
from snapshotter.oci.media_types import EMPTY_JSON_DIGEST, OCI_MANIFEST, layer_compression
from snapshotter.soci.artifacts import ArtifactDatabase, IndexRow, PrefetchRow, ZtocRow
from snapshotter.soci.content import ArtifactStore, ContentSource, read_verified
from snapshotter.soci.index import CONFIG_BLOB, IndexVersion, LayerZtoc, SociIndex, build
from snapshotter.soci.platforms import PlatformImage
from snapshotter.soci.prefetch import Plan, plan
from snapshotter.units import Digest
from snapshotter.ztoc.build import DEFAULT_BUILD_TOOL, DEFAULT_SPAN_SIZE, BuiltZtoc
from snapshotter.ztoc.build import build as build_ztoc
from snapshotter.ztoc.model import Algorithm, Ztoc, xattrs
from snapshotter.ztoc.parse import parse as parse_ztoc

DEFAULT_MIN_LAYER_SIZE: Final = 10 << 20
"""Smaller layers are not indexed: fetching one whole costs about as much as fetching its zTOC and a span."""

MAX_ZTOC_SIZE: Final = 2 << 30
"""Bytes of a zTOC: far beyond any real one, below what memory holds."""

MAX_SPAN_SIZE: Final = (1 << 63) - 1
"""Bytes; the format has 64 bits, signed."""

_ALGORITHMS: Final = {
    "gzip": Algorithm.GZIP,
    "uncompressed": Algorithm.UNCOMPRESSED,
    # A plain tar under Docker's type. If the bytes are compressed after all, they do not parse as a tar.
    "unknown": Algorithm.UNCOMPRESSED,
}

GC_ROOT: Final = "containerd.io/gc.root"
GC_CONTENT: Final = "containerd.io/gc.ref.content"


@dataclass(frozen=True, slots=True)
class CreateOptions:
    """How to build; sizes in bytes."""

    span_size: int = DEFAULT_SPAN_SIZE
    min_layer_size: int = DEFAULT_MIN_LAYER_SIZE
    build_tool: str = DEFAULT_BUILD_TOOL
    """Part of every zTOC and of the index, hence of every digest."""
    force: bool = False
    """Build zTOCs anew although the store has them."""
    optimize_xattrs: bool = False
    """Say in the index which layers have no extended attributes at all, so that mounts need not look."""
    prefetch: tuple[str, ...] = ()
    """Files to fetch first: paths, globs, directories."""
    strict: bool = False
    """Whether a layer that cannot be indexed, or a prefetch pattern without a file, is an error."""
    workers: int = os.cpu_count() or 1

    def __post_init__(self) -> None:
        if self.span_size < 0:
            raise UsageError(f"span size {self.span_size}: must not be negative")
        if self.span_size > MAX_SPAN_SIZE:
            raise UsageError(f"span size {self.span_size}: a zTOC holds at most {MAX_SPAN_SIZE}")
        if self.min_layer_size < 0:
            raise UsageError(f"minimum layer size {self.min_layer_size}: must not be negative")
        try:
            self.build_tool.encode()
        except UnicodeEncodeError:
            raise UsageError(f"build tool identifier {self.build_tool!a}: is not UTF-8") from None
        if "" in self.prefetch:
            raise UsageError("prefetch: an empty name; `/` stands for everything")


@dataclass(frozen=True, slots=True)
class LayerOutcome:
    """What became of one layer: a zTOC, or the reason why there is none."""

    layer: Descriptor
    ztoc: LayerZtoc | None = None
    reused: bool = False
    skipped: str = ""
    small: bool = False
    """Whether it was skipped because the options say so, and not because it cannot be indexed."""

    def __str__(self) -> str:
        if self.ztoc is None:
            return f"ztoc skipped - layer {self.layer.digest} ({self.layer.media_type}) {self.skipped}"
        return (
            f"layer {self.layer.digest} -> ztoc {self.ztoc.ztoc}{' (already exists)' if self.reused else ''}"
        )


@dataclass(frozen=True, slots=True)
class CreatedIndex:
    """An index that is now in the store, and what became of each layer."""

    index: SociIndex
    layers: tuple[LayerOutcome, ...]
    unmatched: tuple[str, ...] = ()
    """Prefetch patterns that name no file of an indexed layer."""


class Progress(Protocol):
    """Who wants to know how far a build is; workers call `advance` and `end`."""

    def begin(self, layers: Sequence[Descriptor]) -> None:
        """These layers will be read, or found not to need it."""

    def advance(self, layer: Descriptor, size: int) -> None:
        """`size` more bytes of a layer were read."""

    def end(self, layer: Descriptor) -> None:
        """A layer is finished, however much of it was read."""


class _Extras(NamedTuple):
    """What an index says beyond which zTOC belongs to which layer."""

    ztocs: Sequence[LayerZtoc]
    plan: Plan


class IndexBuilder:
    """Builds indices; see the module about order and threads."""

    def __init__(
        self,
        source: ContentSource,
        store: ArtifactStore,
        database: ArtifactDatabase,
        options: CreateOptions,
        *,
        report: Callable[[LayerOutcome], None] = lambda _: None,
        progress: Progress | None = None,
    ) -> None:
        self._source = source
        self._store = store
        self._database = database
        self._options = options
        self._report = report
        """Called in the order of the layers, in the caller's thread."""
        self.stored: Callable[[Digest], None] = lambda _: None
        """Called with each new zTOC, in the worker that stored it."""
        self._progress = progress
        self._stop = threading.Event()

    def build(self, image: PlatformImage, root: Digest, *, gc_root: str | None = None) -> CreatedIndex:
        """Build, store and remember the v1 index of `image`, which is (one platform of) what `root` names.

        `gc_root`, a time in RFC 3339, protects the index from containerd's garbage collector on its own account.
        Raises what `make` raises, and UsageError when no layer can be indexed.
        """
        created = self.make(image, IndexVersion.V1, gc_root=gc_root)
        if created is None:
            raise self.nothing_indexed()
        self.remember(created.index, image.platform, root, image.descriptor.digest)
        return created

    def make(
        self, image: PlatformImage, version: IndexVersion, *, gc_root: str | None = None
    ) -> CreatedIndex | None:
        """Build and store an index, or return None when no layer can be indexed.

        Raises DigestMismatch and other CorruptData for a layer that is not what manifest and config say, NotFound
        for one that is not there.
        """
        outcomes = self._layers(image)
        ztocs = [outcome.ztoc for outcome in outcomes if outcome.ztoc is not None]
        if not ztocs:
            return None
        extras = self._extras(ztocs)
        index = build(
            version,
            extras.ztocs,
            build_tool=self._options.build_tool,
            subject=image.descriptor if version is IndexVersion.V1 else None,
            prefetch=[one.descriptor for one in extras.plan.artifacts],
        )
        self._store.write(CONFIG_BLOB)
        self._store.write(index.data, labels=_gc_labels(index, gc_root))
        if not self._complete(outcomes):
            return self.make(image, version, gc_root=gc_root)
        return CreatedIndex(index, outcomes, extras.plan.unmatched)

    def _extras(self, ztocs: Sequence[LayerZtoc]) -> _Extras:
        """Return what an index says beyond its zTOCs, as far as it was asked for; prefetch artifacts are stored."""
        if not self._options.optimize_xattrs and not self._options.prefetch:
            return _Extras(ztocs, Plan((), ()))
        parsed = [(entry.layer, parse_ztoc(self._read_ztoc(entry))) for entry in ztocs]
        if self._options.optimize_xattrs:
            ztocs = [
                replace(entry, disable_xattrs=not _needs_xattrs(ztoc))
                for entry, (_, ztoc) in zip(ztocs, parsed, strict=True)
            ]
        found = plan(parsed, self._options.prefetch)
        if found.unmatched and self._options.strict:
            raise UsageError(f"prefetch {found.unmatched[0]}: no such file in an indexed layer (--strict)")
        for one in found.artifacts:
            digest = self._store.write(one.data)
            self._database.add_prefetch(PrefetchRow(digest, len(one.data), one.layer))
        return _Extras(ztocs, found)

    def _read_ztoc(self, entry: LayerZtoc) -> bytes:
        return read_verified(self._store, entry.ztoc, limit=MAX_ZTOC_SIZE)

    def remember(self, index: SociIndex, platform: Platform, root: Digest, manifest: Digest) -> None:
        """Enter an index that is stored into the database."""
        self._database.add_index(
            IndexRow(
                digest=index.digest,
                image_digest=root,
                platform=str(platform),
                size=len(index.data),
                manifest_digest=manifest,
                version=index.version,
                media_type=OCI_MANIFEST,
            )
        )

    def nothing_indexed(self) -> UsageError:
        """Return the error for an image of which no layer can be indexed."""
        return UsageError(
            "no ztocs created, all layers either skipped or produced errors; "
            f"layers below {self._options.min_layer_size} bytes are indexed with a lower --min-layer-size"
        )

    def _layers(self, image: PlatformImage) -> tuple[LayerOutcome, ...]:
        """Work on all layers at once, the largest first, and report them in their own order."""
        layers = list(zip(image.manifest.layers, image.config.diff_ids, strict=True))
        unique = {layer.digest: (layer, diff_id) for layer, diff_id in layers}
        if self._progress is not None:
            self._progress.begin([layer for layer, _ in unique.values()])
        pool = ThreadPoolExecutor(self._options.workers, thread_name_prefix="layer")
        self._stop.clear()
        try:
            work: dict[Digest, Future[LayerOutcome]] = {
                layer.digest: pool.submit(self._layer, layer, diff_id)
                for layer, diff_id in sorted(unique.values(), key=lambda item: -item[0].size)
            }
            outcomes = []
            for layer, _ in layers:
                outcomes.append(work[layer.digest].result())
                self._report(outcomes[-1])
        finally:
            self._stop.set()
            pool.shutdown(cancel_futures=True)
        return tuple(outcomes)

    def _layer(self, layer: Descriptor, diff_id: Digest) -> LayerOutcome:
        """Return the outcome for one layer; runs in a worker."""
        try:
            return self._outcome(layer, diff_id)
        finally:
            if self._progress is not None:
                self._progress.end(layer)

    def _outcome(self, layer: Descriptor, diff_id: Digest) -> LayerOutcome:
        options = self._options
        if layer.size < options.min_layer_size:
            return LayerOutcome(
                layer,
                skipped=f"size {layer.size} is less than min-layer-size {options.min_layer_size}",
                small=True,
            )
        try:
            compression = layer_compression(layer.media_type)
            if compression not in _ALGORITHMS:
                raise UnsupportedLayer(f"compressed with {compression}")
            known = None if options.force else self._known(layer)
            if known is not None:
                return LayerOutcome(layer, known, reused=True)
            return LayerOutcome(layer, self._build(layer, diff_id, _ALGORITHMS[compression]))
        except UnsupportedLayer as error:
            if options.strict:
                raise UnsupportedLayer(
                    f"layer {layer.digest}: cannot be indexed: {error} (--strict)"
                ) from error
            return LayerOutcome(layer, skipped=f"cannot be indexed: {error}")

    def _complete(self, outcomes: Sequence[LayerOutcome]) -> bool:
        """Say whether no garbage collection took a zTOC of an earlier run before the index could protect it."""
        reused = [outcome.ztoc.ztoc for outcome in outcomes if outcome.reused and outcome.ztoc is not None]
        return all(self._size(digest) is not None for digest in reused)

    def _size(self, digest: Digest) -> int | None:
        """Return the size of an artifact, None if the store does not have it."""
        try:
            return self._store.size(digest)
        except NotFound:
            return None

    def _known(self, layer: Descriptor) -> LayerZtoc | None:
        """Return the layer's zTOC of an earlier run, if the store still has it."""
        rows = self._database.ztocs(
            layer_digest=layer.digest,
            span_size=self._options.span_size,
            build_tool=self._options.build_tool,
        )
        for row in rows:
            # Another size: a file that a broken disk has cut.
            if self._size(row.digest) == row.size:
                return self._entry(layer, row.digest, row.size)
        return None

    def _build(self, layer: Descriptor, diff_id: Digest, algorithm: Algorithm) -> LayerZtoc:
        try:
            built = build_ztoc(
                self._input(layer),
                algorithm=algorithm,
                span_size=self._options.span_size,
                build_tool=self._options.build_tool,
            )
        except CorruptData as error:
            raise type(error)(f"layer {layer.digest}: {error}") from error
        _verify(layer, diff_id, built)
        self._store.write(built.data)
        self._database.add_ztoc(
            ZtocRow(
                digest=built.digest,
                size=len(built.data),
                layer_digest=layer.digest,
                span_size=self._options.span_size,
                build_tool=self._options.build_tool,
            )
        )
        self.stored(built.digest)
        return self._entry(layer, built.digest, len(built.data))

    def _entry(self, layer: Descriptor, ztoc: Digest, size: int) -> LayerZtoc:
        return LayerZtoc(layer.digest, layer.media_type, ztoc, size, self._options.span_size)

    def _input(self, layer: Descriptor) -> Iterator[bytes]:
        for chunk in self._source.chunks(layer.digest):
            if self._stop.is_set():
                raise SnapshotterError(f"layer {layer.digest}: interrupted")
            if self._progress is not None:
                self._progress.advance(layer, len(chunk))
            yield chunk


def _verify(layer: Descriptor, diff_id: Digest, built: BuiltZtoc) -> None:
    if built.layer_digest != layer.digest:
        raise DigestMismatch(
            f"layer {layer.digest}: the stored blob has digest {built.layer_digest} ({built.layer_size} bytes, "
            f"{layer.size} in the manifest); remove it from the content store and pull the image again"
        )
    if built.diff_id != diff_id:
        raise DigestMismatch(
            f"layer {layer.digest}: uncompressed it has digest {built.diff_id}, "
            f"but the image's config says {diff_id}"
        )


def _needs_xattrs(ztoc: Ztoc) -> bool:
    """Say whether a layer has extended attributes, or opaque directories, which mounts show as such."""
    return any(entry.name.endswith(b".wh..wh..opq") or xattrs(entry) for entry in ztoc.entries)


def _gc_labels(index: SociIndex, gc_root: str | None) -> dict[str, str]:
    """Return what tells containerd's garbage collector which content the index needs."""
    labels = {f"{GC_CONTENT}.config": str(EMPTY_JSON_DIGEST)}
    entries: Sequence[Digest] = [entry.ztoc for entry in index.ztocs]
    entries = [*entries, *(descriptor.digest for _, descriptor in index.prefetch)]
    labels |= {f"{GC_CONTENT}.ztoc.{position}": str(digest) for position, digest in enumerate(entries)}
    if gc_root is not None:
        labels[GC_ROOT] = gc_root
    return labels
