"""What the daemon is told from outside its file: command line, environment, and which of them wins.

A flag beats its environment variable, which beats the file, which beats the default. The caller adds its
subcommands to `build_parser()` and reads them from the namespace; this module knows none of them.

Pure: nothing is opened or created here.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from snapshotter import __version__, logs
from snapshotter.daemon.config.loading import DEFAULT_PATH, Loaded, load
from snapshotter.daemon.sockets import PATH_MAX
from snapshotter.errors import ConfigError

PROGRAM = "soci-snapshotter-grpc"
DEFAULT_ADDRESS = "/run/soci-snapshotter-grpc/soci-snapshotter-grpc.sock"
DEFAULT_ROOT = Path("/var/lib/soci-snapshotter-grpc")


@dataclass(frozen=True, slots=True)
class Address:
    """Where the daemon listens: at a unix socket's `path`, or (None) on the socket that systemd hands over."""

    path: Path | None

    @property
    def is_inherited(self) -> bool:
        """Whether the socket comes from systemd."""
        return self.path is None

    def __str__(self) -> str:
        return "fd://" if self.path is None else f"unix://{self.path}"


def parse_address(text: str, source: str = "--address") -> Address:
    """Return the address that `unix:///path`, `/path` or `fd://` names.

    Raises ConfigError, which names `source`, for anything else.
    """
    if text == "fd://":
        return Address(None)
    path = text.removeprefix("unix://")
    if not os.path.isabs(path) or path.endswith("/") or "\0" in path:
        raise ConfigError(
            f"{source}: must be an absolute path, unix:///an/absolute/path or fd://, got {text!r}"
        )
    if len(os.fsencode(path)) > PATH_MAX:
        raise ConfigError(f"{source}: a socket's path has at most {PATH_MAX} bytes, got {text!r}")
    return Address(Path(path))


@dataclass(frozen=True, slots=True)
class Settings:
    """What command line and environment say."""

    address: Address
    root: Path
    config_path: Path
    is_config_explicit: bool
    """The operator named the file, so it must exist."""
    log_level: str | None
    """None: what the file says."""
    namespace: argparse.Namespace
    """Everything that was parsed, the caller's subcommands included."""

    @classmethod
    def from_args(
        cls,
        argv: Sequence[str] | None = None,
        environ: Mapping[str, str] = os.environ,
        parser: argparse.ArgumentParser | None = None,
    ) -> Settings:
        """Parse `argv` (None: of this process) with `parser` (None: `build_parser()`).

        Raises ConfigError naming the flag or variable; exits as argparse does on a flag that does not exist.
        """
        namespace = (parser or build_parser()).parse_args(argv)
        address, source = _chosen(namespace, environ, "address", DEFAULT_ADDRESS)
        root, root_source = _chosen(namespace, environ, "root", str(DEFAULT_ROOT))
        config, config_source = _chosen(namespace, environ, "config", str(DEFAULT_PATH))
        level, level_source = _chosen(namespace, environ, "log_level", "")
        if not os.path.isabs(root):
            raise ConfigError(f"{root_source}: must be an absolute path, got {root!r}")
        if level and level not in logs.LEVELS:
            raise ConfigError(f"{level_source}: must be one of {', '.join(logs.LEVELS)}, got {level!r}")
        return cls(
            address=parse_address(address, source),
            root=Path(os.path.normpath(root)),
            config_path=Path(config),
            is_config_explicit=bool(config_source) and Path(config) != DEFAULT_PATH,
            log_level=level or None,
            namespace=namespace,
        )

    def load(self) -> Loaded:
        """Read the file. Raises ConfigError as `loading.load` does."""
        return load(self.config_path, explicit=self.is_config_explicit)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags that all of the daemon's commands share; they precede a subcommand."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="A lazy-loading containerd snapshotter for SOCI images.", allow_abbrev=False
    )
    parser.add_argument(
        "--address",
        metavar="ADDRESS",
        help=f"socket to serve: a path, unix://PATH or fd:// ({DEFAULT_ADDRESS})",
    )
    parser.add_argument("--config", metavar="FILE", help=f"configuration ({DEFAULT_PATH})")
    parser.add_argument("--root", metavar="DIR", help=f"state and cache ({DEFAULT_ROOT})")
    parser.add_argument(
        "--log-level", metavar="LEVEL", help=f"{', '.join(logs.LEVELS)} (of the configuration)"
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    return parser


def _chosen(
    namespace: argparse.Namespace, environ: Mapping[str, str], name: str, default: str
) -> tuple[str, str]:
    """Return a setting and the name of what set it ("" for the default). An empty variable is none."""
    flag: str | None = getattr(namespace, name)
    if flag is not None:
        return flag, "--" + name.replace("_", "-")
    variable = f"SOCI_SNAPSHOTTER_{name.upper()}"
    if environ.get(variable):
        return environ[variable], variable
    return default, ""
