"""What every command starts from: the global options, made into containerd, stores, database and registry clients.

A command asks for what it needs; what it does not ask for is never opened. Everything opened is closed when the
context ends.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, TypeVar

from snapshotter.containerd import DEFAULT_ADDRESS
from snapshotter.errors import NotFound, UsageError
from snapshotter.oci.descriptor import Descriptor, Platform
from snapshotter.oci.platform import host_platform, parse_platform
from snapshotter.oci.reference import Reference
from snapshotter.soci.artifacts import ArtifactDatabase
from snapshotter.soci.content import ArtifactStore, ContentSource
from snapshotter.soci.layout import OciLayout
from snapshotter.soci.platforms import PlatformImage, find_images
from snapshotter.soci.store import LayoutStore
from snapshotter.units import Digest, parse_digest

if TYPE_CHECKING:
    from snapshotter.containerd.client import Containerd
    from snapshotter.registry.client import RegistryClient
    from snapshotter.registry.hosts import Hosts
    from snapshotter.registry.keychain import Keychain

DEFAULT_ROOT: Final = Path("/var/lib/soci-snapshotter-grpc")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LocatedImage:
    """A local image: what its name points to, and where its content is."""

    name: str
    root: Descriptor
    source: ContentSource
    in_containerd: bool

    def platforms(self, wanted: Sequence[Platform] | None) -> list[PlatformImage]:
        """Return the image of each platform. Raises UsageError, also when its content is not complete."""
        try:
            return find_images(self.source, self.root, wanted, self.name)
        except NotFound as error:
            raise self.incomplete(error) from error

    def incomplete(self, error: NotFound) -> UsageError:
        """Return the error for content of the image that is not there."""
        if not self.in_containerd:
            return UsageError(f"image {self.name}: {error}")
        return UsageError(
            f"image {self.name}: {error}; pull all of it first, with"
            f" `soci image rpull --snapshotter overlayfs` or `ctr image pull`"
        )


class Context:
    """The global options and what was opened for this command."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self._open = contextlib.ExitStack()
        self._containerd: Containerd | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    @property
    def containerd(self) -> Containerd:
        """The client for --address and --namespace."""
        if self._containerd is None:
            from snapshotter.containerd.client import Containerd

            options = self.arguments
            client = Containerd.connect(options.address, options.namespace, timeout=options.timeout)
            self._containerd = self._open.enter_context(client)
        return self._containerd

    @property
    def database(self) -> ArtifactDatabase:
        """The artifact database below --root."""
        return ArtifactDatabase(self.arguments.root)

    @property
    def layout_store(self) -> LayoutStore:
        """The content store below --root."""
        return LayoutStore(self.arguments.root / "content")

    @property
    def keeps_in_containerd(self) -> bool:
        """Whether artifacts are in containerd: as --content-store says, else where the image is."""
        kind = self.arguments.content_store
        return (
            kind == "containerd" if kind is not None else getattr(self.arguments, "oci_layout", None) is None
        )

    @property
    def artifacts(self) -> ArtifactStore:
        """The store that artifacts are kept in."""
        return self.containerd.content if self.keeps_in_containerd else self.layout_store

    @property
    def is_remote(self) -> bool:
        """Whether images are worked on in their registry: as --registry says, else where there is no containerd.

        Raises UsageError when the options name another place for them.
        """
        options = self.arguments
        elsewhere = getattr(options, "oci_layout", None) is not None or getattr(options, "standalone", False)
        if options.registry and elsewhere:
            raise UsageError("--registry: the options name another place for the image")
        if options.registry or elsewhere or options.address != DEFAULT_ADDRESS:
            return bool(options.registry)
        if Path(DEFAULT_ADDRESS).exists():
            return False
        print(f"no containerd at {DEFAULT_ADDRESS}: working in the registry itself", file=sys.stderr)
        return True

    def locate(self, name: str) -> LocatedImage:
        """Return the image `name` of --oci-layout, or else of containerd. Raises UsageError."""
        layout_path: Path | None = getattr(self.arguments, "oci_layout", None)
        if layout_path is not None:
            layout = self._open.enter_context(OciLayout(layout_path))
            return LocatedImage(name, layout.image(name), layout, in_containerd=False)
        for candidate in dict.fromkeys((name, _normal_name(name))):
            try:
                image = self.containerd.images.get(candidate)
            except NotFound:
                continue
            return LocatedImage(image.name, image.target, self.containerd.content, in_containerd=True)
        raise UsageError(
            f"image {name}: not in namespace {self.containerd.namespace} of containerd;"
            f" `ctr --namespace {self.containerd.namespace} image ls` shows what is"
        )

    def platforms(self) -> list[Platform] | None:
        """Return what --platform and --all-platforms ask for; None stands for all, the default is this host's."""
        if self.arguments.all_platforms:
            return None
        return [parse_platform(text) for text in self.arguments.platform] or [host_platform()]

    def registry(self, reference: Reference) -> RegistryClient:
        """Return a client for the registry of `reference`, to be entered; with --user and the options of its host."""
        from snapshotter.registry.client import RegistryClient

        plain_http = self.arguments.plain_http or None
        return RegistryClient(
            keychain=self._keychain(reference), plain_http=plain_http, hosts=self._hosts(plain_http)
        )

    def _hosts(self, plain_http: bool | None) -> Hosts:
        from snapshotter.registry.hosts import OwnHosts
        from snapshotter.registry.hostsfile import HostsDirectories
        from snapshotter.registry.mirrors import ConfiguredHosts
        from snapshotter.registry.tls import Trust

        options = self.arguments
        if options.tlskey and not options.tlscert:
            raise UsageError("--tlskey: needs --tlscert, the certificate of that key")
        trust = Trust(
            (options.tlscacert,) if options.tlscacert else (),
            ((options.tlscert, options.tlskey or ""),) if options.tlscert else (),
            options.skip_verify,
        )
        # nerdctl passes all of its places, there or not, joined by commas.
        directories = [path for path in map(Path, options.hosts_dir.split(",")) if path.is_dir()]
        if directories:
            return ConfiguredHosts({}, HostsDirectories(directories, trust=trust), plain_http=plain_http)
        return OwnHosts(plain_http=plain_http, trust=trust)

    @contextlib.contextmanager
    def time_limit(self) -> Iterator[None]:
        """Apply --timeout to a synchronous `with` block in the main thread. Raises UsageError when it is over."""
        limit = self.arguments.timeout
        if limit is None:
            yield
            return

        def end(_number: int, _frame: object) -> None:
            raise _out_of_time(limit)

        before = signal.signal(signal.SIGALRM, end)
        signal.setitimer(signal.ITIMER_REAL, limit)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def run(self, task: Callable[[], Awaitable[T]]) -> T:
        """Run an asynchronous command within --timeout. Raises the error that ended it, never a group."""
        import trio

        from snapshotter.nursery import first_error

        limit = self.arguments.timeout

        async def limited() -> T:
            with trio.fail_after(limit) if limit is not None else contextlib.nullcontext():
                return await task()

        try:
            return trio.run(limited)
        except trio.TooSlowError:
            raise _out_of_time(limit) from None
        except BaseExceptionGroup as group:
            raise first_error(group) from group

    def _keychain(self, reference: Reference) -> Keychain:
        from snapshotter.registry.ecr import EcrKeychain
        from snapshotter.registry.keychain import Credentials, DockerConfigKeychain, StaticKeychain
        from snapshotter.registry.keychains import ChainKeychain

        user: str | None = self.arguments.user
        known: dict[str, Keychain] = {"docker": DockerConfigKeychain(), "ecr": EcrKeychain()}
        if user is None:
            return ChainKeychain(**known)
        name, colon, secret = user.partition(":")
        if not colon:
            secret = getpass.getpass(f"Password of {name} at {reference.registry}: ")
        given = StaticKeychain({reference.registry: Credentials(name, secret)})
        return ChainKeychain(user=given, **known)


def _out_of_time(limit: float) -> UsageError:
    return UsageError(f"not done within {limit:g} s (--timeout)")


def digest_argument(text: str) -> Digest:
    """Return a digest from the command line. Raises UsageError."""
    try:
        return parse_digest(text)
    except ValueError as error:
        raise UsageError(f"{error}; write it as sha256:<64 hex digits>") from None


def _normal_name(name: str) -> str:
    """Return a short name in full, `redis` as `docker.io/library/redis:latest`; what is no reference, as it is."""
    try:
        return str(Reference.parse(name))
    except UsageError:
        return name
