"""RLlib's side of this package: the only part that imports ray.rllib."""
