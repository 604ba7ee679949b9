"""What an agent and its model are made with, saved beside the model as model.config.json."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from distributed_muzero.config import Positive, Section
from distributed_muzero.errors import ConfigError

Topic = Literal[
    "poly",
    "poly-blockers",
    "poly-combine",
    "poly-commute",
    "poly-grouping",
    "poly-like-terms-haystack",
    "complex",
    "binomial",
]
# They decide the shapes of a model's weights: a saved model goes on with the same ones only.
SHAPES = ("units", "embedding_units", "lstm_units", "rnn_size")


class BaseConfig(Section):
    """Raises ConfigError for an unknown name or an impossible value."""

    topics: Annotated[tuple[Topic, ...], Field(min_length=1)] = ("poly",)  # an episode each, in turn
    difficulty: Literal["easy", "normal", "hard"] = "easy"
    model_dir: str = "mathy_model"  # folder of the model
    model_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] = "model"  # prefix of its files there
    # another folder, whose model's weights are the first ones of a new model
    init_model_from: str | None = None
    units: Positive = 64  # of dense layers
    embedding_units: Positive = 32  # of a node type
    lstm_units: Positive = 48  # of the recurrent layer over the nodes, in each direction
    rnn_size: Positive = 128  # D, of the recurrent state over the observations
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3  # of Adam
    seed: Annotated[int, Field(ge=0)] = 0
    verbose: bool = False  # says what is made, saved and loaded

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError("\n".join(_explain(detail, type(self)) for detail in error.errors())) from None


def _explain(detail: Any, config: type[BaseConfig]) -> str:
    path = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"unknown name {path!r}. Known here: {', '.join(config.model_fields)}"
    return f"{path}: {detail['msg']}; got {detail['input']!r}"
