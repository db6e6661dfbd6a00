"""Draws the losses of runs from their logs, or writes a report of each.

    python src/tools/plot_loss.py RUN [RUN ...] [--out loss.png] [--x flops --log --smooth 20 --envelope ...] [--html FOLDER]

RUN is a folder with TensorBoard files, such as ./runs/my-run, a file of the file logger or a folder with it, or one of W&B's
offline folders, such as ./wandb/offline-run-20250101_120000-abc. Training is a line per run, evaluation its dots.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, Optional

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # import from the repository's root

import matplotlib
import numpy as np

from src.common import program
from src.common.errors import UserError, positive
from src.tools import html_report
from src.tools.curves import curve, envelope, positions
from src.tools.run_logs import UNIGRAM, Run, read_run

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, NullFormatter

FORMATS = ('.png', '.svg', '.pdf')
LABELS = {'tokens': 'tokens', 'flops': 'training FLOPs', 'device-days': 'device-days'}


def read_scalars(run: str) -> dict[str, dict[int, float]]:
    """Every scalar in a run's logs: name to batch to value."""
    return read_run(run).scalars


# ---------------------------------------------------------------- pictures


def draw(runs: list[Run], x: str = 'tokens', y: str = 'both', log: bool = False, smooth: int = 1,
         with_envelope: bool = False) -> Figure:
    """Losses in the colours of matplotlib's style at hand.

    Args:
        runs: What was read.
        x: `tokens`, `flops` or `device-days`.
        y: `train`, `eval` or `both`.
        log: Logarithmic axes.
        smooth: Batches of a mean; above 1, the curve as it is lies behind.
        with_envelope: The compute-optimal envelope, against FLOPs.

    Raises:
        UserError: There is nothing to draw.
    """
    figure, axes = plt.subplots(figsize=(7, 4), layout='constrained')
    curves = [curve(run, x, smooth) for run in runs]
    if y == 'eval' and not any(len(c.eval_x) for c in curves):
        raise UserError(f'{", ".join(run.name for run in runs)}: no evaluation is logged; take --y train')
    if log and not any((np.concatenate([c.x, c.eval_x]) > 0).any() for c in curves):
        raise UserError(f'{", ".join(run.name for run in runs)}: no point with {x} above 0, so none on a logarithmic axis')
    for i, (run, c) in enumerate(zip(runs, curves)):
        name = (' ' if run.name.startswith('_') else '') + run.name.replace('$', r'\$')  # matplotlib hides what begins with _
        color = f'C{i}'
        if y != 'eval':
            if smooth > 1:
                axes.plot(c.x, c.raw, color=color, lw=0.6, alpha=0.4)
            axes.plot(c.x, c.smooth, marker='o' if len(c.x) == 1 else '', color=color, lw=1.6 if smooth > 1 else 0.8,
                      label=f'{name}, training')
        if y != 'train' and len(c.eval_x):
            axes.plot(c.eval_x, c.eval_loss, 'o', ls='-' if y == 'eval' else '', color=color, ms=6,
                      mec=plt.rcParams['axes.facecolor'], label='evaluation' if len(runs) == 1 else f'{name}, evaluation')
    if with_envelope:
        axes.plot(*envelope(curves), color=plt.rcParams['text.color'], lw=1.2, ls=':', label='compute-optimal envelope')
    for value in sorted({next(iter(run.scalars[UNIGRAM].values())) for run in runs if UNIGRAM in run.scalars}):
        axes.axhline(value, color=plt.rcParams['text.color'], alpha=0.6, ls='--', lw=1, label=f'unigram entropy {value:.2f}')
    axes.set(xlabel=LABELS[x], ylabel='loss (nats per token)')
    if log:
        axes.set(xscale='log', yscale='log')
        axes.yaxis.set(major_formatter=FuncFormatter(lambda v, _: f'{v:g}'), minor_formatter=FuncFormatter(lambda v, _: f'{v:g}'))
    elif x == 'tokens':
        axes.xaxis.set_major_formatter(EngFormatter(sep=''))
    if log:
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False, fontsize='small')
    axes.spines[['top', 'right']].set_visible(False)
    return figure


def save(out: str, dark: bool, *args: Any) -> None:
    """Draws and writes one picture; arguments as of `draw`.

    Raises:
        UserError: It cannot be written.
    """
    with plt.style.context('dark_background' if dark else 'default'):
        figure = draw(*args)
        try:
            figure.savefig(out, dpi=150)
        except OSError as e:
            raise UserError(f'--out: {out} cannot be written: {e.strerror}') from None
        finally:
            plt.close(figure)


# ---------------------------------------------------------------- program


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Draw the losses of runs, or write a report of each.')
    parser.add_argument('runs', nargs='+', metavar='RUN', help='a folder of TensorBoard, W&B or the file logger, or a log file')
    parser.add_argument('--out', metavar='FILE', help='the picture; its ending (.png, .svg, .pdf) is its format; loss.png')
    parser.add_argument('--theme', choices=['light', 'dark', 'both'], default='light', help='both: FILE-light and FILE-dark')
    parser.add_argument('--x', choices=list(LABELS), default='tokens', help='default: %(default)s')
    parser.add_argument('--y', choices=['train', 'eval', 'both'], default='both', help='default: %(default)s')
    parser.add_argument('--log', action='store_true', help='logarithmic axes')
    parser.add_argument('--smooth', type=positive, default=1, metavar='N', help='the mean of N batches, and the curve behind it')
    parser.add_argument('--envelope', action='store_true', help='with --x flops: the lowest loss of all runs for each compute')
    parser.add_argument('--html', metavar='FOLDER', help="write a report of each run, FOLDER/NAME.html, with this picture in it")
    return parser.parse_args(argv)


def _read(paths: list[str]) -> list[Run]:
    """Of several, one that has logged nothing is said and left out; unless none is left."""
    runs, said = [], []
    for path in paths:
        try:
            runs.append(read_run(path))
        except UserError as e:
            if not Path(path).exists():
                raise
            said.append(str(e))
    if not runs:
        raise UserError('\n'.join(said))
    for text in said:
        print(f'left out: {text}', file=sys.stderr)
    return runs


def main(args: argparse.Namespace) -> None:
    """Draws, writes, and says what.

    Raises:
        UserError: All that the user can mend.
    """
    out: Optional[Path] = None if args.html and not args.out else Path(args.out or 'loss.png')
    if out and out.suffix not in FORMATS:
        raise UserError(f'--out: {out}; its ending says the format: {", ".join(FORMATS)}')
    if args.envelope and args.x != 'flops':
        raise UserError(f'--envelope: is of compute, and --x is {args.x}; add --x flops')
    if args.html and not args.out and (args.envelope or args.theme != 'light'):
        raise UserError('--envelope, --theme: are of the picture, which --html writes only with --out FILE beside it')
    runs = list({run.files: run for run in _read(args.runs)}.values())  # a run's starts may each have been named
    names = [run.name for run in runs]
    runs = [run if names.count(run.name) == 1 else run._replace(name=f'{run.files[0].parent.parent.name}/{run.name}')
            for run in runs]
    names = [run.name for run in runs]
    runs = [run if names.count(run.name) == 1 else run._replace(name=f'{run.name}-{i}') for i, run in enumerate(runs, 1)]
    if out:
        for theme in ('light', 'dark') if args.theme == 'both' else (args.theme,):
            file = str(out.with_name(f'{out.stem}-{theme}{out.suffix}') if args.theme == 'both' else out)
            save(file, theme == 'dark', runs, args.x, args.y, args.log, args.smooth, args.envelope)
            print(f'{file}: loss of {", ".join(run.name for run in runs)}')
    for run in runs if args.html else []:
        with plt.rc_context(html_report.STYLE):
            picture = draw([run], args.x, args.y, args.log, args.smooth)
            print(html_report.write(run, picture, positions(run, 'tokens'), args.html))


if __name__ == '__main__':
    program.run(main, parse_args)
