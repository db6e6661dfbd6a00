"""A loader of the user's own: any source of dicts of token ids works, and an error names what is missing."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from composer.core import Callback, DataSpec
from launch import ROOT, ranks, tiny
from own_loaders import FORMS, ROWS, SEQ, Anew, Forward, Rows, Stream, sampled, shuffled, told, uneven, with_other_keys
from runs import generated, train
from test_world_size import HF
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler

import main
from src.callbacks.metrics import UnigramBaseline
from src.common.errors import UserError
from src.config import load as config
from src.loader.batch_form import BatchChecker, split_batch
from src.tools import benchmark, estimate
from src.training import data

MODEL: Any = SimpleNamespace(vocab_size=512, max_seq_len=None)
QUICKSTART = str(ROOT / 'yamls/quickstart.yaml')
# No data, no tokenizer, and `dataset` sections that do not apply
OWN = ['data_remote=/nowhere', 'tokenizer=null', 'callbacks.text_samples=false',
       'train_loader.dataset.group_method=concat', 'eval_loader.dataset.split=train', 'eval_first=false',
       'device_train_microbatch_size=5', 'log_to_console=false']


class Seen(Callback):
    """Records the numbers of the rows that a run trains on and evaluates on, and its losses."""

    def __init__(self):
        self.rows: list[list[int]] = []
        self.evaluated: list[int] = []
        self.losses: list[float] = []

    def batch_start(self, state, logger) -> None:
        self.rows.append(state.batch['input_ids'][:, 0].tolist())

    def batch_end(self, state, logger) -> None:
        self.losses.append(float(state.total_loss_dict['loss/train/total']))

    def eval_before_forward(self, state, logger) -> None:
        self.evaluated += state.batch['input_ids'][:, 0].tolist()


@pytest.fixture
def run(mds_root, monkeypatch) -> Callable[..., tuple[Any, Seen]]:
    """Trains with `build` in place of the kit's loader; returns the Trainer and the recorded rows and losses."""

    def train(build: Callable[..., Any], *overrides: str, dry_run: bool = False) -> tuple[Any, Seen]:
        monkeypatch.setattr(data, 'build_c4_dataloader', build)
        seen = Seen()
        argv = [QUICKSTART, *tiny(mds_root, *OWN, 'max_duration=4ba', 'scheduler.t_warmup=1ba', *overrides)]
        trainer = main.main(config.load(argv), callbacks=[seen], dry_run=dry_run)
        trainer.close()
        return trainer, seen

    return train


def test_a_plain_dataloader_trains_and_evaluates_each_sample_once(run, capfd):
    trainer, seen = run(sampled, 'max_duration=3ep')
    assert int(trainer.state.timestamp.batch) == 6 and int(trainer.state.timestamp.sample) == 72
    assert [len(rows) for rows in seen.rows] == [12] * 6 and seen.rows[0] != seen.rows[2]
    assert sorted(seen.evaluated[:ROWS]) == [*range(ROWS)]
    said = capfd.readouterr().err
    assert 'data: a loader of your own, DataLoader of Rows, with 2 batches in an epoch' in said
    assert 'packed on the fly' not in said and 'asks for' not in said


def test_other_forms_of_the_same_samples_train_alike(run, tmp_path, capfd):
    """The last batch is short, and each run saves a checkpoint."""
    found = {}
    for form, build in FORMS.items():
        trainer, seen = run(lambda *args, build=build, **kwargs: build(), 'max_duration=3ba', 'eval_interval=3ba',
                            f'save_folder={tmp_path}/{form}')
        assert [len(rows) for rows in seen.rows] == [12, 12, 7], form
        assert seen.evaluated == [*range(ROWS)], form
        assert int(trainer.state.timestamp.token) == ROWS * (SEQ - 1), form
        found[form] = [*seen.losses, float(trainer.state.eval_metric_values['LanguageCrossEntropy'])]
        said = capfd.readouterr().err
        assert ('no labels, so the model predicts every token of input_ids' in said) == (form == 'without labels'), form
        assert ('an unknown number of batches' in said) == (form in ('no length', 'any iterable', 'arrays')), form
        assert 'asks for' not in said, form
    assert found == dict.fromkeys(FORMS, found['plain'])


def test_no_loader_of_evaluation_is_needed(run):
    trainer, _ = run(sampled, 'eval_loader=null', 'callbacks.unigram_baseline=false')
    assert int(trainer.state.timestamp.batch) == 4


def test_a_resumed_run_has_the_samples_and_weights_of_one_that_never_stopped(run, tmp_path, capfd):
    for build in (shuffled, sampled, told):
        argv = ['model.resid_pdrop=0.1', 'eval_interval=1ba', f'save_folder={tmp_path}/{build.__name__}/{{run_name}}',
                'autoresume=true', 'scheduler.t_max=5ba']
        whole, seen = run(build, *argv, 'run_name=whole', 'max_duration=5ba')
        _, first = run(build, *argv, 'run_name=stopped', 'max_duration=4ba')
        resumed, rest = run(build, *argv, 'run_name=stopped', 'max_duration=5ba')
        assert first.rows + rest.rows == seen.rows and len(rest.rows) == 1, build
        assert seen.rows[0] != seen.rows[3 if build is not sampled else 2], build
        want = whole.state.model.state_dict()
        assert all(torch.equal(value, want[key]) for key, value in resumed.state.model.state_dict().items()), build
        assert 'a resumed run reads its epoch again up to the checkpoint' in capfd.readouterr().err


def test_a_dry_run_shows_the_first_batch(run, capfd, mds_root):
    run(lambda *args, **kwargs: FORMS['without labels'](), dry_run=True)
    said = capfd.readouterr().err
    ids = Rows()[0]['input_ids'][:8].tolist()
    assert 'input_ids (12, 32), labels (12, 32); 372 targets' in said
    assert f'first sample, 32 tokens: {" ".join(map(str, ids))} ...' in said and 'dry run: all is well' in said
    run(sampled, f'tokenizer={{tokenizer_name: {mds_root}/tokenizer, max_seq_len: 32}}', dry_run=True)
    assert '  text: ' in capfd.readouterr().err


def test_a_batch_of_another_size_than_the_config_says_is_said_once(run, capfd):
    for size, rows in ((5, 'a batch has 5 samples'), (20, 'a batch has 20 samples')):
        trainer, _ = run(lambda *args, size=size, **kwargs: DataLoader(Rows(), size))
        said = capfd.readouterr().err
        assert said.count(rows) == said.count('asks for 12. The run trains on the batches of the loader') == 1
        assert int(trainer.state.timestamp.batch) == 4


def batch(*shape: int, **others: torch.Tensor) -> Callable[[], Any]:
    """A loader of a single batch of ones."""
    return lambda: [{'input_ids': torch.ones(shape).long(), **others}]


def lists() -> Any:
    return DataLoader(Rows(lambda row: {'input_ids': row['input_ids'].tolist()}), 12)


MISTAKES: dict[str, tuple[Callable[[], Any], list[str], str]] = {
    'tuples': (lambda: [(1, 2)], [], 'train_loader: a batch must be a dict with input_ids, but this one is a tuple'),
    'no ids': (lambda: [{'tokens': 1}], [], 'must be a dict with input_ids, but this one has the keys tokens'),
    'lists': (lists, [], 'input_ids of a batch must be whole numbers in a tensor of shape (batch, seq), but is a list'),
    'floats': (lambda: [{'input_ids': torch.zeros(12, 8)}], [], 'but is torch.float32 of shape (12, 8)'),
    'one row': (batch(8), [], 'but is torch.int64 of shape (8,)'),
    'ids': (lambda: [{'input_ids': torch.full((12, 8), 512)}], [], 'hold 512, but the model has the token ids 0 to 511'),
    'labels': (batch(12, 8, labels=torch.full((12, 8), -1)), [], 'labels hold -1'),
    'shapes': (batch(12, 8, labels=torch.ones(12, 10).long()), [],
               'labels have shape (12, 10), but input_ids have shape (12, 8); give labels of shape (12, 8) or (12, 9)'),
    'mask': (batch(12, 8, attention_mask=torch.full((12, 8), 3)), [],
             'attention_mask must be 1 at tokens and 0 at padding, but holds 3 and 3'),
    'long rows': (batch(12, 64), [], 'input_ids have 64 tokens in a row, but the model has positions for 32'),
    'epochs': (lambda: DataLoader(Stream(), 12), ['max_duration=1ep'],
               "max_duration: '1ep', but the train loader, DataLoader of Stream, does not say how many batches an epoch"),
    'read once': (lambda: iter([*DataLoader(Rows(), 12)]), [], 'eval_loader: a list_iterator can be read only once'),
    'read once, in training': (lambda: iter([*DataLoader(Rows(), 12)]), [],
                               'must start again each time it is iterated over'),
    'objects': (lambda: [{'input_ids': np.array([[1, 2], [3]], object)}], [], 'but is object of shape (2,)'),
    'no rows': (batch(0, 8), [], 'but is torch.int64 of shape (0, 8)'),
    'not checked': (batch(12, 64, n_targets=torch.ones(12)), [], 'input_ids have 64 tokens in a row'),
    'nothing': (list, [], 'train_loader: an epoch holds less than one full batch'),
}


@pytest.mark.parametrize('case', list(MISTAKES))
def test_what_a_loader_lacks_is_one_message(case, run):
    build, overrides, message = MISTAKES[case]
    with pytest.raises(UserError) as e:
        alone = [] if case == 'read once' else ['eval_loader=null', 'callbacks={}']
        run(lambda *args, **kwargs: build(), *alone, *overrides)
    assert message in str(e.value)


@pytest.mark.parametrize(('given', 'message'), [([], 'the loader gave no batch'), ([(1, 2)], 'a batch must be a dict')])
def test_an_evaluation_that_cannot_be_is_found_before_the_training(run, given, message):
    class Unread(Anew):
        def __iter__(self):
            raise AssertionError

    with pytest.raises(UserError, match=f'eval_loader: {message}'):
        run(lambda cfg, batch_size, evaluate=False: given if evaluate else Unread([]))


@pytest.mark.parametrize('given', [DataSpec([]), None, {'a': [], 'b': []}], ids=['DataSpec', 'NoneType', 'dict'])
def test_what_is_no_loader_is_a_message(given):
    with pytest.raises(UserError, match=f'eval_loader: build_c4_dataloader returned a {type(given).__name__}; have it'):
        data.build_data_spec(given, 'eval_loader', MODEL, 17)


def test_the_kits_own_loader_needs_a_tokenizer(mds_root):
    with pytest.raises(UserError, match='tokenizer: null is for a loader of your own'):
        main.main(config.load([QUICKSTART, *tiny(mds_root, 'tokenizer=null', 'callbacks.text_samples=false')]))
    with pytest.raises(UserError, match='callbacks.text_samples: needs a tokenizer, but tokenizer is null'):
        main.main(config.load([QUICKSTART, *tiny(mds_root, 'tokenizer=null')]))


def test_an_epochs_number_reaches_samplers_and_an_evaluation_has_one_order():
    for form in (lambda s: DataLoader(Rows(), 12, sampler=s),
                 lambda s: DataLoader(Rows(), batch_sampler=BatchSampler(s, 12, False))):
        for setting, epochs in (('train_loader', [0, 1]), ('eval_loader', [0, 0])):
            sampler = Forward()
            loader: Any = data.build_data_spec(form(sampler), setting, MODEL, 17).dataloader
            assert [[*map(len, loader)], [*map(len, loader)]] == [[2, 2, 2]] * 2 and sampler.epochs == epochs
    loader = data.build_data_spec(shuffled(None, 31), 'eval_loader', MODEL, 17).dataloader
    assert torch.equal(*(next(iter(loader))['input_ids'] for _ in range(2)))


def test_what_callbacks_and_resumed_runs_ask_of_a_loader():
    class Counted(Stream):
        def state_dict(self, num_samples, from_beginning):
            return {}

    for dataset, counts, again in ((Counted(), True, 'continues at the next sample'),
                                   (Stream(), False, 'reads its epoch again up to the checkpoint')):
        loader: Any = data.build_data_spec(DataLoader(dataset, 12), 'train_loader', MODEL, 17).dataloader
        assert (loader.dataset, loader.num_workers, data.resumes_by_samples(loader)) == (dataset, 0, counts)
        assert f'a resumed run {again}' in data.describe(loader)[0]
        assert isinstance(copy.copy(loader), type(loader))


def test_the_rank_with_the_fewest_batches_says_how_many_an_epoch_has(monkeypatch):
    for lengths, length in (([4, 2], 2), ([4, None], None)):
        monkeypatch.setattr(data.dist, 'all_gather_object', lambda mine, lengths=lengths: lengths)
        loader = data.build_data_spec(uneven(None, 12), 'train_loader', MODEL, 17).dataloader
        assert data.count_batches(loader) == length


def test_ranks_that_would_read_the_same_samples_are_told(monkeypatch):
    monkeypatch.setattr(data.dist, 'get_world_size', lambda: 2)
    monkeypatch.setattr(data.dist, 'all_gather_object', lambda mine: [mine, mine])
    for setting in ('train_loader', 'eval_loader'):
        for loader in (DataLoader(Rows(), 12), DataLoader(Rows(), 12, shuffle=True),
                       DataLoader(Rows(), batch_sampler=BatchSampler(RandomSampler(Rows()), 12, False))):
            with pytest.raises(UserError, match=f'{setting}: the DataLoader has no DistributedSampler, so each of 2'):
                data.build_data_spec(loader, setting, MODEL, 17)

    def lines(*args: Any, **kwargs: Any) -> list[str]:
        spec = data.build_data_spec(DataLoader(*args, **kwargs), 'train_loader', MODEL, 17)
        return data.describe(spec.dataloader)

    own = BatchSampler(Forward(), 12, False)
    for said in (lines(Stream(), 12), lines(Rows(), 12, sampler=Forward()), lines(Rows(), batch_sampler=own)):
        assert 'each rank trains on the same samples' in said[1]
    divided = DistributedSampler(Rows(), 2, 0)
    for given in ({'batch_size': 12, 'sampler': divided}, {'batch_sampler': BatchSampler(divided, 12, False)}):
        assert len(lines(Rows(), **given)) == 1


def test_padding_is_never_predicted_and_labels_may_be_one_longer():
    form = BatchChecker('train_loader', 512, 8)
    ids, mask = torch.arange(16).reshape(2, 8), torch.tensor([[1] * 8, [0] * 3 + [1] * 5])
    batch = form({'input_ids': ids, 'labels': ids, 'attention_mask': mask})
    assert batch['labels'].tolist() == [[*range(8)], [-100] * 3 + [*range(11, 16)]] and batch['n_targets'] == [7, 4]
    longer = form({'input_ids': ids[:, :7], 'labels': ids})
    assert longer['labels'].tolist() == ids.tolist() and longer['n_targets'] == [7, 7]


def test_a_batch_is_split_by_samples_and_the_rest_goes_to_all():
    batch = with_other_keys([Rows()[i] for i in range(5)])
    parts = split_batch(batch, 2)
    assert [len(part['input_ids']) for part in parts] == [len(part['url']) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part['input_ids'] for part in parts]), batch['input_ids'])
    assert [part['array'].tolist() for part in parts] == [[0, 1], [2, 3], [4]]
    for key in ('place', 'scale', 'epoch', 'nothing'):
        assert all(part[key] is batch[key] for part in parts)


@pytest.mark.slow
def test_two_ranks_do_what_one_does(run, mds_root, tmp_path):
    """In training, in an evaluation, in src/tools/evaluate.py, and with a Hugging Face model that FSDP shards."""
    own = [*OWN, 'callbacks.speed_monitor=false', 'max_duration=4ba', 'scheduler.t_warmup=1ba']
    hf = [*HF, 'fsdp_config.sharding_strategy=FULL_SHARD', 'tokenizer_name=none',
          *(o for o in tiny(mds_root, *own) if not o.startswith(('model.', 'loggers.', 'callbacks.')))]
    epochs = [QUICKSTART, *tiny(mds_root, *own), 'eval_loader=null', 'callbacks={lr_monitor: {}}', 'max_duration=2ep']
    program = ['src/tools/evaluate.py', QUICKSTART, *tiny(mds_root, *own), 'device_eval_batch_size=4']
    found = ranks(2, {name: [*argv, 'own_loader=sampled'] for name, argv in (
        ('own', [QUICKSTART, *tiny(mds_root, *own)]), ('hf', hf), ('program', program))}
        | {'uneven': [*epochs, 'own_loader=uneven']}, tmp_path)

    trainer, seen = run(sampled, *own)
    rows = [[row[0] for row in batch] for batch in found['own']['batches']]
    assert rows == [sorted(batch) for batch in seen.rows]
    assert [*found['own']['losses'].values()] == pytest.approx(seen.losses, rel=1e-5)
    baseline = next(cb for cb in trainer.state.callbacks if isinstance(cb, UnigramBaseline))
    assert found['own']['unigram'] == pytest.approx(baseline.entropy, rel=1e-9)
    assert found['uneven']['lrs'] == train(*epochs)['lrs']  # of a loader of two batches
    program = found['program']
    assert (program['sequences'], program['tokens'], program['bytes']) == (ROWS, ROWS * (SEQ - 1), None)

    alone = main.main(config.load(hf))
    alone.close()
    model: Any = alone.state.model
    assert model.config is model.model.hf.config and model.config.n_layer == 2
    assert len(generated(model)[0]) == 14
    assert found['hf']['generated'] == generated(model)


def test_programs_that_predict_take_a_config_of_an_own_loader(mds_root, monkeypatch, capsys):
    monkeypatch.setattr(data, 'build_c4_dataloader', sampled)
    argv = [QUICKSTART, *tiny(mds_root, *OWN)]
    assert estimate.main(estimate.parse_args(argv))


def test_a_benchmark_times_the_loader_that_trains(mds_root, tmp_path, monkeypatch):
    monkeypatch.setattr(data, 'build_c4_dataloader', sampled)
    argv = [QUICKSTART, *tiny(mds_root, *OWN), '--steps', '2', '--warmup', '1', '--out', str(tmp_path / 'benchmark')]
    record, = benchmark.main(benchmark.parse_args(argv))
    assert record['data'] == 'real' and record['steps'] == 2
