"""The map of the modules, executed: imports point downwards, siblings do not see each other, each third-party
library has one home. The README's map says the same, and is held to it.
"""

import re
from pathlib import Path

import pytest

from tests.support import sources
from tests.support.sources import Module

ROOT = Path(__file__).parent.parent

MAY_IMPORT: dict[str, set[str]] = {
    "oci": set(),
    "ztoc": set(),
    "api": set(),
    "registry": {"oci"},
    "layer": {"ztoc"},
    "soci": {"oci", "ztoc"},
    "snapshot": set(),
    "containerd": {"api", "oci"},
    "download": {"oci", "registry"},
    "fetch": {"layer", "registry", "ztoc"},
    "fuse": {"layer", "ztoc"},
    "daemon": {
        "oci",
        "ztoc",
        "api",
        "registry",
        "layer",
        "soci",
        "snapshot",
        "containerd",
        "download",
        "fetch",
        "fuse",
    },
    "cli": {"oci", "ztoc", "api", "registry", "layer", "soci", "containerd", "download"},
}
"""What each folder may import, beside itself and the ground: the single files next to the folders."""

HOMES: dict[str, set[str]] = {
    "pyfuse3": {"fuse"},
    "trio": {"registry", "soci", "download", "fetch", "fuse", "daemon", "cli", "nursery", "rest"},
    "httpx": {"registry"},
    "httpcore": {"registry"},
    "urllib3": {"registry"},
    "botocore": {"registry.ecrtoken"},
    "yaml": {"registry.kubeconfig"},
    "grpc": {"daemon", "containerd", "api"},
    "grpc_health": {"daemon"},
    "google": {"daemon", "containerd", "api"},
    "prometheus_client": {"daemon.metrics", "daemon.reference_metrics", "daemon.web"},
    "zstandard": {"ztoc"},
    "isal": {"ztoc"},
    "zlib_ng": {"ztoc"},
}
"""The folders (or the one module) in which each third-party library may be named."""


@pytest.fixture(scope="module")
def known() -> dict[str, Module]:
    return sources.modules(ROOT)


def ground(known: dict[str, Module]) -> set[str]:
    """Return the units that everything may import, and that import only each other; "" is the package (its version)."""
    return {module.unit for module in known.values() if not known_folder(module, known)}


def known_folder(module: Module, known: dict[str, Module]) -> bool:
    """Tell whether `module` lies in a folder of the package."""
    top = f"{sources.PACKAGE}.{module.unit}"
    return top in known and known[top].is_package


def own_imports(module: Module, known: dict[str, Module]) -> dict[str, int]:
    return {name: line for name, line in sources.imports(module, known).items() if name in known}


def test_every_folder_is_on_the_map(known: dict[str, Module]) -> None:
    folders = {module.unit for module in known.values()} - ground(known)
    assert folders == set(MAY_IMPORT)


def test_the_map_has_levels() -> None:
    assert sources.cycles(MAY_IMPORT) == []


def test_imports_point_downwards(known: dict[str, Module]) -> None:
    free = ground(known)
    wrong = [
        f"{module.path.relative_to(ROOT)}:{line} imports {name}"
        for module in known.values()
        for name, line in own_imports(module, known).items()
        if sources.unit_of(name) not in {module.unit, *free, *MAY_IMPORT.get(module.unit, ())}
    ]
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_by_a_detour(known: dict[str, Module]) -> None:
    graph = {name: own_imports(module, known) for name, module in known.items()}
    assert sources.cycles(graph) == []


def test_every_third_party_library_stays_at_home(known: dict[str, Module]) -> None:
    wrong = []
    for module in known.values():
        for name, line in sources.imports(module, known).items():
            library = name.split(".")[0]
            if library == sources.PACKAGE or sources.is_standard(name):
                continue
            places = {module.unit, module.name.removeprefix("snapshotter.")}
            if not places & HOMES.get(library, set()):
                wrong.append(f"{module.path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_no_import_of_a_module_that_is_not_there(known: dict[str, Module]) -> None:
    wrong = [
        f"{module.path.relative_to(ROOT)}:{line} imports {name}"
        for module in known.values()
        for name, line in sources.imports(module, known).items()
        if name.split(".")[0] == sources.PACKAGE and name not in known
    ]
    assert not wrong, "\n".join(wrong)


def readme_map(text: str) -> dict[str, set[str]]:
    """Return the table below `## Map`: folder to what it may import; columns `folder`, `what`, `may import`."""
    section = re.search(r"^## Map$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if section is None:
        return {}
    rows = [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in section[1].splitlines()
        if line.lstrip().startswith("|")
    ]
    assert rows[0] == ["folder", "what", "may import"]
    return {
        row[0].strip("`/").removesuffix(".py"): {
            word.strip("`/").removesuffix(".py") for word in re.findall(r"`[^`]+`", row[2])
        }
        for row in rows[2:]
    }


def test_the_readme_shows_the_same_map(known: dict[str, Module]) -> None:
    readme = ROOT / "README.md"
    shown = readme_map(readme.read_text()) if readme.exists() else {}
    if shown:
        free = ground(known)
        assert {
            folder: allowed - free for folder, allowed in shown.items() if folder not in free
        } == MAY_IMPORT


def test_a_map_is_read_from_markdown() -> None:
    text = "# x\n## Map\nwords\n\n| folder | what | may import |\n|---|---|---|\n| `ztoc/` | format | |\n| `layer/` | files | `ztoc/` |\n\n## Next\n| no |\n"
    assert readme_map(text) == {"ztoc": set(), "layer": {"ztoc"}}
