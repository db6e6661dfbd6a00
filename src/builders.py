"""Optimizer, scheduler, algorithms, callbacks and loggers by their names in the YAML."""

import json
import os
import re
import textwrap
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from typing import Any, Optional

import composer.optim
import composer.profiler
import torch
from composer import algorithms, callbacks, loggers
from composer.core import Event, Precision, State
from composer.loggers import Logger
from composer.optim import ComposerScheduler
from composer.utils import MissingConditionalImportError, dist, format_name_with_dist

from src.callbacks import TextSamples, UnigramBaseline
from src.errors import UserError
from src.flops import peak_flops
from src.schema import OptimizerConfig, Plugins, SchedulerConfig


class SpeedMonitor(callbacks.SpeedMonitor):
    """Composer's, whose MFU is of the kit's own table of GPUs: a GPU that it does not name, or a part of one, has none."""

    def init(self, state: State, logger: Logger) -> None:
        if self.gpu_flops_available is None and torch.cuda.is_available():
            self.gpu_flops_available = peak_flops(torch.cuda.get_device_name(), str(state.precision.value)) or 0
        super().init(state, logger)


def _json(value: Any, indent: Optional[int] = None) -> str:
    """What a logger is given, exactly: a tensor as its number, what JSON does not know as text."""
    return json.dumps(value, indent=indent, ensure_ascii=False, default=lambda v: v.item() if hasattr(v, 'item') else str(v))


class FileLogger(loggers.FileLogger):
    """Composer's, which would empty the file of the start before: each start writes one of its own, `log.2.txt`, `log.3.txt`.

    A line for each value, in JSON, where Composer's would round to four decimals: `[metric][batch=5]: loss/train/total: 3.25`.
    """

    def log_metrics(self, metrics: dict[str, float], step: Optional[int] = None) -> None:
        for name, value in metrics.items():
            self._line(f'[metric][batch={step}]: {name}: {_json(value)}')

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        for name, value in hyperparameters.items():
            self._line(f'[hyperparameter]: {name}: {_json(value)}')

    def log_table(self, columns: list[str], rows: list[list[Any]], name: str = 'Table', step: Optional[int] = None) -> None:
        self._line(f'[table][batch={step}]: {name}: {_json([dict(zip(columns, row)) for row in rows])}')

    def _line(self, text: str) -> None:
        self.write('', ('' if self._is_newline else '\n') + text + '\n')  # what is printed may stop in the middle of a line

    def init(self, state: State, logger: Logger) -> None:
        stem, ending = os.path.splitext(self.filename_format)
        start = 1
        while os.path.exists(format_name_with_dist(self.filename_format, state.run_name)):
            start += 1
            self.filename_format = f'{stem}.{start}{ending}'
        super().init(state, logger)


class TensorboardLogger(loggers.TensorboardLogger):
    """Composer's, whose hyperparameters are rounded and wait for an evaluation; here they and tables are texts of JSON too."""

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        super().log_hyperparameters(hyperparameters)
        self._waiting: dict[str, Any] = {**getattr(self, '_waiting', {}), **hyperparameters}
        if self.writer is not None:
            self._text('hyperparameters', self._waiting, 0)
            self._waiting = {}

    def log_table(self, columns: list[str], rows: list[list[Any]], name: str = 'Table', step: Optional[int] = None) -> None:
        self._text(name, [dict(zip(columns, row)) for row in rows], step)

    def _text(self, name: str, value: Any, step: Optional[int]) -> None:
        if self.writer is not None and not (self.rank_zero_only and dist.get_global_rank()):
            self.writer.add_text(name, textwrap.indent(_json(value, indent=1), '    '), step)  # indented: Markdown's code


class WandBLogger(loggers.WandBLogger):
    """Composer's, which would end a run that goes on with another setting or on other devices."""

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        if self._enabled:
            import wandb
            wandb.config.update(hyperparameters, allow_val_change=True)

def unused(folder: str, run_name: str) -> str:
    """The folder, as Composer spells it; with `.2`, `.3` where an earlier start has left its files."""
    name, start = folder, 1
    while any(path.is_file() for path in Path(format_name_with_dist(name, run_name)).rglob('*')):
        start += 1
        name = f'{folder.rstrip("/")}.{start}'
    return name


class MemorySnapshot(callbacks.MemorySnapshot):
    """Composer's, with a folder for each start."""

    def init(self, state: State, logger: Logger) -> None:
        self.folder = self.folder if self.overwrite else unused(self.folder, state.run_name)
        super().init(state, logger)


class OOMObserver(callbacks.OOMObserver):
    """Composer's, with a folder for each start."""

    def __init__(self, max_entries: int = 100000, folder: str = '{run_name}/oom_traces', filename: str = 'rank{rank}_oom',
                 remote_file_name: Optional[str] = '{run_name}/oom_traces/rank{rank}_oom', overwrite: bool = False) -> None:
        super().__init__(max_entries, folder, filename, remote_file_name, overwrite)  # not memory_snapshot's folder

    def init(self, state: State, logger: Logger) -> None:
        self.folder = self.folder if self.overwrite else unused(self.folder, state.run_name)
        super().init(state, logger)


class TorchProfiler(composer.profiler.TorchProfiler):
    """Composer's, without the metadata that torch would warn of after each batch that is not profiled."""

    def batch_end(self, state: State, logger: Logger) -> None:
        assert self.profiler
        self.profiler.step()


class NoMarker(nullcontext):
    """In place of Composer's marks of events, which nothing writes."""

    def start(self) -> None:
        pass

    def finish(self) -> None:
        pass


class Profiler(composer.profiler.Profiler):
    """Composer's, which writes torch's Chrome traces, one a rank and cycle, with `forward`, `loss` and `backward` in them.

    Composer's own handler is left out: it merges clocks that are decades apart, and drops the batch that it saves after.

    Args:
        folder: Where they go; each start of a run has one of its own.
        skip_first: Batches of each epoch, or of what a resumed run has left of one, before the first cycle.
        wait: Batches of a cycle that are not looked at.
        warmup: Batches after them that are profiled and thrown away.
        active: Batches after those that are kept.
        repeat: Cycles in each epoch; 0: until it ends.
        record_shapes: Of each operator's inputs.
        profile_memory: What each operator takes and gives back.
        with_stack: Where in the code each was called; slow.
    """

    def __init__(self, folder: str = 'traces/{run_name}', skip_first: int = 10, wait: int = 0, warmup: int = 1, active: int = 3,
                 repeat: int = 1, record_shapes: bool = False, profile_memory: bool = False, with_stack: bool = False):
        counts = {'skip_first': skip_first, 'wait': wait, 'warmup': warmup, 'active': active, 'repeat': repeat}
        for name, value in counts.items():
            if value < (name in ('warmup', 'active')):
                raise ValueError(f'{name}: {value} must be at least {int(name in ("warmup", "active"))}')
        super().__init__(composer.profiler.cyclic_schedule(**counts), [], sys_prof_cpu=False)
        self.torch_profiler = TorchProfiler(folder, remote_file_name=None, record_shapes=record_shapes,
                                            profile_memory=profile_memory, with_stack=with_stack)
        self._callbacks = [self.torch_profiler]
        self._ranges: dict[str, torch.profiler.record_function] = {}

    def marker(self, *args: Any, **kwargs: Any) -> Any:
        return NoMarker()  # Composer's own fail where a resumed run drops batches that it has seen

    def init(self, state: State, logger: Logger) -> None:
        self.torch_profiler.folder = unused(self.torch_profiler.folder, state.run_name)

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        super().run_event(event, state, logger)
        name = event.canonical_name
        if name in ('forward', 'loss', 'backward') and event.is_before_event:
            self._ranges[name] = torch.profiler.record_function(name)
            self._ranges[name].__enter__()
        elif name in self._ranges and event.is_after_event:
            self._ranges.pop(name).__exit__(None, None, None)


ALGORITHMS = {
    'gradient_clipping': algorithms.GradientClipping,
    'ema': algorithms.EMA,
    'low_precision_layernorm': algorithms.LowPrecisionLayerNorm,
    'swa': algorithms.SWA,
}
CALLBACKS = {
    'speed_monitor': SpeedMonitor,
    'lr_monitor': callbacks.LRMonitor,
    'memory_monitor': callbacks.MemoryMonitor,
    'runtime_estimator': callbacks.RuntimeEstimator,
    'optimizer_monitor': callbacks.OptimizerMonitor,
    'system_metrics_monitor': callbacks.SystemMetricsMonitor,
    'nan_monitor': callbacks.NaNMonitor,
    'early_stopper': callbacks.EarlyStopper,
    'memory_snapshot': MemorySnapshot,
    'oom_observer': OOMObserver,
    'profiler': Profiler,
    'unigram_baseline': UnigramBaseline,
    'text_samples': TextSamples,
}
LOGGERS = {
    'wandb': WandBLogger,
    'tensorboard': TensorboardLogger,
    'cometml': loggers.CometMLLogger,
    'mlflow': loggers.MLFlowLogger,
    'neptune': loggers.NeptuneLogger,
    'file': FileLogger,
}
REGISTRIES = {'algorithms': ALGORITHMS, 'callbacks': CALLBACKS, 'loggers': LOGGERS}
PACKAGES = {'wandb': 'wandb', 'tensorboard': 'tensorboard', 'cometml': 'comet_ml', 'mlflow': 'mlflow', 'neptune': 'neptune'}


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
    settings: dict[str, Any] = {'lr': cfg.lr, 'betas': tuple(cfg.betas), 'eps': cfg.eps, 'weight_decay': cfg.weight_decay}
    optimizer = DecoupledAdamW(params, **settings) if cfg.name == 'decoupled_adamw' else AdamW(params, **settings)
    optimizer.fuses = cfg.fused
    return optimizer


def build_scheduler(cfg: SchedulerConfig) -> ComposerScheduler:
    """Linear warm-up to the peak, then cosine or linear decay to `alpha_f` of it, or none."""
    if cfg.name == 'cosine_with_warmup':
        return composer.optim.CosineAnnealingWithWarmupScheduler(cfg.t_warmup, t_max=cfg.t_max, alpha_f=cfg.alpha_f)
    if cfg.name == 'linear_decay_with_warmup':
        return composer.optim.LinearWithWarmupScheduler(cfg.t_warmup, t_max=cfg.t_max, alpha_f=cfg.alpha_f)
    return composer.optim.ConstantWithWarmupScheduler(cfg.t_warmup, t_max=cfg.t_max)


def build_all(section: str, chosen: Plugins) -> list[Any]:
    """The entries of `algorithms`, `callbacks` or `loggers`, in order; one that is `false` is left out.

    Raises:
        UserError: A package is not installed, or a value is refused by the class.
    """
    built = []
    for name, kwargs in chosen.items():
        if kwargs is False:
            continue
        try:
            built.append(REGISTRIES[section][name](**(kwargs or {})))
        except (ImportError, MissingConditionalImportError):
            raise UserError(f'{section}.{name}: its package is not installed; pip install {PACKAGES.get(name, name)}, '
                            f'or remove {name} from {section}') from None
        except (ValueError, TypeError) as e:
            raise UserError(f'{section}.{name}: {e}') from None
    return built


def resume_wandb(chosen: Plugins, run_name: str, save_folder: str) -> Plugins:
    """Gives W&B an id of the run, so that each start of it goes on in one W&B run; an id of the user's own stays."""
    wandb = chosen.get('wandb', False)
    if wandb is False:
        return chosen
    save_folder = save_folder if '://' in save_folder else os.path.abspath(save_folder)
    identity = f'{re.sub(r"[^A-Za-z0-9_-]", "-", run_name)[:48]}-{sha256(save_folder.encode()).hexdigest()[:8]}'
    kwargs: dict[str, Any] = dict(wandb or {})
    kwargs['init_kwargs'] = {'id': identity, 'resume': 'allow'} | (kwargs.get('init_kwargs') or {})
    return {**chosen, 'wandb': kwargs}


def resolve_precision(name: str, has_gpu: bool) -> Precision:
    """`auto` is amp_bf16 on a GPU and fp32 on a CPU."""
    if name == 'auto':
        name = 'amp_bf16' if has_gpu else 'fp32'
    return Precision(name)
