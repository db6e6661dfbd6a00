"""Compares the predicted memory with the memory that the real model allocates in the second of two steps.

On a CPU the tests sum the events of the allocator. FSDP runs on tensors without data, in one of many ranks that exchange
nothing, and the tests count its storages. Neither covers what only a GPU has: scratch memory of kernels, and fragments
of the caching allocator.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from itertools import accumulate
from typing import Any, Optional

import pytest
import torch
import torch.distributed._tools.fake_collectives  # lets collectives run on tensors without data
from composer.distributed import prepare_distributed
from composer.distributed.mosaic_parallelism import BACKWARD_PREFETCH_MAP, SHARDING_MAP, get_mixed_precision
from composer.distributed.prepare_distributed import parallelize_composer_model
from composer.models import ComposerModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.profiler import profile
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing, checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, _init_utils, fully_sharded_data_parallel
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

from src import mosaic_gpt, optimizers
from src.common.errors import UserError
from src.common.flops import CARDS
from src.config import load as config
from src.config.derived import fsdp_version, resolve_precision
from src.config.schema import Config, MosaicGPTConfig
from src.model_registry import COMPOSER_MODEL_REGISTRY
from src.mosaic_gpt import ComposerMosaicGPT, GPTBlock, MosaicGPT
from src.optimizers import build_optimizer
from src.sizing import step_trace
from src.sizing.estimate import estimate
from src.sizing.gpu_rules import act_like_gpu
from src.sizing.memory import GPU_WORKSPACE, Memory, moments, optimizer_state_bytes, predict, trace_config
from src.training.sharding import build_parallelism


def parsed(yaml: str, *overrides: str) -> Config:
    return Config.model_validate(config.to_plain(config.load([f'yamls/{yaml}.yaml', *overrides])))


Storage: Any = torch.UntypedStorage


class LiveBytes(step_trace.LiveBytes):
    """Counts the local parts of DTensors. FSDP frees storages by resizing them to 0, so resizing counts too."""

    def __init__(self):
        super().__init__(set())
        self.peak = 0

    def note_peak(self) -> None:
        if self.current.total() > self.peak:
            gc.collect()  # FSDP2's states form reference cycles
            self.peak = max(self.peak, self.current.total())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # DTensor then dispatches its local tensors, which come here
        return super().__torch_dispatch__(func, types, args, kwargs)

    def __enter__(self):
        self.resize = resize = Storage.resize_

        def resize_(storage, size):
            resize(storage, size)
            if storage._cdata in self.storages:
                kind, _ = self.storages[storage._cdata]
                self.remove(storage._cdata)
                self.storages[storage._cdata] = kind, size
                self.current[kind] += size
                self.note_peak()
        Storage.resize_ = resize_
        gc.freeze()
        return super().__enter__()

    def __exit__(self, *args):
        Storage.resize_ = self.resize
        gc.unfreeze()
        return super().__exit__(*args)


@pytest.fixture
def processes() -> Iterator[Callable[[int], None]]:
    """A function that makes this process rank 0 of a group of the given size. The other ranks do not exist."""
    if torch.distributed.is_initialized():  # of an earlier test
        torch.distributed.destroy_process_group()
    yield lambda n: torch.distributed.init_process_group('fake', rank=0, world_size=n, store=FakeStore())
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


Wrap = Callable[[ComposerModel, torch.optim.Optimizer], None]


def two_steps(c: Config, microbatch: int, amp: bool, wrap: Optional[Wrap] = None,
              live: Optional[LiveBytes] = None) -> tuple[ComposerModel, torch.optim.Optimizer]:
    """Trains two steps as Composer does, on one rank's batch. In the second, all tensors between steps exist."""
    model = COMPOSER_MODEL_REGISTRY[c.model.name](c.model)
    optimizer = build_optimizer(c.optimizer, model.model)
    if wrap:
        wrap(model, optimizer)
    for group in optimizer.param_groups:
        group['initial_lr'] = group['lr']
    batch = {key: torch.zeros(microbatch, c.max_seq_len, dtype=torch.long) for key in ('input_ids', 'labels')}
    if getattr(c.model, 'attn_within_document', False):
        batch['sequence_id'] = torch.zeros(microbatch, c.max_seq_len, dtype=torch.long)
    for _ in range(2):
        if live:
            live.peak = live.current.total()
        optimizer.zero_grad()
        for _ in range(c.global_train_batch_size // microbatch):
            with torch.autocast('cpu', torch.bfloat16) if amp else nullcontext():
                loss = model(batch)['loss']
            loss.backward()
            del loss
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model, optimizer


# ---------------------------------------------------------------- real tensors


def allocated_peak(c: Config, microbatch: int) -> int:
    """The largest sum of the CPU allocator's events over both steps; the second is never below the first."""
    for _ in range(5):
        profiler: Any = profile(profile_memory=True)
        with profiler:
            model, optimizer = two_steps(c, microbatch, False)
        sums = list(accumulate(e.nbytes() for e in profiler.kineto_results.events() if e.name() == '[memory]'))
        kept = sum((1 + p.requires_grad) * p.nbytes for p in model.parameters())
        kept += sum(x.nbytes for state in optimizer.state.values() for x in state.values() if x.dim())
        if sums[-1] >= kept:  # otherwise the profiler lost events on a busy machine
            return max(sums)
    raise AssertionError('the profiler loses events')


def small(d_model: int, n_layers: int, vocab_size: int, seq_len: int, microbatch: int, accum: int, *overrides: str,
          yaml: str = 'quickstart') -> Config:
    return parsed(yaml, 'tokenizer_name=none', f'model.d_model={d_model}', f'model.n_layers={n_layers}',
                  f'model.vocab_size={vocab_size}', f'max_seq_len={seq_len}', f'global_train_batch_size={microbatch * accum}',
                  *overrides)


CPU = {  # d_model, layers, vocab, seq, microbatch, accumulation
    'the loss': (128, 4, 8192, 128, 4, 1, 'model.loss_chunk_tokens=128'),
    'a block': (64, 8, 512, 256, 2, 1, 'model.loss_chunk_tokens=64'),
    'accumulated': (128, 3, 512, 128, 2, 2, 'model.loss_chunk_tokens=64'),
    'softmax kept, dropout': (64, 4, 512, 256, 2, 1, 'model.attn_pdrop=0.1', 'model.attn_impl=torch'),
    'embeddings': (256, 4, 8192, 64, 1, 1, 'model.loss_chunk_tokens=8'),
}


@pytest.mark.parametrize('yaml, case', [*(('quickstart', case) for case in CPU),
                                        *(('modern_gpt/quickstart', case) for case in CPU if 'dropout' not in case)])
def test_fp32_on_a_cpu_as_its_allocator_counts(yaml, case):
    c = small(*CPU[case], *(['model.n_kv_heads=2'] if 'modern' in yaml else []), yaml=yaml)
    assert predict(c, 1, False, CPU[case][4]).total == pytest.approx(allocated_peak(c, CPU[case][4]), rel=0.01)


@pytest.mark.parametrize('optimizer', ['decoupled_adamw', 'muon'])
@pytest.mark.parametrize('yaml', ['quickstart', 'modern_gpt/quickstart'])
def test_what_stays_is_exact(yaml, optimizer):
    c = small(64, 2, 512, 64, 1, 1, f'optimizer.name={optimizer}', yaml=yaml)
    model, optimizer = two_steps(c, 1, amp=False)
    step = moments(c, 1, False, 1)[-1]
    assert step.weights == sum(p.nbytes for p in model.parameters())
    assert step.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert step.optimizer == sum(x.nbytes for state in optimizer.state.values() for x in state.values() if x.dim())
    assert (step.moment, step.activations, step.logits, step.workspace) == ('optimizer step', 0, 0, 0)


def test_the_optimizer_that_is_built_is_counted(monkeypatch):
    c = small(64, 2, 512, 64, 1, 1)
    model = trace_config(c, 1, False, 1).model.model
    n_params = sum(p.numel() for p in model.parameters())
    assert optimizer_state_bytes(c.optimizer, model) == 8 * n_params
    monkeypatch.setattr(optimizers, 'build_optimizer',
                        lambda cfg, model: torch.optim.SGD(model.parameters(), cfg.lr, momentum=0.9))
    assert optimizer_state_bytes(c.optimizer, model) == 4 * n_params
    assert moments(c, 1, False, 1)[-1].optimizer == moments(c, 1, False, 1)[-1].weights


# ---------------------------------------------------------------- other models


class SwiGLU(nn.Module):
    def __init__(self, cfg: MosaicGPTConfig):
        super().__init__()
        width = cfg.mlp_ratio * cfg.d_model
        self.gate, self.up = (nn.Linear(cfg.d_model, width, bias=False, device=cfg.device) for _ in range(2))
        self.down = nn.Linear(width, cfg.d_model, bias=False, device=cfg.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class ChangedBlock(GPTBlock):
    def __init__(self, cfg: MosaicGPTConfig):
        super().__init__(cfg)
        self.ln_1, self.ln_2 = (nn.RMSNorm(cfg.d_model, device=cfg.device) for _ in range(2))
        self.mlp = SwiGLU(cfg)


@pytest.fixture
def changed_block(monkeypatch) -> None:
    monkeypatch.setattr(mosaic_gpt, 'GPTBlock', ChangedBlock)
    monkeypatch.setattr(step_trace, '_traces', {})


def test_a_changed_block_is_followed(changed_block):
    c = small(64, 8, 512, 256, 2, 1, 'model.loss_chunk_tokens=64')
    built = sum(p.numel() for p in MosaicGPT(c.model).parameters())  # pyright: ignore[reportArgumentType]
    block = 4 * 64 * 64 + 4 * 64 + 3 * 64 * 256 + 2 * 64
    assert built == 8 * block + (512 + 256 + 2) * 64
    e = estimate(c, CARDS['l4'], 1)
    assert e.n_params == built and set(e.trace.units) == {block}
    assert e.flops_per_token == 6 * built + 12 * 8 * 64 * 256
    step = moments(c, 1, False, 2)
    assert step[-1].weights == 4 * built and step[-1].optimizer == 8 * built
    assert predict(c, 1, False, 2).total == pytest.approx(allocated_peak(c, 2), rel=0.01)


@pytest.mark.slow
def test_a_changed_block_is_followed_under_fsdp(changed_block, processes, without_data):
    compare_with_fsdp('mosaic_gpt/125m', 8, 1, processes, without_data)


@pytest.mark.slow
def test_units_within_units_are_counted_once(changed_block, processes, without_data, monkeypatch):
    monkeypatch.setattr(MosaicGPT, 'fsdp_wrap_fn', lambda self, module: isinstance(module, (GPTBlock, SwiGLU)))
    e = estimate(small(64, 2, 512, 64, 1, 1), CARDS['l4'], 1)
    assert e.trace.units == 2 * (4 * 64 * 64 + 4 * 64 + 2 * 64, 3 * 64 * 256) and e.trace.root == (512 + 64 + 2) * 64
    compare_with_fsdp('mosaic_gpt/125m', 8, 1, processes, without_data)


def test_other_hugging_face_models_are_followed():
    overrides = {'model_type': 'llama', 'vocab_size': 512, 'hidden_size': 64, 'num_hidden_layers': 4, 'intermediate_size': 172,
                 'num_attention_heads': 4, 'num_key_value_heads': 2, 'max_position_embeddings': 256}
    c = parsed('hf_causal_lm/gpt2-small', 'model.pretrained_model_name_or_path=null', 'max_seq_len=256', 'precision=fp32',
               'fsdp_config=null', 'global_train_batch_size=2')
    c = c.model_copy(update={'model': c.model.model_copy(update={'config_overrides': overrides})})
    assert predict(c, 1, False, 2).total == pytest.approx(allocated_peak(c, 2), rel=0.01)


def test_frozen_layers_have_neither_gradients_nor_moments(monkeypatch):
    class Frozen(ComposerMosaicGPT):
        def __init__(self, cfg):
            super().__init__(cfg)
            self.model.blocks[1:7].requires_grad_(False)

    monkeypatch.setitem(COMPOSER_MODEL_REGISTRY, 'mosaic_gpt', Frozen)
    monkeypatch.setattr(step_trace, '_traces', {})
    c = small(64, 8, 512, 256, 2, 1, 'model.loss_chunk_tokens=64')
    assert predict(c, 1, False, 2).total == pytest.approx(allocated_peak(c, 2), rel=0.01)


def test_the_chunks_of_the_loss_that_are_not_traced_need_no_more(monkeypatch):
    some_chunks = step_trace._some_chunks
    c = parsed('mosaic_gpt/125m', 'model.n_layers=1', 'model.loss_chunk_tokens=3000')  # the last of 6 chunks is smaller
    monkeypatch.setattr(step_trace, '_traces', {})
    chunks = []
    monkeypatch.setattr(step_trace, '_some_chunks', lambda *args: chunks.append(some_chunks(*args)) or chunks[-1])
    some = trace_config(c, 1, True, 8).peaks
    assert chunks == [[0, 3000, 6000, 15000]]
    monkeypatch.setattr(step_trace, '_traces', {})
    monkeypatch.setattr(step_trace, '_some_chunks', lambda n_rows, chunk: range(0, n_rows, chunk))
    assert trace_config(c, 1, True, 8).peaks == some


def test_a_model_that_looks_at_values_is_named(monkeypatch):
    class Looks(ComposerMosaicGPT):
        def forward(self, batch):
            assert batch['input_ids'].max().item() >= 0
            return super().forward(batch)

    monkeypatch.setitem(COMPOSER_MODEL_REGISTRY, 'mosaic_gpt', Looks)
    with pytest.raises(UserError, match="the memory of 'mosaic_gpt' cannot be predicted.*DataDependent.*src/tools/benchmark.py"):
        predict(small(64, 2, 512, 64, 1, 1), 1, False, 1)


# ---------------------------------------------------------------- FSDP on tensors without data


@pytest.fixture
def without_data(monkeypatch) -> pytest.MonkeyPatch:
    for name in ('init_weights', 'param_init_fn'):  # there is nothing to fill
        monkeypatch.setattr(MosaicGPT, name, lambda *_: None)
    monkeypatch.setattr(prepare_distributed, '_validate_precision', lambda *_: None)  # bf16, on a CPU
    return monkeypatch


def fsdp1(model: Any, c: Config, patch: pytest.MonkeyPatch) -> FullyShardedDataParallel:
    """Wraps a model as Composer's `prepare_fsdp_module`, which needs a GPU. Patches FSDP1 to accept a CPU."""
    f = c.fsdp_config
    assert f is not None

    class Handle:
        is_available = staticmethod(lambda: True)

        def __getattr__(self, name: str) -> Any:
            return getattr(torch.cpu, name)

    def init_device_handle(state: Any, *_: Any) -> None:
        state._device_handle = Handle()

    patch.setattr(fully_sharded_data_parallel, '_init_device_handle', init_device_handle)
    patch.setattr(_init_utils, '_get_compute_device', lambda *_: torch.device('cpu'))
    wrapped = FullyShardedDataParallel(
        model, sharding_strategy=SHARDING_MAP[f.sharding_strategy], auto_wrap_policy=CustomPolicy(model.fsdp_wrap_fn),
        mixed_precision=get_mixed_precision(resolve_precision(c.precision, True), f.mixed_precision)[0],
        backward_prefetch=BACKWARD_PREFETCH_MAP[f.backward_prefetch], limit_all_gathers=f.limit_all_gathers,
        use_orig_params=f.use_orig_params)
    if f.activation_checkpointing:
        apply_activation_checkpointing(wrapped, checkpoint_wrapper, model.activation_checkpointing_fn)
    return wrapped


def live_peak(c: Config, world_size: int, microbatch: int, patch: pytest.MonkeyPatch, has_gpu: bool = True) -> int:
    """The peak of rank 0's second step. `c.global_train_batch_size` counts the samples of all ranks."""
    version = fsdp_version(c.fsdp_config, has_gpu)
    mesh = init_device_mesh('cpu', (world_size,)) if version == 2 else None

    def wrap(model: ComposerModel, optimizer: torch.optim.Optimizer) -> None:
        precision = resolve_precision(c.precision, has_gpu)
        if version == 2:
            parallelism = build_parallelism(c.fsdp_config, has_gpu)
            assert parallelism
            parallelism['fsdp'].device_mesh = mesh
            parallelize_composer_model(model, optimizer, parallelism['fsdp'], precision)
        elif version == 1:
            group = {key: value for key, value in optimizer.param_groups.pop().items() if key != 'params'}
            model.model = fsdp1(model.model, c, patch)
            optimizer.add_param_group({'params': list(model.parameters())} | group)

    # DTensor computes the shape of a result with full tensors of the active mode; on a GPU these take no memory.
    propagate = ShardingPropagator._propagate_tensor_meta_non_cached

    def uncounted(*args: Any) -> Any:
        with _disable_current_modes():
            return propagate(*args)

    patch.setattr(ShardingPropagator, '_propagate_tensor_meta_non_cached', uncounted)
    update: dict[str, Any] = {'global_train_batch_size': c.global_train_batch_size // world_size}
    if getattr(c.model, 'attn_impl', None) == 'flash':
        # PyTorch's FlashAttention for CPUs saves the same tensors for the backward pass
        update['model'] = c.model.model_copy(update={'attn_impl': 'sdpa', 'device': 'cpu', 'vocab_multiple': 64})
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        if has_gpu:
            stack.enter_context(act_like_gpu())
        live = stack.enter_context(LiveBytes())
        kept = two_steps(c.model_copy(update=update), microbatch, has_gpu and c.precision != 'fp32', wrap, live)
    del kept
    return live.peak


V2, FEW, LIGHT = 'fsdp_config.version=2', 'model.n_layers=6', ('model.vocab_size=256', 'max_seq_len=128', 'model.n_layers=6')
GPU = {  # YAML, devices, accumulation, overrides; the microbatch is the YAML's
    '125m alone': ('mosaic_gpt/125m', 1, 1, 'fsdp_config=null'),
    '125m alone, FSDP1': ('mosaic_gpt/125m', 1, 1),
    '125m FSDP1': ('mosaic_gpt/125m', 8, 1),
    '125m FSDP2': ('mosaic_gpt/125m', 8, 1, V2),
    '350m FULL': ('mosaic_gpt/350m', 8, 1, FEW, 'fsdp_config.mixed_precision=FULL'),
    '350m kept': ('mosaic_gpt/350m', 8, 1, FEW, V2, 'fsdp_config.sharding_strategy=SHARD_GRAD_OP'),
    '350m fp32': ('mosaic_gpt/350m', 16, 2, FEW, 'precision=fp32'),
    '350m summed': ('mosaic_gpt/350m', 1, 2, FEW, 'fsdp_config.mixed_precision=FULL',
                    'fsdp_config.reduce_every_microbatch=false'),
    '1b checkpointed': ('mosaic_gpt/1b', 8, 1),
    '1b checkpointed, FSDP2': ('mosaic_gpt/1b', 64, 2, FEW, V2),
    '1b every other block': ('mosaic_gpt/1b', 8, 1, 'model.activation_checkpointing_every=2', 'device_train_microbatch_size=2'),
    '3b checkpointed': ('mosaic_gpt/3b', 64, 1, FEW),
    '7b one sample': ('mosaic_gpt/7b', 64, 1, FEW, 'device_train_microbatch_size=1'),
    '70b PURE': ('mosaic_gpt/70b', 256, 1, FEW),
    '1b light, FSDP1': ('mosaic_gpt/1b', 64, 1, *LIGHT, 'device_train_microbatch_size=1'),
    '1b light, FSDP2': ('mosaic_gpt/1b', 64, 2, *LIGHT, V2, 'device_train_microbatch_size=1'),
    'modern 125m': ('modern_gpt/125m', 8, 1, 'model.n_layers=3'),
    'modern 1b': ('modern_gpt/1b', 64, 2, FEW),
    'modern 7b': ('modern_gpt/7b', 64, 1, FEW, 'device_train_microbatch_size=1'),
    'GPT-2 of Hugging Face': ('hf_causal_lm/gpt2-small', 1, 1, 'model.pretrained_model_name_or_path=null',
                              'model.config_overrides.model_type=gpt2', 'model.config_overrides.n_layer=4', 'fsdp_config=null'),
}
QUICK = ('350m kept', '3b checkpointed', 'modern 125m')


def compare_with_fsdp(yaml: str, world_size: int, accum: int, processes: Callable[[int], None], patch: pytest.MonkeyPatch,
                      *overrides: str) -> None:
    c = parsed(yaml, *overrides)
    microbatch = c.device_train_microbatch_size
    assert isinstance(microbatch, int)
    c = c.model_copy(update={'global_train_batch_size': world_size * accum * microbatch})
    processes(world_size)
    predicted = predict(c, world_size, True, microbatch)
    assert predicted.workspace == GPU_WORKSPACE
    assert predicted.total - GPU_WORKSPACE == pytest.approx(live_peak(c, world_size, microbatch, patch), rel=0.02)


@pytest.mark.parametrize('case', [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in GPU])
def test_mixed_precision_as_fsdp_has_it(case, processes, without_data):
    yaml, world_size, accum, *overrides = GPU[case]
    compare_with_fsdp(yaml, world_size, accum, processes, without_data, *overrides)


@pytest.mark.parametrize('yaml', ['quickstart', 'modern_gpt/quickstart'])
@pytest.mark.parametrize('world_size', [1, 4])
def test_checkpointed_and_sharded_on_cpus(yaml, world_size, processes, without_data):
    processes(world_size)
    c = small(128, 4, 512, 256, 4, world_size, 'fsdp_config.activation_checkpointing=true', 'model.loss_chunk_tokens=128',
              yaml=yaml)
    assert predict(c, world_size, False, 4).total == pytest.approx(live_peak(c, world_size, 4, without_data, False), rel=0.03)


# ---------------------------------------------------------------- arithmetic


def step(world_size: int, *overrides: str) -> Memory:
    return moments(parsed('mosaic_gpt/125m', FEW, *overrides), world_size, True, 4)[-1]


def test_what_is_sharded_is_divided_among_those_who_share_it():
    whole = step(1)
    for strategy, world_size, by in (('FULL_SHARD', 64, 64), ('SHARD_GRAD_OP', 64, 64), ('NO_SHARD', 64, 1)):
        part = step(world_size, f'fsdp_config.sharding_strategy={strategy}')
        assert [part.weights * by, part.gradients * by] == pytest.approx([whole.weights, whole.gradients], rel=1e-6)
    hybrid = step(64, 'fsdp_config.sharding_strategy=HYBRID_SHARD', 'fsdp_config.data_parallel_replicate_degree=4')
    assert hybrid.weights == pytest.approx(whole.weights / 16)
    assert step(64, 'fsdp_config=null').gradients == 2 * whole.gradients  # DDP's buckets


def test_offloaded_activations_do_not_grow_with_depth():
    shallow, deep, kept = (predict(parsed('mosaic_gpt/1b', f'fsdp_config.activation_cpu_offload={x}', f'model.n_layers={n}'),
                                   64, True, 8) for x, n in (('true', 4), ('true', 12), ('false', 12)))
    assert shallow.activations == deep.activations > 0
    assert kept.activations - deep.activations >= 11 * 8 * 2048 * 2048 * 2  # a block's input, in bf16


def test_prefetching_holds_another_block():
    none, one = (next(m for m in moments(parsed('mosaic_gpt/1b', FEW, f'fsdp_config.backward_prefetch={x}'), 64, True, 8)
                      if m.moment == 'in the backward pass of block 4 of 6') for x in ('NONE', 'BACKWARD_PRE'))
    assert one.weights - none.weights == 2 * (12 * 2048**2 + 13 * 2048)
