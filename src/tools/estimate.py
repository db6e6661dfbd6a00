"""Estimates how many GPUs a run needs, and for how long: memory, FLOPs, hours, cost, bytes on disk.

    python src/tools/estimate.py [YAML or folder] [key=value ...] [--gpu h200] [--gpus N]

No GPU is needed: the program traces one step of the model on tensors without data. For a folder it prints a table of
all YAMLs in the folder, the smallest model first.
"""
# ruff: noqa: E402

import argparse
import math
import sys
from pathlib import Path

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # import from the repository's root

from src.common import program
from src.common.errors import UserError, positive_int
from src.common.flops import ASSUMED_MFU, CARDS
from src.config import load as config
from src.config.check import check, check_without_torch
from src.training import plugins


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Reads the arguments. Raises UserError if a number is out of its range."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('yaml', nargs='?', metavar='YAML', help='a YAML, or a folder of YAMLs for a table; default: yamls/mosaic_gpt')
    add('overrides', nargs='*', metavar='key=value', help='settings, as for main.py')
    add('--gpu', default='a100-40gb', choices=CARDS, metavar='NAME', help=f'{", ".join(CARDS)}; default: %(default)s')
    add('--gpus', type=positive_int, metavar='N', help='GPUs over all nodes; default: the fewest on which the run fits')
    add('--mfu', type=float, default=ASSUMED_MFU,
        help="fraction of the GPU's peak that the model reaches, an assumption; default: %(default)s")
    add('--price', type=float, metavar='DOLLARS', help='dollars for one GPU and hour')
    args = parser.parse_intermixed_args(argv)
    if args.yaml and '=' in args.yaml:  # without a YAML the settings apply to all runs
        args.yaml, args.overrides = None, [args.yaml, *args.overrides]
    if not 0 < args.mfu <= 1:
        raise UserError(f'--mfu: {args.mfu:g} must be above 0 and at most 1, such as {ASSUMED_MFU}')
    if args.price is not None and not 0 <= args.price < math.inf:
        raise UserError(f'--price: {args.price:g} must be a number of dollars, 0 or more')
    return args


def check_arguments() -> None:
    """Finds mistakes on the command line and in its YAML. Raises UserError."""
    args = parse_args(sys.argv[1:])
    if args.yaml and not Path(args.yaml).is_dir():
        check_without_torch(config.load([args.yaml, *args.overrides]), plugins.REGISTRIES, args.gpus or 1, gpu=[True])


if __name__ == '__main__':
    program.check_early(check_arguments)  # before the imports below, which take seconds

from src.sizing.estimate import Estimate, estimate
from src.sizing.report import overview, report
from src.training.data import uses_kit_loader

YAMLS = Path(__file__).resolve().parents[2] / 'yamls' / 'mosaic_gpt'


def estimate_of(yaml: str, args: argparse.Namespace) -> Estimate:
    c = check(config.load([yaml, *args.overrides]), plugins.REGISTRIES, args.gpus or 1, True,
              uses_kit_loader=uses_kit_loader())
    return estimate(c, CARDS[args.gpu], args.gpus, args.mfu)


def main(args: argparse.Namespace) -> list[Estimate]:
    """Prints a report of one YAML, or a table of all in a folder. Raises UserError if a config has a mistake."""
    folder = Path(args.yaml or YAMLS)
    if args.yaml and not folder.is_dir():
        e = estimate_of(args.yaml, args)
        print(f'{args.yaml} on {args.gpu}\n\n{report(e, args.price)}')
        return [e]
    estimates = {}
    for path in sorted(folder.glob('*.yaml')):
        try:
            estimates[path.stem] = estimate_of(str(path), args)
        except UserError as error:
            raise UserError(f'{path.name}: {error}') from None
    if not estimates:
        raise UserError(f'{folder}: this folder has no YAML; name a file, or a folder such as yamls/mosaic_gpt')
    estimates = dict(sorted(estimates.items(), key=lambda item: item[1].n_params))
    print(overview(estimates, args.price))
    return list(estimates.values())


if __name__ == '__main__':
    program.run(main, parse_args)
