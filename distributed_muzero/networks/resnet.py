"""Residual networks for observations that are planes: boards, small images."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from distributed_muzero.algorithm.value_transform import CategoricalOutput
from distributed_muzero.config import NetworkConfig
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.networks.base import Networks
from distributed_muzero.networks.mlp import min_max_normalize, perceptron
from distributed_muzero.networks.normalizer import ObservationNormalizer
from distributed_muzero.networks.planes import plane_shape
from distributed_muzero.networks.resnet_inference import ResNetInference

HEAD_CHANNELS = 16  # planes that a head reduces the embedding to
CODE_CHANNELS = 8  # planes that tell actions apart which have no place on the board
LARGEST_ACTION_TABLE = 2**22  # numbers, 16 MB: beyond it the search asks torch


class ResNet(Networks):
    """Representation and transition are towers of residual blocks over H × W cells; heads are small perceptrons.

    An observation [*O] of rank 3 is planes [C, H, W], of rank 2 one plane [H, W]; the N last ones are stacked as
    N·C channels. Every layer keeps the board's size. Embeddings are [num_channels, H, W], min-max normalised to
    [0, 1] in each row; the reward is read from the embedding that an action leads to. Normalisation is over one row's
    channels and cells (GroupNorm of one group): statistics of a batch would make a row's answer depend on the rows
    beside it, differ between training and acting, and have to be shared among a learner's devices.
    Raises ConfigError for observations that are no planes.
    """

    value_head: CategoricalOutput
    reward_head: CategoricalOutput

    def __init__(self, spec: EnvironmentSpec, history_length: int, config: NetworkConfig):
        super().__init__()
        num_planes, height, width = plane_shape(spec)
        self.board = height, width
        self.num_actions, self.num_channels = spec.num_actions, config.num_channels
        num_inputs, num_cells = history_length * num_planes, height * width
        self.normalizer = ObservationNormalizer(num_inputs)
        self.value_head = self.reward_head = CategoricalOutput(
            config.support_min, config.support_max, config.support_size
        )
        self.action_planes = nn.Parameter(make_action_planes(spec.num_actions, height, width))
        self.action_planes.data *= math.sqrt(config.num_channels)  # few planes against the embedding's many
        num_features = config.num_channels + self.action_planes.shape[1]
        self.representation_layers = Tower(num_inputs, config.num_channels, config.num_blocks)
        self.transition_layers = Tower(num_features, config.num_channels, config.num_blocks)

        def head(num_outputs: int) -> nn.Sequential:
            sizes = [HEAD_CHANNELS * num_cells, *config.hidden_sizes, num_outputs]
            reduce = nn.Conv2d(config.num_channels, HEAD_CHANNELS, 1)
            return nn.Sequential(reduce, nn.ReLU(), nn.Flatten(), *perceptron(sizes, zero_last=True))

        self.reward_layers = head(config.support_size)
        self.value_layers = head(config.support_size)
        self.policy_layers = head(spec.num_actions)

    def representation(self, observations: Tensor) -> Tensor:
        return normalize_rows(self.representation_layers(self.features(observations)))

    def features(self, observations: Tensor) -> Tensor:
        """[B, N, *O] of any scale -> [B, N·C, H, W], every plane by its own mean and variance."""
        planes = observations.reshape(len(observations), -1, *self.board).to(torch.float32)
        cells = planes.movedim(1, -1)
        return self.normalizer(cells.flatten(0, 2)).view(cells.shape).movedim(-1, 1).contiguous()

    def transition(self, embeddings: Tensor, actions: Tensor) -> Tensor:
        # A product rather than a look-up, whose gradient on a GPU would not be the same each time.
        hot = functional.one_hot(actions, self.num_actions).to(embeddings.dtype)
        planes = (hot @ self.action_planes.flatten(1)).unflatten(1, self.action_planes.shape[1:])
        planes = planes.expand(-1, -1, *self.board)
        return normalize_rows(self.transition_layers(torch.cat([embeddings, planes], 1), embeddings))

    def reward_output(self, embeddings: Tensor, actions: Tensor, next_embeddings: Tensor) -> Tensor:
        return self.reward_layers(next_embeddings)

    def value_output(self, embeddings: Tensor) -> Tensor:
        return self.value_layers(embeddings)

    def policy(self, embeddings: Tensor) -> Tensor:
        return self.policy_layers(embeddings)

    def numpy_inference(self) -> ResNetInference | None:
        if self.num_actions * self.num_channels * math.prod(self.board) > LARGEST_ACTION_TABLE:
            return None
        return ResNetInference(self)


class NormalizedConvolution(nn.Sequential):
    """3 × 3, then normalisation over channels and cells; the board's size stays."""

    def __init__(self, num_inputs: int, num_outputs: int):
        convolution = nn.Conv2d(num_inputs, num_outputs, 3, padding=1, bias=False)
        super().__init__(convolution, nn.GroupNorm(1, num_outputs))


class Tower(nn.Module):
    """A convolution and `num_blocks` residual blocks of two more."""

    def __init__(self, num_inputs: int, num_channels: int, num_blocks: int):
        super().__init__()
        self.first = NormalizedConvolution(num_inputs, num_channels)
        self.rest = nn.ModuleList(
            NormalizedConvolution(num_channels, num_channels) for _ in range(2 * num_blocks)
        )

    def forward(self, x: Tensor, skipped: Tensor | None = None) -> Tensor:
        """[B, I, H, W] -> [B, num_channels, H, W]. `skipped` is added behind the first convolution."""
        x = self.first(x)
        x = torch.relu(x if skipped is None else x + skipped)
        for one, other in zip(self.rest[::2], self.rest[1::2], strict=True):
            x = torch.relu(other(torch.relu(one(x))) + x)
        return x


def normalize_rows(embeddings: Tensor) -> Tensor:
    """Min-max normalisation of each row [C, H, W] as a whole."""
    return min_max_normalize(embeddings.flatten(1)).view(embeddings.shape)


def make_action_planes(num_actions: int, height: int, width: int) -> Tensor:
    """What the transition first sees of each action, [A, planes, H, W] or, alike in all cells, [A, planes, 1, 1].

    As many actions as cells (or one more, a pass): the action's cell, row by row. As many as columns: its column.
    Else random codes. All of it is learnt on, so a board with another meaning is no mistake.
    """
    cells, columns = torch.eye(height * width), torch.eye(width)
    if num_actions in (height * width, height * width + 1):
        planes = torch.zeros(num_actions, 1, height, width)
        planes[: height * width, 0] = cells.view(-1, height, width)
        return planes
    if num_actions == width:
        return columns[:, None, None, :].expand(-1, -1, height, -1).clone()
    return torch.randn(num_actions, CODE_CHANNELS, 1, 1) / math.sqrt(CODE_CHANNELS)
