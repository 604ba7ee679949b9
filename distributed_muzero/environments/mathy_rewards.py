"""What a move in one of mathy's environments earns, and whether it ends the game: `MathyEnv.get_state_transition`
without the observations and masks that it makes on the way. A test plays both beside each other."""

from __future__ import annotations

from mathy_core.expressions import MathExpression
from mathy_envs.env import MathyEnv
from mathy_envs.state import MathyEnvState
from mathy_envs.types import EnvRewards

MAX_VISITS = 4  # of one expression: the last one loses


def judge(
    mathy: MathyEnv, state: MathyEnvState, root: MathExpression, visits: int
) -> tuple[float, str | None]:
    """(reward, end) of the move that is the last one in the state's history; end: None, won, moves or visits.

    root: the expression that it led to.   visits: how often that was reached so far.
    """
    # Environments only hand the observation on.
    transition = mathy.transition_fn(state, root, None)
    if transition is not None:
        return float(transition.reward), "won" if transition.reward > 0 else "moves"
    if state.agent.moves_remaining <= 0:
        return mathy.get_lose_signal(state), "moves"
    if visits >= MAX_VISITS:
        return mathy.get_lose_signal(state), "visits"
    if visits > 1:
        return EnvRewards.PREVIOUS_LOCATION * visits, None
    rule = mathy.get_rule_from_timestep(state.agent.history[-1])
    if isinstance(rule, tuple(mathy.get_rewarding_actions(state))):
        return EnvRewards.HELPFUL_MOVE, None
    if isinstance(rule, tuple(mathy.get_penalizing_actions(state))):
        return EnvRewards.UNHELPFUL_MOVE, None
    return EnvRewards.TIMESTEP, None
