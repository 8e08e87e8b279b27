"""Kubernetes' way: kubelet's calls pull an image lazily through us and run a pod of it, pause image included."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.containerd import Containerd
from tests.support.cri import Cri
from tests.support.dockerregistry import DockerRegistry
from tests.support.images import Entry, ImageBuilder
from tests.support.lazysystem import LazySystem
from tests.support.process import Daemon, wait_until
from tests.support.program import cat

TEXT = "".join(f"line {number} of the file that the pod reads\n" for number in range(20_000))
pytestmark = pytest.mark.usefixtures("root")


@dataclass
class Node:
    """A node as docs/clients.md sets it up."""

    system: LazySystem
    images: Cri
    """As kubelet with `imageServiceEndpoint`: by our socket."""
    pods: Cri
    reference: str
    """Of an image that nobody has pulled."""


@pytest.fixture
def node(workdir: Path) -> Iterator[Node]:
    with ExitStack() as stack:
        registry = DockerRegistry(workdir / "registry")
        stack.callback(registry.cleanup)
        registry.start()
        service = str(workdir / "c/c.sock")
        config = {
            "cri_keychain": {"enable_keychain": True, "image_service_path": service},
            "content_store": {"containerd_address": service},
        }
        daemon = Daemon(workdir / "soci", config)
        stack.callback(daemon.cleanup)
        daemon.start()
        program = {"cat": Entry(cat(), mode=0o755)}
        pause = ImageBuilder(workdir / "pause").layer(program).config(Cmd=["/cat"]).build()
        containerd = Containerd(
            workdir / "c",
            snapshotters={"soci": daemon.address},
            cri="soci",
            pause=registry.push(pause, "pause"),
        )
        stack.callback(containerd.cleanup)
        containerd.start()
        system = LazySystem(registry, containerd, daemon)
        image = ImageBuilder(workdir / "image").layer(program).layer({"text": TEXT.encode()}).build()
        reference = system.publish(image, "app", "--min-layer-size", "0", "--span-size", "65536")
        images, pods = (
            stack.enter_context(Cri(address, workdir / "pods"))
            for address in (daemon.address, containerd.address)
        )
        yield Node(system, images, pods, reference)


def test_kubelet_pulls_lazily_and_a_pod_reads(node: Node) -> None:
    assert node.images.pull(node.reference).startswith("sha256:")
    assert len(node.system.mounts()) == 2
    pod = node.pods.run_pod("pod")
    code, output = node.pods.run("pod", pod, node.reference, "/cat", "/text")
    assert code == 0
    assert output == TEXT
    assert node.system.daemon.metrics()['soci_fuse_requests_total{kind="read"}'] > 0
    node.pods.remove_pod(pod)
    node.images.remove_image(node.reference)
    # What stays is the bottom layer, which the pause image shares.
    wait_until(
        lambda: len(node.system.mounts()) == 1, timeout=60, what="the image's own mount is gone with it"
    )
