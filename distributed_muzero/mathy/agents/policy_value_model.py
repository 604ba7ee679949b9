"""A policy over actions × nodes and a value for each observation of a window, in torch."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from distributed_muzero.errors import ContractError, NonFiniteError
from distributed_muzero.mathy.agents.base_config import BaseConfig
from distributed_muzero.mathy.agents.saving import (
    check_config,
    has_saved_model,
    load_first_weights,
    make_folder,
    require_saved,
    restore_model,
    save_model,
    write_config,
)
from distributed_muzero.mathy.state import (
    CONSTANT,
    NO_NODE,
    NUM_NODE_TYPES,
    MathyInputs,
    MathyObservation,
    observations_to_window,
)

HASH_BUCKETS = 128
HASH_UNITS = 8
FORBIDDEN = -1e9  # a masked logit: softmax makes it exactly 0 wherever one action is allowed

logger = logging.getLogger(__name__)


class Outputs(NamedTuple):
    """Of a window of n observations with L nodes, or of a batch [B] of such windows."""

    logits: Tensor  # [n, L · predictions]
    values: Tensor  # [n]
    masked_logits: Tensor  # [n, L · predictions]
    rnn_state_h: Tensor  # [n, D] the recurrent state after each observation
    rnn_state_c: Tensor  # [D] after the last one


class PolicyValueModel(nn.Module):
    """Embeds each node, reads the nodes in both directions, and the observations one after the other.

    The recurrent state that a window begins with is that of its first observation; the mask is read as a feature of
    the nodes, too, since nodes in order don't say how they hang together.
    """

    def __init__(self, args: BaseConfig, predictions: int):
        """predictions: the environment's action_size, what can be done to each node."""
        super().__init__()
        if predictions < 1:
            raise ContractError(f"predictions {predictions}: give the environment's action_size, at least 1")
        self.args, self.predictions = args, predictions
        units, node_units = args.units, 2 * args.lstm_units
        self.node_types = nn.Embedding(NUM_NODE_TYPES, args.embedding_units, padding_idx=NO_NODE)
        self.hashes = nn.ModuleList(nn.Embedding(HASH_BUCKETS, HASH_UNITS) for _ in range(2))
        self.node_layer = nn.Linear(args.embedding_units + 2 + predictions, units)
        self.context_layer = nn.Linear(2 * HASH_UNITS + 1, units)
        self.node_lstm = nn.LSTM(units, args.lstm_units, batch_first=True, bidirectional=True)
        self.time_lstm = nn.LSTM(2 * node_units + args.rnn_size, args.rnn_size, batch_first=True)
        self.policy_head = _head(node_units + args.rnn_size, units, predictions)
        self.value_head = _head(2 * node_units + args.rnn_size, units, 1)
        self.optimizer = torch.optim.Adam(self.parameters(), lr=args.learning_rate)
        self.counts = {"updates": 0, "episodes": 0, "steps": 0}  # of its training so far

    def forward(self, inputs: MathyInputs) -> tuple[Tensor, Tensor, Tensor]:
        """(logits [n, L · predictions], one value for each observation [n], masked logits) of a window's inputs."""
        outputs = self.read(inputs)
        return outputs.logits, outputs.values, outputs.masked_logits

    def predict_next(self, inputs: MathyInputs) -> tuple[Tensor, Tensor]:
        """Policy [own nodes · predictions] and value [] of a window's last observation; 0 where it is masked.

        Raises ContractError if nothing is allowed there: such a state is an episode's end.
        """
        with torch.no_grad():
            _, values, masked_logits = self(inputs)
        nodes, mask = inputs[0], inputs[1]
        size = int((nodes[-1] != NO_NODE).sum()) * self.predictions
        if not bool(mask[-1].any()):
            raise ContractError(
                "the last observation allows no action; it ends its episode, so ask for none there"
            )
        return torch.softmax(masked_logits[-1, :size], -1), values[-1]

    def read(self, inputs: MathyInputs) -> Outputs:
        """All that the model says. inputs: of a window [n, …], or of a batch of equally long windows [B, n, …]."""
        self._check(inputs)
        if inputs[0].ndim == 2:
            batch = self._read([tensor.unsqueeze(0) for tensor in inputs])
            return Outputs(*(tensor.squeeze(0) for tensor in batch))
        return self._read(inputs)

    def _read(self, inputs: MathyInputs) -> Outputs:
        nodes, mask, state_h, state_c, history_h = *inputs[:2], *inputs[5:]
        batch, num, length = nodes.shape
        encoded = self._encode_nodes(*(tensor.flatten(0, 1) for tensor in inputs[:5]))
        encoded = encoded.unflatten(0, (batch, num))  # [B, n, L, 2u]
        pooled = _pooled(encoded, nodes != NO_NODE)
        # Copies: a view of the first observation's state isn't laid out as the layer wants it.
        start = state_h[:, 0].unsqueeze(0).contiguous(), state_c[:, 0].unsqueeze(0).contiguous()
        states, (_, last_c) = self.time_lstm(torch.cat([pooled, history_h], -1), start)
        each = states.unsqueeze(2).expand(-1, -1, length, -1)
        logits = self.policy_head(torch.cat([encoded, each], -1)).flatten(2)
        value = self.value_head(torch.cat([pooled, states], -1)).squeeze(-1)
        return Outputs(logits, value, logits.masked_fill(mask == 0, FORBIDDEN), states, last_c.squeeze(0))

    def _encode_nodes(
        self, nodes: Tensor, mask: Tensor, values: Tensor, types: Tensor, time: Tensor
    ) -> Tensor:
        """[N, L, 2 · lstm_units]; what stands behind an observation's nodes changes nothing of theirs."""
        size = torch.sign(values) * torch.log1p(values.abs())
        rules = mask.unflatten(-1, (nodes.shape[-1], self.predictions))
        constant = (nodes == CONSTANT).float()
        features = torch.cat([self.node_types(nodes), size[..., None], constant[..., None], rules], -1)
        hashes = [table(types[:, column] % HASH_BUCKETS) for column, table in enumerate(self.hashes)]
        context = self.context_layer(torch.cat([*hashes, time], -1))
        entered = torch.relu(self.node_layer(features) + context.unsqueeze(1))
        lengths = (nodes != NO_NODE).sum(-1).clamp(min=1).cpu()
        packed = pack_padded_sequence(entered, lengths, batch_first=True, enforce_sorted=False)
        encoded, _ = pad_packed_sequence(
            self.node_lstm(packed)[0], batch_first=True, total_length=nodes.shape[-1]
        )
        return encoded

    def _check(self, inputs: MathyInputs) -> None:
        """Raises ContractError for inputs that aren't a window's of this model."""
        if len(inputs) != 8:
            raise ContractError(
                f"{len(inputs)} inputs came, the model takes the 8 of observations_to_window(…).to_inputs()"
            )
        leading, length = tuple(inputs[0].shape[:-1]), inputs[0].shape[-1]
        sizes = [length, length * self.predictions, length, 2, 1, *[self.args.rnn_size] * 3]
        found = [tuple(tensor.shape) for tensor in inputs]
        expected = [(*leading, size) for size in sizes]
        if found != expected or len(leading) not in (1, 2):
            raise ContractError(
                f"inputs of shapes {found} came, expected {expected}: predictions is {self.predictions}, rnn_size "
                f"{self.args.rnn_size}; make observations with the same numbers"
            )

    def save(self) -> Path:
        """Writes weights, optimizer and counts to args.model_dir, and returns the folder. Raises CheckpointError."""
        return save_model(self)


def get_or_create_policy_model(
    args: BaseConfig, predictions: int, is_main: bool = False, required: bool = False
) -> PolicyValueModel:
    """The model of args.model_dir with its optimizer's state, or a new one; checked on a random observation.

    Makes the folder. is_main: writes model.config.json there; other processes write nothing.   required: there must be
    a saved model. A new one begins with the weights of args.init_model_from, where that is given.

    Raises CheckpointError for a model that is missing, damaged or of other shapes, and for a folder that can't be made.
    """
    check_config(args, predictions)
    if required:
        require_saved(args)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        model = PolicyValueModel(args, predictions)
    if has_saved_model(args):
        restore_model(model)
    elif args.init_model_from is not None:
        load_first_weights(model, args.init_model_from)
    check_model(model)
    make_folder(args)
    if is_main:
        write_config(args, predictions)
    if args.verbose:
        logger.info("%s: %s", args.model_dir, model.counts)
    return model


def check_model(model: PolicyValueModel) -> None:
    """Calls a model on a random observation. Raises NonFiniteError if it answers with NaN or Inf."""
    policy, value = model.predict_next(observations_to_window([random_observation(model)]).to_inputs())
    if not bool(torch.isfinite(policy).all() and torch.isfinite(value)):
        raise NonFiniteError(
            f"the model of {model.args.model_dir} answers with NaN or Inf; go on from an earlier one"
        )


def random_observation(model: PolicyValueModel, num_nodes: int = 5, seed: int = 0) -> MathyObservation:
    """Of no problem, but with the shapes of one; its first action is allowed."""
    generator = torch.Generator().manual_seed(seed)
    num_actions = num_nodes * model.predictions
    states = [torch.rand(model.args.rnn_size, generator=generator).tolist() for _ in range(3)]
    return MathyObservation(
        torch.randint(1, NUM_NODE_TYPES, (num_nodes,), generator=generator).tolist(),
        [1, *torch.randint(0, 2, (num_actions - 1,), generator=generator).tolist()],
        torch.rand(num_nodes, generator=generator).tolist(),
        torch.randint(-1000, 1000, (2,), generator=generator).tolist(),
        torch.rand(1, generator=generator).tolist(),
        *states,
    )


def _pooled(encoded: Tensor, there: Tensor) -> Tensor:
    """Mean and maximum over the nodes that are there: [B, n, L, u] -> [B, n, 2u]."""
    weights = there.to(encoded.dtype).unsqueeze(-1)
    mean = (encoded * weights).sum(-2) / weights.sum(-2).clamp(min=1)
    highest = encoded.masked_fill(weights == 0, -1.0).amax(-2)  # an LSTM's outputs lie above -1
    return torch.cat([mean, highest], -1)


def _head(num_inputs: int, units: int, num_outputs: int) -> nn.Sequential:
    """Two layers, of which the last starts small: a nearly even policy, values near 0."""
    last = nn.Linear(units, num_outputs)
    nn.init.normal_(last.weight, std=0.01)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(num_inputs, units), nn.ReLU(), last)
