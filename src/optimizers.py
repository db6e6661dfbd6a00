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
    """Has torch update all parameters in one kernel where `fuses` says so.

    Set at each step: parameters may be on meta when they are handed over, and a checkpoint brings the value of its run.
    """
    for group in optimizer.param_groups:
        group['fused'] = optimizer.fuses and all(p.is_floating_point() and p.device.type in ('cpu', 'cuda')
                                                 for p in group['params'])


class AdamW(torch.optim.AdamW):
    """torch's, fused unless `fuses` is false."""

    fuses = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        _fuse(self)
        return super().step(closure)


class DecoupledAdamW(composer.optim.DecoupledAdamW):
    """AdamW whose weight decay does not scale with the peak learning rate (Loshchilov & Hutter 2019), fused.

    Composer's class of the same name loops over parameters. torch's fused step is the same update: it decays by
    `lr * weight_decay`, so it is given `weight_decay / initial_lr`. One name on every device, because Composer keys
    optimizer state and log entries by it.
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
    """`decoupled_adamw` (weight decay as a factor of its own) or `adamw` (times the learning rate)."""
    cls = DecoupledAdamW if cfg.name == 'decoupled_adamw' else AdamW
    betas: Any = tuple(cfg.betas)
    optimizer = cls(params, lr=cfg.lr, betas=betas, eps=cfg.eps, weight_decay=cfg.weight_decay)
    optimizer.fuses = cfg.fused
    return optimizer


def build_scheduler(cfg: SchedulerConfig) -> ComposerScheduler:
    """Linear warm-up to the peak, then cosine or linear decay to `alpha_f` of it, or none."""
    if cfg.name == 'cosine_with_warmup':
        return composer.optim.CosineAnnealingWithWarmupScheduler(cfg.t_warmup, t_max=cfg.t_max, alpha_f=cfg.alpha_f)
    if cfg.name == 'linear_decay_with_warmup':
        return composer.optim.LinearWithWarmupScheduler(cfg.t_warmup, t_max=cfg.t_max, alpha_f=cfg.alpha_f)
    return composer.optim.ConstantWithWarmupScheduler(cfg.t_warmup, t_max=cfg.t_max)


class OptimizerSettings(Callback):
    """Gives a resumed run the optimizer's settings of its config, where loading brings those of the checkpoint.

    `new_schedule` says whether the config's schedule of the learning rate differs from the checkpoint's. Where they are
    the same, the rate of the first batch is the checkpoint's to the bit.
    """

    def __init__(self, new_schedule: bool = False):
        self._new_schedule = new_schedule

    def before_load(self, state: State, logger: Logger) -> None:
        groups = state.optimizers[0].param_groups
        # Keys that a setting is named like: others may be the optimizer's state. `initial_lr` is the peak rate, `lr`
        # follows from it, and the optimizer sets `fused` at each step.
        keys = {'initial_lr', *OptimizerConfig.model_fields} - {'lr', 'fused'}
        self._asked = [{key: value for key, value in group.items() if key in keys} for group in groups]

    def after_load(self, state: State, logger: Logger) -> None:
        groups = state.optimizers[0].param_groups
        for group, asked in zip(groups, self._asked, strict=True):
            group['lr'] *= asked['initial_lr'] / group['initial_lr']  # the schedule's factor stays
            group.update(asked)
        for scheduler in state.schedulers:
            scheduler.base_lrs = [group['initial_lr'] for group in groups]
            if self._new_schedule:
                scheduler.step()  # Composer's take the rate from the state's timestamp
