"""Builds algorithms, callbacks and loggers from their names in a YAML."""

import importlib.util
import logging
from typing import Any

from src.common.errors import UserError, first_line
from src.config.plugin_entries import find_class
from src.config.schema import Config, Plugins
from src.ranks.stop import StopRequest

log = logging.getLogger('src')
WRITE_WHEN_BUILT = ('cometml', 'mlflow')  # these loggers create an experiment when they are built

# Names, and where their classes are. The names are checked before torch and Composer are imported, which takes seconds
ALGORITHMS = {
    'gradient_clipping': 'composer.algorithms:GradientClipping',
    'ema': 'composer.algorithms:EMA',
    'low_precision_layernorm': 'composer.algorithms:LowPrecisionLayerNorm',
    'swa': 'composer.algorithms:SWA',
}
CALLBACKS = {
    'speed_monitor': 'src.callbacks.metrics:SpeedMonitor',
    'lr_monitor': 'composer.callbacks:LRMonitor',
    'memory_monitor': 'composer.callbacks:MemoryMonitor',
    'runtime_estimator': 'composer.callbacks:RuntimeEstimator',
    'optimizer_monitor': 'composer.callbacks:OptimizerMonitor',
    'system_metrics_monitor': 'composer.callbacks:SystemMetricsMonitor',
    'nan_monitor': 'composer.callbacks:NaNMonitor',
    'early_stopper': 'composer.callbacks:EarlyStopper',
    'memory_snapshot': 'src.callbacks.profiling:MemorySnapshot',
    'oom_observer': 'src.callbacks.profiling:OOMObserver',
    'profiler': 'src.callbacks.profiling:Profiler',
    'unigram_baseline': 'src.callbacks.metrics:UnigramBaseline',
    'text_samples': 'src.callbacks.text_samples:TextSamples',
}
LOGGERS = {
    'wandb': 'src.callbacks.loggers:WandBLogger',
    'tensorboard': 'src.callbacks.loggers:TensorboardLogger',
    'cometml': 'composer.loggers:CometMLLogger',
    'mlflow': 'composer.loggers:MLFlowLogger',
    'neptune': 'composer.loggers:NeptuneLogger',
    'file': 'src.callbacks.loggers:FileLogger',
}
REGISTRIES: dict[str, dict[str, Any]] = {'algorithms': ALGORITHMS, 'callbacks': CALLBACKS, 'loggers': LOGGERS}
PACKAGES = {'cometml': 'comet_ml', **{name: name for name in ('wandb', 'tensorboard', 'mlflow', 'neptune')}}


def build_plugins(section: str, entries: Plugins) -> list[Any]:
    """Builds the entries of `algorithms`, `callbacks` or `loggers` in order, without those that are `false`.

    Raises UserError if a package is missing or broken, or a class refuses a value (one of Composer's classes
    by any ValueError or TypeError, another by a UserError).
    """
    built = []
    for name, kwargs in entries.items():
        if kwargs is False:
            continue
        _check_package(section, name)
        cls = find_class(REGISTRIES[section][name])
        try:
            built.append(cls(**(kwargs or {})))
        except ImportError as e:
            if name not in PACKAGES:
                raise
            raise UserError(f'{section}.{name}: its package cannot be imported: {first_line(e.__cause__ or e)}; '
                            f'pip install --force-reinstall {PACKAGES[name]}, or remove {name} from '
                            f'{section}') from None
        except (ValueError, TypeError) as e:
            if not isinstance(e, UserError) and not cls.__init__.__module__.startswith('composer.'):
                raise  # in a user's own class it may be a bug
            raise UserError(f'{section}.{name}: {e}') from None
    return built


def _check_package(section: str, name: str) -> None:
    package = PACKAGES.get(name)
    if package and importlib.util.find_spec(package) is None:
        raise UserError(f'{section}.{name}: its package is not installed; pip install {package}, or remove {name} from '
                        f'{section}')


def build_algorithms(c: Config, stop: StopRequest) -> list[Any]:
    """Builds the algorithms; the guard is last, and tells all ranks of a request to stop (see NonFiniteGuard)."""
    from src.callbacks.guard import NonFiniteGuard  # not at the top: imports Composer

    return [*build_plugins('algorithms', c.algorithms), NonFiniteGuard(c.max_nonfinite_in_a_row, stop)]


def build_callbacks(c: Config, tokenizer: Any) -> list[Any]:
    """Builds the callbacks; `tokenizer` is a Hugging Face tokenizer."""
    from src.callbacks.text_samples import TextSamples  # not at the top: imports Composer

    built = build_plugins('callbacks', c.callbacks)
    for callback in built:
        if isinstance(callback, TextSamples):
            callback.prepare(tokenizer, c.train_loader.dataset.max_seq_len)
            if c.eval_loader is None:
                log.warning('callbacks.text_samples: does nothing without eval_loader, because it writes text at each '
                            'evaluation; set eval_loader, or callbacks.text_samples=false')
    return built


def check_plugins(c: Config, tokenizer: Any) -> None:
    """Builds the callbacks and loggers to test them, without those that would write already when built.

    Raises UserError if one of them cannot be built.
    """
    build_callbacks(c, tokenizer)
    for name, kwargs in c.loggers.items():
        if name not in WRITE_WHEN_BUILT:
            build_plugins('loggers', {name: kwargs})
        elif kwargs is not False:
            _check_package('loggers', name)
