"""Whole runs through the Composer launcher: ranks, logs, checkpoints, and mistakes of the user."""

import math
import re
import shutil

import pytest
import wandb
from composer.core import Callback, State
from composer.loggers import Logger
from launch import composer, console, tiny
from wandb.proto import wandb_internal_pb2
from wandb.sdk.internal.datastore import DataStore

import main
from src.config import load as config
from src.tools.run_logs import read_run

QUICKSTART = 'yamls/quickstart.yaml'
SECRET = '5ec2e7' * 6 + 'abcd'


def in_process(*argv: str) -> int:
    """Runs `python main.py ARGV` in this process, which saves the start of a process and the imports."""
    return main.cli([QUICKSTART, *argv])


@pytest.fixture(scope='module')
def losses(mds_root, tmp_path_factory):
    """Runs the tiny model on one rank and returns TensorBoard's scalars; caches the result of each set of arguments."""
    done = {}

    def run(*overrides: str):
        if overrides not in done:
            folder = tmp_path_factory.mktemp('tb')
            assert in_process(*tiny(mds_root, 'log_to_console=false', f'loggers.tensorboard.log_dir={folder}', *overrides)) == 0
            done[overrides] = read_run(str(folder)).scalars
        return done[overrides]

    return run


@pytest.fixture(scope='module')
def logged(mds_root, tmp_path_factory):
    """A run on two ranks, with console text, TensorBoard's scalars, W&B's history and config, and its folder.

    The microbatch of 12 is larger than the 6 samples of each rank.
    """
    folder = tmp_path_factory.mktemp('logged')
    result = composer(QUICKSTART, *tiny(mds_root, f'loggers.tensorboard.log_dir={folder}/tb', 'loggers.wandb.project=kit',
                                        f'loggers.wandb.init_kwargs.settings.api_key={SECRET}', 'log_traces=true',
                                        f'save_folder={folder}/ck/{{run_name}}',
                                        f'loggers.file.filename={folder}/log.txt'),
                      ranks=2, WANDB_DIR=str(folder), COMPOSER_RUN_NAME='from-env')
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    history, config_json = {}, ''
    store = DataStore()
    store.open_for_scan(str(next(folder.rglob('run-*.wandb'))))
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField('history'):
            for item in record.history.item:
                history.setdefault('.'.join(item.nested_key) or item.key, {})[record.history.step.num] = item.value_json
        for message in (record.run.config, record.config):
            config_json += ' '.join(f'{".".join(u.nested_key) or u.key}={u.value_json}' for u in message.update)
    return result, read_run(str(folder / 'tb')).scalars, history, config_json, folder


def same_run(got, want) -> None:
    for tag in ('loss/train/total', 'metrics/train/LanguageCrossEntropy'):
        assert len(want[tag]) == 20 and list(want[tag].values())[0] > list(want[tag].values())[-1] + 0.1, 'the model learns'
        assert got[tag] == pytest.approx(want[tag], rel=1e-4)
    for tag in ('metrics/eval/LanguageCrossEntropy', 'baseline/unigram_entropy'):
        # 31 samples on two ranks: streaming alone would repeat one, and the entropy of the targets would change
        assert got[tag] == pytest.approx(want[tag], rel=1e-6 if 'entropy' in tag else 1e-4)
    assert got['time/token'] == want['time/token']


@pytest.mark.slow
def test_two_ranks_give_the_losses_of_one(losses, logged):
    same_run(logged[1], losses())
    assert set(logged[1]['trainer/grad_accum'].values()) == {1}


@pytest.mark.parametrize('micro', [5, 11])
def test_microbatches_on_one_rank_do_not_change_the_losses(losses, micro):
    same_run(losses(f'device_train_microbatch_size={micro}'), losses())


def test_padding_makes_microbatches_uneven_in_tokens(losses):
    """Rows have different numbers of targets, so a mean of the ranks' means would not be equal."""
    tokens = list(losses()['time/token'].values())
    steps = {int(b - a) for a, b in zip(tokens, tokens[1:])}
    assert len(steps) > 3 and min(steps) < 12 * 31 - 20


def test_another_seed_is_another_run(losses):
    assert losses('seed=18')['loss/train/total'] != pytest.approx(losses()['loss/train/total'], rel=1e-3)


def test_meta_and_cpu_initialisation_give_one_run(losses):
    assert losses('model.device=meta')['loss/train/total'] == losses()['loss/train/total']


def test_console_shows_what_the_document_shows(logged):
    text = logged[0].stdout + logged[0].stderr
    values = console(text)
    for key in ('time/batch', 'time/token', 'lr-DecoupledAdamW/group0', 'loss/train/total', 'metrics/train/LanguageCrossEntropy',
                'metrics/train/Perplexity', 'trainer/grad_accum', 'trainer/global_step', 'trainer/device_train_microbatch_size'):
        assert sorted(values[key]) == list(range(1, 21)), key
    assert min(values['throughput/tokens_per_sec']) <= 10
    assert values['trainer/global_step'] == {n: str(n) for n in range(1, 21)}
    assert text.count('[batch=7/20]') == 1, 'once, on rank 0'
    assert '[trace]: algorithm_traces/GradientClipping' in text
    for n, value in values['metrics/train/Perplexity'].items():
        assert float(value) == pytest.approx(math.exp(float(values['metrics/train/LanguageCrossEntropy'][n])), rel=1e-3)


def test_the_run_ends_with_one_summary(logged):
    text = logged[0].stdout + logged[0].stderr
    for part in (r'20 batches, [\d,]+ tokens trained on', r'train loss +\d\.\d{4}', r'eval loss +\d\.\d{4} +perplexity',
                 r'unigram +\d\.\d{4}', r'throughput +[\d,]+ tokens/s',
                 rf'checkpoint +{re.escape(str(logged[4]))}/ck/from-env/ep0-ba20-rank0.pt',
                 'next: '):
        assert len(re.findall(part, text)) == 1, part
    assert 'attention: sdpa' in text and len(re.findall(r'model: mosaic_gpt, [\d,]+ parameters', text)) == 1


def test_tensorboard_and_wandb_hold_the_values_of_the_console(logged):
    result, scalars, history, _, _ = logged
    values = console(result.stdout + result.stderr)
    for key in ('loss/train/total', 'metrics/train/LanguageCrossEntropy', 'metrics/train/Perplexity', 'lr-DecoupledAdamW/group0',
                'trainer/grad_accum', 'trainer/global_step'):
        printed = {n: float(v) for n, v in values[key].items()}
        board = sorted(scalars[key].items())
        stored = sorted((step, float(v)) for step, v in history[key].items())
        assert len(board) == len(stored) == len(printed) == 20, key
        for (_, a), (_, b), (_, c) in zip(board, stored, sorted(printed.items())):
            assert a == pytest.approx(b, rel=1e-5) and b == pytest.approx(c, abs=6e-5), key
    for key in ('metrics/eval/LanguageCrossEntropy', 'baseline/unigram_entropy'):
        assert sorted(map(float, history[key].values())) == pytest.approx(sorted(scalars[key].values()), rel=1e-5), key


def test_wandb_gets_the_resolved_config_and_no_log_a_secret(logged):
    result, _, _, config_json, folder = logged
    assert re.search(r'"d_model": ?16\b', config_json)
    assert '${' not in config_json.replace('${run_name}', '')
    everything = result.stdout + result.stderr + config_json + (folder / 'log.txt').read_text()
    assert SECRET[:20] not in everything
    assert 'api_key' in everything and '***' in everything, 'the key was there, and masked'


def test_intervals_in_parts_of_a_run_whose_epochs_have_no_length(mds_root, tmp_path):
    argv = tiny(mds_root, 'train_loader.dataset.group_method=concat', 'eval_interval=0.5dur', 'save_interval=0.25dur',
                'max_duration=8ba', 'scheduler.t_warmup=0.1dur', f'save_folder={tmp_path}', 'save_num_checkpoints_to_keep=-1',
                'log_to_console=false')
    evaluations: list[int] = []

    class Evaluations(Callback):
        def eval_start(self, state: State, logger: Logger) -> None:
            evaluations.append(int(state.timestamp.batch))

    main.main(config.load([QUICKSTART, *argv, 'eval_first=false']), callbacks=[Evaluations()]).close()
    assert evaluations == [4, 8]
    assert sorted(path.name for path in tmp_path.glob('*.pt')) == [f'ep0-ba{n}-rank0.pt' for n in (2, 4, 6, 8)]


def test_the_loader_of_the_prebaked_runs_trains_with_workers(mds_root, capfd):
    workers = [f'{loader}.{key}' for loader in ('train_loader', 'eval_loader')
               for key in ('num_workers=2', 'persistent_workers=true', 'prefetch_factor=2')]
    argv = tiny(mds_root, *workers, 'train_loader.dataset.num_canonical_nodes=64', 'train_loader.dataset.group_method=concat')
    assert in_process(*argv) == 0
    losses = list(map(float, console(capfd.readouterr().err)['loss/train/total'].values()))
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.1


def one_error(text: str, *parts: str) -> None:
    assert text.count('error:') == 1, text[-3000:]
    assert 'Traceback' not in text, text[-3000:]
    for part in parts:
        assert part in text, text[-3000:]


@pytest.mark.slow
def test_mistakes_are_reported_once_on_two_ranks():
    result = composer(QUICKSTART, 'max_duraton=1ba', 'optimizer.lr=fast', ranks=2)
    assert result.returncode == 1
    one_error(result.stdout + result.stderr, '2 mistakes', "did you mean 'max_duration'", "optimizer.lr: 'fast' must be a number")


def bad_data(mds_root, tmp_path, kind):
    """Overrides of runs with one fault in the data each, and the words that the message must have."""
    root = tmp_path / 'copy'
    shutil.copytree(mds_root, root)
    if kind == 'no data':
        return [f'data_remote={tmp_path}/none', f'tokenizer_name={root}/tokenizer'], ['none', 'python convert_c4.py']
    if kind == 'no split':
        shutil.rmtree(root / 'val')
        return [f'data_remote={root}'], ['val', 'python convert_c4.py']
    if kind == 'no index':
        (root / 'train' / 'index.json').unlink()
        return [f'data_remote={root}'], ['index.json', 'python convert_c4.py']
    if kind == 'no tokenizer':
        shutil.rmtree(root / 'tokenizer')
        return [f'data_remote={root}'], [f"no folder '{root}/tokenizer'", 'python convert_c4.py --source sample']
    if kind == 'no hub':
        return [f'data_remote={root}', 'tokenizer_name=gpt2'], ["tokenizer_name: 'gpt2'", 'hub']
    if kind == 'small vocabulary':
        return [f'data_remote={root}', 'model.vocab_size=400'], ['model.vocab_size: 400 is too small', 'model.vocab_size=']
    if kind.startswith('small'):
        method = kind.split()[-1]
        return ([f'data_remote={root}', f'train_loader.dataset.group_method={method}', 'global_train_batch_size=5000'],
                ['train_loader: an epoch holds less than one full batch'])
    if kind == 'garbage checkpoint':
        (tmp_path / 'garbage.pt').write_bytes(b'garbage')
        return [f'data_remote={root}', f'load_path={tmp_path}/garbage.pt'], ['load_path:', 'garbage.pt cannot be loaded']
    if kind == 'folder as checkpoint':
        return [f'data_remote={root}', f'load_path={tmp_path}'], [
            f'load_path: {tmp_path}: no such file, and no folder of a sharded checkpoint']
    if kind == 'no place to save':
        (tmp_path / 'file').touch()
        return [f'data_remote={root}', f'save_folder={tmp_path}/file/x'], [f'save_folder: {tmp_path}/file/x cannot be created']
    if kind == 'no W&B key':
        return [f'data_remote={root}', 'loggers.wandb.project=kit'], ['loggers.wandb: ', 'set WANDB_API_KEY, or WANDB_MODE=']
    assert kind == 'no checkpoint'
    return [f'data_remote={root}', f'load_path={tmp_path}/none.pt'], [f'load_path: {tmp_path}/none.pt']


@pytest.mark.parametrize('kind', ['no data', 'no split', 'no index', 'no tokenizer', 'no hub', 'small vocabulary',
                                  'no checkpoint', 'small data for truncate', 'small data for concat', 'garbage checkpoint',
                                  'folder as checkpoint', 'no place to save', 'no W&B key'])
def test_data_that_is_not_there_ends_in_one_message(mds_root, tmp_path, kind, capfd, monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'online')
    monkeypatch.setenv('WANDB_API_KEY', '')
    monkeypatch.setenv('HOME', str(tmp_path))
    wandb.teardown()  # W&B keeps the mode of an earlier test
    overrides, parts = bad_data(mds_root, tmp_path, kind)
    assert in_process(*tiny(mds_root, *overrides)) == 1
    one_error(capfd.readouterr().err, *parts)


def test_a_microbatch_above_the_device_batch_is_reduced_with_a_warning(logged):
    text = logged[0].stdout + logged[0].stderr
    assert text.count('device_train_microbatch_size: 12 is more than the 6 samples that each of 2 devices has; using 6') == 1
    assert console(text)['trainer/device_train_microbatch_size'][1] == '6'


def test_run_name_falls_back_to_the_environment(logged):
    assert (logged[4] / 'ck' / 'from-env' / 'ep0-ba20-rank0.pt').exists()
