"""Trains a ladder of models: small sizes whose losses predict the loss of a larger one, by one recipe or by two.

    python src/tools/ladder.py [--out ./ladder] [--sizes 64x2 96x2 ...] [--recipes plain modern] [--jobs 2]

Trains each size on about 20 tokens a parameter (Hoffmann et al. 2022, https://arxiv.org/abs/2203.15556). Then fits a
power law to loss against compute, and compares each loss with the prediction from the smaller sizes. With two recipes,
says how many FLOPs the second one needs for the losses of the first. With several `--rates` (peak learning rates of a
width of 128), the smallest size tries them all, and the others take the best. If you stop the program, the same command
continues.
"""
# ruff: noqa: E402

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple, Optional

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # import from the repository's root

from src.common import program
from src.common.errors import UserError, positive_int

ROOT = Path(__file__).resolve().parents[2]
SIZES = ['64x1', '64x2', '96x2', '128x2', '128x4']
RECIPES = {'plain': 'yamls/quickstart.yaml', 'modern': 'yamls/modern_gpt/quickstart.yaml'}
HEAD_DIM, VOCAB, SEQ_LEN, BATCH = 32, 1024, 128, 16
WARMUP, SAVES, SMOOTH, RATE, SEED = 100, 10, 50, 4e-3, 17


def parse_size(text: str) -> tuple[int, int]:
    width, _, layers = text.partition('x')
    if not (width.isdigit() and layers.isdigit() and int(layers) and int(width) and int(width) % HEAD_DIM == 0):
        raise argparse.ArgumentTypeError(f'{text!r} is not WIDTHxLAYERS with a width in multiples of {HEAD_DIM}, such '
                                         'as 64x2')
    return int(width), int(layers)


def positive_float(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f'{text} is not a number above 0')
    return float(text)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--out', type=Path, default='./ladder', help='folder for data, logs and checkpoints; default: %(default)s')
    add('--sizes', nargs='+', type=parse_size, default=[parse_size(size) for size in SIZES], metavar='WIDTHxLAYERS',
        help=f'default: {" ".join(SIZES)}')
    add('--recipes', nargs='+', choices=list(RECIPES), default=['plain'], help='default: plain')
    add('--rates', nargs='+', type=positive_float, default=[RATE], metavar='RATE', help=f'default: {RATE:g}')
    add('--seeds', type=positive_int, default=1, metavar='N', help='of the size in the middle; default: %(default)s')
    add('--source', default='sample', metavar='sample|FOLDER', help='text, as for convert_c4.py; default: %(default)s')
    add('--tokens_per_parameter', type=positive_float, default=20.0, metavar='N',
        help='length of each training; default: %(default)g')
    add('--jobs', type=positive_int, metavar='N', help='number of runs at a time; default: 1 on a GPU, else 2')
    args = parser.parse_args(argv)
    args.recipes, args.sizes = [*dict.fromkeys(args.recipes)], [*dict.fromkeys(args.sizes)]
    if len(args.recipes) == 2 and len(args.sizes) < 3:
        raise UserError(f'--recipes: two need at least three --sizes to compare, and there are {len(args.sizes)}')
    if args.source in ('', 'hub'):
        raise UserError(f'--source: {args.source!r} is no folder of text; name one, or sample')
    if args.source != 'sample':
        args.source = str(Path(args.source).expanduser().resolve())
    return args


if __name__ == '__main__':
    program.check_early(lambda: parse_args(sys.argv[1:]))  # before the imports below, which take seconds

import torch

from src.causal_lm import ComposerCausalLM
from src.common import workers
from src.common.flops import train_flops_per_token
from src.common.progress import progress
from src.config.load import load, to_plain
from src.model_registry import COMPOSER_MODEL_REGISTRY
from src.ranks.stop import EXIT_STOPPED
from src.sizing.power_law import fit, flops_for
from src.tools import plot_loss
from src.tools.run_logs import EVAL, read_run


class Rung(NamedTuple):
    """One training: a recipe, the size of its model, the length of its training, and the learning rate."""

    recipe: str
    d_model: int
    n_layers: int
    tokens_per_parameter: float
    rate: float = RATE  # the peak learning rate of a width of 128
    seed: int = SEED

    @property
    def shape(self) -> list[str]:
        return [str(ROOT / RECIPES[self.recipe]), f'max_seq_len={SEQ_LEN}', f'model.vocab_size={VOCAB}',
                f'model.d_model={self.d_model}', f'model.n_layers={self.n_layers}',
                f'model.n_heads={self.d_model // HEAD_DIM}',
                *[f'model.n_kv_heads={self.d_model // HEAD_DIM}'] * (self.recipe == 'modern')]

    @property
    def n_params(self) -> int:
        return meta_model(self.recipe, self.d_model, self.n_layers).n_params

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
        changed = [f'lr{self.rate:g}'] * (self.rate != RATE) + [f'seed{self.seed}'] * (self.seed != SEED)
        return '-'.join([self.recipe, f'{self.d_model}x{self.n_layers}', f'{self.batches}ba', *changed])

    def arguments(self, data: Path, out: Path) -> list[str]:
        """The arguments for main.py. The peak learning rate falls with the square root of the width."""
        every = f'{math.ceil(self.batches / SAVES)}ba'
        return [*self.shape, f'run_name={self.name}', f'data_remote={data}', f'seed={self.seed}',
                f'global_train_batch_size={BATCH}', f'device_train_microbatch_size={BATCH}',
                f'optimizer.lr={self.rate * math.sqrt(128 / self.d_model):.2e}', f'max_duration={self.batches}ba',
                f'scheduler.t_warmup={min(WARMUP, self.batches // 5)}ba', f'eval_interval={self.batches}ba',
                'eval_samples=-1', 'callbacks.text_samples=false', f'save_folder={out}/checkpoints/{{run_name}}',
                f'save_interval={every}', 'save_num_checkpoints_to_keep=1', 'autoresume=true',
                f'loggers.tensorboard.log_dir={out}/runs']

    def loss(self, out: Path) -> Optional[float]:
        """The loss of the last evaluation, in nats per token; None: the run is not finished."""
        try:
            return read_run(str(out / 'runs' / self.name)).scalars.get(EVAL, {}).get(self.batches)
        except UserError:  # the run has not started, or has not logged a batch
            return None


@cache
def meta_model(recipe: str, d_model: int, n_layers: int) -> ComposerCausalLM:
    """A size's model without memory, on the meta device."""
    cfg = to_plain(load(Rung(recipe, d_model, n_layers, 1).shape))['model']
    return COMPOSER_MODEL_REGISTRY[cfg['name']]({**cfg, 'max_seq_len': SEQ_LEN, 'device': 'meta'})


# ---------------------------------------------------------------- the tables
def table(rungs: Sequence[Rung], losses: Sequence[float]) -> str:
    """A row for each size with its loss and, from the fourth on, the loss that smaller sizes predict; then the law."""
    lines = [f'{"width x layers":>14} {"parameters":>11} {"tokens":>12} {"FLOPs":>9} {"loss":>7}   '
             'predicted by the smaller ones']
    flops = [rung.flops for rung in rungs]
    for i, (rung, loss) in enumerate(zip(rungs, losses, strict=True)):
        predicted = ''
        if i > 2:
            guess = fit(flops[:i], losses[:i]).loss(flops[i])
            predicted = f'   {guess:.4f} ({guess / loss - 1:+.1%})'
        lines.append(f'{f"{rung.d_model} x {rung.n_layers}":>14} {rung.n_params:>11,} {rung.tokens:>12,} '
                     f'{rung.flops:>9.2e} {loss:>7.4f}{predicted}')
    if len(rungs) > 2:
        law = fit(flops, losses)
        lines.append(f'loss = {law.floor:.3f} + {law.scale * 1e12 ** -law.exponent:.3f} * (FLOPs / 1e12) ** '
                     f'-{law.exponent:.4f}; at ten times the FLOPs of the largest {law.loss(10 * flops[-1]):.3f}')
    return '\n'.join(lines)


def comparison(names: Sequence[str], flops: Sequence[Sequence[float]], losses: Sequence[Sequence[float]]) -> str:
    """A row for each run of the first recipe with the FLOPs that the second one needs for the same loss."""
    lines = [f'{"loss of " + names[0]:>16} {"FLOPs":>9} {"of " + names[1]:>10}']
    for own, loss in zip(flops[0], losses[0]):
        needed = flops_for(loss, flops[1], losses[1])
        outside = '' if min(losses[1]) <= loss <= max(losses[1]) else ', extrapolated'
        lines.append(f'{loss:>16.4f} {own:>9.2e} {needed:>10.2e}   {own / needed:.2f} times fewer{outside}')
    return '\n'.join(lines)


# ---------------------------------------------------------------- the runs
def prepare(out: Path, source: str) -> Path:
    """Makes the data unless they exist: packed tokens with a vocabulary of 1024. Returns the folder."""
    data = out / 'data'
    if not all((data / split / 'manifest.json').exists() for split in ('train', 'val')):
        code = subprocess.run([sys.executable, 'convert_c4.py', '--source', source, '--train_tokenizer', str(VOCAB),
                               '--concat_tokens', str(SEQ_LEN + 1), '--out_root', str(data)], cwd=ROOT).returncode
        if code:
            raise UserError(f'{data}: convert_c4.py ended with exit code {code}; see its message above')
    made = json.loads((data / 'train' / 'manifest.json').read_text('utf-8'))
    if made['source'] != source:
        raise UserError(f'--source: {source}, but {data} holds text of {made["source"]}, on which the runs beside it '
                        f'were trained; delete {out}, or set another --out')
    print(f'text: {source}, {made["text_bytes"] / 1e6:.1f} MB, {made["tokens"]:,} tokens to train on')
    return data


def start(rung: Rung, data: Path, out: Path, threads: int) -> subprocess.Popen[bytes]:
    """Starts the training of one size in a new process, which stops when this process dies."""
    env = {**os.environ, 'OMP_NUM_THREADS': str(threads), 'PYTHONUNBUFFERED': '1'}
    with (out / f'{rung.name}.log').open('ab') as log:
        return subprocess.Popen([sys.executable, 'main.py', *rung.arguments(data, out)], cwd=ROOT, stdout=log,
                                stderr=subprocess.STDOUT, env=env, preexec_fn=workers.stop_with_parent)


def train_all(rungs: Sequence[Rung], data: Path, out: Path, jobs: int) -> None:
    """Trains all sizes that are not finished, the largest first, `jobs` at a time. The runs share the CPU cores.

    Raises UserError if a run fails. The other runs then stop and save a checkpoint.
    """
    waiting = sorted((rung for rung in set(rungs) if rung.loss(out) is None), key=lambda rung: rung.flops)
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    running: dict[Rung, subprocess.Popen[bytes]] = {}
    bar = progress('models', len(waiting), '')
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                rung = waiting.pop()
                running[rung] = start(rung, data, out, threads)
            time.sleep(1)
            for rung in [rung for rung, process in running.items() if process.poll() is not None]:
                code = running.pop(rung).returncode
                if code:
                    log = out / f'{rung.name}.log'
                    end = '\n'.join(log.read_text('utf-8', errors='replace').splitlines()[-12:])
                    raise UserError(f'{rung.name}: main.py ended with exit code {code}; if the loss diverged, leave '
                                    f'its rate out of --rates. {log} ends with\n{end}')
                bar.update()
    finally:
        bar.close()
        for process in running.values():
            process.send_signal(signal.SIGTERM)  # the run saves a checkpoint and stops
        for process in running.values():
            process.wait()


def losses_of(rungs: Sequence[Rung], out: Path) -> list[float]:
    """The final losses. Raises UserError where a run has none."""
    losses = [rung.loss(out) for rung in rungs]
    for rung, loss in zip(rungs, losses):
        if loss is None:  # the run was killed after its last save
            raise UserError(f'{rung.name}: the run ended without its last evaluation; delete '
                            f'{out}/checkpoints/{rung.name} and {out}/runs/{rung.name}, then run this command again')
    return [loss for loss in losses if loss is not None]


def train_ladders(args: argparse.Namespace, out: Path) -> dict[str, list[Rung]]:
    """Trains each recipe at its best learning rate. Returns the runs from the smallest size, prints what else was run.

    Raises UserError if a run fails.
    """
    data, jobs = prepare(out, args.source), args.jobs or (1 if torch.cuda.is_available() else 2)
    sizes = [Rung('plain', width, layers, args.tokens_per_parameter) for width, layers in args.sizes]
    sizes.sort(key=lambda rung: rung.flops)
    trials = {recipe: [sizes[0]._replace(recipe=recipe, rate=rate) for rate in args.rates] for recipe in args.recipes}
    if len(args.rates) > 1:
        train_all([rung for rungs in trials.values() for rung in rungs], data, out, jobs)
    best = {recipe: min(rungs, key=lambda rung: rung.loss(out) or math.inf) for recipe, rungs in trials.items()}
    ladders = {recipe: [rung._replace(recipe=recipe, rate=best[recipe].rate) for rung in sizes] for recipe in best}
    seeds = {recipe: [rungs[len(rungs) // 2]._replace(seed=SEED + i) for i in range(args.seeds)]
             for recipe, rungs in ladders.items()}
    train_all([rung for rungs in (*ladders.values(), *seeds.values()) for rung in rungs], data, out, jobs)
    for recipe in trials if len(args.rates) > 1 else ():
        tried = zip(args.rates, losses_of(trials[recipe], out))
        print(f'{recipe}, smallest size, loss by peak learning rate:', ', '.join(f'{a:g}: {b:.4f}' for a, b in tried))
    for recipe in seeds if args.seeds > 1 else ():
        repeated = losses_of(seeds[recipe], out)
        print(f'{recipe}, size in the middle, loss by seed:', ', '.join(f'{loss:.4f}' for loss in repeated))
    return ladders


def main(args: argparse.Namespace) -> None:
    """Trains the sizes, prints the tables, and draws the losses. Raises UserError if a run has failed."""
    out = args.out.expanduser().resolve()  # the shell does not expand the ~ in --out=~/x
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f'--out: {out} cannot be made: {e.strerror}; name a folder that can be written') from None
    try:
        ladders = train_ladders(args, out)
    except KeyboardInterrupt:
        print('stopped; run the same command again to continue', file=sys.stderr)
        sys.exit(EXIT_STOPPED)
    losses = {recipe: losses_of(rungs, out) for recipe, rungs in ladders.items()}
    for recipe, rungs in ladders.items():
        print(*[f'{recipe}, {RECIPES[recipe]}'] * (len(ladders) > 1), table(rungs, losses[recipe]), sep='\n')
    if len(ladders) == 2:
        flops = [[rung.flops for rung in rungs] for rungs in ladders.values()]
        print(comparison([*ladders], flops, [*losses.values()]))
    paths = {recipe: [str(out / 'runs' / rung.name) for rung in rungs] for recipe, rungs in ladders.items()}
    if len(ladders) == 1:
        plot_loss.main(plot_loss.parse_args([
            *paths[args.recipes[0]], '--out', str(out / 'loss-curve.png'), '--theme', 'both', '--x', 'flops', '--y',
            'train', '--log', '--smooth', str(SMOOTH), '--envelope']))
        return
    runs = {recipe: plot_loss.read_runs(paths[recipe]) for recipe in ladders}
    print(*plot_loss.save(lambda: plot_loss.draw_ladders(runs, SMOOTH), out / 'loss-curve.png', 'both'), sep='\n')


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops the program as Ctrl-C does
    program.run(main, parse_args)
