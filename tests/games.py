"""Games small enough to be played in the head, with networks that know them exactly."""

import numpy as np
import torch

from distributed_muzero.networks.base import FunctionNetworks


class Script:
    """Shows 1, 2, 3, … for `num_steps` steps, pays the step's number, allows what `masks` says at each step."""

    def __init__(self, num_steps, masks=None, *, truncated=False, tensors=False, shape=(1,)):
        self.num_steps, self.masks, self.truncated = num_steps, masks or [np.ones(2)] * num_steps, truncated
        self.tensors, self.shape = tensors, shape
        self.actions = []

    def initial_state(self):
        self.actions = []
        return self._show()

    def step(self, action):
        self.actions.append(action)
        return float(len(self.actions)), self._show(), len(self.actions) == self.num_steps

    def mask(self):
        mask = self.masks[len(self.actions)]
        return torch.as_tensor(mask) if self.tensors else mask

    def _show(self):
        observation = np.full(self.shape, len(self.actions) + 1, np.float32)
        return torch.from_numpy(observation) if self.tensors else observation


def constant_functions(num_actions, reward=0.0, value=0.0, logits=None):
    """h … f_p that give the same numbers everywhere; the embedding is [B, 1] of zeros."""
    logits = torch.zeros(num_actions) if logits is None else torch.tensor(logits)
    return (
        lambda o: torch.zeros(len(o), 1),
        lambda s, a: torch.full((len(s),), reward),
        lambda s, a: s,
        lambda s: torch.full((len(s),), value),
        lambda s: logits.expand(len(s), -1),
    )


class Nim:
    """Two players take one or two from a pile in turn; who takes the last one wins 1.

    A pile that is a multiple of 3 is lost for the one to move, every other is won by leaving a multiple of 3.
    """

    def __init__(self, pile, first_player=0):
        self.start, self.first_player = pile, first_player

    def initial_state(self):
        self.pile, self.player = self.start, self.first_player
        return np.array([self.pile], np.float32)

    def step(self, action):
        self.pile -= action + 1
        self.player = 1 - self.player
        return float(self.pile == 0), np.array([self.pile], np.float32), self.pile == 0

    def mask(self):
        return np.array([self.pile >= 1, self.pile >= 2])

    def to_play(self):
        return self.player


def nim_functions():
    """The rules of Nim as h, g_r, g_s, f_v, f_p: the embedding is the pile; nothing is known of values and policy."""
    return (
        lambda o: o[:, -1].float(),
        lambda s, a: ((s[:, 0] > 0) & (s[:, 0] <= a + 1)).float(),
        lambda s, a: (s - a[:, None] - 1).clamp(min=0),
        lambda s: torch.zeros(len(s)),
        lambda s: torch.zeros(len(s), 2),
    )


def nim_networks():
    return FunctionNetworks(*nim_functions())


def stirring_functions(num_actions):
    """Functions that depend on every number of the history, its place in the stack, and every action."""

    def stir(x):
        return (x * 1.7 + 0.31).sin()

    def h(o):
        flat = o.flatten(1).double()
        return sum(stir(flat[:, i : i + 1] * (i + 1)) for i in range(flat.shape[1]))

    return (
        h,
        lambda s, a: stir(s[:, 0] + a),
        lambda s, a: stir(s + 0.5 * a[:, None]),
        lambda s: stir(2 * s[:, 0]),
        lambda s: torch.cat([3 * stir(s * (i + 2)) for i in range(num_actions)], 1),
    )
