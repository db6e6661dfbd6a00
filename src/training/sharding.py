"""FSDP (both versions) and torch.compile: the Trainer's arguments, and the work that Composer leaves to the kit."""

import logging
from contextlib import ExitStack
from typing import Any, Optional

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.trainer import _patch_pytorch
from composer.utils import FSDP2Config, FSDPConfig
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from src.causal_lm import LossOfLogits
from src.common.errors import UserError
from src.config import schema
from src.config.derived import compile_scope, fsdp_version, grad_accum

log = logging.getLogger(__name__)


def build_parallelism(cfg: Optional[schema.FSDPConfig], has_gpu: bool) -> Optional[dict[str, Any]]:
    """Builds the Trainer's `parallelism_config`; None for DDP or a single device."""
    version = fsdp_version(cfg, has_gpu)
    if cfg is None or version == 0:
        return None
    if version == 1:
        return {'fsdp': FSDPConfig(**cfg.model_dump(exclude={'version', 'reduce_every_microbatch'}))}
    shared = cfg.model_dump(include=FSDP2Config.settable_attrs())
    return {'fsdp': FSDP2Config(reshard_after_forward=cfg.sharding_strategy == 'FULL_SHARD', **shared)}


def check_microbatch_search(c: schema.Config, has_gpu: bool) -> None:
    """Raises UserError if Composer cannot search the microbatch: FSDP1 needs a torch that Composer has patched."""
    if (c.device_train_microbatch_size == 'auto' and fsdp_version(c.fsdp_config, has_gpu) == 1
            and not hasattr(_patch_pytorch, 'unshard_with_sync')):
        raise UserError("device_train_microbatch_size: Composer cannot search for 'auto' under fsdp_config.version 1 "
                        f'with torch {torch.__version__}; set a number, or install torch 2.7.0')


def _find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The modules for which the model's `fsdp_wrap_fn` is true, by name; a shared module under each of its names."""
    is_block = getattr(model, 'fsdp_wrap_fn', lambda module: False)
    return {name: module for name, module in model.named_modules(remove_duplicate=False) if is_block(module)}


def check_blocks(cfg: Optional[schema.FSDPConfig], model: nn.Module, has_gpu: bool) -> None:
    """Raises UserError if several blocks are one module: no run can load the checkpoints that FSDP2 would save."""
    blocks = _find_blocks(model)
    if fsdp_version(cfg, has_gpu) == 2 and len(blocks) > len(set(blocks.values())):
        raise UserError(f'fsdp_config: some of the blocks {", ".join(blocks)} are one and the same module, and FSDP '
                        'version 2 cannot load the checkpoints of such a model; set fsdp_config=null')


def is_sharded(cfg: Optional[schema.FSDPConfig], has_gpu: bool) -> bool:
    """Whether a checkpoint is sharded: a folder with one file from each device."""
    return cfg is not None and cfg.state_dict_type == 'sharded' and fsdp_version(cfg, has_gpu) > 0


def average_gradients(model: nn.Module) -> None:
    """Makes FSDP2 average gradients over gloo, as it does over NCCL.

    FSDP2 asks for the average of the ranks' gradients. Gloo (at least up to torch 2.7) returns the sum, without an
    error. Adam hides the wrong factor, but gradient clipping and weight decay do not. This function measures the factor
    with a tensor of ones, and divides all later gradients by it.
    """
    blocks = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not blocks or dist.get_backend() == 'nccl':
        return
    ranks = dist.get_world_size()
    average = torch.empty(1)
    dist.reduce_scatter_tensor(average, torch.ones(ranks), op=dist.ReduceOp.AVG)
    factor = average.item()
    assert factor in (1.0, ranks), f'the average of {ranks} ones is {factor}'

    for block in blocks if factor != 1.0 else ():
        block.set_all_reduce_hook(lambda gradient: gradient.div_(factor))  # pyright: ignore[reportArgumentType]


def free_fsdp1(model: nn.Module) -> None:
    """Frees the weights and gradients under FSDP version 1. In torch 2.11 they stay when their model is gone."""
    for module in FullyShardedDataParallel.fsdp_modules(model):
        flat = getattr(module, '_flat_param', None)
        for x in (flat, getattr(flat, 'grad', None)):
            if x is not None:
                x.untyped_storage().resize_(0)


def build_compile_config(cfg: Optional[schema.CompileConfig]) -> Optional[dict[str, Any]]:
    """Builds the Trainer's `compile_config` for `scope: model`; else None, because `compile_blocks` does the work."""
    return cfg.model_dump(exclude={'scope'}) if cfg and cfg.scope == 'model' else None


def compile_blocks(cfg: Optional[schema.CompileConfig], model: Any) -> None:
    """Compiles each block separately, and the loss of a chunk of logits, if that is the scope.

    All blocks share one graph, FSDP's wrappers stay outside of it, and parameters keep their names. Raises UserError
    where the model's `fsdp_wrap_fn` finds no block.
    """
    has_gpu = torch.cuda.is_available()
    if cfg is None or compile_scope(cfg, has_gpu) != 'block':
        if cfg and cfg.scope == 'auto' and has_gpu:
            log.info('compile_config.scope: auto compiles nothing: no C compiler, or no headers of Python')
        return
    blocks = set(_find_blocks(model).values())
    if not blocks and cfg.scope == 'auto':
        log.info('compile_config.scope: auto compiles nothing: the model has no blocks')
        return
    if not blocks:
        raise UserError(f"compile_config.scope: 'block' compiles the modules that fsdp_wrap_fn selects, and "
                        f'{type(model).__name__} selects none; set scope: model')
    losses = [module for module in model.modules() if isinstance(module, LossOfLogits)]
    for module in (*blocks, *losses):
        module.compile(**cfg.model_dump(exclude={'scope'}))
    log.info('torch.compile: each block%s', ', and the loss' if losses else '')


class ReduceOncePerStep(Callback):
    """Reduces FSDP's gradients once per step: a device sums the gradients of its microbatches, then reduces the sum.

    Composer would reduce after every microbatch. Until the last microbatch each device keeps whole gradients.
    """

    def __init__(self) -> None:
        self._microbatches_left = 0
        self._unsynchronized = ExitStack()  # FSDP1's `no_sync` of the current microbatch

    def before_train_batch(self, state: State, logger: Logger) -> None:
        assert state.device_train_microbatch_size is not None
        self._microbatches_left = grad_accum(len(state.batch['input_ids']), int(state.device_train_microbatch_size))

    def before_forward(self, state: State, logger: Logger) -> None:
        self._microbatches_left -= 1
        for module in state.model.modules():
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(self._microbatches_left == 0, recurse=False)
            elif (self._microbatches_left > 0 and isinstance(module, FullyShardedDataParallel)
                  and module.check_is_root()):
                self._unsynchronized.enter_context(module.no_sync())

    def after_backward(self, state: State, logger: Logger) -> None:
        self._unsynchronized.close()
