"""The policy/value model, its config, and the agent that trains it."""
