"""Platforms: the ways of writing one, and which of them are the same."""

import platform as host
import subprocess

import pytest

from snapshotter.errors import UsageError
from snapshotter.oci.descriptor import Platform
from snapshotter.oci.platform import host_platform, matches, normalise, parse_platform


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("linux/amd64", "linux/amd64"),
        ("Linux/X86_64", "linux/amd64"),
        ("linux/x86-64", "linux/amd64"),
        ("linux/amd64/v1", "linux/amd64"),
        ("linux/amd64/v3", "linux/amd64/v3"),
        ("linux/arm64/v8", "linux/arm64"),
        ("linux/aarch64", "linux/arm64"),
        ("linux/arm64/8", "linux/arm64"),
        ("linux/arm64/v9", "linux/arm64/v9"),
        ("linux/arm", "linux/arm/v7"),
        ("linux/arm/6", "linux/arm/v6"),
        ("linux/armhf", "linux/arm/v7"),
        ("linux/armel", "linux/arm/v6"),
        ("linux/i386", "linux/386"),
        ("linux/ppc64le", "linux/ppc64le"),
        ("linux/loongarch64", "linux/loong64"),
        ("windows/amd64", "windows/amd64"),
        ("macos/arm64", "darwin/arm64"),
    ],
)
def test_every_way_of_writing_a_platform_has_one_normal_form(text: str, normal: str) -> None:
    assert str(parse_platform(text)) == normal
    assert matches(parse_platform(text), parse_platform(normal))


def test_what_is_left_out_is_the_hosts() -> None:
    own = host_platform()
    assert parse_platform("riscv64") == Platform("riscv64", own.os)
    assert parse_platform("windows") == Platform(own.architecture, "windows", variant=own.variant)


def test_the_host_is_what_uname_says_it_is() -> None:
    machine = subprocess.run(["uname", "-m"], capture_output=True, text=True, check=True).stdout.strip()
    assert machine == host.machine()
    assert host_platform() == normalise(Platform(machine, "linux"))


@pytest.mark.parametrize(
    "text", ["", "/", "linux/", "/amd64", "linux/amd64/v1/x", "linux amd64", "linux/amd64\n"]
)
def test_what_is_no_platform_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="write it as os/architecture"):
        parse_platform(text)


@pytest.mark.parametrize(
    ("want", "have", "same"),
    [
        (Platform("amd64", "linux"), Platform("amd64", "linux"), True),
        (Platform("amd64", "linux"), Platform("arm64", "linux"), False),
        (Platform("amd64", "linux"), Platform("amd64", "windows"), False),
        (Platform("arm", "linux"), Platform("arm", "linux", variant="v6"), False),
        (Platform("arm", "linux"), Platform("arm", "linux", variant="v7"), True),
        (Platform("unknown", "unknown"), Platform("amd64", "linux"), False),
        (
            Platform("amd64", "windows", os_version="10.1"),
            Platform("amd64", "windows", os_version="10.2"),
            False,
        ),
        (Platform("amd64", "windows", os_version="10.1"), Platform("amd64", "windows"), True),
        (Platform("amd64", "linux"), Platform("amd64", "linux", os_features=("x",)), True),
    ],
)
def test_which_platforms_match(want: Platform, have: Platform, same: bool) -> None:
    assert matches(want, have) is same
    assert matches(have, want) is same
