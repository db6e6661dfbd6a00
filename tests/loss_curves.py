"""Compares the loss curves of options that make training faster with the plain options: same data, same seed.

    python tests/loss_curves.py [--steps 300] [--root ./my-copy-c4] [key=value ...]

Trains the quick start's model on the sample, once for each row of ROWS; `key=value` settings apply to all rows. The
sample is made in a temporary folder unless --root names it. Prints for each row the mean loss of the last tenth of the
steps, and the largest distance from the plain curve, both smoothed over 20 steps. Two rows have other seeds: their
distance is the noise.
"""

# ruff: noqa: E402

import argparse
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import main  # before Composer, because Composer reads environment variables that main sets

# isort: split
import numpy as np
import torch
from composer.core import Callback, State
from composer.loggers import Logger

from src.config import load as config

PLAIN = ['model.attn_impl=torch', 'model.loss_impl=plain', 'optimizer.fused=false']
ROWS = {
    'plain': PLAIN,
    'another seed': [*PLAIN, 'seed=18'],
    'third seed': [*PLAIN, 'seed=19'],
    'fused attention': ['model.loss_impl=plain', 'optimizer.fused=false'],
    'chunked loss': ['model.attn_impl=torch', 'optimizer.fused=false'],
    'padded vocabulary': ['model.attn_impl=torch', 'model.vocab_multiple=100', 'optimizer.fused=false'],
    'fused AdamW': ['model.attn_impl=torch', 'model.loss_impl=plain'],
    'compiled blocks': [*PLAIN, 'compile_config.scope=block'],
    'compiled model': [*PLAIN, 'compile_config.scope=model'],
    'half the microbatch': [*PLAIN, 'device_train_microbatch_size=4'],
    'FSDP2, checkpointed': [*PLAIN, 'fsdp_config.activation_checkpointing=true'],
    'fp8 linear layers': [*PLAIN, 'model.linear_impl=fp8'],
    'all but fp8': ['compile_config.scope=block', 'model.vocab_multiple=100', 'fsdp_config.activation_checkpointing=true'],
}


class Losses(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def batch_end(self, state: State, logger: Logger) -> None:
        self.values.append(float(state.train_metrics['LanguageCrossEntropy'].compute()))  # over the whole batch


def train(root: str, steps: int, overrides: list[str]) -> np.ndarray:
    losses = Losses()
    argv = [str(ROOT / 'yamls/quickstart.yaml'), f'data_remote={root}', f'max_duration={steps}ba', 'eval_loader=null',
            'save_folder=null', 'loggers.tensorboard=false', 'callbacks.unigram_baseline=false', 'log_to_console=false',
            'progress_bar=false']
    torch._dynamo.reset()
    main.main(config.load([*argv, *overrides]), callbacks=[losses]).close()
    return np.array(losses.values)


def smooth(losses: np.ndarray, width: int = 20) -> np.ndarray:
    return np.convolve(losses, np.ones(width) / width, 'valid')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('overrides', nargs='*', metavar='key=value')
    parser.add_argument('--steps', type=int, default=300)
    parser.add_argument('--root')
    args = parser.parse_intermixed_args()
    with nullcontext(args.root) if args.root else tempfile.TemporaryDirectory() as root:
        if not args.root:
            subprocess.run([sys.executable, 'convert_c4.py', '--source', 'sample', '--out_root', root], cwd=ROOT, check=True)
        plain = None
        lines = [f'torch {torch.__version__}, {args.steps} steps, {" ".join(args.overrides)}', '',
                 '| | loss of the last tenth | largest distance from plain |', '|---|---|---|']
        for name, overrides in ROWS.items():
            losses = train(root, args.steps, [*overrides, *args.overrides])
            plain = losses if plain is None else plain
            distance = np.abs(smooth(losses) - smooth(plain)).max()
            lines.append(f'| {name} | {losses[-args.steps // 10:].mean():.4f} | {distance:.5f} |')
            print(lines[-1], flush=True)
        print('\n'.join(lines))
