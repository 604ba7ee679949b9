"""Mathy's kinds of problems, each as a MathyEnv; keyword arguments go to the game of mathy_envs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mathy_envs.envs as games

from distributed_muzero.mathy.env import MathyEnv


class PolySimplify(MathyEnv):
    """Simplify a polynomial."""

    def __init__(self, max_nodes: int = 128, **kwargs: Any):
        super().__init__(games.PolySimplify(**kwargs), max_nodes)


class PolySimplifyBlockers(MathyEnv):
    """Bring like terms together past one that stands between them."""

    def __init__(self, max_nodes: int = 128, **kwargs: Any):
        super().__init__(games.PolySimplifyBlockers(**kwargs), max_nodes)


class PolyCombineInPlace(MathyEnv):
    """Combine like terms that stand side by side."""

    def __init__(self, max_nodes: int = 128, **kwargs: Any):
        super().__init__(games.PolyCombineInPlace(**kwargs), max_nodes)


class PolyCommuteLikeTerms(MathyEnv):
    """Move like terms together by commuting."""

    def __init__(self, max_nodes: int = 128, **kwargs: Any):
        super().__init__(games.PolyCommuteLikeTerms(**kwargs), max_nodes)


class PolyGroupLikeTerms(MathyEnv):
    """Group all like terms."""

    def __init__(self, max_nodes: int = 128, **kwargs: Any):
        super().__init__(games.PolyGroupLikeTerms(**kwargs), max_nodes)


class PolyHaystackLikeTerms(MathyEnv):
    """Act on a term that has another like it. By default it couldn't be won: no rule would act on such a term."""

    def __init__(self, max_nodes: int = 128, preferred_term_commute: bool = True, **kwargs: Any):
        kwargs["preferred_term_commute"] = preferred_term_commute
        super().__init__(games.PolyHaystackLikeTerms(**kwargs), max_nodes)


class ComplexSimplify(MathyEnv):
    """Simplify one term of many factors."""

    def __init__(self, max_nodes: int = 128, **kwargs: Any):
        super().__init__(games.ComplexSimplify(**kwargs), max_nodes)


class BinomialDistribute(MathyEnv):
    """Multiply out products of binomials."""

    def __init__(self, max_nodes: int = 128, **kwargs: Any):
        super().__init__(games.BinomialDistribute(**kwargs), max_nodes)


TOPICS: dict[str, Callable[..., MathyEnv]] = {
    "poly": PolySimplify,
    "poly-blockers": PolySimplifyBlockers,
    "poly-combine": PolyCombineInPlace,
    "poly-commute": PolyCommuteLikeTerms,
    "poly-grouping": PolyGroupLikeTerms,
    "poly-like-terms-haystack": PolyHaystackLikeTerms,
    "complex": ComplexSimplify,
    "binomial": BinomialDistribute,
}
