import re

import pytest

from distributed_muzero.observability.metrics import METRICS, check_known


def test_every_metric_has_a_grouped_name_a_unit_and_a_help():
    for name, metric in METRICS.items():
        recorded = f"{name}/one" if metric.label else name
        assert name == metric.name and re.fullmatch(r"[a-z]+(/[a-z_]+)+", recorded)
        assert metric.unit and metric.help and metric.kind in ("counter", "gauge")
    exported = [metric.exported for metric in METRICS.values()]
    assert len(set(exported)) == len(exported)


def test_an_unknown_name_is_an_error_with_the_nearest_one():
    check_known(name for name, metric in METRICS.items() if not metric.label)
    check_known(["actors/live", "replay/rejects/shape"])
    for name in ("actors", "actors/", "replay/rejects"):
        with pytest.raises(ValueError, match=f"unknown metric '{name}'"):
            check_known([name])
    with pytest.raises(ValueError, match=r"unknown metric 'train/los' \(did you mean 'train/loss'\?\)"):
        check_known(["train/loss", "train/los"])
