"""Checks the search against golden cases: `python tests/golden.py FOLDER [--policy muzero|gumbel] [--json]`.

Integers of the tree must be equal, floats within 1e-4, in float64. Exit code 0: all agree; 1: some don't;
2: nothing could be checked. The cases' format stands in fixtures/golden_search/README.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distributed_muzero.config import SearchConfig
from distributed_muzero.search import Expansion, gumbel_search, muzero_search

TOLERANCE = 1e-4
MIN_MAX_BOUNDS = (-3.0, 3.0)  # what the cases with q normalisation min_max were made with
GUMBEL_TRANSFORMS: dict[str, dict[str, Any]] = {
    "completed_by_mix_value": {},
    "completed_by_mix_value_norescale": {"value_scale": 1.0, "maxvisit_init": 1.0, "rescale_values": False},
    "completed_by_raw_value": {"use_mixed_value": False},
}


class CannotCheck(Exception):
    """No folder or no cases."""


class Check(NamedTuple):
    """One search of one case."""

    case: str
    num_simulations: int
    differences: list[str]  # names of the arrays that disagree
    max_abs_error: float  # over all float arrays


class TableModel:
    """A finite MDP given as tables, with the embeddings (state indices) kept by (row, node)."""

    def __init__(self, case: dict[str, np.ndarray], num_nodes: int):
        self.case = case
        self.states = np.zeros((len(case["root_state"]), num_nodes), np.int32)
        self.states[:, 0] = case["root_state"]
        self.rows = np.arange(len(self.states))

    def expand(self, parents: np.ndarray, actions: np.ndarray, children: np.ndarray) -> Expansion:
        edge = (self.states[self.rows, parents], actions)
        state = self.case["next_state"][edge]
        self.states[self.rows, children] = state
        return Expansion(
            self.case["reward"][edge],
            self.case["value"][state],
            self.case["logits"][state],
            self.case["discount"][edge],
        )


def check_folder(folder: Path, policy: str = "muzero") -> list[Check]:
    """Every search of every case. Raises CannotCheck."""
    if not folder.is_dir():
        raise CannotCheck(f"{folder} is not a folder; expected one with files case_*.npz")
    paths = sorted(folder.glob("case_*.npz"))
    if not paths:
        raise CannotCheck(f"{folder} holds no files case_*.npz")
    return [check for path in paths for check in check_case(path, policy)]


def check_case(path: Path, policy: str = "muzero") -> Iterator[Check]:
    with np.load(path) as arrays:
        case = dict(arrays)
    meta = json.loads(str(case["meta"]))
    for num_simulations in meta["sims"]:
        differences, worst = [], 0.0
        for name, ours in _search(case, meta, policy, num_simulations).items():
            expected = case[f"{policy}_{num_simulations}_{name}"]
            error = float(np.abs(ours - expected).max())
            exact = np.issubdtype(expected.dtype, np.integer)
            worst = max(worst, 0.0 if exact else error)
            if not error <= (0 if exact else TOLERANCE):
                differences.append(name)
        yield Check(path.stem, num_simulations, differences, worst)


def _search(
    case: dict[str, np.ndarray], meta: dict[str, Any], policy: str, num_simulations: int
) -> dict[str, np.ndarray]:
    """Our search of the case: its arrays by the names that the case's own have."""
    model = TableModel(case, num_simulations + 1)
    roots = case["root_logits"], case["root_value"], case["invalid_actions"] == 0
    options: dict[str, Any] = {
        "discount": meta["discount"],
        "rng": np.random.default_rng(0),
        "num_simulations": num_simulations,
        "dtype": np.float64,
    }
    arrays = {"node_state": model.states}
    if policy == "gumbel":
        options["root_gumbel"] = case[f"gumbel_{num_simulations}_root_gumbel"]
        config = _gumbel_config(meta)
        result, tree, arrays["action"] = gumbel_search(*roots, model.expand, config, **options)
    else:
        result, tree = muzero_search(*roots, model.expand, _muzero_config(meta), noise=False, **options)
    of_tree = (
        "node_visits node_values raw_values parents action_from_parent "
        "children_index children_visits children_values children_rewards children_discounts"
    )
    return arrays | {
        "visit_counts": result.visit_counts,
        "root_search_value": result.root_values,
        "qvalues": result.qvalues,
        "action_weights": result.action_weights,
        **{name: getattr(tree, name) for name in of_tree.split()},
    }


def _muzero_config(meta: dict[str, Any]) -> SearchConfig:
    return SearchConfig(
        q_normalization=meta["muzero_qtransform"],
        min_max_bounds=MIN_MAX_BOUNDS,
        max_depth=meta["max_depth"],
        pb_c_init=meta["pb_c_init"],
        pb_c_base=meta["pb_c_base"],
    )


def _gumbel_config(meta: dict[str, Any]) -> SearchConfig:
    return SearchConfig(
        policy="gumbel",
        max_depth=meta["max_depth"],
        max_num_considered_actions=meta["max_num_considered_actions"],
        **GUMBEL_TRANSFORMS[meta["gumbel_qtransform"]],
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Checks the search against a folder of golden cases.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--policy", choices=("muzero", "gumbel"), default="muzero")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    options = parser.parse_args(arguments)
    try:
        checks = check_folder(options.folder, options.policy)
    except CannotCheck as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return _report(checks, options.json)


def _report(checks: list[Check], as_json: bool) -> int:
    disagreeing = [check for check in checks if check.differences]
    for check in disagreeing:
        print(f"{check.case}, {check.num_simulations} simulations: {', '.join(check.differences)} disagree")
    num_cases = len({check.case for check in checks})
    exact = len(checks) - len(disagreeing)
    worst = max(check.max_abs_error for check in checks)
    print(f"{exact} of {len(checks)} searches in {num_cases} cases agree; largest float error {worst:.1e}")
    if as_json:
        print(
            json.dumps({"cases": num_cases, "searches": len(checks), "exact": exact, "max_abs_error": worst})
        )
    return 1 if disagreeing else 0


if __name__ == "__main__":
    sys.exit(main())
