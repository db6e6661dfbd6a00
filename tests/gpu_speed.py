"""Times training of the pre-baked sizes on one GPU, with what makes it faster or slower: python tests/gpu_speed.py [NAME ...]

Writes a row for each run to OUT.md and OUT.json, in the form of src/tools/benchmark.py, with the command that measures it alone.
All runs are in one process. Without names it takes all of ROWS, in this order, and begins no run after `--minutes`.
"""
# ruff: noqa: E402

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == '__main__':
    sys.path.insert(0, str(ROOT))

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from src.common.errors import UserError, first_line
from src.tools import benchmark
from src.tools.stopwatch import milliseconds_of


def run(size: str, microbatch: int, microbatches: int, *overrides: str) -> list[str]:
    path = size if '/' in size else f'mosaic_gpt/{size}'
    return [f'yamls/{path}.yaml', f'global_train_batch_size={microbatches * microbatch}',
            f'device_train_microbatch_size={microbatch}', *overrides]


BLOCK, MODEL, OFF = ('compile_config.scope=block',), ('compile_config.scope=model', 'fsdp_config=null'), ('compile_config=null',)
PLAIN, WHOLE = 'model.loss_impl=plain', 'fsdp_config.activation_checkpointing=false'
NANOGPT = ['max_seq_len=1024', 'model.vocab_size=50304', 'model.attn_impl=sdpa', PLAIN]
HF = ['fsdp_config=null', 'model.mlp_act=gelu_tanh', '--against', 'hf', '--against', 'bare']
ROWS = {
    '125m': run('125m', 32, 2, *BLOCK),
    '125m against': run('125m', 16, 2, *BLOCK, *HF),
    '350m': run('350m', 32, 2, *BLOCK),
    '760m': run('760m', 16, 2, *BLOCK),
    '1b': run('1b', 8, 8, *BLOCK, WHOLE),
    '1b fp8': run('1b', 8, 8, *BLOCK, WHOLE, 'model.linear_impl=fp8'),
    '3b': run('3b', 4, 8, *BLOCK, WHOLE),
    '125m modern': run('modern_gpt/125m', 32, 8, *BLOCK),
    '125m modern AdamW': run('modern_gpt/125m', 32, 8, *BLOCK, 'optimizer.name=adamw', 'fsdp_config.version=1'),
    '760m modern': run('modern_gpt/760m', 8, 16, *BLOCK),
    '1b modern': run('modern_gpt/1b', 8, 8, *BLOCK, WHOLE),
    '1b checkpointed': run('1b', 16, 4, *BLOCK),
    '125m off': run('125m', 32, 2, *OFF),
    '350m off': run('350m', 32, 2, *OFF),
    '760m off': run('760m', 16, 2, *OFF),
    '1b off': run('1b', 8, 4, *OFF, WHOLE),
    '125m nanogpt': run('125m', 12, 4, *MODEL, *NANOGPT),
    '125m off plain': run('125m', 32, 2, *OFF, PLAIN),
    '125m plain': run('125m', 32, 2, *BLOCK, PLAIN),
    '125m model': run('125m', 32, 2, *MODEL),
    '125m model plain': run('125m', 32, 2, *MODEL, PLAIN),
    '350m off plain': run('350m', 16, 2, *OFF, PLAIN),
    '350m plain': run('350m', 16, 2, *BLOCK, PLAIN),
    '350m model': run('350m', 16, 2, *MODEL),
    '350m model plain': run('350m', 16, 2, *MODEL, PLAIN),
    '760m model': run('760m', 8, 2, *MODEL),
    '1b model': run('1b', 8, 8, *MODEL),
    '125m fsdp2': run('125m', 32, 2, *BLOCK, 'fsdp_config.version=2'),
    '125m gelu_tanh': run('125m', 32, 2, *BLOCK, 'model.mlp_act=gelu_tanh'),
    '125m profile': run('125m', 32, 2, *BLOCK, '--profile'),
    '1b profile': run('1b', 8, 2, *BLOCK, WHOLE, '--profile'),
    # last, because a run that does not fit leaves memory behind
    '7b': run('7b', 2, 8, *BLOCK, WHOLE),
}


def teraflops(flops: float, call: Callable[[], Any], n: int = 10) -> str:
    """Mean TFLOP/s of a call, after three calls to warm up."""
    for _ in range(3):
        call()
    return f'{flops * n / milliseconds_of(lambda: [call() for _ in range(n)]) / 1e9:.0f} TFLOP/s'


def kernels() -> None:
    """Prints the speed of attention (causal, forward and backward) and of matrix products, in bf16."""
    for batch, heads, dim in ((32, 12, 64), (16, 16, 64), (8, 12, 128), (8, 16, 128)):
        qkv = torch.randn(batch, 2048, 3, heads, dim, device='cuda', dtype=torch.bfloat16, requires_grad=True)
        direction = torch.randn(batch, heads, 2048, dim, device='cuda', dtype=torch.bfloat16)
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):

            def attend(qkv=qkv, direction=direction, backend=backend):
                with sdpa_kernel(backend):
                    out = scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(), is_causal=True)
                return torch.autograd.grad(out, qkv, direction)

            print(f'{batch} x {heads} heads of {dim}, {backend.name}: {teraflops(7 * batch * heads * 2048 ** 2 * dim, attend)}')
    for m, k, n in ((65536, 768, 3072), (4096, 768, 50304), (16384, 2048, 8192), (8192, 8192, 8192)):
        a, b = (torch.randn(shape, device='cuda', dtype=torch.bfloat16) for shape in ((m, k), (k, n)))
        print(f'{m} x {k} x {n}: {teraflops(2 * m * k * n, lambda a=a, b=b: a @ b)}')


def main(args: argparse.Namespace) -> None:
    os.chdir(ROOT)
    end = time.monotonic() + 60 * args.minutes
    for name in args.names or ROWS:
        argv = [*ROWS[name], '--steps', str(args.steps), '--warmup', '3', *args.more]
        if time.monotonic() > end:
            print(f'not run: {name}')
            continue
        sys.argv = ['src/tools/benchmark.py', *argv]  # the command of the row
        try:
            benchmark.main(benchmark.parse_args([*argv, '--out', str(args.out), '--append']))
        except (RuntimeError, UserError) as e:  # such as out of memory
            print(f'failed: {name}: {first_line(e)}')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', choices=[[], *ROWS], metavar='NAME', help=', '.join(ROWS))
    parser.add_argument('--kernels', action='store_true', help='time attention and matrix products instead')
    parser.add_argument('--minutes', type=float, default=60, help='no run begins later; default: %(default)s')
    parser.add_argument('--steps', type=int, default=8, help='timed steps of a run; default: %(default)s')
    parser.add_argument('--out', type=Path, default=Path('gpu_speed'), help='PATH.md and PATH.json; default: %(default)s')
    parser.add_argument('--more', nargs='*', default=[], metavar='key=value', help='settings for all runs')
    arguments = parser.parse_args()
    kernels() if arguments.kernels else main(arguments)
