"""Ray RLlib and Tune: what of theirs is used here, and what of ours is used there."""
