"""Measures how time grows with work, in a table for each part; work per second must not fall. It asserts nothing.

    python tests/growth.py [conversion] [loader] [shards] [steps] [parts] [checkpoints]

Without arguments it measures all parts, in about 12 minutes on two cores. Each figure is the median of three runs. The program
makes its own data in a temporary folder.
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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple, Optional

if __name__ == '__main__':  # the folder of this script is already on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import xxhash
from composer.loggers import Logger
from composer.utils.checkpoint import load_checkpoint
from conftest import write_mds
from convert_speed import make_input
from launch import ROOT, tiny
from loader_speed import make_tokenizer, measure
from streaming import Stream, StreamingDataset
from torch.utils.data import DataLoader

import convert_c4
import main as kit
from src.checkpoints.manifest import Manifest
from src.checkpoints.start import FRESH, find_start
from src.checkpoints.writer import CheckpointWriter, RunInfo
from src.config.load import load
from src.data_c4 import build_c4_dataloader

REPEATS, BATCH = 3, 8
copies = itertools.count()


class Row(NamedTuple):
    name: str
    work: float  # in the unit of its table
    seconds: float
    plain: Optional[float] = None  # seconds of the plain way


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def median(*calls: Callable[[], float]) -> list[float]:
    """The medians of functions that return seconds. They are called in turn, so that other load meets all of them."""
    runs = [[call() for call in calls] for _ in range(REPEATS)]
    return [statistics.median(seconds) for seconds in zip(*runs)]


def table(title: str, unit: str, plain: str, rows: Iterable[Row]) -> None:
    """Prints a table. `unit` is the unit of work, and `plain` the name of the plain way; empty: there is none."""
    print(f'\n**{title}**\n\n| work | seconds | µs per {unit} | {unit}s/s |' + (f' {plain}, seconds | times |' if plain else ''))
    print('|---|---|---|---|' + '---|---|' * bool(plain), flush=True)
    for name, work, seconds, plainly in rows:
        cells = [name, f'{seconds:.3f}', f'{seconds / work * 1e6:,.{0 if seconds / work > 1e-5 else 3}f}', f'{work / seconds:,.0f}']
        cells += [f'{plainly:.3f}', f'{seconds / plainly:.2f}'] if plainly else ['–', '–'] if plain else []
        print(f'| {" | ".join(cells)} |', flush=True)


@contextmanager
def quiet() -> Iterator[None]:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


def convert(*argv: Any) -> None:
    with quiet():
        convert_c4.main(convert_c4.parse_args([str(arg) for arg in argv]))


# ---------------------------------------------------------------- conversion
def conversion(root: Path) -> None:
    """1, 4 and 16 files in C4's form, with 2,000 documents of the sample in each, by 1 and 2 processes."""
    n_files, per_file = (1, 4, 16), 2000
    make_input(root, n_files[-1] * per_file, n_files[-1])
    files = sorted(root.glob('*.gz'))
    sources = {n: root / f'source{n}' for n in n_files}
    for n, source in sources.items():
        source.mkdir()
        for file in files[:n]:
            (source / file.name).symlink_to(file)
    to_tokens = ('--concat_tokens', 2048)
    convert('--splits', 'train', '--source', sources[1], *to_tokens, '--train_tokenizer', 4096, '--out_root', root / 'first')

    def seconds(*argv: Any) -> float:
        out = root / f'out{next(copies)}'
        spent = timed(lambda: convert('--splits', 'train', '--out_root', out, *argv))
        shutil.rmtree(out)
        return spent

    for kind, options in (('text', ()), ('packed tokens', (*to_tokens, '--tokenizer', root / 'first/tokenizer'))):
        table(f'Conversion to {kind}', 'document', '', (
            Row(f'{processes} processes, {n} files', n * per_file,
                *median(lambda: seconds('--source', source, '--num_workers', processes, *options)))
            for processes in (1, 2) for n, source in sources.items()))


# ---------------------------------------------------------------- the loader
def loader_config(root: Path, **dataset: Any) -> dict[str, Any]:
    return {'dataset': {'split': 'train', 'tokenizer_name': str(root / 'tokenizer'), 'shuffle': True, **dataset},
            'drop_last': True, 'num_workers': 0}


def loader(root: Path) -> None:
    """The same 8,192 sequences of 2048 packed tokens in 1 to 4 streams, read in place. Measured for 2 seconds."""
    make_tokenizer(root / 'tokenizer')
    rows, seq_len = np.random.default_rng(0).integers(0, 512, (8192, 2048), np.uint16), 2048

    def seconds(load: Callable[[], Any]) -> float:
        loaders = []
        _, speed, _ = measure(lambda: loaders.append(load()) or loaders[0], 2)
        stop_threads(loaders[0])
        return len(rows) / speed

    def results() -> Iterator[Row]:
        for n in (1, 2, 3, 4):
            places = [root / f'{n}-{i}' for i in range(n)]
            for i, place in enumerate(places):
                write_mds(place / 'train', [{'tokens': row} for row in rows[i::n]], {'tokens': f'ndarray:uint16:{seq_len}'}, 1 << 23)
            cfg = loader_config(root, streams={place.name: {'local': str(place)} for place in places}, max_seq_len=seq_len)

            def plain() -> Any:
                streams = [Stream(local=str(place), split='train') for place in places]
                return DataLoader(StreamingDataset(streams=streams, shuffle=True, batch_size=BATCH), BATCH)

            both = median(lambda: seconds(lambda: build_c4_dataloader(cfg, BATCH)), lambda: seconds(plain))
            yield Row(f'{n} streams', rows.size, *both)

    table('Loader, seconds for all sequences', 'token', 'plain streaming', results())


# ---------------------------------------------------------------- the start of a run: shards, steps, checkpoints
def start_kit(cfg: dict[str, Any], step: int, workers: int = 0) -> float:
    """Seconds to build the kit's loader, to compute what the ranks compare, and to read the first batch after `step`."""
    start = time.perf_counter()
    loader = build_c4_dataloader({**cfg, 'num_workers': workers}, BATCH)
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


def stop_threads(loader: Any) -> None:
    """Ends streaming's threads, which would outlive an epoch that is cut short, and read shards that are no longer there."""
    if hasattr(loader.dataset, '_iterator'):  # else the threads are in the loader's workers
        loader.dataset._iterator.non_blocking_exit()


def shards(root: Path) -> None:
    """An index over 10, 1,000 and 100,000 shards, read in place. All shards exist; each has 16 sequences, where a real shard has
    thousands: so this is the cost of the shards alone. Many names are hard links to one file."""
    make_tokenizer(root / 'tokenizer')
    rows = np.random.default_rng(0).integers(0, 512, (16, 128), np.uint16)
    write_mds(root / 'one', [{'tokens': row} for row in rows], {'tokens': 'ndarray:uint16:128'})
    [shard] = json.loads((root / 'one/index.json').read_text())['shards']
    file, cfg = root / 'one' / shard['raw_data']['basename'], loader_config(root, max_seq_len=128)

    def results() -> Iterator[Row]:
        for n in (10, 1_000, 100_000):
            place = root / f'{n}'
            names = [f'{i // 100:05}/shard.{i % 100:05}.mds' for i in range(n)]
            for i, name in enumerate(names):
                if i % 100 == 0:
                    (place / 'train' / name).parent.mkdir(parents=True)
                    shutil.copy(file, place / 'train' / (original := name))  # a file system limits the links to one file
                else:
                    os.link(place / 'train' / original, place / 'train' / name)
            index = [{**shard, 'raw_data': {**shard['raw_data'], 'basename': name}} for name in names]
            (place / 'train/index.json').write_text(json.dumps({'version': 2, 'shards': index}))
            cfg['dataset']['local'] = str(place)
            for name, step in (('start', 0), ('resume in the middle', n)):
                both = median(lambda: start_kit(cfg, step), lambda: start_plain(place, step))
                yield Row(f'{n:,} shards, {name}', n, *both)
            shutil.rmtree(place)

    table('Shards in the index, seconds to the first batch', 'shard', 'plain streaming', results())


def steps(root: Path) -> None:
    """A resumed run: 10 to 10,000 steps done, with packed tokens; with text that is packed on the fly, whose epoch is read again;
    and with one checkpoint in `save_folder` for every 10 steps."""
    make_tokenizer(root / 'tokenizer')
    done = (10, 100, 1_000, 10_000)
    rows = np.random.default_rng(0).integers(0, 512, (BATCH * (done[-1] + 100), 128), np.uint16)
    write_mds(root / 'train', [{'tokens': row} for row in rows], {'tokens': 'ndarray:uint16:128'}, size_limit=1 << 22)
    cfg = loader_config(root, local=str(root), max_seq_len=128)
    table('Steps done, packed tokens, seconds to the next batch', 'step', 'plain streaming', (
        Row(f'{step:,} steps, {workers} workers', step,
            *median(lambda: start_kit(cfg, step, workers), lambda: start_plain(root, step, workers)))
        for workers in (0, 2) for step in done))

    rng = random.Random(0)
    texts = [' '.join(rng.choices(('river', 'mountain', 'engine', 'letter'), k=400)) for _ in range(5_000)]
    write_mds(root / 'text/train', [{'text': text} for text in texts], {'text': 'str'}, size_limit=1 << 22)
    concat = loader_config(root, local=str(root / 'text'), max_seq_len=128, group_method='concat', num_canonical_nodes=1)

    def read_again(step: int) -> float:
        start, batches = time.perf_counter(), iter(build_c4_dataloader(concat, BATCH))
        next(itertools.islice(batches, step, None))
        return time.perf_counter() - start

    table('Steps done, text packed on the fly, seconds to the next batch', 'step', '',
          (Row(f'{step:,} steps', step, *median(lambda: read_again(step))) for step in done[:-1]))

    def find(folder: Path) -> None:
        start = find_start(str(folder), 'run', True, None, False)
        assert start.manifest
        writer = CheckpointWriter(str(folder), '1ba', -1, FRESH, RunInfo({}, '', '', {}))
        state: Any = argparse.Namespace(run_name='run', timestamp=argparse.Namespace(batch=start.manifest.batch))
        writer.init(state, state)
        writer.check(state)

    def saved() -> Iterator[Row]:
        for step in done:
            folder = root / f'saved{step}'
            folder.mkdir()
            for batch in range(10, step + 1, 10):
                (folder / f'ep0-ba{batch}-rank0.pt').write_bytes(b'weights')
                manifest = Manifest(f'ep0-ba{batch}', False, 0, batch, batch, batch, 1, {f'ep0-ba{batch}-rank0.pt': 7})
                (folder / f'ep0-ba{batch}.json').write_text(json.dumps(vars(manifest)))
            yield Row(f'{step:,} steps, {step // 10:,} checkpoints', step // 10, *median(lambda: timed(lambda: find(folder))))

    table('Steps done, seconds to find the newest checkpoint', 'checkpoint', '', saved())


# ---------------------------------------------------------------- the parts of a conversion
def parts(root: Path) -> None:
    """A split of 10, 100 and 1,000 parts of 20 documents each: converted, looked at by a second run, and verified. The plain way to
    verify is one loop over all files, which reads and hashes each."""
    def source(n: int) -> Path:
        folder = root / f'source{n}'
        folder.mkdir()
        for i in range(n):
            lines = (json.dumps({'text': f'Document {j} of file {i}. ' + 'It is quite long. ' * 100}) for j in range(20))
            (folder / f'train.{i:05}.jsonl').write_text('\n'.join(lines))
        return folder

    def hash_all(folder: Path) -> None:
        for file in folder.rglob('*'):
            if file.is_file():
                xxhash.xxh128_hexdigest(file.read_bytes())

    def results() -> Iterator[Row]:
        for n in (10, 100, 1_000):
            out = root / f'out{n}'
            argv = ('--splits', 'train', '--source', source(n), '--out_root', out, '--num_workers', 1)
            yield Row(f'{n:,} parts, convert', n, timed(lambda: convert(*argv)))
            yield Row(f'{n:,} parts, check that all are there', n, *median(lambda: timed(lambda: convert(*argv))))
            yield Row(f'{n:,} parts, --verify', n, *median(lambda: timed(lambda: convert('--verify', out)),
                                                           lambda: timed(lambda: hash_all(out))))

    table('Parts of a split', 'part', 'reading and hashing', results())


# ---------------------------------------------------------------- checkpoints
def checkpoints(root: Path) -> None:
    """Weights and both moments of AdamW, saved and loaded. The plain way: `torch.save` of the same state with one fsync, and
    `torch.load` with the state put back into model and optimizer."""
    make_tokenizer(root / 'tokenizer')
    rows = np.random.default_rng(0).integers(0, 512, (32, 32), np.uint16)
    for split in ('train', 'val'):
        write_mds(root / split, [{'tokens': row} for row in rows], {'tokens': 'ndarray:uint16:32'})

    def results() -> Iterator[Row]:
        for width, layers in ((64, 2), (256, 4), (512, 8), (1024, 8)):
            one = ('max_duration=1ba', 'eval_loader=null', 'scheduler.t_warmup=0ba', 'algorithms=null', 'log_to_console=false')
            shape = (f'model.d_model={width}', f'model.n_layers={layers}', f'save_folder={root}/saves', 'run_name=run')
            with quiet():
                trainer = kit.main(load([str(ROOT / 'yamls/quickstart.yaml'), *tiny(root, *one, *shape)]))
            state, model, optimizer = trainer.state, trainer.state.model, trainer.state.optimizers[0]
            [writer] = [callback for callback in state.callbacks if isinstance(callback, CheckpointWriter)]
            saved, plain = root / 'saves/ep0-ba1-rank0.pt', root / 'plain.pt'

            def save() -> None:
                writer.last_batch = -1
                writer.save_and_wait(state, trainer.logger)

            def save_plain() -> None:
                with plain.open('wb') as file:
                    torch.save({'model': model.state_dict(), 'optimizer': optimizer.state_dict()}, file)
                    file.flush()
                    os.fsync(file.fileno())

            def restore() -> None:
                load_checkpoint(str(saved), state, Logger(state))

            def restore_plain() -> None:
                values = torch.load(plain, weights_only=True)
                model.load_state_dict(values['model'])
                optimizer.load_state_dict(values['optimizer'])

            for name, ours, theirs in (('save', save, save_plain), ('load', restore, restore_plain)):
                with quiet():
                    both = median(lambda: timed(ours), lambda: timed(theirs))
                megabytes = saved.stat().st_size / 1e6
                yield Row(f'{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {megabytes:,.0f} MB, {name}',
                          megabytes, *both)
            trainer.close()
            shutil.rmtree(root / 'saves')

    table('Checkpoints', 'MB', 'torch', results())


PARTS = {part.__name__: part for part in (conversion, loader, shards, steps, parts, checkpoints)}

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description='Measures how time grows with work.')
    parser.add_argument('parts', nargs='*', metavar='PART', choices=[*PARTS, []], help=f'default: all of {", ".join(PARTS)}')
    logging.getLogger('concurrent.futures').disabled = True  # threads of streaming that end late
    warnings.simplefilter('ignore')
    for chosen in parser.parse_args().parts or PARTS:
        with tempfile.TemporaryDirectory() as temporary:
            PARTS[chosen](Path(temporary))
