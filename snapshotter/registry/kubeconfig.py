"""A kubeconfig, or the service account of a pod: where the API server is, how it is known, and who we are there.

Of the ways to log in: token, token file, client certificate, name and password, and a program (`exec`), as cloud
providers have it. PyYAML is an optional extra; JSON is YAML and needs none.

Concurrency: trio. Nothing is kept: each connection reads the files again, so that what rotates is seen.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
import ssl
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from snapshotter.errors import AuthenticationFailed
from snapshotter.registry.programs import run_program

SERVICE_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
EXEC_TIMEOUT: Final = 20.0


@dataclass(frozen=True, slots=True)
class Cluster:
    """An API server, and our way in."""

    server: str
    context: ssl.SSLContext = field(repr=False)
    authorization: str = field(default="", repr=False)
    """The header; empty: none, the client certificate says who we are."""


async def find_cluster(path: Path | None, environ: Mapping[str, str] = os.environ) -> Cluster:
    """Return the cluster of `path`, else of $KUBECONFIG, ~/.kube/config, or of the pod that we run in.

    Raises AuthenticationFailed naming the file and what is wrong with it.
    """
    if path is None:
        named = environ.get("KUBECONFIG", "").split(":")[0]
        path = Path(named) if named else Path.home() / ".kube" / "config"
        if not named and not path.exists() and "KUBERNETES_SERVICE_HOST" in environ:
            return _in_pod(environ)
    try:
        settings = _load(path)
        context = _named(settings, "contexts", settings["current-context"])["context"]
        cluster = _named(settings, "clusters", context["cluster"])["cluster"]
        user = _named(settings, "users", context["user"])["user"] or {}
        server = str(cluster["server"]).rstrip("/")
        credential = await _login(user, path)
        return Cluster(
            server, _context(cluster, {**user, **credential}, path), _authorization(credential or user, path)
        )
    except (KeyError, TypeError, AttributeError):
        raise AuthenticationFailed(f"kubeconfig {path}: its current context is not complete") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise AuthenticationFailed(f"kubeconfig {path}: cannot be used: {reason}") from None


def _in_pod(environ: Mapping[str, str]) -> Cluster:
    host, port = environ["KUBERNETES_SERVICE_HOST"], environ.get("KUBERNETES_SERVICE_PORT", "443")
    try:
        token = (SERVICE_ACCOUNT / "token").read_text("ascii").strip()
        context = ssl.create_default_context(cafile=str(SERVICE_ACCOUNT / "ca.crt"))
    except (OSError, ValueError) as error:
        raise AuthenticationFailed(f"service account in {SERVICE_ACCOUNT}: {type(error).__name__}") from None
    return Cluster(f"https://{f'[{host}]' if ':' in host else host}:{port}", context, f"Bearer {token}")


def _load(path: Path) -> Mapping[str, Any]:
    text = path.read_text("utf-8")
    try:
        settings = json.loads(text)
    except ValueError:
        try:
            yaml = importlib.import_module("yaml")
        except ImportError:
            raise AuthenticationFailed(
                f"kubeconfig {path}: reading YAML needs PyYAML (the extra `kubernetes`)"
            ) from None
        try:
            settings = yaml.safe_load(text)
        except yaml.YAMLError:
            raise AuthenticationFailed(f"kubeconfig {path}: not YAML") from None
    if not isinstance(settings, dict):
        raise AuthenticationFailed(f"kubeconfig {path}: not a table")
    return settings


def _named(settings: Mapping[str, Any], what: str, name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(
        entry for entry in [*settings[what], {}] if entry.get("name", name) == name
    )
    return found


def _context(cluster: Mapping[str, Any], user: Mapping[str, Any], path: Path) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if "certificate-authority-data" in cluster:
        context.load_verify_locations(cadata=_decoded(cluster["certificate-authority-data"]).decode("ascii"))
    elif "certificate-authority" in cluster:
        context.load_verify_locations(cafile=path.parent / cluster["certificate-authority"])
    if cluster.get("insecure-skip-tls-verify"):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if "client-certificate-data" in user:
        # Only files can be loaded; this one has no name that anybody else could open.
        with tempfile.NamedTemporaryFile() as both:
            both.write(_decoded(user["client-certificate-data"]) + b"\n" + _decoded(user["client-key-data"]))
            both.flush()
            context.load_cert_chain(both.name)
    elif "client-certificate" in user:
        context.load_cert_chain(path.parent / user["client-certificate"], path.parent / user["client-key"])
    return context


def _authorization(user: Mapping[str, Any], path: Path) -> str:
    if user.get("token"):
        return f"Bearer {user['token']}"
    if user.get("tokenFile"):
        return f"Bearer {(path.parent / user['tokenFile']).read_text('ascii').strip()}"
    if user.get("username"):
        pair = f"{user['username']}:{user.get('password', '')}"
        return "Basic " + base64.b64encode(pair.encode()).decode()
    return ""


async def _login(user: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return what the user's program says, in a kubeconfig's words; nothing without a program."""
    program = user.get("exec")
    if program is None:
        return {}
    what = f"kubeconfig {path}: {program['command']}"
    environ = {**os.environ, **{each["name"]: each["value"] for each in program.get("env") or ()}}
    version = program.get("apiVersion", "client.authentication.k8s.io/v1")
    question = {"apiVersion": version, "kind": "ExecCredential", "spec": {"interactive": False}}
    environ["KUBERNETES_EXEC_INFO"] = json.dumps(question)
    command = [program["command"], *(program.get("args") or ())]
    done = await run_program(command, what=what, about="a token", timeout=EXEC_TIMEOUT, environ=environ)
    try:
        status = json.loads(done.stdout)["status"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise AuthenticationFailed(f"{what}: its answer is not understood") from None
    found = {"token": status.get("token", "")}
    if status.get("clientCertificateData"):
        found["client-certificate-data"] = _encoded(status["clientCertificateData"])
        found["client-key-data"] = _encoded(status["clientKeyData"])
    return found


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=False)
    except ValueError:
        raise ValueError("not base64") from None


def _encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
