"""No program runs the code in a checkpoint, unless the user trusts it."""

import pickle
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest
import torch
from checkpoint_runs import QUICKSTART, SHARDED, MakesFolder, refusal
from composer.core import Callback
from composer.utils.checkpoint import safe_torch_load
from launch import tiny
from runs import train
from torch.distributed.checkpoint.metadata import MetadataIndex

from src.checkpoints.loading import read_safely
from src.checkpoints.start import Start
from src.checkpoints.weights import read_weights
from src.common.errors import UserError
from src.tools import evaluate
from src.training import plugins

EVERY = ('run_name=one', 'eval_loader=null', 'max_duration=2ba', 'scheduler.t_warmup=0ba', 'callbacks.text_samples=false')


def run(root: Path, *overrides: str) -> dict:
    return train(QUICKSTART, *tiny(root, *EVERY, *overrides))


refused = partial(refusal, run)


@pytest.fixture(scope='module')
def saved(mds_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `full/ep0-ba2-rank0.pt` and `sharded/ep0-ba2`."""
    folder = tmp_path_factory.mktemp('saved')
    run(mds_root, f'save_folder={folder}/full')
    run(mds_root, f'save_folder={folder}/sharded', *SHARDED)
    return folder


def test_a_full_checkpoint_runs_no_code_unless_it_is_trusted(mds_root, saved, tmp_path):
    checkpoint = torch.load(saved / 'full/ep0-ba2-rank0.pt', weights_only=False)
    checkpoint['state']['run_name'] = MakesFolder(tmp_path / 'ran')
    torch.save(checkpoint, tmp_path / 'evil.pt')
    load = [f'load_path={tmp_path}/evil.pt', 'max_duration=3ba']
    message = refused(mds_root, *load)
    assert f'load_path: {tmp_path}/evil.pt cannot be loaded into this model and optimizer: it holds posix.mkdir' in message
    assert 'trust_checkpoint=true' in message and not (tmp_path / 'ran').exists()
    assert sorted(run(mds_root, *load, 'trust_checkpoint=true')['losses']) == [2]
    assert (tmp_path / 'ran').exists(), 'the file really runs code'


def test_the_description_of_an_algorithm_is_not_evaluated(mds_root, saved, tmp_path):
    checkpoint = torch.load(saved / 'full/ep0-ba2-rank0.pt', weights_only=False)
    checkpoint['state']['algorithms'].append(('Alibi', {'repr': f'Alibi if __import__("os").mkdir("{tmp_path}/ran") else 0'}))
    torch.save(checkpoint, tmp_path / 'evil.pt')
    assert sorted(run(mds_root, f'load_path={tmp_path}/evil.pt', 'max_duration=3ba')['losses']) == [2]
    assert not (tmp_path / 'ran').exists()


def sharded_copy(saved: Path, copy: Path, metadata: Any = None, run_name: Optional[Any] = None) -> None:
    """Copies a sharded checkpoint, with another object as its `.metadata`, or as `run_name` in a shard."""
    copy.mkdir()
    old = saved / 'sharded/ep0-ba2'
    shard, old_metadata = (old / '__0_0.distcp').read_bytes(), pickle.loads((old / '.metadata').read_bytes())
    if run_name is not None:
        torch.save(run_name, copy / 'value')
        part = old_metadata.storage_data[MetadataIndex('state.run_name')]
        part.offset, part.length = len(shard), (copy / 'value').stat().st_size
        shard += (copy / 'value').read_bytes()
    (copy / '__0_0.distcp').write_bytes(shard)
    (copy / '.metadata').write_bytes(pickle.dumps(metadata or old_metadata))


def test_a_sharded_checkpoint_runs_no_code(mds_root, saved, tmp_path):
    marker = tmp_path / 'ran'
    sharded_copy(saved, tmp_path / 'metadata', metadata=MakesFolder(marker))
    sharded_copy(saved, tmp_path / 'value', run_name=MakesFolder(marker))
    for name in ('metadata', 'value'):
        message = refused(mds_root, *SHARDED, f'load_path={tmp_path}/{name}', 'max_duration=3ba')
        assert message.startswith(f'load_path: {tmp_path}/{name} cannot be loaded'), message
        assert 'it holds posix.mkdir, and loading that would run code' in message
        assert ('trust_checkpoint=true' in message) == (name == 'value')
        assert not marker.exists(), name
    sharded_copy(saved, tmp_path / 'harmless', run_name='another')
    run(mds_root, *SHARDED, f'load_path={tmp_path}/harmless', 'max_duration=3ba')
    run(mds_root, *SHARDED, f'load_path={tmp_path}/value', 'max_duration=3ba', 'trust_checkpoint=true')
    assert marker.exists()


def test_programs_that_take_weights_alone_run_no_code(mds_root, saved, tmp_path):
    marker = tmp_path / 'ran'
    sharded_copy(saved, tmp_path / 'metadata', metadata=MakesFolder(marker))
    argv = [QUICKSTART, *tiny(mds_root, 'run_name=one', *SHARDED, f'load_path={tmp_path}/metadata', 'trust_checkpoint=true')]
    for use in (lambda: read_weights(str(tmp_path / 'metadata')), lambda: evaluate.main(evaluate.parse_args(argv))):
        with pytest.raises(UserError, match=r'it holds posix\.mkdir, and loading that would run code'):
            use()
        assert not marker.exists()


@pytest.mark.parametrize('holds', [
    {'a': 1}, {'w': torch.ones(2)}, [1], {'state': [1]}, {'state': {}}, {'state': {'model': [1]}}])
def test_a_file_that_is_no_checkpoint_is_named(mds_root, tmp_path, holds):
    torch.save(holds, tmp_path / 'x.pt')
    says = f'{tmp_path}/x.pt is not a checkpoint of the kit: it holds no weights under state.model'
    with pytest.raises(UserError, match=f'CHECKPOINT: {says}'):
        read_weights(str(tmp_path / 'x.pt'))
    with pytest.raises(UserError, match=f'load_path: {says}'), read_safely(Start('weights', f'{tmp_path}/x.pt'), False):
        safe_torch_load(tmp_path / 'x.pt')
    if holds == [1]:
        assert f'load_path: {says}' in refused(mds_root, f'load_path={tmp_path}/x.pt')


def test_plain_values_in_the_state_of_a_callback_are_read(tmp_path):
    state = [timedelta(1), datetime(2024, 1, 2, tzinfo=timezone.utc), {3}, (4, None), np.float64(5), np.float32(6),
             np.int64(7), np.bool_(True), np.arange(3, dtype=np.uint32), torch.ones(2), torch.Size([1]), torch.bfloat16, b'8']
    torch.save(state, tmp_path / 'state.pt')
    assert str(torch.load(tmp_path / 'state.pt', weights_only=True)) == str(state)


class Broken(Callback):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise KeyError('a mistake in this class')

    def state_dict(self) -> dict[str, Any]:
        return {'n': 1}


def test_a_mistake_in_a_callback_is_not_one_of_the_checkpoint(mds_root, tmp_path, monkeypatch):
    monkeypatch.setitem(plugins.CALLBACKS, 'broken', Broken)
    every = ['callbacks.broken={}', f'save_folder={tmp_path}', 'autoresume=true']
    run(mds_root, *every)
    with pytest.raises(KeyError, match='a mistake in this class'):
        run(mds_root, *every, 'max_duration=3ba')
