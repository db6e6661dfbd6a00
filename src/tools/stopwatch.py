"""What a benchmark times with: a stopwatch for runs of the Trainer, and bare PyTorch loops to hold them against."""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Optional

import torch
from composer.core import Callback, Precision, State, get_precision_context
from composer.loggers import Logger
from composer.utils import dist
from torch import nn

from src.common.errors import UserError
from src.common.progress import progress
from src.config.derived import resolve_precision
from src.config.schema import Config, MosaicGPTConfig
from src.loader.batch_form import split
from src.model_registry import COMPOSER_MODEL_REGISTRY

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
        self.timed: list[dict[str, list[tuple[Any, Any]]]] = []  # for each step, the beginning and the end of each part
        self.rival_ms: dict[str, list[float]] = {name: [] for name in rivals}
        self.table = ''
        self._begun: dict[str, Any] = {}
        self._step: dict[str, list[tuple[Any, Any]]] = {}
        self._profiler: Any = None

    def _begin(self, part: str) -> None:
        self._begun[part] = time.perf_counter() if part == 'data' else now()  # for data the host waits, not the GPU

    def _end(self, part: str) -> None:
        self._step.setdefault(part, []).append((self._begun[part], time.perf_counter() if part == 'data' else now()))

    def before_dataloader(self, state: State, logger: Logger) -> None:  # once more where an epoch ends
        if 'total' not in self._begun:
            self._begin('total')
        self._begin('data')

    def after_dataloader(self, state: State, logger: Logger) -> None:
        self._end('data')

    def before_train_batch(self, state: State, logger: Logger) -> None:  # once more after a microbatch that did not fit
        self._step = {'data': self._step.get('data', [])}

    def before_forward(self, state: State, logger: Logger) -> None:
        self._begin('forward')

    def after_forward(self, state: State, logger: Logger) -> None:
        self._end('forward')

    def before_backward(self, state: State, logger: Logger) -> None:
        self._begin('backward')

    def after_backward(self, state: State, logger: Logger) -> None:
        self._end('backward')
        self._begin('update')

    def batch_end(self, state: State, logger: Logger) -> None:
        self._end('update')
        self._end('total')
        self._bar.update()  # between two steps, as the rivals are
        done = int(state.timestamp.batch)
        timed = self.warmup < done <= self.warmup + self.steps
        if timed:
            self.timed.append(self._step)
        if done <= self.warmup + self.steps:
            for name, rival in self.rivals.items():
                ms = milliseconds_of(lambda rival=rival: rival.step(state.batch))
                self.rival_ms[name] += [ms] if timed else []
        if done == self.warmup:
            reset_peak_memory()
        if done == self.warmup + self.steps and self.trace:
            self._profiler = torch.profiler.profile()
            self._profiler.start()
        self._step = {}
        self._begin('total')

    def fit_start(self, state: State, logger: Logger) -> None:
        assert state.max_duration is not None
        self._bar = progress('steps', int(state.max_duration.value), ' steps')

    def fit_end(self, state: State, logger: Logger) -> None:
        self._bar.close()
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler.export_chrome_trace(str(self.trace))
            kind = 'cuda' if torch.cuda.is_available() else 'cpu'
            self.table = self._profiler.key_averages().table(f'self_{kind}_time_total', row_limit=20, max_name_column_width=60)

    def milliseconds(self) -> list[dict[str, float]]:
        """For each step `total` and the PARTS."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return [_parts(step) for step in self.timed]


def now() -> Any:
    """A moment: of the clock, or in the GPU's queue."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event: Any = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _parts(step: dict[str, list[tuple[Any, Any]]]) -> dict[str, float]:
    def between(a: Any, b: Any) -> float:
        return a.elapsed_time(b) if isinstance(a, torch.cuda.Event) else 1000 * (b - a)

    out = {part: sum(between(*pair) for pair in pairs) for part, pairs in step.items()}
    out['rest'] = 2 * out['total'] - sum(out.values())
    return out


def milliseconds_of(call: Callable[[], Any]) -> float:
    """Until the GPU has finished too."""
    def seconds() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    start = seconds()
    call()
    return 1000 * (seconds() - start)


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
        model: Whose loss it is.
        loss: Called with the model and a microbatch, a mapping as the loader makes it.
        c: The same microbatch, precision and learning rate as the run's.
    """

    def __init__(self, model: nn.Module, loss: Callable[[Any, Any], torch.Tensor], c: Config):
        self.device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
        self.model, self.loss = model.to(self.device).train(), loss
        self.microbatch = int(c.device_train_microbatch_size)
        self.precision = Precision(resolve_precision(c.precision, torch.cuda.is_available()))
        o = c.optimizer
        self.optimizer = torch.optim.AdamW(model.parameters(), o.lr, (o.betas[0], o.betas[1]), o.eps, o.weight_decay, fused=True)

    def step(self, batch: Any) -> None:
        rows = len(batch['input_ids'])
        for part in split(batch, self.microbatch):
            part = {key: x.to(self.device) if isinstance(x, torch.Tensor) else x for key, x in part.items()}
            with get_precision_context(self.precision):
                loss = self.loss(self.model, part)
            (loss * (len(part['input_ids']) / rows)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def build_rivals(names: list[str], c: Config) -> dict[str, BareLoop]:
    """`bare`: the run's own model; `hf`: Hugging Face GPT-2 of its shape.

    Raises:
        UserError: The run does what a bare loop does not, or has no like.
    """
    if not names:
        return {}
    if dist.get_world_size() > 1 or c.device_train_microbatch_size == 'auto' or c.compile_config or c.fsdp_config:
        raise UserError('--against: a bare loop has one device, a number as device_train_microbatch_size, and neither '
                        'compile_config nor fsdp_config; set both to null')
    rivals, m = {}, c.model
    if 'hf' in names:
        if type(m) is not MosaicGPTConfig or m.attn_within_document:
            raise UserError('--against hf: Hugging Face has no like of this model; of mosaic_gpt without attn_within_document '
                            'it has')
        from transformers import GPT2Config, GPT2LMHeadModel

        shape = GPT2Config(vocab_size=m.vocab_size, n_positions=m.max_seq_len, n_embd=m.d_model, n_layer=m.n_layers,
                           n_head=m.n_heads, n_inner=m.mlp_ratio * m.d_model, initializer_range=m.init_std,
                           activation_function='gelu' if m.mlp_act == 'gelu' else 'gelu_pytorch_tanh',
                           attn_pdrop=m.attn_pdrop, resid_pdrop=m.resid_pdrop, embd_pdrop=m.emb_pdrop, use_cache=False,
                           attn_implementation='sdpa', bos_token_id=0, eos_token_id=0)

        def loss(model: Any, part: Any) -> torch.Tensor:
            ids = part['input_ids']
            return model(input_ids=ids, labels=part['labels'][:, :ids.shape[1]], attention_mask=part.get('attention_mask')).loss

        rivals['hf'] = BareLoop(GPT2LMHeadModel(shape), loss, c)
    if 'bare' in names:
        model = COMPOSER_MODEL_REGISTRY[m.name](m.model_copy(update={'device': 'cpu'}) if hasattr(m, 'device') else m)
        rivals['bare'] = BareLoop(model, lambda model, part: model(part)['loss'], c)
    return rivals
