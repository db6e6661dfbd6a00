"""Adds up the numbers of a step over all ranks, and reads them on the host without waiting for the GPU."""

import math
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from composer.core import State
from composer.utils import dist
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor import DTensor, Replicate
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_sum


def reads_wait(state: State) -> bool:
    """Whether the host waits for the device when it reads a tensor: true on a GPU."""
    return state.device.name == 'gpu'


def gradient_copies(model: torch.nn.Module) -> int:
    """Number of ranks that hold the same gradient: all under DDP, one under FSDP, the replicas under HSDP."""
    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel) and module.sharding_strategy != ShardingStrategy.NO_SHARD:
            group: Any = module.process_group  # the ranks among which FSDP shards: those of a node under HSDP
            return dist.get_world_size() // group.size()
    for p in model.parameters():
        if isinstance(p, DTensor):
            mesh = p.device_mesh
            replicas = math.prod(mesh.size(i) for i, part in enumerate(p.placements) if isinstance(part, Replicate))
            return dist.get_world_size() // mesh.size() * replicas
    return dist.get_world_size()


def _states_to_sum(metrics: dict[str, Metric]) -> list[tuple[Metric, str]]:
    """The states of metrics that ranks add up. These metrics stop adding them up themselves, with many collectives."""
    states = []
    for metric in metrics.values():
        if dist.get_world_size() == 1 or all(reduce is dim_zero_sum for reduce in metric._reductions.values()):
            metric.sync_on_compute = metric._to_sync = False
            states += [(metric, name) for name in metric._reductions if isinstance(getattr(metric, name), Tensor)]
    return states


def sum_step(state: State, copies: int, stop_requested: bool) -> tuple[Tensor, Tensor]:
    """Adds up losses, train metrics, gradient norm and requests to stop over all ranks, in one all-reduce.

    `copies` is the number of ranks that hold the same gradient. `state.total_loss_dict` becomes the means over the
    ranks. The states of `state.train_metrics` become their sums. Nothing is read on the host.

    Returns the square of the norm of all gradients, and the number of ranks that are asked to stop: scalars in float64.
    A value that is not finite on one rank is not finite in the result.
    """
    losses: dict[str, Any] = state.total_loss_dict
    metrics = _states_to_sum(state.train_metrics or {})
    grads = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
             for p in state.model.parameters() if p.grad is not None]
    device = next(iter(losses.values())).device
    squares = torch.nn.utils.get_total_norm(grads).float().to(device) ** 2 / copies
    values: list[Any] = [squares, torch.full((), stop_requested, device=device), *losses.values(),
                         *(getattr(metric, name) for metric, name in metrics)]
    sums = torch.cat([value.detach().double().reshape(-1) for value in values])
    if dist.get_world_size() > 1:
        dist.all_reduce(sums)
    parts = [part.view(value.shape) for part, value in zip(sums.split([value.numel() for value in values]), values)]
    rest = iter(parts[2:])
    means: Any = {name: next(rest).squeeze() / dist.get_world_size() for name in losses}
    state.total_loss_dict = means
    for metric, name in metrics:
        setattr(metric, name, next(rest).to(getattr(metric, name).dtype))
    return parts[0], parts[1]


class LateReader:
    """Reads small tensors on the host: at once on a CPU, one step late on a GPU.

    A GPU copies the tensor of a step to the host while the host prepares the next step. When the host then reads the
    copy, the GPU has long finished it and works on the next step, so neither waits. Every rank reads a tensor at the
    same step.
    """

    def __init__(self) -> None:
        self._copies: deque[tuple[Any, Tensor, Any]] = deque()  # label, copy on the host, event at the copy's end

    def put(self, label: Any, values: Tensor) -> None:
        copy: Tensor = values
        copied: Any = None
        if values.is_cuda:
            copy, copied = torch.empty_like(values, device='cpu', pin_memory=True), torch.cuda.Event()
            copy.copy_(values, non_blocking=True)
            copied.record()
        self._copies.append((label, copy, copied))

    def peek(self) -> Iterator[tuple[Any, list[float]]]:
        """Labels and numbers of all tensors that `take` has not returned yet; waits for the GPU."""
        for label, copy, copied in self._copies:
            if copied is not None:
                copied.synchronize()
            yield label, copy.tolist()

    def take(self, n_left: int) -> Iterator[tuple[Any, list[float]]]:
        """Labels and numbers of the oldest tensors, without the last `n_left`."""
        while len(self._copies) > n_left:
            oldest = next(self.peek())
            self._copies.popleft()
            yield oldest
