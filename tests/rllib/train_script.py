"""A user's script: an environment registered with Tune, and a run that trains on it through Ray."""

from __future__ import annotations

import sys

import gymnasium
from ray import tune

from distributed_muzero.cli.main import app

if __name__ == "__main__":
    tune.register_env("pole", lambda config: gymnasium.make("CartPole-v1", **config))
    app(["train", "--env", "rllib:pole", *sys.argv[1:]])
