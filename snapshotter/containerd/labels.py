"""Labels on content that containerd's own clients set, too. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from snapshotter.oci.descriptor import Descriptor
from snapshotter.oci.reference import Reference

GC_CONTENT: Final = "containerd.io/gc.ref.content"
"""What such a label of a blob names is kept as long as the blob."""
_SOURCE: Final = "containerd.io/distribution.source"
"""With the registry's host: the repositories a blob is known to be in, so that a push may mount it from there."""


def source_label(reference: Reference) -> dict[str, str]:
    """Return the label that says where a blob came from; containerd leaves the port out."""
    host, colon, port = reference.registry.rpartition(":")
    named = host if colon and port.isdigit() else reference.registry
    return {f"{_SOURCE}.{named}": reference.repository}


def layer_references(layers: Iterable[Descriptor]) -> dict[str, str]:
    """Return the labels by which a manifest keeps its layers."""
    return {f"{GC_CONTENT}.l.{number}": str(layer.digest) for number, layer in enumerate(layers)}
