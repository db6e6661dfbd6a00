"""Traces the memory of a training step: runs the step of the real model on tensors that have shapes and no data.

The trace follows any model that `model.name` builds, with changed blocks or of a user's own. Nothing is allocated or
computed: the step of a 70B model takes seconds on any computer.
"""

import logging
import traceback
import weakref
from collections import Counter
from contextlib import ExitStack, nullcontext
from itertools import chain
from typing import Any, NamedTuple, Optional
from unittest import mock

import torch
from composer.distributed.activation_checkpointing import apply_ac, generate_composer_model_check_fn
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from src.causal_lm import ComposerCausalLM
from src.common.errors import UserError, first_line
from src.model_registry import COMPOSER_MODEL_REGISTRY
from src.sizing.gpu_rules import act_like_gpu

FORWARD, LOSS, START = 'in the forward pass', 'in the loss', 'at the start of the backward pass'
BACKWARD, UNIT_END = 'in the backward pass', 'at the end of the backward pass'
EMBEDDINGS, END = "in the embeddings' backward pass", "at the end of the embeddings' backward pass"

ATEN: Any = torch.ops.aten


class Step(NamedTuple):
    """The settings that determine the memory of a step, apart from the number of devices."""

    model: Any  # section `model` of the config
    microbatch: int
    seq_len: int
    has_gpu: bool
    autocast: Optional[torch.dtype]
    weights: torch.dtype  # of the weights that blocks compute with
    sharded: bool  # FSDP reduces and frees the gradients of a unit when the unit's backward pass ends
    accumulates: bool  # without FSDP: gradients of earlier microbatches take memory
    checkpointing: bool
    offload: bool


class Phase(NamedTuple):
    """A part of a step. `unit` is the number of the FSDP unit, in the order in which units run; -1: no unit."""

    name: str
    unit: int = -1


class Trace(NamedTuple):
    """The memory of a step."""

    model: ComposerCausalLM  # its parameters have no data
    # The peak bytes of each phase, by kind: `weights` (copies in low precision), `gradients`, `activations`, `logits`
    # (of the loss). Master weights, optimizer state, and buffers of FSDP are not counted.
    peaks: dict[Phase, Counter[str]]
    units: tuple[int, ...]  # the number of parameters of each FSDP unit, in the order in which they run

    @property
    def root(self) -> int:
        """The number of parameters outside of the units."""
        return self.model.n_params - sum(self.units)


_traces: dict[str, Trace] = {}


def trace(step: Step) -> Trace:
    """Traces the memory of a step. A step that was traced before is not run again.

    Raises UserError if the model cannot run on tensors without data.
    """
    key = f'{COMPOSER_MODEL_REGISTRY[step.model.name]} {step}'
    if key not in _traces:
        try:
            _traces[key] = _trace_step(step)
        except UserError:
            raise
        except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
            # Code and kernels of a user's model may refuse tensors without data
            where = traceback.extract_tb(e.__traceback__)[-1]
            raise UserError(
                f'model.name: the memory of {step.model.name!r} cannot be predicted. Its step without data ended '
                f'with {type(e).__name__}: {first_line(e)} ({where.filename}, line {where.lineno}). Measure the memory '
                'with src/tools/benchmark.py, or have the model use operators of PyTorch') from e
    return _traces[key]


def _trace_step(s: Step) -> Trace:
    on_host = saved_tensors_hooks(lambda x: x.to('meta'), lambda x: torch.empty_like(x, device='cpu'))
    offload = mock.patch('torch.distributed.algorithms._checkpoint.checkpoint_wrapper.save_on_cpu', lambda **_: on_host)
    with FakeTensorMode(allow_non_fake_inputs=True), ExitStack() as stack:
        model = _build_model(s.model, s.has_gpu)
        params = list(model.parameters())
        for p in params:
            p.data = p.data.to(s.weights)
        if s.checkpointing or s.offload:
            apply_ac(model, s.checkpointing, s.offload, generate_composer_model_check_fn(model))
        stack.enter_context(offload)
        stack.enter_context(mock.patch('src.causal_lm.chunk_starts', _some_chunks))
        if s.has_gpu:
            stack.enter_context(act_like_gpu())
        live = stack.enter_context(LiveBytes({p.untyped_storage()._cdata for p in params}))
        units = _add_hooks(model, live, s)
        columns = ['input_ids', 'labels', *['sequence_id'] * model.attn_within_document]
        batch = {column: torch.zeros(s.microbatch, s.seq_len, dtype=torch.long) for column in columns}
        with torch.autocast('cpu', s.autocast) if s.autocast else nullcontext():
            loss = model(batch)['loss']
        live.enter(START)
        loss.backward()
        live.enter(END)
    return Trace(model, live.peaks, tuple(sum(p.numel() for p in unit) for unit in units))


def _some_chunks(n_rows: int, chunk: int) -> list[int]:
    """The first rows of the chunks of the loss to trace. The others need as much as the third."""
    starts = range(0, n_rows, chunk)
    return sorted({*starts[:3], *starts[-1:]})


def _build_model(section: Any, has_gpu: bool) -> ComposerCausalLM:
    """The model with kernels of a CPU that save the same tensors for the backward pass as the kernels of a GPU."""
    update: dict[str, Any] = {'device': 'cpu', 'pretrained': False, 'linear_impl': 'plain'}
    if has_gpu:
        update['vocab_multiple'] = getattr(section, 'vocab_multiple', None) or 64
        if getattr(section, 'attn_impl', None) in ('auto', 'flash'):
            update |= {'attn_impl': 'sdpa', 'attn_within_document': False}
    section = section.model_copy(update={key: value for key, value in update.items() if hasattr(section, key)})
    # Silent: the model would log the name of its kernel, which the run does not use. Composer's barrier needs data.
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with mock.patch('composer.utils.dist.run_local_rank_zero_first', nullcontext):
            return COMPOSER_MODEL_REGISTRY[section.name](section)
    finally:
        logging.disable(before)


def _add_hooks(model: ComposerCausalLM, live: 'LiveBytes', s: Step) -> list[list[nn.Parameter]]:
    """Adds hooks that tell `live` the phase of the step, and that free gradients as FSDP does.

    Returns the parameters of each FSDP unit, in the order in which units run. The forward pass fills the list.
    """
    is_unit = getattr(model.model, 'fsdp_wrap_fn', lambda module: False)
    modules = [module for module in model.model.modules() if is_unit(module)]
    owner = {p: module for module in modules for p in module.parameters()}  # the innermost unit comes last
    running: list[int] = []
    units: list[list[nn.Parameter]] = []

    def finish_unit_and_enter(name: str, unit: int = -1) -> None:
        if live.phase.name == BACKWARD and live.phase.unit != unit:
            live.enter(UNIT_END, live.phase.unit)
            if s.sharded:
                for p in chain(*units[live.phase.unit:]):
                    p.grad = None
        live.enter(name, unit)

    def enter_at_gradient(values: Any, *phase: Any) -> None:
        for x in tree_leaves(values):
            if isinstance(x, Tensor) and x.requires_grad:
                x.register_hook(lambda _: finish_unit_and_enter(*phase))

    def before_forward(module: nn.Module, *inputs: Any) -> None:
        if live.phase.name in (FORWARD, LOSS):  # in the backward pass, checkpointing runs the module again
            if not units:
                enter_at_gradient(inputs, EMBEDDINGS)
            running.append(len(units))
            units.append([p for p in owner if owner[p] is module])
            live.enter(FORWARD, running[-1])

    def after_forward(module: nn.Module, inputs: Any, outputs: Any) -> None:
        if live.phase.name in (FORWARD, LOSS):
            enter_at_gradient(outputs, BACKWARD, running.pop())
            if running:
                live.enter(FORWARD, running[-1])
            else:
                live.enter(LOSS)

    for module in modules:
        module.register_forward_pre_hook(before_forward, with_kwargs=True)
        module.register_forward_hook(after_forward)
    for p in filter(lambda p: p.requires_grad, model.parameters()):
        if s.accumulates:
            p.grad = torch.zeros_like(p)
            live.set_kind(p.grad, 'gradients')
        p.register_post_accumulate_grad_hook(lambda p: live.set_kind(p.grad, 'gradients'))
    return units


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live storages, by kind, and keeps the peak of each phase.

    `params` are the storages of the parameters, which do not count.
    """

    def __init__(self, params: set[int]):
        super().__init__()
        self.params = params
        self.storages: dict[int, tuple[str, int]] = {}
        self.current: Counter[str] = Counter()
        self.phase = Phase(FORWARD)
        self.peaks: dict[Phase, Counter[str]] = {}

    def enter(self, name: str, unit: int = -1) -> None:
        self.phase = Phase(name, unit)
        self.note_peak()

    def note_peak(self) -> None:
        if self.phase not in self.peaks or self.current.total() > self.peaks[self.phase].total():
            self.peaks[self.phase] = self.current.copy()

    def set_kind(self, tensor: Optional[Tensor], kind: str) -> None:
        assert tensor is not None
        key = tensor.untyped_storage()._cdata
        self.storages[key] = kind, self.remove(key)
        self.current[kind] += self.storages[key][1]

    def remove(self, key: int) -> int:
        kind, size = self.storages.pop(key)
        self.current[kind] -= size
        return size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            storage = x.untyped_storage() if isinstance(x, Tensor) and x.device.type == 'cpu' else None
            if storage is None or storage._cdata in self.storages or storage._cdata in self.params:
                continue
            is_cast = func is ATEN._to_copy.default and args[0].untyped_storage()._cdata in self.params
            kind = 'weights' if is_cast else 'logits' if self.phase.name in (LOSS, START) else 'activations'
            self.storages[storage._cdata] = kind, storage.nbytes()
            self.current[kind] += storage.nbytes()
            weakref.finalize(storage, self.remove, storage._cdata)
            # Autograd adds gradients in place, but not on tensors without data: leave that moment out of the peak.
            if func is not ATEN.add.Tensor or torch.is_grad_enabled():
                self.note_peak()
        return out
