"""The timers of the benchmark: a stopwatch for runs of the Trainer, and bare PyTorch loops to compare with."""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Optional

import torch
from composer.core import Callback, Event, Precision, State, get_precision_context
from composer.loggers import Logger
from composer.utils import dist
from torch import nn
from transformers import AutoModelForCausalLM

from src.checkpoints.hf_layout import twin_config
from src.common.errors import UserError
from src.common.progress import progress
from src.config.derived import compile_scope, resolve_precision
from src.config.schema import Config, ModernGPTConfig, MosaicGPTConfig
from src.loader.batch_form import split_batch
from src.model_registry import COMPOSER_MODEL_REGISTRY

PARTS = ('data', 'forward', 'backward', 'update', 'rest')
BEGINS = {Event.BEFORE_DATALOADER: 'data', Event.BEFORE_FORWARD: 'forward', Event.BEFORE_BACKWARD: 'backward',
          Event.AFTER_BACKWARD: 'update'}
ENDS = {Event.AFTER_DATALOADER: 'data', Event.AFTER_FORWARD: 'forward', Event.AFTER_BACKWARD: 'backward',
        Event.BATCH_END: 'update'}
PROFILED = 3  # steps


def now(part: str = '') -> Any:
    """Returns a point in time: a CUDA event or, on a CPU and for the part `data`, the clock of the host."""
    if part == 'data' or not torch.cuda.is_available():
        return time.perf_counter()
    event: Any = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(begin: Any, end: Any) -> float:
    return begin.elapsed_time(end) if isinstance(begin, torch.cuda.Event) else 1000 * (end - begin)


def reset_peak_memory() -> None:
    """Restarts the measurement of peak memory: of the GPU, or of this process (`ru_maxrss`)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):  # only Linux has this file
        Path('/proc/self/clear_refs').write_text('5')


def milliseconds_of(call: Callable[[], Any]) -> float:
    """The time of a call, until the GPU has finished."""
    start = now()
    call()
    end = now()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return milliseconds(start, end)


class Stopwatch(Callback):
    """Times the steps of a run and their parts: by the clock on a CPU, by events in the GPU's queue on a GPU.

    A step begins where the previous one ended. `data` is the time that the host waits for the loader; `forward` and
    `backward` are sums over the microbatches; `update` lasts from the last backward pass to the end of the step
    (clipping, check for finite values, optimizer, logs); `rest` is the remaining time. Put this callback last.

    The first `warmup` steps do not count, the next `steps` do. `rivals` are other training loops, by name: after each
    step, each of them trains on the same batch and is timed separately. `trace` is the file for a Chrome trace of
    PROFILED more steps.
    """

    def __init__(self, warmup: int, steps: int, rivals: dict[str, 'BareLoop'], trace: Optional[Path] = None):
        self.warmup, self.steps, self.rivals, self.trace = warmup, steps, rivals, trace
        self.timed: list[dict[str, list[tuple[Any, Any]]]] = []  # for each step: part → its begins and ends
        self.baseline_ms: dict[str, list[float]] = {name: [] for name in rivals}
        self.table = ''
        self._begun: dict[str, Any] = {}
        self._step: dict[str, list[tuple[Any, Any]]] = {}
        self._profiler: Any = None

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        if event in ENDS:
            self._end(ENDS[event])
        if event is Event.BEFORE_TRAIN_BATCH:  # fires again if a microbatch did not fit: drop that try
            self._step = {'data': self._step.get('data', [])}
        if event in BEGINS:
            self._begun[BEGINS[event]] = now(BEGINS[event])
        super().run_event(event, state, logger)

    def _end(self, part: str) -> None:
        self._step.setdefault(part, []).append((self._begun[part], now(part)))

    def fit_start(self, state: State, logger: Logger) -> None:
        assert state.max_duration is not None
        self._bar = progress('steps', int(state.max_duration.value), ' steps')
        self._begun['total'] = now()

    def batch_end(self, state: State, logger: Logger) -> None:
        self._end('total')
        self._bar.update()  # between two steps, where the rivals run too
        done, last = int(state.timestamp.batch), self.warmup + self.steps
        if done <= last:
            baseline_ms = {name: milliseconds_of(lambda rival=rival: rival.step(state.batch))
                           for name, rival in self.rivals.items()}
            if done > self.warmup:
                self.timed.append(self._step)
                for name, ms in baseline_ms.items():
                    self.baseline_ms[name].append(ms)
        if done == self.warmup:
            reset_peak_memory()
        if done == last and self.trace:
            self._profiler = torch.profiler.profile()
            self._profiler.start()
        self._step = {}
        self._begun['total'] = now()

    def fit_end(self, state: State, logger: Logger) -> None:
        self._bar.close()
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler.export_chrome_trace(str(self.trace))
            order = f'self_{"cuda" if torch.cuda.is_available() else "cpu"}_time_total'
            self.table = self._profiler.key_averages().table(order, row_limit=20, max_name_column_width=60)

    def milliseconds(self) -> list[dict[str, float]]:
        """The milliseconds of each timed step: `total` and the PARTS."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        out = []
        for step in self.timed:
            ms = {part: sum(milliseconds(*pair) for pair in pairs) for part, pairs in step.items()}
            out.append(ms | {'rest': 2 * ms['total'] - sum(ms.values())})
        return out


class BareLoop:
    """A plain PyTorch training loop: microbatches, gradient clipping, and fused AdamW whatever the run's optimizer.

    `loss` is called with the model and a microbatch, a mapping as the loader returns it. Microbatch, precision and
    learning rate are those of the run.
    """

    def __init__(self, model: nn.Module, loss: Callable[[Any, Any], torch.Tensor], c: Config):
        self.device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
        self.model, self.loss = model.to(self.device).train(), loss
        self.microbatch = int(c.device_train_microbatch_size)
        self.precision = Precision(resolve_precision(c.precision, torch.cuda.is_available()))
        o = c.optimizer
        self.optimizer = torch.optim.AdamW(model.parameters(), o.lr, (o.betas[0], o.betas[1]), o.eps, o.weight_decay,
                                           fused=True)

    def step(self, batch: Any) -> None:
        rows = len(batch['input_ids'])
        for part in split_batch(batch, self.microbatch):
            part = {key: x.to(self.device) if isinstance(x, torch.Tensor) else x for key, x in part.items()}
            with get_precision_context(self.precision):
                loss = self.loss(self.model, part)
            (loss * (len(part['input_ids']) / rows)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def hf_loss(model: Any, part: Any) -> torch.Tensor:
    ids = part['input_ids']
    return model(input_ids=ids, labels=part['labels'][:, :ids.shape[1]], attention_mask=part.get('attention_mask')).loss


def build_baselines(names: list[str], c: Config) -> dict[str, BareLoop]:
    """Builds the loops to compare with. `bare` trains the run's model, `hf` Hugging Face's GPT-2 or Qwen3 of its shape.

    Where the run is compiled, torch.compile compiles the whole model of each loop with its defaults: `backend`, `mode`
    and `options` of `compile_config` do not apply. Raises UserError if the run uses a feature that the loop or the
    model of Hugging Face does not have.
    """
    rivals, m = {}, c.model
    if names and (dist.get_world_size() > 1 or c.device_train_microbatch_size == 'auto' or c.fsdp_config):
        raise UserError('--against: a bare loop needs one device, fsdp_config=null, and a number for '
                        'device_train_microbatch_size')
    if 'hf' in names:
        if (type(m) is not MosaicGPTConfig and type(m) is not ModernGPTConfig) or m.attn_within_document:
            raise UserError('--against hf: only mosaic_gpt and modern_gpt without attn_within_document have an equal '
                            'model in Hugging Face; use --against bare')
        rivals['hf'] = BareLoop(AutoModelForCausalLM.from_config(twin_config(m, use_cache=False)), hf_loss, c)
    if 'bare' in names:
        model = COMPOSER_MODEL_REGISTRY[m.name](m.model_copy(update={'device': 'cpu'}) if hasattr(m, 'device') else m)
        rivals['bare'] = BareLoop(model, lambda model, part: model(part)['loss'], c)
    for rival in rivals.values() if compile_scope(c.compile_config, torch.cuda.is_available()) else ():
        rival.model.compile()
    return rivals
