"""Measures the speed of the loader in sequences/s and tokens/s, and the seconds to its first batch.

    python tests/loader_speed.py [--seconds 5]

The program makes its own data: random packed tokens, and documents of the sample as text. "concat" and "truncate" encode with
fastokens; the rows below them encode the same documents with the library `tokenizers` alone. The row `streaming` is a plain
StreamingDataset in a DataLoader, which only reads and decodes the same packed tokens. The first batch is cold if its shards
must be fetched first, and warm if they are in the local copy.
"""

import argparse
import gc
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

if __name__ == '__main__':  # this folder is on the path already
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from conftest import write_mds
from streaming import StreamingDataset
from torch.utils.data import DataLoader

from src.common import encoding, fast_encoding
from src.conversion.sample_corpus import gather_sample, train_tokenizer
from src.data_c4 import build_c4_dataloader

SLOW = '{}, tokenizers'
SEQ_LEN, BATCH, SEQUENCES, DOCUMENTS = 2048, 8, 16_384, 8_000
KINDS = ('streaming', 'tokens', 'tokens + 1', 'sequence_ids', 'concat', SLOW.format('concat'), 'truncate',
         SLOW.format('truncate'))
copies = itertools.count()
OPEN, REFUSE = fast_encoding.open_tokenizer, Mock(side_effect=ImportError('this row leaves it out'))


def make_data(root: Path) -> None:
    corpus = [document['text'] for document in gather_sample()['train']]
    (root / 'tokenizer').mkdir(parents=True)
    train_tokenizer(corpus, root / 'tokenizer')
    rng = np.random.default_rng(0)
    for split, n in (('tokens', SEQ_LEN), ('tokens + 1', SEQ_LEN + 1)):
        rows = rng.integers(0, 512, (SEQUENCES, n), np.uint16)  # an EOS in 512 tokens, about as in C4
        write_mds(root / split, [{'tokens': row} for row in rows], {'tokens': f'ndarray:uint16:{n}'}, size_limit=1 << 23)
    write_mds(root / 'text', [{'text': text} for text in rng.choice(corpus, DOCUMENTS)], {'text': 'str'}, size_limit=1 << 23)


def open_loader(root: Path, kind: str, workers: int, remote: str, local: str) -> Any:
    method, _, library = kind.partition(', ')
    split = 'text' if method in ('concat', 'truncate') else kind if kind == 'tokens + 1' else 'tokens'
    if kind == 'streaming':
        dataset = StreamingDataset(remote=None if remote == local else remote, local=local, split=split, shuffle=True,
                                   batch_size=BATCH)
        return DataLoader(dataset, batch_size=BATCH, num_workers=workers)
    cfg = {'dataset': {'remote': remote, 'local': local, 'split': split, 'tokenizer_name': str(root / 'tokenizer'),
                       'max_seq_len': SEQ_LEN, 'group_method': 'concat' if method == 'concat' else 'truncate', 'shuffle': True,
                       'num_canonical_nodes': 1, 'sequence_ids': kind == 'sequence_ids'}, 'num_workers': workers}
    with patch.object(encoding, '_by_content', {}), patch.object(fast_encoding, 'open_tokenizer', REFUSE if library else OPEN):
        return build_c4_dataloader(cfg, BATCH)  # which prepares the encoding


def equal_batches(root: Path, method: str) -> bool:
    """Whether both ways give the same batches."""
    ways = zip(*(open_loader(root, kind, 0, str(root), str(root)) for kind in (method, SLOW.format(method))), strict=True)
    return all(torch.equal(fast[key], slow[key]) for fast, slow in ways for key in ('input_ids', 'labels'))


def measure(load: Callable[[], Any], seconds: float) -> tuple[float, float, float]:
    """Seconds from building the loader to its first batch, sequences/s, and tokens/s without padding."""
    start = time.perf_counter()
    loader = load()
    batches = iter(loader)
    next(batches)
    first = time.perf_counter() - start
    n = tokens = 0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        batch = next(batches, None)
        if batch is None:
            batches = iter(loader)
            continue
        ids = batch.get('input_ids', batch.get('tokens'))
        n += len(ids)
        tokens += int(batch['attention_mask'].sum()) if 'attention_mask' in batch else ids.numel()
    spent = time.perf_counter() - start
    del batches, loader
    gc.collect()  # ends the worker, which would read on beside the next row
    return first, n / spent, tokens / spent


def s3_of(root: Path) -> Iterator[str]:
    """Serves the data from an S3 server on this machine, in a process of its own; yields the address."""
    import boto3
    from botocore.exceptions import BotoCoreError
    from launch import free_port
    from torch.multiprocessing import get_context

    for key, value in (('AWS_ACCESS_KEY_ID', 'none'), ('AWS_SECRET_ACCESS_KEY', 'none'), ('AWS_DEFAULT_REGION', 'us-east-1')):
        os.environ[key] = value
    port = free_port()
    os.environ['S3_ENDPOINT_URL'] = url = f'http://127.0.0.1:{port}'
    server = get_context('spawn').Process(target=serve, args=(port,), daemon=True)
    server.start()
    client = boto3.client('s3', endpoint_url=url)
    for _ in range(100):
        try:
            client.create_bucket(Bucket='bucket')
            break
        except BotoCoreError:  # the server has not started yet
            time.sleep(0.2)
    for path in root.glob('*/*'):
        client.upload_file(str(path), 'bucket', f'data/{path.relative_to(root)}')
    yield 's3://bucket/data'
    server.terminate()
    server.join()


def serve(port: int) -> None:
    import logging

    from moto.server import main

    logging.getLogger('werkzeug').disabled = True  # a line for every request
    main(['-H', '127.0.0.1', '-p', str(port)])


def main(root: Path, seconds: float) -> None:
    make_data(root / 'data')
    print(f'batches of {BATCH}; packed: {SEQUENCES:,} sequences of {SEQ_LEN} tokens; text: {DOCUMENTS:,} documents')
    print(f'{"":8} {"workers":>7} {"":20} {"sequences/s":>12} {"tokens/s":>12} {"first, cold (s)":>16} {"first, warm (s)":>16}')
    data = root / 'data'
    s3 = s3_of(data)
    for place, remote in (('in place', str(data)), ('copied', str(data)), ('s3', next(s3))):
        for workers, kind in itertools.product((0, 1), KINDS):
            local = str(data) if place == 'in place' else str(root / f'copy{next(copies)}')
            cold, speed, tokens = measure(lambda: open_loader(data, kind, workers, remote, local), seconds)  # noqa: B023
            warm = measure(lambda: open_loader(data, kind, workers, remote, local), 0)[0]  # noqa: B023
            cells = f'{speed:12,.0f} {tokens:12,.0f} {cold if place != "in place" else float("nan"):16.2f} {warm:16.2f}'
            print(f'{place:8} {workers:7} {kind:20} {cells}', flush=True)
    next(s3, None)
    for method in ('concat', 'truncate'):
        print(f'{method}: all batches are equal: {equal_batches(data, method)}')


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--seconds', type=float, default=5.0)
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder), parser.parse_args().seconds)
