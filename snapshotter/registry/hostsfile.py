"""containerd's directories of hosts: `<directory>/<registry>/hosts.toml`, or certificates alone as Docker has them.

A registry is looked for as `name_port_`, `name:port`, then `_default`. What a file says wrongly is left out, said
in one line of the log, and counted; the registry itself is always there, for a pull needs no mirror.

It owns what it read, until a file or directory changes. Concurrency: one thread.
"""

from __future__ import annotations

import logging
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from snapshotter.registry.hosts import EVERYTHING, Host, named_host, own_host
from snapshotter.registry.tls import SYSTEM, Trust

_log = logging.getLogger(__name__)

_Stamp = tuple[tuple[str, int, int], ...]
_KNOWN: Final = frozenset({
    "capabilities", "ca", "client", "skip_verify", "header", "override_path", "dial_timeout", "server", "host",
})  # fmt: skip
_CAPABILITIES: Final = {*EVERYTHING, "referrers"}
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
_SECONDS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
MAX_FILE: Final = 1 << 20
"""Bytes of a hosts.toml; larger ones are something else."""


class HostsDirectories:
    """The hosts that directories like /etc/containerd/certs.d name. The first that knows a registry decides."""

    def __init__(self, directories: Sequence[Path], *, trust: Trust = SYSTEM) -> None:
        """`trust` is every host's, besides what the directories say of it."""
        self._directories = tuple(directories)
        self._trust = trust
        self._read: dict[str, tuple[_Stamp, tuple[Host, ...]]] = {}
        self.problems: dict[str, int] = {}
        """Mistakes by file, as of its last reading."""

    def of(self, registry: str, *, plain_http: bool | None = None) -> tuple[Host, ...]:
        """Return the hosts of `registry`, the registry itself last; never empty."""
        directory = self._find(registry)
        if directory is None:
            return (own_host(registry, plain_http=plain_http, trust=self._trust),)
        stamp = _stamp(directory)
        known = self._read.get(registry)
        if known is None or known[0] != stamp:
            reader = _Reader(directory, registry, plain_http, stamp, self._trust)
            known = self._read[registry] = (stamp, reader.hosts())
            self._report(directory, reader.problems)
        return known[1]

    def _find(self, registry: str) -> Path | None:
        name, colon, port = registry.rpartition(":")
        names = [f"{name}_{port}_"] if colon and port.isdigit() else []
        for directory in self._directories:
            for candidate in (*names, registry, "_default"):
                if (directory / candidate).is_dir():
                    return directory / candidate
        return None

    def _report(self, directory: Path, problems: Sequence[str]) -> None:
        self.problems[str(directory)] = len(problems)
        for problem in problems:
            _log.warning(
                "a mistake in the hosts of a registry", extra={"where": str(directory), "error": problem}
            )


class _Reader:
    """Reads one directory; `problems` grows meanwhile."""

    def __init__(
        self, directory: Path, registry: str, plain_http: bool | None, stamp: _Stamp, trust: Trust
    ) -> None:
        self._directory = directory
        self._registry = registry
        self._plain_http = plain_http
        self._stamp = max((changed for _, changed, _ in stamp), default=0)
        self._default = trust
        self.problems: list[str] = []

    def hosts(self) -> tuple[Host, ...]:
        own = own_host(self._registry, plain_http=self._plain_http, trust=self._default)
        path = self._directory / "hosts.toml"
        try:
            with path.open("rb") as file:
                data = file.read(MAX_FILE + 1)
            if len(data) > MAX_FILE:
                raise ValueError(f"more than {MAX_FILE} bytes")
            settings = tomllib.loads(data.decode())
        except FileNotFoundError:
            return (replace(own, trust=self._certificates()),)
        except OSError as error:
            self.problems.append(f"{path}: cannot be read: {error.strerror}")
            return (own,)
        except (ValueError, RecursionError) as error:  # also tomllib's and a decoder's
            self.problems.append(f"{path}: not TOML: {error}")
            return (own,)
        hosts = list(self._mirrors(settings.get("host", {})))
        server = settings.get("server")
        try:
            last = own if server in {None, ""} else self._named(server, settings)
            hosts.append(self._configured(last, settings))
        except ValueError as error:
            self.problems.append(f"{path}: {error}")
            hosts.append(own)
        return tuple(hosts)

    def _mirrors(self, tables: object) -> Iterator[Host]:
        path = self._directory / "hosts.toml"
        if not isinstance(tables, dict):
            self.problems.append(f"{path}: host must be a table")
            return
        for url, settings in tables.items():
            try:
                if not isinstance(settings, dict):
                    raise ValueError("must be a table")  # noqa: TRY004  as everything that is wrong here
                yield self._configured(self._named(url, settings), settings)
            except ValueError as error:
                self.problems.append(f"{path}: host {url}: {error}")

    def _named(self, url: object, settings: Mapping[str, Any]) -> Host:
        if not isinstance(url, str):
            raise ValueError("server must be a URL")  # noqa: TRY004
        literal = _flag(settings, "override_path")
        full = url if url.startswith(("http://", "https://")) else f"https://{url}"
        return named_host(self._registry, full, plain_http=False, timeout=None, is_literal=literal)

    def _configured(self, host: Host, settings: Mapping[str, Any]) -> Host:
        """Return `host` as `settings` want it. Raises ValueError."""
        for key in settings.keys() - _KNOWN:
            self.problems.append(f"{self._directory / 'hosts.toml'}: {host.name}: unknown key {key}")
        wanted = settings.get("capabilities")
        capabilities = host.capabilities
        if wanted:
            names = _texts(wanted, "capabilities")
            if not set(names) <= _CAPABILITIES:
                raise ValueError(f"capabilities must be of {', '.join(sorted(_CAPABILITIES))}")
            capabilities = frozenset(names) & EVERYTHING
        authorities = tuple(self._file(path) for path in _texts(settings.get("ca", []), "ca"))
        ours = tuple(self._client(settings.get("client", [])))
        skip_verify = _flag(settings, "skip_verify") if "skip_verify" in settings else None
        trust = self._trust(authorities, ours, skip_verify)
        dial = settings.get("dial_timeout")
        return replace(
            host,
            capabilities=capabilities,
            headers=_headers(settings.get("header", {})),
            trust=trust,
            connect_timeout=None if dial is None else _duration(dial),
        )

    def _client(self, value: object) -> Iterator[tuple[str, str]]:
        """Yield certificate and key: a file with both, several of those, or pairs."""
        for entry in value if isinstance(value, list) else [value]:
            match entry:
                case str(path) | [str(path)]:
                    yield self._file(path), ""
                case [str(path), str(key)]:
                    yield self._file(path), self._file(key) if key else ""
                case _:
                    raise ValueError("client must be a file, or an array of files or of pairs of files")

    def _certificates(self) -> Trust:
        """Return what Docker's file names say: *.crt are authorities, *.cert with *.key are ours."""
        pairs = []
        for certificate in sorted(self._directory.glob("*.cert")):
            key = certificate.with_suffix(".key")
            if key.exists():
                pairs.append((str(certificate), str(key)))
            else:
                self.problems.append(f"{certificate}: there is no {key.name} beside it")
        authorities = tuple(map(str, sorted(self._directory.glob("*.crt"))))
        return self._trust(authorities, tuple(pairs))

    def _trust(
        self,
        authorities: tuple[str, ...],
        ours: tuple[tuple[str, str], ...],
        skip_verify: bool | None = None,
    ) -> Trust:
        """Return the trust of a host of which the files say this; None: nothing about that."""
        default = self._default
        return Trust(
            (*default.ca_files, *authorities),
            (*default.client_certificates, *ours),
            default.skip_verify if skip_verify is None else skip_verify,
            # Without files of its own a host shares its connections with all others, whatever changes here.
            self._stamp if authorities or ours else default.stamp,
        )

    def _file(self, path: str) -> str:
        return str(self._directory / path)


def _stamp(directory: Path) -> _Stamp:
    """Return what changes when one of the directory's files does."""
    entries = []
    try:
        with os.scandir(directory) as found:
            for entry in found:
                state = entry.stat()
                entries.append((entry.name, state.st_mtime_ns, state.st_size))
    except OSError:
        return ()
    return tuple(sorted(entries))


def _texts(value: object, key: str) -> list[str]:
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{key} must be a text or an array of texts")
    return list(map(str, texts))


def _flag(settings: Mapping[str, Any], key: str) -> bool:
    value = settings.get(key, False)
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false")  # noqa: TRY004
    return value


def _headers(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ValueError("header must be a table")  # noqa: TRY004
    headers = {}
    for name, content in value.items():
        texts = _texts(content, f"header {name}")
        if not all(text.isprintable() for text in (name, *texts)):
            raise ValueError(f"header {name} holds what no header may")
        headers[name] = ", ".join(texts)
    return headers


def _duration(value: object) -> float:
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError('dial_timeout must be like "3s"')
    return float(match[1]) * _SECONDS[match[2]]
