"""A resumed run with other settings: which take effect, which are refused, and what the plan says."""

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from checkpoint_runs import MUON, SHARDED
from composer.core import Callback, State
from composer.loggers import Logger
from launch import ROOT, tiny
from runs import Samples

import main
from src import optimizers
from src.callbacks.metrics import UnigramBaseline
from src.checkpoints.manifest import Manifest
from src.checkpoints.resume import compare_settings
from src.checkpoints.start import Start
from src.common.errors import UserError
from src.config import load as config
from src.config.schema import OptimizerConfig

EVERY = ('save_interval=4ba', 'run_name=one', 'max_duration=8ba', 'save_num_checkpoints_to_keep=-1',
         'callbacks.text_samples=false', 'log_to_console=false')
NO_EVALUATION = ('eval_loader=null', 'callbacks.unigram_baseline=false')


class Groups(Callback):
    """Records the first parameter group that each batch is trained with, and the settings of all groups at the end."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def batch_start(self, state: State, logger: Logger) -> None:
        self.all = [{key: value for key, value in group.items() if key != 'params'}
                    for group in state.optimizers[0].param_groups]
        self.seen.append(self.all[0])


class Run:
    """A run in this process: its messages, parameter groups and samples."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path, *overrides: str) -> None:
        said: list[str] = []
        groups, samples = Groups(), Samples()
        with monkeypatch.context() as patch:
            patch.setattr(logging.getLogger('src'), 'info', lambda text, *values: said.append(text % values))
            trainer = main.main(config.load([str(ROOT / 'yamls/quickstart.yaml'), *tiny(root, *EVERY, *overrides)]),
                                callbacks=[groups, samples])
        trainer.close()
        self.said, self.groups, self.batches = '\n'.join(said), groups.seen, samples.batches
        self.last_groups = groups.all
        self.unigram = next((cb.entropy for cb in trainer.state.callbacks if isinstance(cb, UnigramBaseline)), None)
        self.rates = [group['lr'] for group in self.groups]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, mds_root: Path):
    def start_run(*overrides: str, evaluates: bool = False) -> Run:
        return Run(monkeypatch, mds_root, *(() if evaluates else NO_EVALUATION), *overrides)
    return start_run


# ---------------------------------------------------------------- optimizer and schedule


@pytest.mark.parametrize('sharding', [(), SHARDED], ids=['full', 'sharded'])
def test_the_optimizers_settings_of_the_config_take_effect(run, tmp_path, sharding):
    whole = run(*sharding, f'save_folder={tmp_path}')
    checkpoint = next(path for path in tmp_path.glob('ep0-ba4*') if path.suffix != '.json')
    load = [*sharding, f'load_path={checkpoint}']
    again = run(*load)
    assert again.groups == whole.groups[4:], 'nothing changed'
    assert 'changed' not in again.said

    less = run(*load, 'optimizer.lr=1e-5', 'optimizer.betas=[0.8,0.9]', 'optimizer.eps=1e-6', 'optimizer.weight_decay=0.1')
    peak = whole.groups[0]['initial_lr']
    assert less.rates == pytest.approx([rate * 1e-5 / peak for rate in whole.rates[4:]], rel=1e-9)
    for group in less.groups:
        assert (group['initial_lr'], group['betas'], group['eps'], group['weight_decay']) == (1e-5, (0.8, 0.9), 1e-6, 0.1)
    assert (f'changed since the checkpoint: optimizer.lr {peak} → 1e-05, optimizer.betas [0.9, 0.95] → [0.8, 0.9], '
            'optimizer.eps 1e-08 → 1e-06, optimizer.weight_decay 0.0 → 0.1') in less.said


@pytest.mark.parametrize('sharding', [pytest.param((), marks=pytest.mark.slow), SHARDED[:1], SHARDED],
                         ids=['full', 'full of shards', 'sharded'])
def test_muons_settings_take_effect_in_their_groups_and_the_parts_of_matrices_stay(run, tmp_path, sharding):
    every = (*MUON, 'scheduler.t_warmup=4ba', *sharding)
    whole = run(*every, f'save_folder={tmp_path}')
    assert [group.get('rows') for group in whole.last_groups] == [(16, 16, 16), (), None]
    load = [*every, f'load_path={next(path for path in tmp_path.glob("ep0-ba4*") if path.suffix != ".json")}']
    again = run(*load)
    assert again.groups == whole.groups[4:] and again.last_groups == whole.last_groups and 'changed' not in again.said
    changed = run(*load, 'optimizer.lr=1e-5', 'optimizer.momentum=0.8', 'optimizer.weight_decay=0.1', 'optimizer.cautious=true')
    for group, old in zip(changed.last_groups, whole.last_groups, strict=True):
        assert group['lr'] == pytest.approx(old['lr'] * 1e-5 / old['initial_lr'], rel=1e-9)
        own = {'momentum': 0.8, 'cautious': True} if 'rows' in group else {}
        assert group == old | own | {'initial_lr': 1e-5, 'weight_decay': 0.1, 'lr': group['lr']}
    assert 'optimizer.momentum 0.95 → 0.8' in changed.said and 'optimizer.cautious False → True' in changed.said


def test_settings_of_an_own_optimizer_take_effect_and_what_its_groups_keep_stays(monkeypatch):
    class Own(OptimizerConfig):
        momentum: float = 0.9

    monkeypatch.setattr(optimizers, 'OptimizerConfig', Own)
    callback = optimizers.OptimizerSettings()
    group: dict[str, Any] = dict(lr=0.1, initial_lr=0.1, momentum=0.5, fused=None, steps=0, params=[])
    state: Any = SimpleNamespace(optimizers=[SimpleNamespace(param_groups=[group])], schedulers=[])
    callback.before_load(state, Logger(state))
    group.update(lr=0.1, initial_lr=0.2, momentum=0.9, fused=True, steps=7)  # the checkpoint's
    callback.after_load(state, Logger(state))
    assert group == dict(lr=0.05, initial_lr=0.1, momentum=0.5, fused=True, steps=7, params=[])


def test_another_schedule_holds_from_the_first_batch(run, tmp_path):
    run(f'save_folder={tmp_path}')
    load = f'load_path={tmp_path}/ep0-ba4-rank0.pt'
    constant = run(load, 'scheduler.name=constant_with_warmup', 'scheduler.t_warmup=1ba')
    assert set(constant.rates) == {constant.groups[0]['initial_lr']}
    assert 'scheduler.name cosine_with_warmup → constant_with_warmup' in constant.said
    longer = run(load, 'max_duration=16ba', 'scheduler.t_warmup=4ba')
    assert longer.rates[:2] == pytest.approx([longer.groups[0]['initial_lr']] * 2), 'the peak of the new schedule'
    assert 'max_duration 8ba → 16ba' in longer.said


# ---------------------------------------------------------------- data


def test_data_that_is_packed_on_the_fly_goes_on_with_the_same_settings_alone(run, tmp_path):
    packed = 'train_loader.dataset.group_method=concat'
    whole = run(packed, f'save_folder={tmp_path}')
    load = [packed, f'load_path={tmp_path}/ep0-ba4-rank0.pt']
    assert run(*load, 'device_train_microbatch_size=6').batches == whole.batches[4:]
    for change, text in {'global_train_batch_size=24': 'global_train_batch_size 12 → 24',
                         'train_loader.num_workers=1': 'train_loader.num_workers 0 → 1',
                         'seed=18': 'train_loader.dataset.shuffle_seed 17 → 18',
                         'train_loader.dataset.epoch_size=90': 'train_loader.dataset.epoch_size None → 90'}.items():
        with pytest.raises(UserError) as e:
            run(*load, change)
        message = str(e.value)
        assert message.startswith(f'load_path: {tmp_path}/ep0-ba4-rank0.pt lies within an epoch counted in batches')
        assert text in message and 'load_weights_only=true' in message
    run(*load, 'load_weights_only=true', 'global_train_batch_size=24', 'scheduler.t_warmup=1ba', 'max_duration=5ba')


def test_counted_samples_go_on_with_another_batch_size(run, tmp_path):
    whole = run(f'save_folder={tmp_path}', 'max_duration=12ba')
    load = f'load_path={tmp_path}/ep0-ba4-rank0.pt'
    got = run(load, 'global_train_batch_size=24', 'device_train_microbatch_size=24')
    assert got.batches == [sorted(whole.batches[i] + whole.batches[i + 1]) for i in (4, 6, 8, 10)]
    assert 'global_train_batch_size 12 → 24' in got.said and 'may come twice' not in got.said
    other = run(load, 'seed=18', 'max_duration=12ba')
    assert other.batches == whole.batches[4:]
    assert ('changed without effect, because a resumed run keeps the values of its checkpoint: seed 17 → 18, model.init_seed 17 → 18, '
            'train_loader.dataset.shuffle_seed 17 → 18') in other.said


def test_an_epoch_that_is_shorter_than_the_place_of_the_checkpoint_is_refused(run, tmp_path):
    run(f'save_folder={tmp_path}')
    load = f'load_path={tmp_path}/ep0-ba4-rank0.pt'
    with pytest.raises(UserError, match='ep0-ba4-rank0.pt lies at sample 48 of its epoch, and an epoch of this run has only 40'):
        run(load, 'train_loader.dataset.epoch_size=40')
    assert len(run(load, 'train_loader.dataset.epoch_size=48').batches) == 4
    run(load, 'train_loader.dataset.epoch_size=40', 'load_weights_only=true', 'max_duration=1ba',
        'scheduler.t_warmup=0ba')


def settings(**changed: Any) -> dict[str, Any]:
    return {'devices': 1, 'nodes': 1, 'global_train_batch_size': 12, 'train_loader.num_workers': 0,
            'train_loader.dataset': 'abc', 'train_loader.dataset.split': 'train', 'train_loader.dataset.shuffle': True,
            'train_loader.dataset.batching_method': 'random', 'train_loader.pin_memory': False,
            'train_loader.dataset.tokenizer_name': 'gpt2', 'model.n_heads': 2, 'eval_loader.dataset': 'x', **changed}


def start(sample_in_epoch: int = 48, **changed: Any) -> Start:
    manifest = Manifest('ep0-ba4', False, 0, 4, 48, 99, 1, {'ep0-ba4-rank0.pt': 1}, settings=settings(**changed),
                        sample_in_epoch=sample_in_epoch)
    return Start('resume', 'x/ep0-ba4-rank0.pt', False, manifest)


@pytest.mark.parametrize('key, value', [
    ('devices', 2), ('nodes', 2), ('global_train_batch_size', 8), ('train_loader.num_workers', 2), ('train_loader.dataset', 'd'),
    ('train_loader.dataset.split', 'other'), ('train_loader.dataset.shuffle', False),
    ('train_loader.dataset.tokenizer_name', 'other')])
def test_what_the_order_of_samples_depends_on(key, value):
    with pytest.raises(UserError, match=rf'autoresume|load_path: .*{key} .* → {value}'):
        compare_settings(start(), settings(**{key: value}), resumes_by_samples=False)
    assert compare_settings(start(sample_in_epoch=0), settings(**{key: value}), resumes_by_samples=False).lines == [
        f'changed since the checkpoint: {key} {settings()[key]} → {value}'], 'between two epochs'
    lines = compare_settings(start(), settings(**{key: value}), resumes_by_samples=True).lines
    matters = key in ('train_loader.dataset', 'train_loader.dataset.split', 'train_loader.dataset.shuffle')
    assert any('may come twice' in line for line in lines) == matters


def test_what_it_does_not_depend_on_is_said():
    for key, value in {'train_loader.pin_memory': True, 'model.n_heads': 4, 'eval_loader.dataset': 'y'}.items():
        assert compare_settings(start(), settings(**{key: value}), resumes_by_samples=False).lines == [
            f'changed since the checkpoint: {key} {settings()[key]} → {value}']
    assert compare_settings(start(), settings(**{'algorithms.ema.half_life': '1ba'}), False).lines == [
        'changed since the checkpoint: algorithms.ema.half_life unset → 1ba']
    assert compare_settings(start(**{'algorithms.ema.half_life': '1ba'}), settings(), False).lines == [
        'changed since the checkpoint: algorithms.ema.half_life 1ba → unset']
    by_stream = {'train_loader.dataset.batching_method': 'stratified'}
    lines = compare_settings(start(**by_stream), settings(**by_stream, global_train_batch_size=8), resumes_by_samples=True).lines
    assert any('global_train_batch_size 12 → 8: this epoch continues at its sample 48 in another order' in line for line in lines)


def test_a_checkpoint_that_does_not_tell_its_settings_is_said_and_taken(run, tmp_path):
    run(f'save_folder={tmp_path}/a', 'max_duration=4ba', 'scheduler.t_warmup=1ba')
    shutil.copy(tmp_path / 'a/ep0-ba4-rank0.pt', tmp_path / 'alone.pt')
    got = run(f'load_path={tmp_path}/alone.pt', 'train_loader.dataset.group_method=truncate')
    assert 'changed since the checkpoint: unknown, because the checkpoint has no manifest' in got.said and len(got.batches) == 4


def test_the_unigram_entropy_is_of_the_evaluation_set_at_hand(run, tmp_path):
    first = run(f'save_folder={tmp_path}', 'max_duration=1ba', 'scheduler.t_warmup=0ba', evaluates=True)
    load = [f'load_path={tmp_path}/ep0-ba1-rank0.pt', 'max_duration=2ba', 'scheduler.t_warmup=0ba']
    assert run(*load, evaluates=True).unigram == first.unigram
    other = run(*load, 'eval_samples=7', evaluates=True)
    assert other.unigram != first.unigram
    assert other.unigram == run('eval_samples=7', 'max_duration=1ba', 'scheduler.t_warmup=0ba', evaluates=True).unigram
    assert 'eval_samples 31 → 7' in other.said
