"""deploy/monitoring and the page that explains it: names are those that are exported, alerts fire when they should."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from distributed_muzero.cluster.process_metrics import COUNTERS, INSERT_HELP, INSERT_SECONDS
from distributed_muzero.observability.exporter import families
from distributed_muzero.observability.metrics import METRICS, PREFIX
from distributed_muzero.workers.bookkeeper import ROLES
from distributed_muzero.workers.run_state import Crew
from tests.processes import descendants, wait_for

ROOT = Path(__file__).parent.parent.parent
MONITORING = ROOT / "deploy" / "monitoring"
START = ROOT / "deploy" / "local-monitoring" / "start.sh"
PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
DASHBOARD_FILE = MONITORING / "grafana" / "dashboards" / "overview.json"
DASHBOARD: dict[str, Any] = json.loads(DASHBOARD_FILE.read_text(encoding="utf-8"))
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
# Of Grafana's units, those that our metrics have.
UNITS = {"short", "percentunit", "percent", "s", "bytes", "ops"}
ADDED_BY_PROMETHEUS = {"job", "instance", "le"}
NAME = re.compile(r"(?<![\w/])(?:ray_)?distributed_muzero_\w*[a-z]\b(?![/.])")

needs_promtool = pytest.mark.skipif(
    not shutil.which("promtool"), reason="needs promtool (Debian's package prometheus)"
)
needs_prometheus = pytest.mark.skipif(
    not shutil.which("prometheus"), reason="needs prometheus (Debian's package of that name)"
)


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


ALERTS: dict[str, dict[str, Any]] = {
    rule["alert"]: rule for group in load(MONITORING / "rules.yml")["groups"] for rule in group["rules"]
}


def queries() -> list[str]:
    """Every PromQL expression of the dashboard."""
    targets = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    return targets + [note["expr"] for note in DASHBOARD["annotations"]["list"]]


def exported() -> dict[str, set[str]]:
    """Name of a series -> its labels: a run's, as its exporter gives them, and those of Ray's node agents."""
    labels = {metric.label for metric in METRICS.values() if metric.label}
    values = {f"{name}/x" if metric.label else name: 1.0 for name, metric in METRICS.items()}
    found = {
        sample.name: set(sample.labels)
        for family in families("first", values)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }
    assert len(found) == len(METRICS) + 1 and labels <= set().union(*found.values())
    of_processes = [f"{name}_total" for name in COUNTERS]
    of_processes += [f"{INSERT_SECONDS}_{part}" for part in ("bucket", "sum", "count")]
    return {**found, **{f"ray_{PREFIX}{name}": {"run", "WorkerId"} for name in of_processes}}


# Names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["rules.yml", "rules_test.yml", "overview.json", "operations.md"])
def test_every_metric_that_is_named_is_exported(place):
    text = {
        "overview.json": "\n".join(queries()),
        "operations.md": PAGE,
    }.get(place) or (MONITORING / place).read_text(encoding="utf-8")
    names = set(NAME.findall(text))
    if place == "operations.md":
        # Where the prefix is left out, `_total` tells a metric's name.
        names |= {PREFIX + name for name in re.findall(r"`(\w+_total)`", PAGE.partition("### When an")[2])}
    assert len(names) > 1
    assert names <= exported().keys() | {f"{PREFIX}run_info"}


@pytest.mark.parametrize(
    "expression", [*(rule["expr"] for rule in ALERTS.values()), *queries()], ids=lambda text: text[:60]
)
def test_labels_are_those_of_the_metric_and_their_values_exist(expression):
    values = {"role": set(ROLES), "state": {name.removeprefix("actors/") for name in Crew(1).metrics()}}
    for name, inside in re.findall(r"([a-z]\w+)\{([^}]*)\}", expression):
        if name.startswith("ray_node") or name == "up":
            continue
        for label, value in re.findall(r"(\w+)\s*[!=]~?\s*\"([^\"]*)\"", inside):
            assert label in exported()[name] | ADDED_BY_PROMETHEUS, f"{name} has no label {label}"
            assert value in values.get(label, {value})


def test_the_page_explains_every_metric():
    rows = {
        f"`{metric.exported}{'_total' if metric.kind == 'counter' else ''}"
        f"{f'{{{metric.label}}}' if metric.label else ''}` | {metric.help} | {metric.unit}"
        for metric in METRICS.values()
    }
    rows |= {f"`{name}_total` | {text}" for name, text in COUNTERS.items()}
    rows |= {
        f"`{INSERT_SECONDS}` | {INSERT_HELP}; a histogram",
        "`run_info{version}` | the run that is exported here | 1",
    }
    section = PAGE.partition("### What each metric means")[2].partition("### When an alert fires")[0]
    written = set(re.findall(r"^\| (`.*) \|$", section, re.MULTILINE))
    assert written == rows


# Alerts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_how_bad_it_is_and_where_help_stands(name):
    rule = ALERTS[name]
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert rule["annotations"].keys() == {"summary", "runbook"}
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    text = (ROOT / page).read_text(encoding="utf-8")
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    [title] = [
        title
        for title in titles
        if re.sub(r"\W", "", title.lower().replace(" ", "-")) == re.sub(r"\W", "", anchor)
    ]
    section = text.partition(f"# {title}\n")[2]
    assert re.search(rf"^\| `{name}` \| .{{60,}} \|$", section, re.MULTILINE)


def test_the_page_tells_of_no_other_alert():
    assert set(re.findall(r"`(Muzero\w+)`", PAGE)) == ALERTS.keys()
    for name, rule in ALERTS.items():
        assert f"| `{name}` | {rule['labels']['severity']}, {rule.get('for', 'at once')} |" in PAGE


def test_every_alert_is_shown_firing_and_not_firing():
    shown: dict[str, set[bool]] = {name: set() for name in ALERTS}
    for case in load(MONITORING / "rules_test.yml")["tests"]:
        for check in case["alert_rule_test"]:
            shown[check["alertname"]].add(bool(check["exp_alerts"]))
    assert all(ways == {True, False} for ways in shown.values()), shown


def promtool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=60, cwd=MONITORING
    )


@needs_promtool
def test_promtool_finds_rules_and_their_tests_right():
    for arguments in (("check", "rules", "rules.yml"), ("test", "rules", "rules_test.yml")):
        done = promtool(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_promtool_finds_the_configuration_right(tmp_path):
    # As start.sh lays it out: with a run, and a token beside it.
    for name in ("prometheus.yml", "rules.yml"):
        shutil.copy(MONITORING / name, tmp_path)
    (tmp_path / "ray_token").write_text("secret")
    targets = tmp_path / "runs" / ".prometheus"
    targets.mkdir(parents=True)
    (targets / "first.json").write_text(json.dumps([{"targets": ["127.0.0.1:1"]}]))
    done = promtool("check", "config", tmp_path / "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout


@needs_promtool
@pytest.mark.parametrize(
    "expression",
    ["vector(0) > 1", 'label_replace(vector(1), "run", "good", "", "")'],
    ids=["never", "always"],
)
def test_the_rules_tests_notice_an_alert_that_fires_never_or_always(tmp_path, expression):
    broken = load(MONITORING / "rules.yml")
    for rule in broken["groups"][0]["rules"]:
        rule["expr"] = expression
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(broken), encoding="utf-8")
    shutil.copy(MONITORING / "rules_test.yml", tmp_path)
    done = promtool("test", "rules", tmp_path / "rules_test.yml")
    assert done.returncode == 1
    assert set(re.findall(r"alertname: ?(\w+)", done.stdout + done.stderr)) == ALERTS.keys()


@needs_promtool
def test_the_dashboards_queries_are_promql(tmp_path):
    expressions = [text.replace("$__rate_interval", "5m").replace('"$run"', '".+"') for text in queries()]
    rules = [{"record": f"query:{number}", "expr": text} for number, text in enumerate(expressions)]
    file = tmp_path / "queries.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}), encoding="utf-8")
    done = promtool("check", "rules", file)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(rules)} rules found" in done.stdout


# The dashboard ----------------------------------------------------------------------------------------------------


def test_the_dashboard_has_what_grafana_needs_to_take_it():
    assert re.fullmatch(r"[\w-]{1,40}", DASHBOARD["uid"])
    assert DASHBOARD["schemaVersion"] >= 36  # since then a data source is named by type and uid
    assert "id" not in DASHBOARD, "an id is the installation's"
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids) and all(isinstance(number, int) and number > 0 for number in ids)
    assert 12 <= len(ids) <= 24


def test_panels_lie_in_the_grid_and_dont_overlap():
    taken: dict[tuple[int, int], str] = {}
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] >= 0 and place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} lies on {taken[x, y]}"
                taken[x, y] = panel["title"]
    rows = {y for _, y in taken}
    assert len(taken) == 24 * len(rows) and rows == set(range(len(rows))), "there are holes"


@pytest.mark.parametrize("panel", DASHBOARD["panels"], ids=lambda panel: panel["title"])
def test_a_panel_says_what_it_shows_and_asks_the_chosen_data_source(panel):
    assert panel["type"] in ("stat", "timeseries")
    assert panel["title"] and len(panel["description"]) > 10
    assert panel["datasource"] == DATASOURCE
    units = [panel["fieldConfig"]["defaults"]["unit"]]
    for override in panel["fieldConfig"]["overrides"]:
        units += [entry["value"] for entry in override["properties"] if entry["id"] == "unit"]
    assert set(units) <= UNITS
    letters = [target["refId"] for target in panel["targets"]]
    assert letters == [chr(ord("A") + number) for number in range(len(letters))]
    for override in panel["fieldConfig"]["overrides"]:
        assert override["matcher"]["options"] in letters
    for target in panel["targets"]:
        assert "{{" in target["legendFormat"]
        # Ray's nodes serve all runs.
        assert 'run=~"$run"' in target["expr"] or target["expr"].startswith("ray_node_")


def test_its_variables_are_the_data_source_and_the_run():
    source, run = DASHBOARD["templating"]["list"]
    assert (source["name"], source["type"], source["query"]) == ("datasource", "datasource", "prometheus")
    assert (run["name"], run["type"], run["datasource"]) == ("run", "query", DATASOURCE)
    assert run["query"]["query"] == f"label_values({PREFIX}run_info, run)"
    assert run["multi"] and run["includeAll"]
    text = DASHBOARD_FILE.read_text(encoding="utf-8")
    # `$__…` are Grafana's own.
    used = set(re.findall(r"\$\{?(?!__)(\w+)", text))
    assert used == {"datasource", "run"}


# On this machine --------------------------------------------------------------------------------------------------


def start(folder: Path, runs: str, path: str | None = None, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(START), runs],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            "PATH": path or os.environ["PATH"],
            "HOME": str(folder),
            "PROMETHEUS_PORT": str(free_port()),
            "GRAFANA_PORT": str(free_port()),
            **environment,
        },
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fails_with(process: subprocess.Popen[str]) -> str:
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2, errors
    return errors


@pytest.fixture
def only_the_basics(tmp_path) -> str:
    """A search path with what every machine has."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "basename", "chmod", "cp", "dirname", "ln", "mkdir", "rm", "sleep", "tail"):
        (programs / name).symlink_to(str(shutil.which(name)))
    return str(programs)


def test_what_is_missing_is_named(tmp_path, only_the_basics):
    errors = fails_with(start(tmp_path, str(tmp_path / "runs"), only_the_basics))
    assert "prometheus isn't installed" in errors and "apt-get install prometheus" in errors
    assert not (tmp_path / "runs").exists()


def test_a_uri_is_refused(tmp_path):
    assert "s3://bucket/runs is a URI" in fails_with(start(tmp_path, "s3://bucket/runs"))


@needs_prometheus
def test_a_port_that_is_taken_is_told(tmp_path):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = str(holder.getsockname()[1])
        errors = fails_with(start(tmp_path, str(tmp_path / "runs"), PROMETHEUS_PORT=port))
    assert f"port {port} of this machine is taken; choose another: PROMETHEUS_PORT=" in errors


@needs_prometheus
def test_a_second_start_leaves_the_first_one_as_it_is(tmp_path):
    first = start(tmp_path, str(tmp_path / "runs"), PROMETHEUS_PORT=(port := str(free_port())))
    try:
        assert first.stdout is not None
        assert any(line.startswith("watching") for line in first.stdout)
        state = tmp_path / ".local/state/distributed_muzero/monitoring" / port
        assert (state / "runs").readlink() == tmp_path / "runs"
        again = start(tmp_path, str(tmp_path / "others"), PROMETHEUS_PORT=port)
        assert f"port {port} of this machine is taken" in fails_with(again)
        assert (state / "runs").readlink() == tmp_path / "runs" and not (tmp_path / "others").exists()
        beside = start(tmp_path, str(tmp_path / "others"))
        try:
            assert beside.stdout is not None
            assert any(line.startswith("watching") for line in beside.stdout)
            assert (state / "runs").readlink() == tmp_path / "runs"
        finally:
            end(beside)
    finally:
        end(first)


def end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)


@pytest.fixture
def with_stand_in(tmp_path, only_the_basics) -> Iterator[tuple[str, Path]]:
    """Debian's Prometheus, and for Grafana a program that listens and writes down what it was told."""
    seen = tmp_path / "grafana.json"
    program = Path(only_the_basics) / "grafana"
    program.write_text(
        "#!/usr/bin/python3\n"
        "import http.server, json, os, sys\n"
        f"json.dump([sys.argv[1:], dict(os.environ)], open({str(seen)!r}, 'w'))\n"
        "address = os.environ['GF_SERVER_HTTP_ADDR'], int(os.environ['GF_SERVER_HTTP_PORT'])\n"
        "http.server.HTTPServer(address, http.server.BaseHTTPRequestHandler).serve_forever()\n"
    )
    program.chmod(0o755)
    (Path(only_the_basics) / "prometheus").symlink_to(str(shutil.which("prometheus")))
    yield only_the_basics, seen


@needs_prometheus
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_both_run_until_they_are_told_to_end(tmp_path, with_stand_in, number):
    path, seen = with_stand_in
    process = start(tmp_path, str(tmp_path / "runs"), path, RAY_AUTH_TOKEN="secret")
    try:
        assert process.stdout is not None
        addresses = [process.stdout.readline().split(": ")[1].strip() for _ in range(2)]
        with urllib.request.urlopen(f"{addresses[0]}/-/healthy", timeout=10) as answer:
            assert answer.status == 200
        with urllib.request.urlopen(f"{addresses[0]}/api/v1/rules", timeout=10) as answer:
            [group] = json.load(answer)["data"]["groups"]
        assert {rule["name"] for rule in group["rules"]} == ALERTS.keys()
        arguments, environment = json.loads(seen.read_text())
        assert arguments[:2] == ["server", "--homepath"]
        provisioning = Path(environment["GF_PATHS_PROVISIONING"])
        for kind in ("datasources", "dashboards"):
            [file] = (provisioning / kind).iterdir()
            for variable in re.findall(r"\$\{(\w+)\}", file.read_text()):
                assert environment[variable]
        assert (Path(environment["DASHBOARDS"]) / "overview.json").is_file()
        assert environment["PROMETHEUS_URL"] == addresses[0]
        port = addresses[0].rpartition(":")[2]
        token = tmp_path / f".local/state/distributed_muzero/monitoring/{port}/ray_token"
        assert token.read_text() == "secret" and token.stat().st_mode & 0o077 == 0
        below = descendants(process.pid)
        assert len(below) >= 2
        process.send_signal(number)
        assert process.wait(timeout=20) == 0
        assert not [child for child in below if child.is_running()]
    finally:
        for child in descendants(process.pid):
            child.kill()
        process.kill()
        process.communicate()


@needs_prometheus
def test_if_one_ends_by_itself_the_other_is_ended(tmp_path, with_stand_in):
    path, seen = with_stand_in
    process = start(tmp_path, str(tmp_path / "runs"), path)
    try:
        wait_for("both", lambda: len(descendants(process.pid)) >= 2 and seen.exists(), timeout=20)
        assert process.stdout is not None
        assert any(line.startswith("watching") for line in process.stdout)
        [prometheus] = [child for child in descendants(process.pid) if child.name() == "prometheus"]
        prometheus.kill()
        assert "has ended by itself" in fails_with(process)
    finally:
        process.kill()
        process.communicate()
