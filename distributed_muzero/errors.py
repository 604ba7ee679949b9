"""Every exception that users may meet, in one tree.

DistributedMuZeroError            each message says what came, what was expected, what to do
├── ConfigError                   a key, value, preset or file of the configuration
├── EnvironmentFailure             an environment that can't be made or breaks its contract
│   └── UnknownEnvironmentError   no such id, or its extra isn't installed
├── ContractError                 shapes, masks and numbers handed to planning, acting, training
├── NonFiniteError                NaN or Inf from an environment or a network, with step and seed
├── RunError                      the run's name, its folder, a run that exists or doesn't
│   ├── RunTakenOver              another process goes on with it
│   └── RunIsOver                 a limit was reached in an earlier launch
├── ClusterError                  no Ray cluster, a token it refuses, a job it refuses
├── CheckpointError               a checkpoint that is missing, incomplete or corrupt
│   └── CheckpointFormatError     a whole one, of a format that this version doesn't read
├── LogError                      a replay log that can't be written, locked or read
└── RejectedEpisode               a replay shard refused an episode; carries `reason`
"""


def first_line(error: BaseException) -> str:
    """Of its message; its type's name where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class DistributedMuZeroError(Exception):
    """Root of the tree. The command line prints it without a traceback and exits with code 2."""


class ConfigError(DistributedMuZeroError):
    """A key, value, preset or file of the configuration."""


class EnvironmentFailure(DistributedMuZeroError):
    """An environment that can't be made, or breaks its contract."""


class UnknownEnvironmentError(EnvironmentFailure):
    """No environment of that id, or the package it needs isn't installed."""


class ContractError(DistributedMuZeroError, ValueError):
    """Wrong shape, mask or number handed to one of the public functions."""


class NonFiniteError(DistributedMuZeroError):
    """NaN or Inf from an environment or a network."""


class RunError(DistributedMuZeroError):
    """The run's name or folder."""


class RunTakenOver(RunError):
    """A run that goes on in another process, which has taken it over."""


class RunIsOver(RunError):
    """A run that goes on only with a higher limit."""


class ClusterError(DistributedMuZeroError):
    """A Ray cluster that doesn't answer, refuses the token or refuses a job."""


class CheckpointError(DistributedMuZeroError):
    """A checkpoint that is missing, incomplete or corrupt."""


class CheckpointFormatError(CheckpointError):
    """A whole checkpoint of a format that this version doesn't read: never skipped, removed or replaced."""


class LogError(DistributedMuZeroError):
    """A replay log that can't be written, locked or read. Mere damage is counted instead."""


class RejectedEpisode(DistributedMuZeroError):
    """A replay shard refused an episode; `reason` is a short fixed word, fit for a metric's label."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"episode rejected ({reason}): {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self):
        return type(self), (self.reason, self.detail)
