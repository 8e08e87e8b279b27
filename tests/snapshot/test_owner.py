"""Owners of new top directories, from the labels of user namespaces."""

import pytest

from snapshotter.errors import InvalidArgument
from snapshotter.snapshot.model import LABEL_GID_MAPPING, LABEL_UID_MAPPING, Owner
from snapshotter.snapshot.owner import mapped_root


def test_no_label_no_mapping() -> None:
    assert mapped_root({"a": "b"}) is None


@pytest.mark.parametrize(
    ("uids", "gids", "owner"),
    [
        ("0:100000:65536", "0:200000:65536", Owner(100000, 200000)),
        ("0:1000:1,1:100000:65535", "1:100000:65535,0:1001:1", Owner(1000, 1001)),
        ("0:5:1", None, Owner(5, 0)),
        (None, "0:6:1", Owner(0, 6)),
        ("", "0:6:1", Owner(0, 6)),
        ("0:4294967294:1", "0:0:4294967294", Owner(4294967294, 0)),
    ],
)
def test_root_is_mapped(uids: str | None, gids: str | None, owner: Owner) -> None:
    given = {LABEL_UID_MAPPING: uids, LABEL_GID_MAPPING: gids}
    assert mapped_root({label: text for label, text in given.items() if text is not None}) == owner


@pytest.mark.parametrize(
    "text",
    [
        "1:1000:65535",
        "0:1000:0",
        "0:1000",
        "0:1000:1:1",
        "a:b:c",
        "-1:0:1",
        "0:4294967295:1",
        "0:1:99999999999",
        ",",
    ],
)
@pytest.mark.parametrize("label", [LABEL_UID_MAPPING, LABEL_GID_MAPPING])
def test_a_bad_mapping_is_refused_by_its_label(text: str, label: str) -> None:
    with pytest.raises(InvalidArgument, match=label):
        mapped_root({LABEL_UID_MAPPING: "0:1:1", LABEL_GID_MAPPING: "0:1:1", label: text})
