"""NonFiniteGuard, GracefulStop and the other callbacks in real training loops."""

import copy
import json
import logging
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import pytest
import torch
from composer.algorithms import GradientClipping
from composer.core import Callback, Evaluator, Precision, State, Timestamp
from composer.loggers import InMemoryLogger, Logger
from composer.models import ComposerModel
from composer.optim import LinearScheduler
from composer.utils import dist
from conftest import EOS, documents
from launch import ROOT, Popen, clean_env, free_port, ranks, tiny
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, TensorDataset

from src.callbacks.graceful_stop import GracefulStop
from src.callbacks.guard import NonFiniteGuard
from src.callbacks.metrics import StepCounters
from src.common.errors import UserError
from src.common.workers import init_loader_worker
from src.ranks.stop import Stopped, StopRequest
from src.training.trainer import Trainer

BATCH = 4


class Line(ComposerModel):
    """A linear model with the mean absolute error: huge inputs give huge but finite gradients."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = torch.nn.Linear(3, 1)

    def forward(self, batch: Any) -> torch.Tensor:
        return self.linear(batch[0])

    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        return (outputs - batch[1]).abs().mean()

    def eval_forward(self, batch: Any, outputs: Optional[Any] = None) -> Any:
        return self(batch)


def batches(n: int, bad: Optional[dict[int, float]] = None) -> DataLoader:
    """`n` batches for each rank, in order; the first input of the last rank's batch number k, from 1, is `bad[k]`."""
    world = dist.get_world_size()
    x = torch.randn(n * BATCH * world, 3, generator=torch.Generator().manual_seed(2))
    y = x.sum(1, keepdim=True)
    for k, value in (bad or {}).items():
        x[(k - 1) * BATCH * world + world - 1, 0] = value
    dataset = TensorDataset(x, y)
    return DataLoader(dataset, batch_size=BATCH, sampler=dist.get_sampler(dataset))


class Snapshots(Callback):
    """Weights and optimizer state after each batch; index 0 is before the first."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def fit_start(self, state: State, logger: Logger) -> None:
        self.batch_end(state, logger)

    def batch_end(self, state: State, logger: Logger) -> None:
        self.seen.append(copy.deepcopy((state.model.state_dict(), state.optimizers[0].state_dict()['state'])))


def train(n: int, bad: Optional[dict[int, float]] = None, guard: Optional[NonFiniteGuard] = None, **options: Any) -> Trainer:
    """A Trainer, before `fit`, over `n` batches in two microbatches each."""
    model = Line()
    return Trainer(**{
        'model': model, 'train_dataloader': batches(n, bad), 'max_duration': f'{n}ba', 'device': 'cpu', 'progress_bar': False,
        'optimizers': torch.optim.AdamW(model.parameters(), lr=0.1), 'schedulers': LinearScheduler(), 'seed': 3,
        'algorithms': [GradientClipping('norm', 0.1), *([guard] if guard else [])], 'device_train_microbatch_size': BATCH // 2,
        **options})


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def gradient_norm(batch: Any) -> float:
    model = Line()
    model.loss(model(batch), batch).backward()
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()


# UnigramBaseline

@pytest.mark.slow
@pytest.mark.parametrize('n', [1, 2, 3])
def test_the_baseline_counts_each_sample_once_on_any_number_of_ranks(n: int, mds_root: Path, tmp_path: Path) -> None:
    """If the samples do not divide by the ranks, some ranks repeat one: in a batch, as a batch, or as their only sample."""
    cases = {'in a batch': (31, 8), 'alone': (25, 4), 'one sample': (1, 8)}
    found = ranks(n, {name: ['yamls/quickstart.yaml', *tiny(
        mds_root, 'max_duration=1ba', 'eval_interval=1ba', 'scheduler.t_warmup=0ba', f'eval_samples={samples}',
        f'device_eval_batch_size={batch}')] for name, (samples, batch) in cases.items()}, tmp_path)
    tokenizer = Tokenizer.from_file(str(mds_root / 'tokenizer' / 'tokenizer.json'))
    for name, (samples, _) in cases.items():
        rows = [[*tokenizer.encode(text).ids, tokenizer.token_to_id(EOS)][:32] for text in documents('val')[:samples]]
        counts = Counter(token for row in rows for token in row[1:])
        p = [count / counts.total() for count in counts.values()]
        assert found[name]['unigram'] == pytest.approx(-sum(x * math.log(x) for x in p), rel=1e-12), name


# NonFiniteGuard

@pytest.mark.parametrize(('value', 'what'), [
    (float('nan'), 'loss nan, gradient norm nan'),
    (float('inf'), 'loss inf, gradient norm inf'),
    (1e30, 'gradient norm inf'),
], ids=str)
def test_a_bad_batch_leaves_weights_and_momentum_alone(value: float, what: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, 'src')
    logging.getLogger('src').propagate = True
    snapshots, metrics, guard = Snapshots(), InMemoryLogger(), NonFiniteGuard(10)
    trainer = train(5, {3: value}, guard, callbacks=[snapshots], loggers=[metrics])
    trainer.fit()
    changed = [not equal(a, b) for a, b in zip(snapshots.seen, snapshots.seen[1:])]
    assert changed == [True, True, False, True, True]
    assert all(torch.isfinite(p).all() for p in trainer.state.model.parameters())
    assert (guard.in_a_row, guard.total) == (0, 1)
    logged = {k: [v for _, v in metrics.data[f'trainer/{k}']] for k in ('skipped_batches', 'grad_norm')}
    assert logged['skipped_batches'] == [0, 1]
    assert [0 < norm < 10 for norm in logged['grad_norm']] == [True, True, False, True, True]
    messages = [r.message for r in caplog.records if 'skipped' in r.message]
    assert len(messages) == 1 and messages[0].startswith('batch 3: loss ')
    assert messages[0].endswith(f'{what}: update skipped (1 in a row, at most 10)')
    # The schedule advances with a skipped batch too.
    assert int(trainer.state.timestamp.batch) == 5
    assert trainer.state.schedulers[0].last_epoch == 5
    trainer.close()


def test_without_the_guard_the_same_batches_end_in_nan_or_a_zeroed_update() -> None:
    for value, finite in ((float('nan'), False), (1e30, True)):
        snapshots = Snapshots()
        trainer = train(3, {2: value}, callbacks=[snapshots])
        trainer.fit()
        assert not equal(snapshots.seen[1][1], snapshots.seen[2][1]), 'momentum decays even where clipping zeroes the gradient'
        assert all(bool(torch.isfinite(p).all()) == finite for p in trainer.state.model.parameters())
        trainer.close()


def test_good_batches_train_alike_with_and_without_the_guard() -> None:
    trained = []
    for guard in (None, NonFiniteGuard(1)):
        trainer = train(4, guard=guard)
        trainer.fit()
        trained.append(trainer.state.model.state_dict())
        trainer.close()
    assert equal(*trained)


def test_the_guard_logs_the_norm_before_clipping() -> None:
    metrics = InMemoryLogger()
    trainer = train(1, guard=NonFiniteGuard(1), loggers=[metrics])
    trainer.fit()
    expected = gradient_norm(next(iter(batches(1))))
    assert expected > 0.2  # the clipping threshold is 0.1
    assert metrics.data['trainer/grad_norm'][0][1] == pytest.approx(expected, rel=1e-6)
    trainer.close()


def test_too_many_in_a_row_end_the_run_and_the_counts_survive_a_checkpoint(tmp_path: Path) -> None:
    nan = float('nan')
    guard = NonFiniteGuard(3)
    trainer = train(5, {2: nan, 4: nan, 5: nan}, guard, save_folder=str(tmp_path), save_interval='5ba')
    trainer.fit()
    trainer.close()
    assert (guard.in_a_row, guard.total) == (2, 3)
    assert not guard.required_on_load()

    guard = NonFiniteGuard(3)
    trainer = train(8, {6: nan}, guard, load_path=str(next(tmp_path.glob('ep*.pt'))))
    with pytest.raises(UserError, match=r'batch 6: loss nan, gradient norm nan; 3 batches in a row .* lower optimizer\.lr'):
        trainer.fit()
    assert (guard.in_a_row, guard.total) == (3, 4)
    trainer.close()


@pytest.mark.parametrize(('loss', 'keeps'), [(1.0, True), (float('nan'), False)], ids=['overflow', 'loss'])
def test_under_fp16_the_scaler_has_the_gradients_and_the_guard_the_loss(loss: float, keeps: bool) -> None:
    model, guard = Line(), NonFiniteGuard(10)
    for p in model.parameters():
        p.grad = torch.full_like(p, float('inf'))
    guard._copies = 1
    state: Any = SimpleNamespace(model=model, precision=Precision.AMP_FP16, timestamp=Timestamp(), train_metrics=None,
                                 device=SimpleNamespace(name='cpu'), total_loss_dict={'loss/train/total': torch.tensor([loss])})
    guard._check_batch(state, Logger(state))
    assert all((p.grad is not None) == keeps for p in model.parameters())
    assert guard.total == (not keeps)


class NoClosure(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step()


class Forgetful(torch.optim.SGD):
    """Calls its closure only in the first step."""

    def step(self, closure: Any = None) -> Any:
        used, self.used = getattr(self, 'used', False), True
        return super().step(None if used else closure)


@pytest.mark.parametrize(('cls', 'trained'), [(NoClosure, 1), (Forgetful, 2)])
def test_an_optimizer_that_does_not_call_its_closure_ends_the_run(cls: Any, trained: int, tmp_path: Path) -> None:
    model = Line()
    trainer = train(3, guard=NonFiniteGuard(1), model=model, optimizers=cls(model.parameters(), lr=0.1),
                    save_folder=str(tmp_path), save_interval='2ba')
    with pytest.raises(UserError, match=f'^optimizer: step of {cls.__name__} did not call its closure.*; call it'):
        trainer.fit()
    assert int(trainer.state.timestamp.batch) == trained and not list(tmp_path.glob('*.pt'))
    trainer.close()


def test_the_guard_has_to_run_before_clipping() -> None:
    trainer = train(1, algorithms=[NonFiniteGuard(1), GradientClipping('norm', 0.1)])
    with pytest.raises(AssertionError, match='NonFiniteGuard is the last algorithm'):
        trainer.fit()
    trainer.close()


# GracefulStop

class Ask(Callback):
    """Sets `stop.requested` when an event comes for the `n`-th time."""

    def __init__(self, stop: StopRequest, event: str, n: int):
        def ask(state: State, logger: Logger) -> None:
            self.n -= 1
            stop.requested |= self.n == 0

        self.n = n
        setattr(self, event, ask)

    def run_event(self, event: Any, state: State, logger: Logger) -> None:
        if event.value in vars(self):
            vars(self)[event.value](state, logger)


class Events(Callback):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def run_event(self, event: Any, state: State, logger: Logger) -> None:
        self.seen.append(event.value)


def comparable(state: State) -> dict[str, Any]:
    """A checkpoint without the values that differ between any two runs, and without the metrics of an evaluation."""
    saved = copy.deepcopy(state.state_dict())
    timestamp = {k: v for k, v in saved.pop('timestamp')['Timestamp'].items() if 'wct' not in k}
    left_out = ('run_name', 'eval_metrics', 'callbacks', 'algorithms')
    return {k: v for k, v in saved.items() if k not in left_out} | {'timestamp': timestamp}


class Capture(Callback):
    def __init__(self) -> None:
        self.saved: dict[int, Any] = {}

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        self.saved[int(state.timestamp.batch)] = comparable(state)


def stopping(event: str, n: int, eval_batches: int = 3, **options: Any) -> tuple[Trainer, list[tuple[int, Any]], Events]:
    """A Trainer that evaluates after batches 2, 4 and 5 (the last one), and gets a request to stop."""
    stop, events, saved = StopRequest(), Events(), []
    evaluation = DataLoader(batches(eval_batches).dataset, batch_size=BATCH, num_workers=1, worker_init_fn=init_loader_worker)
    options = {'train_dataloader': batches(6)} | options  # 6 batches, so that the epoch does not end with the run
    trainer = train(5, callbacks=[Ask(stop, event, n), events, GracefulStop(
        stop, lambda state, logger: saved.append((int(state.timestamp.batch), comparable(state))))],
        eval_dataloader=Evaluator(label='eval', dataloader=evaluation), eval_interval='2ba', **options)
    return trainer, saved, events


@pytest.fixture(scope='module')
def reference() -> dict[int, Any]:
    capture = Capture()
    trainer = train(5, callbacks=[capture], train_dataloader=batches(6))
    trainer.fit()
    trainer.close()
    return capture.saved


@pytest.mark.parametrize(('event', 'n', 'batch', 'eval_batches'), [
    pytest.param('batch_start', 1, 1, 0, id='in the first batch'),
    pytest.param('after_loss', 4, 2, 0, id='in a batch that an evaluation follows'),
    pytest.param('batch_end', 3, 3, 3, id='after a batch'),
    pytest.param('eval_batch_start', 2, 2, 2, id='during an evaluation'),
    pytest.param('batch_end', 5, 5, 6, id='after the last batch'),
    pytest.param('eval_batch_start', 8, 5, 8, id='during the last evaluation'),
])
def test_a_stop_saves_what_the_batch_left(event: str, n: int, batch: int, eval_batches: int, reference: dict[int, Any]) -> None:
    trainer, saved, events = stopping(event, n)
    with pytest.raises(Stopped, match=f'after batch {batch}$'):
        trainer.fit()
    assert [b for b, _ in saved] == [batch]
    for key, value in reference[batch].items():
        assert equal(saved[0][1][key], value), key
    assert events.seen.count('eval_batch_end') == eval_batches
    assert events.seen.count('batch_end') == batch
    trainer.close()


@pytest.mark.parametrize(('event', 'n'), [('init', 1), ('eval_batch_start', 1)], ids=['while building', 'in a first evaluation'])
def test_a_stop_before_the_first_batch_saves_nothing(event: str, n: int) -> None:
    trainer, saved, _ = stopping(event, n)
    with pytest.raises(Stopped, match='after batch 0$'):
        trainer.eval()
        trainer.fit()
    assert not saved
    trainer.close()


def test_a_stop_right_after_loading_saves_nothing_again(tmp_path: Path) -> None:
    trainer = train(5, save_folder=str(tmp_path), save_interval='2ba', max_duration='2ba')
    trainer.fit()
    trainer.close()
    trainer, saved, _ = stopping('fit_start', 1, load_path=str(tmp_path / 'latest-rank0.pt'))
    with pytest.raises(Stopped, match='after batch 2$'):
        trainer.fit()
    assert not saved
    trainer.close()


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole = train(6)
    whole.fit()
    whole.close()
    trainer, _, _ = stopping('eval_batch_start', 2, max_duration='6ba', train_dataloader=batches(6))
    stop_callback = next(c for c in trainer.state.callbacks if isinstance(c, GracefulStop))
    stop_callback._save = lambda state, logger: trainer.save_checkpoint(str(tmp_path / 'stopped.pt')) and None
    with pytest.raises(Stopped):
        trainer.fit()
    trainer.close()
    resumed = train(6, load_path=str(tmp_path / 'stopped.pt'))
    resumed.fit()
    assert equal(resumed.state.model.state_dict(), whole.state.model.state_dict())
    resumed.close()


def test_the_workers_of_an_interrupted_evaluation_end() -> None:
    import multiprocessing

    trainer, _, _ = stopping('eval_batch_start', 1, eval_batches=50)
    with pytest.raises(Stopped):
        trainer.fit()
    trainer.close()
    del trainer
    for worker in multiprocessing.active_children():
        worker.join(5)
    assert not multiprocessing.active_children()


def test_an_epoch_that_a_resumed_run_finishes_is_no_empty_epoch(tmp_path: Path) -> None:
    options = {'train_dataloader': batches(3), 'callbacks': [StepCounters()]}
    for duration, saved in (('2ba', 2), ('3ba', 3)):
        trainer = train(3, max_duration=duration, save_folder=str(tmp_path / duration), save_interval='1ba')
        trainer.fit()
        trainer.close()
        callback = StepCounters()
        callback.batch_end = lambda state, logger: None  # it counts tokens, but this model has no tokens
        trainer = train(3, max_duration='2ep', load_path=str(tmp_path / duration / f'ep0-ba{saved}-rank0.pt'),
                        **options | {'callbacks': [callback]})
        trainer.fit()
        assert int(trainer.state.timestamp.batch) == 6
        trainer.close()


# Two ranks

TWO_RANKS = """
import json, logging, os, signal, sys
sys.path[:0] = [{root!r}, {root!r} + '/tests', {tests!r}]
import torch
import torch.distributed
from types import SimpleNamespace
from composer.utils import dist
from composer.core import Callback
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from src.callbacks.graceful_stop import *
from src.callbacks import step_sums
from src.callbacks.guard import *
from src.callbacks.step_sums import *
from src.ranks.failure_watch import *
from src.ranks.stop import *
from test_callbacks import *

rank = int(os.environ['RANK'])
dist.initialize_dist('cpu', 60)
out = {{}}
with StopRequest() as stop, FailureWatch(stop):
    step_sums.reads_wait = lambda state: {late}

    class Signal(Callback):
        def batch_start(self, state, logger):
            if rank == 1 and int(state.timestamp.batch) == 4:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.5)
    guard, snapshots, saved = NonFiniteGuard(10, stop), Snapshots(), []
    model = Line()
    trainer = train(8, {{2: float('nan'), 3: 1e30}}, guard, model=model, optimizers=torch.optim.AdamW(
        model.parameters(), lr=0.1, fused=True), callbacks=[Signal(), snapshots, GracefulStop(
        stop, lambda state, logger: saved.append(int(state.timestamp.batch)))], loggers=[metrics := InMemoryLogger()])
    try:
        trainer.fit()
    except Stopped as e:
        out['stopped'] = str(e)
    out['saved'] = saved
    out['changed'] = [not equal(a, b) for a, b in zip(snapshots.seen, snapshots.seen[1:])]
    out['weights'] = [p.tolist() for p in trainer.state.model.parameters()]
    out['counts'] = guard.in_a_row, guard.total
    out['norms'] = [float(v) for _, v in metrics.data['trainer/grad_norm']]
    trainer.close()

    # The norm of sharded gradients is that of the full gradients, also where each shard has a replica.
    out['sharded'] = []
    for mesh in ((2,), (2, 1)):
        torch.manual_seed(5)
        net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 1))
        fully_shard(net, mesh=init_device_mesh('cpu', mesh, mesh_dim_names=('replicate', 'shard')[-len(mesh):]))
        for p in net.parameters():  # set by hand: a backward pass with replicas does not work over gloo
            p.grad = distribute_tensor(torch.arange(p.numel()).float().view(p.shape), p.device_mesh, p.placements)
        state = SimpleNamespace(model=net, train_metrics=None, total_loss_dict={{'loss/train/total': torch.tensor(float(rank))}})
        squares, _ = sum_step(state, gradient_copies(net), False)
        out['sharded'].append([gradient_copies(net), state.total_loss_dict['loss/train/total'].item(), squares.sqrt().item()])
        out['whole'] = torch.nn.utils.get_total_norm([p.grad.full_tensor() for p in net.parameters()]).item()
    # If the loss of one rank is not finite, the result is not finite on both.
    state.total_loss_dict = {{'loss/train/total': torch.tensor(float('inf') if rank else 1.0)}}
    sum_step(state, 1, False)
    out['one'] = state.total_loss_dict['loss/train/total'].item()
with open(sys.argv[1] + str(rank), 'w') as f:
    json.dump(out, f)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize('late', [False, True], ids=['as on CPUs', 'as on GPUs'])
def test_two_ranks_skip_the_same_batches_and_stop_after_the_same_one(late: bool, tmp_path: Path) -> None:
    """A signal in batch 5 on one rank stops both after it, or one batch later where a rank reads one step late."""
    script, last = tmp_path / 'two_ranks.py', 6 if late else 5
    script.write_text(TWO_RANKS.format(root=str(ROOT), tests=str(ROOT / 'tests/callbacks'), late=late))
    port = str(free_port())
    processes = [Popen([sys.executable, str(script), str(tmp_path / 'out')], text=True, stderr=subprocess.PIPE,
                              env=clean_env(RANK=str(i), WORLD_SIZE='2', LOCAL_RANK=str(i), LOCAL_WORLD_SIZE='2', NODE_RANK='0',
                                            MASTER_ADDR='127.0.0.1', MASTER_PORT=port)) for i in range(2)]
    try:
        errors = [rank.communicate(timeout=120)[1] for rank in processes]
    finally:
        for rank in processes:
            rank.kill()
    assert [rank.returncode for rank in processes] == [0, 0], errors
    a, b = [json.loads((tmp_path / f'out{i}').read_text()) for i in range(2)]
    assert a == b
    assert a['changed'] == [True, False, False, True, True, True][:last]
    assert a['counts'] == [0, 2]
    assert a['stopped'] == f'stopped on request after batch {last}' and a['saved'] == [last]
    assert a['sharded'] == [[copies, 0.5, pytest.approx(a['whole'], rel=1e-6)] for copies in (1, 2)]
    assert a['one'] == float('inf')
    # Both ranks hold the same gradient. The norm is that of one copy: the norm in one process with the batches of both.
    assert a['norms'][0] == pytest.approx(gradient_norm(batches(16).dataset[:2 * BATCH]), rel=1e-6)
