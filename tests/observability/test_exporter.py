import json
import socket
import urllib.request

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from distributed_muzero.config import Config, MetricsConfig
from distributed_muzero.errors import RunError, RunTakenOver
from distributed_muzero.observability.exporter import Exporter, check_port, families, serve_metrics
from distributed_muzero.observability.metrics import METRICS
from distributed_muzero.run_folder import create_run
from distributed_muzero.version import __version__

ANY = MetricsConfig(port=0)


def scrape(exporter):
    with urllib.request.urlopen(f"http://{exporter.address}/metrics", timeout=10) as answer:
        return answer.read().decode()


def series(text):
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for sample in samples
    }


def test_numbers_are_served_under_their_exported_names_with_run_and_label():
    with Exporter("first", ANY) as exporter:
        exporter.update(
            {"rollout/env_steps": 640, "rollout/ep_rew_mean": 21.5, "actors/live": 2, "actors/pending": 1}
        )
        exporter.update({"rollout/env_steps": 1280, "restarts/learner": 1})
        found = series(scrape(exporter))
    assert found == {
        ("distributed_muzero_run_info", "first", __version__): 1,
        ("distributed_muzero_environment_steps_total", "first"): 1280,
        ("distributed_muzero_episode_return_mean", "first"): 21.5,
        ("distributed_muzero_actors", "first", "live"): 2,
        ("distributed_muzero_actors", "first", "pending"): 1,
        ("distributed_muzero_restarts_total", "learner", "first"): 1,
    }


def test_every_metric_can_be_exported_and_has_its_help_and_type():
    values = {f"{name}/one" if metric.label else name: 1.0 for name, metric in METRICS.items()}
    found = {family.name: family for family in families("run", values)}
    for metric in METRICS.values():
        family = found[f"distributed_muzero_{metric.exported}"]
        assert (family.type, len(family.samples)) == (metric.kind, 1)
        assert family.documentation == f"{metric.help} ({metric.unit})"


def test_a_number_that_is_not_finite_is_exported_as_it_is():
    with Exporter("run", ANY) as exporter:
        exporter.update({"train/loss": float("nan")})
        assert 'distributed_muzero_learner_loss{run="run"} NaN' in scrape(exporter)


def test_prometheus_finds_the_run_by_a_file_for_as_long_as_it_is_served(tmp_path):
    with Exporter("first", ANY, tmp_path / ".prometheus") as exporter:
        file = tmp_path / ".prometheus" / "first.json"
        assert json.loads(file.read_text()) == [{"targets": [exporter.address]}]
        assert exporter.address.startswith("127.0.0.1:")
    assert not file.exists()
    with pytest.raises(OSError):
        scrape(exporter)


def test_the_file_of_a_run_that_fails_stays_for_the_alarm_and_goes_with_the_next_launch(tmp_path):
    folder = create_run(tmp_path, "first", Config(metrics=ANY))
    file = tmp_path / ".prometheus" / "first.json"
    with pytest.raises(ZeroDivisionError), serve_metrics(folder) as exporter:
        1 / 0  # noqa: B018
    assert json.loads(file.read_text()) == [{"targets": [exporter.address]}]
    with pytest.raises(OSError):
        scrape(exporter)
    with serve_metrics(folder.with_config(Config())) as nothing:
        assert nothing is None and not file.exists()


def test_a_run_that_goes_on_elsewhere_is_not_told_to_be_down(tmp_path):
    folder = create_run(tmp_path, "first", Config(metrics=ANY))
    with pytest.raises(RunTakenOver), serve_metrics(folder):
        raise RunTakenOver("another machine has taken the run over")
    assert not (tmp_path / ".prometheus" / "first.json").exists()


def test_where_all_addresses_answer_prometheus_is_told_one_that_others_can_reach():
    with Exporter("first", MetricsConfig(port=0, host="0.0.0.0")) as exporter:
        host = exporter.address.rpartition(":")[0]
        addresses = {a.address for found in psutil.net_if_addrs().values() for a in found}
        assert host in addresses
        scrape(exporter)


def test_a_port_that_is_taken_or_a_host_that_is_nobodys_is_an_error():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            RunError, match=rf"127.0.0.1 port {port}: .*choose another with --metrics-port, or 0"
        ):
            check_port(MetricsConfig(port=port))
    check_port(MetricsConfig(port=port))
    check_port(MetricsConfig())
    with pytest.raises(RunError, match=r"192\.0\.2\.1 port 0"):
        check_port(MetricsConfig(port=0, host="192.0.2.1"))


def test_a_targets_folder_that_cannot_be_made_is_an_error_and_leaves_no_server(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="where Prometheus looks for runs"):
        Exporter("first", ANY, tmp_path / "file" / ".prometheus")
