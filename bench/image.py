"""Images of real packages for the demo and the benchmarks.

A recipe names packages; they come by name alone, through apt and pip as the machine has them set up. The result is
an OCI layout in a cache, keyed by the recipe: the same recipe is built once.

Layers, lowest first: a base of Debian packages (unpacked, no maintainer script runs), one layer for each group of
Python packages, the application, and weights that the application never opens.

Owns the cache directory. One process builds at a time; a build that was interrupted leaves nothing that counts.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from tests.support.images import Image, ImageBuilder, LayerBlob, gzip_file_layer

CACHE = Path(__file__).parent.parent / ".cache/images"
VERSION = 1
"""Part of the cache key: raise it when the same recipe gives another image."""

_PYTHON = (3, 11)
_SITE = "usr/local/lib/python3.11/dist-packages"
_MERGED = ("bin", "sbin", "lib", "lib64")
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Recipe:
    """What an image is made of.

    `packages` are Debian's, without their dependencies; `wheels` are groups of pinned Python packages with all
    theirs; `files` is the application's text by path; `weights` is a number of bytes that do not compress.
    """

    name: str
    packages: tuple[str, ...]
    wheels: tuple[tuple[str, ...], ...] = ()
    files: tuple[tuple[str, str], ...] = ()
    weights: int = 0
    gzip_level: int = 6

    @property
    def key(self) -> str:
        """Name and hash of everything that decides about the image."""
        facts = json.dumps([VERSION, platform.machine(), asdict(self)], sort_keys=True)
        return f"{self.name}-{hashlib.sha256(facts.encode()).hexdigest()[:12]}"


def build(recipe: Recipe, *, cache: Path = CACHE, tell: Callable[[str], None] = lambda _: None) -> Image:
    """Return the image of `recipe`, from `cache` if it is there; `tell` gets a line for each step.

    Needs root (owners of the base's files). Raises subprocess.CalledProcessError when apt or pip fails.
    """
    place = cache / recipe.key
    if not place.exists():
        with _fresh(place) as temporary:
            _build(recipe, temporary, tell)
    facts = json.loads((place / "image.json").read_text())
    layers = tuple(
        LayerBlob(**fields, content=place / "oci/blobs/sha256" / fields["digest"].removeprefix("sha256:"))
        for fields in facts["layers"]
    )
    return Image(place / "oci", facts["tag"], facts["digest"], layers)


def _build(recipe: Recipe, place: Path, tell: Callable[[str], None]) -> None:
    builder = ImageBuilder(place / "oci").config(Cmd=["python3"])
    tree, blobs = place / "tree", place / "blobs"
    blobs.mkdir()
    fields = []
    for number, (what, fill) in enumerate(_steps(recipe)):
        tell(f"image: {what}")
        blob = blobs / f"{number}.tar.gz"
        tree.mkdir()
        fill(tree)
        _pack(tree, blob, recipe.gzip_level)
        shutil.rmtree(tree)
        layer = gzip_file_layer(blob)
        fields.append({name: getattr(layer, name) for name in ("media_type", "digest", "diff_id", "size")})
        builder.add(layer)
    image = builder.build()
    shutil.rmtree(blobs)
    facts = {"tag": image.tag, "digest": image.digest, "layers": fields}
    (place / "image.json").write_text(json.dumps(facts))


@contextmanager
def _fresh(place: Path) -> Iterator[Path]:
    """Give a directory that becomes `place` when the block ends well; older images of the recipe's name go."""
    name = place.name.rpartition("-")[0]
    place.parent.mkdir(parents=True, exist_ok=True)
    for old in place.parent.glob(f"{name}-????????????*"):
        shutil.rmtree(old)
    temporary = place.with_name(place.name + ".new")
    temporary.mkdir()
    yield temporary
    temporary.rename(place)


def _steps(recipe: Recipe) -> Iterator[tuple[str, Callable[[Path], None]]]:
    if recipe.packages:
        yield f"base of {', '.join(recipe.packages)}", partial(_fill_base, recipe.packages)
    for group in recipe.wheels:
        yield f"Python packages {', '.join(group)}", partial(_fill_wheels, group)
    if recipe.files:
        yield "application", partial(_fill_files, recipe.files)
    if recipe.weights:
        yield f"weights of {recipe.weights >> 20} MiB", partial(_fill_weights, recipe.weights)


def _fill_base(packages: tuple[str, ...], tree: Path) -> None:
    for name in _MERGED:
        (tree / "usr" / name).mkdir(parents=True)
        (tree / name).symlink_to(f"usr/{name}")
    for name in ("proc", "sys", "dev", "tmp"):
        (tree / name).mkdir()
    (tree / "tmp").chmod(0o1777)
    archives = tree.parent / "archives"
    _download(archives, packages)
    for archive in sorted(archives.glob("*.deb")):
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE) as unpacked:
            command = ["tar", "--extract", "--keep-directory-symlink", "--directory", str(tree)]
            subprocess.run(command, stdin=unpacked.stdout, check=True)
        if unpacked.returncode != 0:
            raise subprocess.CalledProcessError(unpacked.returncode, f"dpkg-deb {archive}")
    shutil.rmtree(archives)
    # Debian compiles the standard library in a maintainer script; every real image has it compiled.
    library = tree / "usr/lib/python3.11"
    command = [sys.executable, "-m", "compileall", "-q", "-s", str(tree), "-p", "/", str(library)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _download(archives: Path, packages: tuple[str, ...]) -> None:
    """Bring `packages` and all that they depend on: apt itself decides, as for a system with nothing on it."""
    (archives / "partial").mkdir(parents=True)
    nothing = archives / "status"
    nothing.touch()
    settings = {
        "Dir::State::status": nothing,
        "Dir::Cache::archives": archives,
        "Dir::Cache::pkgcache": "",
        "Dir::Cache::srcpkgcache": "",
        "Debug::NoLocking": "1",
        "APT::Sandbox::User": "root",
    }
    options = [part for key, value in settings.items() for part in ("-o", f"{key}={value}")]
    command = ["apt-get", "install", "--yes", "--quiet=2", "--download-only", "--no-install-recommends"]
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    result = subprocess.run([*command, *options, *packages], env=quiet, capture_output=True, check=False)
    if result.returncode != 0:  # lists that are missing or too old
        subprocess.run(["apt-get", "update", "--quiet=2"], check=True)
        subprocess.run([*command, *options, *packages], env=quiet, stdout=subprocess.DEVNULL, check=True)


def _fill_wheels(pins: tuple[str, ...], tree: Path) -> None:
    if sys.version_info[:2] != _PYTHON:
        raise RuntimeError(f"the image's Python is {_PYTHON}, and this one cannot compile for it")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
    options = ["--no-deps", "--only-binary=:all:", "--root-user-action=ignore", "--target", str(tree / _SITE)]
    subprocess.run([*command, *options, *pins], check=True)


def _fill_files(files: tuple[tuple[str, str], ...], tree: Path) -> None:
    for name, text in files:
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _fill_weights(size: int, tree: Path) -> None:
    path = tree / "opt/model/weights.bin"
    path.parent.mkdir(parents=True)
    source = random.Random(1)
    with path.open("wb") as file:
        for _ in range(size // _CHUNK):
            file.write(source.randbytes(_CHUNK))


def _pack(tree: Path, target: Path, level: int) -> None:
    command = ["tar", "--create", "--sort=name", "--numeric-owner", "--format=posix"]
    options = ["--pax-option=delete=atime,delete=ctime", "--directory", str(tree), "."]
    with (
        target.open("wb") as out,
        subprocess.Popen([*command, *options], stdout=subprocess.PIPE) as archive,
    ):
        subprocess.run(["gzip", "-n", f"-{level}"], stdin=archive.stdout, stdout=out, check=True)
    if archive.returncode != 0:
        raise subprocess.CalledProcessError(archive.returncode, f"tar of {tree}")
