"""Three "hosts" on one machine, for tests: each with its own network, processes, mounts and name, reached over ssh."""
