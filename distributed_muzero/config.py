"""The configuration: one small section for each component, checked once when it is loaded.

A preset or file is YAML with these sections as keys; `section.key=value` overrides one value. Unknown keys and
impossible values fail here, with the nearest known name.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from distributed_muzero.errors import ConfigError

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


# Set to 1 where environments may be code that isn't installed; --trust-env-code does so.
TRUST_VARIABLE = "DISTRIBUTED_MUZERO_TRUST_ENV_CODE"

# Of a run that learns from stored episodes alone, unless it is told otherwise.
OFFLINE: dict[str, dict[str, Any]] = {
    "actor": {"num_actors": 0},
    "reanalyse": {"ratio": 1.0},
    # Rewards further on are those of the policy that played; a new search's value replaces them.
    "algorithm": {"td_steps": 5},
}


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _trusted_folder() -> str | None:
    return os.getcwd() if os.environ.get(TRUST_VARIABLE) == "1" else None


class EnvironmentConfig(Section):
    id: str = "CartPole-v1"
    kwargs: dict[str, Any] = {}  # handed to the environment's constructor
    history_length: Positive = 1  # N, observations stacked for the representation
    max_episode_steps: Positive = 10_000  # a longer game is truncated here
    # Travels to a run's processes, but is neither read from files nor written to them: a run's folder can't ask for it.
    _code_folder: str | None = PrivateAttr(default_factory=_trusted_folder)

    @property
    def code_folder(self) -> str | None:
        """Where an environment may be imported from that isn't installed; None: such code isn't trusted."""
        return self._code_folder


# Our own networks that read an option which not all of them do; those that others register may read any.
READ_BY = {
    "embedding_size": ("mlp", "node_sequence"),
    "num_channels": ("resnet",),
    "num_blocks": ("resnet", "node_sequence"),
    "num_heads": ("node_sequence",),
}
OWN_NETWORKS = {name for names in READ_BY.values() for name in names}


class StageConfig(Section):
    id: str | None = None  # none = environment.id
    kwargs: dict[str, Any] = {}  # over those of environment.kwargs, key by key


class CurriculumConfig(Section):
    # environments for training, in rising order, of one spec and for one player; empty = `environment` alone.
    # Evaluations play what `environment` names
    stages: tuple[StageConfig, ...] = ()
    promote_at: Annotated[float, Field(gt=0, le=1)] = (
        0.95  # share of won games over a window: the next stage comes
    )
    demote_at: Fraction = 0.6  # below it over a window, the stage before comes back; 0 = never
    window: Annotated[int, Field(gt=0, le=10_000)] = (
        100  # games of the present stage, the last ones, that count
    )
    share_of_earlier: Fraction = (
        0.2  # of the games that begin: in any of the earlier stages, which aren't forgotten
    )
    won_at_return: float | None = (
        None  # a game is won from this return on; none = the environment's own `won`
    )

    @model_validator(mode="after")
    def _check(self) -> CurriculumConfig:
        if self.demote_at >= self.promote_at:
            raise ValueError(f"demote_at {self.demote_at} must be below promote_at {self.promote_at}")
        if self.stages and self.share_of_earlier == 1:
            raise ValueError("share_of_earlier 1 leaves no game to the present stage: it must be below 1")
        return self


class NetworkConfig(Section):
    # a name of the networks registry: mlp for vectors, resnet for planes, node_sequence for tokens, or one added there
    name: str = "mlp"
    embedding_size: Positive = 64  # mlp; node_sequence: of each token
    num_channels: Positive = 64  # resnet: planes of the embedding and of every block
    # resnet: residual blocks of representation and transition, each; node_sequence: layers of the transition, and one
    # more are the representation's
    num_blocks: Annotated[int, Field(ge=0)] = 2
    num_heads: Positive = 4  # node_sequence: of attention, which share embedding_size
    # mlp: of every function; resnet: of the heads; node_sequence: of values and rewards
    hidden_sizes: tuple[Positive, ...] = (64,)
    support_min: int = -20  # ends of the categorical support, in transformed units h(x)
    support_max: int = 20
    support_size: Annotated[int, Field(ge=2)] = 41  # bins, both ends included

    @model_validator(mode="after")
    def _check(self) -> NetworkConfig:
        if self.support_min >= self.support_max:
            raise ValueError(f"support_min {self.support_min} must be below support_max {self.support_max}")
        for option, readers in READ_BY.items() if self.name in OWN_NETWORKS else ():
            value = getattr(self, option)
            # A file that lists every option holds the default, which is no mistake.
            if self.name not in readers and value != NetworkConfig.model_fields[option].default:
                names = " or ".join(readers)
                raise ValueError(
                    f"{option} {value} is for {names}, and name is {self.name}; leave it out, or set network.name "
                    f"to {names}"
                )
        if self.name == "node_sequence" and self.embedding_size % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} must divide embedding_size {self.embedding_size}")
        return self


class AlgorithmConfig(Section):
    discount: Annotated[float, Field(gt=0, le=1)] = 0.99  # γ
    num_unroll_steps: Positive = 5  # K
    td_steps: Positive = 100  # n


class SearchConfig(Section):
    # PUCT at every node and visits as the policy; or Gumbel MuZero: sequential halving at the root, an improved policy
    policy: Literal["muzero", "gumbel"] = "muzero"
    num_simulations: Positive = 50
    max_depth: Positive | None = None  # edges from root to leaf; none = num_simulations
    # below the root only so many actions, those with the highest priors, are considered; none = all. For hundreds of
    # actions of which few can ever be taken: nothing is masked there
    max_interior_actions: Positive | None = None

    # policy=muzero only
    q_normalization: Literal["parent_and_siblings", "tree_min_max", "min_max"] = "parent_and_siblings"
    min_max_bounds: tuple[float, float] = (-1.0, 1.0)  # used by q_normalization=min_max only
    pb_c_init: Annotated[float, Field(ge=0)] = 1.25
    pb_c_base: Annotated[float, Field(gt=0)] = 19652.0
    dirichlet_alpha: Annotated[float, Field(gt=0)] = 0.3
    dirichlet_fraction: Fraction = 0.25  # share of noise in the root's prior; 0 in evaluation

    # policy=gumbel only; it chooses the action itself, so that actor.temperatures says nothing there
    # actions that sequential halving begins with; fewer where fewer are legal
    max_num_considered_actions: Positive = 16
    gumbel_scale: Annotated[float, Field(ge=0)] = 1.0  # of the noise that chooses them; 0 in evaluation
    # a value's weight against the prior's logits: (maxvisit_init + most visits of an action) · value_scale
    value_scale: Annotated[float, Field(gt=0)] = 0.1
    maxvisit_init: Annotated[float, Field(ge=0)] = 50.0
    rescale_values: bool = True  # to 0 … 1 within each node; off for values that lie so by themselves
    # an unvisited action is worth a mean of the network's and its siblings' values; off = the network's alone
    use_mixed_value: bool = True

    @model_validator(mode="after")
    def _check(self) -> SearchConfig:
        if self.min_max_bounds[0] >= self.min_max_bounds[1]:
            raise ValueError(f"min_max_bounds {self.min_max_bounds} must rise")
        return self


class ActorConfig(Section):
    num_actors: Annotated[int, Field(ge=0)] = 1  # 0: nobody plays, the stored episodes are all there is
    envs_per_actor: Positive = 32  # B, games in lockstep through one batched search
    # fewest and most actors: the driver chooses between them, so that neither actors nor learner starve
    autoscale: tuple[Positive, Positive] | None = None
    # an actor that gives no answer for so long is replaced; an insert alone may wait for 20
    timeout_seconds: Annotated[float, Field(ge=30)] = 60.0
    # (from learner step, temperature), rising steps
    temperatures: tuple[tuple[int, float], ...] = ((0, 1.0),)
    # each game begins after 0 … so many random moves, which are not learnt from: what nobody would play is met, too
    opening_plies: Annotated[int, Field(ge=0)] = 0
    max_unacknowledged: Positive = 64  # finished episodes without acknowledgement before the actor waits

    # writes what was offered to the shards and what they answered to <run>/history, to be checked
    record_history: bool = False

    @model_validator(mode="after")
    def _check(self) -> ActorConfig:
        steps = [step for step, _ in self.temperatures]
        if not steps or steps[0] != 0 or sorted(set(steps)) != steps:
            raise ValueError(f"temperatures must start at learner step 0 and rise, got steps {steps}")
        if any(temperature < 0 for _, temperature in self.temperatures):
            raise ValueError("temperatures can't be negative")
        if self.autoscale is not None and self.autoscale[0] > self.autoscale[1]:
            raise ValueError(f"autoscale {self.autoscale}: the fewest actors are more than the most")
        return self


class ReplayConfig(Section):
    num_shards: Positive = 1
    max_transitions: Positive = 100_000  # over all shards
    max_bytes: Positive = 2 * 1024**3  # over all shards
    min_size_to_sample: Positive = 1_000  # transitions over all shards before the learner starts
    samples_per_insert: Annotated[float, Field(gt=0)] = 32.0  # sampled rows for each stored transition
    # slack in samples over all shards, each at least a batch; none = chosen from the batch
    error_buffer: Annotated[float, Field(gt=0)] | None = None
    # P ∝ priority^exponent; 0 = uniform
    priority_exponent: Annotated[float, Field(ge=0)] = 0.0
    # β of the importance weights (N · P)^−β
    importance_exponent: Fraction = 1.0
    segment_bytes: Annotated[int, Field(ge=2**16)] = 64 * 1024**2  # of one file of a shard's log
    # over the cluster's nodes, a CPU each; it needs a runs folder that all of them see. Else all stay with the driver
    spread_shards: bool = False


class ReanalyseConfig(Section):
    # of all searched positions, the share that is stored ones searched anew; 1 = offline only
    ratio: Fraction = 0.0
    num_workers: Positive = 1
    batch_size: Positive = 128  # positions in one search
    num_simulations: Positive | None = None  # none = the search's own
    # as in the actors' searches; without it a wrong policy may confirm itself for ever (decision 17)
    root_noise: bool = True
    device: Literal["auto", "cpu", "cuda"] = "cpu"


class LearnerConfig(Section):
    batch_size: Positive = 128  # M
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    # reached after decay_steps, along a half cosine
    final_learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    decay_steps: Positive = 20_000
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    max_grad_norm: Annotated[float, Field(gt=0)] = 5.0
    value_weight: Annotated[float, Field(ge=0)] = 1.0
    reward_weight: Annotated[float, Field(ge=0)] = 1.0
    policy_weight: Annotated[float, Field(ge=0)] = 1.0
    # of the published moving average; 0 = the raw weights
    average_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    publish_interval: Positive = 20  # learner steps between two weights versions
    keep_checkpoints: Positive = 3
    # at most between two checkpoints while it learns; each evaluation has one of its own
    checkpoint_seconds: Annotated[float, Field(gt=0)] = 30.0
    prefetch: Positive = 2  # calls for batches in flight to every shard
    # of the weights on their way to actors; checkpoints and the learner itself stay in float32
    weights_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    num_threads: Positive = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # of the layers, by torch's autocast; weights, losses and the optimizer stay in float32. auto: bfloat16 where the
    # device has instructions for it, which is faster for convolutions, not for small perceptrons
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    # of one machine that share each batch, a process each: GPUs, or processes of num_threads on the CPU
    num_devices: Positive = 1

    @model_validator(mode="after")
    def _check(self) -> LearnerConfig:
        if self.batch_size % self.num_devices:
            raise ValueError(
                f"batch_size {self.batch_size} can't be shared by num_devices {self.num_devices}: it must be a "
                "multiple of it"
            )
        return self


OPPONENT = re.compile(r"random|minimax|mcts:([1-9]\d{0,6})")  # who else may play a game of two


class EvaluatorConfig(Section):
    num_episodes: Positive = 20  # in a game of two players, games against the opponent
    # at least, between two checkpoints and their evaluations
    interval_seconds: Annotated[float, Field(ge=0)] = 3.0
    num_simulations: Positive | None = None  # none = the search's own

    # two players only: random, minimax or mcts:SIMS; the last two know the rules, of openspiel: environments
    opponent: str = "random"
    # two players only: earlier checkpoints that each one meets, for its Elo rating; 0 = no league
    league_size: Annotated[int, Field(ge=0)] = 4
    # with each of them; an even number, as each opening is played with both colours
    league_games: Annotated[int, Field(gt=0, multiple_of=2)] = 8

    @model_validator(mode="after")
    def _check(self) -> EvaluatorConfig:
        if not OPPONENT.fullmatch(self.opponent):
            raise ValueError(
                f"opponent {self.opponent!r}: expected random, minimax or mcts:SIMS, such as mcts:100"
            )
        return self


class MetricsConfig(Section):
    # where Prometheus finds the run's metrics; 0 = any port that is free, none = they are not served
    port: Annotated[int, Field(ge=0, le=65535)] | None = None
    host: str = "127.0.0.1"  # 0.0.0.0 = every address of the machine, for a Prometheus elsewhere


class RunConfig(Section):
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1
    max_env_steps: Positive | None = None
    max_train_steps: Positive | None = None
    max_minutes: Annotated[float, Field(gt=0)] | None = None
    stop_at_return: float | None = None  # mean return of an evaluation that ends the run


class Config(Section):
    environment: EnvironmentConfig = EnvironmentConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    network: NetworkConfig = NetworkConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    search: SearchConfig = SearchConfig()
    actor: ActorConfig = ActorConfig()
    replay: ReplayConfig = ReplayConfig()
    reanalyse: ReanalyseConfig = ReanalyseConfig()
    learner: LearnerConfig = LearnerConfig()
    evaluator: EvaluatorConfig = EvaluatorConfig()
    metrics: MetricsConfig = MetricsConfig()
    run: RunConfig = RunConfig()

    @property
    def stages(self) -> tuple[EnvironmentConfig, ...]:
        """The environment of each stage of the curriculum; without one, `environment` is the only stage."""
        base = self.environment
        return tuple(
            base.model_copy(update={"id": stage.id or base.id, "kwargs": {**base.kwargs, **stage.kwargs}})
            for stage in self.curriculum.stages
        ) or (base,)

    @property
    def is_offline(self) -> bool:
        """Whether nobody plays: the episodes that the replay holds are all there is to learn from."""
        return self.actor.num_actors == 0

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.reanalyse.ratio == 1 and not self.is_offline:
            raise ValueError(
                "reanalyse.ratio 1 leaves nothing to play: it needs actor.num_actors 0 (--offline)"
            )
        slack, rows = self.replay.error_buffer, self.learner.batch_size
        if slack is not None and slack < rows:
            raise ValueError(
                f"replay.error_buffer {slack} is below learner.batch_size {rows}: nothing would move"
            )
        opponent, environment = self.evaluator.opponent, self.environment.id
        if opponent != "random" and not environment.startswith("openspiel:"):
            raise ValueError(
                f"evaluator.opponent {opponent} knows the rules of openspiel: environments only, and environment.id is "
                f"{environment}; set it to random, or choose the game from OpenSpiel"
            )
        if self.is_offline and self.actor.autoscale is not None:
            raise ValueError("actor.autoscale needs actors: actor.num_actors is 0")
        if self.replay.min_size_to_sample > self.replay.max_transitions:
            raise ValueError(
                "replay.min_size_to_sample is above replay.max_transitions: the learner would never start"
            )
        return self

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def preset_names() -> list[str]:
    """Names of the shipped presets, sorted."""
    folder = resources.files("distributed_muzero") / "presets"
    return sorted(
        entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")
    )


def load_preset(name: str) -> dict[str, Any]:
    """The preset's sections, as plain dictionaries. Raises ConfigError for an unknown name."""
    if name not in preset_names():
        raise ConfigError(
            f"no preset {name!r}{_suggest(name, preset_names())}. Presets: {', '.join(preset_names())}"
        )
    return _parse_yaml((resources.files("distributed_muzero") / "presets" / f"{name}.yaml").read_text(), name)


def load_file(path: Path) -> dict[str, Any]:
    """The sections of a YAML file. Raises ConfigError if it can't be read or isn't a mapping of sections."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"can't read the config file {path}: {error}") from None
    return _parse_yaml(text, str(path))


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """`section.key=value` strings into nested sections; values are read as YAML (so `[64, 64]`, `1e-3`, `null`)."""
    sections: dict[str, Any] = {}
    for text in overrides:
        key, separator, value = text.partition("=")
        section, dot, name = key.strip().partition(".")
        if not separator or not dot or not section or not name:
            raise ConfigError(
                f"--set {text!r}: expected section.key=value, for example learner.batch_size=128"
            )
        try:
            sections.setdefault(section, {})[name] = with_numbers(yaml.safe_load(value))
        except yaml.YAMLError:
            raise ConfigError(f"--set {text!r}: the value can't be read as YAML") from None
    return sections


def make_config(*layers: Mapping[str, Any]) -> Config:
    """Merges sections, later layers over earlier ones, and checks the result. Raises ConfigError."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for section, values in layer.items():
            if isinstance(values, Mapping):
                merged[section] = {**merged.get(section, {}), **values}
            else:
                merged[section] = values
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(detail) for detail in error.errors())) from None


def _explain(detail: Any) -> str:
    path = ".".join(str(part) for part in detail["loc"])
    if detail["type"] != "extra_forbidden":
        problem = str(detail["msg"]).removeprefix("Value error, ")
        return f"{path}: {problem}; got {detail['input']!r}" if path else problem
    fields: Mapping[str, Any] = Config.model_fields
    for part in detail["loc"][:-1]:
        if isinstance(part, str):  # else a place in a list
            annotation = fields[part].annotation
            fields = next(iter(get_args(annotation)), annotation).model_fields
    return f"unknown key {path!r}{_suggest(str(detail['loc'][-1]), fields)}. Known here: {', '.join(fields)}"


def _suggest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def with_numbers(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as text; people mean a number."""
    if isinstance(value, list):
        return [with_numbers(item) for item in value]
    if isinstance(value, dict):
        return {key: with_numbers(item) for key, item in value.items()}
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _parse_yaml(text: str, source: str) -> dict[str, Any]:
    try:
        sections = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} isn't valid YAML: {error}") from None
    if not isinstance(sections, dict) or not all(isinstance(value, dict) for value in sections.values()):
        raise ConfigError(f"{source} must be a mapping of sections, such as `learner:` with its keys below")
    return {
        section: {key: with_numbers(value) for key, value in values.items()}
        for section, values in sections.items()
    }
