"""A transformer for observations that are tokens in a row, each of which can be acted on: expressions, programs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from distributed_muzero.algorithm.value_transform import CategoricalOutput
from distributed_muzero.config import NetworkConfig
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.networks.attention import Layers
from distributed_muzero.networks.base import Networks
from distributed_muzero.networks.mlp import perceptron
from distributed_muzero.networks.normalizer import ObservationNormalizer
from distributed_muzero.networks.sequence_inference import SequenceInference
from distributed_muzero.networks.tokens import CLOSED_LOGIT, Columns, token_layout

SPARE_SLOTS = 4  # behind a row's last token, for those that actions add


class NodeSequence(Networks):
    """Layers of attention over one slot for each token and one for the whole; the policy is read slot by slot.

    Embeddings are [1 + S, D], S the tokens of the batch's longest row and SPARE_SLOTS more. The first number of each
    says whether the slot is open: a row's own tokens and SPARE_SLOTS more are, for good, and nobody looks at others. So
    an answer depends neither on the rows beside it nor on L; nor do the weights, which fit any L. How tokens refer to
    each other is known to the representation alone; inside the tree there are distances, and what an embedding keeps.
    Raises ConfigError for observations that aren't tokens, and for a history of more than one.
    """

    value_head: CategoricalOutput
    reward_head: CategoricalOutput

    def __init__(self, spec: EnvironmentSpec, history_length: int, config: NetworkConfig):
        super().__init__()
        self.layout = token_layout(spec, history_length)
        width, num_heads = config.embedding_size, config.num_heads
        self.num_actions, self.num_rules = spec.num_actions, self.layout.num_actions_of_each
        self.value_head = self.reward_head = CategoricalOutput(
            config.support_min, config.support_max, config.support_size
        )
        self.tokens, self.whole = Reader(self.layout.tokens, width), Reader(self.layout.whole, width)
        num_relations = 2 * len(self.layout.indices) + len(self.layout.links)
        self.representation_layers = Layers(width, num_heads, config.num_blocks + 1, num_relations)
        # What a rule adds to the whole token, and to the one that it is applied to.
        self.rules = nn.Parameter(torch.randn(self.num_rules, 2 * width))
        self.transition_layers = Layers(width, num_heads, config.num_blocks)
        sizes = [2 * width, *config.hidden_sizes, config.support_size]
        self.reward_layers = perceptron(sizes, zero_last=True)
        self.value_layers = perceptron(sizes, zero_last=True)
        self.policy_layers = perceptron([width, self.num_rules], zero_last=True)

    def representation(self, observations: Tensor) -> Tensor:
        rows = observations[:, 0].to(torch.float32)
        lengths = (rows[..., 0] > 0).sum(1)
        num_slots = int(lengths.max()) + SPARE_SLOTS
        slots = functional.pad(rows, (0, 0, 0, max(0, num_slots - rows.shape[1])))[:, :num_slots]
        places = torch.arange(num_slots, device=rows.device)
        is_token = places < lengths[:, None]
        is_open = places < lengths[:, None] + SPARE_SLOTS
        whole = self.whole(torch.cat([rows[:, 0], lengths[:, None]], 1))
        x = torch.cat([whole[:, None], self.tokens(slots, is_token)], 1)
        is_open = functional.pad(is_open, (1, 0), value=True).to(x.dtype)
        return marked(self.representation_layers(x, is_open, self.relations(slots, is_token)), is_open)

    def relations(self, slots: Tensor, is_token: Tensor) -> Tensor | None:
        """[B, S, S, relations]: 1 where slot i names slot j in an index column; then where j names i; then where they
        share a category that links them."""
        if not self.layout.indices and not self.layout.links:
            return None
        places = torch.arange(slots.shape[1], device=slots.device)
        named = slots[..., None, list(self.layout.indices)] == places[:, None]
        named = named & is_token[:, :, None, None]
        category = slots[..., list(self.layout.links)]
        same = (category[:, :, None] == category[:, None]) & (category != 0)[:, :, None]
        return torch.cat([named, named.transpose(1, 2), same], -1).to(slots.dtype)

    def transition(self, embeddings: Tensor, actions: Tensor) -> Tensor:
        is_open = embeddings[..., 0]
        slots = (
            torch.arange(embeddings.shape[1], device=actions.device) - 1
        )  # the whole token stands before slot 0
        acted_on = slots == (actions // self.num_rules)[:, None]
        where = torch.stack([(slots < 0).expand_as(acted_on), acted_on], -1).to(embeddings.dtype)
        # A product rather than a look-up, whose gradient on a GPU would not be the same each time.
        rules = functional.one_hot(actions % self.num_rules, self.num_rules).to(embeddings.dtype) @ self.rules
        x = torch.baddbmm(embeddings, where, rules.view(len(actions), 2, -1))
        return marked(self.transition_layers(x, is_open), is_open)

    def reward_output(self, embeddings: Tensor, actions: Tensor, next_embeddings: Tensor) -> Tensor:
        return self.reward_layers(summary(next_embeddings))

    def value_output(self, embeddings: Tensor) -> Tensor:
        return self.value_layers(summary(embeddings))

    def policy(self, embeddings: Tensor) -> Tensor:
        slots = embeddings[:, 1 : 1 + self.layout.num_slots]
        logits = self.policy_layers(slots).masked_fill(slots[..., :1] < 0.5, CLOSED_LOGIT).flatten(1)
        return functional.pad(logits, (0, self.num_actions - logits.shape[1]), value=CLOSED_LOGIT)

    def numpy_inference(self) -> SequenceInference:
        return SequenceInference(self)


class Reader(nn.Module):
    """Columns of an observation to a vector: categories by what is learnt of each, numbers by their scale."""

    def __init__(self, columns: Columns, width: int):
        super().__init__()
        self.columns = columns
        self.normalizer = ObservationNormalizer(len(columns.numbers))
        self.layer = nn.Linear(columns.num_features, width)

    def forward(self, rows: Tensor, is_token: Tensor | None = None) -> Tensor:
        """[…, C] -> […, D]. Where no token is [B, S], numbers are 0 and don't count for the scale."""
        hot = [
            rows[..., column, None] == torch.arange(size, device=rows.device)
            for column, size in self.columns.categories
        ]
        return self.layer(torch.cat([*hot, self._numbers(rows, is_token)], -1))

    def _numbers(self, rows: Tensor, is_token: Tensor | None) -> Tensor:
        numbers = rows[..., list(self.columns.numbers)]
        if is_token is None:
            return self.normalizer(numbers)
        scaled = torch.zeros_like(numbers)
        scaled[is_token] = self.normalizer(numbers[is_token])
        return scaled


def marked(x: Tensor, is_open: Tensor) -> Tensor:
    """Embeddings of x [B, 1 + S, D], whose first number is whether the slot is open, and the rest 0 where it isn't."""
    mark = is_open.unsqueeze(-1).to(x.dtype)
    return torch.cat([mark, x[..., 1:] * mark], -1)


def summary(embeddings: Tensor) -> Tensor:
    """[B, 1 + S, D] -> [B, 2D]: the whole token, and the mean of the open slots."""
    slots = embeddings[:, 1:]
    return torch.cat([embeddings[:, 0], slots.sum(1) / slots[..., :1].sum(1)], -1)
