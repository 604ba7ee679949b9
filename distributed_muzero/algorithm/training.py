"""training(): one gradient step on a batch, the third public function of the contract."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from distributed_muzero.algorithm.losses import Losses, LossWeights, unroll_losses
from distributed_muzero.algorithm.planning import DEFAULT_DISCOUNT
from distributed_muzero.errors import ContractError, NonFiniteError
from distributed_muzero.networks.base import Networks, as_networks

MAX_REMEMBERED_OPTIMIZERS = 8

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
AddGradients = Callable[[Networks, Inputs, Tensor | None, LossWeights], Losses]


def training(
    observations: Tensor,
    target_policies: Tensor,
    target_actions: Tensor,
    target_returns: Tensor,
    h: Callable,
    g_r: Callable,
    g_s: Callable,
    f_v: Callable,
    f_p: Callable,
    *,
    target_rewards: Tensor | None = None,
    importance_weights: Tensor | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    discount: float = DEFAULT_DISCOUNT,
    weights: LossWeights = LossWeights(),  # noqa: B008 - immutable
    max_grad_norm: float = 5.0,
) -> float:
    """One gradient step of all five networks; returns the mean loss over the mini-batch.

    observations [M, N, *O]; target_policies [M, K+1, A]; target_actions [M, K+1] long; target_returns [M, K+1].
    target_rewards [M, K+1]: u_t … u_{t+K}. Absent, z_t − γ z_{t+1} with `discount` stands in, which is exact for
    Monte Carlo returns (decision 4).
    optimizer: given, its parameters are what is learnt. Absent, an Adam of learning rate 1e-3 is made once for each
    set of parameters and used again on the next call (decision 5). f_p gives logits;
    f_v and g_r numbers [B]; `a` is a LongTensor [B].
    Raises ContractError for shapes that don't fit, NonFiniteError when the loss isn't finite (nothing is changed).
    """
    _check_shapes(observations, target_policies, target_actions, target_returns, target_rewards)
    if importance_weights is not None and importance_weights.shape != (len(observations),):
        raise ContractError(
            f"importance_weights must be [M] = [{len(observations)}], got {list(importance_weights.shape)}"
        )
    if optimizer is None:
        optimizer = _remembered_optimizer(collect_parameters(h, g_r, g_s, f_v, f_p))
    if target_rewards is None:
        following = torch.cat([target_returns[:, 1:], torch.zeros_like(target_returns[:, :1])], 1)
        target_rewards = target_returns - discount * following
    losses = training_step(
        as_networks(h, g_r, g_s, f_v, f_p),
        (observations, target_actions, target_policies, target_returns, target_rewards),
        importance_weights,
        optimizer,
        [parameter for group in optimizer.param_groups for parameter in group["params"]],
        weights,
        max_grad_norm,
        add_row_gradients,
    )[0]
    return float(losses.total.mean())


def training_step(
    networks: Networks,
    targets: Inputs,
    importance_weights: Tensor | None,
    optimizer: torch.optim.Optimizer,
    parameters: list[Tensor],
    weights: LossWeights,
    max_grad_norm: float,
    add_gradients: AddGradients,
) -> tuple[Losses, Tensor]:
    """Loss, backward, clip, step; shared by training() and the learner.

    targets: observations, actions, policies, returns, rewards, as `unroll_losses` takes them.
    add_gradients: `add_row_gradients`, or what does the same with others' help.
    Returns the rows' losses (detached) and the gradient's norm before clipping.
    Raises NonFiniteError, and leaves weights and buffers as they were, when a target or the gradient isn't finite.
    """
    _check_finite(targets)
    buffers = [(buffer, buffer.clone()) for buffer in networks.buffers()]
    optimizer.zero_grad(set_to_none=False)
    try:
        losses = add_gradients(networks, targets, importance_weights, weights)
    except BaseException:
        _write_back(buffers)
        raise
    norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    if not bool(torch.isfinite(norm)):
        _write_back(buffers)
        optimizer.zero_grad(set_to_none=False)
        mean = float(weighted(losses, importance_weights).mean())
        raise NonFiniteError(
            f"the loss or its gradient isn't finite (mean loss {mean}, gradient norm {float(norm)}); the weights "
            "were left as they were. Look for extreme targets, or lower the learning rate"
        )
    optimizer.step()
    return losses, norm


def add_row_gradients(
    networks: Networks,
    targets: Inputs,
    importance_weights: Tensor | None,
    weights: LossWeights,
    num_rows: int | None = None,
) -> Losses:
    """Adds the gradient of Σ_i w_i ℓ_i / num_rows, w_i the rows' importance; returns their losses, detached.

    num_rows: of the whole batch, where these are a part of it: the parts' gradients sum up to that of its mean.
    """
    losses = unroll_losses(networks, *targets, weights)
    total = weighted(losses, importance_weights)
    (total.sum() / (num_rows or len(total))).backward()
    return Losses(*(part.detach() for part in losses))


def weighted(losses: Losses, importance_weights: Tensor | None) -> Tensor:
    """[M] the rows' losses, as much as each counts."""
    return losses.total if importance_weights is None else losses.total * importance_weights


def _write_back(buffers: list[tuple[Tensor, Tensor]]) -> None:
    for buffer, before in buffers:
        buffer.copy_(before)


def collect_parameters(*functions: Callable) -> list[Tensor]:
    """Every trainable tensor that the functions reach, each once.

    Looked for in modules, callable objects, bound methods and their owners, partials, closures, globals, defaults.
    """
    return list(_reachable_tensors(functions, set()))


def _reachable_tensors(things: Iterable[Any], seen: set[int]) -> Iterator[Tensor]:
    for thing in things:
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            if thing.requires_grad and thing.is_leaf:
                yield thing
        elif isinstance(thing, nn.Module):
            yield from _reachable_tensors(thing.parameters(), seen)
        elif isinstance(thing, (list, tuple, dict)):
            yield from _reachable_tensors(thing.values() if isinstance(thing, dict) else thing, seen)
        elif hasattr(thing, "func") and hasattr(thing, "args"):  # functools.partial
            yield from _reachable_tensors((thing.func, thing.args, thing.keywords), seen)
        elif inspect.ismethod(thing):
            yield from _reachable_tensors((thing.__self__, thing.__func__), seen)
        elif inspect.isfunction(thing) and not str(thing.__module__).startswith("torch."):
            used = inspect.getclosurevars(thing)
            defaults = (thing.__defaults__, thing.__kwdefaults__)
            yield from _reachable_tensors((*defaults, *used.nonlocals.values(), *used.globals.values()), seen)
        elif hasattr(thing, "__dict__") and not isinstance(thing, (type, ModuleType)):
            yield from _reachable_tensors(tuple(vars(thing).values()), seen)


_optimizers: OrderedDict[tuple[int, ...], torch.optim.Optimizer] = OrderedDict()


def _remembered_optimizer(parameters: list[Tensor]) -> torch.optim.Optimizer:
    if not parameters:
        raise ContractError(
            "no trainable parameter was found in the five networks; expected nn.Modules, their methods, or functions "
            "that close over modules or tensors with requires_grad"
        )
    # The optimizer holds its parameters, so an id in here can't have been given to another tensor.
    key = tuple(sorted(id(parameter) for parameter in parameters))
    if key not in _optimizers:
        _optimizers[key] = torch.optim.Adam(parameters, lr=1e-3)
        if len(_optimizers) > MAX_REMEMBERED_OPTIMIZERS:
            _optimizers.popitem(last=False)
    _optimizers.move_to_end(key)
    return _optimizers[key]


def _check_shapes(observations, target_policies, target_actions, target_returns, target_rewards) -> None:
    if target_actions.ndim != 2 or target_actions.is_floating_point():
        raise ContractError(
            f"target_actions must be integers of shape [M, K+1], got {target_actions.dtype} "
            f"{list(target_actions.shape)}"
        )
    num_rows, width = target_actions.shape
    if target_policies.ndim != 3 or target_policies.shape[:2] != (num_rows, width):
        raise ContractError(
            f"target_policies must be [M, K+1, A] = [{num_rows}, {width}, A], got {list(target_policies.shape)}"
        )
    for name, tensor in (("target_returns", target_returns), ("target_rewards", target_rewards)):
        if tensor is not None and tensor.shape != (num_rows, width):
            raise ContractError(f"{name} must be [M, K+1] = [{num_rows}, {width}], got {list(tensor.shape)}")
    if observations.ndim < 2 or len(observations) != num_rows:
        raise ContractError(
            f"observations must be [M, N, *O] with M = {num_rows}, got {list(observations.shape)}"
        )
    num_actions = target_policies.shape[2]
    if bool(((target_actions < 0) | (target_actions >= num_actions)).any()):
        raise ContractError(
            f"target_actions must lie in 0…{num_actions - 1}, got {int(target_actions.min())}…"
            f"{int(target_actions.max())}"
        )


def _check_finite(targets: Inputs) -> None:
    observations, _, policies, returns, rewards = targets
    # Rewards may be made of returns: these are named first.
    tensors = {
        "observations": observations,
        "target_policies": policies,
        "target_returns": returns,
        "target_rewards": rewards,
    }
    finite = {name: torch.isfinite(tensor).all() for name, tensor in tensors.items()}
    # One question to the device, not four.
    if not bool(torch.stack(list(finite.values())).all()):
        name = next(name for name in finite if not bool(finite[name]))
        raise NonFiniteError(f"{name} holds NaN or Inf; the weights were left as they were")
