"""Gumbel MuZero's rules over the slow search: one root at a time, everything computed anew, by the formulas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tests.reference.search_oracle import Node, Search, best_of, softmax


@dataclass
class Gumbel:
    """The rules for one root. root_logits and gumbel hold a number for each action, forbidden ones included."""

    root_logits: Sequence[float]
    gumbel: Sequence[float]
    num_simulations: int
    max_num_considered_actions: int
    value_scale: float
    maxvisit_init: float
    rescale_values: bool
    use_mixed_value: bool

    def select(self, search: Search, node: Node) -> int:
        if node is search.root:
            considered = min(self.max_num_considered_actions, sum(search.legal))
            simulation = sum(edge.visits for edge in node.edges.values())
            return self._best_at_root(search, visits_due(considered, self.num_simulations)[simulation])
        values = self._values(node)
        improved = softmax([_log(node.priors[a]) + values[a] for a in node.actions])
        simulations = sum(edge.visits for edge in node.edges.values())
        shares = zip(node.actions, improved, strict=True)
        return best_of(search, {a: p - _visits(node, a) / (1 + simulations) for a, p in shares})

    def action(self, search: Search) -> int:
        """Among the most visited, the one of the best score."""
        return self._best_at_root(search, max(edge.visits for edge in search.root.edges.values()))

    def policy(self, search: Search) -> list[float]:
        """The improved policy of the root."""
        values = self._values(search.root)
        legal = [a for a, allowed in enumerate(search.legal) if allowed]
        shares = dict(zip(legal, softmax([self.root_logits[a] + values[a] for a in legal]), strict=True))
        return [shares.get(a, 0.0) for a in range(len(values))]

    def _best_at_root(self, search: Search, visits: int) -> int:
        values = self._values(search.root)
        candidates = [
            a for a, allowed in enumerate(search.legal) if allowed and _visits(search.root, a) == visits
        ]
        return best_of(search, {a: self.gumbel[a] + self.root_logits[a] + values[a] for a in candidates})

    def _values(self, node: Node) -> dict[int, float]:
        """σ of every action that is considered."""
        simulations = sum(edge.visits for edge in node.edges.values())
        most = max((edge.visits for edge in node.edges.values()), default=0)
        unvisited = node.raw_value
        if self.use_mixed_value and node.edges:
            weights = {a: node.priors[a] for a in node.edges}
            mean = sum(weights[a] * edge.qvalue for a, edge in node.edges.items()) / sum(weights.values())
            unvisited = (node.raw_value + simulations * mean) / (1 + simulations)
        completed = {a: node.edges[a].qvalue if a in node.edges else unvisited for a in node.actions}
        if self.rescale_values:
            low, high = min(completed.values()), max(completed.values())
            completed = {a: (value - low) / max(high - low, 1e-8) for a, value in completed.items()}
        return {a: (self.maxvisit_init + most) * self.value_scale * value for a, value in completed.items()}


def visits_due(num_considered: int, num_simulations: int) -> list[int]:
    """Each simulation's action must have had so many visits: every survivor of a phase is visited in turn."""
    counts, survivors, due = [0] * num_considered, num_considered, []
    phases = math.ceil(math.log2(num_considered)) if num_considered > 1 else 1
    while len(due) < num_simulations:
        for _ in range(max(math.floor(num_simulations / (phases * survivors)), 1)):
            for place in range(survivors):
                due.append(counts[place])
                counts[place] += 1
        survivors = min(max(survivors // 2, 2), num_considered)
    return due[:num_simulations]


def _log(prior: float) -> float:
    return math.log(prior) if prior > 0 else -math.inf


def _visits(node: Node, action: int) -> int:
    return node.edges[action].visits if action in node.edges else 0
