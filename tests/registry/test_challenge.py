"""WWW-Authenticate headers as servers write them, well and badly."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.registry.challenge import Challenge, parse_challenges


@pytest.mark.parametrize(
    ("header", "challenges"),
    [
        ('Basic realm="x"', [("basic", {"realm": "x"})]),
        ("Basic", [("basic", {})]),
        (
            'Bearer realm="https://a.example/token?x=1,2",service="r, inc",scope="repository:a/b:pull,push"',
            [
                (
                    "bearer",
                    {
                        "realm": "https://a.example/token?x=1,2",
                        "service": "r, inc",
                        "scope": "repository:a/b:pull,push",
                    },
                )
            ],
        ),
        ('BEARER Realm = "x" , SERVICE=y', [("bearer", {"realm": "x", "service": "y"})]),
        ('Basic realm="say \\"hi\\" \\\\"', [("basic", {"realm": 'say "hi" \\'})]),
        (
            'Basic realm="x", Bearer realm="y",scope="z"',
            [("basic", {"realm": "x"}), ("bearer", {"realm": "y", "scope": "z"})],
        ),
        ('Negotiate, Basic realm="x"', [("negotiate", {}), ("basic", {"realm": "x"})]),
        ('NTLM TlRMTVNTUAAB==, Basic realm="x"', [("ntlm", {}), ("basic", {"realm": "x"})]),
        (' , Basic realm="x" ,, Digest nonce=abc', [("basic", {"realm": "x"}), ("digest", {"nonce": "abc"})]),
        ('Basic realm=""', [("basic", {"realm": ""})]),
        ("", []),
        ('realm="x"', []),
        ('Basic realm="unclosed', [("basic", {})]),
        ('Basic realm="x" "garbage', [("basic", {})]),
    ],
)
def test_challenges_of_one_header(header: str, challenges: list[tuple[str, dict[str, str]]]) -> None:
    assert parse_challenges([header]) == tuple(
        Challenge(scheme, parameters) for scheme, parameters in challenges
    )


def test_challenges_of_several_headers_keep_their_order() -> None:
    assert [c.scheme for c in parse_challenges(["Bearer realm=a", "Basic realm=b"])] == ["bearer", "basic"]


@given(st.text(alphabet='Bb "\\=,;\tx\n\x00ä', max_size=60))
def test_any_header_gives_challenges_and_no_error(header: str) -> None:
    for challenge in parse_challenges([header]):
        assert challenge.scheme == challenge.scheme.lower() != ""
