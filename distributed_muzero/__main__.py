"""`python -m distributed_muzero` is the same as `distributed-muzero`."""

from distributed_muzero.cli.main import main

if __name__ == "__main__":
    main()
