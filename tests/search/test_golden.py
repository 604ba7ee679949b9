"""The search reproduces mctx's trees, and the checker notices when it doesn't."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests import golden

CASES = Path(__file__).parent.parent / "fixtures" / "golden_search"


@pytest.mark.parametrize("policy", ["muzero", "gumbel"])
def test_every_golden_tree_is_reproduced(policy):
    checks = golden.check_folder(CASES, policy)
    assert len(checks) == 75
    assert [check for check in checks if check.differences] == []
    assert max(check.max_abs_error for check in checks) < 1e-9


@pytest.mark.parametrize("policy", ["muzero", "gumbel"])
def test_report_ends_with_one_json_object(policy, capsys):
    assert golden.main([str(CASES), "--policy", policy, "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report.keys() == {"cases", "searches", "exact", "max_abs_error"}
    assert (report["cases"], report["searches"], report["exact"]) == (25, 75, 75)


@pytest.mark.parametrize(
    ("policy", "array", "wrong"),
    [
        ("muzero", "visit_counts", 1),
        ("muzero", "node_values", 0.001),
        ("muzero", "children_values", np.nan),
        ("gumbel", "visit_counts", 1),
        ("gumbel", "action", 1),
        ("gumbel", "action_weights", 0.001),
    ],
)
def test_one_wrong_number_is_a_disagreement(policy, array, wrong, tmp_path, capsys):
    with np.load(CASES / "case_00.npz") as case:
        arrays = dict(case)
    arrays[f"{policy}_50_{array}"].flat[0] += wrong
    np.savez(tmp_path / "case_00.npz", **arrays)
    assert golden.main([str(tmp_path), "--policy", policy]) == 1
    assert f"case_00, 50 simulations: {array} disagree" in capsys.readouterr().out


def test_nothing_to_check_is_an_error(tmp_path, capsys):
    assert golden.main([str(tmp_path)]) == 2
    assert golden.main([str(tmp_path / "missing")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert ["no files case_" in errors[0], "not a folder" in errors[1]] == [True] * 2
