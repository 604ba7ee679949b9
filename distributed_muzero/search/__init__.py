"""Batched tree search, compiled by numba. Imports neither torch nor ray."""

from distributed_muzero.search.policies import gumbel_search, muzero_search
from distributed_muzero.search.simulate import Expand, Expansion
from distributed_muzero.search.tree import Tree

__all__ = ["Expand", "Expansion", "Tree", "gumbel_search", "muzero_search"]
