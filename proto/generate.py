"""Write snapshotter/api/ from the .proto files beside this script.

Run it after every change below proto/ or of grpcio-tools and mypy-protobuf:

    python proto/generate.py [DIRECTORY]

DIRECTORY takes the place of the repository's root as the place to write to. Needs grpcio-tools and
mypy-protobuf in the running interpreter's environment. A test fails when the committed code is not
what this script writes.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROTO = Path(__file__).resolve().parent
PACKAGE = Path("snapshotter", "api")

_INIT = (
    '"""Generated from proto/ by proto/generate.py: containerd\'s services as this project speaks them."""\n'
)


def generate(target: Path) -> list[Path]:
    """Write the generated package below `target`; return its files, relative to it and sorted.

    Raises subprocess.CalledProcessError when protoc refuses a file; it has then said why on stderr.
    """
    sources = sorted((PROTO / PACKAGE).glob("*.proto"))
    services = [path for path in sources if "\nservice " in path.read_text(encoding="utf-8")]
    (target / PACKAGE).mkdir(parents=True, exist_ok=True)
    _protoc(sources, f"--python_out={target}", f"--mypy_out=quiet:{target}")
    _protoc(services, f"--grpc_python_out={target}", f"--mypy_grpc_out=quiet:{target}")
    (target / PACKAGE / "__init__.py").write_text(_INIT, encoding="utf-8")
    return sorted(path.relative_to(target) for path in (target / PACKAGE).glob("*.py*") if path.is_file())


def _protoc(sources: list[Path], *outputs: str) -> None:
    scripts = Path(sys.executable).parent
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc"),
            f"--proto_path={PROTO}",
            f"--plugin=protoc-gen-mypy={scripts / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={scripts / 'protoc-gen-mypy_grpc'}",
            *outputs,
            *(str(path.relative_to(PROTO)) for path in sources),
        ],
        cwd=PROTO,
        check=True,
    )


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else PROTO.parent)
