"""What urllib3 raises, as our own errors, without its texts, which may show the URL.

Pure; for the modules that move bytes in bulk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    LocationValueError,
    NewConnectionError,
    ProtocolError,
    ReadTimeoutError,
)

from snapshotter.errors import ConfigError, RegistryRefused, RegistryTimeout, RegistryUnavailable, ShortBody
from snapshotter.registry.tls import system_reason, untrusted


@contextlib.contextmanager
def translated(what: str, host: str, *, in_body: bool) -> Iterator[None]:
    """Turn what urllib3 raises in the block into our own errors: `what` was asked of `host`.

    `in_body` says that a reply's body was being read.
    """
    try:
        yield
    except ConfigError as error:
        raise RegistryRefused(f"{what}: {host} cannot be asked: {error}") from None
    except NewConnectionError as error:
        # To urllib3 it is a kind of timeout.
        raise RegistryUnavailable(f"{what}: cannot reach {host}: {system_reason(error)}") from None
    except ConnectTimeoutError:
        raise RegistryTimeout(f"{what}: too slow connecting to {host}") from None
    except ReadTimeoutError:
        raise RegistryTimeout(f"{what}: too slow talking to {host}") from None
    except LocationValueError:
        raise RegistryRefused(f"{what}: its source is no URL") from None
    except ProtocolError:
        if in_body:
            raise ShortBody(f"{what}: {host} ended the body early") from None
        raise RegistryUnavailable(f"{what}: {host} ended the connection without a reply") from None
    except ValueError:
        # http.client's word about a header that holds a line break; it shows the header.
        raise RegistryRefused(f"{what}: the request to {host} cannot be written as HTTP") from None
    except (HTTPError, OSError) as error:
        reason = untrusted(error)
        if reason is not None:
            raise RegistryRefused(f"{what}: certificate of {host} is not trusted: {reason}") from None
        raise RegistryUnavailable(f"{what}: cannot reach {host}: {system_reason(error)}") from None
