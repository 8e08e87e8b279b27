"""CRI's image service through our socket: calls pass as they are, credentials stay here."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import trio

from snapshotter.api import cri_pb2
from snapshotter.daemon import imageservice
from snapshotter.daemon.imageservice import ImageService
from snapshotter.registry.crikeychain import MAX_EACH, MAX_REPOSITORIES, CriKeychain
from snapshotter.registry.keychain import Credentials
from tests.conftest import ExpectedLogs
from tests.support.containerd import Containerd
from tests.support.dockerregistry import Credentials as Login
from tests.support.dockerregistry import DockerRegistry
from tests.support.images import ImageBuilder
from tests.support.process import wait_until

PULL = "/runtime.v1.ImageService/PullImage"


class Backend(grpc.GenericRpcHandler):  # type: ignore[misc]
    """containerd, played: answers with what it was asked, or as it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, bytes]] = []
        self.metadata: dict[str, Any] = {}
        self.refusal: grpc.StatusCode | None = None
        self.hold = threading.Event()
        self.hold.set()
        self.cancelled = threading.Event()

    def service(self, details: Any) -> Any:
        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            self.calls.append((details.method, request))
            self.metadata = dict(context.invocation_metadata())
            if not context.add_callback(self.cancelled.set):  # it is over already
                self.cancelled.set()
            self.hold.wait(60)
            if self.refusal is not None:
                context.abort(self.refusal, "as told")
            return b"\x0a\x02ok" + request

        return grpc.unary_unary_rpc_method_handler(answer)


def serve(path: Path, *handlers: Any) -> grpc.Server:
    server = grpc.server(ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers(list(handlers))
    server.add_insecure_port(f"unix://{path}")
    server.start()
    return server


@pytest.fixture
def keychain() -> CriKeychain:
    return CriKeychain()


@pytest.fixture
def backend() -> Backend:
    return Backend()


@pytest.fixture
def channel(workdir: Path, keychain: CriKeychain, backend: Backend) -> Iterator[grpc.Channel]:
    behind = serve(workdir / "b.sock", backend)
    proxy = ImageService(str(workdir / "b.sock"), keychain)
    front = serve(workdir / "f.sock", proxy)
    with grpc.insecure_channel(f"unix://{workdir / 'f.sock'}") as channel:
        yield channel
    front.stop(0).wait()
    proxy.close()
    backend.hold.set()
    behind.stop(0).wait()


def found(keychain: CriKeychain, host: str, repository: str, *refused: Credentials) -> Credentials | None:
    async def main() -> Credentials | None:
        return await keychain.lookup(host, repository, refused=refused)

    return trio.run(main)


def pull(image: str, **auth: str) -> bytes:
    request = cri_pb2.PullImageRequest(
        image=cri_pb2.ImageSpec(image=image), auth=cri_pb2.AuthConfig(**auth) if auth else None
    )
    # A field that we know nothing of.
    return bytes(request.SerializeToString()) + b"\x1a\x03abc"


def test_calls_pass_as_they_are(channel: grpc.Channel, backend: Backend, keychain: CriKeychain) -> None:
    request = pull("r.example/app:v1", username="u", password="p")
    reply = channel.unary_unary(PULL)(request, timeout=60, metadata=[("x-mine", "yes")])
    assert reply == b"\x0a\x02ok" + request
    for name in ("/runtime.v1.ImageService/SomethingNew", "/runtime.v1alpha2.ImageService/ListImages"):
        assert channel.unary_unary(name)(b"any", timeout=60) == b"\x0a\x02okany"
    assert [method for method, _ in backend.calls] == [
        PULL,
        "/runtime.v1.ImageService/SomethingNew",
        "/runtime.v1alpha2.ImageService/ListImages",
    ]
    assert found(keychain, "r.example", "app") == Credentials("u", "p")
    assert found(keychain, "r.example", "other") is None
    assert found(keychain, "s.example", "app") is None


@pytest.mark.parametrize(
    "method", ["/runtime.v1.RuntimeService/Status", "/runtime.v1.ImageService/StreamImages"]
)
def test_what_is_not_the_image_services_is_not_answered(channel: grpc.Channel, method: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(method)(b"", timeout=60)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_refusals_pass_too(channel: grpc.Channel, backend: Backend) -> None:
    backend.refusal = grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(PULL)(pull("app"), timeout=60)
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.NOT_FOUND, "as told")


def test_whoever_gives_up_ends_the_call_behind(channel: grpc.Channel, backend: Backend) -> None:
    backend.hold.clear()
    call = channel.unary_unary(PULL).future(pull("app"), timeout=60)
    wait_until(lambda: backend.calls, timeout=60, what="the call has come through")
    with pytest.raises(grpc.FutureTimeoutError):
        call.result(timeout=0.5)
    call.cancel()
    assert backend.cancelled.wait(60)


def test_there_is_always_room_for_containerd(
    channel: grpc.Channel, backend: Backend, monkeypatch: pytest.MonkeyPatch, workdir: Path
) -> None:
    monkeypatch.setattr(imageservice, "MAX_CALLS", 1)
    proxy = ImageService(str(workdir / "b.sock"), CriKeychain())
    front = serve(workdir / "g.sock", proxy)
    backend.hold.clear()
    with grpc.insecure_channel(f"unix://{workdir / 'g.sock'}") as other:
        first = other.unary_unary(PULL).future(pull("app"), timeout=60)
        wait_until(lambda: backend.calls or first.done(), timeout=60, what="the call has come through")
        assert not first.done()
        with pytest.raises(grpc.RpcError) as caught:
            other.unary_unary(PULL)(pull("app"), timeout=60)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        backend.hold.set()
        assert first.result(60)
    front.stop(0).wait()
    proxy.close()


def test_a_request_that_is_no_message_goes_on(
    channel: grpc.Channel, backend: Backend, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("a PullImage request is not understood")
    expected_logs.allow("a RemoveImage request is not understood")
    for name in ("PullImage", "RemoveImage"):
        channel.unary_unary(f"/runtime.v1.ImageService/{name}")(b"\xff", timeout=60)
    assert len(backend.calls) == 2


def test_a_removed_images_credentials_go(channel: grpc.Channel, keychain: CriKeychain) -> None:
    channel.unary_unary(PULL)(pull("app", username="u", password="p"), timeout=60)
    assert found(keychain, "docker.io", "library/app") == Credentials("u", "p")
    remove = cri_pb2.RemoveImageRequest(image=cri_pb2.ImageSpec(image="docker.io/library/app:latest"))
    channel.unary_unary("/runtime.v1.ImageService/RemoveImage")(remove.SerializeToString(), timeout=60)
    assert found(keychain, "docker.io", "library/app") is None


@pytest.mark.parametrize(
    ("auth", "expected"),
    [
        ({"username": "u", "password": "p"}, Credentials("u", "p")),
        ({"auth": base64.b64encode(b"u:p:q").decode()}, Credentials("u", "p:q")),
        ({"identity_token": "t"}, Credentials("<token>", "t")),
        (
            {"username": "u", "password": "p", "server_address": "https://r.example/v2/"},
            Credentials("u", "p"),
        ),
        ({"username": "u", "password": "p", "server_address": "other.example"}, None),
        ({"auth": "not base64!"}, None),
        ({"auth": "\u044fw"}, None),
        ({"auth": base64.b64encode(b"no colon").decode()}, None),
        ({"registry_token": "t"}, None),
        ({}, None),
    ],
)
def test_every_form_of_credentials(
    keychain: CriKeychain, auth: dict[str, str], expected: Credentials | None
) -> None:
    auth.pop("registry_token", None)
    assert keychain.offer("r.example/app@sha256:" + "0" * 64, **auth) is (expected is not None)
    assert found(keychain, "r.example", "app") == expected


def test_new_ones_come_first_and_old_ones_stay_for_a_while(keychain: CriKeychain) -> None:
    for number in range(MAX_EACH + 2):
        keychain.offer("r.example/app", username="u", password=str(number))
    keychain.offer("r.example/app", username="u", password="3")
    order: list[Credentials] = []
    while (one := found(keychain, "r.example", "app", *order)) is not None:
        order.append(one)
    assert [one.secret for one in order] == ["3", "5", "4", "2"]


def test_memory_is_bounded(keychain: CriKeychain) -> None:
    for number in range(MAX_REPOSITORIES + 3):
        keychain.offer(f"r.example/app{number}", username="u")
    assert len(keychain) == MAX_REPOSITORIES
    keychain.forget("sha256:" + "0" * 64)
    assert not keychain.offer("0" * 64, username="u")


def test_kubelets_pull_through_us_with_a_real_containerd(
    workdir: Path, root: None, keychain: CriKeychain
) -> None:
    login = Login("kubelet", "pull-secret")
    registry = DockerRegistry(workdir / "r", credentials=login)
    containerd = Containerd(workdir / "c", cri="overlayfs")
    try:
        registry.start()
        image = ImageBuilder(workdir / "i").layer({"file": b"x"}).build()
        name = registry.push(image, "app")
        containerd.start()
        proxy = ImageService(str(containerd.address), keychain)
        front = serve(workdir / "f.sock", proxy)
        with grpc.insecure_channel(f"unix://{workdir / 'f.sock'}") as channel:
            request = pull(name, username=login.username, password=login.password)[:-5]
            reply = channel.unary_unary(PULL)(request, timeout=60)
            assert b"sha256:" in reply
            listed = channel.unary_unary("/runtime.v1.ImageService/ListImages")(b"", timeout=60)
            assert name.encode() in listed
        front.stop(0).wait()
        proxy.close()
        assert found(keychain, registry.name, "app") == Credentials(login.username, login.password)
    finally:
        containerd.kill()
        registry.cleanup()
