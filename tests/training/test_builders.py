"""The optimizer's arithmetic; callbacks, loggers and algorithms by name; the profiler; logs of each rank."""

import copy
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import composer.callbacks
import composer.optim
import pytest
import torch
from composer.core import Callback, State, Time, Timestamp
from composer.loggers import InMemoryLogger, Logger
from launch import ROOT, tiny

import main
from src import optimizers
from src.callbacks import profiling
from src.callbacks.loggers import FileLogger
from src.common.errors import UserError
from src.config import load as config
from src.config.derived import resolve_precision
from src.config.plugin_entries import find_class
from src.config.schema import Config, FSDPConfig, OptimizerConfig, SchedulerConfig
from src.optimizers import DecoupledAdamW
from src.training import failures, plugins, sharding


def make(cls, weight_decay: float):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 11), torch.nn.Linear(11, 3))
    return model, cls(model.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay)


@pytest.mark.parametrize('weight_decay', [0.0, 1e-2])
def test_fused_decoupled_adamw_is_composers_update(weight_decay):
    ours, mine = make(DecoupledAdamW, weight_decay)
    theirs, reference = make(composer.optim.DecoupledAdamW, weight_decay)
    for step in range(30):
        lr = 1e-2 * (step + 1) / 10 if step < 10 else 1e-2 / (step - 8)  # a schedule
        x = torch.randn(5, 7, generator=torch.Generator().manual_seed(step))
        for model, optimizer in ((ours, mine), (theirs, reference)):
            optimizer.param_groups[0]['lr'] = lr
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert mine.param_groups[0]['weight_decay'] == weight_decay
    assert mine.param_groups[0]['fused'] is True
    mine.fuses = False  # as the config of a run that goes on from this one's checkpoint may have it
    mine.step()
    assert mine.param_groups[0]['fused'] is False


def test_decay_does_not_scale_with_the_peak_learning_rate():
    shrink = []
    for lr in (1e-2, 1e-4):
        p = torch.nn.Parameter(torch.ones(4))
        optimizer = DecoupledAdamW([p], lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        p.grad = torch.zeros(4)
        optimizer.step()
        shrink.append(p[0].item())
    assert shrink == pytest.approx([0.9, 0.9], rel=1e-6)


def test_optimizer_state_loads_from_composers_class_and_back():
    ours, mine = make(DecoupledAdamW, 1e-2)
    theirs, reference = make(composer.optim.DecoupledAdamW, 1e-2)
    ours(torch.ones(1, 7)).sum().backward()
    mine.step()
    state = copy.deepcopy(mine.state_dict())
    reference.load_state_dict(state)
    mine.load_state_dict(reference.state_dict())
    ours(torch.ones(1, 7)).sum().backward()
    mine.step()
    assert type(mine).__name__ == type(reference).__name__ == 'DecoupledAdamW'
    assert next(iter(mine.state.values()))['step'].item() == 2


def test_builders_by_name():
    model = torch.nn.Linear(1, 1)
    assert type(optimizers.build_optimizer(OptimizerConfig(lr=1e-3), model)).__name__ == 'DecoupledAdamW'
    adamw = optimizers.build_optimizer(OptimizerConfig(name='adamw', lr=1e-3, weight_decay=0.1), model)
    assert type(adamw).__name__ == 'AdamW' and isinstance(adamw, torch.optim.AdamW)
    assert adamw.defaults['weight_decay'] == 0.1 and adamw.defaults['betas'] == (0.9, 0.95)
    names = {'cosine_with_warmup': 'CosineAnnealingWithWarmupScheduler', 'constant_with_warmup': 'ConstantWithWarmupScheduler',
             'linear_decay_with_warmup': 'LinearWithWarmupScheduler', 'warmup_stable_decay': 'WarmupStableDecay'}
    for name, cls in names.items():
        assert type(optimizers.build_scheduler(SchedulerConfig(name=name, t_warmup='10ba'))).__name__ == cls


@pytest.mark.parametrize('alpha_f', [0.0, 0.1])
@pytest.mark.parametrize('shape', ['linear', '1-sqrt'])
@pytest.mark.parametrize(('run', 'warmup'), [('40ba', '8ba'), ('40ba', '0.2dur'), ('4000tok', '800tok'), ('80sp', '16sp'),
                                             ('4ep', '0.2dur'), ('4ep', '8ba'), ('40ba', '1ep')])
def test_the_rate_warms_up_stays_and_cools_down(run: str, warmup: str, shape: Any, alpha_f: float) -> None:
    n_warmup = 10 if warmup == '1ep' else 8  # of 40 batches, in epochs of 10 batches
    schedule = optimizers.build_scheduler(SchedulerConfig(name='warmup_stable_decay', t_warmup=warmup, alpha_f=alpha_f,
                                                          cooldown=0.4, cooldown_shape=shape))
    for n in range(41):
        state: Any = SimpleNamespace(max_duration=Time.from_timestring(run), dataloader_len=Time.from_timestring('10ba'),
                                     timestamp=Timestamp(epoch=n // 10, batch=n, sample=2 * n, token=100 * n))
        part = max(0, n - 24) / 16  # of the cool-down
        want = 1 - (1 - alpha_f) * (part if shape == 'linear' else part ** 0.5)
        assert schedule(state) == pytest.approx(n / n_warmup if n < n_warmup else want, abs=1e-7), n


def test_a_run_goes_on_from_before_its_cool_down_as_a_longer_run(mds_root: Path, tmp_path: Path) -> None:
    every = ['scheduler.name=warmup_stable_decay', 'scheduler.cooldown=0.5', 'run_name=one', 'save_interval=10ba',
             'save_num_checkpoints_to_keep=-1']
    straight = trained(mds_root, *every, 'max_duration=40ba')
    short = trained(mds_root, *every, 'max_duration=20ba', f'save_folder={tmp_path}')
    assert short[:13] == straight[:13] and short[13] != straight[13], 'its 13th update is the first below the peak'
    rest = trained(mds_root, *every, 'max_duration=40ba', f'load_path={tmp_path}/ep0-ba10-rank0.pt')
    assert len(rest) == 30 and rest == straight[10:]


@pytest.mark.parametrize('name', list(plugins.CALLBACKS))
def test_every_callback_builds_with_its_defaults(name):
    needed = {'early_stopper': {'monitor': 'loss', 'dataloader_label': 'eval'}, 'text_samples': {'prompts': ['The']}}
    kwargs = needed.get(name, {})
    assert isinstance(plugins.build_plugins('callbacks', {name: kwargs})[0], find_class(plugins.CALLBACKS[name]))


@pytest.mark.parametrize('name', ['cometml', 'neptune', 'mlflow'])
def test_a_logger_whose_package_is_missing_says_how_to_install_it(name):
    with pytest.raises(UserError, match=rf'loggers.{name}: its package is not installed; pip install'):
        plugins.build_plugins('loggers', {name: {}})


def test_a_logger_whose_package_is_broken_says_why(monkeypatch):
    def broken() -> None:
        raise ImportError("cannot import name 'Writer'")

    monkeypatch.setitem(plugins.LOGGERS, 'tensorboard', broken)
    with pytest.raises(UserError, match="tensorboard: its package cannot be imported: cannot import name 'Writer'; "
                                        'pip install --force-reinstall tensorboard, or remove'):
        plugins.build_plugins('loggers', {'tensorboard': {}})


class MlflowException(Exception):
    """Like the error of mlflow, whose newer versions refuse a folder as their store."""


class Store(InMemoryLogger):
    def __init__(self, error: str) -> None:
        super().__init__()
        raise {'mlflow': MlflowException, 'own': KeyError, 'file': FileNotFoundError}[error](f'{error}\nmore')


class Mlflow(Store):
    pass


def test_what_a_logger_s_service_raises_is_named_and_its_bugs_stay(monkeypatch):
    monkeypatch.setattr(plugins, '_check_package', lambda section, name: None)
    monkeypatch.setitem(plugins.LOGGERS, 'mlflow', Mlflow)
    with pytest.raises(UserError) as e, failures.explain_external_failures():
        plugins.build_plugins('loggers', {'mlflow': {'error': 'mlflow'}})
    assert str(e.value).startswith('loggers.mlflow: MlflowException: mlflow. Change the keys of loggers.mlflow or the')
    with pytest.raises(KeyError, match='own'), failures.explain_external_failures():
        plugins.build_plugins('loggers', {'mlflow': {'error': 'own'}})
    monkeypatch.setitem(plugins.LOGGERS, 'mine', Store)
    for error, kind in (('mlflow', MlflowException), ('file', FileNotFoundError)):  # of a logger that is no stock one
        with pytest.raises(kind), failures.explain_external_failures():
            plugins.build_plugins('loggers', {'mine': {'error': error}})
    with pytest.raises(OSError, match='of something else'), failures.explain_external_failures():
        raise OSError('of something else')


def test_a_logger_whose_store_refuses_is_named(mds_root, tmp_path):
    (tmp_path / 'file').touch()
    overrides = [f'loggers.tensorboard.log_dir={tmp_path}/file/logs', 'log_to_console=false', 'max_duration=1ba',
                 'scheduler.t_warmup=0ba', 'eval_loader=null']
    with pytest.raises(UserError, match='loggers.tensorboard: NotADirectoryError: .*/file/logs.*tensorboard=false'):
        main.main(config.load([str(ROOT / 'yamls/quickstart.yaml'), *tiny(mds_root, *overrides)]))


def test_a_lost_worker_is_explained_at_any_moment():
    for loader in ('train_loader', 'eval_loader'):
        found_no_room = pytest.raises(UserError, match=f'^{loader}: its workers found no room')
        with found_no_room, failures.explain_external_failures(loader):
            raise RuntimeError('DataLoader worker (pid 7) is killed by signal: Bus error.')


def test_a_value_that_the_class_refuses_is_named():
    with pytest.raises(UserError, match='callbacks.speed_monitor: Invalid time_unit: parsecs. Must be one of'):
        plugins.build_plugins('callbacks', {'speed_monitor': {'time_unit': 'parsecs'}})


class Buggy(Callback):
    def __init__(self, kind: type[Exception]):
        raise kind('a mistake in this class')


@pytest.mark.parametrize('kind', [ValueError, TypeError, ImportError])
def test_a_mistake_in_a_class_of_the_users_keeps_its_traceback(kind, monkeypatch):
    monkeypatch.setitem(plugins.CALLBACKS, 'buggy', Buggy)
    with pytest.raises(kind) as e:
        plugins.build_plugins('callbacks', {'buggy': {'kind': kind}})
    assert type(e.value) is kind and str(e.value) == 'a mistake in this class'


def test_a_class_of_the_users_may_refuse_a_value(monkeypatch):
    monkeypatch.setitem(plugins.CALLBACKS, 'buggy', Buggy)
    with pytest.raises(UserError, match='^callbacks.buggy: a mistake in this class$'):
        plugins.build_plugins('callbacks', {'buggy': {'kind': UserError}})


@pytest.mark.parametrize('name,has_gpu,want', [('auto', False, 'fp32'), ('auto', True, 'amp_bf16'), ('fp32', True, 'fp32')])
def test_precision(name, has_gpu, want):
    assert resolve_precision(name, has_gpu) == want


def test_microbatches_are_not_searched_with_a_torch_that_composer_does_not_know(monkeypatch):
    c = Config.model_construct(device_train_microbatch_size='auto', fsdp_config=FSDPConfig())
    monkeypatch.setattr(sharding._patch_pytorch, 'unshard_with_sync', None, raising=False)
    sharding.check_microbatch_search(c, has_gpu=True)
    monkeypatch.delattr(sharding._patch_pytorch, 'unshard_with_sync')
    with pytest.raises(UserError, match="device_train_microbatch_size: Composer cannot search for 'auto' .* set a number"):
        sharding.check_microbatch_search(c, has_gpu=True)
    sharding.check_microbatch_search(c.model_copy(update={'fsdp_config': None}), has_gpu=True)


# ---------------------------------------------------------------- profiler


@pytest.mark.parametrize(('kwargs', 'says'), [
    ({'active': 0}, 'active: 0 must be at least 1'), ({'warmup': 0}, 'warmup: 0 must be at least 1'),
    ({'skip_first': -1}, 'skip_first: -1 must be at least 0'), ({'repeat': -2}, 'repeat: -2 must be at least 0')], ids=str)
def test_a_profiler_that_would_trace_nothing_is_refused(kwargs: dict[str, int], says: str) -> None:
    with pytest.raises(UserError, match=f'^callbacks.profiler: {says}$'):
        plugins.build_plugins('callbacks', {'profiler': kwargs})


class Losses(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def batch_end(self, state: State, logger: Logger) -> None:
        assert isinstance(state.loss, torch.Tensor)
        self.seen.append(state.loss.item())


def trained(root: Path, *overrides: str) -> list[float]:
    """Trains with two microbatches per batch (33 batches per epoch); returns the loss of each second microbatch."""
    losses = Losses()
    trainer = main.main(config.load([str(ROOT / 'yamls/quickstart.yaml'), *tiny(
        root, 'eval_loader=null', 'callbacks.unigram_baseline=false', 'log_to_console=false', 'device_train_microbatch_size=6',
        'scheduler.t_warmup=2ba', *overrides)]), callbacks=[losses])
    trainer.close()
    return losses.seen


def events(trace: Path) -> Counter:
    """Counts the complete events of a Chrome trace by name."""
    return Counter(event['name'] for event in json.loads(trace.read_text())['traceEvents'] if event['ph'] == 'X')


def test_the_profiler_traces_the_active_batches_and_changes_no_loss(
        mds_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / 'traces'
    profiled = trained(mds_root, 'max_duration=12ba', f'callbacks.profiler.folder={folder}/{{run_name}}', 'run_name=tiny',
                       *(f'callbacks.profiler.{key}' for key in ('skip_first=3', 'wait=1', 'warmup=1', 'active=2', 'repeat=2')))
    assert 'skipping profiling metadata' not in capfd.readouterr().err, 'a line for each batch'
    assert profiled == trained(mds_root, 'max_duration=12ba') and len(profiled) == 12
    # Counted from 1, the profiler waits in batches 4 and 8, warms up in 5 and 9, and records 6, 7, 10, 11; torch counts from 0.
    for last, steps in ((7, (5, 6)), (11, (9, 10))):
        seen = events(folder / 'tiny' / f'rank0.{last}.pt.trace.json')
        assert {name for name in seen if name.startswith('ProfilerStep')} == {f'ProfilerStep#{i}' for i in steps}
        assert (seen['forward'], seen['loss'], seen['backward']) == (4, 4, 4), 'two microbatches in each of two batches'
        assert seen['Optimizer.step#DecoupledAdamW.step'] in (2, 4), 'twice where torch has hooked AdamW.step, too'
        assert seen['aten::addmm'] >= 4 * 2 * 4, 'four linear layers in each of two blocks'
    assert len(list(folder.rglob('*'))) == 3


@pytest.mark.parametrize('group_method', ['truncate', 'concat'])  # concat: a resumed run drops the batches it has seen
def test_a_trace_that_the_end_of_a_run_cuts_off_is_written_and_another_start_overwrites_none(
        mds_root: Path, tmp_path: Path, group_method: str) -> None:
    argv = [f'callbacks.profiler.folder={tmp_path}/traces/{{run_name}}', 'callbacks.profiler.skip_first=1',
            'callbacks.profiler.active=5', 'run_name=again', f'save_folder={tmp_path}/saves', 'autoresume=true',
            f'train_loader.dataset.group_method={group_method}']
    for duration in ('5ba', '8ba'):
        trained(mds_root, *argv, f'max_duration={duration}', 'scheduler.t_max=8ba')
    first, second = tmp_path / 'traces/again', tmp_path / 'traces/again.2'
    assert [path.name for path in first.iterdir()] == ['rank0.5.pt.trace.json']
    assert events(first / 'rank0.5.pt.trace.json')['forward'] == 3 * 2, 'the batches 3 to 5'
    assert [path.name for path in second.iterdir()] == ['rank0.8.pt.trace.json']
    assert events(second / 'rank0.8.pt.trace.json')['forward'] == 1 * 2, 'the one batch after the skipped and the warm-up'


def test_each_start_has_a_folder_of_its_own(tmp_path: Path) -> None:
    folder = f'{tmp_path}/{{run_name}}/torch_traces'
    assert profiling.unused_folder(folder, 'a') == folder
    (tmp_path / 'a/torch_traces').mkdir(parents=True)
    assert profiling.unused_folder(folder, 'a') == folder, 'it is empty'
    for name in ('torch_traces', 'torch_traces.2'):
        (tmp_path / 'a' / name).mkdir(exist_ok=True)
        (tmp_path / 'a' / name / 'rank0.7.memory_snapshot.pickle').touch()
    assert profiling.unused_folder(folder, 'a') == f'{folder}.3' and profiling.unused_folder(folder, 'b') == folder


def test_what_records_memory_writes_into_a_folder_of_each_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a relative folder. The model is on meta, because the callbacks refuse a CPU."""
    entry = {'action': 'alloc', 'addr': 512, 'size': 1024, 'stream': 0, 'frames': [], 'time_us': 1}
    observers: list[Any] = []
    monkeypatch.setattr(torch.cuda.memory, '_record_memory_history', lambda *args, **kwargs: None)
    monkeypatch.setattr(torch.cuda.memory, '_snapshot', lambda: {'segments': [], 'device_traces': [[entry]]})
    monkeypatch.setattr(torch._C, '_cuda_attach_out_of_memory_observer', observers.append, raising=False)
    monkeypatch.setattr('urllib.request.urlretrieve', lambda *args: pytest.fail('nothing is fetched'))
    monkeypatch.chdir(tmp_path)
    state: Any = SimpleNamespace(model=torch.nn.Linear(1, 1, device='meta'), run_name='a', timestamp=Timestamp(batch=7))
    for number in ('', '.2'):
        snapshots = profiling.MemorySnapshot(folder='{run_name}/snapshots', remote_file_name=None)
        snapshots.init(state, Logger(state))
        snapshots.export_memory_snapshot(state, Logger(state))
        profiling.OOMObserver().init(state, Logger(state))
        observers[-1](0, 1, 2, 3)
        assert {path.name for path in Path(f'a/oom_traces{number}').iterdir()} == {
            f'rank0_oom.{kind}' for kind in ('pickle', 'segment.html', 'trace.html')}
        assert {path.name for path in Path(f'a/snapshots{number}').iterdir()} == {
            f'rank0.7.memory_snapshot.{kind}' for kind in ('pickle', 'html')}
    with pytest.raises(FileExistsError):
        composer.callbacks.MemorySnapshot(folder='a/snapshots').init(state, Logger(state))


@pytest.mark.parametrize(('rank', 'name', 'file'), [(0, 'log.txt', 'log.2.txt'), (1, 'log.txt', 'log-rank1.txt'),
                                                    (1, 'log-{rank}.txt', 'log-1.txt')])
def test_each_rank_has_a_log_of_its_own(rank: int, name: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`log.2.txt` belongs to the second start of rank 0, never to another rank."""
    (tmp_path / 'log.txt').touch()
    monkeypatch.setattr('composer.utils.dist.get_global_rank', lambda: rank)
    logger = FileLogger(filename=f'{tmp_path}/{name}', capture_stdout=False, capture_stderr=False)
    logger.init(SimpleNamespace(run_name='a'), None)
    assert (tmp_path / file).exists()
    logger.file.close()
