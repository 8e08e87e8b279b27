"""containerd's hosts.toml and [resolver.host] of the configuration: who is asked, in which order, and how."""

from pathlib import Path

import pytest

from snapshotter.registry.hosts import EVERYTHING, PULL, RESOLVE, Host, named_host
from snapshotter.registry.hostsfile import HostsDirectories
from snapshotter.registry.mirrors import ConfiguredHosts
from snapshotter.registry.tls import Trust
from tests.conftest import ExpectedLogs


def write(root: Path, name: str, text: str) -> Path:
    directory = root / name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "hosts.toml").write_text(text)
    return directory


def hosts(root: Path, registry: str) -> tuple[Host, ...]:
    return HostsDirectories([root]).of(registry)


def test_a_registry_that_no_directory_knows_stands_for_itself(tmp_path: Path) -> None:
    assert hosts(tmp_path, "docker.io") == (Host("docker.io", "https", "registry-1.docker.io"),)
    assert hosts(tmp_path / "absent", "localhost:5000") == (Host("localhost:5000", "http", "localhost:5000"),)


def test_what_is_trusted_everywhere_is_trusted_besides_what_a_directory_says(tmp_path: Path) -> None:
    write(tmp_path, "quiet.example", "")
    write(tmp_path, "own.example", 'ca = "/own.pem"\nskip_verify = false\n')
    (tmp_path / "docker.example").mkdir()
    (tmp_path / "docker.example/more.crt").touch()
    trust = Trust(("/ca.pem",), (("/client.pem", ""),), skip_verify=True)
    found = HostsDirectories([tmp_path], trust=trust)
    for registry in ("absent.example", "quiet.example"):
        assert [host.trust for host in found.of(registry)] == [trust]
    (own,) = found.of("own.example")
    assert own.trust.ca_files == ("/ca.pem", "/own.pem")
    assert own.trust.client_certificates == trust.client_certificates
    assert not own.trust.skip_verify
    (docker,) = found.of("docker.example")
    assert docker.trust.ca_files == ("/ca.pem", str(tmp_path / "docker.example/more.crt"))
    assert docker.trust.skip_verify


def test_mirrors_come_in_the_order_of_the_file_and_the_registry_last(tmp_path: Path) -> None:
    directory = write(
        tmp_path,
        "docker.io",
        """
        server = "https://docker.io"
        [host."https://mirror.example:5000"]
          capabilities = ["pull", "resolve"]
          ca = "ca.pem"
          client = [["client.cert", "client.key"], "both.pem"]
          dial_timeout = "500ms"
          [host."https://mirror.example:5000".header]
            X-One = "1"
            x-more = ["a", "b"]
        [host."http://plain.example/cache"]
          capabilities = ["pull"]
          skip_verify = true
        [host."https://odd.example/api/"]
          override_path = true
        """,
    )
    first, second, third, last = hosts(tmp_path, "docker.io")
    assert (first.name, first.scheme, first.path) == ("mirror.example:5000", "https", "/v2")
    assert first.capabilities == {PULL, RESOLVE}
    assert first.namespace == "docker.io"
    assert first.headers == {"X-One": "1", "x-more": "a, b"}
    assert first.trust.ca_files == (str(directory / "ca.pem"),)
    assert first.trust.client_certificates == (
        (str(directory / "client.cert"), str(directory / "client.key")),
        (str(directory / "both.pem"), ""),
    )
    assert first.connect_timeout == 0.5
    assert (second.scheme, second.path, second.trust.skip_verify) == ("http", "/cache/v2", True)
    assert (third.path, third.capabilities) == ("/api", EVERYTHING)
    assert (last.authority, last.namespace) == ("docker.io", "docker.io"), (
        "as the file says, not as we know better"
    )


def test_what_stands_at_the_top_is_about_the_registry_itself(tmp_path: Path) -> None:
    write(tmp_path, "r.example_5000_", 'ca = ["a.pem", "/b.pem"]\nskip_verify = true\n')
    (own,) = hosts(tmp_path, "r.example:5000")
    assert (own.name, own.authority, own.namespace) == ("r.example:5000", "r.example:5000", "")
    assert own.trust.ca_files == (str(tmp_path / "r.example_5000_/a.pem"), "/b.pem")
    assert own.trust.skip_verify


def test_directories_are_looked_for_as_containerd_does(tmp_path: Path) -> None:
    write(tmp_path / "one", "_default", '[host."https://default.example"]\n')
    write(tmp_path / "two", "r.example:5000", '[host."https://second.example"]\n')
    both = HostsDirectories([tmp_path / "one", tmp_path / "two"])
    assert both.of("r.example:5000")[0].name == "default.example"
    assert hosts(tmp_path / "two", "r.example:5000")[0].name == "second.example"
    write(tmp_path / "two", "r.example_5000_", '[host."https://third.example"]\n')
    assert hosts(tmp_path / "two", "r.example:5000")[0].name == "third.example"


def test_a_directory_of_certificates_alone_is_dockers(tmp_path: Path, expected_logs: ExpectedLogs) -> None:
    expected_logs.allow("a mistake in the hosts of a registry")
    directory = tmp_path / "r.example"
    directory.mkdir()
    for name in ("ca.crt", "client.cert", "client.key", "lonely.cert"):
        (directory / name).touch()
    found = HostsDirectories([tmp_path])
    (own,) = found.of("r.example")
    assert own.trust.ca_files == (str(directory / "ca.crt"),)
    assert own.trust.client_certificates == ((str(directory / "client.cert"), str(directory / "client.key")),)
    assert found.problems == {str(directory): 1}


def test_a_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    write(tmp_path, "r.example", '[host."https://one.example"]\n')
    found = HostsDirectories([tmp_path])
    first = found.of("r.example")
    assert first[0].name == "one.example"
    assert found.of("r.example") is first
    write(tmp_path, "r.example", '[host."https://another.example"]\n')
    assert found.of("r.example")[0].name == "another.example"


@pytest.mark.parametrize(
    ("text", "mistakes"),
    [
        ("host = [", 1),
        ("host = 3", 1),
        ('[host]\n"https://m.example" = 3', 1),
        ('[host."https://m.example"]\ncapabilities = ["fly"]', 1),
        ('[host."https://m.example"]\ncapabilities = 3', 1),
        ('[host."https://m.example"]\nca = 3', 1),
        ('[host."https://m.example"]\nclient = [["a", "b", "c"]]', 1),
        ('[host."https://m.example"]\nskip_verify = "yes"', 1),
        ('[host."https://m.example"]\nheader = 3', 1),
        ('[host."https://m.example".header]\nx = "a\\nb"', 1),
        ('[host."https://m.example"]\ndial_timeout = 3', 1),
        ('[host."https://m.example:port"]', 1),
        ('[host."https://user@m.example"]', 1),
        ("server = 3", 1),
        ('ca = 3\n[host."https://m.example"]\noverride_path = 3', 2),
    ],
)
def test_a_mistake_is_named_once_and_the_registry_stays(
    tmp_path: Path, expected_logs: ExpectedLogs, text: str, mistakes: int
) -> None:
    expected_logs.allow("a mistake in the hosts of a registry")
    directory = write(tmp_path, "r.example", text)
    found = HostsDirectories([tmp_path])
    for _ in range(2):
        assert found.of("r.example") == (Host("r.example", "https", "r.example"),)
    assert found.problems == {str(directory): mistakes}
    assert len(expected_logs.records) == mistakes
    assert str(directory) in str(expected_logs.records[0].__dict__)


def test_an_unknown_key_is_a_mistake_that_costs_nothing(tmp_path: Path, expected_logs: ExpectedLogs) -> None:
    expected_logs.allow("a mistake in the hosts of a registry")
    write(tmp_path, "r.example", '[host."https://m.example"]\ncapability = ["pull"]\n')
    assert hosts(tmp_path, "r.example")[0].name == "m.example"


def configured(registry: str, url: str, **options: bool) -> Host:
    return named_host(registry, url, plain_http=options.get("insecure", False), timeout=None)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://m.example", ("https", "m.example", "/v2")),
        ("http://m.example:5000/", ("http", "m.example:5000", "/v2")),
        ("https://m.example/v2/cache", ("https", "m.example", "/v2/cache")),
        ("m.example", ("https", "m.example", "/v2")),
        ("m.example:5000", ("https", "m.example:5000", "/v2")),
        ("localhost:5000", ("http", "localhost:5000", "/v2")),
    ],
)
def test_a_mirror_of_the_configuration_may_be_a_url_or_a_name(
    url: str, expected: tuple[str, str, str]
) -> None:
    host = configured("docker.io", url)
    assert (host.scheme, host.authority, host.path) == expected
    assert host.namespace == "docker.io"


@pytest.mark.parametrize("url", ["ftp://m.example", "https://", "https://m.example?x", "a@m.example"])
def test_what_is_no_host_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="is not the URL of a host"):
        configured("docker.io", url)


def test_mirrors_of_the_configuration_replace_those_of_the_directory(tmp_path: Path) -> None:
    write(tmp_path, "r.example", 'skip_verify = true\n[host."https://one.example"]\n')
    both = ConfiguredHosts(
        {"r.example": [configured("r.example", "https://two.example", insecure=True)]},
        HostsDirectories([tmp_path]),
    )
    mirror, own = both.of("r.example")
    assert (mirror.name, mirror.scheme, mirror.capabilities) == ("two.example", "http", {PULL, RESOLVE})
    assert own.trust.skip_verify
    assert [host.name for host in both.of("other.example")] == ["other.example"]


def test_a_mirror_that_is_the_registry_says_how_to_speak_to_it() -> None:
    both = ConfiguredHosts(
        {"r.example:5000": [configured("r.example:5000", "r.example:5000", insecure=True)]},
        HostsDirectories([]),
    )
    (own,) = both.of("r.example:5000")
    assert (own.name, own.scheme, own.namespace, own.capabilities) == (
        "r.example:5000",
        "http",
        "",
        EVERYTHING,
    )
