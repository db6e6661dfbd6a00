"""FSDP in both versions: what Composer's Trainer is given, and what it leaves to do."""

from typing import Any, Optional

import torch
from composer.utils import FSDP2Config, FSDPConfig
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from src import schema
from src.checks import fsdp_version


def build_parallelism(cfg: Optional[schema.FSDPConfig], has_gpu: bool) -> Optional[dict[str, Any]]:
    """What Composer's Trainer takes as `parallelism_config`; None: DDP, or one device alone."""
    version = fsdp_version(cfg, has_gpu)
    if cfg is None or version == 0:
        return None
    if version == 1:
        return {'fsdp': FSDPConfig(**cfg.model_dump(exclude={'version'}))}
    shared = cfg.model_dump(include=FSDP2Config.settable_attrs())
    return {'fsdp': FSDP2Config(reshard_after_forward=cfg.sharding_strategy == 'FULL_SHARD', **shared)}


def is_sharded(cfg: Optional[schema.FSDPConfig], has_gpu: bool) -> bool:
    """Whether checkpoints are sharded: a folder, to which every device writes a file."""
    return cfg is not None and cfg.state_dict_type == 'sharded' and fsdp_version(cfg, has_gpu) > 0


def average_gradients(model: nn.Module) -> None:
    """Makes FSDP2 average gradients over gloo, as it does over NCCL.

    FSDP2 asks for the average of the ranks' gradients; gloo, at least up to torch 2.7, answers with their sum and says
    nothing. Adam hides a factor, gradient clipping and weight decay do not. So gloo is asked, and what is missing is divided.
    """
    blocks = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not blocks or dist.get_backend() == 'nccl':
        return
    ranks = dist.get_world_size()
    average = torch.empty(1)
    dist.reduce_scatter_tensor(average, torch.ones(ranks), op=dist.ReduceOp.AVG)
    factor = average.item()
    assert factor in (1.0, ranks), f'the average of {ranks} ones is {factor}'

    def divide(gradient: torch.Tensor) -> None:
        gradient.div_(factor)

    for block in blocks:
        if factor != 1.0:
            block.set_all_reduce_hook(divide)
