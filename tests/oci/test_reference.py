"""References by Docker's rules, and the host and scheme behind a registry's name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.errors import UsageError
from snapshotter.oci.reference import Reference, api_host, default_scheme
from snapshotter.units import Digest

HEX = "0123456789abcdef" * 4
DIGEST = Digest(f"sha256:{HEX}")


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("redis", "docker.io/library/redis:latest"),
        ("redis:7", "docker.io/library/redis:7"),
        ("docker.io/redis", "docker.io/library/redis:latest"),
        ("docker.io/library/redis", "docker.io/library/redis:latest"),
        ("index.docker.io/redis:7", "docker.io/library/redis:7"),
        ("library/redis", "docker.io/library/redis:latest"),
        ("someone/app:v1", "docker.io/someone/app:v1"),
        ("a/b/c", "docker.io/a/b/c:latest"),
        ("quay.io/app", "quay.io/app:latest"),
        ("quay.io/org/app:v1", "quay.io/org/app:v1"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/app", "localhost:5000/app:latest"),
        ("Registry/app", "Registry/app:latest"),
        ("my-host:80/app:x", "my-host:80/app:x"),
        ("127.0.0.1:5000/a/b:c", "127.0.0.1:5000/a/b:c"),
        ("[::1]:5000/app", "[::1]:5000/app:latest"),
        ("[2001:db8::1]/app:1", "[2001:db8::1]/app:1"),
        ("localhost:5000", "docker.io/library/localhost:5000"),
        (f"redis@{DIGEST}", f"docker.io/library/redis@{DIGEST}"),
        (f"quay.io/org/app:v1@{DIGEST}", f"quay.io/org/app:v1@{DIGEST}"),
        ("r.example/a__b/c.d/e-f--g_h:T_a.g-1", "r.example/a__b/c.d/e-f--g_h:T_a.g-1"),
        (
            "123456789012.dkr.ecr.eu-west-1.amazonaws.com/x:1",
            "123456789012.dkr.ecr.eu-west-1.amazonaws.com/x:1",
        ),
    ],
)
def test_short_names_get_their_normal_form(text: str, normal: str) -> None:
    reference = Reference.parse(text)
    assert str(reference) == normal
    assert Reference.parse(normal) == reference


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not a repository name"),
        ("Redis", "not a repository name"),
        ("docker.io/", "not a repository name"),
        ("quay.io//app", "not a repository name"),
        ("quay.io/app/", "not a repository name"),
        ("quay.io/_app", "not a repository name"),
        ("quay.io/a..b", "not a repository name"),
        ("quay.io/a___b", "not a repository name"),
        ("quay.io/../app", "not a repository name"),
        ("quay.io/app?x=1", "not a repository name"),
        ("quay.io/app\n", "not a repository name"),
        ("https://quay.io/app", "is not a registry host"),
        ("-bad.example/app", "is not a registry host"),
        ("quay.io:port/app", "is not a registry host"),
        ("user@quay.io/app", "not a sha256 digest"),
        ("quay.io/app:", "is not a tag"),
        ("quay.io/app:-x", "is not a tag"),
        ("quay.io/app:" + "x" * 129, "is not a tag"),
        ("quay.io/app@", "not a sha256 digest"),
        ("quay.io/app@sha512:" + HEX * 2, "not a sha256 digest"),
        (f"quay.io/app@{DIGEST}x", "not a sha256 digest"),
        (HEX, "64 hex digits"),
        ("quay.io/" + "a" * 250, "longer than 255"),
    ],
)
def test_what_is_no_reference_is_refused_with_its_reason(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Reference.parse(text)


@given(st.text())
def test_any_text_is_a_reference_with_a_normal_form_or_refused(text: str) -> None:
    try:
        reference = Reference.parse(text)
    except UsageError:
        return
    assert Reference.parse(str(reference)) == reference


def test_moving_to_a_digest_or_a_tag_leaves_the_other_behind() -> None:
    reference = Reference.parse("quay.io/org/app:v1")
    assert reference.locator == "quay.io/org/app"
    assert str(reference.with_digest(DIGEST)) == f"quay.io/org/app@{DIGEST}"
    assert str(reference.with_digest(DIGEST).with_tag("v2")) == "quay.io/org/app:v2"


def test_only_docker_hub_has_another_host_for_its_api() -> None:
    assert api_host("docker.io") == "registry-1.docker.io"
    assert api_host("quay.io:443") == "quay.io:443"


@pytest.mark.parametrize(
    ("registry", "scheme"),
    [
        ("localhost", "http"),
        ("localhost:5000", "http"),
        ("127.0.0.1", "http"),
        ("127.0.0.1:5000", "http"),
        ("127.3.2.1:80", "http"),
        ("[::1]", "http"),
        ("[::1]:5000", "http"),
        ("[2001:db8::1]:5000", "https"),
        ("localhost.example", "https"),
        ("mylocalhost:5000", "https"),
        ("10.0.0.1:5000", "https"),
        ("quay.io", "https"),
        ("docker.io", "https"),
    ],
)
def test_only_loopback_names_are_plain_http(registry: str, scheme: str) -> None:
    assert default_scheme(registry) == scheme
