"""Pull secrets of a cluster: a kubeconfig in every form, and secrets listed and watched at an API server in threads."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from snapshotter.errors import AuthenticationFailed
from snapshotter.registry.keychain import Credentials
from snapshotter.registry.kubeconfig import find_cluster
from snapshotter.registry.kubekeychain import KubeKeychain
from tests.conftest import ExpectedLogs
from tests.support.registry_auth import json_reply
from tests.support.registry_faults import Fault
from tests.support.registry_server import HttpServer, Reply, Request
from tests.support.tls import Certificate

TOKEN = "token-of-the-cluster"


def secret(name: str, auths: object, version: int = 1) -> dict[str, Any]:
    config = json.dumps({"auths": auths}).encode()
    return {
        "metadata": {"namespace": "ns", "name": name, "resourceVersion": str(version)},
        "data": {".dockerconfigjson": base64.b64encode(config).decode()},
    }


def login(user: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:pw-{user}".encode()).decode()}


class ApiServer:
    """One page of secrets after another, then the events that a test gives, each watch its share."""

    def __init__(self, certificate: Certificate | None = None) -> None:
        self.pages: list[list[dict[str, Any]]] = [[]]
        self.events: list[list[dict[str, Any]]] = []
        self.status = 200
        self.lists = 0
        self.watched_from: list[str] = []
        self.tokens = {TOKEN}
        self._lock = threading.Lock()
        self.server = HttpServer("kubernetes", self._answer, certificate)

    def _answer(self, request: Request, fault: Fault | None) -> Reply:
        if request.headers.get("authorization", "").removeprefix("Bearer ") not in self.tokens:
            return json_reply(401, {})
        assert request.path == "/api/v1/secrets"
        assert request.query["fieldSelector"] == "type=kubernetes.io/dockerconfigjson"
        if "watch" in request.query:
            with self._lock:
                self.watched_from.append(request.query["resourceVersion"])
                events = self.events.pop(0) if self.events else []
            return Reply(200, b"".join(json.dumps(event).encode() + b"\n" for event in events), {})
        self.lists += 1
        number = int(request.query.get("continue") or 0)
        following = str(number + 1) if number + 1 < len(self.pages) else ""
        metadata = {"resourceVersion": "100", "continue": following}
        return json_reply(self.status, {"items": self.pages[number], "metadata": metadata})


@pytest.fixture
def api() -> Iterator[ApiServer]:
    api = ApiServer()
    yield api
    api.server.close()


def config(path: Path, api: ApiServer, cluster: dict[str, Any] | None = None, user: object = None) -> Path:
    settings = {
        "current-context": "here",
        "contexts": [
            {"name": "there", "context": {}},
            {"name": "here", "context": {"cluster": "c", "user": "u"}},
        ],
        "clusters": [{"name": "c", "cluster": {"server": api.server.url} | (cluster or {})}],
        "users": [{"name": "u", "user": {"token": TOKEN} if user is None else user}],
    }
    file = path / "kubeconfig"
    file.write_text(json.dumps(settings))
    return file


def run(path: Path | None, work: Callable[[KubeKeychain], Awaitable[None]]) -> None:
    async def main() -> None:
        keychain = KubeKeychain(path)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keychain.run)
            with trio.fail_after(60):
                await work(keychain)
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_secrets_are_listed_page_by_page_and_the_most_specific_wins(tmp_path: Path, api: ApiServer) -> None:
    api.pages = [
        [secret("a", {"r.example": login("host")}), secret("b", {"*.wild.example": login("wild")})],
        [
            secret(
                "c", {"https://r.example/team": login("team"), "https://index.docker.io/v1/": login("hub")}
            ),
            {"metadata": {"namespace": "ns", "name": "broken", "resourceVersion": "1"}, "data": {}},
            secret("d", ["no table"]),
            secret("e", {"r.example": {"auth": "not base64!"}}),
        ],
    ]

    async def work(keychain: KubeKeychain) -> None:
        async def user(host: str, repository: str, *refused: Credentials) -> str | None:
            found = await keychain.lookup(host, repository, refused=refused)
            return None if found is None else found.username

        assert await user("r.example", "other") == "host"
        assert await user("r.example", "team/app") == "team"
        assert await user("r.example", "team/app", Credentials("team", "pw-team")) == "host"
        assert await user("r.example", "teamwork") == "host"
        assert await user("x.wild.example", "app") == "wild"
        assert await user("x.y.wild.example", "app") is None
        assert await user("docker.io", "library/app") == "hub"
        assert await user("s.example", "app") is None
        assert (keychain.statistics.secrets, keychain.statistics.failures) == (6, 0)

    run(config(tmp_path, api), work)


def test_changes_are_followed_and_old_versions_listed_anew(tmp_path: Path, api: ApiServer) -> None:
    api.pages = [[secret("a", {"r.example": login("one")})]]
    api.events = [
        [
            {"type": "MODIFIED", "object": secret("a", {"r.example": login("two")}, 101)},
            {"type": "ADDED", "object": secret("b", {"s.example": login("three")}, 102)},
            {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "103"}}},
        ],
        [{"type": "DELETED", "object": secret("b", {}, 104)}, {"type": "ERROR", "object": {"code": 410}}],
    ]

    async def work(keychain: KubeKeychain) -> None:
        async def until(host: str, expected: str | None) -> None:
            while True:
                found = await keychain.lookup(host, "app")
                if (found and found.username) == expected:
                    return
                await trio.sleep(0.02)

        await until("s.example", "three")
        assert api.watched_from[0] == "100"
        api.pages = [[secret("a", {"r.example": login("four")})]]
        await until("s.example", None)
        await until("r.example", "four")
        assert api.watched_from[1] == "103"
        assert api.lists == 2

    run(config(tmp_path, api), work)


def test_an_api_server_that_refuses_is_named_and_asked_again(
    tmp_path: Path, api: ApiServer, expected_logs: ExpectedLogs
) -> None:
    expected_logs.allow("pull secrets of the cluster cannot be read")
    api.pages = [[secret("a", {"r.example": login("one")})]]
    api.tokens.clear()

    async def work(keychain: KubeKeychain) -> None:
        while not keychain.statistics.failures:
            await trio.sleep(0.02)
        api.tokens.add(TOKEN)
        assert await keychain.lookup("r.example", "app") == Credentials("one", "pw-one")

    run(config(tmp_path, api), work)
    assert "401" in expected_logs.records[0].__dict__["error"]


def test_secrets_that_cannot_be_read_are_an_error(
    tmp_path: Path, expected_logs: ExpectedLogs, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected_logs.allow("pull secrets of the cluster cannot be read")
    monkeypatch.setattr("snapshotter.registry.kubekeychain.FIRST_LIST", 0.1)

    async def work(keychain: KubeKeychain) -> None:
        with pytest.raises(AuthenticationFailed, match="could not be read yet"):
            await keychain.lookup("r.example", "app")

    run(tmp_path / "absent", work)


@pytest.mark.parametrize("form", ["json", "yaml", "token file", "exec", "environment"])
def test_every_form_of_a_kubeconfig(
    tmp_path: Path, api: ApiServer, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    user: dict[str, Any] = {"token": TOKEN}
    if form == "token file":
        (tmp_path / "token").write_text(TOKEN + "\n")
        user = {"tokenFile": "token"}
    elif form == "exec":
        answer = json.dumps({"status": {"token": TOKEN}})
        script = 'test "$MINE" = yes && test -n "$KUBERNETES_EXEC_INFO" && echo "$0"'
        user = {
            "exec": {
                "command": "sh",
                "args": ["-c", script, answer],
                "env": [{"name": "MINE", "value": "yes"}],
            }
        }
    file: Path | None = config(tmp_path, api, user=user)
    assert file is not None
    if form == "yaml":
        file.write_text(
            f"current-context: here\ncontexts:\n- name: here\n  context: {{cluster: c, user: u}}\n"
            f"clusters:\n- name: c\n  cluster:\n    server: {api.server.url}/\n"
            f"users:\n- name: u\n  user:\n    token: {TOKEN}\n"
        )
    elif form == "environment":
        monkeypatch.setenv("KUBECONFIG", str(file))
        file = None
    cluster = trio.run(find_cluster, file)
    assert cluster.server == api.server.url
    assert cluster.authorization == f"Bearer {TOKEN}"
    assert TOKEN not in repr(cluster)


def test_tls_with_the_clusters_own_authority(tmp_path: Path, certificate: Certificate) -> None:
    api = ApiServer(certificate)
    try:
        api.pages = [[secret("a", {"r.example": login("one")})]]
        data = base64.b64encode(certificate.ca_file.read_bytes()).decode()
        key = base64.b64encode(certificate.key.read_bytes()).decode()
        user = {"token": TOKEN, "client-certificate-data": data, "client-key-data": key}

        async def work(keychain: KubeKeychain) -> None:
            assert await keychain.lookup("r.example", "app") == Credentials("one", "pw-one")

        run(config(tmp_path, api, {"certificate-authority-data": data}, user), work)
        files = {
            "token": TOKEN,
            "client-certificate": str(certificate.certificate),
            "client-key": str(certificate.key),
        }
        run(config(tmp_path, api, {"certificate-authority": str(certificate.ca_file)}, files), work)
    finally:
        api.server.close()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be used: No such file"),
        ("[", "not YAML"),
        ("- a", "not a table"),
        ("{}", "not complete"),
        ('{"current-context": "x", "contexts": []}', "not complete"),
    ],
)
def test_a_kubeconfig_that_is_none_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "kubeconfig"
    if text is not None:
        path.write_text(text)
    with pytest.raises(AuthenticationFailed, match=message) as caught:
        trio.run(find_cluster, path)
    assert str(path) in str(caught.value)


def test_a_pod_uses_its_service_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, certificate: Certificate
) -> None:
    monkeypatch.setattr("snapshotter.registry.kubeconfig.SERVICE_ACCOUNT", tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    environ = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "6443"}
    with pytest.raises(AuthenticationFailed, match="service account"):
        trio.run(find_cluster, None, environ)
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "ca.crt").write_bytes(certificate.ca_file.read_bytes())
    cluster = trio.run(find_cluster, None, environ)
    assert (cluster.server, cluster.authorization) == ("https://[fd00::1]:6443", f"Bearer {TOKEN}")
