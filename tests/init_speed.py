"""Measures the seconds in which one rank draws its initial weights, as Composer initialises a model on the meta device.

    python tests/init_speed.py yamls/mosaic_gpt/7b.yaml [key=value ...] [--ranks 8]

This process is rank 0, with its share of the weights and with the threads that one of `--ranks` ranks on this machine
has; the other ranks do not run. With `--alone` it uses all cores, as if each rank had its own machine. It frees each
block before the next. CPU seconds are the sum over all threads, and depend less on other programs on the machine.
"""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from src.config import load as config
from src.mosaic_gpt import MosaicGPT


def seconds(model: MosaicGPT, unit: nn.Module, skip: set[nn.Module]) -> float:
    """Draws the weights of an FSDP unit and frees them. `skip` holds modules of other units, and tied ones."""
    modules = [m for m in unit.modules() if m not in skip and any(True for _ in m.parameters(recurse=False))]
    started = time.perf_counter()
    for module in modules:
        module.to_empty(device='cpu', recurse=False)
        model.param_init_fn(module)
    taken = time.perf_counter() - started
    for module in modules:
        module.to_empty(device='meta', recurse=False)
    return taken


def measure(cfg: dict, ranks: int) -> float:
    model = MosaicGPT(cfg | {'device': 'meta', 'attn_impl': 'sdpa'})
    blocks = model.transformer['blocks']
    if ranks > 1:
        dist.init_process_group('fake', rank=0, world_size=ranks, store=FakeStore())
        mesh = dist.init_device_mesh('cpu', (ranks,))
        for unit in (*blocks, model):
            fully_shard(unit, mesh=mesh)
    others = seconds(model, model, {*blocks.modules(), model.lm_head})
    return others + sum(seconds(model, block, set()) for block in blocks)


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('yaml')
    parser.add_argument('overrides', nargs='*')
    parser.add_argument('--ranks', type=int, default=1)
    parser.add_argument('--alone', action='store_true')
    args = parser.parse_intermixed_args()
    os.environ['LOCAL_WORLD_SIZE'] = '1' if args.alone else str(args.ranks)
    cfg = config.to_plain(config.load([args.yaml, *args.overrides]))['model']
    cpu = time.process_time()
    taken = measure(cfg, args.ranks)
    print(f'{args.ranks} ranks: one rank draws its weights in {taken:.1f} s, {time.process_time() - cpu:.1f} CPU seconds')
