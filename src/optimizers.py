"""Optimizers and learning-rate schedules."""

from collections.abc import Callable, Sequence
from typing import Any, Optional

import composer.optim
import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.optim import ComposerScheduler
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from src.common.errors import UserError
from src.config.schema import OptimizerConfig, SchedulerConfig


def _fuse(optimizer: Any) -> None:
    """Makes torch update all parameters in one kernel if `optimizer.fuses` is true and their devices can.

    Called at each step: parameters may be on meta when the optimizer is built, and a checkpoint overwrites the setting.
    """
    for group in optimizer.param_groups:
        group['fused'] = optimizer.fuses and all(p.is_floating_point() and p.device.type in ('cpu', 'cuda')
                                                 for p in group['params'])


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the next step does nothing where its tensor `found_inf` is 1: Muon, and fused Adam, here and in torch.

    False for other classes: torch's fused SGD makes its momentum in a step that it skips, and a class of your own, also
    one that is derived from these, may do more in its `step`.
    """
    is_known = type(optimizer) in (AdamW, DecoupledAdamW, Muon, torch.optim.Adam, torch.optim.AdamW)
    return is_known and all(group.get('fused') or 'rows' in group for group in optimizer.param_groups)


class AdamW(torch.optim.AdamW):
    """PyTorch's AdamW (Loshchilov & Hutter 2019), fused unless `fuses` is false."""

    fuses = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        _fuse(self)
        return super().step(closure)


class DecoupledAdamW(composer.optim.DecoupledAdamW):
    """AdamW whose weight decay does not depend on the peak learning rate (Loshchilov & Hutter 2019), fused.

    Composer's class of the same name updates parameters one by one. PyTorch's fused step computes the same update: it
    decays by `lr * weight_decay`, so `step` gives it `weight_decay / initial_lr`. The class keeps Composer's name,
    because optimizer state in checkpoints and log entries are keyed by the name.
    """

    fuses = True

    @torch.no_grad()
    def step(self, closure: Optional[Callable[[], float]] = None) -> Optional[float]:
        _fuse(self)
        decays = [group['weight_decay'] for group in self.param_groups]
        for group in self.param_groups:
            group['weight_decay'] /= group['initial_lr']
        try:
            return torch.optim.AdamW.step(self, closure)
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                group['weight_decay'] = decay


# ---------------------------------------------------------------- Muon
def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """Replaces the singular values of a matrix by numbers near 1, and keeps its singular vectors.

    Newton-Schulz iteration with the quintic of Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon), whose
    limits are between 0.68 and 1.13. It needs only matrix products, on a GPU in bf16. Returns fp32 on a CPU.
    """
    x = matrix.to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    if is_tall := len(x) > x.shape[1]:
        x = x.T  # the products below have the smaller dimension
    x = x / (x.norm() + 1e-7)  # singular values of at most 1
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.T if is_tall else x


def scaled_update(matrix: Tensor, rows: Sequence[int]) -> Tensor:
    """Orthogonalises the parts of a fused matrix one by one, and scales each to the size of Adam's updates.

    The root mean square of an orthogonalised matrix times sqrt(larger dimension) is 1. The factor 0.2 gives it the size
    that Adam's updates have in practice (Liu et al. 2025, https://arxiv.org/abs/2502.16982, section 2.2), so that one
    learning rate and one weight decay suit both. `rows` counts the rows of each part.
    """
    parts = matrix.split(rows) if rows else (matrix,)
    return torch.cat([0.2 * max(part.shape) ** 0.5 * orthogonalize(part) for part in parts]).to(matrix.dtype)


def sharded_update(shards: Sequence[Tensor], shapes: Sequence[torch.Size], rows: Sequence[int],
                   group: Any) -> Sequence[Tensor]:
    """This rank's rows of `scaled_update` of at most as many matrices as there are ranks.

    FSDP version 2 has divided the rows among the ranks; `shards` are this rank's. Rank i collects matrix i,
    orthogonalises it, and returns to each rank its rows.
    """
    ranks, me = dist.get_world_size(group), dist.get_rank(group)
    n_sent, n_kept = [*map(Tensor.numel, shards), *[0] * (ranks - len(shards))], [0] * ranks
    if me < len(shapes):
        height, width = shapes[me]
        per_rank = -(-height // ranks)  # FSDP cuts as torch.chunk does: the last ranks may have fewer rows, or none
        n_kept = [width * max(0, min(per_rank, height - rank * per_rank)) for rank in range(ranks)]
    sent = torch.cat([shard.flatten() for shard in shards])
    whole = sent.new_empty(sum(n_kept))
    dist.all_to_all_single(whole, sent, n_kept, n_sent, group)
    if me < len(shapes):
        whole = scaled_update(whole.view(shapes[me]), rows).flatten()
    dist.all_to_all_single(sent, whole, n_sent, n_kept, group)
    return [part.view(shard.shape) for part, shard in zip(sent.split(n_sent), shards)]


class Muon(AdamW):
    """Muon (Jordan et al. 2024) for the matrices in the blocks, AdamW for embeddings, head and vectors.

    The groups with a key `rows` hold matrices: their momentum is orthogonalised before the update. `rows` counts the
    rows of each part of a fused matrix; empty: the matrix is one part. All parameters decay by `lr * weight_decay`;
    with `cautious`, only those weights of matrices that the update makes smaller (Chen et al. 2025,
    https://arxiv.org/abs/2510.12402). Works on one device, with DDP, where each device orthogonalises all matrices, and
    with FSDP version 2.
    """

    found_inf: Optional[Tensor] = None  # 1: the step changes nothing; see `skips_on_device`

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # AdamW's expects a step count of each parameter

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = torch.enable_grad()(closure)() if closure else None
        groups = self.param_groups
        for group in (group for group in groups if 'rows' in group):
            self._update_matrices(group)
        try:
            self.param_groups = [group for group in groups if 'rows' not in group]
            super().step()
        finally:
            self.param_groups = groups
        return loss

    def _update_matrices(self, group: dict[str, Any]) -> None:
        params: Any = [p for p in group['params'] if p.grad is not None]  # None: the batch was not finite
        mesh = params[0].device_mesh.get_group() if params and isinstance(params[0], DTensor) else None
        at_a_time = dist.get_world_size(mesh) if mesh else 1
        lr = group['lr']
        if self.found_inf is not None:  # in fp64, where a product with 1 is exact
            lr = lr * (1 - self.found_inf.double())
        for start in range(0, len(params), at_a_time):
            batch = params[start:start + at_a_time]
            local = [p.to_local() if mesh else p for p in batch]
            momenta = [self._momentum(p, group['momentum']) for p in batch]
            if mesh:
                updates = sharded_update(momenta, [p.shape for p in batch], group['rows'], mesh)
            else:
                updates = [scaled_update(momentum, group['rows']) for momentum in momenta]
            decay = lr * group['weight_decay']
            for p, update in zip(local, updates, strict=True):
                p.mul_(1 - decay * (p * update > 0).to(p.dtype) if group['cautious'] else 1 - decay)
                p.sub_(update.mul_(lr))

    def _momentum(self, p: Any, factor: float) -> Tensor:
        """Adds the gradient to the momentum. Returns this rank's rows of Nesterov's mean of the two."""
        if 'momentum_buffer' not in self.state[p]:
            self.state[p]['momentum_buffer'] = torch.zeros_like(p)
        momentum, grad = self.state[p]['momentum_buffer'], p.grad
        if isinstance(p, DTensor):
            momentum, grad = momentum.to_local(), grad.to_local()
        if self.found_inf is not None:
            grad = momentum.where(self.found_inf > 0, grad)  # leaves the momentum as it is
        momentum.lerp_(grad, 1 - factor)
        return grad.lerp(momentum, factor)


def muon_groups(model: nn.Module, cfg: OptimizerConfig) -> list[dict[str, Any]]:
    """The parameter groups of `Muon`: matrices in blocks, by the rows of their parts, and all other parameters.

    Blocks are what the model's `fsdp_wrap_fn` selects. A module tells the parts of its fused matrices by an attribute
    `fused_rows`: the name of a parameter → the rows of each part. Raises UserError where blocks hold no matrix.
    """
    is_block = getattr(model, 'fsdp_wrap_fn', lambda module: False)
    matrices = {p: () for block in model.modules() if is_block(block) for p in block.parameters() if p.dim() == 2}
    for module in model.modules():
        for name, rows in getattr(module, 'fused_rows', {}).items():
            if (p := module.get_parameter(name)) in matrices:
                matrices[p] = tuple(rows)
    if not matrices:
        raise UserError("optimizer.name: 'muon' trains the matrices of the blocks that fsdp_wrap_fn selects, and "
                        f'{type(model).__name__} has none; set optimizer.name=adamw')
    own: dict[str, Any] = {'momentum': cfg.momentum, 'cautious': cfg.cautious}
    groups = [{'params': [p for p in matrices if matrices[p] == rows], 'rows': rows, **own}
              for rows in dict.fromkeys(matrices.values())]
    return [*groups, {'params': [p for p in model.parameters() if p not in matrices]}]


# ---------------------------------------------------------------- what a run calls
class WarmupStableDecay(ComposerScheduler):
    """Linear warm-up to the peak, the peak, then decay to `alpha_f` times it (Hu et al. 2024, MiniCPM, section 4).

    `cooldown` is the part of the run that decays, at its end, in a straight line or as 1 - sqrt (Haegele et al. 2024,
    https://arxiv.org/abs/2405.18392). Before it, the schedule does not depend on the length of the run: a longer run
    can go on from there.
    """

    def __init__(self, t_warmup: str, alpha_f: float, cooldown: float, shape: str):
        self.warmup = composer.optim.ConstantWithWarmupScheduler(t_warmup)
        self.elapsed = composer.optim.LinearScheduler(0.0, 1.0)  # the part of the run that is over
        self.alpha_f, self.cooldown, self.shape = alpha_f, cooldown, shape

    def __call__(self, state: State, ssr: float = 1.0) -> float:
        passed = max(0.0, 1 - (1 - self.elapsed(state, ssr)) / self.cooldown)  # part of the cool-down that is over
        decay = passed ** 0.5 if self.shape == '1-sqrt' else passed
        return min(self.warmup(state, ssr), 1 - (1 - self.alpha_f) * decay)


def build_optimizer(cfg: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Builds `decoupled_adamw` (weight decay independent of the peak learning rate), `adamw` or `muon` (times it).

    Raises UserError where the model has no matrices for Muon.
    """
    cls = {'decoupled_adamw': DecoupledAdamW, 'adamw': AdamW, 'muon': Muon}[cfg.name]
    betas: Any = tuple(cfg.betas)
    params: Any = muon_groups(model, cfg) if cfg.name == 'muon' else model.parameters()
    optimizer = cls(params, lr=cfg.lr, betas=betas, eps=cfg.eps, weight_decay=cfg.weight_decay)
    optimizer.fuses = cfg.fused
    return optimizer


def build_scheduler(cfg: SchedulerConfig) -> ComposerScheduler:
    """Builds a schedule: linear warm-up to the peak, then one of four courses to the end of the run."""
    if cfg.name == 'cosine_with_warmup':
        return composer.optim.CosineAnnealingWithWarmupScheduler(cfg.t_warmup, t_max=cfg.t_max, alpha_f=cfg.alpha_f)
    if cfg.name == 'linear_decay_with_warmup':
        return composer.optim.LinearWithWarmupScheduler(cfg.t_warmup, t_max=cfg.t_max, alpha_f=cfg.alpha_f)
    if cfg.name == 'warmup_stable_decay':
        return WarmupStableDecay(cfg.t_warmup, cfg.alpha_f, cfg.cooldown, cfg.cooldown_shape)
    return composer.optim.ConstantWithWarmupScheduler(cfg.t_warmup, t_max=cfg.t_max)


class OptimizerSettings(Callback):
    """Makes a resumed run use the optimizer settings of its config, which loading replaces by the checkpoint's.

    `new_schedule` says whether the config's learning-rate schedule differs from the checkpoint's. If it does not, the
    learning rate of the first batch stays exactly the checkpoint's.
    """

    def __init__(self, new_schedule: bool = False):
        self._new_schedule = new_schedule

    def before_load(self, state: State, logger: Logger) -> None:
        groups = state.optimizers[0].param_groups
        # Only keys that are settings: others may be state of the optimizer. `initial_lr` is the peak learning rate and
        # `lr` follows from it. The optimizer sets `fused` at each step. `rows` follows from the model, and torch drops
        # an empty tuple when it loads a full checkpoint into shards.
        keys = {'initial_lr', 'rows', *OptimizerConfig.model_fields} - {'lr', 'fused'}
        self._settings = [{key: value for key, value in group.items() if key in keys} for group in groups]

    def after_load(self, state: State, logger: Logger) -> None:
        groups = state.optimizers[0].param_groups
        for group, settings in zip(groups, self._settings, strict=True):
            group['lr'] *= settings['initial_lr'] / group['initial_lr']  # keeps the schedule's factor
            group.update(settings)
        for scheduler in state.schedulers:
            scheduler.base_lrs = [group['initial_lr'] for group in groups]
            if self._new_schedule:
                scheduler.step()  # Composer's schedulers compute the learning rate from the state's timestamp
