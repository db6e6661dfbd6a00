"""Measures how time grows with work, in a table for each part; work per second must not fall. It asserts nothing.

    python tests/growth.py [conversion] [loader] [shards] [steps] [parts] [checkpoints]

Without arguments it measures all parts, in about 5 minutes on two cores. Each figure is the median of three runs, in which the kit's
way and the plain way take turns. The program makes its own data in a temporary folder.
"""
# ruff: noqa: B023  (functions that use the variables of a loop are called within the same turn)

import argparse
import io
import itertools
import json
import logging
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

if __name__ == '__main__':  # the folder of this script is already on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import xxhash
from composer.loggers import Logger
from composer.utils.checkpoint import load_checkpoint
from conftest import documents, write_mds
from convert_speed import make_input
from launch import ROOT, tiny
from loader_speed import measure
from streaming import Stream, StreamingDataset
from torch.utils.data import DataLoader

import convert_c4
import main as kit
from src.checkpoints.loading import check_same_weights, read_safely
from src.checkpoints.manifest import Manifest
from src.checkpoints.start import FRESH, find_start, start_from_path
from src.checkpoints.writer import CheckpointWriter, RunInfo
from src.config.load import load
from src.conversion.sample_corpus import train_tokenizer
from src.data_c4 import build_c4_dataloader

REPEATS, BATCH = 3, 8
copies = itertools.count()


class Table(NamedTuple):
    title: str
    unit: str  # of work
    plain: str = 'plain way'


class Row(NamedTuple):
    name: str
    work: float  # in the unit of the table
    seconds: float
    plain: Optional[float] = None  # seconds of the plain way


Results = Iterator[Union[Table, Row]]


def make_tokenizer(folder: Path) -> None:
    """Trains a tokenizer of 512 tokens on the documents of the tests, and writes it to `folder`."""
    folder.mkdir()
    train_tokenizer(documents('train'), folder, 512)


def show(result: Union[Table, Row]) -> None:
    if isinstance(result, Table):
        print(f'\n**{result.title}**\n\n| work | seconds | µs per {result.unit} | {result.unit}s/s | {result.plain}, seconds | '
              'times |\n|---|---|---|---|---|---|')
    else:
        name, work, seconds, plain = result
        cells = [name, f'{seconds:.3f}', f'{seconds / work * 1e6:,.{0 if seconds / work > 1e-5 else 3}f}', f'{work / seconds:,.0f}']
        print(f'| {" | ".join([*cells, *([f"{plain:.3f}", f"{seconds / plain:.2f}"] if plain else "––")])} |', flush=True)


def timed(call: Callable[[], Any]) -> float:
    """The seconds that a function returns, or else takes."""
    start = time.perf_counter()
    result = call()
    return result if isinstance(result, float) else time.perf_counter() - start


def median(*calls: Callable[[], Any]) -> list[float]:
    """The median seconds of functions. They are called in turn, so that other load meets all of them."""
    return [statistics.median(seconds) for seconds in zip(*([timed(call) for call in calls] for _ in range(REPEATS)))]


def quietly(call: Callable[[], Any]) -> Any:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return call()


def convert(*argv: Any) -> None:
    quietly(lambda: convert_c4.main(convert_c4.parse_args([str(arg) for arg in argv])))


def write_tokens(folder: Path, n: int, seq_len: int, seed: int = 0) -> None:
    """Writes sequences of random packed tokens in shards of up to 4 MiB."""
    rows = np.random.default_rng(seed).integers(0, 512, (n, seq_len), np.uint16)
    write_mds(folder, [{'tokens': row} for row in rows], {'tokens': f'ndarray:uint16:{seq_len}'}, size_limit=1 << 22)


# ---------------------------------------------------------------- conversion
def conversion(root: Path) -> Results:
    """1, 4 and 16 files in C4's form, with 1,000 documents of the sample in each, by 1 and 2 processes."""
    counts, per_file, to_tokens = (1, 4, 16), 1_000, ('--concat_tokens', 2048)
    make_input(root, counts[-1] * per_file, counts[-1])
    for n in counts:
        (root / f'source{n}').mkdir()
        for file in sorted(root.glob('*.gz'))[:n]:
            (root / f'source{n}' / file.name).symlink_to(file)
    convert('--splits', 'train', '--source', root / 'source1', *to_tokens, '--train_tokenizer', 4096, '--out_root', root / 'first')

    def seconds(*argv: Any) -> float:
        out = root / f'out{next(copies)}'
        spent = timed(lambda: convert('--splits', 'train', '--out_root', out, *argv))
        shutil.rmtree(out)
        return spent

    for kind, options in (('text', ()), ('packed tokens', (*to_tokens, '--tokenizer', root / 'first/tokenizer'))):
        yield Table(f'Conversion to {kind}', 'document')
        for workers, n in itertools.product((1, 2), counts):
            argv = ('--source', root / f'source{n}', '--num_workers', workers, *options)
            yield Row(f'{workers} processes, {n} files', n * per_file, *median(lambda: seconds(*argv)))


# ---------------------------------------------------------------- the loader
def loader_config(root: Path, **dataset: Any) -> dict[str, Any]:
    return {'dataset': {'split': 'train', 'tokenizer_name': str(root / 'tokenizer'), 'shuffle': True, **dataset},
            'drop_last': True, 'num_workers': 0}


def stop_threads(loader: Any) -> None:
    """Ends streaming's threads, which would outlive an epoch that is cut short, and read shards that are no longer there."""
    if hasattr(loader.dataset, '_iterator'):  # else the threads are in the loader's workers
        loader.dataset._iterator.non_blocking_exit()


def loader(root: Path) -> Results:
    """8,192 sequences of 2048 packed tokens in 1 to 4 streams, read in place, by the speed in 2 seconds."""
    make_tokenizer(root / 'tokenizer')
    sequences, seq_len = 8_192, 2_048

    def seconds(load: Callable[[], Any]) -> float:
        loaders = []
        _, speed, _ = measure(lambda: loaders.append(load()) or loaders[0], 2)
        stop_threads(loaders[0])
        return sequences / speed

    yield Table('Loader, seconds for all sequences', 'token', 'plain streaming')
    for n in (1, 2, 3, 4):
        places = [root / f'{n}-{i}' for i in range(n)]
        for i, place in enumerate(places):
            write_tokens(place / 'train', sequences // n, seq_len, i)
        cfg = loader_config(root, streams={place.name: {'local': str(place)} for place in places}, max_seq_len=seq_len)

        def plain() -> Any:
            streams = [Stream(local=str(place), split='train') for place in places]
            return DataLoader(StreamingDataset(streams=streams, shuffle=True, batch_size=BATCH), BATCH)

        yield Row(f'{n} streams', sequences * seq_len,
                  *median(lambda: seconds(lambda: build_c4_dataloader(cfg, BATCH)), lambda: seconds(plain)))


# ---------------------------------------------------------------- the start of a run: shards, steps, checkpoints
def start_kit(cfg: dict[str, Any], step: int, workers: int = 0) -> float:
    """Seconds to build the kit's loader, to compute what the ranks compare, and to read the first batch after `step`. At any size, the
    larger part goes to Python's garbage collection before a second dataset is opened, and to the tokenizer."""
    start, loader = time.perf_counter(), build_c4_dataloader({**cfg, 'num_workers': workers}, BATCH)
    assert loader.dataset.fingerprint
    return first_batch(loader, step, start)


def start_plain(root: Path, step: int, workers: int = 0) -> float:
    """The same with a plain StreamingDataset."""
    start = time.perf_counter()
    dataset = StreamingDataset(local=str(root), split='train', shuffle=True, batch_size=BATCH, num_canonical_nodes=64)
    return first_batch(DataLoader(dataset, BATCH, num_workers=workers, drop_last=True), step, start)


def first_batch(loader: Any, step: int, start: float) -> float:
    if step:
        loader.dataset.load_state_dict({'epoch': 0, 'sample_in_epoch': step * BATCH, 'num_canonical_nodes': 64,
                                        'shuffle_seed': 9176, 'initial_physical_nodes': 1})
    batches = iter(loader)
    next(batches)
    seconds = time.perf_counter() - start
    stop_threads(loader)
    return seconds


def shards(root: Path) -> Results:
    """An index over 10, 1,000 and 100,000 shards, read in place. All shards exist, most of them as hard links; each has 16 sequences."""
    make_tokenizer(root / 'tokenizer')
    write_tokens(root / 'one', 16, 128)
    [shard] = json.loads((root / 'one/index.json').read_text())['shards']
    yield Table('Shards in the index, seconds to the first batch', 'shard', 'plain streaming')
    for n in (10, 1_000, 100_000):
        place, names = root / f'{n}', [f'{i // 100:05}/shard.{i % 100:05}.mds' for i in range(n)]
        for i, file in enumerate(place / 'train' / name for name in names):
            if i % 100 == 0:  # file systems limit the number of links to a file
                file.parent.mkdir(parents=True)
                original = shutil.copy(root / 'one' / shard['raw_data']['basename'], file)
            else:
                os.link(original, file)
        index = [{**shard, 'raw_data': {**shard['raw_data'], 'basename': name}} for name in names]
        (place / 'train/index.json').write_text(json.dumps({'version': 2, 'shards': index}))
        cfg = loader_config(root, local=str(place), max_seq_len=128)
        for name, step in (('start', 0), ('resume in the middle', n)):
            yield Row(f'{n:,} shards, {name}', n, *median(lambda: start_kit(cfg, step), lambda: start_plain(place, step)))
        shutil.rmtree(place)


def steps(root: Path) -> Results:
    """A resumed run after 10 to 10,000 steps: with packed tokens; with text that is packed on the fly, whose epoch is read again; and
    with a checkpoint in `save_folder` for every 10 steps."""
    make_tokenizer(root / 'tokenizer')
    done = (10, 100, 1_000, 10_000)
    write_tokens(root / 'train', BATCH * (done[-1] + 100), 128)
    cfg = loader_config(root, local=str(root), max_seq_len=128)
    yield Table('Steps done, packed tokens, seconds to the next batch', 'step', 'plain streaming')
    for workers, step in itertools.product((0, 2), done):
        yield Row(f'{step:,} steps, {workers} workers', step,
                  *median(lambda: start_kit(cfg, step, workers), lambda: start_plain(root, step, workers)))

    texts = [' '.join(random.Random(i).choices(('river', 'mountain', 'engine', 'letter'), k=400)) for i in range(5_000)]
    write_mds(root / 'text/train', [{'text': text} for text in texts], {'text': 'str'}, size_limit=1 << 22)
    concat = loader_config(root, local=str(root / 'text'), max_seq_len=128, group_method='concat', num_canonical_nodes=1)
    yield Table('Steps done, text packed on the fly, seconds to the next batch', 'step')
    for step in done[:-1]:
        yield Row(f'{step:,} steps', step, *median(lambda: next(itertools.islice(build_c4_dataloader(concat, BATCH), step, None))))

    def find_newest(folder: Path) -> None:
        start = find_start(str(folder), 'run', True, None, False)
        assert start.manifest
        writer = CheckpointWriter(str(folder), '1ba', -1, FRESH, RunInfo({}, '', '', {}))
        state: Any = argparse.Namespace(run_name='run', timestamp=argparse.Namespace(batch=start.manifest.batch))
        writer.init(state, state)
        writer.check(state)

    yield Table('Steps done, seconds to find the newest checkpoint', 'checkpoint')
    for step in done:
        folder = root / f'saved{step}'
        folder.mkdir()
        for name in (f'ep0-ba{batch}' for batch in range(10, step + 1, 10)):
            (folder / f'{name}-rank0.pt').write_bytes(b'weights')
            manifest = Manifest(name, False, 0, int(name[6:]), 0, 0, 1, {f'{name}-rank0.pt': 7})
            (folder / f'{name}.json').write_text(json.dumps(vars(manifest)))
        yield Row(f'{step:,} steps, {step // 10:,} checkpoints', step // 10, *median(lambda: find_newest(folder)))


# ---------------------------------------------------------------- the parts of a conversion
def parts(root: Path) -> Results:
    """A split of 10, 100 and 1,000 parts of 20 documents each: converted, looked at by a second run, and verified."""
    def hash_all(folder: Path) -> None:
        for file in filter(Path.is_file, folder.rglob('*')):
            xxhash.xxh128_hexdigest(file.read_bytes())

    yield Table('Parts of a split', 'part', 'reading and hashing')
    for n in (10, 100, 1_000):
        source, out = root / f'source{n}', root / f'out{n}'
        source.mkdir()
        for i in range(n):
            lines = (json.dumps({'text': f'Document {j} of file {i}. ' + 'It is quite long. ' * 100}) for j in range(20))
            (source / f'train.{i:05}.jsonl').write_text('\n'.join(lines))
        argv = ('--splits', 'train', '--source', source, '--out_root', out, '--num_workers', 1)
        yield Row(f'{n:,} parts, convert', n, timed(lambda: convert(*argv)))
        yield Row(f'{n:,} parts, find that all are there', n, *median(lambda: convert(*argv)))
        yield Row(f'{n:,} parts, --verify', n, *median(lambda: convert('--verify', out), lambda: hash_all(out)))


# ---------------------------------------------------------------- checkpoints
def checkpoints(root: Path) -> Results:
    """Weights and both moments of AdamW, saved and loaded. The plain way: `torch.save` and one fsync; `torch.load` and `load_state_dict`
    of model and optimizer."""
    make_tokenizer(root / 'tokenizer')
    write_tokens(root / 'train', 32, 32)
    saved, plain = root / 'saves/ep0-ba1-rank0.pt', root / 'plain.pt'
    settings = ('max_duration=1ba', 'eval_loader=null', 'scheduler.t_warmup=0ba', 'algorithms=null', f'save_folder={saved.parent}')
    yield Table('Checkpoints', 'MB', 'torch')
    for width, layers in ((64, 2), (256, 4), (512, 8), (1024, 8)):
        shape = (f'model.d_model={width}', f'model.n_layers={layers}')
        trainer = quietly(lambda: kit.main(load([str(ROOT / 'yamls/quickstart.yaml'), *tiny(root, 'run_name=run', *settings, *shape)])))
        state, model, optimizer = trainer.state, trainer.state.model, trainer.state.optimizers[0]
        writer = next(callback for callback in state.callbacks if isinstance(callback, CheckpointWriter))

        def save() -> None:
            writer.last_batch = -1
            writer.save_and_wait(state, trainer.logger)

        def save_plain() -> None:
            with plain.open('wb') as file:
                torch.save({'model': model.state_dict(), 'optimizer': optimizer.state_dict()}, file)
                file.flush()
                os.fsync(file.fileno())

        def restore() -> None:
            with read_safely(start := start_from_path(str(saved), 'resume')):
                load_checkpoint(str(saved), state, Logger(state), ignore_keys=check_same_weights(start, model.state_dict()))

        def restore_plain() -> None:
            values = torch.load(plain, weights_only=True)
            model.load_state_dict(values['model'])
            optimizer.load_state_dict(values['optimizer'])

        millions, megabytes = sum(p.numel() for p in model.parameters()) / 1e6, saved.stat().st_size / 1e6
        for name, ours, theirs in (('save', save, save_plain), ('load', restore, restore_plain)):
            both = quietly(lambda: median(ours, theirs))
            yield Row(f'{millions:.1f}M parameters, {megabytes:,.0f} MB, {name}', megabytes, *both)
        trainer.close()
        shutil.rmtree(saved.parent)


PARTS = {part.__name__: part for part in (conversion, loader, shards, steps, parts, checkpoints)}

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description='Measures how time grows with work.')
    parser.add_argument('parts', nargs='*', metavar='PART', choices=[*PARTS, []], help=f'default: all of {", ".join(PARTS)}')
    logging.getLogger('concurrent.futures').disabled = True  # threads of streaming that end late
    warnings.simplefilter('ignore')
    for chosen in parser.parse_args().parts or PARTS:
        with tempfile.TemporaryDirectory() as temporary:
            for table_or_row in PARTS[chosen](Path(temporary)):
                show(table_or_row)
