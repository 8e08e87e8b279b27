"""Every failure of the system, on one screen.

    SnapshotterError
    ├── ContractError            -> gRPC status, one to one; never retried
    │   ├── AlreadyExists        ALREADY_EXISTS (also how a remote Prepare says "done")
    │   ├── NotFound             NOT_FOUND
    │   ├── InvalidArgument      INVALID_ARGUMENT
    │   ├── FailedPrecondition   FAILED_PRECONDITION
    │   └── Unavailable          UNAVAILABLE
    ├── CannotLazyPull           -> Prepare falls back; a log field and a metric label, never the user's error
    │   ├── NoIndex              no SOCI index names this image
    │   ├── NoZtoc               the index has no zTOC for this layer
    │   └── UnsupportedLayer     the layer cannot be served lazily (the message says why)
    ├── CorruptData              -> EIO; counted; never cached
    │   ├── InvalidZtoc          the zTOC breaks a rule of the format
    │   ├── InvalidIndex         the SOCI index or OCI manifest breaks a rule of the format
    │   ├── InvalidTar           a tar header breaks a rule of the format
    │   ├── InvalidLayerFile     a file of our own layer store is not what we wrote
    │   ├── DigestMismatch       bytes do not have the digest they were asked by
    │   ├── SpanDigestMismatch   a span's compressed bytes do not have the zTOC's digest
    │   ├── SpanInflateError     a verified span does not inflate to its length
    │   └── HeaderMismatch       a file's tar header is not what the zTOC says
    ├── RegistryError            `temporary` decides retry; after the last try -> EIO / CannotLazyPull
    │   ├── AuthenticationFailed, BlobNotFound, RangeNotHonoured, RegistryRefused   temporary = False
    │   └── RegistryUnavailable, RegistryTimeout, ShortBody                         temporary = True
    ├── ConfigError              -> exit code 78; the message names file, line and key
    ├── ProcessFailed            -> retried or Unavailable; one of our own processes could not start, or died
    └── UsageError               -> exit code 1 of a command; the message says what to do

Classes carry data where a caller needs it; messages say what happened and to what. Secrets and
signed URLs never enter a message: put hosts, repositories and digests there instead.
"""

from __future__ import annotations

from typing import ClassVar


class SnapshotterError(Exception):
    """Root of every error that this project raises on purpose."""


class ContractError(SnapshotterError):
    """The containerd snapshots contract says no."""


class AlreadyExists(ContractError):
    """The key or name is taken; for a remote Prepare this is the success signal."""


class NotFound(ContractError):
    """No such snapshot, or no such parent."""


class InvalidArgument(ContractError):
    """The request is not well formed, or does not fit the snapshot's kind."""


class FailedPrecondition(ContractError):
    """The snapshot has children, or is not in the state the call needs."""


class Unavailable(ContractError):
    """A lower layer cannot be read at the moment."""


class CannotLazyPull(SnapshotterError):
    """This layer cannot be lazy; an ordinary pull goes on."""


class NoIndex(CannotLazyPull):
    """No SOCI index could be found or used for the image."""


class NoZtoc(CannotLazyPull):
    """The SOCI index exists but has no zTOC for the layer."""


class UnsupportedLayer(CannotLazyPull):
    """The layer holds something that is not served lazily."""


class CorruptData(SnapshotterError):
    """Bytes are not what they must be."""


class InvalidZtoc(CorruptData):
    """A zTOC breaks a rule of the format; the message names field, entry or span."""


class InvalidIndex(CorruptData):
    """A SOCI index or an OCI manifest breaks a rule of the format."""


class InvalidTar(CorruptData):
    """A tar stream or header breaks a rule of the format."""


class InvalidLayerFile(CorruptData):
    """A file of the layer store is damaged or of another version; it is made again."""


class DigestMismatch(CorruptData):
    """Content does not have the digest by which it was asked."""

    def __init__(self, message: str, *, elsewhere: bool = False) -> None:
        super().__init__(message)
        self.elsewhere = elsewhere
        """Whether mirrors sent some of it, which are not asked again for a while: somebody else is, next time."""


class SpanDigestMismatch(CorruptData):
    """A span's compressed bytes do not have the digest in the zTOC."""


class SpanInflateError(CorruptData):
    """A span whose digest is right does not inflate to its length."""


class HeaderMismatch(CorruptData):
    """A file's tar header does not equal its zTOC entry."""


class RegistryError(SnapshotterError):
    """A registry did not give what was asked; `temporary` says whether a retry can help."""

    temporary: ClassVar[bool] = False


class AuthenticationFailed(RegistryError):
    """The registry refused the credentials, or none were found."""


class BlobNotFound(RegistryError):
    """The registry has no such manifest or blob."""


class RangeNotHonoured(RegistryError):
    """The reply to a range request is not exactly the range that was asked."""


class RegistryRefused(RegistryError):
    """The registry answered with a final error status."""


class RegistryUnavailable(RegistryError):
    """No connection, or a status that may pass (429, 5xx)."""

    temporary = True

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds that the server asked us to wait, if it did."""


class RegistryTimeout(RegistryError):
    """A phase of the request (connect, header, body) took longer than its limit."""

    temporary = True


class ShortBody(RegistryError):
    """The body ended before the length that was announced."""

    temporary = True


class ConfigError(SnapshotterError):
    """The configuration is wrong; the message names file, line, key and what is allowed."""


class ProcessFailed(SnapshotterError):
    """One of our own processes could not be started, or died while it was asked."""


class UsageError(SnapshotterError):
    """A command was used in a way that cannot work; the message says what to do instead."""
