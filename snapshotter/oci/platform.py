"""Platforms: the host's own, the ones users write, and whether one is the other.

Names are normalised as containerd does, so that `aarch64`, `arm64` and `arm64/v8` are one platform.
Deliberately not here: which lesser variant a host could also run.
"""

from __future__ import annotations

import platform as host
import re
import sys
from dataclasses import replace
from typing import Final

from snapshotter.errors import UsageError
from snapshotter.oci.descriptor import Platform

_ARCHITECTURES: Final = {
    "x86_64": ("amd64", ""),
    "x86-64": ("amd64", ""),
    "aarch64": ("arm64", ""),
    "i386": ("386", ""),
    "i486": ("386", ""),
    "i586": ("386", ""),
    "i686": ("386", ""),
    "armhf": ("arm", "v7"),
    "armel": ("arm", "v6"),
    "armv5l": ("arm", "v5"),
    "armv6l": ("arm", "v6"),
    "armv7l": ("arm", "v7"),
    "armv8l": ("arm", "v8"),
    "loongarch64": ("loong64", ""),
}
_SYSTEMS: Final = frozenset({"linux", "windows", "darwin", "freebsd", "netbsd", "openbsd", "solaris"})
# The variant that an architecture has when nobody says one; it is written as none, except on 32-bit ARM.
_BASE_VARIANT: Final = {"amd64": "v1", "arm64": "v8"}
_PART: Final = re.compile("[A-Za-z0-9_.-]+")


def host_platform() -> Platform:
    """Return the platform of this machine."""
    return normalise(Platform(architecture=host.machine(), os=sys.platform))


def parse_platform(text: str) -> Platform:
    """Return the platform written as `os/architecture[/variant]`, as an os or as an architecture alone.

    What is left out is the host's. Raises UsageError.
    """
    parts = text.split("/")
    if len(parts) > 3 or not all(map(_PART.fullmatch, parts)):
        raise UsageError(f"platform {text!r}: write it as os/architecture or os/architecture/variant")
    if len(parts) == 1:
        system = parts[0].lower()
        own = host_platform()
        return replace(own, os=system) if system in _SYSTEMS else normalise(Platform(system, own.os))
    return normalise(Platform(architecture=parts[1], os=parts[0], variant=parts[2] if parts[2:] else ""))


def matches(want: Platform, have: Platform) -> bool:
    """Say whether a manifest for `have` is one for `want`. An os version counts when both name one."""
    want, have = normalise(want), normalise(have)
    if want.os_version and have.os_version and want.os_version != have.os_version:
        return False
    return (want.os, want.architecture, want.variant) == (have.os, have.architecture, have.variant)


def normalise(platform: Platform) -> Platform:
    """Return `platform` by the names that image indices use."""
    architecture = platform.architecture.lower()
    architecture, implied = _ARCHITECTURES.get(architecture, (architecture, ""))
    variant = platform.variant.lower() or implied
    if variant.isdigit():
        variant = "v" + variant
    if architecture == "arm" and not variant:
        variant = "v7"
    if variant == _BASE_VARIANT.get(architecture):
        variant = ""
    system = platform.os.lower()
    return replace(
        platform,
        architecture=architecture,
        os="darwin" if system == "macos" else system,
        variant=variant,
    )
