"""Build the Debian package: the program with an environment of its own, units, and what containerd has to know.

    make deb        # dist/soci-lazy-snapshotter_VERSION_ARCH.deb

The package holds a whole virtual environment below /usr/lib/soci-snapshotter: our wheel, and the libraries that are
installed in this one, which came from the lock file with their hashes checked and are what the tests ran on. Nothing
is fetched. Of the host it takes Python's interpreter, of the version that builds it, and libfuse3.

Build it on the oldest distribution that it is to run on: compiled libraries follow the C library of the builder.
"""

from __future__ import annotations

import argparse
import compileall
import py_compile
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from snapshotter import __version__

ROOT = Path(__file__).resolve().parents[1]
NAME = "soci-lazy-snapshotter"
PREFIX = Path("usr/lib/soci-snapshotter")
EXTRAS = ("ecr", "kubernetes")
"""Of pyproject.toml: what takes a choice with pip comes with the package."""

PROGRAMS = {"soci-snapshotter-grpc": "snapshotter.daemon.main", "soci": "snapshotter.cli.main"}
_PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
_SITE = PREFIX / "lib" / _PYTHON / "site-packages"

_CONTROL = """\
Package: {name}
Version: {version}
Architecture: {architecture}
Maintainer: The snapshotter authors <snapshotter@localhost>
Installed-Size: {size}
Depends: {python}, libc6, libfuse3-3
Recommends: containerd | containerd.io
Conflicts: soci-snapshotter
Replaces: soci-snapshotter
Section: admin
Priority: optional
Description: lazy-loading containerd snapshotter for SOCI images
 containerd asks it, as a proxy plugin, for an image's layers. Instead of having
 them downloaded and unpacked it mounts them, and fetches what is read when it is
 read. Containers go on reading while it is restarted or upgraded.
"""

_LAUNCHER = """\
#!/{prefix}/bin/{python}
import sys

from {module} import main

sys.exit(main())
"""


def build(output: Path, *, source: Path = ROOT, version: str = __version__, compress: bool = True) -> Path:
    """Write the package of the checkout `source` to the directory `output` and return its path.

    `version` is the package's; the program's own is in its sources. Raises CalledProcessError, OSError.
    """
    architecture = _output("dpkg", "--print-architecture")
    output.mkdir(parents=True, exist_ok=True)
    package = output / f"{NAME}_{version}_{architecture}.deb"
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "tree"
        tree.mkdir(mode=0o755)
        _environment(tree, build_wheel(source, Path(scratch)))
        _service(tree, source)
        _maintainer_files(tree, version, architecture)
        form = [] if compress else ["-Znone"]
        _output("dpkg-deb", *form, "--root-owner-group", "--build", str(tree), str(package))
    return package


def build_wheel(source: Path, output: Path) -> Path:
    """Build the wheel of the checkout `source` in the directory `output`, from a copy: building leaves litter."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "source"
        shutil.copytree(
            source / "snapshotter", copy / "snapshotter", ignore=shutil.ignore_patterns("__pycache__")
        )
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(source / name, copy / name)
        options = [
            "--no-deps",
            "--no-build-isolation",
            "--no-index",
            "--quiet",
            "--disable-pip-version-check",
        ]
        _output(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(output), str(copy))
    (wheel,) = output.glob("soci_lazy_snapshotter-*.whl")
    return wheel


def libraries() -> set[str]:
    """Return the names of the libraries that the program needs with its `EXTRAS`, and of those that they need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [each for name in EXTRAS for each in project["optional-dependencies"][name]]
    wanted = [Requirement(each) for each in [*project["dependencies"], *extras]]
    found: set[str] = set()
    while wanted:
        one = wanted.pop()
        if one.name not in found and (one.marker is None or one.marker.evaluate({"extra": ""})):
            found.add(one.name)
            wanted += map(Requirement, metadata.requires(one.name) or [])
    return found


def _environment(tree: Path, wheel: Path) -> None:
    site, programs = tree / _SITE, tree / PREFIX / "bin"
    site.mkdir(parents=True)
    programs.mkdir()
    for name in sorted(libraries()):
        _copy_library(name, site)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # Checked never: the package's files are dpkg's. So nothing is compiled, or written, on the host.
    compileall.compile_dir(
        site, quiet=2, stripdir=str(tree), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
    )
    (programs / _PYTHON).symlink_to(f"/usr/bin/{_PYTHON}")
    version = ".".join(map(str, sys.version_info[:3]))
    (tree / PREFIX / "pyvenv.cfg").write_text(
        f"home = /usr/bin\ninclude-system-site-packages = false\nversion = {version}\n"
    )
    (tree / "usr/bin").mkdir()
    for name, module in PROGRAMS.items():
        text = _LAUNCHER.format(prefix=PREFIX, python=_PYTHON, module=module)
        _write(programs / name, text, mode=0o755)
        (tree / "usr/bin" / name).symlink_to(f"/{PREFIX}/bin/{name}")


def _copy_library(name: str, site: Path) -> None:
    """Copy the files that an installed distribution lists, its scripts and compiled files apart."""
    distribution = metadata.distribution(name)
    for file in distribution.files or []:
        if ".." not in file.parts and "__pycache__" not in file.parts:
            target = site / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(str(distribution.locate_file(file)), target)


def _service(tree: Path, source: Path) -> None:
    units = tree / "usr/lib/systemd/system"
    units.mkdir(parents=True)
    for unit in (*(source / "systemd").glob("*.service"), *(source / "systemd").glob("*.socket")):
        _write(units / unit.name, unit.read_text().replace("/usr/local/bin/", "/usr/bin/"))
    _write(
        tree / "usr/lib/tmpfiles.d/soci-snapshotter.conf",
        (source / "systemd/soci-snapshotter.tmpfiles").read_text(),
    )
    _write(tree / "etc/containerd/conf.d/soci-snapshotter.toml", (source / "deb/containerd.toml").read_text())
    documents = tree / "usr/share/doc" / NAME
    for name in ("config.toml.example", "CHANGELOG.md"):
        _write(documents / name, (source / name).read_text())
    _write(documents / "copyright", (source / "LICENSE").read_text())
    for document in (source / "docs").glob("*.md"):
        _write(documents / document.name, document.read_text())


def _maintainer_files(tree: Path, version: str, architecture: str) -> None:
    size = sum(path.lstat().st_size for path in tree.rglob("*") if path.is_file()) // 1024
    control = _CONTROL.format(
        name=NAME, version=version, architecture=architecture, size=size, python=_PYTHON
    )
    _write(tree / "DEBIAN/control", control)
    _write(tree / "DEBIAN/conffiles", "/etc/containerd/conf.d/soci-snapshotter.toml\n")
    for script in ("postinst", "prerm", "postrm"):
        _write(tree / "DEBIAN" / script, (ROOT / "deb" / script).read_text(), mode=0o755)


def _write(path: Path, text: str, *, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


def _output(*command: str) -> str:
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return result.stdout.strip()


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description="Build the Debian package.")
    arguments.add_argument("output", type=Path)
    print(build(arguments.parse_args().output))
