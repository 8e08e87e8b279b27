"""What containerd is sent about images, where its versions differ in what they bear."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty

from snapshotter.api import images_pb2, images_pb2_grpc
from snapshotter.containerd.client import Containerd
from snapshotter.oci.descriptor import Descriptor
from snapshotter.units import Digest

TARGET = Descriptor("application/vnd.oci.image.manifest.v1+json", Digest("sha256:" + "0" * 64), 7)


class Service(images_pb2_grpc.ImagesServicer):
    """Notes updates; every image exists."""

    def __init__(self) -> None:
        self.updates: list[images_pb2.UpdateImageRequest] = []

    def Create(self, request: object, context: grpc.ServicerContext) -> Empty:  # noqa: N802
        context.abort(grpc.StatusCode.ALREADY_EXISTS, "it does")
        raise AssertionError

    def Update(  # noqa: N802
        self,
        request: images_pb2.UpdateImageRequest,
        context: grpc.ServicerContext,
    ) -> images_pb2.UpdateImageResponse:
        self.updates.append(request)
        return images_pb2.UpdateImageResponse()


@pytest.fixture
def service(workdir: Path) -> Iterator[Service]:
    service = Service()
    server = grpc.server(ThreadPoolExecutor(2))
    images_pb2_grpc.add_ImagesServicer_to_server(service, server)
    server.add_insecure_port(f"unix://{workdir / 'c.sock'}")
    server.start()
    yield service
    server.stop(0).wait()


def test_every_update_has_a_target(service: Service, workdir: Path) -> None:
    """containerd 1.7 and 2.1 follow the pointer before they look at the mask."""
    with Containerd.connect(str(workdir / "c.sock"), "default") as containerd:
        containerd.images.put("name", TARGET)
        containerd.images.label("name", {"key": "value"})
    assert [list(update.update_mask.paths) for update in service.updates] == [["target"], ["labels.key"]]
    assert all(update.image.HasField("target") for update in service.updates)
