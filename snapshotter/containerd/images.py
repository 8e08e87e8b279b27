"""containerd's image records: a name, what it points to, and labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from google.protobuf.field_mask_pb2 import FieldMask

from snapshotter.api import images_pb2 as pb
from snapshotter.api import types_pb2
from snapshotter.api.images_pb2_grpc import ImagesStub
from snapshotter.containerd.connection import Connection
from snapshotter.errors import AlreadyExists
from snapshotter.oci.descriptor import Descriptor
from snapshotter.units import Digest


@dataclass(frozen=True, slots=True)
class Image:
    """One record."""

    name: str
    target: Descriptor
    labels: Mapping[str, str]


class Images:
    """The image records of one namespace. Any thread may call."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = ImagesStub(connection.channel)

    def get(self, name: str) -> Image:
        """Return the image called exactly `name`. Raises NotFound."""
        answer = self._connection.call(self._stub.Get, pb.GetImageRequest(name=name), f"image {name}")
        return _image(answer.image)

    def list(self, target: Digest | None = None) -> list[Image]:
        """Return all images, or those that point to `target`, by name."""
        filters = [] if target is None else [f"target.digest=={target}"]
        answer = self._connection.call(self._stub.List, pb.ListImagesRequest(filters=filters), "images")
        return sorted((_image(image) for image in answer.images), key=lambda image: image.name)

    def put(self, name: str, target: Descriptor) -> None:
        """Make `name` point to `target`; the labels of an existing record stay."""
        image = pb.Image(name=name, target=descriptor_message(target))
        what = f"image {name}"
        try:
            self._connection.call(self._stub.Create, pb.CreateImageRequest(image=image), what)
        except AlreadyExists:
            request = pb.UpdateImageRequest(image=image, update_mask=FieldMask(paths=["target"]))
            self._connection.call(self._stub.Update, request, what)

    def label(self, name: str, labels: Mapping[str, str]) -> None:
        """Set `labels`; others stay. Raises NotFound."""
        mask = FieldMask(paths=[f"labels.{key}" for key in labels])
        # containerd 1.7 and newer read the target although the mask leaves it out, and die where there is none.
        image = pb.Image(name=name, labels=labels, target=types_pb2.Descriptor())
        request = pb.UpdateImageRequest(image=image, update_mask=mask)
        self._connection.call(self._stub.Update, request, f"image {name}")

    def remove(self, name: str, *, collect: bool = False) -> None:
        """Remove the record; with `collect`, return after the garbage collector has run. Raises NotFound."""
        request = pb.DeleteImageRequest(name=name, sync=collect)
        self._connection.call(self._stub.Delete, request, f"image {name}")


def descriptor_message(descriptor: Descriptor) -> types_pb2.Descriptor:
    """Return containerd's form of a descriptor."""
    return types_pb2.Descriptor(
        media_type=descriptor.media_type,
        digest=descriptor.digest,
        size=descriptor.size,
        annotations=descriptor.annotations,
    )


def _image(message: pb.Image) -> Image:
    target = message.target
    descriptor = Descriptor(target.media_type, Digest(target.digest), target.size, dict(target.annotations))
    return Image(message.name, descriptor, dict(message.labels))
