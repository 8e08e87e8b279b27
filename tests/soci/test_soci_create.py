"""Building an index: what is indexed, what is left out and why, what is found wrong, and what a second run does."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from snapshotter.errors import CorruptData, DigestMismatch, InvalidTar, NotFound, SnapshotterError, UsageError
from snapshotter.oci.descriptor import Descriptor
from snapshotter.soci import index as soci_index
from snapshotter.soci.artifacts import ArtifactDatabase
from snapshotter.soci.content import read_verified
from snapshotter.soci.create import CreatedIndex, CreateOptions, IndexBuilder, LayerOutcome
from snapshotter.soci.extract import find_file, read_file
from snapshotter.soci.layout import OciLayout
from snapshotter.soci.platforms import PlatformImage, find_images
from snapshotter.soci.store import LayoutStore
from snapshotter.units import Digest, sha256_digest
from snapshotter.ztoc.build import build as build_ztoc
from snapshotter.ztoc.model import Algorithm
from snapshotter.ztoc.parse import parse
from tests.soci.images import Blobs, noise
from tests.support.images import LayerBlob, compress, directory, layer, sha256, symlink, tar, tar_layer

SMALL = CreateOptions(span_size=1 << 16, min_layer_size=0, build_tool="test")
FILES = {
    "dir/": directory(),
    "dir/file": noise(300_000, seed=1),
    "small": b"hello",
    "link": symlink("small"),
    "lost": symlink("nowhere"),
}


class Workshop:
    """An image in a layout, an empty store and database, and the means to build."""

    def __init__(self, directory: Path, layers: list[LayerBlob]) -> None:
        self.layout = directory / "image"
        blobs = Blobs(self.layout)
        blobs.list(blobs.put_manifest(layers, "amd64"), "latest")
        self.store = LayoutStore(directory / "content")
        self.database = ArtifactDatabase(directory)
        self.reported: list[LayerOutcome] = []

    @property
    def source(self) -> OciLayout:
        return OciLayout(self.layout)

    @property
    def root(self) -> Descriptor:
        return self.source.image("latest")

    @property
    def image(self) -> PlatformImage:
        return find_images(self.source, self.root, None, "image")[0]

    def build(self, options: CreateOptions = SMALL, **replaced: Any) -> CreatedIndex:
        arguments = {"source": self.source, "store": self.store, "database": self.database} | replaced
        builder = IndexBuilder(**arguments, options=options, report=self.reported.append)
        return builder.build(self.image, self.root.digest)

    def blob(self, digest: str) -> Path:
        return self.layout / "blobs/sha256" / digest.removeprefix("sha256:")


def content(one: LayerBlob) -> bytes:
    assert isinstance(one.content, bytes)
    return one.content


def test_an_index_lists_a_ztoc_per_layer_and_everything_is_stored(tmp_path: Path) -> None:
    layers = [
        layer(FILES),
        layer({"other": noise(1000, seed=2)}, compression="uncompressed"),
        layer({"a": b"b"}),
    ]
    workshop = Workshop(tmp_path, layers)
    created = workshop.build()
    index = created.index
    assert [entry.layer for entry in index.ztocs] == [one.digest for one in layers]
    assert index.subject is not None
    assert index.subject.digest == workshop.image.descriptor.digest
    assert (index.build_tool, index.ztocs[0].span_size) == ("test", 1 << 16)
    assert soci_index.parse(read_verified(workshop.store, index.digest)) == index
    assert read_verified(workshop.store, sha256_digest(b"{}")) == b"{}"
    for entry, one, algorithm in zip(
        index.ztocs, layers, (Algorithm.GZIP, Algorithm.UNCOMPRESSED, Algorithm.GZIP), strict=True
    ):
        data = read_verified(workshop.store, entry.ztoc)
        assert len(data) == entry.ztoc_size
        assert (
            data == build_ztoc([content(one)], algorithm=algorithm, span_size=1 << 16, build_tool="test").data
        )


def test_the_database_knows_index_and_ztocs(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, [layer(FILES)])
    created = workshop.build()
    (row,) = workshop.database.indices()
    assert (row.digest, row.image_digest, row.platform) == (
        created.index.digest,
        workshop.root.digest,
        "linux/amd64",
    )
    assert (row.size, row.version) == (len(created.index.data), 1)
    (ztoc,) = workshop.database.ztocs()
    assert (ztoc.digest, ztoc.layer_digest) == (created.index.ztocs[0].ztoc, created.index.ztocs[0].layer)


def test_layers_are_reported_in_their_order_in_the_field_s_words(tmp_path: Path) -> None:
    layers = [layer({"a": b"x"}), layer(FILES), layer({"z": b"z"}, compression="zstd")]
    workshop = Workshop(tmp_path, layers)
    limit = layers[0].size + 1
    created = workshop.build(replace(SMALL, min_layer_size=limit))

    def too_small(one: LayerBlob) -> str:
        reason = f"size {one.size} is less than min-layer-size {limit}"
        return f"ztoc skipped - layer {one.digest} ({one.media_type}) {reason}"

    assert [str(outcome) for outcome in workshop.reported] == [
        too_small(layers[0]),
        f"layer {layers[1].digest} -> ztoc {created.index.ztocs[0].ztoc}",
        too_small(layers[2]),
    ]
    assert list(created.layers) == workshop.reported


def test_what_cannot_be_indexed_is_left_out_with_a_reason(tmp_path: Path) -> None:
    sealed = replace(layer({"a": b"b"}), media_type="application/vnd.oci.image.layer.v1.tar+gzip+encrypted")
    workshop = Workshop(tmp_path, [layer({"z": b"z"}, compression="zstd"), layer(FILES), sealed])
    created = workshop.build()
    assert len(created.index.ztocs) == 1
    zstd, _, encrypted = (str(outcome) for outcome in workshop.reported)
    assert zstd.endswith("cannot be indexed: compressed with zstd")
    assert "cannot be indexed" in encrypted
    assert "encrypted" in encrypted


def test_nothing_to_index_is_an_error_and_stores_nothing(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, [layer({"a": b"b"}), layer({"z": b"z"}, compression="zstd")])
    with pytest.raises(UsageError, match="no ztocs created, all layers either skipped or produced errors"):
        workshop.build(CreateOptions())
    assert workshop.database.indices() == []
    assert not (tmp_path / "content").exists()


def test_a_second_run_makes_the_same_index_without_reading_layers(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, [layer(FILES)])
    first = workshop.build()
    workshop.blob(first.index.ztocs[0].layer).unlink()
    second = workshop.build()
    assert second.index == first.index
    assert str(workshop.reported[1]).endswith(" (already exists)")
    with pytest.raises(NotFound):
        workshop.build(replace(SMALL, force=True))
    with pytest.raises(NotFound):
        workshop.build(replace(SMALL, build_tool="another"))


def test_a_ztoc_that_the_store_has_lost_is_built_again(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, [layer(FILES)])
    first = workshop.build()
    workshop.store.remove(first.index.ztocs[0].ztoc)
    assert workshop.build().index == first.index
    assert not workshop.reported[1].reused
    assert workshop.store.size(first.index.ztocs[0].ztoc) == first.index.ztocs[0].ztoc_size


def test_a_cut_ztoc_is_built_again(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, [layer(FILES)])
    entry = workshop.build().index.ztocs[0]
    workshop.store.path(entry.ztoc).write_bytes(b"cut")
    assert workshop.build().index.ztocs[0] == entry
    assert len(read_verified(workshop.store, entry.ztoc)) == entry.ztoc_size


def test_a_ztoc_that_is_collected_meanwhile_is_built_again(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, [layer(FILES)])
    first = workshop.build().index
    workshop.store.remove(first.digest)

    class Collecting(LayoutStore):
        """Loses the zTOC once, just before the index comes."""

        def write(self, data: bytes, *, labels: Mapping[str, str] | None = None) -> Digest:
            if data == first.data and not self.path(first.digest).exists():
                self.remove(first.ztocs[0].ztoc)
            return super().write(data, labels=labels)

    assert workshop.build(store=Collecting(tmp_path / "content")).index == first
    assert workshop.store.size(first.ztocs[0].ztoc) == first.ztocs[0].ztoc_size


def test_a_layer_twice_in_an_image_is_built_once_and_listed_twice(tmp_path: Path) -> None:
    one = layer(FILES)
    index = Workshop(tmp_path, [one, one]).build().index
    assert [entry.layer for entry in index.ztocs] == [one.digest, one.digest]


DAMAGE = {
    "truncated": (lambda data: data[:-2000], CorruptData),
    "emptied": (lambda _: b"", CorruptData),
    "another layer": (lambda _: content(layer({"another": b"layer"})), DigestMismatch),
    "not gzip": (lambda _: b"these are not the bytes", InvalidTar),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_layer_is_named_and_no_index_appears(tmp_path: Path, case: str) -> None:
    damage, error = DAMAGE[case]
    broken = layer(FILES)
    workshop = Workshop(tmp_path, [layer({"fine": b"layer"}), broken])
    workshop.blob(broken.digest).write_bytes(damage(content(broken)))
    with pytest.raises(error, match=f"layer {broken.digest}"):
        workshop.build()
    assert workshop.database.indices() == []
    workshop.blob(broken.digest).write_bytes(content(broken))
    assert len(workshop.build().index.ztocs) == 2


def test_a_config_that_lies_about_a_layer_is_found(tmp_path: Path) -> None:
    wrong = replace(layer(FILES), diff_id="sha256:" + "0" * 64)
    with pytest.raises(
        DigestMismatch, match=f"layer {wrong.digest}: .* but the image's config says sha256:0000"
    ):
        Workshop(tmp_path, [wrong]).build()


BAD = {
    "garbage behind": (lambda data: data + b"garbage", "gzip stream: "),
    "zeros behind": (lambda data: data + bytes(512), "gzip stream: "),
    "truncated": (lambda data: data[:-10], "in the middle of a member"),
    "zstd": (lambda _: compress(b"z" * 5000, "zstd"), "gzip stream: "),
    "no tar": (lambda _: compress(b"t" * 5000, "gzip"), "tar header"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_layer_that_was_bad_when_it_was_made_is_named(tmp_path: Path, case: str) -> None:
    """Its digest is right, so no transfer is to blame."""
    spoil, message = BAD[case]
    good = layer(FILES)
    blob = spoil(content(good))
    bad = replace(good, digest=sha256(blob), size=len(blob), content=blob)
    workshop = Workshop(tmp_path, [layer({"fine": b"layer"}), bad])
    with pytest.raises(InvalidTar, match=f"layer {bad.digest}: .*{message}"):
        workshop.build()
    assert workshop.database.indices() == []


@pytest.mark.parametrize("name", ["span_size", "min_layer_size"])
def test_negative_sizes_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="must not be negative"):
        CreateOptions(**{name: -1})


class EndlessLayers:
    """A source whose layers never end; `begun` says that somebody reads one."""

    def __init__(self, source: OciLayout) -> None:
        self._source = source
        self.begun = threading.Event()

    def size(self, digest: Digest) -> int:
        return self._source.size(digest)

    def read_range(self, digest: Digest, start: int, end: int) -> bytes:
        return self._source.read_range(digest, start, end)

    def chunks(self, digest: Digest) -> Iterator[bytes]:
        data = b"".join(self._source.chunks(digest))
        while True:
            self.begun.set()
            yield data


def test_one_layer_s_error_stops_the_others(tmp_path: Path) -> None:
    endless = tar_layer(tar(FILES)[:-1024], compression="uncompressed")
    broken = layer({"a": b"b"})
    workshop = Workshop(tmp_path, [broken, endless])

    class OneBreaks(EndlessLayers):
        def chunks(self, digest: Digest) -> Iterator[bytes]:
            if digest != broken.digest:
                return super().chunks(digest)
            self.begun.wait(10)
            return iter([b"not gzip"])

    with pytest.raises(SnapshotterError, match=f"layer {broken.digest}"):
        workshop.build(source=OneBreaks(workshop.source))
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("layer")] == []


def test_every_file_reads_back_through_its_ztoc(tmp_path: Path) -> None:
    blob = layer(FILES)
    workshop = Workshop(tmp_path, [blob])
    entry = workshop.build().index.ztocs[0]
    data = read_verified(workshop.store, entry.ztoc)
    ztoc = parse(data)
    for name in ("dir/file", "/small", "./small", "link"):
        pieces = read_file(find_file(ztoc, name), ztoc, data, entry.layer, workshop.source)
        expected = FILES["small" if name == "link" else name.lstrip("./")]
        assert b"".join(pieces) == expected
    for name, reason in (
        ("lost", "symlink to nowhere, which is no file of this layer"),
        ("dir", "not a regular file"),
        ("nothing", "not in this zTOC"),
    ):
        with pytest.raises(UsageError, match=reason):
            find_file(ztoc, name)
    raw = bytearray(content(blob))
    raw[len(raw) // 2] ^= 1
    workshop.blob(blob.digest).write_bytes(raw)
    with pytest.raises(CorruptData, match=f"layer {blob.digest}: span"):
        list(read_file(find_file(ztoc, "dir/file"), ztoc, data, entry.layer, workshop.source))
