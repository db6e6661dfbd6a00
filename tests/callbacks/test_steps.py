"""Steps that wait for nothing: on a CPU with the code for GPUs, which reads one step late, and with counted collectives."""

import logging
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import step_waits
import torch
from composer import callbacks
from composer.core import Callback, State
from composer.loggers import InMemoryLogger, Logger
from launch import ROOT, tiny
from test_callbacks import Line, NoClosure, Snapshots, batches, equal, train

import main
from src.callbacks import step_sums
from src.callbacks.guard import NonFiniteGuard
from src.callbacks.loggers import LateLogs
from src.callbacks.metrics import SpeedMonitor
from src.common.errors import UserError
from src.config import load as config
from src.data_c4 import StreamingC4, build_c4_dataloader
from src.optimizers import DecoupledAdamW, Muon, skips_on_device
from src.training import data, plugins

NAN = float('nan')


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code for GPUs, on this CPU."""
    monkeypatch.setattr(step_sums, 'reads_wait', lambda state: True)


def fused(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)


def kits(model: Any) -> torch.optim.Optimizer:
    return DecoupledAdamW(model.parameters(), lr=0.1, weight_decay=0.01)


def muon(model: Any) -> torch.optim.Optimizer:
    weight, bias = model.parameters()
    matrices = {'params': [weight], 'rows': (), 'momentum': 0.9, 'cautious': True}
    return Muon([matrices, {'params': [bias]}], lr=0.1, weight_decay=0.01)


def one_by_one(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.1, fused=False)


class Mine(DecoupledAdamW):
    """Decays the weights itself, so that `found_inf` would not stop all of its step."""

    def step(self, closure: Any = None) -> Any:
        loss = torch.enable_grad()(closure)() if closure else None
        for p in self.param_groups[0]['params']:
            if p.grad is not None:
                p.data.mul_(0.9)
        super().step()
        return loss


def mine(model: Any) -> torch.optim.Optimizer:
    return Mine(model.parameters(), lr=0.1)


def states(build: Any, bad: dict[int, float], guard: NonFiniteGuard, **options: Any) -> list[Any]:
    """Weights and optimizer state before the first batch, and after each of 6 batches."""
    snapshots, model = Snapshots(), Line()
    trainer = train(6, bad, guard, model=model, optimizers=build(model), callbacks=[snapshots], **options)
    trainer.fit()
    trainer.close()
    return snapshots.seen


@pytest.mark.parametrize('build', [fused, kits, muon, one_by_one, mine])
def test_skipping_on_the_device_equals_skipping_on_the_host(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for is_late in (False, True):
        monkeypatch.setattr(step_sums, 'reads_wait', lambda state, is_late=is_late: is_late)
        guard = NonFiniteGuard(10)
        seen = states(build, {2: NAN, 4: float('inf'), 5: 1e30}, guard)
        assert [not equal(a, b) for a, b in zip(seen, seen[1:])] == [True, False, True, False, False, True]
        assert (guard.in_a_row, guard.total) == (0, 3)
        found.append(seen)
    assert equal(*found)


def test_only_known_optimizers_skip_on_the_device() -> None:
    model = Line()
    assert skips_on_device(fused(model)) and not skips_on_device(one_by_one(model)) and not skips_on_device(mine(model))
    assert not skips_on_device(NoClosure(model.parameters(), lr=0.1, fused=True))
    for optimizer in (kits(model), muon(model)):
        assert not skips_on_device(optimizer), 'before its first step'
        optimizer.step(lambda: model(next(iter(batches(1)))).sum().backward())
        assert skips_on_device(optimizer)


def test_a_first_batch_that_is_bad_leaves_the_weights_and_counts_no_step(late: None) -> None:
    first, second = states(fused, {1: NAN}, NonFiniteGuard(10))[:2]
    assert equal(first[0], second[0])
    assert all(not value.any() for state in second[1].values() for value in state.values()), 'steps and momentum are 0'


def test_the_host_learns_of_a_bad_batch_one_step_late(late: None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, 'src')
    logging.getLogger('src').propagate = True
    at_end: list[int] = []

    class Total(Callback):
        def batch_end(self, state: State, logger: Logger) -> None:
            at_end.append(guard.total)

    guard, model = NonFiniteGuard(10), Line()
    trainer = train(4, {2: NAN, 4: NAN}, guard, model=model, optimizers=fused(model), callbacks=[Total()])
    trainer.fit()
    assert at_end == [0, 0, 1, 1] and guard.total == 2, 'the last batch is counted at the end'
    messages = [r.message for r in caplog.records if 'skipped' in r.message]
    assert [m[:12] for m in messages] == ['batch 2: los', 'batch 4: los']
    assert messages[0] == 'batch 2: loss nan, gradient norm nan: update skipped (1 in a row, at most 10)'
    trainer.close()


def test_too_many_bad_batches_end_the_run_one_batch_late_with_the_right_numbers(late: None) -> None:
    guard, model = NonFiniteGuard(2), Line()
    trainer = train(6, {3: NAN, 4: NAN}, guard, model=model, optimizers=fused(model))
    with pytest.raises(UserError, match='^batch 4: loss nan, .*; 2 batches in a row'):
        trainer.fit()
    assert int(trainer.state.timestamp.batch) == 4 and guard.total == 2
    trainer.close()


def test_a_bad_batch_right_before_a_checkpoint_resumes_to_the_bit(late: None, tmp_path: Path) -> None:
    bad, end, guard = {2: NAN, 3: NAN}, {}, NonFiniteGuard(10)
    end['whole'] = states(fused, bad, guard, save_folder=str(tmp_path), save_interval='3ba')[-1]
    guard = NonFiniteGuard(10)
    resumed = states(fused, bad, guard, load_path=str(tmp_path / 'ep0-ba3-rank0.pt'))
    assert guard.total == 2, 'the checkpoint counts the bad batch, which the host had not read yet'
    assert len(resumed) == 4 and equal(resumed[-1], end['whole'])


@pytest.mark.parametrize('n_ranks', [1, 2])
def test_a_callback_changes_which_targets_count_on_one_rank_alone(n_ranks: int, late: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Cut(Callback):
        def batch_start(self, state: State, logger: Logger) -> None:
            state.batch = [part[:2] for part in state.batch]

    trainer = train(2, guard=NonFiniteGuard(10), callbacks=[Cut()])
    monkeypatch.setattr('src.training.trainer.dist', SimpleNamespace(get_world_size=lambda: n_ranks))
    with pytest.raises(UserError, match='has changed which targets of a batch count') if n_ranks > 1 else nullcontext():
        trainer.fit()
    assert int(trainer.state.timestamp.batch) == (2 if n_ranks == 1 else 0)
    trainer.close()


def test_only_the_kits_loader_of_packed_tokens_needs_no_sum_over_the_ranks(tokens_root: Path, mds_root: Path,
                                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    def loader(root: Path) -> Any:
        return build_c4_dataloader({'dataset': {'local': str(root), 'split': 'train', 'max_seq_len': 32,
                                                'tokenizer_name': str(root / 'tokenizer')}, 'num_workers': 0}, 4)

    class Own(StreamingC4):
        pass

    packed = loader(tokens_root)
    assert data.gives_equal_batches(packed) and not data.gives_equal_batches(loader(mds_root))
    monkeypatch.setattr(data, 'uses_kit_loader', lambda: False)
    assert not data.gives_equal_batches(packed)
    monkeypatch.undo()
    packed.dataset.__class__ = Own
    assert not data.gives_equal_batches(packed)


# Logs

def logged(interval: str) -> tuple[dict[str, list[Any]], dict[int, list[int]]]:
    """All metrics of 7 batches by name, as (batch, value); and the batches whose loss the logger had at the end of each."""
    memory, had = InMemoryLogger(), {}

    class Had(Callback):
        def batch_start(self, state: State, logger: Logger) -> None:
            had[int(state.timestamp.batch)] = [int(t.batch) for t, _ in memory.data.get('loss/train/total', [])]

    trainer = train(7, guard=NonFiniteGuard(10), loggers=[memory], callbacks=[Had()], console_log_interval=interval,
                    log_to_console=True)
    trainer.fit()
    trainer.close()
    return {name: [(int(t.batch), float(v)) for t, v in values] for name, values in memory.data.items()}, had


def test_loggers_get_the_same_metrics_at_the_interval_of_the_console(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, had = logged('3ba')
    assert had == {batch: [*range(batch)] for batch in range(7)}
    monkeypatch.setattr(step_sums, 'reads_wait', lambda state: True)
    held, had = logged('3ba')
    assert had == {0: [], 1: [0], 2: [0], 3: [0, 1, 2], 4: [0, 1, 2], 5: [0, 1, 2], 6: [0, 1, 2, 3, 4, 5]}
    assert held.keys() == at_once.keys()
    for name in ('loss/train/total', 'time/sample', 'trainer/skipped_batches'):
        assert held[name] == at_once[name], name
    assert dict(held['trainer/grad_norm']) == pytest.approx(dict(at_once['trainer/grad_norm']), rel=1e-15)


def test_a_run_that_fails_gives_its_last_metrics_to_the_loggers(late: None) -> None:
    memory, model = InMemoryLogger(), Line()
    trainer = train(6, {3: NAN}, NonFiniteGuard(1), model=model, optimizers=fused(model), loggers=[memory])
    with pytest.raises(UserError, match='^batch 3: '):
        trainer.fit()
    assert [int(t.batch) for t, _ in memory.data['loss/train/total']] == [0, 1, 2]
    trainer.close()


def test_a_save_gives_the_metrics_to_the_loggers(late: None, mds_root: Path, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on from the checkpoint never logs the metrics before it again.

    The loggers also get those of the first batch, which the console prints; an evaluation before it changes nothing.
    """
    had = {}

    class Had(Callback):
        def batch_start(self, state: State, logger: Logger) -> None:
            [memory] = [to for to in logger.destinations if isinstance(to, InMemoryLogger)]
            had[int(state.timestamp.batch)] = [int(t.batch) for t, _ in memory.data.get('loss/train/total', [])]

    monkeypatch.setitem(plugins.LOGGERS, 'memory', InMemoryLogger)
    argv = tiny(mds_root, 'max_duration=5ba', 'scheduler.t_warmup=1ba', 'eval_first=true', 'console_log_interval=100ba',
                'eval_samples=8', 'loggers.memory={}', f'save_folder={tmp_path}', 'save_interval=3ba', 'run_name=one')
    main.main(config.load([str(ROOT / 'yamls/quickstart.yaml'), *argv]), callbacks=[Had()]).close()
    assert had == {0: [], 1: [0], 2: [0], 3: [0, 1, 2], 4: [0, 1, 2]}


def test_metrics_are_held_for_100_batches_without_a_console_or_with_another_unit() -> None:
    assert [LateLogs(text)._interval for text in ('50ba', '1ep')] == [50, 100]
    assert train(1, guard=NonFiniteGuard(1), console_log_interval='7ba')._late_logs._interval == 100


def test_the_speed_monitor_has_composers_flops(mds_root: Path) -> None:
    """Composer's own adds FLOPs up over the ranks; on one rank both have the same."""
    ours, theirs = SpeedMonitor(window_size=3), callbacks.SpeedMonitor(window_size=3)
    argv = tiny(mds_root, 'max_duration=5ba', 'eval_loader=null', 'callbacks.speed_monitor=false', 'log_to_console=false',
                'scheduler.t_warmup=1ba')
    main.main(config.load(['yamls/quickstart.yaml', *argv]), callbacks=[ours, theirs]).close()
    assert len(ours.history_flops) == 4 and list(ours.history_flops) == pytest.approx(list(theirs.history_flops), rel=1e-6)
    assert ours.history_tokens == theirs.history_tokens


# Collectives and reads

@pytest.mark.slow
@pytest.mark.parametrize(('data', 'ranks', 'collectives'), [('tokens_root', 1, 0), ('tokens_root', 2, 1), ('mds_root', 2, 2)])
def test_a_step_makes_one_all_reduce_and_reads_nothing_from_the_device(data: str, ranks: int, collectives: int,
                                                                       request: pytest.FixtureRequest) -> None:
    """Text with padding has different numbers of targets on each rank, which the ranks add up on the host."""
    found = step_waits.launch(ranks, ROOT, [str(request.getfixturevalue(data)), '--as_gpu'])
    assert sum(found['collectives'].values()) == collectives, found
    assert set(found['reads']) <= set(step_waits.HOST), found
    assert found['reads']['step_sums.py peek'] == 1, 'each step is read once, late'
