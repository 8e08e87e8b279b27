"""The generated code below snapshotter/api is what proto/ says."""

import importlib.util
from pathlib import Path
from types import ModuleType

from snapshotter.api import introspection_pb2, snapshots_pb2, types_pb2

ROOT = Path(__file__).parent.parent


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "proto/generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def texts(root: Path) -> dict[str, str]:
    package = root / "snapshotter/api"
    return {path.name: path.read_text() for path in package.iterdir() if path.suffix in {".py", ".pyi"}}


def test_the_generated_code_is_current(tmp_path: Path) -> None:
    written = generator().generate(tmp_path)
    assert {path.name for path in written} == set(texts(tmp_path))
    assert texts(tmp_path) == texts(ROOT), "run proto/generate.py"


def test_the_wire_names_are_containerds() -> None:
    assert snapshots_pb2.DESCRIPTOR.package == "containerd.services.snapshots.v1"
    assert types_pb2.Mount.DESCRIPTOR.full_name == "containerd.types.Mount"
    assert snapshots_pb2.CommitSnapshotRequest.DESCRIPTOR.fields_by_name["parent"].number == 5


def test_bytes_on_the_wire() -> None:
    mount = types_pb2.Mount(type="bind", source="/s", options=["ro", "rbind"])
    assert mount.SerializeToString() == b"\x0a\x04bind\x12\x02/s\x22\x02ro\x22\x05rbind"
    usage = snapshots_pb2.UsageResponse(size=1, inodes=2)
    assert usage.SerializeToString() == b"\x08\x01\x10\x02"
    plugin = introspection_pb2.Plugin(init_err=introspection_pb2.InitError(code=5, message="m"))
    assert plugin.SerializeToString() == b"\x3a\x05\x08\x05\x12\x01m"
