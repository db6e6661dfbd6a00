"""Evaluates a checkpoint: loss, perplexity and bits per byte over a whole split.

    python src/tools/evaluate.py YAML load_path=CHECKPOINT [key=value ...] [--split val] [--out PATH.json]

CHECKPOINT is a file, the folder of a sharded checkpoint, or the folder of a run. Model, data, precision and sharding
are those of the YAML. `eval_samples=1000` evaluates only the first samples. Start the program with `composer` to use
several devices: each sample counts once. Nothing but PATH.json is saved or logged.
"""
# ruff: noqa: E402

import argparse
import sys
from pathlib import Path
from typing import Any, Optional

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # import from the repository's root

from omegaconf import DictConfig, OmegaConf

from src.common.errors import UserError, first_line, is_out_of_memory
from src.config import load as config
from src.ranks.environment import check_environment, set_up_rank, this_process
from src.training import early


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('yaml', metavar='YAML')
    add('overrides', nargs='*', metavar='key=value', help='settings, as for main.py')
    add('--split', help='default: the split of eval_loader; does not change streams that set their own split')
    add('--out', type=Path, metavar='PATH.json', help='also write the figures to this new file')
    return parser.parse_intermixed_args(argv)


def load(args: argparse.Namespace) -> DictConfig:
    """Loads the YAML for an evaluation: the whole split unless `eval_samples` is an override, without training.

    Raises UserError if the YAML cannot be read, or has no `eval_loader`.
    """
    cfg = config.load([args.yaml, 'eval_samples=-1', *args.overrides])
    _override(cfg, allow_same_split=True, global_train_batch_size=this_process().world_size, max_duration='1ba',
              scheduler={'t_warmup': '0dur'}, algorithms={}, callbacks={}, loggers={}, save_folder=None,
              autoresume=False, compile_config=None)
    settings = config.to_plain(cfg)
    if not settings.get('eval_loader'):
        raise UserError(f'eval_loader: not set, so there is no data to evaluate on; give {args.yaml} a '
                        'section eval_loader, as in yamls/quickstart.yaml')
    _override(cfg, load_weights_only=settings.get('load_path') is not None,
              **{'eval_loader.drop_last': False, 'eval_loader.eval_samples': settings['eval_samples']})
    if settings.get('device_eval_batch_size') is not None:  # else the default is the YAML's microbatch
        _override(cfg, device_train_microbatch_size=1)
    if args.split:
        _override(cfg, **{'eval_loader.dataset.split': args.split})
    return cfg


def _override(cfg: DictConfig, **changed: Any) -> None:
    for key, value in changed.items():
        OmegaConf.update(cfg, key, value, merge=False, force_add=True)


if __name__ == '__main__':  # before the imports below, which take seconds
    set_up_rank(lambda: early.check_config(load(parse_args(sys.argv[1:])), num_nodes=1))

import json
import logging
import math
import os
from collections.abc import Mapping

import numpy as np
import torch
from composer import Trainer
from composer.core import Evaluator, Precision
from composer.utils import dist
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from src.causal_lm import IGNORE_INDEX, ComposerCausalLM, next_token_targets
from src.checkpoints.loading import (
    check_loadable,
    check_same_tokenizer,
    check_same_weights,
    finish_loading,
    read_safely,
)
from src.checkpoints.start import Start, find_start
from src.config.derived import resolve_precision
from src.config.schema import Config, HFCausalLMConfig
from src.data_c4 import StreamingC4
from src.ranks import program
from src.ranks.agreement import check_ranks_agree
from src.ranks.failure_watch import FailureWatch
from src.tokenizer import HFTokenizer
from src.training import build, sharding
from src.training.data import fingerprints, reads_kit_dataset
from src.training.failures import explain_external_failures, explain_run_failures
from src.training.setup import check_config, join_ranks

log = logging.getLogger('src')


# ---------------------------------------------------------------- bits per byte
def bytes_per_token(tokenizer: Any, vocab_size: int) -> NDArray[np.float64]:
    """The number of UTF-8 bytes of text that each token id stands for; 0 for special tokens, such as EOS.

    In a byte-level BPE every character of a token stands for one byte (Radford et al. 2019, section 2.2), so the
    numbers are exact, also for tokens that hold part of a character. If the tokenizer normalises text, they count the
    normalised text.

    `tokenizer` is a Hugging Face tokenizer, and the model has embeddings for `vocab_size` ids. Returns an array of
    shape (vocab_size,), with NaN where the number is unknown: for ids without a token, for added tokens that remove the
    spaces beside them, and for all tokens if the tokenizer is no byte-level BPE or puts a space before each document.
    """
    lengths = np.full(vocab_size, np.nan)
    if not tokenizer.is_fast:
        return lengths
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    model, splits = parts['model'], json.dumps(parts['pre_tokenizer'])
    if (model['type'] != 'BPE' or model['continuing_subword_prefix'] or model['end_of_word_suffix']
            or '"ByteLevel"' not in splits or '"add_prefix_space": true' in splits):
        return lengths
    for token, i in model['vocab'].items():
        lengths[i] = len(token)
    for i, token in tokenizer.added_tokens_decoder.items():
        strips_spaces = token.lstrip or token.rstrip
        lengths[i] = 0 if token.special else np.nan if strips_spaces else len(token.content.encode())
    return lengths


class Totals(Metric):
    """Sums over all samples: nats of loss, targets, bytes of text that the targets stand for, and samples."""

    full_state_update = False
    lengths: Tensor
    sums: Tensor

    def __init__(self, lengths: NDArray) -> None:
        super().__init__()
        self.register_buffer('lengths', torch.from_numpy(lengths), persistent=False)
        # float64: counts are exact, and the sum of the losses depends little on the number of ranks
        self.add_state('sums', torch.zeros(4, dtype=torch.float64), dist_reduce_fx='sum')

    def update(self, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        _, targets = next_token_targets(batch)
        n_targets = outputs['n_targets'].double()
        self.sums[0] += outputs['loss'].double() * n_targets
        self.sums[1] += n_targets
        self.sums[2] += self.lengths[targets[targets != IGNORE_INDEX]].sum()
        self.sums[3] += len(targets)

    def compute(self) -> Tensor:
        return self.sums


# ---------------------------------------------------------------- the evaluation
@explain_external_failures('eval_loader')
def evaluate(c: Config, watch: Optional[FailureWatch] = None) -> dict[str, Any]:
    """Evaluates one split and returns the figures by name. The config is checked and has an `eval_loader`.

    Raises UserError if the checkpoint or the data is missing, or belongs to another model, or if the data hold no
    token to predict.
    """
    join_ranks(c, watch)
    start = find_start(None, None, False, c.load_path, weights_only=True)
    check_loadable(start, sharding.is_sharded(c.fsdp_config, torch.cuda.is_available()))
    tokenizer = build.build_tokenizer(c)
    if isinstance(tokenizer, HFTokenizer):
        check_same_tokenizer(start.manifest, tokenizer, str(start.path))
    model = build.build_model(c, tokenizer, start)
    evaluators = build.build_evaluators(c, model)
    check_ranks_agree('data', fingerprints(None, evaluators[0].dataloader))
    loader: Any = evaluators[0].dataloader.dataloader
    dataset: Optional[StreamingC4] = loader.dataset.dataset if reads_kit_dataset(loader) else None
    data_tokenizer = dataset.tokenizer if dataset else tokenizer and tokenizer.tokenizer
    n_ids = model.vocab_size
    totals = Totals(bytes_per_token(data_tokenizer, n_ids) if data_tokenizer else np.full(n_ids, np.nan))
    nats, targets, n_bytes, samples = sum_over_samples(c, start, model, evaluators, totals)

    if dataset:
        assert samples == len(loader.dataset), f'{samples} samples were counted, of {len(loader.dataset)}'
    place = dataset.place if dataset else 'the data of your own eval_loader'
    if not targets:
        raise UserError(f'eval_loader.dataset: {place} holds no token to predict')
    loss = nats / targets
    return {'loss': loss, 'perplexity': math.inf if loss > 709 else math.exp(loss),  # a larger one overflows a float
            'bits_per_byte': nats / math.log(2) / n_bytes if n_bytes > 0 else None,  # NaN > 0 is False
            'documents' if dataset and dataset.column == 'text' else 'sequences': int(samples), 'tokens': int(targets),
            'bytes': None if math.isnan(n_bytes) else int(n_bytes), 'data': place,
            'weights': describe_weights(c, start)}


def sum_over_samples(c: Config, start: Start, model: ComposerCausalLM, evaluators: list[Evaluator],
                     totals: Totals) -> list[float]:
    """Loads the weights and evaluates. Returns the sums of `totals` over all ranks."""
    has_gpu = torch.cuda.is_available()
    model.get_metrics = lambda is_train=False: {} if is_train else {'totals': totals}
    model.update_metric = lambda batch, outputs, metric: metric.update(batch, outputs)
    with read_safely(start), explain_run_failures(c):
        trainer = Trainer(
            model=model,
            eval_dataloader=evaluators,
            precision=Precision(resolve_precision(c.precision, has_gpu)),
            parallelism_config=sharding.build_parallelism(c.fsdp_config, has_gpu),
            dist_timeout=c.dist_timeout,
            seed=c.seed,
            progress_bar=sys.stderr.isatty() and dist.get_global_rank() == 0,
            load_path=start.composer_load_path,
            load_weights_only=start.kind == 'weights',
            load_ignore_keys=check_same_weights(start, model.state_dict()),
        )
    finish_loading(start, trainer)
    log.info('weights: %s', describe_weights(c, start))
    try:
        trainer.eval()
    except (RuntimeError, MemoryError) as e:
        if is_out_of_memory(e):
            raise UserError(f'out of memory: {first_line(e)}\nset device_eval_batch_size below '
                            f'{c.device_eval_batch_size}, or use more devices with '
                            'fsdp_config.sharding_strategy=FULL_SHARD') from e
        raise
    result = trainer.state.eval_metrics['eval']['totals'].compute().tolist()
    trainer.engine.close()
    return result


def describe_weights(c: Config, start: Start) -> str:
    if start.path:
        return start.path
    if isinstance(c.model, HFCausalLMConfig) and c.model.pretrained:
        return f'pretrained, of {c.model.pretrained_model_name_or_path}'
    return 'as initialised, untrained: load_path is not set'


def format_figures(figures: Mapping[str, Any]) -> str:
    """The lines that the program prints."""
    rows = 'documents' if 'documents' in figures else 'sequences'
    bits = 'unknown: tokenizer_name is not set, is no byte-level BPE, or is not the tokenizer of the data'
    if figures['bits_per_byte'] is not None:
        bits = f'{figures["bits_per_byte"]:.4f}'
    n_bytes = '' if figures['bytes'] is None else f', {figures["bytes"]:,} bytes of text'
    return (f'evaluation on {figures["data"]}\n'
            f'  weights        {figures["weights"]}\n'
            f'  loss           {figures["loss"]:.4f}   nats per token\n'
            f'  perplexity     {figures["perplexity"]:.2f}\n'
            f'  bits per byte  {bits}\n'
            f'  predicted      {figures["tokens"]:,} tokens of {figures[rows]:,} {rows}{n_bytes}')


def main(args: argparse.Namespace, watch: Optional[FailureWatch] = None) -> dict[str, Any]:
    """Evaluates, prints the figures, and writes them to `--out`. Raises UserError for a mistake of the user."""
    check_environment(os.environ)
    if args.out and dist.get_global_rank() == 0:  # rank 0 writes the file
        if not args.out.absolute().parent.is_dir() or not os.access(args.out.absolute().parent, os.W_OK):
            raise UserError(f'--out: {args.out}: there is no writable folder {args.out.parent}; name another file')
        if args.out.exists():
            raise UserError(f'--out: {args.out} already exists; name another file, or move this one away')
    c = check_config(load(args), nodes=1)
    program.log_to_stderr()
    figures = evaluate(c, watch)
    if dist.get_global_rank() == 0:
        print(format_figures(figures), flush=True)
        if args.out:
            not_finite = {key: None for key, x in figures.items() if isinstance(x, float) and not math.isfinite(x)}
            args.out.write_text(json.dumps(figures | not_finite, indent=1) + '\n', 'utf-8')
    return figures


if __name__ == '__main__':
    arguments = parse_args(sys.argv[1:])
    program.leave(program.run(lambda watch: main(arguments, watch)))
