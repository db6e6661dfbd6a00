"""Several runs in one set of real ranks: `composer -n 2 tests/runs.py FILE`.

FILE is JSON: a list of [name, arguments of main.py]. Rank 0 writes for each run NAME.pt beside it, with what `record` returns.
Arguments that begin with src/tools/evaluate.py are of that program, and what is written are its figures.
An argument own_loader=NAME takes that builder of tests/own_loaders.py in place of the kit's.
Importing Composer takes seconds in every rank, so one launch does what several would.
"""

import json
import sys
from pathlib import Path
from typing import Any

if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from composer import Trainer
from composer.core import Callback, State
from composer.loggers import InMemoryLogger, Logger
from composer.utils import dist
from own_loaders import BUILDERS
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

import main
from src import data_c4
from src.callbacks.metrics import UnigramBaseline
from src.config import load as config
from src.ranks import rendezvous
from src.tools import evaluate
from src.training import data as training_data
from src.training import plugins

plugins.LOGGERS['memory'] = InMemoryLogger
reductions = 0  # of gradients, in FSDP
reduce_scatter: Any = torch.distributed.reduce_scatter_tensor


def counted(*args: Any, **kwargs: Any) -> Any:
    global reductions
    reductions += 1
    return reduce_scatter(*args, **kwargs)


torch.distributed.reduce_scatter_tensor = counted


class Samples(Callback):
    """The tokens of every global batch, in an order that does not depend on the ranks."""

    def __init__(self):
        self.batches: list[list[list[int]]] = []

    def batch_start(self, state: State, logger: Logger) -> None:
        rows = dist.all_gather_object(state.batch['input_ids'].tolist())
        self.batches.append(sorted(row for part in rows for row in part))


plugins.CALLBACKS['samples'] = Samples


def record(trainer: Trainer) -> dict[str, Any]:
    """Losses, learning rates, samples and final weights of a run with `loggers.memory` and `callbacks.samples`."""
    data = next((d.data for d in trainer.logger.destinations if isinstance(d, InMemoryLogger)), {})
    optimizer = type(trainer.state.optimizers[0]).__name__
    weights = get_model_state_dict(trainer.state.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {'losses': {int(t.batch): float(v) for t, v in data.get('loss/train/total', [])},
            'lrs': {int(t.batch): float(v) for t, v in data.get(f'lr-{optimizer}/group0', [])},
            'batches': next((cb.batches for cb in trainer.state.callbacks if isinstance(cb, Samples)), []),
            'unigram': next((cb.entropy for cb in trainer.state.callbacks if isinstance(cb, UnigramBaseline)), None),
            'weights': {k: v.clone() for k, v in weights.items()},
            'batch': int(trainer.state.timestamp.batch), 'reductions': reductions,
            'generated': generated(trainer.state.model)}


def generated(model: Any) -> Any:
    """The tokens with which a Hugging Face model continues a prompt; None for other models."""
    if not hasattr(model, 'generate'):
        return None
    prompt = torch.arange(8, device=next(model.parameters()).device)[None]
    return model.eval().generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0).tolist()


def train(*argv: str) -> dict[str, Any]:
    """Runs main.py in this process, with these arguments."""
    global reductions
    reductions = -1  # one reduction tests whether gloo averages
    trainer = main.main(config.load([*argv, 'loggers.memory={}', 'callbacks.samples={}', 'log_to_console=false']))
    result = record(trainer)
    trainer.close()
    return result


if __name__ == '__main__':
    path = Path(sys.argv[1])
    for name, argv in json.loads(path.read_text()):
        own = [arg.partition('=')[2] for arg in argv if arg.startswith('own_loader=')]
        argv = [arg for arg in argv if not arg.startswith('own_loader=')]
        training_data.build_c4_dataloader = BUILDERS[own[0]] if own else data_c4.build_c4_dataloader
        result = evaluate.main(evaluate.parse_args(argv[1:])) if argv[0] == 'src/tools/evaluate.py' else train(*argv)
        if dist.get_global_rank() == 0:
            torch.save(result, path.with_name(f'{name}.pt'))
    rendezvous.leave()
