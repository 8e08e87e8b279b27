"""What an operator watches: a real Prometheus scrapes the daemon, and dashboard and alerts ask for what is there."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.images import ImageBuilder
from tests.support.lazysystem import LazySystem
from tests.support.process import Service, free_port, wait_until

MONITORING = Path(__file__).parents[2] / "docs" / "monitoring"
ALERTS = MONITORING / "alerts.yml"
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text())
_METRIC = re.compile(r"\bsoci_\w+")


@pytest.fixture(scope="module")
def lazy(system: LazySystem, module_workdir: Path) -> LazySystem:
    """A system with one lazy image."""
    image = ImageBuilder(module_workdir / "image").layer({"a": b"1" * 100_000}).layer({"b": b"2"}).build()
    system.pull(system.publish(image, "test/watched", "--min-layer-size", "0"))
    wait_until(lambda: all(m["verified"] for m in system.mounts()), timeout=60, what="layers are verified")
    return system


@pytest.fixture(scope="module")
def prometheus(lazy: LazySystem, module_workdir: Path) -> Iterator[str]:
    """The address of a Prometheus that scrapes the daemon, with our rules."""
    directory = module_workdir / "prometheus"
    directory.mkdir()
    (directory / "prometheus.yml").write_text(
        f"global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: [{ALERTS}]\n"
        "scrape_configs:\n- job_name: soci-snapshotter\n"
        f"  static_configs: [{{targets: ['{lazy.daemon.metrics_address}']}}]\n"
    )
    address = f"127.0.0.1:{free_port()}"
    service = Service(
        [
            "prometheus", f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/data",
            f"--web.listen-address={address}", "--log.level=error",
        ],
        log=directory / "log",
    )  # fmt: skip
    service.start()
    try:
        wait_until(lambda: query(address, "up == 1"), timeout=60, what="Prometheus scrapes the daemon")
        yield address
    finally:
        service.cleanup()


def api(address: str, path: str, **parameters: str) -> Any:
    url = f"http://{address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
    return json.loads(urllib.request.urlopen(url, timeout=60).read())["data"]


def query(address: str, expression: str) -> list[Any]:
    try:
        found: list[Any] = api(address, "query", query=expression)["result"]
    except OSError:  # it starts
        return []
    return found


def expressions() -> list[str]:
    """Return what the panels of the dashboard ask, with its variables filled in."""
    return [
        target["expr"].replace("$instance", ".*").replace("$__rate_interval", "1m")
        for panel in DASHBOARD["panels"]
        for target in panel["targets"]
    ]


def test_a_real_prometheus_scrapes_the_daemon(lazy: LazySystem, prometheus: str) -> None:
    (mounted,) = query(prometheus, "sum(soci_lazy_mounts)")
    assert mounted["value"][1] == "2"
    (fetched,) = query(prometheus, "sum(soci_fs_layer_fetched_size_bytes) / sum(soci_fs_layer_size_bytes)")
    assert float(fetched["value"][1]) == 1
    (provided,) = query(prometheus, 'soci_phase_seconds_count{phase="provide"}')
    assert provided["value"][1] == "2"
    by_image = query(prometheus, 'sum by (image) (soci_fs_image_operation_count_key{image=~"sha256:.*"})')
    assert len(by_image) == 1


def test_the_last_start_can_be_looked_at(lazy: LazySystem, module_workdir: Path) -> None:
    page = module_workdir / "start.html"
    root = str(lazy.daemon.root)
    said = lazy.soci("trace", "--root", root, "-o", str(page))
    assert said.startswith("2 layers became lazy in")
    assert "test/watched@sha256:" in page.read_text()
    told = json.loads(lazy.soci("trace", "--root", root, "--json"))
    assert len(told["layers"]) == 2
    assert {"index", "ztoc", "compile", "mount", "provide"} <= {step["phase"] for step in told["steps"]}
    assert sum(event["bytes"] for event in told["events"]) > 0
    assert lazy.daemon.root.joinpath("trace.sock").stat().st_mode & 0o777 == 0o600


def test_every_metric_is_documented(lazy: LazySystem) -> None:
    text = (MONITORING.parent / "metrics.md").read_text()
    documented = set(re.findall(r"`(soci_\w+)`", text))
    exported = {sample.partition("{")[0] for sample in lazy.daemon.metrics()}
    exported = {name for name in exported if name.startswith("soci_") and not name.endswith("_created")}
    families = {re.sub(r"(_seconds|_milliseconds)_(bucket|count|sum)$", r"\1", name) for name in exported}
    assert families - documented == set()
    absent = {"soci_fs_operation_duration_microseconds", "soci_registry_hosts_mistakes"}
    assert documented - families - absent == set()


def test_every_panel_asks_for_something_that_is_there(prometheus: str) -> None:
    known = set(api(prometheus, "label/__name__/values"))
    for expression in expressions():
        assert set(_METRIC.findall(expression)) <= known, expression
        query(prometheus, expression)  # an expression that cannot be parsed is an HTTP error, hence []
        assert api(prometheus, "query", query=expression)["resultType"] == "vector"
    panels = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(panels)) == len(panels) >= 10


def test_every_alert_asks_for_something_that_is_there(prometheus: str) -> None:
    known = set(api(prometheus, "label/__name__/values"))
    rules = api(prometheus, "rules")["groups"][0]["rules"]
    assert len(rules) == ALERTS.read_text().count("- alert:")
    for rule in rules:
        assert set(_METRIC.findall(rule["query"])) <= known, rule["name"]
        assert rule["health"] in {"ok", "unknown"}, rule  # unknown: not evaluated yet
        assert rule["state"] == "inactive", rule["name"]


def test_alerts_fire_when_they_should() -> None:
    for command in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]):
        result = subprocess.run(
            ["promtool", *command], cwd=MONITORING, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr


def test_health_over_grpc_and_http(lazy: LazySystem) -> None:
    with grpc.insecure_channel(f"unix://{lazy.daemon.address}") as channel:
        for service in ("", "containerd.services.snapshots.v1.Snapshots"):
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=service), timeout=10
            )
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
    url = f"http://{lazy.daemon.metrics_address}/healthz"
    with urllib.request.urlopen(url, timeout=60) as response:
        well = {"ok": True, "trouble": "", "missing": [], "not_lazy_because": ""}
        assert json.loads(response.read()) == well
