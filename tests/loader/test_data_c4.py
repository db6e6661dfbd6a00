"""The loader reads every token of every document, on any number of ranks and workers, and leaves no files behind.

test_sample_order.py tests the order of samples, and stopping and resuming.
"""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import numpy as np
import pytest
import torch
import warm
from conftest import documents, leaves_no_orphans, orphans, write_mds
from filelock import FileLock
from launch import clean_env, free_port
from streaming import JSONWriter, StreamingDataLoader
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, DistributedSampler

from src.common.errors import UserError
from src.common.targets import get_num_tokens_in_batch
from src.data_c4 import EvalView, StreamingC4, build_c4_dataloader
from src.loader import shared_memory

ROOT = Path(__file__).resolve().parents[2]
SEQ = 64
EOS = 0


@pytest.fixture(scope='session')
def val_ids(tokenizer_dir: Path) -> list[list[int]]:
    """The token ids of each document of `val` with EOS, made one by one by the library `tokenizers`."""
    raw = Tokenizer.from_file(str(tokenizer_dir / 'tokenizer.json'))
    return [raw.encode(text).ids + [EOS] for text in documents('val')]


@pytest.fixture
def open_c4(mds_root: Path, tokenizer_dir: Path):
    def build(max_seq_len: int = SEQ, **kwargs: Any) -> StreamingC4:
        return StreamingC4(str(tokenizer_dir), max_seq_len, **{'local': str(mds_root), 'split': 'val', **kwargs})
    return build


@pytest.fixture
def config(mds_root: Path, tokenizer_dir: Path):
    def build(dataset: Optional[dict] = None, **kwargs: Any) -> dict:
        return {'dataset': {'local': str(mds_root), 'split': 'val', 'tokenizer_name': str(tokenizer_dir), 'max_seq_len': SEQ,
                            'num_canonical_nodes': 1, **(dataset or {})}, **kwargs}
    return build


def rows(loader: DataLoader, key: str = 'input_ids') -> list[list[int]]:
    return [row.tolist() for batch in loader for row in batch[key]]


def environment(temp: Path) -> dict[str, str]:
    return clean_env(TMPDIR=str(temp), PYTHONPATH=str(ROOT))


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, 'waited in vain'
        time.sleep(0.02)


def run(args: list[str], temp: Path) -> subprocess.CompletedProcess:
    command = args if args[0].endswith('composer') else [sys.executable, *args]
    return warm.run(command, cwd=ROOT, env=environment(temp))


def stray_locks(folder: Path) -> list[str]:
    """Lock files without shared memory of their prefix; a job with another temporary folder may have taken a prefix."""
    return [path.name for path in folder.glob('*filelock') if not list(Path('/dev/shm').glob(path.name[:7] + '*'))]


def leaves_no_lock(start: Callable[[], Any], temp: Path) -> bool:
    """Whether one of three runs leaves no lock file: another test's run may take the prefix at the end of this one."""
    for _ in range(3):
        start()
        if not stray_locks(temp):
            return True
    return False


@pytest.fixture
def temp(tmp_path_factory: pytest.TempPathFactory):
    """A temporary folder for the programs of a test, which must leave no shared memory there.

    The next run must remove each lock file that they leave; `leaves_no_lock` checks that they leave none at all.
    """
    before = frozenset(orphans())
    with tempfile.TemporaryDirectory() as folder:  # `tmp_path` may be too long for the sockets of multiprocessing below it
        yield Path(folder)
        next_run = ['-c', 'from src.loader.shared_memory import remove_stale; remove_stale()']
        assert not stray_locks(Path(folder)) or leaves_no_lock(lambda: run(next_run, Path(folder)), Path(folder))
    assert leaves_no_orphans(tmp_path_factory.getbasetemp(), before)


# ---------------------------------------------------------------- what samples hold


def test_truncate_holds_every_token(open_c4, val_ids):
    lengths = [len(ids) for ids in val_ids]
    assert min(lengths) < SEQ < max(lengths)
    batches = list(DataLoader(open_c4(batch_size=7), batch_size=7))
    assert {(key, value.dtype) for key, value in batches[0].items()} == {
        ('input_ids', torch.int64), ('attention_mask', torch.int64), ('labels', torch.int64)}
    merged = {key: torch.cat([batch[key] for batch in batches]).tolist() for key in batches[0]}
    assert len(merged['labels']) == 90
    for i, ids in enumerate(val_ids):
        pad = max(0, SEQ - len(ids))
        assert merged['input_ids'][i] == ids[:SEQ] + [EOS] * pad
        assert merged['labels'][i] == ids[:SEQ] + [-100] * pad  # EOS is trained on, though it is also the padding
        assert merged['attention_mask'][i] == [1] * (SEQ - pad) + [0] * pad


def test_truncate_cuts_off_the_eos_that_does_not_fit(open_c4, val_ids):
    n = len(val_ids[0])
    assert next(iter(open_c4(n)))['labels'].tolist() == val_ids[0]
    assert next(iter(open_c4(n - 1)))['labels'].tolist() == val_ids[0][:-1]


def test_concat_holds_every_token(open_c4, val_ids):
    joined = [token for ids in val_ids for token in ids]
    batches = list(DataLoader(open_c4(group_method='concat', batch_size=4), batch_size=4))
    assert set(batches[0]) == {'input_ids', 'labels'}
    ids, labels = (torch.cat([batch[key] for batch in batches]) for key in ('input_ids', 'labels'))
    assert ids.shape == (len(joined) // SEQ, SEQ)
    assert ids.flatten().tolist() == joined[:ids.numel()]
    assert torch.equal(ids, labels)


@pytest.mark.parametrize('group_method', ['truncate', 'concat'])
def test_only_truncate_has_a_length_and_a_state(open_c4, group_method: str):
    dataset = open_c4(group_method=group_method, batch_size=8)
    loaders = [DataLoader(dataset, batch_size=8), StreamingDataLoader(dataset, batch_size=8)]
    has = group_method == 'truncate'
    assert [hasattr(dataset, name) for name in ('state_dict', 'load_state_dict')] == [has, has]
    if has:
        assert [len(dataset), *map(len, loaders)] == [90, 12, 12]
    else:
        for sized in (dataset, *loaders):
            with pytest.raises(TypeError, match='no length'):
                len(sized)


def test_truncate_resumes_where_its_state_says(open_c4, val_ids):
    dataset = open_c4(batch_size=8)
    loader = StreamingDataLoader(dataset, batch_size=8)
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    state = loader.state_dict()
    assert state is not None and state['sample_in_epoch'] == 24
    resumed = open_c4(batch_size=8)
    resumed.load_state_dict(state)
    assert rows(DataLoader(resumed, batch_size=8))[0] == (val_ids[24] + [EOS] * SEQ)[:SEQ]


@pytest.mark.parametrize('num_workers', [0, 2])
def test_a_plain_dataloader_gives_the_batches_of_streamings(open_c4, config, val_ids, num_workers: int):
    plain = rows(DataLoader(open_c4(batch_size=9), batch_size=9, num_workers=num_workers))
    built = build_c4_dataloader(config(num_workers=num_workers), 9)
    assert isinstance(built, StreamingDataLoader)
    assert rows(built) == plain == [(ids + [EOS] * SEQ)[:SEQ] for ids in val_ids]


def test_concat_in_workers_packs_each_document_once(config, val_ids):
    found = rows(build_c4_dataloader(config({'group_method': 'concat'}, num_workers=2), 4))
    total = sum(map(len, val_ids))
    # Each of the two workers drops fewer tokens than a sample has, and streaming repeats fewer than 4 documents.
    assert total - 2 * SEQ < len(found) * SEQ < total + 4 * max(map(len, val_ids))
    text = ','.join(str(token) for row in found for token in row)
    known = Counter(','.join(map(str, ids)) for ids in val_ids)
    whole = sum(ids in text for ids in known)
    assert whole > 20 and all(text.count(ids) <= n + 1 for ids, n in known.items())


def test_a_second_epoch_after_one_cut_short(config):
    loader = build_c4_dataloader(config({'split': 'train', 'shuffle': True}), 4)
    next(iter(loader))
    second, third = rows(loader), rows(loader)
    assert len(second) == 400 and second != third and sorted(second) == sorted(third)


# ---------------------------------------------------------------- packed tokens


def open_tokens(root: Path, split: str = 'val', max_seq_len: int = 32, **kwargs: Any) -> StreamingC4:
    return StreamingC4(str(root / 'tokenizer'), max_seq_len, **{'local': str(root), 'split': split, 'batch_size': 8, **kwargs})


@pytest.mark.parametrize('group_method', ['truncate', 'concat'])
def test_tokens_are_the_samples_that_concat_packs(open_c4, tokens_root: Path, group_method: str):
    packed = list(DataLoader(open_c4(32, group_method='concat', batch_size=8), batch_size=8))
    dataset = open_tokens(tokens_root, group_method=group_method)
    assert (dataset.packs_on_the_fly, dataset.num_shards > 3) == (False, True)
    stored = list(DataLoader(dataset, batch_size=8))
    assert len(stored) == len(packed) == len(DataLoader(dataset, batch_size=8)) > 20
    for a, b in zip(stored, packed):
        assert list(a) == list(b) == ['input_ids', 'labels'] and {value.dtype for value in a.values()} == {torch.int64}
        assert torch.equal(a['input_ids'], b['input_ids']) and torch.equal(a['labels'], b['labels'])


def test_only_text_is_packed_on_the_fly(open_c4):
    assert [open_c4(group_method=method).packs_on_the_fly for method in ('truncate', 'concat')] == [False, True]


def test_tokens_are_not_tokenized(tokens_root: Path, monkeypatch):
    monkeypatch.setattr('src.loader.samples.encode_documents', None)
    dataset = open_tokens(tokens_root)
    ids = next(iter(dataset))['input_ids']
    assert dataset.tokenizer.decode(ids).startswith(documents('val')[0][:60])


@pytest.mark.parametrize('num_workers', [0, 2])
def test_evaluation_on_tokens(config, tokens_root: Path, num_workers: int):
    data = {'local': str(tokens_root), 'max_seq_len': 32, 'group_method': 'concat'}
    loader = build_c4_dataloader(config(data, eval_samples=50, num_workers=num_workers), 8, evaluate=True)
    assert len(loader) == 7
    assert rows(loader) == [sample['input_ids'].tolist() for sample in open_tokens(tokens_root)][:50]


def token_split(root: Path, rows: list, encoding: str = 'ndarray', column: str = 'tokens') -> Path:
    write_mds(root / 'val', [{column: row} for row in rows], {column: encoding})
    return root


@pytest.mark.parametrize('encoding', ['ndarray', 'ndarray:int64', 'ndarray:uint32:4', 'ndarray:uint8'])
def test_any_integers_are_tokens(tokenizer_dir: Path, tmp_path: Path, encoding: str):
    dtype = (encoding.split(':') + ['int32'])[1]
    split = token_split(tmp_path, [np.arange(i, i + 4, dtype=dtype) for i in range(3)], encoding)
    dataset = StreamingC4(str(tokenizer_dir), 4, local=str(split), split='val')
    assert [sample['labels'].tolist() for sample in dataset] == [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5]]


LENGTH = (r'dataset.max_seq_len: 64, but the sequences in .*/val have 32 tokens; set max_seq_len=32, or 31 \(then the '
          r'last position has a target too\), or convert the data again with sequences of 64 or 65')
WRONG = {
    'length': ([np.zeros(32, np.uint16)], 'ndarray:uint16', LENGTH),
    'length in the index': ([np.zeros(32, np.uint16)], 'ndarray:uint16:32', LENGTH),
    'floats': ([np.zeros(SEQ, np.float32)], 'ndarray', 'holds float32; it must hold integers'),
    'floats in the index': ([np.zeros(SEQ, np.float32)], 'ndarray:float32', "its columns are {'tokens': 'ndarray:float32'}"),
    '2-d': ([np.zeros((2, SEQ), np.uint16)], 'ndarray:uint16',
            r'arrays of shape \(2, 64\); each must be one sequence, of shape \(64,\) or \(65,\)'),
    '2-d in the index': ([np.zeros((2, SEQ), np.uint16)], 'ndarray:uint16:2,64', r'arrays of shape \(2, 64\)'),
    'bytes': ([b'1234'], 'bytes', "its columns are {'tokens': 'bytes'}"),
}


@pytest.mark.parametrize('kind', WRONG)
@pytest.mark.parametrize('copied', [False, True])
def test_tokens_of_a_wrong_form(tokenizer_dir: Path, tmp_path: Path, kind: str, copied: bool):
    found, encoding, says = WRONG[kind]
    split = token_split(tmp_path / 'data', found, encoding)
    places = {'remote': str(split), 'local': str(tmp_path / 'copy')} if copied else {'local': str(split)}
    build = lambda: StreamingC4(str(tokenizer_dir), SEQ, split='val', **places)  # noqa: E731
    if copied and encoding in ('ndarray', 'ndarray:uint16'):
        dataset = build()  # no shard has been copied yet
        with pytest.raises(UserError, match=says):
            next(iter(dataset))
    else:
        with pytest.raises(UserError, match=says):
            build()


def test_a_sequence_of_another_length_among_the_others(tokenizer_dir: Path, tmp_path: Path):
    split = token_split(tmp_path, [np.zeros(SEQ, np.int32), np.zeros(SEQ - 1, np.int32)])
    dataset = StreamingC4(str(tokenizer_dir), SEQ, local=str(split), split='val')
    with pytest.raises(UserError, match='max_seq_len: 64, but the sequences in .* have 63 tokens'):
        rows(DataLoader(dataset, batch_size=1))
    with pytest.raises(UserError, match='max_seq_len: 64, but the sequences in .* have 63 tokens'):
        EvalView(dataset)[1]


def test_the_fingerprint_is_the_datas(open_c4, tokens_root: Path, tmp_path: Path):
    ours = open_tokens(tokens_root).fingerprint
    assert len(ours) == 16 and int(ours, 16)
    assert open_tokens(tokens_root, remote=str(tokens_root), local=str(tmp_path), shuffle=True, batch_size=2).fingerprint == ours
    assert len({ours, open_tokens(tokens_root, 'train').fingerprint, open_c4().fingerprint}) == 3
    shutil.copytree(tokens_root, tmp_path / 'other')
    index = tmp_path / 'other' / 'val' / 'index.json'
    text = json.loads(index.read_text())
    text['shards'][-1]['raw_data']['hashes'] = {'sha1': '0' * 40}
    index.write_text(json.dumps(text))
    assert open_tokens(tmp_path / 'other').fingerprint != ours


@pytest.mark.parametrize('encoding', ['ndarray:uint16', 'ndarray:uint16:33', 'ndarray:uint32:33'])
@pytest.mark.parametrize('copied', [False, True])
def test_one_more_token_gives_the_last_position_a_target(tokenizer_dir: Path, tmp_path: Path, encoding: str, copied: bool):
    stored = np.random.default_rng(0).integers(0, 512, (20, 33)).astype(encoding.split(':')[1])
    split = token_split(tmp_path / 'data', list(stored), encoding)
    places = {'remote': str(split), 'local': str(tmp_path / 'copy')} if copied else {'local': str(split)}
    dataset = StreamingC4(str(tokenizer_dir), 32, split='val', batch_size=5, **places)
    batches = list(DataLoader(dataset, batch_size=5))
    assert [(batch['input_ids'].shape, batch['labels'].shape) for batch in batches] == [((5, 32), (5, 33))] * 4
    assert np.array_equal(torch.cat([batch['labels'] for batch in batches]), stored)
    assert np.array_equal(torch.cat([batch['input_ids'] for batch in batches]), stored[:, :32])
    assert get_num_tokens_in_batch(batches[0])['total'] == 5 * 32


def test_microbatches_count_every_target(tokenizer_dir: Path, tmp_path: Path):
    from composer.core import DataSpec

    stored = np.random.default_rng(0).integers(0, 4, (12, 33)).astype(np.uint16)  # 0, a quarter, is EOS
    split = token_split(tmp_path, list(stored), 'ndarray:uint16:33')
    dataset = StreamingC4(str(tokenizer_dir), 32, local=str(split), split='val', batch_size=12, sequence_ids=True)
    batch = next(iter(DataLoader(dataset, batch_size=12)))
    spec = DataSpec([batch], get_num_tokens_in_batch=get_num_tokens_in_batch)
    parts = list(spec.split_batch(batch, 5))
    assert [[tuple(value.shape) for value in part.values()] for part in parts] == [
        [(n, 32), (n, 33), (n, 32)] for n in (5, 5, 2)]
    total = 12 * 32 - int((stored[:, :32] == EOS).sum())  # no target after an EOS
    assert sum(get_num_tokens_in_batch(part)['total'] for part in parts) == total
    assert spec.get_num_tokens_in_batch(batch) == total and spec.get_num_samples_in_batch(batch) == 12


# ---------------------------------------------------------------- documents in a sample


def documents_of(ids: list[int], eos: int) -> list[int]:
    """The number of each token's document, counted in a plain loop."""
    numbers, n = [], 0
    for token in ids:
        numbers.append(n)
        n += token == eos
    return numbers


@pytest.mark.parametrize('extra', [0, 1])
def test_sequence_ids_number_the_documents_of_packed_tokens(tokenizer_dir: Path, tmp_path: Path, extra: int):
    rng = np.random.default_rng(1)
    stored = np.where(rng.random((50, 16 + extra)) < 0.2, EOS, rng.integers(1, 512, (50, 16 + extra))).astype(np.uint16)
    stored[0], stored[1], stored[2, :2] = EOS, 5, EOS  # nothing but EOS, no EOS, and a sample that begins with two
    split = token_split(tmp_path, list(stored), f'ndarray:uint16:{16 + extra}')
    build = lambda ids: list(StreamingC4(str(tokenizer_dir), 16, local=str(split), split='val', sequence_ids=ids))  # noqa: E731
    for plain, sample, row in zip(build(False), build(True), stored.tolist(), strict=True):
        assert list(plain) == ['input_ids', 'labels'] and plain['labels'].tolist() == row
        assert sample['sequence_id'].dtype == np.int64 and sample['input_ids'].tolist() == row[:16]
        numbers = documents_of(row, EOS)
        assert sample['sequence_id'].tolist() == numbers[:16]
        assert sample['labels'].tolist() == [
            -100 if i and numbers[i] != numbers[i - 1] else token for i, token in enumerate(row)]


def test_sequence_ids_of_text(open_c4, val_ids):
    samples = list(open_c4(group_method='concat', sequence_ids=True))
    joined = [token for ids in val_ids for token in ids]
    assert len(samples) == len(joined) // SEQ and max(sample['sequence_id'][-1] for sample in samples) == 2
    for i, sample in enumerate(samples):
        assert sample['sequence_id'].tolist() == documents_of(joined[i * SEQ:(i + 1) * SEQ], EOS)
        assert ((sample['labels'] == -100) == (np.diff(sample['sequence_id'], prepend=0) > 0)).all()
    alone = list(open_c4(sequence_ids=True))
    assert all(sample['sequence_id'].tolist() == [0] * SEQ for sample in alone)
    assert [sample['labels'].tolist() for sample in alone] == [sample['labels'].tolist() for sample in open_c4()]


# ---------------------------------------------------------------- evaluation


@pytest.mark.parametrize('world_size', [1, 2, 3, 4])
@pytest.mark.parametrize('eval_samples', [-1, 1, 7, 89, 1000])
def test_evaluation_counts_each_sample_once(open_c4, val_ids, world_size: int, eval_samples: int):
    view = EvalView(open_c4(), eval_samples)
    expected = 90 if eval_samples in (-1, 1000) else eval_samples
    assert len(view) == expected
    seen = []
    for rank in range(world_size):
        sampler = DistributedSampler(view, world_size, rank, shuffle=False, drop_last=False)
        samples = rows(DataLoader(view, batch_size=4, sampler=sampler))
        padding = sampler.total_size - len(view)  # Composer drops the last sample of as many last ranks
        seen += samples[:-1] if rank >= world_size - padding else samples
    assert Counter(map(tuple, seen)) == Counter(tuple((ids + [EOS] * SEQ)[:SEQ]) for ids in val_ids[:expected])


def test_eval_view_is_a_sequence(open_c4, val_ids):
    view = EvalView(open_c4(), 5)
    assert [sample['input_ids'].tolist() for sample in view] == [(ids + [EOS] * SEQ)[:SEQ] for ids in val_ids[:5]]


@pytest.mark.parametrize('num_workers', [0, 2])
def test_eval_loader_is_bounded_and_in_order(config, val_ids, num_workers: int):
    loader = build_c4_dataloader(config(eval_samples=10, num_workers=num_workers), 4, evaluate=True)
    assert len(loader) == 3
    assert rows(loader) == [(ids + [EOS] * SEQ)[:SEQ] for ids in val_ids[:10]]


def test_eval_loader_says_what_it_ignores(config, val_ids):
    with pytest.warns(UserWarning, match='eval_loader.dataset.shuffle is ignored'):
        loader = build_c4_dataloader(config({'shuffle': True}), 4, evaluate=True)
    assert rows(loader)[0] == (val_ids[0] + [EOS] * SEQ)[:SEQ]


TWO_RANKS = """
import json, sys, torch, torchmetrics
from composer import ComposerModel, Trainer
from composer.core import DataSpec
from composer.utils import dist
from src.common.targets import get_num_tokens_in_batch
from src.data_c4 import build_c4_dataloader

class Sums(torchmetrics.Metric):
    def __init__(self):
        super().__init__()
        for name in ('samples', 'ids'):
            self.add_state(name, torch.tensor(0), dist_reduce_fx='sum')
    def update(self, ids, _):
        self.samples += len(ids); self.ids += (ids * torch.arange(1, 1 + ids.shape[1])).sum()
    def compute(self):
        return self.samples * 10**9 + self.ids

class Model(ComposerModel):
    def __init__(self):
        super().__init__(); self.w = torch.nn.Parameter(torch.zeros(1))
    def forward(self, batch):
        return self.w.sum()
    def loss(self, outputs, batch):
        return outputs ** 2
    def eval_forward(self, batch, outputs=None):
        return batch['input_ids']
    def get_metrics(self, is_train):
        return {} if is_train else {'Sums': Sums()}
    def update_metric(self, batch, outputs, metric):
        metric.update(outputs, None)

dist.initialize_dist('cpu', timeout=60)
cfg = json.loads(sys.argv[1])
evals = build_c4_dataloader(cfg, 4, evaluate=True)
cfg['dataset'].update(group_method='concat', split='train')
train = build_c4_dataloader(cfg, 4)
shortest = min(dist.all_gather_object(len(list(train))))
model = Model()
trainer = Trainer(model=model, train_dataloader=DataSpec(train, get_num_tokens_in_batch=get_num_tokens_in_batch),
                  accumulate_train_batch_on_tokens=True, eval_dataloader=evals, max_duration=f'{shortest + 3}ba',
                  device='cpu', progress_bar=False, optimizers=torch.optim.SGD(model.parameters(), 0.1))
trainer.fit()
time = trainer.state.timestamp
print('FOUND', json.dumps([shortest, time.epoch.value, time.batch_in_epoch.value, time.token.value,
                           int(trainer.state.eval_metric_values['Sums'])]))
"""


@pytest.mark.slow
def test_two_real_ranks(config, val_ids, tmp_path: Path, temp: Path):
    (tmp_path / 'two.py').write_text(TWO_RANKS)
    texts = []

    def two() -> None:
        done = run([str(warm.SCRIPTS / 'composer'), '-n', '2', '--master_port', str(free_port()), str(tmp_path / 'two.py'),
                    json.dumps(config(eval_samples=89))], temp)
        assert 'FOUND' in done.stdout, done.stdout + done.stderr
        texts.append(done.stdout)

    assert leaves_no_lock(two, temp)
    shortest, epoch, batch_in_epoch, tokens, metric = json.loads(texts[0].split('FOUND')[1].splitlines()[0])
    ids = np.array([(ids + [EOS] * SEQ)[:SEQ] for ids in val_ids[:89]])
    assert metric == 89 * 10**9 + int((ids * np.arange(1, SEQ + 1)).sum())
    assert shortest > 20 and (epoch, batch_in_epoch) == (1, 3)  # the epoch ended with the rank that has the fewest
    assert tokens % (SEQ - 1) == 0 and 0 < 2 * 4 * (SEQ - 1) * (shortest + 3) - tokens < 2 * 4 * (SEQ - 1)


# ---------------------------------------------------------------- remote and local


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob('*.mds'))


def test_copies_only_the_shards_that_are_read(config, mds_root: Path, tmp_path: Path):
    places = {'remote': str(mds_root), 'local': str(tmp_path)}
    assert len(rows(build_c4_dataloader(config(places, eval_samples=3), 4, evaluate=True))) == 3
    assert shards(mds_root / 'val')[:1] == shards(tmp_path / 'val')
    assert len(shards(mds_root / 'val')) == 3


@pytest.mark.parametrize('spelling', ['same', 'link', 'none'])
def test_copies_nothing_when_the_places_are_one(open_c4, mds_root: Path, tmp_path: Path, spelling: str):
    (tmp_path / 'link').symlink_to(mds_root)
    remote = {'same': str(mds_root) + '/', 'link': str(tmp_path / 'link'), 'none': None}[spelling]
    before = sorted(mds_root.rglob('*'))
    dataset = open_c4(remote=remote, batch_size=8)
    assert dataset.streams[0].remote is None and len(rows(DataLoader(dataset, batch_size=8))) == 90
    assert sorted(mds_root.rglob('*')) == before


@pytest.mark.parametrize('copied', [True, False])
def test_one_split_for_training_and_evaluation(config, mds_root: Path, tmp_path: Path, copied: bool):
    cfg = config({'remote': str(mds_root) + '/', 'local': str(tmp_path if copied else mds_root)})
    train, evals = build_c4_dataloader(cfg, 4), build_c4_dataloader(cfg, 4, evaluate=True)
    assert rows(train) == rows(evals)[:88]
    assert not (mds_root / 'eval').exists()


def test_an_epoch_cut_short_lets_go_of_the_dataset(open_c4, mds_root: Path, tmp_path: Path):
    dataset = open_c4(remote=str(mds_root), local=str(tmp_path), split='train', batch_size=2)
    assert len(next(iter(DataLoader(dataset, batch_size=2)))['labels']) == 2
    gone = weakref.ref(dataset)
    del dataset
    wait_until(lambda: gc.collect() >= 0 and gone() is None)  # otherwise its download threads are still running
    open_c4(remote=str(mds_root), local=str(tmp_path), split='train', batch_size=2)


def test_garbage_is_collected_where_it_holds_the_folder(open_c4, mds_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    collections: list[int] = []
    monkeypatch.setattr('src.loader.shared_memory.gc', SimpleNamespace(collect=lambda: collections.append(gc.collect())))
    gc.disable()
    try:
        monkeypatch.chdir(tmp_path)
        for remote, split in ((mds_root, 'val'), (mds_root / 'val', None)):
            dataset = open_c4(remote=str(remote), local='./a', split=split)
            dataset.cycle = dataset
            del dataset
            open_c4(remote=str(remote), local='b', split=split)
            open_c4()
            assert not collections
            open_c4(remote=str(remote), local=f'{tmp_path}//a', split=split)  # without one: `Reused local directory`
            assert len(collections) == 1
            collections.clear()
    finally:
        gc.enable()


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(('change', 'says'), [
    ({'local': '/nowhere'}, r"no folder '/nowhere'.*\n  python convert_c4.py --out_root /nowhere --splits val --source"),
    ({'remote': '/nowhere'}, "no folder '/nowhere'"),
    ({'split': 'test'}, "has no split 'test'; it has: train, val. .*--splits test"),
    ({'split': 'tokenizer'}, 'tokenizer.* has no index.json'),
    ({'tokenizer_name': '/nowhere/tokenizer'}, "tokenizer_name: no folder '/nowhere/tokenizer'"),
    ({'cache_limit': '1gb'}, "dataset.cache_limit: '1gb' with no remote would delete the only copy"),
    ({'epoch_size': 'many'}, "dataset.epoch_size: 'many':? must be a number of samples above 0"),
    ({'group_method': 'join'}, "dataset.group_method: 'join' (is not one of|must be) 'truncate'"),
    ({'splits': 'val'}, 'dataset.splits: no such key'),
])
def test_mistakes_are_named(config, change: dict, says: str):
    with pytest.raises(UserError, match=f'(?s){says}'):
        build_c4_dataloader(config(change), 4)


def test_evaluation_is_not_packed(config):
    with pytest.raises(UserError, match="group_method: 'concat' has no fixed set of samples.*truncate"):
        build_c4_dataloader(config({'group_method': 'concat'}), 4, evaluate=True)


@pytest.mark.parametrize(('change', 'batch', 'says'), [
    ({}, 91, 'train_loader: an epoch holds less than one full batch: .*/val holds 90 samples, fewer than global_train_batch_size 91; '
             'use more data or a smaller global_train_batch_size'),
    ({'epoch_size': '0.01k'}, 11, 'an epoch holds less than one full batch: .*holds 10 samples, fewer than global_train_batch_size 11'),
    ({'shuffle': True, 'num_canonical_nodes': 91}, 1, 'num_canonical_nodes: 91 is more than the 90 samples of an epoch'),
])
def test_too_few_samples(config, change: dict, batch: int, says: str):
    with pytest.raises(UserError, match=says):
        build_c4_dataloader(config(change), batch)


def test_the_global_batch_counts_all_ranks(config, monkeypatch):
    monkeypatch.setattr('src.data_c4.get_world_size', lambda: 4)
    loader = build_c4_dataloader(config(), 11)
    assert (len(loader), len(loader.dataset)) == (2, 22)  # 90 // 44
    with pytest.raises(UserError, match='holds 90 samples, fewer than global_train_batch_size 92'):
        build_c4_dataloader(config(), 23)


def test_cache_limit_that_is_too_small(config, mds_root: Path, tmp_path: Path):
    with pytest.raises(UserError, match='dataset.cache_limit: Cache limit .* is too low'):
        build_c4_dataloader(config({'remote': str(mds_root), 'local': str(tmp_path), 'cache_limit': '10kb'}), 4)


def test_a_local_copy_of_other_data(config, mds_root: Path, tmp_path: Path):
    shutil.copytree(mds_root / 'train', tmp_path / 'val')
    with pytest.raises(UserError, match='holds shards of other data than'):
        build_c4_dataloader(config({'remote': str(mds_root), 'local': str(tmp_path)}), 4)


def test_datasets_that_are_no_c4(config, tmp_path: Path):
    write_mds(tmp_path / 'other', [{'body': 'x', 'url': 'y'}], {'body': 'str', 'url': 'str'})
    with pytest.raises(UserError, match=r"no column 'text' .* no column 'tokens' .*; its columns are {'body': 'str', 'url'"):
        build_c4_dataloader(config({'local': str(tmp_path), 'split': 'other'}), 4)
    for split, index, says in (('empty', '{"version": 2, "shards": []}', 'holds no documents.*--splits empty'),
                               ('broken', '{"ver', 'index.json is empty or corrupted')):
        (tmp_path / split).mkdir()
        (tmp_path / split / 'index.json').write_text(index)
        with pytest.raises(UserError, match=f'(?s){says}'):
            build_c4_dataloader(config({'local': str(tmp_path), 'split': split}), 4)
    write_mds(tmp_path / 'bytes', [{'text': b'x'}], {'text': 'bytes'})
    with pytest.raises(UserError, match=r"dataset: column 'text' of .*bytes is 'bytes'; it must be 'str'"):
        build_c4_dataloader(config({'local': str(tmp_path), 'split': 'bytes'}), 4)
    with JSONWriter(out=str(tmp_path / 'json'), columns={'text': 'str'}) as out:
        out.write({'text': 'x'})
    with pytest.raises(UserError, match='dataset: .*json holds no shards of the format MDS'):
        build_c4_dataloader(config({'local': str(tmp_path), 'split': 'json'}), 4)


def test_a_remote_that_streaming_cannot_read(config, tmp_path: Path):
    with pytest.raises(UserError, match='dataset.remote: cannot read nosuch://bucket/c4/val: ValueError: Unsupported') as e:
        build_c4_dataloader(config({'remote': 'nosuch://bucket/c4', 'local': str(tmp_path)}), 4)
    assert e.value.__suppress_context__


# ---------------------------------------------------------------- targets


def test_targets_are_counted_after_the_shift(config):
    labels = torch.tensor([[5, 6, 7, -100], [5, -100, -100, -100], [5, 6, 7, 8]])
    assert get_num_tokens_in_batch({'labels': labels}) == {'total': 5, 'loss_generating': 5}
    none = get_num_tokens_in_batch({'labels': labels[1:2]})
    assert none['total'] == 0 and 0 < none['loss_generating'] < 1e-3
    packed = next(iter(build_c4_dataloader(config({'group_method': 'concat'}), 4)))
    assert get_num_tokens_in_batch(packed)['total'] == 4 * (SEQ - 1)


# ---------------------------------------------------------------- the test program


def test_smoke_test_of_a_folder(mds_root: Path, temp: Path):
    before = sorted(mds_root.rglob('*'))
    done = run(['src/data_c4.py', str(mds_root), '--max_seq_len', '96'], temp)
    assert (done.returncode, done.stderr) == (0, '')
    out = done.stdout
    assert '90 documents in 3 shards' in out and out.count('input_ids (8, 96)') == 5 and 'batch 4:' in out
    assert repr(documents('val')[32][:40])[1:-1] in out  # the first sample of the fifth batch, decoded
    assert '\n90 documents, ' in out and 'documents/s' in out and 'tokens/s' in out
    assert sorted(mds_root.rglob('*')) == before


def test_smoke_test_of_tokens(tokens_root: Path, temp: Path):
    done = run(['src/data_c4.py', str(tokens_root), '--split', 'train', '--max_seq_len', '32'], temp)
    assert (done.returncode, done.stderr) == (0, '')
    assert '500 sequences in 10 shards' in done.stdout and done.stdout.count('input_ids (8, 32), labels (8, 32)\n') == 5
    assert repr(documents('train')[0][:40])[1:-1] in done.stdout
    assert '\n500 sequences, 16,000 tokens in ' in done.stdout and 'sequences/s' in done.stdout


@pytest.mark.parametrize('workers', ['0', '2'])
def test_a_run_leaves_no_lock_file(mds_root: Path, temp: Path, workers: str):
    def smoke() -> None:
        assert run(['src/data_c4.py', str(mds_root), '--max_seq_len', '96', '--num_workers', workers], temp).returncode == 0

    assert leaves_no_lock(smoke, temp)


def test_smoke_test_says_what_is_missing(mds_root: Path, temp: Path):
    done = run(['src/data_c4.py', str(mds_root), '--split', 'test'], temp)
    assert done.returncode == 1 and done.stdout == ''
    assert done.stderr.startswith('error: dataset: ') and "has no split 'test'; it has: train, val" in done.stderr
    assert 'Traceback' not in done.stderr
    done = run(['src/data_c4.py', str(mds_root), '--tokenizer', '/nowhere/tokenizer'], temp)
    assert done.returncode == 1 and done.stderr.startswith("error: --tokenizer: no folder '/nowhere/tokenizer'")


HOLD = """
import sys
from src.data_c4 import StreamingC4
from torch.utils.data import DataLoader
remote, local = sys.argv[1:]
dataset = StreamingC4(remote + '/tokenizer', 64, remote=remote, local=local, split='train', batch_size=4)
batches = iter(DataLoader(dataset, batch_size=4, num_workers=1))
next(batches)
print(dataset._shm_prefix_int, flush=True)
sys.stdin.readline()
print(1 + len(list(batches)), flush=True)
"""


@pytest.fixture
def hold(temp: Path):
    """Starts runs that open a dataset, read a batch, and read on when they get a line. Each run is a process group."""
    started = []

    def start(remote: Path, local: Path) -> subprocess.Popen:
        started.append(warm.Popen([sys.executable, '-c', HOLD, str(remote), str(local)], cwd=ROOT, text=True,
                                        env=environment(temp), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_opening_a_dataset_keeps_no_hold_on_those_of_other_jobs(open_c4):
    first = open_c4()
    block = f'/dev/shm/{first._shm_prefix_int:06}_locals\n'
    assert Path('/proc/self/maps').read_text().count(block) == 1
    second = open_c4()
    while second._shm_prefix_int < first._shm_prefix_int:  # a test beside this one has freed a lower prefix meanwhile
        second = open_c4()
    assert Path('/proc/self/maps').read_text().count(block) == 1  # streaming's search for a prefix alone would make it 2


COUNT = """
import sys
from pathlib import Path
from filelock import FileLock

counter = Path(sys.argv[2])
for _ in range(100):
    with FileLock(sys.argv[1], poll_interval=0.001):
        counter.write_text(str(int(counter.read_text()) + 1))
"""


def test_lock_files_exclude_also_where_another_job_removes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers and nodes with one temporary folder see each other's lock files, but not each other's shared memory."""
    (tmp_path / 'shm').mkdir()
    monkeypatch.setattr(shared_memory, 'BLOCKS', tmp_path / 'shm')
    monkeypatch.setattr(shared_memory, 'gettempdir', lambda: str(tmp_path))
    monkeypatch.setattr(shared_memory, '_opened_prefixes', {'000003'})
    lock, counter = tmp_path / '000003_barrier_filelock', tmp_path / 'counter'
    with FileLock(lock):
        shared_memory.remove_own_locks()
        assert shared_memory.remove_stale() == [] and lock.exists()
    counter.write_text('0')
    others = [subprocess.Popen([sys.executable, '-c', COUNT, str(lock), str(counter)]) for _ in range(3)]
    n_removed = 0
    while any(process.poll() is None for process in others):
        n_removed += len(shared_memory.remove_stale())
        time.sleep(0.001)
    assert [process.returncode for process in others] == [0, 0, 0]
    assert n_removed > 1, 'one that the other processes made'
    assert counter.read_text() == '300'


def test_a_new_lock_file_in_the_place_of_a_removed_one_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / '000003_barrier_filelock'
    lock.touch()

    def flock(file: Any, operation: int) -> None:  # another process removes the file first, and a third one makes it anew
        lock.rename(tmp_path / 'removed')
        lock.touch()

    monkeypatch.setattr(shared_memory.fcntl, 'flock', flock)
    assert not shared_memory._remove_lock(lock)
    assert lock.exists()


@pytest.mark.slow
def test_works_at_once_after_sigkill_and_spares_other_jobs(mds_root: Path, tmp_path: Path, temp: Path, hold):
    runs = [hold(mds_root, tmp_path / name) for name in 'ab']  # at the same time: one could fail with FileExistsError
    # The second to look for a prefix has opened the blocks of the first, and must not keep them open.
    (first, killed), (second, living) = sorted(((int(run.stdout.readline()), run) for run in runs), key=lambda pair: pair[0])
    free = tmp_path / ('a' if killed is runs[0] else 'b')
    stale = Path(f'/dev/shm/{first:06}_locals').stat().st_ino
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    block, lock = Path(f'/dev/shm/{first:06}_locals'), temp / f'{first:06}_barrier_filelock'
    kept = {path: path.stat().st_ino for folder in (Path('/dev/shm'), temp) for path in folder.glob(f'{second:06}_*')}
    assert lock.exists() and len(kept) >= 8

    def removed() -> bool:
        return stale not in {entry.inode() for entry in os.scandir('/dev/shm')}

    # Its worker may take a moment longer to die. A run of another test may remove the files before the run below does, and
    # take the prefix. Then the lock files stay until that run has ended and another one starts.
    wait_until(lambda: block.name in orphans() or removed())

    def read_on() -> None:
        done = run(['src/data_c4.py', str(mds_root), str(free), '--split', 'train', '--group_method', 'concat',
                    '--num_workers', '2', '--max_seq_len', '64'], temp)
        assert (done.returncode, done.stderr) == (0, '')
        assert shards(free / 'train') == shards(mds_root / 'train')
        assert removed()

    read_on()
    assert lock.name not in stray_locks(temp) or leaves_no_lock(read_on, temp)
    assert {path: path.stat().st_ino for path in kept} == kept
    assert living.communicate('go on\n')[0] == '100\n'
