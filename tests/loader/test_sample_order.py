"""The order of samples is the same on any number of devices and workers, and after any number of stops."""

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer import ComposerModel, Trainer
from streaming.base.batching import generate_work
from streaming.base.format import MDSReader
from streaming.base.partition import get_partitions
from streaming.base.world import World

from src.common.errors import UserError
from src.data_c4 import StreamingC4, build_c4_dataloader, deal_whole_batches

WORLDS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 48]
BATCH = 48  # samples in a global batch: every world above divides it, and 10 batches leave out 20 of the 500 samples
Batch = list[list[int]]


@pytest.fixture
def build(tokens_root: Path):
    """Builds training loaders, by default for one device, of 500 shuffled sequences of packed tokens."""
    def build_loader(num_workers: int = 0, batch_size: int = BATCH, persistent_workers: bool = False, evaluate: bool = False,
                     **dataset: Any):
        root = dataset.pop('root', tokens_root)
        cfg = {'local': str(root), 'split': 'train', 'tokenizer_name': str(root / 'tokenizer'), 'max_seq_len': 32,
               'shuffle': True, **dataset}
        return build_c4_dataloader({'dataset': cfg, 'num_workers': num_workers, 'persistent_workers': persistent_workers},
                                   batch_size, evaluate)
    return build_loader


# ---------------------------------------------------------------- which samples, on fake worlds


def shapes(world_size: int) -> Iterator[tuple[int, int]]:
    """Numbers of nodes and of ranks per node; some numbers of nodes have no factor in common with the 64 canonical ones."""
    return ((nodes, world_size // nodes) for nodes in range(1, world_size + 1) if world_size % nodes == 0)


def global_batches(dataset: StreamingC4, world: World, epoch: int, seen: int = 0) -> list[list[int]]:
    """The samples of each global batch, sorted, as the ranks' DataLoaders take them from their workers in turns."""
    dataset.batch_size = BATCH // world.num_ranks
    work = generate_work(dataset.batching_method, dataset, world, epoch, seen)
    ranks = work.transpose(3, 2, 0, 1, 4).reshape(-1, BATCH)
    assert all((batch < 0).all() or (batch >= 0).all() for batch in ranks), 'some ranks have a batch that others have not'
    ranks = [batch for batch in ranks if batch[0] >= 0]
    assert len(ranks) == (dataset.epoch_size - seen) // BATCH
    return [sorted(batch.tolist()) for batch in ranks]


@pytest.fixture
def dataset(build) -> StreamingC4:
    dataset = build().dataset
    dataset._set_shuffle_block_size(World(1, 1, 1, 0))  # as an iterator does
    return dataset


@pytest.mark.parametrize('world_size', WORLDS)
def test_any_world_has_the_global_batches_of_one_rank(dataset, world_size: int):
    alone = [global_batches(dataset, World(1, 1, 1, 0), epoch) for epoch in range(3)]
    for epoch in alone:
        assert len(epoch) == 10 and len(set(chain(*epoch))) == 480, 'a sample is repeated'
    assert alone[0] != alone[1] != alone[2] != alone[0]
    dataset.initial_physical_nodes = 2  # as in a resumed run, where streaming's algorithms work differently
    for nodes, ranks in shapes(world_size):
        for workers in (1, 2, 3):
            world = World(nodes, ranks, workers, 0)
            for epoch in range(3):
                assert global_batches(dataset, world, epoch) == alone[epoch], (nodes, ranks, workers, epoch)
            for seen in (3, 9, 10):
                assert global_batches(dataset, world, 1, seen * BATCH) == alone[1][seen:], (nodes, ranks, workers, seen)


@pytest.mark.parametrize('settings', [
    *({'shuffle_algo': algo} for algo in ('py1br', 'py1s', 'py2s', 'naive')),
    {'shuffle': False}, {'batching_method': 'stratified'}, {'batching_method': 'per_stream'}, {'num_canonical_nodes': 1},
    {'num_canonical_nodes': 7}, {'epoch_size': '300'}, {'epoch_size': 1000}, {'sampling_method': 'fixed', 'epoch_size': 300},
], ids=str)
def test_other_settings_have_one_order_too(build, settings: dict):
    dataset = build(**settings).dataset
    dataset._set_shuffle_block_size(World(1, 1, 1, 0))
    alone = [global_batches(dataset, World(1, 1, 1, 0), epoch) for epoch in range(2)]
    assert len(alone[0]) == int(settings.get('epoch_size', 500)) // BATCH
    for nodes, ranks, workers in ((1, 4, 2), (3, 2, 1), (2, 8, 3), (48, 1, 1)):
        for epoch in range(2):
            assert global_batches(dataset, World(nodes, ranks, workers, 0), epoch) == alone[epoch], (nodes, ranks, workers)
        assert global_batches(dataset, World(nodes, ranks, workers, 0), 1, 2 * BATCH) == alone[1][2:]


def test_truncated_text_has_one_order_too(build, mds_root: Path):
    dataset = build(root=mds_root).dataset
    dataset._set_shuffle_block_size(World(1, 1, 1, 0))
    alone = global_batches(dataset, World(1, 1, 1, 0), 0)
    assert len(set(chain(*alone))) == 400 // BATCH * BATCH
    assert all(global_batches(dataset, World(*shape, 2, 0), 0) == alone for shape in shapes(12))


def test_an_unshuffled_epoch_is_in_the_order_of_the_data(build):
    dataset = build(shuffle=False, num_canonical_nodes=1).dataset
    assert list(chain(*global_batches(dataset, World(2, 3, 1, 0), 0))) == list(range(480))


@pytest.mark.parametrize('drop_first', [0, 2 * BATCH])
def test_samples_go_where_streaming_puts_them_if_it_repeats_none(drop_first: int):
    for nodes, ranks in ((1, 1), (1, 8), (2, 3), (4, 4), (16, 3)):
        for workers in (1, 2, 3):
            args = (16 * BATCH, 64, nodes, ranks, workers, BATCH // (nodes * ranks), drop_first)
            assert np.array_equal(deal_whole_batches(*args), get_partitions('orig', *args)), (nodes, ranks, workers)


def test_every_rank_counts_whole_batches(build):
    loader = build(batch_size=30)
    assert (len(loader), len(loader.dataset), loader.dataset.size) == (16, 480, 500)
    assert [len(batch['labels']) for batch in loader] == [30] * 16
    assert len(build(batch_size=30, epoch_size='0.1k')) == 3


# ---------------------------------------------------------------- real DataLoaders, stops and resumptions


def take(batches: Any) -> list[Batch]:
    return [batch['input_ids'].tolist() for batch in batches]


@pytest.fixture
def want(build) -> list[list[Batch]]:
    """The batches of three epochs, without a stop and without workers."""
    loader = build()
    epochs = [take(loader) for _ in range(3)]
    assert all(len(epoch) == 10 for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    return epochs


@pytest.mark.parametrize('num_workers', [1, 3])
@pytest.mark.parametrize('persistent', [False, True])
def test_workers_give_the_same_batches(build, want, num_workers: int, persistent: bool):
    loader = build(num_workers, persistent_workers=persistent)
    assert [take(loader) for _ in range(3)] == want


@pytest.mark.parametrize('workers', [(0, 0, 0), *(pytest.param(n, marks=pytest.mark.slow) for n in ((3, 2, 0), (1, 3, 3)))],
                         ids=str)
def test_resumes_exactly_after_any_number_of_stops(build, want, workers: tuple[int, ...]):
    def resume(state: dict, n: int):
        loader = build(n, persistent_workers=n == 3)
        loader.dataset.load_state_dict(state)
        return loader

    def some(loader: Any, n: int) -> list[Batch]:
        batches = iter(loader)
        return take(next(batches) for _ in range(n))

    # The state has the samples of all devices since the start of the epoch, as Composer counts them.
    loader = build(workers[0])
    assert some(loader, 3) == want[0][:3]
    second = resume(loader.dataset.state_dict(3 * BATCH, True), workers[1])
    assert some(second, 4) == want[0][3:7]
    third = resume(second.dataset.state_dict(7 * BATCH, True), workers[2])
    assert take(third) == want[0][7:]
    # A checkpoint after the epoch's last batch, and one at the epoch's end, when Composer already counts in the next epoch
    last_batch, end = third.dataset.state_dict(10 * BATCH, True), third.dataset.state_dict(0, True)
    assert take(third) == want[1]

    fourth = resume(last_batch, workers[1])
    assert take(fourth) == [], 'Composer goes on with the next epoch when this one has no batch left'
    assert fourth.dataset.state_dict(0, True) == end
    assert take(fourth) == want[1] and take(fourth) == want[2]
    fifth = resume(end, workers[0])
    assert fifth.dataset.state_dict(0, True) == end, 'a stop before the first batch'
    assert some(fifth, 2) == want[1][:2]
    sixth = resume(fifth.dataset.state_dict(2 * BATCH, True), workers[2])
    assert take(sixth) == want[1][2:] and take(sixth) == want[2]


def test_a_state_before_the_first_batch_is_the_beginning(build, want):
    loader = build()
    loader.dataset.load_state_dict(build().dataset.state_dict(0, True))
    assert [take(loader), take(loader)] == want[:2]


def test_a_checkpoint_of_samples_packed_on_the_fly_has_no_place_in_others(build):
    with pytest.raises(UserError, match='the run packed them on the fly.*load_weights_only=true'):
        build().dataset.load_state_dict(None)


def test_the_checkpoint_decides_on_the_order_in_later_epochs_too(build, want):
    loader = build(2, shuffle_seed=1, num_canonical_nodes=4)
    loader.dataset.load_state_dict(build().dataset.state_dict(0, True))
    assert [take(loader), take(loader)] == want[:2]


@pytest.mark.parametrize('kind', ['tokens', 'truncate'])
def test_resuming_late_reads_no_more_than_starting(build, mds_root: Path, tokens_root: Path, monkeypatch, kind: str):
    reads = []
    read = MDSReader.get_sample_data
    monkeypatch.setattr(MDSReader, 'get_sample_data', lambda self, i: reads.append(i) or read(self, i))

    def first_batch(seen: int) -> int:
        loader = build(root=tokens_root if kind == 'tokens' else mds_root, batch_size=8)
        loader.dataset.load_state_dict(loader.dataset.state_dict(seen, True) | {'epoch': 0})
        reads.clear()
        assert len(next(iter(loader))['labels']) == 8
        return len(reads)

    start = first_batch(0)
    assert 8 <= start < 100 and [first_batch(seen) for seen in (8, 200, 320)] == [start] * 3


@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('evaluate', [False, True])
def test_iterating_draws_no_random_number_of_the_models(build, num_workers: int, evaluate: bool):
    loader = build(num_workers, batch_size=8, evaluate=evaluate, shuffle=not evaluate)
    before, numpys = torch.get_rng_state(), np.random.get_state()[1]
    for _ in range(2):
        next(iter(loader))
    assert torch.equal(torch.get_rng_state(), before) and (np.random.get_state()[1] == numpys).all()


# ---------------------------------------------------------------- Composer


class Recorder(ComposerModel):
    """Keeps the batches that it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1))
        self.batches: list[Batch] = []

    def forward(self, batch: Any) -> torch.Tensor:
        self.batches.append(batch['input_ids'].tolist())
        return self.w.sum()

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return outputs ** 2


@pytest.fixture
def fit(build, tmp_path: Path) -> Callable[..., list[Batch]]:
    def train(num_workers: int = 0, **kwargs: Any) -> list[Batch]:
        model = Recorder()
        trainer = Trainer(model=model, train_dataloader=build(num_workers), optimizers=torch.optim.SGD(model.parameters(), 0.1),
                          device='cpu', progress_bar=False, save_folder=str(tmp_path), save_overwrite=True, **kwargs)
        trainer.fit()
        trainer.close()
        return model.batches
    return train


@pytest.mark.parametrize(('save_interval', 'checkpoint', 'seen'), [
    ('5ba', 'ep0-ba5', 5), ('5ba', 'ep0-ba10', 10), ('1ep', 'ep1-ba10', 10), ('5ba', 'ep1-ba15', 15)])
def test_composer_resumes_with_the_next_batch(fit, want, tmp_path: Path, save_interval: str, checkpoint: str, seen: int):
    batches = want[0] + want[1] + want[2]
    assert fit(2, max_duration='16ba', save_interval=save_interval) == batches[:16]
    assert fit(3, max_duration='3ep', load_path=str(tmp_path / f'{checkpoint}-rank0.pt')) == batches[seen:]


def test_composer_goes_on_after_the_end_of_a_run(fit, want, tmp_path: Path):
    fit(max_duration='1ep')
    fit(max_duration='2ep', load_path=str(tmp_path / 'latest-rank0.pt'))
    assert fit(max_duration='3ep', load_path=str(tmp_path / 'latest-rank0.pt')) == want[2]
