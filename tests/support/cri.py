"""A client of CRI, the protocol by which kubelet (and crictl) drives containerd: images, pods, containers.

Messages are written and read by their field numbers (k8s.io/cri-api, runtime.v1), as far as they are used here: a
request is a dict of numbers, nested where the message is. Pods live in the host's network, so that no CNI plugin is needed.

Concurrency: any number of threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import grpc

from tests.support.process import wait_until

Fields: TypeAlias = Mapping[int, "str | bytes | int | Fields | list[str]"]

_NODE, _POD, _CONTAINER = 2, 0, 1
EXITED = 2
"""The state of a container that has ended."""

_NAMESPACES: Fields = {1: _NODE, 2: _CONTAINER, 3: _POD}


class Cri:
    """One connection to the socket of containerd, or of whoever passes calls on."""

    def __init__(self, address: Path, logs: Path) -> None:
        self._channel = grpc.insecure_channel(f"unix://{address}")
        self._logs = logs

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    def pull(self, image: str) -> str:
        """Pull an image as kubelet does; return its reference by digest of the config."""
        return _text(self._call("ImageService/PullImage", {1: {1: image}}), 1)

    def remove_image(self, image: str) -> None:
        """Remove an image."""
        self._call("ImageService/RemoveImage", {1: {1: image}})

    def run_pod(self, name: str) -> str:
        """Start a pod without containers; return its id."""
        return _text(self._call("RuntimeService/RunPodSandbox", {1: self._pod(name)}), 1)

    def run(self, name: str, pod: str, image: str, *command: str, timeout: float = 60) -> tuple[int, str]:
        """Run a command in a container of the pod of this name and id, to its end; return exit code and standard output."""
        container: Fields = {
            1: {1: "c"}, 2: {1: image}, 3: list(command), 11: "c.log", 15: {2: {3: _NAMESPACES}}
        }  # fmt: skip
        made = self._call("RuntimeService/CreateContainer", {1: pod, 2: container, 3: self._pod(name)})
        container_id = _text(made, 1)
        self._call("RuntimeService/StartContainer", {1: container_id})

        def status() -> dict[int, list[bytes | int]]:
            reply = self._call("RuntimeService/ContainerStatus", {1: container_id})
            return _decode(_bytes(reply, 1))

        wait_until(lambda: status().get(3) == [EXITED], timeout=timeout, what="the container has ended")
        log = (self._logs / name / "c.log").read_text()
        code = status().get(7, [0])[0]
        assert isinstance(code, int)
        return code, "".join(line.split(" ", 3)[3] + "\n" for line in log.splitlines())

    def remove_pod(self, pod: str) -> None:
        """Stop a pod and remove it with its containers."""
        for method in ("StopPodSandbox", "RemovePodSandbox"):
            self._call(f"RuntimeService/{method}", {1: pod})

    def _pod(self, name: str) -> Fields:
        return {
            1: {1: name, 2: f"{name}-uid", 3: "default"},
            3: str(self._logs / name),
            8: {2: {1: _NAMESPACES}},
        }

    def _call(self, method: str, request: Fields) -> dict[int, list[bytes | int]]:
        call: Any = self._channel.unary_unary(f"/runtime.v1.{method}")
        return _decode(call(_encode(request), timeout=120))


def _encode(fields: Fields) -> bytes:
    """Return a message; zero is left out, as in proto3."""
    encoded = b""
    for number, value in fields.items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, int):
                encoded += _varint(number << 3) + _varint(each) if each else b""
                continue
            data = _encode(each) if isinstance(each, Mapping) else each
            data = data.encode() if isinstance(data, str) else data
            encoded += _varint(number << 3 | 2) + _varint(len(data)) + data
    return encoded


def _decode(data: bytes) -> dict[int, list[bytes | int]]:
    """Return the numbers and the bytes of a message by field; nested messages are bytes."""
    fields: dict[int, list[bytes | int]] = {}
    at = 0
    while at < len(data):
        key, at = _read(data, at)
        value, at = _read(data, at)
        if key & 7 == 2:
            fields.setdefault(key >> 3, []).append(data[at : at + value])
            at += value
        else:
            assert key & 7 == 0, "CRI has no other kind where we look"
            fields.setdefault(key >> 3, []).append(value)
    return fields


def _bytes(fields: dict[int, list[bytes | int]], number: int) -> bytes:
    value = fields[number][0]
    assert isinstance(value, bytes)
    return value


def _text(fields: dict[int, list[bytes | int]], number: int) -> str:
    return _bytes(fields, number).decode()


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def _read(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
