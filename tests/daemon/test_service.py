"""The gRPC edge: the same contract over a socket, statuses, streaming, and what a client never gets to see."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from snapshotter import errors
from snapshotter.api import snapshots_pb2 as api
from snapshotter.daemon.service import STATUS, SnapshotsService, info_message, status_of
from snapshotter.snapshot.directories import metadata_path
from snapshotter.snapshot.model import LABEL_NAMESPACE, LABEL_TARGET, Info, Kind
from snapshotter.snapshot.snapshotter import Snapshotter
from snapshotter.snapshot.store import SnapshotStore
from tests.conftest import ExpectedLogs
from tests.contract import CHECKS
from tests.support.layer_providers import DirectoryLayers, NoLayers, ScriptedLayers
from tests.support.snapshots_client import RemoteSnapshotter, served

SERVICE = api.DESCRIPTOR.services_by_name["Snapshots"]


@pytest.fixture
def layers() -> NoLayers:
    return ScriptedLayers({})


@pytest.fixture
def snapshotter(workdir: Path, layers: NoLayers) -> Iterator[Snapshotter]:
    root = workdir / "root"
    made = Snapshotter(root, SnapshotStore(metadata_path(root)), layers)
    yield made
    made.close()


@pytest.fixture
def client(workdir: Path, snapshotter: Snapshotter) -> Iterator[RemoteSnapshotter]:
    with served(snapshotter, workdir / "socket") as made:
        yield made


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("name", CHECKS)
def test_contract(name: str, client: RemoteSnapshotter, workdir: Path) -> None:
    work = workdir / "work"
    work.mkdir()
    CHECKS[name](client, work)


def test_the_service_is_whole() -> None:
    methods = {
        name for name, _ in inspect.getmembers(SnapshotsService, inspect.isfunction) if name[0].isupper()
    }
    assert methods == {method.name for method in SERVICE.methods}
    assert all(name in SnapshotsService.__dict__ for name in methods)


def leaves(kind: type[errors.ContractError]) -> set[type[errors.ContractError]]:
    below = {leaf for child in kind.__subclasses__() for leaf in leaves(child)}
    return below or {kind}


def test_every_contract_error_has_a_status_of_its_own() -> None:
    assert set(STATUS) == leaves(errors.ContractError)
    assert len(set(STATUS.values())) == len(STATUS)


def test_a_class_without_a_status_is_our_own_fault() -> None:
    assert status_of(errors.ContractError("x")) == grpc.StatusCode.INTERNAL


class Refusing:
    """A snapshotter whose every method raises."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def refuse(*_args: object) -> None:
            raise self._error

        return refuse


def call(client: RemoteSnapshotter, method: str) -> None:
    descriptor = SERVICE.methods_by_name[method]
    response = getattr(client.stub, method)(getattr(api, descriptor.input_type.name)(), timeout=20)
    if descriptor.server_streaming:
        list(response)


@pytest.mark.parametrize("method", [method.name for method in SERVICE.methods])
def test_every_method_translates_errors(method: str, workdir: Path, expected_logs: ExpectedLogs) -> None:
    raised: dict[Exception, grpc.StatusCode] = {kind(f"why {kind}"): code for kind, code in STATUS.items()}
    for error, code in raised.items():
        with served(Refusing(error), workdir / "socket") as client, pytest.raises(grpc.RpcError) as caught:  # type: ignore[arg-type]
            call(client, method)
        assert (caught.value.code(), caught.value.details()) == (code, str(error))

    expected_logs.allow("request failed")
    secret = ValueError("https://registry.example/?signature=abc")
    with served(Refusing(secret), workdir / "socket") as client, pytest.raises(grpc.RpcError) as caught:  # type: ignore[arg-type]
        call(client, method)
    assert caught.value.code() == grpc.StatusCode.INTERNAL
    details = str(caught.value.details())
    assert method in details
    assert "signature" not in details
    assert [record.exc_info is not None for record in expected_logs.records] == [True]


def test_a_refusal_is_not_a_warning(client: RemoteSnapshotter, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "snapshotter"), pytest.raises(errors.NotFound):
        client.stat("missing")
    record = next(record for record in caplog.records if record.name == "snapshotter.daemon.service")
    assert record.levelno == logging.DEBUG
    assert record.__dict__["method"] == "Stat"


def test_list_streams_a_hundred_at_a_time(client: RemoteSnapshotter, snapshotter: Snapshotter) -> None:
    for number in range(201):
        snapshotter.view(f"view-{number:03}")
    sizes = [len(message.info) for message in client.stub.List(api.ListSnapshotsRequest())]
    assert sizes == [100, 100, 1]
    assert list(client.walk()) == [client.stat(f"view-{number:03}") for number in range(201)]


def test_an_empty_list_is_no_message(client: RemoteSnapshotter) -> None:
    assert list(client.stub.List(api.ListSnapshotsRequest())) == []


def test_the_namespace_comes_from_metadata(client: RemoteSnapshotter, layers: NoLayers) -> None:
    client.prepare("key", labels={LABEL_TARGET: "sha256:layer"}, namespace="k8s.io")
    assert [request.namespace for request in layers.requests] == ["k8s.io"]
    assert client.stat("key").labels[LABEL_NAMESPACE] == "k8s.io"


@pytest.mark.parametrize(
    ("key", "namespace"), [("k8s.io/7/extract-1 sha256:x", "k8s.io"), ("key", ""), ("a/b", "")]
)
def test_without_metadata_the_key_tells_the_namespace(
    client: RemoteSnapshotter, layers: NoLayers, key: str, namespace: str
) -> None:
    """containerd 1.6 passes none on to proxy plugins."""
    client.stub.Prepare(api.PrepareSnapshotRequest(key=key, labels={LABEL_TARGET: "sha256:layer"}))
    assert [request.namespace for request in layers.requests] == [namespace]


@pytest.mark.usefixtures("root")
def test_a_lazy_layer_as_containerd_sees_it(workdir: Path) -> None:
    """Prepare, AlreadyExists, List by target and parent, Stat of what was found: the order of a real pull."""
    prepared = workdir / "layer"
    prepared.mkdir()
    root = workdir / "root"
    snapshotter = Snapshotter(
        root,
        SnapshotStore(metadata_path(root)),
        DirectoryLayers({"sha256:one": prepared, "sha256:two": prepared}),
    )
    with served(snapshotter, workdir / "socket") as client:
        parent = ""
        for target in ("sha256:one", "sha256:two"):
            with pytest.raises(errors.AlreadyExists, match=f'target snapshot "{target}": already exists'):
                client.prepare(f"default/1/extract {target}", parent, {LABEL_TARGET: target})
            query = f'labels."{LABEL_TARGET}"=={target},parent=="{parent}"'
            (found,) = client.walk([query])
            assert client.stat(found.name) == found
            assert found.kind == Kind.COMMITTED
            parent = found.name
        assert client.usage(parent).size > 0
        for name in ("sha256:two", "sha256:one"):
            client.remove(name)
        client.cleanup()
    snapshotter.close()
    assert list((root / "snapshotter/snapshots").iterdir()) == []


@pytest.mark.parametrize("created", [0.0, 1.5, 1_700_000_000.999_999_9, 1_700_000_000.123_456])
def test_times_survive_to_the_microsecond(created: float) -> None:
    message = info_message(Info("name", "", Kind.VIEW, created, created + 1))
    assert 0 <= message.created_at.nanos < 10**9
    assert message.created_at.seconds + message.created_at.nanos / 1e9 == pytest.approx(created, abs=1e-6)
    assert message.updated_at.ToNanoseconds() - message.created_at.ToNanoseconds() == 10**9


def test_usage_reaches_the_right_fields(client: RemoteSnapshotter, snapshotter: Snapshotter) -> None:
    snapshotter.prepare("active")
    assert client.usage("active") == snapshotter.usage("active")
    assert (client.usage("active").inodes, client.usage("active").size > 1) == (1, True)
