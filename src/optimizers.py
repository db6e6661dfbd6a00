"""Optimizers and learning-rate schedules."""

from collections.abc import Callable, Iterable
from typing import Any, Optional

import composer.optim
import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.optim import ComposerScheduler

from src.config.schema import OptimizerConfig, SchedulerConfig


def _fuse(optimizer: Any) -> None:
    """Makes torch update all parameters in one kernel if `optimizer.fuses` is true and their devices can.

    Called at each step: parameters may be on meta when the optimizer is built, and a checkpoint overwrites the setting.
    """
    for group in optimizer.param_groups:
        group['fused'] = optimizer.fuses and all(p.is_floating_point() and p.device.type in ('cpu', 'cuda')
                                                 for p in group['params'])


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the next step does nothing where its tensor `found_inf` is 1: fused Adam and AdamW, here and in torch.

    False for other classes: torch's fused SGD makes its momentum in a step that it skips, and a class of your own, also
    one that is derived from these, may do more in its `step`.
    """
    is_known = type(optimizer) in (AdamW, DecoupledAdamW, torch.optim.Adam, torch.optim.AdamW)
    return is_known and all(group.get('fused') for group in optimizer.param_groups)


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


def build_optimizer(cfg: OptimizerConfig, params: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Builds `decoupled_adamw` (weight decay independent of the peak learning rate) or `adamw` (multiplied by it)."""
    cls = DecoupledAdamW if cfg.name == 'decoupled_adamw' else AdamW
    betas: Any = tuple(cfg.betas)
    optimizer = cls(params, lr=cfg.lr, betas=betas, eps=cfg.eps, weight_decay=cfg.weight_decay)
    optimizer.fuses = cfg.fused
    return optimizer


def build_scheduler(cfg: SchedulerConfig) -> ComposerScheduler:
    """Builds a schedule: linear warm-up to the peak, then cosine or linear decay to `alpha_f` times it, or no decay."""
    if cfg.name == 'cosine_with_warmup':
        return composer.optim.CosineAnnealingWithWarmupScheduler(cfg.t_warmup, t_max=cfg.t_max, alpha_f=cfg.alpha_f)
    if cfg.name == 'linear_decay_with_warmup':
        return composer.optim.LinearWithWarmupScheduler(cfg.t_warmup, t_max=cfg.t_max, alpha_f=cfg.alpha_f)
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
        # `lr` follows from it. The optimizer sets `fused` at each step.
        keys = {'initial_lr', *OptimizerConfig.model_fields} - {'lr', 'fused'}
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
