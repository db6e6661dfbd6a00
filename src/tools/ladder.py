"""A ladder of models: `python src/tools/ladder.py [--out ./ladder] [--sizes 64x2 80x3 ...] [--jobs 2]`.

Trains each size on about 20 tokens a parameter (Hoffmann et al. 2022, https://arxiv.org/abs/2203.15556) of the sample, fits a
power law to loss against compute, and holds each size's loss against what the smaller ones predict. The same command goes on
with a ladder that was stopped.
"""

import argparse
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Optional

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # import from the repository's root

import numpy as np
import torch

from src.common import workers
from src.common.errors import UserError, positive
from src.common.flops import train_flops_per_token
from src.common.progress import progress
from src.ranks import stop
from src.tools import plot_loss
from src.tools.run_logs import EVAL, read_run

ROOT = Path(__file__).resolve().parents[2]
SIZES = ['64x2', '80x3', '96x3', '112x4', '128x6']
HEAD_DIM, VOCAB, SEQ_LEN, BATCH = 16, 1024, 128, 16
WARMUP, EVALUATIONS, SMOOTH = 100, 10, 50


class Rung(NamedTuple):
    """One size, and how long it trains."""

    d_model: int
    n_layers: int
    tokens_per_parameter: float

    @property
    def n_params(self) -> int:
        """Token and position embeddings, blocks, last LayerNorm; the head is the token embedding."""
        d = self.d_model
        return (VOCAB + SEQ_LEN) * d + self.n_layers * (12 * d * d + 13 * d) + 2 * d

    @property
    def batches(self) -> int:
        return max(1, round(self.tokens_per_parameter * self.n_params / (BATCH * SEQ_LEN)))

    @property
    def tokens(self) -> int:
        return self.batches * BATCH * SEQ_LEN

    @property
    def flops(self) -> float:
        return self.tokens * train_flops_per_token(self.n_params, self.n_layers, self.d_model, SEQ_LEN)

    @property
    def name(self) -> str:
        return f'{self.d_model}x{self.n_layers}-{self.batches}ba'

    def arguments(self, data: Path, out: Path) -> list[str]:
        """Of main.py. The peak learning rate falls with the root of the width."""
        every = f'{math.ceil(self.batches / EVALUATIONS)}ba'
        return ['yamls/quickstart.yaml', f'data_remote={data}', f'max_seq_len={SEQ_LEN}', f'model.vocab_size={VOCAB}',
                f'model.d_model={self.d_model}', f'model.n_heads={self.d_model // HEAD_DIM}', f'model.n_layers={self.n_layers}',
                f'global_train_batch_size={BATCH}', f'device_train_microbatch_size={BATCH}',
                f'optimizer.lr={4e-3 * math.sqrt(128 / self.d_model):.2e}', f'max_duration={self.batches}ba',
                f'scheduler.t_warmup={min(WARMUP, self.batches // 5)}ba', f'eval_interval={every}', 'eval_samples=-1',
                f'run_name={self.name}', f'save_folder={out}/checkpoints/{{run_name}}', f'save_interval={every}',
                'save_num_checkpoints_to_keep=1', 'autoresume=true', f'loggers.tensorboard.log_dir={out}/runs']

    def loss(self, out: Path) -> Optional[float]:
        """Of the last evaluation, in nats per token; None: it has not come to its end."""
        try:
            return read_run(str(out / 'runs' / self.name)).scalars.get(EVAL, {}).get(self.batches)
        except UserError:  # it has not begun, or not logged a batch
            return None


# ---------------------------------------------------------------- the power law


def fit(flops: Sequence[float], losses: Sequence[float]) -> tuple[float, float, float]:
    """Floor, scale and exponent of `loss = floor + scale * flops ** -exponent`.

    The form of Henighan et al. 2020 (https://arxiv.org/abs/2010.14701) for the best loss at a given compute. Of 1000 floors from
    0 to the lowest loss the one whose power law, fitted to the logarithms of what is above it, comes nearest to the losses.
    Three numbers take three points to fit, and more to tell anything.
    """
    x, y = np.log(flops), np.asarray(losses)

    def law(floor: float) -> tuple[float, float, float, float]:
        slope, intercept = np.polyfit(x, np.log(y - floor), 1)
        error = np.square(np.log(floor + np.exp(intercept + slope * x)) - np.log(y)).sum()
        return float(error), float(floor), float(np.exp(intercept)), -float(slope)

    return min(map(law, np.linspace(0, y.min(), 1000, endpoint=False)))[1:]


def table(rungs: Sequence[Rung], losses: Sequence[float]) -> str:
    """Each size with its loss and, from the fourth on, what the sizes before it predict; then the law over all of them."""
    lines = [f'{"width x layers":>14} {"parameters":>11} {"tokens":>12} {"FLOPs":>9} {"loss":>7}   predicted by the smaller ones']
    flops = [rung.flops for rung in rungs]
    for i, (rung, loss) in enumerate(zip(rungs, losses, strict=True)):
        predicted = ''
        if i > 2:
            floor, scale, exponent = fit(flops[:i], losses[:i])
            guess = floor + scale * flops[i] ** -exponent
            predicted = f'   {guess:.4f} ({guess / loss - 1:+.1%})'
        lines.append(f'{f"{rung.d_model} x {rung.n_layers}":>14} {rung.n_params:>11,} {rung.tokens:>12,} {rung.flops:>9.2e} '
                     f'{loss:>7.4f}{predicted}')
    if len(rungs) > 2:
        floor, scale, exponent = fit(flops, losses)
        lines.append(f'loss = {floor:.3f} + {scale * 1e12 ** -exponent:.3f} * (FLOPs / 1e12) ** -{exponent:.4f}; at ten times '
                     f'the FLOPs of the largest {floor + scale * (10 * flops[-1]) ** -exponent:.3f}')
    return '\n'.join(lines)


# ---------------------------------------------------------------- the runs


def prepare(out: Path) -> Path:
    """The sample as packed tokens of a vocabulary of 1024."""
    data = out / 'data'
    if not all((data / split / 'manifest.json').exists() for split in ('train', 'val')):
        code = subprocess.run([sys.executable, 'convert_c4.py', '--source', 'sample', '--train_tokenizer', str(VOCAB),
                               '--concat_tokens', str(SEQ_LEN + 1), '--out_root', str(data)], cwd=ROOT).returncode
        if code:
            raise UserError(f'{data}: convert_c4.py ended with exit code {code}')
    return data


def tail(path: Path) -> str:
    return '\n'.join(path.read_text('utf-8', errors='replace').splitlines()[-12:])


def trained_batches(path: Path) -> int:
    """By the last line of a run's console."""
    text = path.read_text('utf-8', errors='replace') if path.exists() else ''
    found = text.rpartition('[batch=')[2].partition('/')[0]
    return int(found) if found.isdigit() else 0


def climb(rungs: Sequence[Rung], data: Path, out: Path, jobs: int) -> None:
    """Trains what is not finished, the largest first, `jobs` at a time with as many threads each as there are cores for it.

    Raises:
        UserError: A run has failed; the others are stopped, and have saved what they have.
    """
    waiting = sorted((rung for rung in rungs if rung.loss(out) is None), key=lambda rung: rung.flops)
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    running: dict[Rung, subprocess.Popen[bytes]] = {}
    bar = progress(f'{len(waiting)} models', sum(rung.tokens for rung in waiting), ' tokens')
    done = dict.fromkeys(waiting, 0)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                rung = waiting.pop()
                with (out / f'{rung.name}.log').open('ab') as log:
                    running[rung] = subprocess.Popen(
                        [sys.executable, 'main.py', *rung.arguments(data, out)], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                        env={**os.environ, 'OMP_NUM_THREADS': str(threads), 'PYTHONUNBUFFERED': '1'},
                        preexec_fn=workers.stop_with_parent)
            time.sleep(1)
            for rung, process in list(running.items()):
                log = out / f'{rung.name}.log'
                code = process.poll()
                batches = rung.batches if code == 0 else trained_batches(log)
                bar.update((batches - done[rung]) * BATCH * SEQ_LEN)
                done[rung] = batches
                if code is not None:
                    del running[rung]
                    if code != 0:
                        raise UserError(f'{rung.name}: main.py ended with exit code {code}; {log} ends with\n{tail(log)}')
    finally:
        bar.close()
        for process in running.values():
            process.send_signal(signal.SIGTERM)  # which saves
        for process in running.values():
            process.wait()


def parse_size(text: str) -> tuple[int, int]:
    width, x, layers = text.partition('x')
    if not (x and width.isdigit() and layers.isdigit() and int(layers) and int(width) and int(width) % HEAD_DIM == 0):
        raise argparse.ArgumentTypeError(f'{text!r} is not WIDTHxLAYERS with a width in multiples of {HEAD_DIM}, as in 64x2')
    return int(width), int(layers)


def above_zero(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f'{text} is not a number above 0')
    return float(text)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--out', type=Path, default='./ladder', help='folder of data, logs and checkpoints; default: %(default)s')
    add('--sizes', nargs='+', type=parse_size, default=[parse_size(size) for size in SIZES], metavar='WIDTHxLAYERS',
        help=f'default: {" ".join(SIZES)}')
    add('--tokens_per_parameter', type=above_zero, default=20.0, metavar='N', help='default: %(default)g')
    add('--jobs', type=positive, default=1 if torch.cuda.is_available() else 2, metavar='N',
        help='runs at a time; default: %(default)s')
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    out = Path(os.path.expanduser(args.out)).resolve()  # a shell leaves the ~ of --out=~/x as it is
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f'--out: {out} cannot be made: {e.strerror}') from None
    rungs = sorted({Rung(width, layers, args.tokens_per_parameter) for width, layers in args.sizes}, key=lambda r: r.flops)
    climb(rungs, prepare(out), out, args.jobs)
    losses = {rung: rung.loss(out) for rung in rungs}
    for rung in [rung for rung, loss in losses.items() if loss is None]:  # killed after its last save
        raise UserError(f'{rung.name}: has ended without its last evaluation; delete {out}/checkpoints/{rung.name} and '
                        f'{out}/runs/{rung.name}, and give the same command again')
    print(table(rungs, [loss for loss in losses.values() if loss is not None]))
    runs = [read_run(str(out / 'runs' / rung.name)) for rung in rungs]
    for theme in ('light', 'dark'):
        picture = str(out / f'loss-curve-{theme}.png')
        plot_loss.save(picture, theme == 'dark', runs, 'flops', 'train', True, SMOOTH, True)
        print(f'{picture}: training loss against FLOPs, the mean of {SMOOTH} batches, and the compute-optimal envelope')


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main(parse_args(sys.argv[1:]))
    except UserError as e:
        sys.exit(f'error: {e}')
    except KeyboardInterrupt:
        print('stopped; the same command goes on', file=sys.stderr)
        sys.exit(stop.EXIT_STOPPED)
