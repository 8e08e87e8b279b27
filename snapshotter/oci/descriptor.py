"""Descriptors: how one piece of content names another, with JSON in Go's field order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from snapshotter.errors import InvalidIndex
from snapshotter.units import Digest, parse_digest

MAX_SIZE = (1 << 63) - 1

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Platform:
    """What a manifest was built for, in Go's words: `linux`, `amd64`."""

    architecture: str
    os: str
    os_version: str = ""
    os_features: tuple[str, ...] = ()
    variant: str = ""

    @classmethod
    def from_json(cls, obj: object, where: str = "platform") -> Platform:
        """Return the platform that `obj` describes. Raises InvalidIndex naming the field below `where`."""
        members = expect(obj, dict, where)
        return cls(
            architecture=optional(members, "architecture", str, "", where),
            os=optional(members, "os", str, "", where),
            os_version=optional(members, "os.version", str, "", where),
            os_features=strings(members, "os.features", where),
            variant=optional(members, "variant", str, "", where),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object, its keys in Go's order, empty optional fields left out."""
        obj: dict[str, Any] = {"architecture": self.architecture, "os": self.os}
        if self.os_version:
            obj["os.version"] = self.os_version
        if self.os_features:
            obj["os.features"] = list(self.os_features)
        if self.variant:
            obj["variant"] = self.variant
        return obj

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


@dataclass(frozen=True, slots=True)
class Descriptor:
    """Media type, digest and size of some content, and what is said about it."""

    media_type: str
    digest: Digest
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict, hash=False)
    platform: Platform | None = None
    artifact_type: str = ""
    urls: tuple[str, ...] = ()
    data: str = ""
    """The content itself in base64, where somebody embedded it."""

    @classmethod
    def from_json(cls, obj: object, where: str = "descriptor") -> Descriptor:
        """Return the descriptor that `obj` describes. Raises InvalidIndex naming the field below `where`."""
        members = expect(obj, dict, where)
        digest = expect(members.get("digest"), str, f"{where}.digest")
        size = expect(members.get("size"), int, f"{where}.size")
        if not 0 <= size <= MAX_SIZE:
            raise InvalidIndex(f"{where}.size: {size} is not a size")
        try:
            parsed = parse_digest(digest)
        except ValueError as error:
            raise InvalidIndex(f"{where}.digest: {error}") from None
        platform = members.get("platform")
        return cls(
            media_type=optional(members, "mediaType", str, "", where),
            digest=parsed,
            size=size,
            annotations=string_map(members, "annotations", where),
            platform=None if platform is None else Platform.from_json(platform, f"{where}.platform"),
            artifact_type=optional(members, "artifactType", str, "", where),
            urls=strings(members, "urls", where),
            data=optional(members, "data", str, "", where),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object, its keys in Go's order, empty optional fields left out."""
        obj: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.urls:
            obj["urls"] = list(self.urls)
        if self.annotations:
            obj["annotations"] = dict(sorted(self.annotations.items()))
        if self.data:
            obj["data"] = self.data
        if self.platform is not None:
            obj["platform"] = self.platform.to_json()
        if self.artifact_type:
            obj["artifactType"] = self.artifact_type
        return obj


def expect(value: object, kind: type[T], where: str) -> T:
    """Return `value` as a `kind`. Raises InvalidIndex naming `where`; a bool is not an int."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        found = "nothing" if value is None else type(value).__name__
        raise InvalidIndex(f"{where}: expected {kind.__name__}, found {found}")
    return value


def optional(members: Mapping[str, object], key: str, kind: type[T], default: T, where: str) -> T:
    """Return `members[key]` as a `kind`, or `default` when absent or null. Raises InvalidIndex."""
    value = members.get(key)
    return default if value is None else expect(value, kind, f"{where}.{key}")


def strings(members: Mapping[str, object], key: str, where: str) -> tuple[str, ...]:
    """Return the list of strings at `key`; absent or null is empty. Raises InvalidIndex."""
    values: list[object] = optional(members, key, list, [], where)
    return tuple(expect(value, str, f"{where}.{key}[{i}]") for i, value in enumerate(values))


def string_map(members: Mapping[str, object], key: str, where: str) -> dict[str, str]:
    """Return the map of strings at `key`; absent or null is empty. Raises InvalidIndex."""
    values: dict[str, object] = optional(members, key, dict, {}, where)
    return {name: expect(value, str, f"{where}.{key}[{name!r}]") for name, value in values.items()}
