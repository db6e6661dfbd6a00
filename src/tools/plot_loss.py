"""Draws the losses of runs from their logs.

    python src/tools/plot_loss.py RUN [RUN ...] [--out loss.png] [--x flops --log --smooth 20 --envelope ...]

RUN is a folder with TensorBoard files, such as ./runs/my-run, or a file of the file logger or a folder with it.
Training is a line per run, evaluation its dots.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # import from the repository's root

import matplotlib
import numpy as np
from numpy.typing import NDArray

from src.common import program
from src.common.errors import UserError, positive_int
from src.tools.run_logs import EVAL, TRAIN, UNIGRAM, Run, read_run

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, NullFormatter

FORMATS = ('.png', '.svg', '.pdf')
LABELS = {'tokens': 'tokens', 'flops': 'training FLOPs', 'device-days': 'device-days'}
Array = NDArray[np.float64]


# ---------------------------------------------------------------- numbers
class Curve(NamedTuple):
    """Loss against x, of training smoothed and not."""

    x: Array
    raw: Array
    smooth: Array
    eval_x: Array
    eval_loss: Array


def smoothed(values: Array, n: int) -> Array:
    """The mean of the n finite values around each, of fewer at the ends; nan where there is none."""
    finite = np.isfinite(values)
    kernel = np.ones(n)
    before = n // 2
    sums, counts = (np.convolve(v, kernel)[before:before + len(values)] for v in (np.where(finite, values, 0), finite))
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def curve(run: Run, x: str = 'tokens', n: int = 1) -> Curve:
    """What is drawn of a run: x as of `Run.positions`, and the mean of n batches.

    Raises UserError where no loss is finite, or the logs do not have x.
    """
    at, losses, evals = run.positions(x), run.scalars[TRAIN], run.scalars.get(EVAL, {})
    batches = sorted(losses.keys() & at.keys())
    raw = np.array([losses[batch] for batch in batches], float)
    if not np.isfinite(raw).any():
        raise UserError(f'{run.name}: none of its {len(losses)} training losses is a finite number beside a value of '
                        f'--x {x}')
    last = max(at)
    rate = at[last] / max(last, 1)  # for an evaluation after the last value
    eval_x = [at.get(batch, batch * rate) for batch in evals]
    return Curve(np.array([at[batch] for batch in batches], float), raw, smoothed(raw, n),
                 np.array(eval_x, float), np.array(list(evals.values()), float))


def envelope(curves: list[Curve]) -> tuple[Array, Array]:
    """The lowest smoothed training loss that any run has reached with so much compute, at each point where it falls."""
    x, loss = np.concatenate([c.x for c in curves]), np.concatenate([c.smooth for c in curves])
    order = np.lexsort((loss, x))
    order = order[np.isfinite(loss[order])]
    lowest = np.minimum.accumulate(loss[order])
    falls = np.concatenate([[True], lowest[1:] < lowest[:-1]])
    return x[order][falls], lowest[falls]


# ---------------------------------------------------------------- pictures
def draw(runs: list[Run], x: str = 'tokens', y: str = 'both', log: bool = False, smooth: int = 1,
         with_envelope: bool = False) -> Figure:
    """Losses in the colours of matplotlib's style at hand.

    `x` is `tokens`, `flops` or `device-days`; `y` is `train`, `eval` or `both`; `log` makes both axes logarithmic.
    `smooth` counts the batches of a mean; above 1, the curve as it is lies behind. `with_envelope` adds the
    compute-optimal envelope, against FLOPs. Raises UserError where there is nothing to draw.
    """
    figure, axes = plt.subplots(figsize=(7, 4), layout='constrained')
    curves = [curve(run, x, smooth) for run in runs]
    if y == 'eval' and not any(len(c.eval_x) for c in curves):
        raise UserError(f'{", ".join(run.name for run in runs)}: no evaluation is logged; take --y train')
    if log and not any((np.concatenate([c.x, c.eval_x]) > 0).any() for c in curves):
        raise UserError(f'{", ".join(run.name for run in runs)}: no point with {x} above 0, so none on a '
                        'logarithmic axis')
    ink = plt.rcParams['text.color']
    for i, (run, c) in enumerate(zip(runs, curves)):
        # Between two $ matplotlib reads maths, and what begins with _ it leaves out
        name = ' ' * run.name.startswith('_') + run.name.replace('$', r'\$')
        if y != 'eval':
            _draw_training(axes, c, f'{name}, training', f'C{i}', smooth > 1)
        if y != 'train' and len(c.eval_x):
            axes.plot(c.eval_x, c.eval_loss, 'o', ls='-' if y == 'eval' else '', color=f'C{i}', ms=6,
                      mec=plt.rcParams['axes.facecolor'], label=f'{name}, evaluation')
    if with_envelope:
        axes.plot(*envelope(curves), color=ink, lw=1.2, ls=':', label='compute-optimal envelope')
    for value in sorted({next(iter(run.scalars[UNIGRAM].values())) for run in runs if UNIGRAM in run.scalars}):
        axes.axhline(value, color=ink, alpha=0.6, ls='--', lw=1, label=f'unigram entropy {value:.2f}')
    _finish(axes, x, log)
    return figure


def _draw_training(axes: Any, c: Curve, label: str, color: str, with_raw: bool) -> None:
    if with_raw:
        axes.plot(c.x, c.raw, color=color, lw=0.6, alpha=0.4)
    axes.plot(c.x, c.smooth, marker='o' if len(c.x) == 1 else '', color=color, lw=1.6 if with_raw else 0.8, label=label)


def _finish(axes: Any, x: str, log: bool) -> None:
    axes.set(xlabel=LABELS[x], ylabel='loss (nats per token)')
    if log:
        plain = FuncFormatter(lambda value, _: f'{value:g}')
        axes.set(xscale='log', yscale='log')
        axes.yaxis.set(major_formatter=plain, minor_formatter=plain)
        axes.xaxis.set_minor_formatter(NullFormatter())
    elif x == 'tokens':
        axes.xaxis.set_major_formatter(EngFormatter(sep=''))
    axes.legend(frameon=False, fontsize='small')
    axes.spines[['top', 'right']].set_visible(False)


# ---------------------------------------------------------------- program
def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Draw the losses of runs.')
    add = parser.add_argument
    add('runs', nargs='+', metavar='RUN', help='a folder of TensorBoard or the file logger, or a log file')
    add('--out', type=Path, default='loss.png', metavar='FILE', help='.png, .svg or .pdf; default: %(default)s')
    add('--theme', choices=['light', 'dark', 'both'], default='light', help='both: FILE-light and FILE-dark')
    add('--x', choices=list(LABELS), default='tokens', help='default: %(default)s')
    add('--y', choices=['train', 'eval', 'both'], default='both', help='default: %(default)s')
    add('--log', action='store_true', help='logarithmic axes')
    add('--smooth', type=positive_int, default=1, metavar='N', help='the mean of N batches, and the curve behind it')
    add('--envelope', action='store_true', help='with --x flops: the lowest loss of all runs for each compute')
    return parser.parse_args(argv)


def read_runs(paths: list[str]) -> list[Run]:
    """The runs, each under a name of its own. Of several, one that has logged nothing is said and left out.

    Raises UserError where there is no such path, or none of them has logged anything.
    """
    runs, said = {}, []
    for path in paths:
        try:
            run = read_run(path)
            runs[run.place] = run  # a run's starts may each have been named
        except UserError as e:
            if not Path(path).exists():
                raise
            said.append(str(e))
    if not runs:
        raise UserError('\n'.join(said))
    for text in said:
        print(f'left out: {text}', file=sys.stderr)
    count = Counter(run.name for run in runs.values())
    return [run if count[run.name] == 1 else run._replace(name=str(run.place)) for run in runs.values()]


def main(args: argparse.Namespace) -> None:
    """Draws, writes, and says what."""
    if args.out.suffix not in FORMATS:
        raise UserError(f'--out: {args.out}; its ending says the format: {", ".join(FORMATS)}')
    if args.envelope and args.x != 'flops':
        raise UserError(f'--envelope: is of compute, and --x is {args.x}; add --x flops')
    runs, out = read_runs(args.runs), args.out
    for theme in ('light', 'dark') if args.theme == 'both' else (args.theme,):
        file = out.with_name(f'{out.stem}-{theme}{out.suffix}') if args.theme == 'both' else out
        with plt.style.context('dark_background' if theme == 'dark' else 'default'):
            figure = draw(runs, args.x, args.y, args.log, args.smooth, args.envelope)
            try:
                figure.savefig(file, dpi=150)
            except OSError as e:
                raise UserError(f'--out: {file} cannot be written: {e.strerror}') from None
            finally:
                plt.close(figure)
        print(f'{file}: loss of {", ".join(run.name for run in runs)}')


if __name__ == '__main__':
    program.run(main, parse_args)
