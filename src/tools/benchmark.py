"""Times training: `python src/tools/benchmark.py YAML [key=value ...] [--steps 20] [--sweep key=a,b] [--against hf]`.

What is timed is a run as `main.py` makes it, through Composer's Trainer, with the YAML's batch, precision, sharding and
loader. Its data are random tokens in a temporary folder (--real_data: the YAML's own), it saves and logs nothing. The
same command after `composer` times several devices. Rates are of the median step after the warm-up.
"""
# ruff: noqa: E402

import sys
from pathlib import Path

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # import from the repository's root
    from src.ranks import environment  # before torch and Composer, whose import takes seconds

    environment.set_up_rank()

import argparse
import atexit
import gc
import json
import os
import re
import resource
import shlex
import shutil
import statistics
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import product
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
from src.attention import CausalAttention
from src.common.errors import UserError, positive_int
from src.common.flops import peak_flops, train_flops_per_token
from src.config import load as config
from src.config.schema import Config, HFCausalLMConfig
from src.hf_causal_lm import build_hf_config
from src.ranks import program, rendezvous
from src.ranks.failure_watch import FailureWatch
from src.sizing.memory import GPU_WORKSPACE, predict
from src.tools.stopwatch import PARTS, PROFILED, Stopwatch, build_rivals
from src.training.data import has_kits_loader
from src.training.report import environment
from src.training.setup import check_config

VERSIONS = ('python', 'torch', 'mosaicml', 'mosaicml-streaming', 'transformers')
VOCAB_SIZE = 50257  # of random tokens for a model that does not say how many it has
DOCUMENT = 512  # random tokens to an end of a document, on average
SYNTHETIC_BYTES = 64_000_000  # of random tokens, at most; they are read again where the steps need more


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('yaml', metavar='YAML')
    add('overrides', nargs='*', metavar='key=value', help='as for main.py')
    add('--steps', type=positive_int, default=20, help='timed, after the warm-up; default: %(default)s')
    add('--warmup', type=positive_int, default=5, help='steps before, which compile everything; default: %(default)s')
    add('--real_data', action='store_true', help="the YAML's data in place of random tokens")
    add('--sweep', action='append', default=[], metavar='key=a,b,c', help='a run for each value or combination')
    add('--against', action='append', choices=['hf', 'bare'], default=[], help='time in the same run, alternating, hf: '
        "Hugging Face GPT-2 of the same shape in a bare PyTorch loop; bare: the kit's model in that loop, which shows "
        'what the Trainer costs; may be given twice')
    add('--profile', action='store_true', help=f'{PROFILED} more steps under the profiler: a Chrome trace and a table')
    add('--out', type=Path, default=Path('benchmark'), metavar='PATH',
        help='PATH.json and PATH.md; default: %(default)s')
    add('--append', action='store_true', help='keep what the two files hold')
    return parser.parse_intermixed_args(argv)


# ---------------------------------------------------------------- one run
@contextmanager
def synthetic(vocab_size: int, seq_len: int, rows: int) -> Iterator[dict[str, str]]:
    """Random tokens in documents of random lengths, and a tokenizer of as many, in a temporary folder of each node.

    Yields the settings that name them.
    """
    names = [f'benchmark-{uuid.uuid4().hex}']
    dist.broadcast_object_list(names)  # one name on all nodes, which compare their settings
    folder, mine = Path(tempfile.gettempdir(), names[0]), False
    if dist.get_local_rank() == 0:
        with suppress(FileExistsError):  # another node's, where they share a disk
            folder.mkdir(mode=0o700)
            mine = True
    try:
        if mine:
            vocabulary = {f'<{i}>': i for i in range(vocab_size)}
            PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, '<0>')), eos_token='<0>',
                                    pad_token='<0>').save_pretrained(str(folder / 'tokenizer'))
            rng, dtype = np.random.default_rng(0), np.min_scalar_type(vocab_size - 1)
            fitting = max(1, min(rows, SYNTHETIC_BYTES // (seq_len * dtype.itemsize)))
            columns = {'tokens': f'ndarray:{dtype.name}:{seq_len}'}
            with MDSWriter(out=str(folder / 'train'), columns=columns) as writer:
                for _ in range(fitting):
                    ends = rng.random(seq_len) < 1 / DOCUMENT  # of documents, with token 0
                    writer.write({'tokens': np.where(ends, 0, rng.integers(1, vocab_size, seq_len)).astype(dtype)})
        dist.barrier()
        yield {'data_remote': str(folder), 'data_local': str(folder), 'tokenizer_name': str(folder / 'tokenizer')}
    finally:
        if mine:
            shutil.rmtree(folder, ignore_errors=True)


def prepare(cfg: DictConfig, steps: int, data: dict[str, str]) -> DictConfig:
    """The run that is timed: the YAML's, but that it ends after `steps`, evaluates, saves, logs and resumes nothing."""
    changed: dict[str, Any] = {
        'max_duration': f'{steps}ba', 'scheduler.t_warmup': '1ba', 'scheduler.t_max': '1dur', 'eval_loader': None,
        'save_folder': None, 'load_path': None, 'load_weights_only': False, 'autoresume': False, 'loggers': {},
        'callbacks': {}, 'progress_bar': False, 'log_to_console': False, **data}
    if data:
        dataset = {'remote': data['data_remote'], 'local': data['data_local'], 'split': 'train', 'shuffle': False,
                   'num_canonical_nodes': 1, 'tokenizer_name': data['tokenizer_name'],
                   'epoch_size': steps * cfg.global_train_batch_size}
        changed |= {f'train_loader.dataset.{key}': value for key, value in dataset.items()}
        for key in 'streams', 'cache_limit', 'validate_hash':  # which belong to the YAML's data
            cfg.train_loader.dataset.pop(key, None)
        if cfg.get('tokenizer'):  # null: main.py says whether the loader does without
            changed['tokenizer.tokenizer_name'] = data['tokenizer_name']
    for key, value in changed.items():
        OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    return cfg


def reads_real_data(args: argparse.Namespace) -> bool:
    """Whether the run reads the YAML's data; a loader of the user's own knows no other."""
    return args.real_data or not has_kits_loader()


def run(args: argparse.Namespace, overrides: list[str], number: int,
        failures: Optional[FailureWatch] = None) -> dict[str, Any]:
    """One record: what was timed, where, and the figures.

    `overrides` are those of the command line and those of this run of a sweep, and `number` is the record's. `failures`
    ends this rank when another fails. Raises UserError where the YAML or an override does not do.
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
        watch = Stopwatch(args.warmup, args.steps, build_rivals(args.against, c), trace)
        gc.collect()
        torch.cuda.empty_cache()  # else pieces of what the run before held make this one run out of memory
        torch._dynamo.reset()  # else what the run before compiled serves this one, or keeps it from compiling
        try:
            trainer = train(prepare(cfg, steps, data), failures, [watch])
            record = describe(args, overrides, trainer, c, watch)
            trainer.close()
        finally:
            atexit.unregister(Engine._close)  # with which Composer keeps every run's model until the process ends
    return record


def describe(args: argparse.Namespace, overrides: list[str], trainer: Any, c: Config,
             watch: Stopwatch) -> dict[str, Any]:
    """The record of a run that has ended."""
    state, devices, gpu = trainer.state, dist.get_world_size(), torch.cuda.is_available()
    model = getattr(state.model, 'module', state.model)  # DDP's
    versions = {name: value for name, value in environment(c, model).items() if name in VERSIONS}
    versions['cuda'] = torch.version.cuda if gpu else None  # pyright: ignore[reportAttributeAccessIssue]
    with suppress(PackageNotFoundError):
        versions['flash-attn'] = version('flash-attn')
    seq_len, precision = c.train_loader.dataset.max_seq_len, str(state.precision.value)
    device = torch.cuda.get_device_name() if gpu else get_cpu_model()
    steps = watch.milliseconds()
    ms = {part: statistics.median(step[part] for step in steps) for part in ('total', *PARTS)}
    rate = 1000 * c.global_train_batch_size * seq_len / ms['total']
    peak = peak_flops(device, precision)
    mfu, mfu_causal = (peak and rate / devices / peak * train_flops_per_token(
        model.n_params, model.n_layers, model.d_model, seq_len, causal) for causal in (False, True))
    hf = getattr(getattr(model.model, 'hf', None), 'config', None)
    kernels = {m.kernel for m in model.modules() if isinstance(m, CausalAttention)}
    fp8 = ', linear layers fp8' if getattr(c.model, 'linear_impl', 'plain') == 'fp8' else ''
    launcher = ['python'] if devices == 1 else ['composer', '-n', str(dist.get_local_world_size())]
    return {
        'yaml': args.yaml, 'overrides': overrides,
        'command': shlex.join([*launcher, 'src/tools/benchmark.py', *sys.argv[1:]]),
        'device': device, 'devices': devices, 'threads': torch.get_num_threads(),
        'versions': versions, 'parameters': model.n_params, 'seq_len': seq_len,
        'global_batch': c.global_train_batch_size, 'microbatch': state.device_train_microbatch_size,
        'precision': precision + fp8, 'attention': ', '.join(kernels) or getattr(hf, '_attn_implementation', 'its own'),
        'data': 'real' if reads_real_data(args) else 'random tokens', 'warmup': args.warmup, 'steps': len(steps),
        'ms': ms, 'ms_fastest': min(s['total'] for s in steps), 'ms_slowest': max(s['total'] for s in steps),
        'tokens_per_second': rate, 'mfu': mfu, 'mfu_causal': mfu_causal,
        'peak_memory': peak_memory(args),
        'predicted_memory': predicted(c, devices, state.device_train_microbatch_size) if gpu else None,
        'against': {name: statistics.median(times) for name, times in watch.rival_ms.items()}, 'profile': watch.table}


def peak_memory(args: argparse.Namespace) -> Optional[int]:
    """Bytes: allocated on the GPU, or of this process on a CPU. None: it would be the rivals' or earlier runs' too."""
    if args.against or args.sweep and not torch.cuda.is_available():
        return None
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def predicted(c: Config, devices: int, microbatch: int) -> Optional[int]:
    with suppress(UserError):  # a model that cannot run without data
        return predict(c, devices, True, microbatch).total - GPU_WORKSPACE  # which the allocator does not count


# ---------------------------------------------------------------- results

COLUMNS = ('run', 'parameters', 'batch × seq', 'precision', 'attention', 'tokens/s', 'MFU', 'causal MFU', 'ms/step',
           *PARTS, 'peak GiB', 'predicted', 'against')


def cells(r: dict[str, Any]) -> list[str]:
    """Of a record, after its name."""
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
    """A row for each record, then where and how each was made."""
    rows, made = [list(COLUMNS), ['---'] * len(COLUMNS)], {}
    for i, r in enumerate(records, first):
        rows.append([f'{i}. {Path(r["yaml"]).stem} {" ".join(r["overrides"])}'.strip(), *cells(r)])
        if 'error' not in r:
            says = ', '.join(f'{name} {v}' for name, v in r['versions'].items() if v)
            how = (f'`{r["command"]}` on {r["devices"]} × {r["device"]}, {r["threads"]} threads; {says}; {r["data"]}; '
                   f'median of {r["steps"]} steps after {r["warmup"]}')
            made.setdefault(how, []).append(str(i))
    lines = [' | '.join(cell.replace('|', '\\|') for cell in row) for row in rows]
    return '\n'.join([*(f'| {line} |' for line in lines), '',
                      *(f'- {", ".join(numbers)}: {how}' for how, numbers in made.items())])


def page(records: list[dict[str, Any]]) -> str:
    """The records as Markdown."""
    parts = ['# Benchmarks', 'Written by `src/tools/benchmark.py`. MFU counts 6 N + 12 L d S FLOPs a token, causal MFU '
             'half the attention. Times are milliseconds; a ratio above 1 says that the run is the faster. A dash: '
             'unknown.', table(records)]
    parts += [f'Profile of run {i}, {PROFILED} steps:\n\n```text\n{r["profile"].rstrip()}\n```'
              for i, r in enumerate(records, 1) if r.get('profile')]
    return '\n\n'.join(parts) + '\n'


# ---------------------------------------------------------------- the program
def combinations(sweeps: list[str]) -> list[tuple[str, ...]]:
    """The overrides of each run."""
    swept = []
    for sweep in sweeps:
        key, _, values = sweep.partition('=')
        if not key or not values:
            raise UserError(f'--sweep: {sweep!r} is not of the form key=a,b,c')
        swept.append([f'{key}={value}' for value in re.split(r',(?![^\[{]*[\]}])', values)])  # not within brackets
    return list(product(*swept))


def main(args: argparse.Namespace, failures: Optional[FailureWatch] = None) -> list[dict[str, Any]]:
    """Times every run of the sweep, and writes the records after each.

    Raises UserError for a mistake that all runs have. One that a single run of a sweep has is its record.
    """
    runs, target = combinations(args.sweep), Path(f'{args.out}.json')
    try:
        records = json.loads(target.read_text('utf-8')) if args.append and target.exists() else []
        target.parent.mkdir(parents=True, exist_ok=True)
        known = isinstance(records, list) and all(isinstance(r, dict) and 'yaml' in r for r in records)
        is_folder = not args.out.name or target.is_dir() or Path(f'{args.out}.md').is_dir()
        if not known or is_folder or not os.access(target.parent, os.W_OK):
            raise ValueError('a folder that may not be written, or another file')
    except (OSError, ValueError) as error:
        raise UserError(f'--out: {target} cannot be read or made: {error}; name another') from None
    for chosen in runs:
        try:
            record = run(args, [*args.overrides, *chosen], len(records) + 1, failures)
        except UserError as error:
            if not chosen or dist.get_world_size() > 1:  # the other ranks may not have it
                raise
            said = [line for line in str(error).splitlines() if not line.endswith('in the config:')]
            record = {'yaml': args.yaml, 'overrides': [*args.overrides, *chosen], 'error': said[0].strip(' -')}
        records.append(record)
        if dist.get_global_rank() == 0:
            print(table([record], len(records)), flush=True)
            target.write_text(json.dumps(records, indent=1) + '\n', 'utf-8')
            Path(f'{args.out}.md').write_text(page(records), 'utf-8')
    return records


if __name__ == '__main__':
    arguments = parse_args(sys.argv[1:])
    program.leave(program.run(lambda watch: main(arguments, watch)))
