"""Every parser of foreign bytes, as one function each: bytes in, nothing out.

A target takes any bytes, hands them to one parser, goes on to use what comes out, and lets pass exactly the errors
that the parser documents. Anything else that leaves a target is a finding, as is a run of more than a second or
one that needs more than 256 MiB. `tests/fuzz/test_fuzz.py` tries each target for a moment, `tests/fuzz/run.py` for
as long as one likes.

Concurrency: one process, one target at a time. What comes from files is read from memory files.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import trio

from snapshotter import messages
from snapshotter.counters import CounterPage
from snapshotter.daemon.config.loading import load
from snapshotter.errors import (
    AuthenticationFailed,
    ConfigError,
    CorruptData,
    HeaderMismatch,
    InvalidArgument,
    InvalidIndex,
    InvalidLayerFile,
    InvalidTar,
    InvalidZtoc,
    RangeNotHonoured,
    RegistryRefused,
    SpanInflateError,
    UnsupportedLayer,
    UsageError,
)
from snapshotter.fetch import control, trace
from snapshotter.fetch.options import Options
from snapshotter.fuse import holder, kernel, mounting
from snapshotter.fuse.counters import NAMES as COUNTER_NAMES
from snapshotter.fuse.journal import Journal
from snapshotter.fuse.mountpoint import Mountpoint, MountSpec, RootFacts, answer_one, parse_holder_name
from snapshotter.layer import header, wire
from snapshotter.layer.compile import compile_tree
from snapshotter.layer.spans import SpanFile, SpanState, SpanView
from snapshotter.layer.tree import Node, Tree
from snapshotter.oci import manifest
from snapshotter.oci.descriptor import Descriptor
from snapshotter.oci.gojson import go_json, load_object
from snapshotter.oci.media_types import layer_compression
from snapshotter.oci.platform import matches, parse_platform
from snapshotter.oci.reference import Reference, default_scheme
from snapshotter.registry import auth, challenge, hostsfile, referrers, replies
from snapshotter.registry.hosts import own_host
from snapshotter.registry.keychain import DockerConfigKeychain
from snapshotter.registry.source import BlobSource
from snapshotter.registry.tls import Trust
from snapshotter.registry.wire import Exchange, Reply, joined
from snapshotter.sdnotify import Notifier
from snapshotter.snapshot.filters import compile_filters
from snapshotter.soci import index, prefetch
from snapshotter.units import Digest, sha256_digest
from snapshotter.ztoc import pax, zinfo
from snapshotter.ztoc.build import build
from snapshotter.ztoc.flatbuffers import Table
from snapshotter.ztoc.inflate import BACKENDS, decompress_stream, inflate_span
from snapshotter.ztoc.model import Algorithm, mod_time_ns
from snapshotter.ztoc.parse import parse
from snapshotter.ztoc.spans import spans_of
from snapshotter.ztoc.tar import TarScanner, parse_header
from snapshotter.ztoc.tarheader import number

Target = Callable[[bytes], None]

TARGETS: dict[str, Target] = {}
"""All targets by name."""

DIGEST = Digest("sha256:" + "1f" * 32)
URL = httpx.URL("https://registry.example/v2/app/manifests/v1")
EXCHANGE = Exchange("a token", "GET", URL)

_MANY = 2000
"""How many of what a file claims to have are looked at: the rest would only cost time."""

_MAX_SPAN = 1 << 20
_MAX_STREAM = 1 << 25

_ROOT = RootFacts(Node(0o40755, 2, 0, 0, 0, 0, 0, 0, 0, b""), 1, 1, 1)

_SPEC = MountSpec(1, sha256_digest(b""), "", "", "", "")
_JOURNAL = Journal()
_COUNTERS = CounterPage(CounterPage.create("fuzz", COUNTER_NAMES), COUNTER_NAMES, writable=True)


def target(function: Target) -> Target:
    """Register a target under its function's name."""
    TARGETS[function.__name__] = function
    return function


@contextlib.contextmanager
def _file(data: bytes) -> Iterator[int]:
    """A file of these bytes, in memory."""
    fd = os.memfd_create("fuzz", os.MFD_CLOEXEC)
    try:
        os.write(fd, data)
        yield fd
    finally:
        os.close(fd)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


# ---- the zTOC and what is in it ----


@target
def ztoc(data: bytes) -> None:
    with contextlib.suppress(InvalidZtoc):
        spans_of(parse(data))


@target
def ztoc_compiled(data: bytes) -> None:
    """A zTOC that is accepted compiles to a tree that can be read in full."""
    with contextlib.suppress(InvalidZtoc, UnsupportedLayer):
        tree = compile_tree(parse(data))
        with _file(tree) as fd:
            _walk(Tree(fd))


@target
def flatbuffer(data: bytes) -> None:
    with contextlib.suppress(InvalidZtoc):
        table = Table.root(data, "root")
        for slot in range(min(len(table.fields.offsets), 16)):
            for read in (table.string, table.strings, table.offsets, lambda at: table.scalar(at, "q")):
                with contextlib.suppress(InvalidZtoc):
                    read(slot)
            table.table(slot, "field").string(0)


@target
def zinfo_gzip(data: bytes) -> None:
    with contextlib.suppress(InvalidZtoc):
        zinfo.parse_gzip(data)


@target
def zinfo_tar(data: bytes) -> None:
    with contextlib.suppress(InvalidZtoc):
        zinfo.parse_tar(data)


@target
def span_inflate(data: bytes) -> None:
    """What both inflaters make of a span is the same; what is damaged one may notice later than the other."""
    bits, length, window = data[:1], int.from_bytes(data[1:4], "little") % _MAX_SPAN, data[4:5]
    results = set()
    for backend in BACKENDS:
        with contextlib.suppress(SpanInflateError):
            inflated = inflate_span(
                data[5:],
                algorithm=Algorithm.GZIP,
                bits=bits[0] & 7 if bits else 0,
                window=bytes(range(256)) * 128 if window > b"\x80" else None,
                length=length,
                backend=backend,
            )
            results.add(bytes(inflated[:length]))
    assert len(results) <= 1, "the inflaters do not agree"


# ---- tar ----


@target
def tar_header(data: bytes) -> None:
    with contextlib.suppress(InvalidTar, UnsupportedLayer):
        parse_header(data)


@target
def tar_header_check(data: bytes) -> None:
    with contextlib.suppress(HeaderMismatch):
        header.check(data, bytes(16))


@target
def tar_stream(data: bytes) -> None:
    """However the stream is cut, the same entries come out."""
    assert _scanned(data, len(data) or 1) == _scanned(data, 700)


def _scanned(data: bytes, step: int) -> object:
    scanner = TarScanner()
    try:
        for start in range(0, len(data), step):
            scanner.feed(data[start : start + step])
        scanner.close()
    except (InvalidTar, UnsupportedLayer) as error:
        return type(error)
    return scanner.entries, scanner.end_offset


@target
def tar_number(data: bytes) -> None:
    with contextlib.suppress(InvalidTar):
        number(data[:12] or b"\0")


@target
def pax_records(data: bytes) -> None:
    with contextlib.suppress(InvalidTar, UnsupportedLayer):
        records = pax.parse_records(data)
        for each in records.values():
            with contextlib.suppress(InvalidTar):
                pax.time(each, "time")
        pax.sparse_dialect(records)
        pax.sparse_size(records, len(data))
        pax.check_sparse_map(pax.sparse_records(records), len(data))


@target
def pax_sparse_map(data: bytes) -> None:
    with contextlib.suppress(InvalidTar):
        reader = pax.SparseMapReader()
        for start in range(0, len(data), 512):
            if reader.add(data[start : start + 512].ljust(512, b"\0")):
                pax.check_sparse_map(reader.numbers(), len(data))
                return


@target
def layer_stream_gzip(data: bytes) -> None:
    _drain(decompress_stream([data], "gzip"))


@target
def layer_stream_zstd(data: bytes) -> None:
    _drain(decompress_stream([data], "zstd"))


def _drain(pieces: Iterator[bytes]) -> None:
    """Read a stream until it is long enough: a layer that inflates for ever is only refused by whoever counts."""
    total = 0
    with contextlib.suppress(InvalidTar):
        for piece in pieces:
            total += len(piece)
            if total > _MAX_STREAM:
                return


@target
def layer_build(data: bytes) -> None:
    """Whatever blob a zTOC can be built of, that zTOC is accepted again."""
    algorithm = Algorithm.UNCOMPRESSED if data[:1] == b"\0" else Algorithm.GZIP
    try:
        built = build([data[1:]], algorithm=algorithm, span_size=1 << 12)
    except (InvalidTar, UnsupportedLayer):
        return
    assert parse(built.data).entries == built.ztoc.entries


@target
def moment(data: bytes) -> None:
    mod_time_ns(_text(data))


# ---- our own files, which a disk may damage ----


@target
def tree_file(data: bytes) -> None:
    with _file(data) as fd, contextlib.suppress(InvalidLayerFile):
        _walk(Tree(fd))


def _walk(tree: Tree) -> None:
    """Use everything of a tree. Raises InvalidLayerFile."""
    for ino in range(1, min(tree.highest_ino, _MANY) + 1):
        with contextlib.suppress(InvalidLayerFile, KeyError):
            tree.row(ino)
            tree.readlink(ino)
            for name in tree.xattr_names(ino):
                tree.xattr(ino, name)
            tree.path(ino)
            for number, (_, name, child) in enumerate(tree.children(ino)):
                if number == _MANY:
                    break
                tree.lookup(ino, name)
                tree.attributes(child)
    for span in range(min(tree.span_count, _MANY)):
        with contextlib.suppress(InvalidLayerFile):
            tree.span(span)
    tree.spans_for(0, tree.uncompressed_size)
    for number, _ in enumerate(tree.implicit_dirs()):
        if number == _MANY:
            break


@target
def spans_file(data: bytes) -> None:
    """The fetcher makes a usable file of anything; servers read it or refuse."""
    with _file(data) as fd:
        with contextlib.suppress(InvalidLayerFile):
            view = SpanView(fd)
            view.states()
            view.counts()
            view.close()
        spans = SpanFile.create_or_open(Path(f"/proc/self/fd/{fd}"), 9, boot_id="b", digest=DIGEST)
        for span in range(spans.span_count):
            if spans.state(span) is not SpanState.MISSING:
                spans.set_missing(span)
        spans.close()


@target
def trace_file(data: bytes) -> None:
    with _file(data) as fd:
        trace.load(Path(f"/proc/self/fd/{fd}"), 100)


# ---- between our processes ----


@target
def wire_message(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        message = wire.decode(data)
        assert wire.decode(wire.encode(message)) == message


@target
def control_message(data: bytes) -> None:
    """The fetcher's control socket: a message, or ValueError and no descriptor left open."""
    near, far = messages.pair()
    with near, far, open(os.devnull, "rb") as null:
        try:
            socket.send_fds(near, [data[1:]], [null.fileno()] * (data[:1] == b"F"))
        except OSError:  # too large for a packet
            return
        before = os.dup(null.fileno())
        os.close(before)
        with contextlib.suppress(ValueError):
            received = control.receive(far)
            for fd in received[1] if received else ():
                os.close(fd)
        after = os.dup(null.fileno())
        os.close(after)
        assert before == after, "a descriptor was left open"


@target
def holder_message(data: bytes) -> None:
    table = holder.Table(Notifier(""))
    near, far = messages.pair()
    with near, far, open(os.devnull, "rb") as null, contextlib.redirect_stderr(None):
        try:
            socket.send_fds(near, [data[1:]], [null.fileno()] * (data[:1] == b"F"))
        except OSError:
            return
        holder._answer(table, far)
        for name, _ in table.items():
            with contextlib.suppress(ValueError):
                parse_holder_name(name)
            table.drop(name)


@target
def holder_name(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        _, init = parse_holder_name(_text(data))
        kernel.Init.from_text(init.to_text())


@target
def blob_source(data: bytes) -> None:
    with contextlib.suppress(ValueError, RecursionError):
        members = json.loads(data)
        if isinstance(members, dict):
            source = BlobSource.from_json(members)
            assert BlobSource.from_json(source.to_json()) == source


@target
def fetcher_options(data: bytes) -> None:
    with contextlib.suppress(ConfigError):
        Options.from_json(_text(data)).worker_count()


@target
def fuse_request(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        kernel.parse_request(data)
    with contextlib.suppress(ValueError):
        unique, init = kernel.parse_init(data)
        kernel.init_reply(unique, init)
        kernel.synthetic_init(unique, init)


@target
def fuse_request_asleep(data: bytes) -> None:
    """A request for the keeper, on a kernel that sends again and on one that does not."""
    for init in (kernel.Init(41, 0, kernel.Flag.HAS_RESEND), kernel.Init(36, 0, 0)):
        near, far = messages.pair()
        with near, far, contextlib.suppress(ValueError):
            near.send(data[:4096] or b"\0")
            answer_one(Mountpoint(_SPEC, far.fileno(), init, -1, _JOURNAL, _ROOT, -1, _COUNTERS))


@target
def mountinfo_line(data: bytes) -> None:
    """A mount point with any name, escaped as the kernel does."""
    path = b"/" + data.replace(b"\0", b"")
    escaped = re.sub(rb"[ \t\n\\#]", lambda match: b"\\%03o" % match[0][0], path)
    line = b"36 35 98:0 /r " + escaped + b" rw,noatime master:1 - fuse.soci " + escaped + b" rw\n"
    assert mounting._parse(line).target == path


# ---- registries ----


@target
def oci_manifest(data: bytes) -> None:
    with contextlib.suppress(InvalidIndex):
        parsed = manifest.parse(data)
        go_json(parsed.to_json())
        referrers._artifact_type(parsed)


@target
def oci_config(data: bytes) -> None:
    with contextlib.suppress(InvalidIndex):
        manifest.parse_config(data)


@target
def oci_descriptor(data: bytes) -> None:
    with contextlib.suppress(InvalidIndex, UnsupportedLayer):
        one = Descriptor.from_json(load_object(data, limit=1 << 20, what="descriptor"))
        assert Descriptor.from_json(json.loads(go_json(one.to_json()))) == one
        layer_compression(one.media_type)
        if one.platform is not None:
            matches(one.platform, one.platform)


@target
def soci_index(data: bytes) -> None:
    with contextlib.suppress(InvalidIndex):
        index.parse(data)


@target
def soci_prefetch(data: bytes) -> None:
    with contextlib.suppress(CorruptData):
        ranges = prefetch.parse(data)
        assert prefetch.parse(prefetch.write(ranges)) == ranges


@target
def reference(data: bytes) -> None:
    with contextlib.suppress(UsageError):
        parsed = Reference.parse(_text(data))
        default_scheme(parsed.registry)
        assert Reference.parse(str(parsed)) == parsed


@target
def platform(data: bytes) -> None:
    with contextlib.suppress(UsageError):
        parsed = parse_platform(_text(data))
        assert matches(parsed, parsed)


@target
def media_type(data: bytes) -> None:
    with contextlib.suppress(UnsupportedLayer):
        layer_compression(_text(data))


@target
def http_content_range(data: bytes) -> None:
    with contextlib.suppress(RangeNotHonoured):
        replies.check_content_range("blob", "host", data.decode("latin-1"), 0, 10)


@target
def http_retry_after(data: bytes) -> None:
    after = replies.retry_after(data.decode("latin-1"), time.time())
    assert after is None or after >= 0


@target
def http_error(data: bytes) -> None:
    status = 400 + int.from_bytes(data[:1], "little") % 200
    body = data[1:]
    headers = {"retry-after": body[:40].decode("latin-1")}
    str(replies.error_for("blob", "host", status, headers, body))


@target
def http_challenge(data: bytes) -> None:
    for way in challenge.parse_challenges([data.decode("latin-1")]):
        with contextlib.suppress(AuthenticationFailed):
            auth._token_request(own_host("registry.example"), way, ("repository:app:pull",), None)


@target
def http_token(data: bytes) -> None:
    with contextlib.suppress(AuthenticationFailed):
        shown, lifetime = auth._parse_token(EXCHANGE, Reply(200, httpx.Headers(), data, URL))
        assert shown.isascii()
        assert lifetime > 0


@target
def http_location(data: bytes) -> None:
    with contextlib.suppress(RegistryRefused):
        joined("blob", URL, data.decode("latin-1"))


@target
def http_link(data: bytes) -> None:
    with contextlib.suppress(RegistryRefused):
        headers = httpx.Headers([(b"Link", data)])
        referrers._next_page("referrers", Reply(200, headers, b"", URL))


# ---- what users and clients write ----


@target
def docker_config(data: bytes) -> None:
    with _file(data) as fd:
        keychain = DockerConfigKeychain(Path(f"/proc/self/fd/{fd}"))
        path = os.environ["PATH"]
        os.environ["PATH"] = "/nonexistent"  # a helper that the file names must not be found
        try:
            with contextlib.suppress(AuthenticationFailed):
                trio.run(keychain.lookup, "registry.example")
        finally:
            os.environ["PATH"] = path


@target
def toml_config(data: bytes) -> None:
    with _file(data) as fd, contextlib.suppress(ConfigError):
        load(Path(f"/proc/self/fd/{fd}"), explicit=True)


@target
def hosts_file(data: bytes) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        Path(directory, "hosts.toml").write_bytes(data)
        reader = hostsfile._Reader(Path(directory), "registry.example", None, (), Trust())
        assert reader.hosts(), "a registry has always a host: itself"


@target
def containerd_filter(data: bytes) -> None:
    with contextlib.suppress(InvalidArgument):
        compile_filters([data.decode("utf-8", "replace")])  # as it comes from gRPC: always valid text
