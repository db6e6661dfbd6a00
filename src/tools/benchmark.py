"""Benchmarks training: times the steps of a run through Composer's Trainer.

    python src/tools/benchmark.py YAML [key=value ...] [--steps 20] [--sweep key=a,b] [--against hf]

`main.py` builds the run, with the batch, precision, sharding and loader of the YAML. The run saves and logs nothing.
Its data are random tokens in a temporary folder (--real_data: the YAML's data). Start the program with `composer` to
use several devices. Rates are those of the median step after the warm-up.
"""
# ruff: noqa: E402

import argparse
import re
import sys
from itertools import product
from pathlib import Path

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # import from the repository's root

from src.common.errors import UserError, positive_int
from src.config import load as config
from src.ranks.environment import set_up_rank
from src.training import early


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('yaml', metavar='YAML')
    add('overrides', nargs='*', metavar='key=value', help='settings, as for main.py')
    add('--steps', type=positive_int, default=20, help='timed steps, after the warm-up; default: %(default)s')
    add('--warmup', type=positive_int, default=5, help='steps before them, for compilation; default: %(default)s')
    add('--real_data', action='store_true', help="read the YAML's data instead of random tokens")
    add('--sweep', action='append', default=[], metavar='key=a,b,c',
        help='time a run for each value; give it several times for all combinations')
    add('--against', action='append', choices=['hf', 'bare'], default=[], help='also time another loop, step by '
        "step in turn. hf: Hugging Face's GPT-2 or Qwen3 of the same shape in a bare PyTorch loop; bare: the kit's "
        'model in that loop, which shows the cost of the Trainer. May be given twice')
    add('--profile', action='store_true', help='profile a few more steps: writes a Chrome trace and a table')
    add('--out', type=Path, default=Path('benchmark'), metavar='PATH',
        help='writes PATH.json and PATH.md; default: %(default)s')
    add('--append', action='store_true', help='keep the rows that the two files already hold')
    return parser.parse_intermixed_args(argv)


def combinations(sweeps: list[str]) -> list[tuple[str, ...]]:
    """The overrides of each run of a sweep."""
    swept = []
    for sweep in sweeps:
        key, _, values = sweep.partition('=')
        if not key or not values:
            raise UserError(f'--sweep: {sweep!r} must have the form key=a,b,c')
        swept.append([f'{key}={value}' for value in re.split(r',(?![^\[{]*[\]}])', values)])  # not in brackets
    return list(product(*swept))


def check_arguments() -> None:
    """Finds mistakes on the command line and in its YAML; those in one run of a sweep show later, in its record."""
    args = parse_args(sys.argv[1:])
    if not combinations(args.sweep)[0]:
        early.check_config(config.load([args.yaml, *args.overrides]), num_nodes=1)


if __name__ == '__main__':
    set_up_rank(check_arguments)  # before the imports below, which take seconds

import atexit
import gc
import json
import os
import resource
import shlex
import shutil
import statistics
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Optional

import numpy as np
import torch
from composer.core import Engine
from composer.utils import dist
from composer.utils.collect_env import get_cpu_model
from omegaconf import DictConfig, OmegaConf
from streaming import MDSWriter
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from main import main as train
from src.common.flops import peak_flops, train_flops_per_token
from src.config.schema import Config, HFCausalLMConfig
from src.hf_causal_lm import build_hf_config
from src.ranks import program, rendezvous
from src.ranks.failure_watch import FailureWatch
from src.sizing.memory import GPU_WORKSPACE, predict
from src.tools.stopwatch import PARTS, PROFILED, Stopwatch, build_baselines
from src.training import sharding
from src.training.data import uses_kit_loader
from src.training.report import environment
from src.training.setup import check_config

VERSIONS = ('python', 'torch', 'mosaicml', 'mosaicml-streaming', 'transformers')
VOCAB_SIZE = 50257  # of the random tokens, if the model does not tell its own
DOCUMENT = 512  # mean length of a document in random tokens
SYNTHETIC_BYTES = 64_000_000  # maximum of random tokens; longer runs read them again


# ---------------------------------------------------------------- one run
@contextmanager
def synthetic(vocab_size: int, seq_len: int, rows: int) -> Iterator[dict[str, str]]:
    """Writes random tokens, in documents of random lengths, and a tokenizer to a temporary folder on each node.

    Yields the settings that name them. Deletes the folder at the end.
    """
    names = [f'benchmark-{uuid.uuid4().hex}']
    dist.broadcast_object_list(names)  # the same name on all nodes, because nodes compare settings
    folder, is_owner = Path(tempfile.gettempdir(), names[0]), False
    if dist.get_local_rank() == 0:
        with suppress(FileExistsError):  # another node made it on a shared disk
            folder.mkdir(mode=0o700)
            is_owner = True
    try:
        if is_owner:
            vocabulary = {f'<{i}>': i for i in range(vocab_size)}
            PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, '<0>')), eos_token='<0>',
                                    pad_token='<0>').save_pretrained(str(folder / 'tokenizer'))
            rng, dtype = np.random.default_rng(0), np.min_scalar_type(vocab_size - 1)
            n_rows = max(1, min(rows, SYNTHETIC_BYTES // (seq_len * dtype.itemsize)))
            columns = {'tokens': f'ndarray:{dtype.name}:{seq_len}'}
            with MDSWriter(out=str(folder / 'train'), columns=columns) as writer:
                for _ in range(n_rows):
                    ends = rng.random(seq_len) < 1 / DOCUMENT  # token 0 ends a document
                    writer.write({'tokens': np.where(ends, 0, rng.integers(1, vocab_size, seq_len)).astype(dtype)})
        dist.barrier()
        yield {'data_remote': str(folder), 'data_local': str(folder), 'tokenizer_name': str(folder / 'tokenizer')}
    finally:
        if is_owner:
            shutil.rmtree(folder, ignore_errors=True)


def prepare(cfg: DictConfig, steps: int, data: dict[str, str]) -> DictConfig:
    """Changes the config to the timed run: it ends after `steps`, and evaluates, saves, logs and resumes nothing."""
    changed: dict[str, Any] = {
        'max_duration': f'{steps}ba', 'scheduler.t_warmup': '1ba', 'scheduler.t_max': '1dur', 'eval_loader': None,
        'save_folder': None, 'load_path': None, 'load_weights_only': False, 'autoresume': False, 'loggers': {},
        'callbacks': {}, 'progress_bar': False, 'log_to_console': False, **data}
    if data:
        dataset = {'remote': data['data_remote'], 'local': data['data_local'], 'split': 'train', 'shuffle': False,
                   'num_canonical_nodes': 1, 'tokenizer_name': data['tokenizer_name'],
                   'epoch_size': steps * cfg.global_train_batch_size}
        changed |= {f'train_loader.dataset.{key}': value for key, value in dataset.items()}
        for key in 'streams', 'cache_limit', 'validate_hash':  # they describe the YAML's data
            cfg.train_loader.dataset.pop(key, None)
        if cfg.get('tokenizer'):  # if null, main.py checks whether the loader needs a tokenizer
            changed['tokenizer.tokenizer_name'] = data['tokenizer_name']
    for key, value in changed.items():
        OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    return cfg


def reads_real_data(args: argparse.Namespace) -> bool:
    """Whether the run reads the YAML's data. A user's own loader always does."""
    return args.real_data or not uses_kit_loader()


def run(args: argparse.Namespace, overrides: list[str], number: int,
        failures: Optional[FailureWatch] = None) -> dict[str, Any]:
    """Times one run and returns its record: the settings, the machine and the figures.

    `overrides` are those of the command line and of this run of a sweep. `number` is the number of the record.
    `failures` ends this rank when another one fails. Raises UserError if the YAML or an override has a mistake.
    """
    cfg = config.load([args.yaml, *overrides])
    c = check_config(cfg, nodes=1)
    rendezvous.initialize(c.dist_timeout)
    if failures:
        failures.start()
    steps, trace = args.warmup + args.steps, None
    if args.profile:
        steps += PROFILED
        trace = Path(f'{args.out}.{number}.trace.json') if dist.get_global_rank() == 0 else None
    shape = build_hf_config(c.model) if isinstance(c.model, HFCausalLMConfig) else c.model
    made = nullcontext({}) if reads_real_data(args) else synthetic(
        getattr(shape, 'vocab_size', VOCAB_SIZE), c.train_loader.dataset.max_seq_len, steps * c.global_train_batch_size)
    with made as data:
        watch = Stopwatch(args.warmup, args.steps, build_baselines(args.against, c), trace)
        torch._dynamo.reset()  # else this run reuses what the previous one compiled, or does not compile
        gc.collect()
        torch.cuda.empty_cache()  # else memory of the previous run makes this one run out of memory
        try:
            trainer = train(prepare(cfg, steps, data), failures, [watch])
            record = describe(args, overrides, trainer, c, watch)
            trainer.close()
            sharding.free_fsdp1(trainer.state.model)
        finally:
            atexit.unregister(Engine._close)  # through this hook Composer keeps every model until the process ends
    return record


def describe(args: argparse.Namespace, overrides: list[str], trainer: Any, c: Config,
             watch: Stopwatch) -> dict[str, Any]:
    """The record of a finished run."""
    state, devices, gpu = trainer.state, dist.get_world_size(), torch.cuda.is_available()
    model = getattr(state.model, 'module', state.model)  # unwraps DDP
    versions = {name: value for name, value in environment(c, model).items() if name in VERSIONS}
    versions['cuda'] = torch.version.cuda if gpu else None  # pyright: ignore[reportAttributeAccessIssue]
    with suppress(PackageNotFoundError):
        versions['flash-attn'] = version('flash-attn')
    seq_len, precision = c.train_loader.dataset.max_seq_len, str(state.precision.value)
    device = torch.cuda.get_device_name() if gpu else get_cpu_model()
    steps = watch.milliseconds()
    ms = {part: statistics.median(step[part] for step in steps) for part in ('total', *PARTS)}
    rate, peak = 1000 * c.global_train_batch_size * seq_len / ms['total'], peak_flops(device, precision)
    mfu, mfu_causal = (peak and rate / devices / peak * train_flops_per_token(
        model.n_params, model.n_layers, model.d_model, seq_len, causal) for causal in (False, True))
    hf = getattr(getattr(model.model, 'hf', None), 'config', None)
    kernels = {m.kernel for m in model.modules() if isinstance(getattr(m, 'kernel', None), str)}
    launcher = ['python'] if devices == 1 else ['composer', '-n', str(dist.get_local_world_size())]
    return {
        'yaml': args.yaml, 'overrides': overrides,
        'command': shlex.join([*launcher, 'src/tools/benchmark.py', *sys.argv[1:]]),
        'device': device, 'devices': devices, 'threads': torch.get_num_threads(),
        'versions': versions, 'parameters': model.n_params, 'seq_len': seq_len,
        'global_batch': c.global_train_batch_size, 'microbatch': state.device_train_microbatch_size,
        'precision': precision + ', linear layers fp8' * (getattr(c.model, 'linear_impl', 'plain') == 'fp8'),
        'attention': ', '.join(kernels) or getattr(hf, '_attn_implementation', 'its own'),
        'data': 'real' if reads_real_data(args) else 'random tokens', 'warmup': args.warmup, 'steps': len(steps),
        'ms': ms, 'ms_fastest': min(s['total'] for s in steps), 'ms_slowest': max(s['total'] for s in steps),
        'tokens_per_second': rate, 'mfu': mfu, 'mfu_causal': mfu_causal, 'peak_memory': peak_memory(args),
        'predicted_memory': predict_memory(c, devices, state.device_train_microbatch_size) if gpu else None,
        'against': {name: statistics.median(times) for name, times in watch.baseline_ms.items()},
        'profile': watch.table}


def peak_memory(args: argparse.Namespace) -> Optional[int]:
    """Bytes allocated on the GPU, or of this process on a CPU. None if other loops or earlier runs count too."""
    if args.against or args.sweep and not torch.cuda.is_available():
        return None
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def predict_memory(c: Config, devices: int, microbatch: int) -> Optional[int]:
    with suppress(UserError):  # the model cannot run without data
        return predict(c, devices, True, microbatch).total - GPU_WORKSPACE  # outside of the allocator


# ---------------------------------------------------------------- results
COLUMNS = ('run', 'parameters', 'batch × seq', 'precision', 'attention', 'tokens/s', 'MFU', 'causal MFU', 'ms/step',
           *PARTS, 'peak GiB', 'predicted', 'against')


def cells(r: dict[str, Any]) -> list[str]:
    """The cells of a record, without its name."""
    if 'error' in r:
        return [r['error'], *['–'] * (len(COLUMNS) - 2)]
    against = [f'{name} {ms:.0f} ms, ratio {ms / r["ms"]["total"]:.3f}' for name, ms in r['against'].items()]
    return [f'{r["parameters"]:,}', f'{r["global_batch"]} ({r["microbatch"]} at a time) × {r["seq_len"]}',
            r['precision'], r['attention'], f'{r["tokens_per_second"]:,.0f}',
            *(f'{r[key]:.1%}' if r[key] else '–' for key in ('mfu', 'mfu_causal')),
            *(f'{r["ms"][part]:.1f}' for part in ('total', *PARTS)),
            *(f'{r[key] / 2**30:.2f}' if r[key] else '–' for key in ('peak_memory', 'predicted_memory')),
            ', '.join(against) or '–']


def table(records: list[dict[str, Any]], first: int = 1) -> str:
    """A row for each record, then the command, machine and versions of each."""
    rows, origins = [list(COLUMNS), ['---'] * len(COLUMNS)], {}
    for i, r in enumerate(records, first):
        rows.append([f'{i}. {Path(r["yaml"]).stem} {" ".join(r["overrides"])}'.strip(), *cells(r)])
        if 'error' not in r:
            versions = ', '.join(f'{name} {v}' for name, v in r['versions'].items() if v)
            origin = (f'`{r["command"]}` on {r["devices"]} × {r["device"]}, {r["threads"]} threads; {versions}; '
                      f'{r["data"]}; median of {r["steps"]} steps after {r["warmup"]}')
            origins.setdefault(origin, []).append(str(i))
    lines = [' | '.join(cell.replace('|', '\\|') for cell in row) for row in rows]
    return '\n'.join([*(f'| {line} |' for line in lines), '',
                      *(f'- {", ".join(numbers)}: {origin}' for origin, numbers in origins.items())])


def page(records: list[dict[str, Any]], earlier: str = '') -> str:
    """The Markdown page of all records. The sections (`## ...`) of the earlier page stay, because people write them."""
    parts = ['# Benchmarks', 'Written by `src/tools/benchmark.py`. MFU counts 6 N + 12 L d S FLOPs per token (N '
             'parameters, L blocks, width d, S tokens per sequence), causal MFU half of the attention. Times are in '
             'milliseconds; a ratio above 1 means that the run is faster. A dash means unknown.', table(records)]
    parts += [f'Profile of run {i}, {PROFILED} steps:\n\n```text\n{r["profile"].rstrip()}\n```' for i, r in
              enumerate(records, 1) if r.get('profile')]
    return '\n\n'.join(parts) + '\n' + ''.join(earlier.partition('\n## ')[1:])


# ---------------------------------------------------------------- the program
def main(args: argparse.Namespace, failures: Optional[FailureWatch] = None) -> list[dict[str, Any]]:
    """Times every run of the sweep, and writes all records after each run.

    Raises UserError for a mistake that all runs share. A mistake of a single run of a sweep becomes its record.
    """
    runs, target, md = combinations(args.sweep), Path(f'{args.out}.json'), Path(f'{args.out}.md')
    try:
        records = json.loads(target.read_text('utf-8')) if args.append and target.exists() else []
        target.parent.mkdir(parents=True, exist_ok=True)
        is_ours = isinstance(records, list) and all(isinstance(r, dict) and 'yaml' in r for r in records)
        is_folder = not args.out.name or target.is_dir() or md.is_dir()
        if not is_ours or is_folder or not os.access(target.parent, os.W_OK):
            raise ValueError('it is a folder, or not writable, or no file of this program')
    except (OSError, ValueError) as error:
        raise UserError(f'--out: {target} cannot be read or written: {error}; name another file') from None
    for chosen in runs:
        try:
            record = run(args, [*args.overrides, *chosen], len(records) + 1, failures)
        except UserError as error:
            if not chosen or dist.get_world_size() > 1:  # other ranks may not have this error
                raise
            lines = [line for line in str(error).splitlines() if not line.endswith('in the config:')]
            record = {'yaml': args.yaml, 'overrides': [*args.overrides, *chosen], 'error': lines[0].strip(' -')}
        records.append(record)
        if dist.get_global_rank() == 0:
            print(table([record], len(records)), flush=True)
            target.write_text(json.dumps(records, indent=1) + '\n', 'utf-8')
            md.write_text(page(records, md.read_text('utf-8') if md.exists() else ''), 'utf-8')
    return records


if __name__ == '__main__':
    arguments = parse_args(sys.argv[1:])
    program.leave(program.run(lambda watch: main(arguments, watch)))
