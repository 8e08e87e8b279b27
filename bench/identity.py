"""Digest for digest: what `soci` makes, beside what reference programs make of the same layers.

    REFERENCE_SOCI=DIRECTORY[:DIRECTORY] python -m bench.identity [--record]

The layers are those of `tests/support/corpus.py` and a tree of real files, packed by every compressor that is on this
machine. Compared are the zTOC of every layer, the v1 index, and, if the reference can convert, every byte of the
converted image. --record writes the table that the tests compare with.

A reference runs as it is, in a mount namespace in which /var/lib is a directory of its own, on a containerd of ours.
Concurrency: one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from snapshotter.cli.main import main as soci
from snapshotter.containerd.client import Containerd as Client
from snapshotter.oci.descriptor import Descriptor
from snapshotter.oci.manifest import go_json
from snapshotter.soci.artifacts import ArtifactDatabase
from snapshotter.soci.content import read_verified
from snapshotter.soci.index import SPAN_SIZE, parse
from snapshotter.soci.store import LayoutStore
from tests.soci.images import multi_platform
from tests.support import corpus
from tests.support.containerd import Containerd, remove_directory
from tests.support.images import Image, sha256
from tests.support.images import layer as image_layer

NAME = "corpus.example/layers:1"
WHAT = ("zTOCs", "v1 index", "blobs of converted images")
REAL = Path(sys.base_prefix) / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
"""A tree of real files, some 50 MB of text and programs."""

COMPRESSORS = (
    *(("gzip", f"-{level}", "-n") for level in (1, 6, 9)),
    *(("pigz",), ("pigz", "-i"), ("pigz", "-1"), ("bgzip",), ("igzip",)),
    *(("libdeflate-gzip", "-1"), ("libdeflate-gzip", "-9")),
)
"""Each reads a tar and writes a layer; one that is not installed is left out."""

REAL_SPAN_SIZE = 1 << 20
_PRIVATE = 'mount --bind "$1" /var/lib && shift && exec "$@"'
_STATE = "soci-snapshotter-grpc"
_LEFT_OUT = {"__pycache__", "site-packages", "test", "tests"}


@dataclass(frozen=True, slots=True)
class Group:
    """Layers with one span size, as an image in an OCI layout."""

    image: Image
    cases: Sequence[corpus.Case]

    @property
    def options(self) -> list[str]:
        """How everybody is asked to build."""
        return ["--span-size", str(self.cases[0].span_size), "--min-layer-size", "0"]


@dataclass(slots=True)
class Score:
    """How many comparisons came out equal."""

    equal: int = 0
    different: list[str] = field(default_factory=list)

    def count(self, what: str, same: bool) -> None:
        """Take one comparison."""
        if same:
            self.equal += 1
        else:
            self.different.append(what)

    def __str__(self) -> str:
        return f"{self.equal} of {self.equal + len(self.different)}"


class Reference:
    """A reference program."""

    def __init__(self, program: Path, version: str) -> None:
        self.program = program
        self.version = version
        asked = subprocess.run([program, "convert", "--help"], capture_output=True, text=True, check=False)
        self.converts = "--standalone" in asked.stdout

    def command(self, state: Path) -> list[str | Path]:
        """Return how it is called with `state` in place of /var/lib."""
        state.mkdir(parents=True, exist_ok=True)
        return ["unshare", "--mount", "sh", "-c", _PRIVATE, "sh", state, self.program]

    def run(self, state: Path, *arguments: str | Path) -> None:
        """Run it. Raises AssertionError when it fails."""
        command = [*self.command(state), *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "TZ": "UTC"}, timeout=600, check=False
        )
        assert done.returncode == 0, f"{self.program} {arguments}: {done.stdout}{done.stderr}"


def references() -> list[Reference]:
    """Return every `soci` in the directories of REFERENCE_SOCI and PATH, but our own."""
    places = os.pathsep.join(os.environ.get(name, "") for name in ("REFERENCE_SOCI", "PATH"))
    found: dict[str, Reference] = {}
    for program in filter(
        os.path.isfile, (Path(place) / "soci" for place in places.split(os.pathsep) if place)
    ):
        said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
        version = re.search(r"soci version v?(\d+\.\d+\.\d+)", said)
        if version is not None and "snapshotter-" not in said:
            found.setdefault(version[1], Reference(program, version[1]))
    return list(found.values())


def groups(cases: Sequence[corpus.Case], directory: Path) -> Iterator[Group]:
    """Yield images of the layers, one for each span size."""
    for size in sorted({case.span_size for case in cases}):
        chosen = [case for case in cases if case.span_size == size]
        yield Group(corpus.image(directory / str(size), chosen, "1"), chosen)


def installed(directory: Path) -> list[corpus.Case]:
    """Return the tree of real files, packed by each compressor of this machine."""
    packed = directory / "real.tar"
    with tarfile.open(packed, "w", format=tarfile.PAX_FORMAT) as archive:
        archive.add(
            REAL,
            "usr/lib/python3",
            filter=lambda info: None if _LEFT_OUT & set(info.name.split("/")) else info,
        )
    return [
        corpus.Case(
            f"real files by {' '.join(command)}",
            partial(_pack, command, packed),
            span_size=REAL_SPAN_SIZE,
            wrong_in=corpus.SEVERAL_MEMBERS if command[0] == "bgzip" else (),
        )
        for command in COMPRESSORS
        if shutil.which(command[0]) is not None
    ]


def _pack(command: Sequence[str], packed: Path) -> list[bytes]:
    with packed.open("rb") as source:
        return [subprocess.run([*command, "-c"], stdin=source, stdout=subprocess.PIPE, check=True).stdout]


@dataclass(slots=True)
class Comparison:
    """What became of one group and one reference: scores by what was compared, and facts for the table."""

    scores: dict[str, Score]
    facts: list[corpus.Fact] = field(default_factory=list)


def compare(group: Group, reference: Reference, server: Containerd, scratch: Path) -> Comparison:
    """Build with both and compare. Raises AssertionError when one of them fails."""
    scores = {what: Score() for what in WHAT}
    facts: list[corpus.Fact] = []
    theirs = _created_by(reference, group, server, scratch / "state")
    ours = _created_by_us(reference, group, scratch / "root")
    made, wanted = _ztocs(ours), _ztocs(theirs)
    for blob, case in zip(group.image.layers, group.cases, strict=True):
        scores["zTOCs"].count(case.name, made[blob.digest] == wanted[blob.digest])
        facts.append(corpus.Fact(reference.version, case.name, blob.digest, wanted[blob.digest]))
    scores["v1 index"].count(f"index of {group.image.digest}", _plain(ours, theirs) == theirs)
    if reference.converts:
        root = _compare_converted(reference, group.image.layout, group.options, scratch, scores[WHAT[2]])
        facts.append(corpus.Fact(reference.version, corpus.CONVERTED, group.image.digest, root))
    return Comparison(scores, facts)


def _created_by(reference: Reference, group: Group, server: Containerd, state: Path) -> bytes:
    """Return the index that the reference makes of the image, which it takes from containerd."""
    with Client.connect(str(server.address), server.namespace) as client, client.lease() as leased:
        for path in sorted((group.image.layout / "blobs/sha256").iterdir()):
            leased.content.write(path.read_bytes())
        (entry,) = json.loads((group.image.layout / "index.json").read_bytes())["manifests"]
        leased.images.put(NAME, replace(Descriptor.from_json(entry), annotations={}, platform=None))
        place: list[str | Path] = [
            "--address",
            server.address,
            "--namespace",
            server.namespace,
            "--content-store",
            "soci",
        ]
        reference.run(state, *place, "create", *group.options, NAME)
    blobs = [
        path for path in (state / _STATE / "content/blobs/sha256").iterdir() if path.stat().st_size < 1 << 20
    ]
    (index,) = [data for path in blobs if b'"subject"' in (data := path.read_bytes())]
    return index


def _created_by_us(reference: Reference, group: Group, root: Path) -> bytes:
    """Return the index that we make of the image in its layout, in the reference's name."""
    tool = ["--build-tool-identifier", corpus.build_tool(reference.version)]
    _soci("--root", root, "create", *group.options, *tool, "--oci-layout", group.image.layout, NAME)
    (row,) = ArtifactDatabase(root).indices()
    return read_verified(LayoutStore(root / "content"), row.digest)


def _soci(*arguments: str | Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        code = soci(list(map(str, arguments)))
    assert code == 0, f"our soci {arguments}: exit code {code}"


def _ztocs(index: bytes) -> dict[str, str]:
    """Return layer digest -> zTOC digest."""
    return {str(entry.layer): str(entry.ztoc) for entry in parse(index).ztocs}


def _plain(ours: bytes, theirs: bytes) -> bytes:
    """Return our index, without the annotation of the span size if theirs, an old one, has none."""
    if SPAN_SIZE in theirs.decode():
        return ours
    document = json.loads(ours)
    for layer in document["layers"]:
        layer["annotations"].pop(SPAN_SIZE)
    return go_json(document)


def _compare_converted(
    reference: Reference, layout: Path, options: Sequence[str], scratch: Path, score: Score
) -> str:
    """Compare every blob of the images that both make of the one in `layout`; return the digest of theirs.

    The reference leaves the manifests of the source in the new layout, and takes its name away.
    """
    theirs, ours = scratch / "theirs", scratch / "ours"
    command = ["convert", "--standalone", "--format", "oci-dir", *options]
    reference.run(scratch / "state", *command, layout, theirs)
    tool = ["--build-tool-identifier", corpus.build_tool(reference.version)]
    _soci("--root", scratch / "root", *command, *tool, layout, ours)
    roots = [
        json.loads((place / "index.json").read_bytes())["manifests"][0]["digest"] for place in (theirs, ours)
    ]
    score.count(f"root of {layout.name}", roots[0] == roots[1])
    left = _blobs(theirs)
    for name, digest in _blobs(ours).items():
        score.count(f"blob {name}", left.pop(name, "") == digest)
    for name in left.keys() - _blobs(layout).keys():
        score.count(f"blob {name}", same=False)
    return str(roots[0])


def _compare_platforms(reference: Reference, directory: Path, score: Score) -> None:
    """Compare what becomes of an image of two platforms with an attestation: all of them, and one."""
    layers = [[image_layer({"a": name * 100_000})] for name in (b"x", b"y")]
    multi_platform(directory / "multi", dict(zip(("amd64", "arm64"), layers, strict=True)))
    for number, which in enumerate((["--all-platforms"], ["--platform", "linux/arm64"])):
        options = ["--min-layer-size", "0", *which]
        _compare_converted(reference, directory / "multi", options, directory / f"multi-{number}", score)


def _blobs(layout: Path) -> dict[str, str]:
    """Return name -> digest of every blob of a layout."""
    return {path.name: sha256(path.read_bytes()) for path in (layout / "blobs/sha256").iterdir()}


def run(reference: Reference, cases: Sequence[corpus.Case], directory: Path) -> Comparison:
    """Compare everything that the reference is right about. Raises AssertionError when a program fails."""
    whole = Comparison({what: Score() for what in WHAT})
    for group in groups(
        [case for case in cases if corpus.trusted(case, reference.version)], directory / "images"
    ):
        server = Containerd(directory / "c")
        try:
            one = compare(group, reference, server.start(), directory / str(group.cases[0].span_size))
        finally:
            server.cleanup()
            remove_directory(server.directory)
        whole.facts += one.facts
        for what, score in one.scores.items():
            whole.scores[what].equal += score.equal
            whole.scores[what].different += score.different
    if reference.converts:
        _compare_platforms(reference, directory, whole.scores[WHAT[2]])
    return whole


def main() -> int:
    """Run the program; exit code 1 when something differs, 2 when there is no reference."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--record", action="store_true", help=f"write {corpus.TABLE.name}")
    arguments = parser.parse_args()
    found = references()
    if not found:
        print("no reference: set REFERENCE_SOCI to the directory of its programs", file=sys.stderr)
        return 2
    facts: list[corpus.Fact] = []
    good = True
    for reference in found:
        directory = Path(tempfile.mkdtemp(prefix="st-"))
        try:
            result = run(reference, [*corpus.CASES, *installed(directory)], directory)
        finally:
            remove_directory(directory)
        for what, score in result.scores.items():
            print(
                f"{reference.version}: {what}: {score} equal",
                *score.different,
                sep="\n    different: ",
                flush=True,
            )
            good = good and not score.different
        facts += result.facts
    if arguments.record:
        names = {case.name for case in corpus.CASES} | {corpus.CONVERTED}
        corpus.TABLE.write_text("".join("\t".join(fact) + "\n" for fact in facts if fact.name in names))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
