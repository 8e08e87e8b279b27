"""The wheel as pip installs it, and the package's list of libraries. (The package itself: tests/systemd.)"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from deb.build import PROGRAMS, ROOT, build_wheel, libraries
from snapshotter import __version__
from snapshotter.daemon.main import main


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory into which pip has installed the wheel, without what it depends on."""
    directory = tmp_path_factory.mktemp("wheel")
    target = directory / "target"
    wheel = build_wheel(ROOT, directory)
    assert wheel.name == f"soci_lazy_snapshotter-{__version__}-py3-none-any.whl"
    subprocess.run(
        [
            sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps",
            "--no-index", "--target", str(target), str(wheel),
        ],
        check=True, timeout=120,
    )  # fmt: skip
    return target


@pytest.mark.parametrize("program", PROGRAMS)
def test_an_installed_program_runs(installed: Path, program: str) -> None:
    environ = {**os.environ, "PYTHONPATH": str(installed)}
    command = [str(installed / "bin" / program), "--version"]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=True, env=environ, cwd="/"
    )
    assert result.stdout.strip().endswith(__version__)


def test_every_file_of_the_program_is_in_the_wheel(installed: Path) -> None:
    ours = {path.relative_to(ROOT) for path in (ROOT / "snapshotter").rglob("*.py")}
    assert {path for path in ours if not (installed / path).exists()} == set()
    assert (installed / "snapshotter/py.typed").exists()


def test_the_package_runs_the_programs_that_the_wheel_installs() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {name: f"{module}:main" for name, module in PROGRAMS.items()}


def test_the_package_brings_every_library_and_those_that_they_need() -> None:
    locked = re.findall(r"^([A-Za-z0-9._-]+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    found = {name.lower().replace("_", "-") for name in libraries()}
    assert {name.lower() for name in locked} <= found
    assert {"botocore", "pyyaml", "six"} <= found
    assert not {"pytest", "mypy", "ruff"} & found


def commands() -> list[list[str]]:
    """Return the commands of the daemon's program that docs/install.md shows in blocks of code."""
    text = (ROOT / "docs/install.md").read_text()
    lines = [line.partition("#")[0].split() for line in text.splitlines() if line.startswith("    ")]
    return [line[1:] for line in lines if line[:1] == ["soci-snapshotter-grpc"]]


def test_the_manual_shows_commands_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert ["install-check"] in commands()
    for arguments in commands():
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--help"])
        assert ended.value.code == 0, arguments
    capsys.readouterr()
