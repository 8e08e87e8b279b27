"""CRI's image service on our socket: every call goes on to containerd as it is, and credentials are noted in passing.

kubelet's `--image-service-endpoint` is then our socket. Messages pass unread, whatever their version has in them;
of PullImage and RemoveImage a few fields are looked at (proto/snapshotter/api/cri.proto).

Concurrency: gRPC's threads, each waiting for its call. There are never so many of these that none is left for what
containerd asks of us meanwhile.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final

import grpc
from google.protobuf.message import DecodeError

from snapshotter.api import cri_pb2
from snapshotter.registry.crikeychain import CriKeychain

_log = logging.getLogger(__name__)

SERVICES: Final = frozenset({"/runtime.v1.ImageService", "/runtime.v1alpha2.ImageService"})
MAX_CALLS: Final = 64
"""At once: kubelet pulls one image after another, or as many as its maxParallelImagePulls says."""
_OPTIONS: Final = [
    # Lists of images have no bound; containerd may be started after kubelet.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_reconnect_backoff_ms", 2000),
]


class ImageService(grpc.GenericRpcHandler):
    """The service in front of the one at the socket `backend`."""

    def __init__(self, backend: str, keychain: CriKeychain) -> None:
        self._channel = grpc.insecure_channel(f"unix://{backend}", options=_OPTIONS)
        self._keychain = keychain
        self._room = threading.BoundedSemaphore(MAX_CALLS)

    def close(self) -> None:
        """Let go of containerd."""
        self._channel.close()

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        """Return what answers a method of CRI's image service, None for any other method.

        Methods that stream are none of ours: kubelet goes back to those that do not.
        """
        method = handler_call_details.method
        service, _, name = method.rpartition("/")
        if service not in SERVICES or name.startswith("Stream"):
            return None
        forward: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(method)
        look = {"PullImage": self._pulls, "RemoveImage": self._removes}.get(name)

        def call(request: bytes, context: grpc.ServicerContext) -> bytes:
            return self._call(forward, look, request, context)

        return grpc.unary_unary_rpc_method_handler(call)

    def _call(
        self,
        forward: grpc.UnaryUnaryMultiCallable[bytes, bytes],
        look: Callable[[bytes], None] | None,
        request: bytes,
        context: grpc.ServicerContext,
    ) -> bytes:
        if not self._room.acquire(blocking=False):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"more than {MAX_CALLS} calls at once")
        try:
            if look is not None:
                look(request)
            metadata = tuple(
                (key, value)
                for key, value in context.invocation_metadata()
                if not key.startswith("grpc-") and key != "user-agent"
            )
            call = forward.future(request, timeout=context.time_remaining(), metadata=metadata)

            def give_up() -> None:
                call.cancel()

            context.add_callback(give_up)
            return call.result()
        except grpc.RpcError as error:
            context.abort(error.code(), error.details() or "")
            raise  # not reached: abort raises
        except grpc.FutureCancelledError:
            context.abort(grpc.StatusCode.CANCELLED, "cancelled")
            raise
        finally:
            self._room.release()

    def _pulls(self, request: bytes) -> None:
        try:
            pull = cri_pb2.PullImageRequest.FromString(request)
        except DecodeError:
            _log.warning("a PullImage request is not understood; it goes on to containerd")
            return
        auth = pull.auth
        if self._keychain.offer(
            pull.image.image,
            username=auth.username,
            password=auth.password,
            auth=auth.auth,
            server_address=auth.server_address,
            identity_token=auth.identity_token,
        ):
            _log.debug("kubelet brought credentials", extra={"image": pull.image.image})

    def _removes(self, request: bytes) -> None:
        try:
            self._keychain.forget(cri_pb2.RemoveImageRequest.FromString(request).image.image)
        except DecodeError:
            _log.warning("a RemoveImage request is not understood; it goes on to containerd")
