"""Who owns the top directory of a new snapshot. Pure.

Overlay shows the upper directory's owner as the owner of `/`, so a new upper directory takes over its
parent's, unless the client says that the container will run in a user namespace: then the host's number
of that namespace's root.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from snapshotter.errors import InvalidArgument
from snapshotter.snapshot.model import LABEL_GID_MAPPING, LABEL_UID_MAPPING, Owner

_MAPPING = re.compile(r"([0-9]{1,10}):([0-9]{1,10}):([0-9]{1,10})")
_INVALID_ID = 2**32 - 1
"""The kernel's "no such user": never a mapping's result."""


def mapped_root(labels: Mapping[str, str]) -> Owner | None:
    """Return the host's owner of a user namespace's root; None when the labels ask for no mapping.

    One of the two labels alone maps the other kind of id to itself. Raises InvalidArgument when a
    mapping cannot be read or does not cover 0.
    """
    if LABEL_UID_MAPPING not in labels and LABEL_GID_MAPPING not in labels:
        return None
    return Owner(_host_id_of_root(labels, LABEL_UID_MAPPING), _host_id_of_root(labels, LABEL_GID_MAPPING))


def _host_id_of_root(labels: Mapping[str, str], label: str) -> int:
    text = labels.get(label, "")
    if not text:
        return 0
    for part in text.split(","):
        match = _MAPPING.fullmatch(part)
        if match is None:
            raise InvalidArgument(f"label {label}: {part!r} is not container:host:size")
        container, host, size = (int(number) for number in match.groups())
        if max(container, host, size) >= _INVALID_ID:
            raise InvalidArgument(f"label {label}: {part!r} is out of range")
        if container == 0 and size > 0:
            return host
    raise InvalidArgument(f"label {label}: {text!r} maps no root")
