"""Configuration of the daemon: one typed tree, one default per value, and strict about what a file may say.

    keys       what a key may hold, and the sentence that says so
    sources    the tree's half about registries, credentials and ways to pull
    schema     the tree; `Config()` is the default
    reference  keys of the reference snapshotter that are renamed, still to come, or without effect
    locate     line numbers, which tomllib does not give
    conflicts  values that are each right and cannot be right together
    reading    parsed TOML to `Config`, noting every mistake
    loading    a file to `Config` and warnings
    writing    `Config` to TOML; the example file and the documentation
    arguments  command line and environment
    command    `config default|dump|check`

Each module knows only those above it. Nobody else parses settings: processes are given values.
"""

from snapshotter.daemon.config.arguments import (
    DEFAULT_ADDRESS,
    DEFAULT_ROOT,
    Address,
    Settings,
    build_parser,
    parse_address,
)
from snapshotter.daemon.config.command import ACTIONS, EXIT_CONFIG, run_config_command
from snapshotter.daemon.config.loading import DEFAULT_PATH, Loaded, check, load
from snapshotter.daemon.config.schema import Config
from snapshotter.daemon.config.sources import Retry
from snapshotter.daemon.config.writing import default_text, dump

__all__ = [
    "ACTIONS",
    "DEFAULT_ADDRESS",
    "DEFAULT_PATH",
    "DEFAULT_ROOT",
    "EXIT_CONFIG",
    "Address",
    "Config",
    "Loaded",
    "Retry",
    "Settings",
    "build_parser",
    "check",
    "default_text",
    "dump",
    "load",
    "parse_address",
    "run_config_command",
]
