"""What a benchmark times with: a stopwatch for runs of the Trainer, and bare PyTorch loops to hold them against."""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Optional

import torch
from composer.core import Callback, State, get_precision_context
from composer.loggers import Logger
from composer.utils import dist
from torch import nn

from src import builders
from src.causal_lm import next_token_targets
from src.errors import UserError
from src.mosaic_gpt import MosaicGPT
from src.schema import Config, MosaicGPTConfig

PARTS = ('data', 'forward', 'backward', 'update', 'rest')
PROFILED = 3  # steps


class Stopwatch(Callback):
    """Times the steps of a run and their parts: by the clock on a CPU, by events in the GPU's own queue on a GPU.

    A step begins where the one before ended. `data` is what the host waits for the loader; `forward` and `backward` are sums
    over the microbatches; `update` is from the last backward pass to the end of the step: clipping, guard, optimizer, logs;
    `rest` is what remains. The last of the callbacks.

    Args:
        warmup: Steps that are not kept.
        steps: Steps that are.
        rivals: Steps of other loops, by name, taken after each step with its batch, and timed alone.
        trace: Where a Chrome trace of PROFILED more steps goes.
    """

    def __init__(self, warmup: int, steps: int, rivals: dict[str, 'BareLoop'], trace: Optional[Path] = None):
        self.warmup, self.steps, self.rivals, self.trace = warmup, steps, rivals, trace
        self.timelines: list[list[tuple[str, Any]]] = []
        self.rival_ms: dict[str, list[float]] = {name: [] for name in rivals}
        self.table = ''
        self._marks: list[tuple[str, Any]] = []
        self._profiler: Any = None

    def _mark(self, name: str) -> None:
        moment: Any = time.perf_counter()
        if torch.cuda.is_available():
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self._marks.append((name, moment))

    def before_dataloader(self, state: State, logger: Logger) -> None:
        if not self._marks:
            self._mark('start')
        self._marks.append(('data', time.perf_counter()))  # the host waits, not the GPU

    def after_dataloader(self, state: State, logger: Logger) -> None:
        self._marks.append(('data', time.perf_counter()))

    def before_forward(self, state: State, logger: Logger) -> None:
        self._mark('forward')

    def after_forward(self, state: State, logger: Logger) -> None:
        self._mark('forward')

    def before_backward(self, state: State, logger: Logger) -> None:
        self._mark('backward')

    def after_backward(self, state: State, logger: Logger) -> None:
        self._mark('backward')

    def batch_end(self, state: State, logger: Logger) -> None:
        self._mark('end')
        done = int(state.timestamp.batch)
        if self.warmup < done <= self.warmup + self.steps:
            self.timelines.append(self._marks)
        for name, rival in self.rivals.items():
            ms = timed(lambda rival=rival: rival.step(state.batch))
            if self.warmup < done <= self.warmup + self.steps:
                self.rival_ms[name].append(ms)
        if done == self.warmup:
            reset_peak_memory()
        if done == self.warmup + self.steps and self.trace:
            self._profiler = torch.profiler.profile()
            self._profiler.start()
        self._marks = []
        self._mark('start')

    def fit_end(self, state: State, logger: Logger) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler.export_chrome_trace(str(self.trace))
            kind = 'cuda' if torch.cuda.is_available() else 'cpu'
            self.table = self._profiler.key_averages().table(f'self_{kind}_time_total', row_limit=20, max_name_column_width=60)

    def milliseconds(self) -> list[dict[str, float]]:
        """For each step `total` and the PARTS."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return [_parts(marks) for marks in self.timelines]


def _parts(marks: list[tuple[str, Any]]) -> dict[str, float]:
    def between(a: Any, b: Any) -> float:
        return a.elapsed_time(b) if isinstance(a, torch.cuda.Event) else 1000 * (b - a)

    times = {name: [moment for n, moment in marks if n == name] for name in ('start', 'end', 'data', 'forward', 'backward')}
    out = {name: sum(between(a, b) for a, b in zip(times[name][::2], times[name][1::2], strict=True))
           for name in ('data', 'forward', 'backward')}
    out['total'] = between(times['start'][0], times['end'][0])
    out['update'] = between(times['backward'][-1], times['end'][0])
    out['rest'] = out['total'] - sum(out[name] for name in PARTS if name in out)
    return out


def timed(call: Callable[[], Any]) -> float:
    """Milliseconds, until the GPU has finished too."""
    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    start = now()
    call()
    return 1000 * (now() - start)


def reset_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):  # Linux alone has it
            Path('/proc/self/clear_refs').write_text('5')


def peak_memory() -> Optional[int]:
    """Bytes: allocated on the GPU, or of this process on a CPU, where the rivals count too; None where nobody knows."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with suppress(OSError):
        found = [line for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('VmHWM')]
        return int(found[0].split()[1]) * 1024
    return None


# ---------------------------------------------------------------- rivals


class BareLoop:
    """A training loop as PyTorch's tutorials have it: microbatches, clipping, fused AdamW.

    Args:
        model: Called with `input_ids` and `labels` of shape (batch, seq), returns the loss.
        c: The same microbatch, precision and learning rate as the run's.
    """

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Any], torch.Tensor], c: Config):
        self.device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
        self.model, self.loss = model.to(self.device).train(), loss
        self.microbatch = int(c.device_train_microbatch_size)
        self.precision = builders.resolve_precision(c.precision, torch.cuda.is_available())
        o = c.optimizer
        self.optimizer = torch.optim.AdamW(model.parameters(), o.lr, (o.betas[0], o.betas[1]), o.eps, o.weight_decay, fused=True)

    def step(self, batch: Any) -> None:
        rows = len(batch['input_ids'])
        for start in range(0, rows, self.microbatch):
            part = {key: batch[key][start:start + self.microbatch].to(self.device) for key in ('input_ids', 'labels')}
            with get_precision_context(self.precision):
                loss = self.loss(self.model, part)
            (loss * (len(part['input_ids']) / rows)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def build_rivals(names: list[str], c: Config) -> dict[str, BareLoop]:
    """Raises UserError where the run has no like."""
    if not names:
        return {}
    if dist.get_world_size() > 1 or not isinstance(c.model, MosaicGPTConfig) or c.device_train_microbatch_size == 'auto':
        raise UserError('--against: needs one device, model.name mosaic_gpt and a number as device_train_microbatch_size')
    rivals, m = {}, c.model
    if 'hf' in names:
        from transformers import GPT2Config, GPT2LMHeadModel

        shape = GPT2Config(vocab_size=m.vocab_size, n_positions=m.max_seq_len, n_embd=m.d_model, n_layer=m.n_layers,
                           n_head=m.n_heads, n_inner=m.mlp_ratio * m.d_model, initializer_range=m.init_std,
                           activation_function='gelu' if m.mlp_act == 'gelu' else 'gelu_pytorch_tanh',
                           attn_pdrop=m.attn_pdrop, resid_pdrop=m.resid_pdrop, embd_pdrop=m.emb_pdrop, use_cache=False,
                           attn_implementation='sdpa', bos_token_id=0, eos_token_id=0)
        rivals['hf'] = BareLoop(GPT2LMHeadModel(shape), lambda model, part: model(**part).loss, c)
    if 'bare' in names:
        model = MosaicGPT(m.model_copy(update={'device': 'cpu'}))

        def loss(model: nn.Module, part: Any) -> torch.Tensor:
            inputs, targets = next_token_targets(part)
            return model(inputs, targets=targets)

        rivals['bare'] = BareLoop(model, loss, c)
    return rivals
