"""A layer as pyfuse3 operations: each handler translates, and nothing more.

Stateless by design: inode numbers are rows of the tree, file handles are inode numbers, and forgetting is
free; so any server may answer for any other. Layers never change, so every entry, attribute, missing name
and page may be cached by the kernel for ever: a request that never comes is the fast one.

Every failure becomes an errno here, by one table: an exception that leaves a handler would end the session
of every reader.

Concurrency: trio, one task per request; handlers share nothing but the counters.
"""

from __future__ import annotations

import errno
import functools
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import pyfuse3

from snapshotter.counters import CounterPage
from snapshotter.errors import CorruptData, RegistryError
from snapshotter.fuse import kernel
from snapshotter.fuse.contents import Contents
from snapshotter.fuse.relay import Relay
from snapshotter.layer.tree import Tree, TreeFlags

_log = logging.getLogger(__name__)

_BLOCK_SIZE = 4096

ERRNO_OF: tuple[tuple[type[BaseException], int], ...] = (
    (CorruptData, errno.EIO),
    (RegistryError, errno.EIO),
    (KeyError, errno.ESTALE),
    (MemoryError, errno.ENOMEM),
)
"""What a reader gets for what went wrong; OSError keeps its own number, anything else is EIO."""

_Handler = TypeVar("_Handler", bound=Callable[..., Awaitable[Any]])


def errno_of(error: BaseException) -> int:
    """Return the errno for an exception."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    return next((number for kind, number in ERRNO_OF if isinstance(error, kind)), errno.EIO)


def _counted(kind: str) -> Callable[[_Handler], _Handler]:
    """Count a handler's calls as `kind`, and turn whatever it raises into an errno."""

    def decorate(handler: _Handler) -> _Handler:
        @functools.wraps(handler)
        async def wrapper(self: LayerOperations, *arguments: Any) -> Any:
            relay = self.relay
            slot = relay.begin() if relay is not None else 0
            self.words[self.request_index[kind]] += 1
            self.in_flight += 1
            try:
                return await handler(self, *arguments)
            except pyfuse3.FUSEError:
                raise
            except Exception as error:  # the session of all readers must go on
                raise self._failure(kind, error) from error
            finally:
                self.in_flight -= 1
                if relay is not None:
                    relay.end(slot)

        return wrapper  # type: ignore[return-value]

    return decorate


def _counted_at_once(kind: str) -> Callable[[Callable[..., Any]], Any]:
    """The same for a handler that never waits: an ordinary function, of which pyfuse3 sees a coroutine."""

    def decorate(handler: Callable[..., Any]) -> Any:
        @functools.wraps(handler)
        async def wrapper(self: LayerOperations, *arguments: Any) -> Any:
            relay = self.relay
            slot = relay.begin() if relay is not None else 0
            self.words[self.request_index[kind]] += 1
            try:
                return handler(self, *arguments)
            except pyfuse3.FUSEError:
                raise
            except Exception as error:  # the session of all readers must go on
                raise self._failure(kind, error) from error
            finally:
                if relay is not None:
                    relay.end(slot)

        return wrapper

    return decorate


class LayerOperations(pyfuse3.Operations):
    """The requests of one layer's mount."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(
        self,
        tree: Tree,
        contents: Contents,
        counters: CounterPage,
        relay: Relay | None = None,
        *,
        getxattr_unsupported: bool = True,
    ) -> None:
        super().__init__()
        self.counters = counters
        self.words = counters.words
        self.relay = relay
        """Told of every handler's start and end, where the kernel cannot send requests again."""
        self.in_flight = 0
        """Requests being answered; the server sleeps only when there are none."""
        self.request_index = {
            name.removeprefix("requests_"): counters.index(name)
            for name in counters.snapshot()
            if name.startswith("requests_")
        }
        self._tree = tree
        self._contents = contents
        self._read_bytes = counters.index("read_bytes")
        self._no_getxattr = getxattr_unsupported and not tree.flags & (
            TreeFlags.HAS_XATTRS | TreeFlags.HAS_OPAQUE
        )

    def _failure(self, kind: str, error: Exception) -> pyfuse3.FUSEError:
        """Count and log what a handler raised; return what its reader gets."""
        self.counters.add(f"failures_{kind}")
        number = errno_of(error)
        _log.warning("request failed", extra={"request": kind, "errno": number, "error": repr(error)})
        return pyfuse3.FUSEError(number)

    def _attributes(self, ino: int) -> pyfuse3.EntryAttributes:
        mode, nlink, uid, gid, rdev, size, mtime_ns = self._tree.attributes(ino)
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = ino
        entry.generation = 0
        entry.entry_timeout = entry.attr_timeout = kernel.FOREVER_S
        entry.st_mode = mode
        entry.st_nlink = nlink
        entry.st_uid = uid
        entry.st_gid = gid
        entry.st_rdev = rdev
        entry.st_size = size
        entry.st_blksize = _BLOCK_SIZE
        entry.st_blocks = -(-size // _BLOCK_SIZE) * 8
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = mtime_ns
        return entry

    @_counted_at_once("lookup")
    def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Return the entry; an absent name is an entry with inode 0, which the kernel remembers."""
        ino = self._tree.lookup(parent_inode, name)
        if ino:
            return self._attributes(ino)
        absent = pyfuse3.EntryAttributes()
        absent.st_ino = 0
        absent.entry_timeout = kernel.FOREVER_S
        return absent

    @_counted_at_once("getattr")
    def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Return the attributes of an inode."""
        return self._attributes(inode)

    @_counted_at_once("readlink")
    def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        """Return a symbolic link's target."""
        return self._tree.readlink(inode)

    @_counted_at_once("open")
    def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open a file; its pages stay cached from one open to the next."""
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    @_counted("read")
    async def read(  # type: ignore[override]  # pyfuse3 takes any buffer, its stub says bytes
        self, fh: int, off: int, size: int
    ) -> bytes | bytearray | memoryview:
        """Return a range of a file."""
        data: bytes | bytearray | memoryview | None = self._contents.read_at_once(fh, off, size)
        if data is None:
            data = await self._contents.read(fh, self._tree.row(fh), off, size)
        self.words[self._read_bytes] += len(data)
        return data

    @_counted_at_once("release")
    def release(self, fh: int) -> None:
        """Close a file: there is no state."""

    @_counted_at_once("opendir")
    def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        """Open a directory; its handle is its inode."""
        return inode

    @_counted_at_once("readdir")
    def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """List a directory from position `start_id`, with attributes; positions 0 and 1 are `.` and `..`."""
        tree = self._tree
        for position, name in ((0, b"."), (1, b"..")):
            if start_id <= position and not pyfuse3.readdir_reply(
                token, name, self._attributes(fh), position + 1
            ):
                return
        for next_index, name, ino in tree.children(fh, max(start_id - 2, 0)):
            if not pyfuse3.readdir_reply(token, name, self._attributes(ino), next_index + 2):
                return

    @_counted_at_once("releasedir")
    def releasedir(self, fh: int) -> None:
        """Close a directory: there is no state."""

    @_counted_at_once("statfs")
    def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """Say how large the layer is: everything used, nothing free."""
        stat = pyfuse3.StatvfsData()
        stat.f_bsize = stat.f_frsize = _BLOCK_SIZE
        stat.f_blocks = -(-self._tree.uncompressed_size // _BLOCK_SIZE)
        stat.f_files = self._tree.entry_count
        stat.f_namemax = kernel.NAME_MAX
        return stat

    @_counted_at_once("getxattr")
    def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        """Return an extended attribute. A layer that has none says ENOSYS, if it may, and is never asked again."""
        if self._no_getxattr:
            raise pyfuse3.FUSEError(errno.ENOSYS)
        value = self._tree.xattr(inode, name)
        if value is None:
            raise pyfuse3.FUSEError(pyfuse3.ENOATTR)
        return value

    @_counted_at_once("listxattr")
    def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> tuple[bytes, ...]:
        """Return the names; always an answer, because ENOSYS here breaks copying from a volume's directory."""
        return self._tree.xattr_names(inode)

    @_counted_at_once("flush")
    def flush(self, fh: int) -> None:
        """Say that close(2) need not tell us."""
        raise pyfuse3.FUSEError(errno.ENOSYS)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Forget inodes: nothing was remembered."""
        self.counters.add_at(self.request_index["forget"], len(inode_list))
