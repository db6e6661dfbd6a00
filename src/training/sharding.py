"""FSDP in both versions: what Composer's Trainer is given, and what it leaves to do."""

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

from src.common.errors import UserError
from src.config import schema
from src.config.derived import fsdp_version, grad_accum


def build_parallelism(cfg: Optional[schema.FSDPConfig], has_gpu: bool) -> Optional[dict[str, Any]]:
    """What Composer's Trainer takes as `parallelism_config`; None: DDP, or one device alone."""
    version = fsdp_version(cfg, has_gpu)
    if cfg is None or version == 0:
        return None
    if version == 1:
        return {'fsdp': FSDPConfig(**cfg.model_dump(exclude={'version', 'reduce_every_microbatch'}))}
    shared = cfg.model_dump(include=FSDP2Config.settable_attrs())
    return {'fsdp': FSDP2Config(reshard_after_forward=cfg.sharding_strategy == 'FULL_SHARD', **shared)}


def check_microbatch_search(c: schema.Config, has_gpu: bool) -> None:
    """Raises UserError where Composer cannot search the microbatch: under FSDP1 it has changed torch for that."""
    if (c.device_train_microbatch_size == 'auto' and fsdp_version(c.fsdp_config, has_gpu) == 1
            and not hasattr(_patch_pytorch, 'unshard_with_sync')):
        raise UserError("device_train_microbatch_size: Composer cannot search for 'auto' under fsdp_config.version 1 "
                        f'with torch {torch.__version__}; set a number, or install torch 2.7.0')


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that the model's `fsdp_wrap_fn` calls blocks, one that stands in several places under each name."""
    is_block = getattr(model, 'fsdp_wrap_fn', lambda module: False)
    return {name: module for name, module in model.named_modules(remove_duplicate=False) if is_block(module)}


def check_blocks(cfg: Optional[schema.FSDPConfig], model: nn.Module, has_gpu: bool) -> None:
    """Raises UserError where a block stands in the model several times: FSDP2 would save what no run can load."""
    blocks = _blocks(model)
    if fsdp_version(cfg, has_gpu) == 2 and len(blocks) > len(set(blocks.values())):
        raise UserError(f'fsdp_config: some of the blocks {", ".join(blocks)} are one and the same module, which '
                        'version 2 cannot load again from a checkpoint; set fsdp_config=null')


def is_sharded(cfg: Optional[schema.FSDPConfig], has_gpu: bool) -> bool:
    """Whether checkpoints are sharded: a folder, to which every device writes a file."""
    return cfg is not None and cfg.state_dict_type == 'sharded' and fsdp_version(cfg, has_gpu) > 0


def average_gradients(model: nn.Module) -> None:
    """Makes FSDP2 average gradients over gloo, as it does over NCCL.

    FSDP2 asks for the average of the ranks' gradients; gloo, at least up to torch 2.7, answers with their sum and says
    nothing. Adam hides a factor, gradient clipping and weight decay do not. So gloo is asked, and what is missing is
    divided.
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


def build_compile_config(cfg: Optional[schema.CompileConfig]) -> Optional[dict[str, Any]]:
    """What Composer's Trainer takes as `compile_config`; None: nothing is compiled, or each block on its own."""
    return cfg.model_dump(exclude={'scope'}) if cfg and cfg.scope == 'model' else None


def compile_blocks(cfg: Optional[schema.CompileConfig], model: Any) -> None:
    """Has `torch.compile` take each block on its own where `scope: block` asks for that.

    All blocks then share one graph, wrappers stay outside of it, and names of parameters do not change. Raises
    UserError where the model's `fsdp_wrap_fn` names no block.
    """
    if cfg is None or cfg.scope != 'block':
        return
    blocks = set(_blocks(model).values())
    if not blocks:
        raise UserError(f"compile_config.scope: 'block', and no fsdp_wrap_fn of {type(model).__name__} names one; set "
                        'model')
    for block in blocks:
        block.compile(**cfg.model_dump(exclude={'scope'}))


class ReduceOncePerStep(Callback):
    """Has FSDP sum the gradients of a step's microbatches on each device, and reduce them with the last one's.

    Composer reduces them with every microbatch, which DDP does not. Until the last, whole gradients are kept.
    """

    def __init__(self) -> None:
        self._left = 0
        self._kept = ExitStack()

    def before_train_batch(self, state: State, logger: Logger) -> None:
        assert state.device_train_microbatch_size is not None
        self._left = grad_accum(len(state.batch['input_ids']), int(state.device_train_microbatch_size))

    def before_forward(self, state: State, logger: Logger) -> None:
        self._left -= 1
        for module in state.model.modules():
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(self._left == 0, recurse=False)
            elif isinstance(module, FullyShardedDataParallel) and self._left > 0 and module.check_is_root():
                self._kept.enter_context(module.no_sync())

    def after_backward(self, state: State, logger: Logger) -> None:
        self._kept.close()
