"""Draws the loss curves of runs from their logs.

    python src/tools/plot_loss.py RUN [RUN ...] [--out loss.png] [--x flops --log --smooth 20 --envelope ...]

RUN is a folder of TensorBoard files, such as ./runs/my-run, or a file of the file logger, or a folder with such a file.
Lines are training losses, dots are evaluations.
"""
# ruff: noqa: E402

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # import from the repository's root

from src.common import program
from src.common.errors import UserError, positive_int

FORMATS = ('.png', '.svg', '.pdf')
LABELS = {'tokens': 'tokens', 'flops': 'training FLOPs', 'device-days': 'device-days'}


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Reads the arguments. Raises UserError if two do not go together, or the file has an unknown ending."""
    parser = argparse.ArgumentParser(description='Draws the loss curves of runs.')
    add = parser.add_argument
    add('runs', nargs='+', metavar='RUN', help='a folder of TensorBoard files, or a file of the file logger')
    add('--out', type=Path, default='loss.png', metavar='FILE', help='.png, .svg or .pdf; default: %(default)s')
    add('--theme', choices=['light', 'dark', 'both'], default='light',
        help='both: FILE-light and FILE-dark; default: %(default)s')
    add('--x', choices=list(LABELS), default='tokens', help='horizontal axis; default: %(default)s')
    add('--y', choices=['train', 'eval', 'both'], default='both', help='losses to draw; default: %(default)s')
    add('--log', action='store_true', help='logarithmic axes')
    add('--smooth', type=positive_int, default=1, metavar='N', help='smooth over N batches; raw curve behind')
    add('--envelope', action='store_true', help='the lowest loss of all runs for each compute; needs --x flops')
    args = parser.parse_args(argv)
    if args.out.suffix not in FORMATS:
        raise UserError(f'--out: {args.out}; the ending must be one of {", ".join(FORMATS)}')
    if args.envelope and args.x != 'flops':
        raise UserError(f'--envelope: needs --x flops, and --x is {args.x}')
    return args


if __name__ == '__main__':
    program.check_early(lambda: parse_args(sys.argv[1:]))  # before the imports below, which take seconds

import matplotlib
import numpy as np
from numpy.typing import NDArray

from src.sizing.power_law import fit, flops_for
from src.tools.run_logs import EVAL, TRAIN, UNIGRAM, Run, read_run

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, NullFormatter

Array = NDArray[np.float64]


# ---------------------------------------------------------------- numbers
class Curve(NamedTuple):
    """The losses of a run against x: training, raw and smoothed, and evaluation."""

    x: Array
    raw: Array
    smooth: Array
    eval_x: Array
    eval_loss: Array


def smoothed(values: Array, n: int) -> Array:
    """The mean of the finite values among the n around each value (fewer at the ends); nan if none is finite."""
    finite = np.isfinite(values)
    kernel = np.ones(n)
    before = n // 2
    sums, counts = (np.convolve(v, kernel)[before:before + len(values)] for v in (np.where(finite, values, 0), finite))
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def curve(run: Run, x: str = 'tokens', n: int = 1) -> Curve:
    """The curve of a run, smoothed over n batches. `x` is as in `Run.positions`.

    Raises UserError if no loss is finite, or the logs do not contain x.
    """
    at, losses, evals = run.positions(x), run.scalars[TRAIN], run.scalars.get(EVAL, {})
    batches = sorted(losses.keys() & at.keys())
    raw = np.array([losses[batch] for batch in batches], float)
    if not np.isfinite(raw).any():
        raise UserError(f'{run.name}: none of its {len(losses)} training losses is a finite number with a value of '
                        f'--x {x}')
    last = max(at)
    rate = at[last] / max(last, 1)  # extrapolates to evaluations after the last batch
    eval_x = [at.get(batch, batch * rate) for batch in evals]
    return Curve(np.array([at[batch] for batch in batches], float), raw, smoothed(raw, n),
                 np.array(eval_x, float), np.array(list(evals.values()), float))


def envelope(curves: list[Curve]) -> tuple[Array, Array]:
    """The lowest smoothed training loss that any run reached with at most this compute: the points where it falls."""
    x, loss = np.concatenate([c.x for c in curves]), np.concatenate([c.smooth for c in curves])
    order = np.lexsort((loss, x))
    order = order[np.isfinite(loss[order])]
    lowest = np.minimum.accumulate(loss[order])
    falls = np.concatenate([[True], lowest[1:] < lowest[:-1]])
    return x[order][falls], lowest[falls]


# ---------------------------------------------------------------- pictures
def draw(runs: list[Run], x: str = 'tokens', y: str = 'both', log: bool = False, smooth: int = 1,
         with_envelope: bool = False) -> Figure:
    """Draws losses in the current style of matplotlib.

    `x` is `tokens`, `flops` or `device-days`; `y` is `train`, `eval` or `both`; `log` makes both axes logarithmic.
    `smooth` is a number of batches; above 1, the raw curve lies behind the smoothed one. `with_envelope` adds the
    compute-optimal envelope, against FLOPs. Raises UserError if there is nothing to draw.
    """
    figure, axes = plt.subplots(figsize=(7, 4), layout='constrained')
    curves = [curve(run, x, smooth) for run in runs]
    if y == 'eval' and not any(len(c.eval_x) for c in curves):
        raise UserError(f'{", ".join(run.name for run in runs)}: no evaluation is logged; use --y train')
    if log and not any((np.concatenate([c.x, c.eval_x]) > 0).any() for c in curves):
        raise UserError(f'{", ".join(run.name for run in runs)}: no point has {x} above 0, so a logarithmic axis '
                        'is empty; draw without --log')
    ink = plt.rcParams['text.color']
    for i, (run, c) in enumerate(zip(runs, curves)):
        # matplotlib reads text between two $ as maths, and hides labels that begin with _
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


def draw_ladders(ladders: dict[str, list[Run]], smooth: int) -> Figure:
    """Draws the runs of two recipes against FLOPs: training losses, the last evaluations, and a power law of each.

    `smooth` is a number of batches. An arrow leads from the last evaluation of the first recipe to the FLOPs with which
    the second one reaches that loss.
    """
    figure, axes = plt.subplots(figsize=(7, 4), layout='constrained')
    points = {}
    for i, (name, runs) in enumerate(ladders.items()):
        curves = [curve(run, 'flops', smooth) for run in runs]
        for c in curves:
            axes.plot(c.x, c.smooth, color=f'C{i}', lw=0.8, alpha=0.5)
        points[name] = flops, losses = [c.eval_x[-1] for c in curves], [c.eval_loss[-1] for c in curves]
        x = np.geomspace(min(flops), max(flops))
        axes.plot(x, fit(flops, losses).loss(x), color=f'C{i}', lw=1.2, ls='--')
        axes.plot(flops, losses, 'o', color=f'C{i}', ms=6, mec=plt.rcParams['axes.facecolor'], label=name)
    (first_flops, first_losses), second = points.values()
    for x, loss in zip(first_flops, first_losses):
        needed = flops_for(loss, *second)
        arrow = {'arrowstyle': '->', 'color': plt.rcParams['text.color']}
        axes.annotate('', (needed, loss), (x, loss), arrowprops=arrow)
        axes.annotate(f'{x / needed:.1f} times', (x, loss), (8, 0), textcoords='offset points', fontsize='small',
                      va='center')
    losses = [*first_losses, *second[1]]
    axes.set(xlim=(min(first_flops) / 10, None), ylim=(0.97 * min(losses), 1.2 * max(losses)))
    _finish(axes, 'flops', log=True)
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
def read_runs(paths: list[str]) -> list[Run]:
    """Reads the runs and gives each a unique name. Leaves out a run that cannot be drawn, with a message.

    Raises UserError if a path does not exist, or no run can be drawn.
    """
    runs, errors = {}, []
    for path in paths:
        try:
            run = read_run(path)
            runs[run.place] = run  # two paths may be starts of one run
        except UserError as e:
            if not Path(path).exists():
                raise
            errors.append(str(e))
    if not runs:
        raise UserError('\n'.join(errors))
    for text in errors:
        print(f'left out: {text}', file=sys.stderr)
    count = Counter(run.name for run in runs.values())
    return [run if count[run.name] == 1 else run._replace(name=str(run.place)) for run in runs.values()]


def save(draw_figure: Callable[[], Figure], out: Path, theme: str) -> list[Path]:
    """Draws a figure in one theme, or in both, and writes its files. Raises UserError if one cannot be written."""
    files = []
    for name in ('light', 'dark') if theme == 'both' else (theme,):
        files.append(out.with_name(f'{out.stem}-{name}{out.suffix}') if theme == 'both' else out)
        with plt.style.context('dark_background' if name == 'dark' else 'default'):
            figure = draw_figure()
            try:
                figure.savefig(files[-1], dpi=150)
            except OSError as e:
                raise UserError(f'--out: {files[-1]} cannot be written: {e.strerror}') from None
            finally:
                plt.close(figure)
    return files


def main(args: argparse.Namespace) -> None:
    """Draws the picture, writes it, and prints its file and runs."""
    runs = read_runs(args.runs)
    for file in save(lambda: draw(runs, args.x, args.y, args.log, args.smooth, args.envelope), args.out, args.theme):
        print(f'{file}: loss of {", ".join(run.name for run in runs)}')


if __name__ == '__main__':
    program.run(main, parse_args)
