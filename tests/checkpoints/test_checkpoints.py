"""Checkpoints are whole or ignored, and a resumed run is exact; on a disk and on S3."""

import itertools
import json
import logging
import os
import resource
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoint_runs import MUON, QUICKSTART, SHARDED, MakesFolder, refusal
from launch import tiny
from runs import train

import main
from src.checkpoints.loading import check_model
from src.checkpoints.manifest import Manifest, RunInfo, list_manifests
from src.checkpoints.start import FRESH, Start, find_start, start_from_path
from src.checkpoints.weights import read_full_checkpoint
from src.checkpoints.writer import CheckpointWriter
from src.common.errors import UserError
from src.common.storage import Folder, LocalFolder, open_folder
from src.hf_causal_lm import ComposerHFCausalLM

EVERY = ('save_interval=4ba', 'run_name=one', 'eval_loader=null', 'max_duration=12ba', 'save_num_checkpoints_to_keep=-1')


def run(root: Path, *overrides: str) -> dict:
    return train(QUICKSTART, *tiny(root, *EVERY, *overrides))


refused = partial(refusal, run)


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file())


def assert_same_run(a: dict, b: dict, start: int = 0) -> None:
    """Checks that run `b` is the same as run `a` from batch `start` on, bit for bit, and ends with the same weights."""
    assert len(b['losses']) > 0
    assert {n: v for n, v in a['losses'].items() if n >= start} == b['losses']
    assert {n: v for n, v in a['lrs'].items() if n > start} == b['lrs']  # logged after the batch is counted
    assert a['batches'][start:] == b['batches'][-len(b['losses']):]
    assert a['weights'].keys() == b['weights'].keys()
    assert all(torch.equal(a['weights'][k], b['weights'][k]) for k in a['weights'])


@pytest.fixture(scope='module')
def saved(mds_root, tmp_path_factory):
    """A finished run that saved batches 4, 8 and 12; tests work on copies of its folder."""
    folder = tmp_path_factory.mktemp('saved')
    return folder, run(mds_root, f'save_folder={folder}')


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / 'copy')
    return tmp_path / 'copy'


def delete_saves(folder: Path, *batches: int) -> None:
    for batch in batches:
        for path in folder.glob(f'ep*-ba{batch}[.-]*'):
            path.unlink()


# ---------------------------------------------------------------- whole or absent


def test_each_save_ends_with_a_manifest_of_its_files(saved):
    assert names(saved[0]) == sorted(f'ep0-ba{n}{end}' for n in (4, 8, 12) for end in ('-rank0.pt', '.json'))
    for manifest in list_manifests(LocalFolder(saved[0])):
        file = f'ep0-ba{manifest.batch}-rank0.pt'
        assert manifest.files == {file: (saved[0] / file).stat().st_size}
        state = torch.load(saved[0] / file, weights_only=False)['state']['timestamp']
        assert (manifest.epoch, manifest.batch, manifest.sample, manifest.token) == tuple(
            state['Timestamp'][key] for key in ('epoch', 'batch', 'sample', 'token'))


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize('damage', ['cut short', 'no manifest', 'no file', 'manifest cut short'])
def test_the_newest_whole_checkpoint_is_taken(folder, damage, caplog):
    file, manifest = folder / 'ep0-ba12-rank0.pt', folder / 'ep0-ba12.json'
    if damage == 'cut short':
        cut_short(file)
    elif damage == 'manifest cut short':
        cut_short(manifest)
    else:
        (manifest if damage == 'no manifest' else file).unlink()
    start = find_start(str(folder), 'one', autoresume=True, load_path=None, weights_only=False)
    assert start.manifest and (start.kind, start.path, start.manifest.batch) == ('resume', str(folder / 'ep0-ba8-rank0.pt'), 8)
    assert f'autoresume: ep0-ba12 in {folder} is not whole' in caplog.text
    assert 'taking the newest whole checkpoint, ep0-ba8' in caplog.text


def test_checkpoints_of_which_none_is_whole_are_an_error_and_stay(folder, mds_root):
    for path in folder.glob('*.json'):
        path.unlink()
    before = names(folder)
    message = refused(mds_root, f'save_folder={folder}', 'autoresume=true')
    assert message.startswith(f'autoresume: {folder} holds ep0-ba12, ep0-ba4, ep0-ba8, and none is whole')
    assert names(folder) == before


def test_half_a_save_is_replaced_by_the_next_of_its_step(saved, folder, mds_root):
    delete_saves(folder, 12)
    cut_short(folder / 'ep0-ba8-rank0.pt')
    (folder / 'ep0-ba12-rank0.pt').write_bytes(b'half')
    got = run(mds_root, f'save_folder={folder}', 'autoresume=true')
    assert sorted(got['losses']) == list(range(4, 12))
    assert_same_run(saved[1], got, 4)
    assert names(folder) == names(saved[0])
    assert all(m.is_whole(LocalFolder(folder)) for m in list_manifests(LocalFolder(folder)))


def test_half_of_the_first_save_is_no_checkpoint(mds_root, saved, tmp_path):
    """No checkpoint was whole yet, so nothing is lost: the run starts from the beginning."""
    (tmp_path / 'ep0-ba4-rank0.pt').write_bytes(b'half')
    (tmp_path / 'ep0-ba4.unfinished').touch()
    assert_same_run(saved[1], run(mds_root, f'save_folder={tmp_path}', 'autoresume=true'))
    assert names(tmp_path) == names(saved[0])
    cut_short(tmp_path / 'ep0-ba12-rank0.pt')
    (tmp_path / 'ep0-ba12.unfinished').touch()  # the save was whole, and the run was killed before it removed the mark
    delete_saves(tmp_path, 4, 8)
    assert 'holds ep0-ba12, and none is whole' in refused(mds_root, f'save_folder={tmp_path}', 'autoresume=true')


def test_a_run_measured_in_epochs_knows_its_end(tokens_root, tmp_path, monkeypatch):
    every = ['global_train_batch_size=96', 'device_train_microbatch_size=96', 'save_interval=1ba', 'max_duration=1ep',
             'scheduler.t_warmup=0ep', f'save_folder={tmp_path}', 'autoresume=true']
    run(tokens_root, *every)
    before = names(tmp_path)
    assert 'nothing to do: ' in plan_of(monkeypatch, tokens_root, *every) and names(tmp_path) == before


def test_a_manifest_that_lists_what_is_not_its_own_is_none(folder, tmp_path):
    (tmp_path / 'precious').write_text('mine')
    manifest = json.loads((folder / 'ep0-ba4.json').read_text())
    for files in ({'../precious': 4}, {'ep0-ba4/../../precious': 4}, {str(tmp_path / 'precious'): 4}, {'ep0-ba8-rank0.pt': 1}):
        (folder / 'ep0-ba4.json').write_text(json.dumps(manifest | {'files': files}))
        assert [m.batch for m in list_manifests(LocalFolder(folder))] == [12, 8]


def test_retention_holds_across_resumes(mds_root, tmp_path):
    keep = [f'save_folder={tmp_path}', 'autoresume=true', 'save_num_checkpoints_to_keep=2', 'scheduler.t_warmup=1ba']
    for duration, left in ((8, (4, 8)), (12, (8, 12)), (20, (16, 20))):
        run(mds_root, *keep, f'max_duration={duration}ba')
        assert names(tmp_path) == sorted(f'ep0-ba{n}{end}' for n in left for end in ('-rank0.pt', '.json'))


def finish_save(folder: Folder, saved: int, keep: int) -> None:
    """Finishes the save of batch `saved`, whose file exists: writes the manifest, and deletes old checkpoints."""
    writer = CheckpointWriter('', '1ba', keep, FRESH, RunInfo({}, '', '', {}))
    writer.folder = folder
    writer._finish(small_manifest(saved))


def small_manifest(batch: int) -> Manifest:
    return Manifest(f'ep0-ba{batch}', False, 0, batch, batch, batch, 1, {f'ep0-ba{batch}-rank0.pt': 4})


@pytest.mark.parametrize('keep', [1, 2])
@pytest.mark.parametrize('place', ['a disk', 'S3'])
def test_retention_counts_whole_checkpoints_alone(tmp_path, place, keep, request):
    """Each case has up to three other checkpoints, whole (W) or damaged (D), older or newer than the save (+)."""
    if place == 'S3':
        request.getfixturevalue('s3')
        cases = [('WD+D', 1), ('D+DD', 2), ('WWD+', 3), ('DWD+D', 4)]
    else:
        cases = [(''.join(kinds), i) for n in range(4) for i, kinds in enumerate(
            kinds[:at] + ('+',) + kinds[at:] for kinds in itertools.product('WD', repeat=n) for at in range(n + 1))]
    for kinds, i in cases:
        path = f's3://bucket/{keep}/{i}' if place == 'S3' else str(tmp_path / f'{kinds}{i}')
        folder = open_folder(path)
        Path(path).mkdir(parents=True) if place == 'a disk' else None
        for batch, kind in enumerate(kinds, 1):
            folder.write(f'ep0-ba{batch}-rank0.pt', 'dam' if kind == 'D' else 'file')
            if kind != '+':
                folder.write(f'ep0-ba{batch}.json', json.dumps(asdict(small_manifest(batch))))
        whole = [batch for batch, kind in enumerate(kinds, 1) if kind != 'D']
        finish_save(folder, kinds.index('+') + 1, keep)
        left = {m.batch: m.is_whole(folder) for m in list_manifests(folder)}
        assert [batch for batch in sorted(left) if left[batch]] == whole[-keep:], kinds
        assert all(batch > whole[-keep:][0] for batch in left if not left[batch]) or len(whole) < keep, kinds


def test_a_damaged_later_checkpoint_does_not_push_out_the_whole_ones(folder, mds_root):
    delete_saves(folder, 8)
    (folder / 'ep0-ba12-rank0.pt').unlink()
    run(mds_root, f'save_folder={folder}', 'autoresume=true', 'max_duration=10ba', 'save_num_checkpoints_to_keep=1')
    assert names(folder) == ['ep0-ba10-rank0.pt', 'ep0-ba10.json', 'ep0-ba12.json']


@pytest.mark.parametrize('sharded', [False, True], ids=['full', 'sharded'])
def test_a_full_disk_is_said_and_what_was_saved_stays(mds_root, tmp_path, sharded):
    folder, kind = tmp_path, SHARDED if sharded else ()
    run(mds_root, *kind, f'save_folder={folder}', 'max_duration=4ba', 'scheduler.t_warmup=1ba')
    before = names(folder)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        message = refused(mds_root, *kind, f'save_folder={folder}', 'autoresume=true')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert message.startswith(f'save_folder: cannot write ep0-ba8 to {folder}: ') and 'untouched' in message
    start = find_start(str(folder), 'one', autoresume=True, load_path=None, weights_only=False)
    assert start.manifest and start.manifest.batch == 4 and set(before) < set(names(folder))


@pytest.mark.parametrize('method, name', [
    ('write', 'ep0-ba8.unfinished'), ('write', 'ep0-ba8.json'), ('delete', 'ep0-ba4.json')])
def test_each_write_of_a_save_that_fails_is_said(mds_root, tmp_path, monkeypatch, method, name):
    original = getattr(LocalFolder, method)

    def read_only(self, names, *text):
        if name in (names, *names):
            raise OSError(30, 'Read-only file system')
        original(self, names, *text)

    monkeypatch.setattr(LocalFolder, method, read_only)
    message = refused(mds_root, f'save_folder={tmp_path}', 'max_duration=8ba', 'save_num_checkpoints_to_keep=1')
    if name == 'ep0-ba4.json':
        assert f'save_folder: older checkpoints in {tmp_path} cannot be deleted: [Errno 30] Read-only file system; delete' in message
        assert f'The last whole checkpoint is {tmp_path}/ep0-ba8-rank0.pt' in message
        return
    assert message.startswith(f'save_folder: cannot write ep0-ba8 to {tmp_path}: [Errno 30] Read-only file system; ')
    assert f'The last whole checkpoint is {tmp_path}/ep0-ba4-rank0.pt' in message


# ---------------------------------------------------------------- exact


KINDS = {
    'truncate': [],
    'dropout': ['model.resid_pdrop=0.1', 'model.attn_pdrop=0.1'],
    'muon': [*MUON, 'optimizer.weight_decay=0.1'],
    'workers': ['train_loader.num_workers=2', 'train_loader.persistent_workers=true'],
    'concat': ['train_loader.dataset.group_method=concat', 'model.resid_pdrop=0.1'],
    'tokens': ['global_train_batch_size=24', 'device_train_microbatch_size=24'],
    'tokens over epochs': ['global_train_batch_size=96', 'device_train_microbatch_size=96', 'model.resid_pdrop=0.1'],
}
FAST = ('muon', 'workers', 'tokens over epochs')


@pytest.mark.parametrize('kind', [*FAST, *(
    pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind not in FAST)])
def test_a_run_that_stopped_twice_equals_one_that_did_not(kind, mds_root, tokens_root, tmp_path):
    """500 sequences of tokens are 5 batches of 96: batch 5 ends an epoch, batch 8 is inside the next."""
    root = tokens_root if kind.startswith('tokens') else mds_root
    every = [*KINDS[kind], 'save_interval=1ba', f'save_folder={tmp_path}']
    whole = run(root, *every)
    assert len({json.dumps(batch) for batch in whole['batches']}) == 12
    for stop in (8, 5, 3):
        delete_saves(tmp_path, *range(stop + 1, 13))
        assert_same_run(whole, run(root, *every, 'autoresume=true', 'eval_first=true'), stop)


def test_a_checkpoint_at_the_end_of_an_epoch_goes_on_with_the_next(tokens_root, tmp_path):
    every = ['global_train_batch_size=96', 'device_train_microbatch_size=96', 'save_interval=1ep', f'save_folder={tmp_path}']
    whole = run(tokens_root, *every)
    delete_saves(tmp_path, 12, 10)
    assert names(tmp_path) == ['ep1-ba5-rank0.pt', 'ep1-ba5.json']
    assert_same_run(whole, run(tokens_root, *every, 'autoresume=true'), 5)


# ---------------------------------------------------------------- where a run starts


def plan_of(monkeypatch, root: Path, *overrides: str) -> str:
    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(logging.getLogger('src'), 'info', lambda text, *values: said.append(text % values))
        run(root, *overrides)
    return '\n'.join(said)


def test_the_plan_says_where_the_run_starts(mds_root, folder, tmp_path, monkeypatch):
    new = f'save_folder={tmp_path}/{{run_name}}'
    assert 'start: fresh\n' in plan_of(monkeypatch, mds_root, new, 'max_duration=1ba', 'scheduler.t_warmup=0ba') + '\n'
    delete_saves(folder, 12)
    said = plan_of(monkeypatch, mds_root, f'save_folder={folder}', 'autoresume=true')
    assert f'start: resumed from {folder}/ep0-ba8-rank0.pt at batch 8, ' in said
    path = f'load_path={folder}/ep0-ba4-rank0.pt'
    said = plan_of(monkeypatch, mds_root, path, 'load_weights_only=true', 'run_name=two', new)
    assert f'start: weights only, from {folder}/ep0-ba4-rank0.pt' in said


def test_a_finished_run_says_so_and_writes_nothing(mds_root, folder, monkeypatch, tmp_path):
    before = {name: (folder / name).stat().st_mtime_ns for name in names(folder)}
    argv = tiny(mds_root, *EVERY, f'save_folder={folder}', 'autoresume=true', f'loggers.tensorboard.log_dir={tmp_path}/tb',
                f'loggers.file.filename={tmp_path}/log.txt')
    said: list[str] = []
    monkeypatch.setattr(logging.getLogger('src'), 'info', lambda text, *values: said.append(text % values))
    assert main.cli([QUICKSTART, *argv]) == 0
    assert said[-1].startswith('nothing to do: ') and 'max_duration 12ba' in said[-1]
    assert {name: (folder / name).stat().st_mtime_ns for name in names(folder)} == before
    assert not (tmp_path / 'tb').exists() and not (tmp_path / 'log.txt').exists()


def test_a_run_starts_afresh_only_where_there_is_nothing(mds_root, folder):
    assert refused(mds_root, f'save_folder={folder}').startswith(f'save_folder: {folder} already holds checkpoints')
    older = [f'save_folder={folder}', f'load_path={folder}/ep0-ba4-rank0.pt']
    assert refused(mds_root, *older).startswith(f'save_folder: {folder} already holds ep0-ba12, ep0-ba8, which this run')
    assert len(names(folder)) == 6


@pytest.mark.parametrize('weights_only', [False, True])
def test_a_run_that_starts_elsewhere_saves_nothing_among_anothers_checkpoints(folder, tmp_path, weights_only):
    shutil.copytree(folder, tmp_path / 'other')
    path = f'{tmp_path}/other/ep0-ba12-rank0.pt'
    assert find_start(str(folder), 'new', False, path, weights_only).path == path, 'a copy of its own'
    manifest = tmp_path / 'other/ep0-ba12.json'
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {'settings': {'seed': 1}}))
    with pytest.raises(UserError, match=f'^save_folder: {folder} already holds checkpoints. To continue from them, set'):
        find_start(str(folder), 'new', False, path, weights_only)
    (tmp_path / 'link').symlink_to(folder)
    for place in (folder, tmp_path / 'link', os.path.relpath(folder)):
        assert find_start(str(folder), 'new', False, f'{place}/ep0-ba12-rank0.pt', weights_only).in_save_folder
    assert not find_start(f'{tmp_path}/new', 'new', False, f'{folder}/ep0-ba12-rank0.pt', weights_only).in_save_folder


def test_a_link_to_a_checkpoint_has_its_manifest(folder, tmp_path):
    for link, file in {'link.pt': 'ep0-ba8-rank0.pt', 'latest-rank0.pt': 'ep0-ba4-rank0.pt'}.items():
        (tmp_path / link).symlink_to(folder / file)
        start = find_start(None, None, False, f'{tmp_path}/{link}', False)
        assert start.path == f'{folder}/{file}' and start.manifest and file == f'{start.manifest.name}-rank0.pt'
    (tmp_path / 'ep0-ba8-rank0.pt').symlink_to(shutil.copy(folder / 'ep0-ba8-rank0.pt', tmp_path / 'blob'))
    shutil.copy(folder / 'ep0-ba8.json', tmp_path)
    start = find_start(None, None, False, f'{tmp_path}/ep0-ba8-rank0.pt', False)
    assert start.path == f'{tmp_path}/ep0-ba8-rank0.pt' and start.manifest, 'a store of files by their content'


def test_the_root_is_a_folder_like_others():
    with pytest.raises(UserError, match='^load_path: /: no such file, and no folder'):
        find_start(None, None, False, '/', False)


def test_load_path_goes_on_from_the_file_that_it_names(mds_root, folder, saved, tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr('src.checkpoints.manifest.log.warning', lambda text, *values: said.append(text % values))
    quiet = 'callbacks.text_samples=false'
    assert_same_run(saved[1], run(mds_root, f'load_path={folder}/ep0-ba4-rank0.pt', quiet), 4)
    delete_saves(folder, 8, 12)
    assert_same_run(saved[1], run(mds_root, f'load_path={folder}/ep0-ba4-rank0.pt', f'save_folder={folder}', quiet), 4)
    assert not said


@pytest.mark.parametrize('name', ['', '/', '/latest-rank{rank}.pt'])
def test_a_folder_or_an_old_link_is_the_newest_whole_checkpoint(folder, name, caplog):
    cut_short(folder / 'ep0-ba12-rank0.pt')
    caplog.set_level('INFO', 'src')
    start = find_start(None, None, False, f'{folder}{name}', weights_only=False)
    assert start.manifest and (start.path, start.manifest.batch) == (f'{folder}/ep0-ba8-rank0.pt', 8)
    assert f'the newest whole checkpoint is {folder}/ep0-ba8-rank0.pt' in caplog.text
    assert f'load_path: ep0-ba12 in {folder} is not whole' in caplog.text
    assert start_from_path(f'{folder}{name}', 'weights').path == f'{folder}/ep0-ba8-rank0.pt'
    delete_saves(folder, 4, 8)
    with pytest.raises(UserError, match='no such file, and no folder of a sharded checkpoint, or of a run'):
        find_start(None, None, False, f'{folder}{name}', weights_only=False)


def test_a_checkpoint_that_is_named_and_not_whole_is_refused(mds_root, folder):
    cut_short(folder / 'ep0-ba4-rank0.pt')
    assert 'is not whole: a file is missing or has another size than ep0-ba4.json lists' in refused(
        mds_root, f'load_path={folder}/ep0-ba4-rank0.pt')
    assert 'no such file' in refused(mds_root, f'load_path={folder}/none.pt')


def test_missing_optimizer_state_is_an_error(mds_root, folder):
    delete_saves(folder, 12)
    for change in ('optimizer.name=adamw', None):
        if change is None:  # a checkpoint of weights, with a manifest that fits
            path = folder / 'ep0-ba8-rank0.pt'
            state = torch.load(path, weights_only=False)
            del state['state']['optimizers']
            torch.save(state, path)
            manifest = json.loads((folder / 'ep0-ba8.json').read_text())
            manifest['files'][path.name] = path.stat().st_size
            (folder / 'ep0-ba8.json').write_text(json.dumps(manifest))
        message = refused(mds_root, f'save_folder={folder}', 'autoresume=true', *filter(None, [change]))
        assert f'autoresume: {folder}/ep0-ba8-rank0.pt holds no state of ' in message


# ---------------------------------------------------------------- weights only


def test_weights_only_takes_the_weights_and_nothing_else(mds_root, folder, tmp_path):
    path = folder / 'ep0-ba12-rank0.pt'
    weights = read_full_checkpoint(str(path), Start('weights', str(path)))
    got = run(mds_root, f'load_path={path}', 'load_weights_only=true', 'max_duration=1ba', 'optimizer.lr=1e-30',
              'scheduler.t_warmup=0ba')
    assert got['batch'] == 1
    assert got['weights'].keys() == weights.keys() and all(torch.equal(got['weights'][k], weights[k]) for k in weights)


def test_weights_only_runs_no_code(mds_root, folder, tmp_path):
    state = torch.load(folder / 'ep0-ba12-rank0.pt', weights_only=False)
    state['state']['run_name'] = MakesFolder(tmp_path / 'ran')
    torch.save(state, tmp_path / 'evil.pt')
    message = refused(mds_root, f'load_path={tmp_path}/evil.pt', 'load_weights_only=true')
    assert f'load_path: {tmp_path}/evil.pt cannot be loaded as the weights' in message and 'mkdir' in message
    assert not (tmp_path / 'ran').exists()


def test_weights_of_another_model_are_refused(mds_root, folder):
    path = f'load_path={folder}/ep0-ba12-rank0.pt'
    assert 'holds other weights than this model has' in refused(mds_root, path, 'load_weights_only=true', 'model.n_layers=3')
    assert 'holds other weights than this model has' in refused(mds_root, path, 'load_weights_only=true', 'model.d_model=32')
    for change in ('model.d_model=32', 'model.n_layers=3', 'model.n_layers=1'):
        for fsdp in ([], SHARDED[:1]):
            message = refused(mds_root, path, *fsdp, change, 'max_duration=20ba')
            assert 'holds other weights than this model has' in message or 'cannot be loaded into this model' in message
    for change, here in {'model.n_heads=4': '2, and the config has 4', 'model.mlp_act=gelu_tanh': "'gelu', and"}.items():
        for more in ('load_weights_only=true', 'max_duration=20ba'):
            said = f'{path.replace("=", ": ")}: the checkpoint has {change.partition("=")[0]} {here}'
            assert refused(mds_root, path, change, more).startswith(said)


def test_settings_of_hugging_face_models_that_no_weight_tells_are_held_against_the_manifest():
    def model(**overrides):
        return {'name': 'hf_causal_lm', 'config_overrides': overrides}

    shape = {'model_type': 'llama', 'hidden_size': 16, 'num_hidden_layers': 1, 'intermediate_size': 32,
             'vocab_size': 64, 'num_attention_heads': 2, 'torch_dtype': 'float32',
             'rope_scaling': {'rope_type': 'linear', 'factor': 2.0}}
    saved = json.loads(json.dumps(ComposerHFCausalLM(model(**shape)).manifest_config))
    manifest = Manifest('ep0-ba4', False, 0, 4, 4, 4, 1, {}, model=saved)
    check_model(manifest, model(**shape), 'x')
    check_model(manifest, model(attention_dropout=0.5, torch_dtype='bfloat16', _attn_implementation='eager'), 'x')
    own = Manifest('ep0-ba4', False, 0, 4, 4, 4, 1, {}, model={'name': 'own', 'width': 3})
    check_model(own, {'name': 'own', 'width': 4}, 'x')  # of a fork: its weights tell
    check_model(manifest, model(rope_theta=5.0), 'x')  # to train on longer sequences
    for key, value in {'num_attention_heads': 4, 'hidden_act': 'gelu'}.items():
        with pytest.raises(UserError, match=f'^x: .* has model.config_overrides.{key} .*, and the config has {value!r}'):
            check_model(manifest, model(**{key: value}), 'x')


# ---------------------------------------------------------------- sharded, on one device


def test_a_sharded_checkpoint_on_one_device(mds_root, saved, tmp_path):
    every = [*SHARDED, f'save_folder={tmp_path}']
    assert_same_run(saved[1], run(mds_root, *every))
    assert names(tmp_path)[:3] == ['ep0-ba12.json', 'ep0-ba12/.metadata', 'ep0-ba12/__0_0.distcp']
    shutil.rmtree(tmp_path / 'ep0-ba12')
    cut_short(tmp_path / 'ep0-ba8' / '__0_0.distcp')
    (tmp_path / 'ep0-ba8' / '__1_0.distcp').write_bytes(b'of another number of ranks')
    assert_same_run(saved[1], run(mds_root, *every, 'autoresume=true', 'save_num_checkpoints_to_keep=2'), 4)
    assert names(tmp_path) == sorted(f'ep0-ba{n}{end}' for n in (8, 12) for end in ('.json', '/.metadata', '/__0_0.distcp'))

    other = [*SHARDED, f'load_path={tmp_path}/ep0-ba12', 'max_duration=20ba']
    for change in (['model.n_layers=1'], ['model.n_layers=1', 'load_weights_only=true'], ['model.n_layers=3'],
                   ['model.d_model=32'], ['optimizer.name=adamw']):
        message = refused(mds_root, *other, *change)
        assert 'holds other weights than this model has' in message or 'cannot be loaded into this model and opt' in message
    assert 'is a sharded checkpoint; set fsdp_config.state_dict_type=sharded' in refused(
        mds_root, f'load_path={tmp_path}/ep0-ba8')
    got = run(mds_root, *SHARDED, f'load_path={tmp_path}/ep0-ba12', 'load_weights_only=true', 'max_duration=1ba',
              'optimizer.lr=1e-30', 'scheduler.t_warmup=0ba')
    assert all(torch.equal(got['weights'][k], saved[1]['weights'][k]) for k in got['weights'])


def test_a_full_checkpoint_into_a_sharded_run_is_refused(mds_root, folder, tmp_path):
    delete_saves(folder, 12)
    assert 'is a full checkpoint, and fsdp_config.state_dict_type is sharded' in refused(
        mds_root, *SHARDED, f'save_folder={folder}', 'autoresume=true')
    run(mds_root, *SHARDED, f'load_path={folder}/ep0-ba8-rank0.pt', 'load_weights_only=true', 'max_duration=1ba',
        'scheduler.t_warmup=0ba')


# ---------------------------------------------------------------- S3


@pytest.mark.parametrize('sharded', [pytest.param(False, id='full'), pytest.param(True, id='sharded', marks=pytest.mark.slow)])
def test_s3_holds_what_a_disk_would(s3, saved, mds_root, sharded, tmp_path, monkeypatch):
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    every = [*(SHARDED if sharded else ()), 'save_folder=s3://bucket/runs/{run_name}', 'autoresume=true',
             'save_num_checkpoints_to_keep=2']
    assert_same_run(saved[1], run(mds_root, *every))
    bucket = open_folder('s3://bucket/runs/one')
    ends = ('.json', '/.metadata', '/__0_0.distcp') if sharded else ('.json', '-rank0.pt')
    assert sorted(bucket.names()) == sorted(f'ep0-ba{n}{end}' for n in (8, 12) for end in ends)
    s3.put_object(Bucket='bucket', Key=f'runs/one/ep0-ba12{ends[-1]}', Body=b'half')
    assert_same_run(saved[1], run(mds_root, *every), 8)
    assert all(m.is_whole(bucket) for m in list_manifests(bucket)) and sorted(m.batch for m in list_manifests(bucket)) == [8, 12]
    s3.put_object(Bucket='bucket', Key=f'runs/one/ep0-ba12{ends[-1]}', Body=b'half')
    s3.delete_object(Bucket='bucket', Key='runs/one/ep0-ba8.json')
    assert 'autoresume: s3://bucket/runs/one holds ep0-ba12, ep0-ba8, and none is whole' in refused(mds_root, *every)
    assert not list(tmp_path.glob('checkpoints-*')), 'nothing stays on the disk'


def test_weights_come_from_s3(s3, mds_root, folder, saved):
    s3.upload_file(str(folder / 'ep0-ba12-rank0.pt'), 'bucket', 'w.pt')
    got = run(mds_root, 'load_path=s3://bucket/w.pt', 'load_weights_only=true', 'max_duration=1ba', 'optimizer.lr=1e-30',
              'scheduler.t_warmup=0ba')
    assert all(torch.equal(got['weights'][k], saved[1]['weights'][k]) for k in got['weights'])


def test_an_object_store_out_of_reach_is_said(mds_root, s3, retries_at_once, monkeypatch):
    message = refused(mds_root, 'save_folder=s3://other-bucket/x', 'autoresume=true')
    assert message.startswith('save_folder: s3://other-bucket/x cannot be read: ')
