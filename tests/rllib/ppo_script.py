"""Two iterations of RLlib's PPO on environments of ours; prints a line of JSON for each."""

from __future__ import annotations

import json
import sys

import ray
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.examples.rl_modules.classes.action_masking_rlm import ActionMaskingTorchRLModule

from distributed_muzero.rllib.to_rllib import register_with_rllib

NUM_ITERATIONS = 2


def train(name: str, num_players: int, masked: bool) -> dict[str, object]:
    config = (
        PPOConfig()
        .environment(name)
        .env_runners(num_env_runners=0)
        .training(train_batch_size_per_learner=128, minibatch_size=64, num_epochs=1)
        .rl_module(
            rl_module_spec=RLModuleSpec(
                module_class=ActionMaskingTorchRLModule if masked else None,
                model_config={"fcnet_hiddens": [16]},
            )
        )
    )
    if num_players == 2:
        config = config.multi_agent(policies={"both"}, policy_mapping_fn=lambda agent, *_, **__: "both")
    algorithm = config.build_algo()
    for _ in range(NUM_ITERATIONS):
        result = algorithm.train()
    algorithm.stop()
    found = result["env_runners"]
    returns = found.get("agent_episode_returns_mean", {"player_0": found["episode_return_mean"]})
    losses = [
        found["total_loss"] for module, found in result["learners"].items() if module != "__all_modules__"
    ]
    return {
        "name": name,
        "env_steps": int(found["num_env_steps_sampled_lifetime"]),
        "episode_len_mean": float(found["episode_len_mean"]),
        "returns": {agent: float(mean) for agent, mean in returns.items()},
        "losses": [float(loss) for loss in losses],
    }


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=sys.argv[1])
    game = "openspiel:tic_tac_toe"
    for name, num_players, masked in [
        (register_with_rllib("chain", length=6, start=3), 1, False),
        (register_with_rllib(game), 2, False),
        (register_with_rllib(game, name="masked", with_mask=True), 2, True),
    ]:
        print(json.dumps(train(name, num_players, masked)), flush=True)
