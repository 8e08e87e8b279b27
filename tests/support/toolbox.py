"""A Python that runs in any container: interpreter, loader, shared libraries and modules in one directory.

An image under test may hold no program at all. This directory, bound into its container, brings one: started
through its own dynamic loader it needs nothing of the image. It holds the scripts of `SCRIPTS` and just the modules
that they import.

Owns the directory it makes. One process at a time makes one.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.chaos import reader
from tests.support import treedump

SCRIPTS = (Path(treedump.__file__), Path(reader.__file__))
_LIBRARY = re.compile(r"(?:=> |^\s*)(/\S+) \(0x", re.MULTILINE)
# Encodings and the like are imported by the interpreter itself, by name, at a moment of its own choice.
_LIST_MODULES = """
import json, runpy, sys, encodings.utf_8, encodings.latin_1, encodings.ascii
for script in sys.argv[1:]:
    runpy.run_path(script)
files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
print(json.dumps([file for file in files if file]))
"""


def make(directory: Path) -> Path:
    """Return `directory` as a toolbox, filled unless it is one already."""
    done = directory / "complete"
    if done.exists():
        return directory
    shutil.rmtree(directory, ignore_errors=True)
    interpreter = Path(sys.executable).resolve()
    library = Path(json.__file__).parent.parent
    target = directory / "lib" / library.name
    (directory / "bin").mkdir(parents=True)
    (directory / "shared").mkdir()
    shutil.copy(interpreter, directory / "bin/python3")
    binaries = [interpreter]
    for file in _imported_files(interpreter):
        place = target / file.relative_to(library)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
        if file.suffix == ".so":
            binaries.append(file)
    for shared in {path for binary in binaries for path in _libraries(binary)}:
        shutil.copy(shared, directory / "shared" / shared.name)
    for script in SCRIPTS:
        shutil.copy(script, directory / script.name)
    done.touch()
    return directory


def command(directory: str, script: str, *arguments: str) -> list[str]:
    """Return the command that runs `script` of the toolbox that is bound to `directory` in a container."""
    return [
        *(f"{directory}/shared/{_loader().name}", "--library-path", f"{directory}/shared"),
        *(f"{directory}/bin/python3", "-I", "-S", "-B", f"{directory}/{script}", *arguments),
    ]


def _imported_files(interpreter: Path) -> list[Path]:
    result = subprocess.run(
        [interpreter, "-I", "-S", "-B", "-c", _LIST_MODULES, *SCRIPTS],
        check=True,
        capture_output=True,
        timeout=60,
    )
    return [Path(name) for name in json.loads(result.stdout)]


def _libraries(binary: Path) -> list[Path]:
    result = subprocess.run(["ldd", binary], check=True, capture_output=True, text=True, timeout=60)
    return [Path(name) for name in _LIBRARY.findall(result.stdout)]


def _loader() -> Path:
    """Return the dynamic loader of this interpreter."""
    found = [path for path in _libraries(Path(sys.executable).resolve()) if path.name.startswith("ld-")]
    assert found, f"{sys.executable} names no dynamic loader"
    return found[0]
