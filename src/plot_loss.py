"""Draws the loss against tokens from what the `tensorboard` logger wrote.

    python src/plot_loss.py RUN [RUN ...] --out loss.png [--dark]

RUN is a folder with TensorBoard files, such as ./runs/my-run. Training is a line per run, evaluation its dots.
"""

import argparse
import sys
from pathlib import Path

if __name__ == '__main__':  # run as `python src/plot_loss.py`: import from the repository's root, not from src
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from src.errors import UserError

TRAIN, EVAL, TOKENS, UNIGRAM = 'loss/train/total', 'metrics/eval/LanguageCrossEntropy', 'time/token', 'baseline/unigram_entropy'


def read_scalars(run: str) -> dict[str, dict[int, float]]:
    """Every scalar in a run's TensorBoard files: name to batch to value.

    Raises:
        UserError: There is no training loss in the folder.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    scalars: dict[str, dict[int, float]] = {}
    for folder in sorted({path.parent for path in Path(run).rglob('events.out.tfevents*')}):
        events = EventAccumulator(str(folder), size_guidance={'scalars': 0})
        events.Reload()
        for tag in events.Tags()['scalars']:
            scalars.setdefault(tag, {}).update({event.step: event.value for event in events.Scalars(tag)})
    if TRAIN not in scalars:
        raise UserError(f'{run}: holds no TensorBoard file with {TRAIN}; train with loggers.tensorboard.log_dir=./runs')
    # Composer starts a file at every flush, and their names do not always sort as they were written.
    return {tag: dict(sorted(values.items())) for tag, values in scalars.items()}


def draw(runs: list[str], out: str, dark: bool = False) -> None:
    """Writes the picture.

    Args:
        runs: Folders with TensorBoard files; one that was resumed may have several.
        out: The picture; its ending (.png, .svg, .pdf) is its format.
        dark: Light lines on a dark page.
    """
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter
    plt.style.use('dark_background' if dark else 'default')
    figure, axes = plt.subplots(figsize=(7, 4), layout='constrained')
    for i, run in enumerate(runs):
        scalars = read_scalars(run)
        tokens = scalars[TOKENS]  # logged when a batch begins: tokens seen before it
        steps = sorted(set(scalars[TRAIN]) & set(tokens))
        axes.plot([tokens[s] for s in steps], [scalars[TRAIN][s] for s in steps], color=f'C{i}', lw=0.8, alpha=0.8,
                  label=f'{Path(run).name}, training')
        last = max(tokens)
        per_step = tokens[last] / max(last, 1)
        evals = sorted(scalars.get(EVAL, {}).items())
        axes.plot([s * per_step for s, _ in evals], [v for _, v in evals], 'o', color=f'C{i}', ms=6, mec='white',
                  label='evaluation')
        if UNIGRAM in scalars:
            axes.axhline(next(iter(scalars[UNIGRAM].values())), color=f'C{i}', ls='--', lw=1, label='unigram entropy')
    axes.set(xlabel='tokens', ylabel='loss (nats per token)')
    axes.xaxis.set_major_formatter(EngFormatter(sep=''))
    axes.legend(frameon=False)
    axes.spines[['top', 'right']].set_visible(False)
    figure.savefig(out, dpi=150)
    plt.close(figure)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description='Draw the loss against tokens.')
    parser.add_argument('runs', nargs='+', metavar='RUN', help='a folder with TensorBoard files')
    parser.add_argument('--out', default='loss.png', help='the picture; its ending is its format')
    parser.add_argument('--dark', action='store_true', help='light lines on a dark page')
    args = parser.parse_args(argv)
    draw(args.runs, args.out, args.dark)
    print(f'{args.out}: loss of {", ".join(args.runs)}')


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except UserError as e:
        sys.exit(f'error: {e}')
