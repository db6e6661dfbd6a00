"""Runs that stop early: on request, after losses that are not finite, out of memory; and the logs of such runs."""

import os
import re
import signal
import subprocess
import time

import pytest
import torch
from composer.core import Callback
from launch import ROOT, SCRIPTS, Popen, clean_env, console, free_port, tiny
from runs import train

import main
from src.checkpoints.manifest import list_manifests
from src.common.storage import LocalFolder
from src.tools.run_logs import read_run
from src.training import plugins

QUICKSTART = 'yamls/quickstart.yaml'


class Signal(Callback):
    """Sends this process a signal in the middle of a batch, as a scheduler would."""

    def __init__(self, batch: int, when: str):
        self.batch, self.when = batch, when

    def after_forward(self, state, logger):
        if self.when == 'batch' and int(state.timestamp.batch) == self.batch - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def eval_after_forward(self, state, logger):
        if self.when == 'evaluation' and int(state.timestamp.batch) == self.batch:
            os.kill(os.getpid(), signal.SIGINT)


def saved_state(folder, batch: int) -> dict:
    return torch.load(next(folder.glob(f'ep*-ba{batch}-rank0.pt')), weights_only=False)['state']


def assert_same_state(got: dict, want: dict) -> None:
    assert all(torch.equal(got['model'][name], weight) for name, weight in want['model'].items())
    assert got['dataset_state'] == want['dataset_state'] and got['schedulers'] == want['schedulers']


@pytest.mark.parametrize('when', ['batch', pytest.param('evaluation', marks=pytest.mark.slow)])
def test_a_signal_ends_the_run_with_its_batch_saved(mds_root, tmp_path, monkeypatch, when):
    monkeypatch.setitem(plugins.CALLBACKS, 'signal', Signal)
    argv = tiny(mds_root, 'run_name=one', 'autoresume=true', 'save_interval=100ba', 'log_to_console=false', 'eval_interval=7ba',
                'max_duration=12ba', 'device_eval_batch_size=4', 'model.attn_impl=torch')  # deterministic on GPUs
    sent = f'callbacks.signal={{batch: 7, when: {when}}}'
    assert main.cli([QUICKSTART, *argv, f'save_folder={tmp_path}/stopped', sent]) == 75
    assert [m.batch for m in list_manifests(LocalFolder(tmp_path / 'stopped'))] == [7]
    assert main.cli([QUICKSTART, *argv, f'save_folder={tmp_path}/stopped']) == 0
    assert main.cli([QUICKSTART, *argv, f'save_folder={tmp_path}/whole']) == 0
    assert_same_state(saved_state(tmp_path / 'stopped', 12), saved_state(tmp_path / 'whole', 12))


def test_a_loss_that_is_no_number_ends_the_run_with_the_last_whole_checkpoint(mds_root, tmp_path, capfd):
    argv = tiny(mds_root, 'run_name=one', f'save_folder={tmp_path}', 'save_interval=1ba', 'optimizer.lr=1e30',
                'scheduler.t_warmup=0ba', 'max_nonfinite_in_a_row=3', 'eval_loader=null', 'log_to_console=false')
    assert main.cli([QUICKSTART, *argv]) == 1
    text = capfd.readouterr().err
    assert re.search(r'error: batch (\d+): loss nan, .*; 3 batches in a row had a loss or gradient that is not finite', text)
    newest = next(list_manifests(LocalFolder(tmp_path)))
    assert f'The last whole checkpoint is {tmp_path}/{newest.path}' in text and newest.batch > 1
    assert 'Traceback' not in text


def test_out_of_memory_lists_what_to_change_in_order(mds_root, capfd, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    assert main.cli([QUICKSTART, *tiny(mds_root, f'model.vocab_size={(1 << 31) - 1}', 'model.d_model=4096')]) == 1
    text = capfd.readouterr().err
    assert text.count('error: out of memory: ') == 1 and 'Traceback' not in text
    steps = re.findall(r'^  \d\. (\S+?):? ', text, re.MULTILINE)
    assert steps == ['device_train_microbatch_size', 'model.loss_chunk_tokens', 'fsdp_config.sharding_strategy',
                     'fsdp_config.activation_checkpointing', 'fsdp_config.activation_cpu_offload', 'more']
    assert 'device_train_microbatch_size: 12; set 6' in text


def test_logs_go_on_across_starts(mds_root, tmp_path, monkeypatch):
    import wandb  # here, because the tests for GPUs import this module and do without it

    monkeypatch.setenv('WANDB_DIR', str(tmp_path))
    monkeypatch.setenv('WANDB_MODE', 'offline')
    wandb.teardown()  # W&B remembers the mode of an earlier test
    monkeypatch.setitem(plugins.CALLBACKS, 'signal', Signal)
    argv = tiny(mds_root, 'run_name=one', 'autoresume=true', f'save_folder={tmp_path}/save', 'max_duration=6ba',
                'eval_loader=null', f'loggers.tensorboard.log_dir={tmp_path}/tb', 'loggers.wandb.project=kit',
                'log_to_console=false', f'loggers.file={{filename: "{tmp_path}/log.txt", flush_interval: 1}}')
    assert main.cli([QUICKSTART, *argv, 'callbacks.signal={batch: 4, when: batch}']) == 75
    first = (tmp_path / 'log.txt').read_text()
    time.sleep(1)  # W&B names the folder of an offline run by the second of its start
    assert main.cli([QUICKSTART, *argv]) == 0
    assert (tmp_path / 'log.txt').read_text().startswith(first) and '[metric][batch=4]' in first
    assert '[metric][batch=6]' in (tmp_path / 'log.2.txt').read_text()
    assert sorted(read_run(str(tmp_path / 'tb')).scalars['loss/train/total']) == [0, 1, 2, 3, 4, 5]
    ids = {path.stem.removeprefix('run-') for path in tmp_path.rglob('run-*.wandb')}
    assert len(ids) == 1 and ids.pop().startswith('one-') and len(list(tmp_path.rglob('run-*.wandb'))) == 2


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_signals_to_the_launcher_of_two_ranks(tokens_root, tmp_path):
    """SIGTERM to the launcher, Ctrl-C to the group, SIGTERM to the ranks; each start resumes the one before."""
    argv = tiny(tokens_root, 'run_name=one', 'autoresume=true', 'save_interval=1000ba', 'eval_loader=null', 'max_duration=160ba',
                'global_train_batch_size=24', 'train_loader.num_workers=2', 'model.resid_pdrop=0.1')

    def start(*overrides: str) -> subprocess.Popen:
        command = [str(SCRIPTS / 'composer'), '-n', '2', '--master_port', str(free_port()), 'main.py', QUICKSTART, *argv]
        return Popen([*command, *overrides], cwd=ROOT, env=clean_env(), text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, start_new_session=True)

    reached = []
    for send in (lambda pid: os.kill(pid, signal.SIGTERM), lambda pid: os.killpg(pid, signal.SIGINT),
                 lambda pid: subprocess.run(['pkill', '-TERM', '-P', str(pid)], check=True)):
        run = start(f'save_folder={tmp_path}/stopped')
        lines = []
        for line in run.stdout:
            lines.append(line)
            if (match := re.match(r'\[batch=(\d+)/160\]', line)) and int(match[1]) >= (reached[-1] if reached else 0) + 20:
                break
        sent = time.monotonic()
        send(run.pid)
        output = ''.join(lines) + run.communicate(timeout=60)[0]
        assert run.returncode == 75, output[-3000:]
        print(f'stopped after {time.monotonic() - sent:.1f} s')
        saved = next(list_manifests(LocalFolder(tmp_path / 'stopped'))).batch
        assert saved == max(console(output)['trainer/global_step']), 'the batch in flight was the last'
        assert f'stopped on request after batch {saved}' in output
        reached.append(saved)
    assert 0 < reached[0] < reached[1] < reached[2] < 160
    for name in ('stopped', 'whole'):
        run = start(f'save_folder={tmp_path}/{name}', 'log_to_console=false')
        output = run.communicate(timeout=300)[0]
        assert run.returncode == 0, output[-3000:]
    assert_same_state(saved_state(tmp_path / 'stopped', 160), saved_state(tmp_path / 'whole', 160))


def test_a_finished_trainer_is_returned_too(mds_root, tmp_path):
    """For a run that is already finished, `main` returns a Trainer with the weights of that run."""
    argv = tiny(mds_root, 'run_name=one', 'autoresume=true', f'save_folder={tmp_path}', 'max_duration=2ba', 'eval_loader=null',
                'scheduler.t_warmup=1ba')
    want = train(QUICKSTART, *argv)
    got = train(QUICKSTART, *argv)
    assert got['losses'] == {} and all(torch.equal(got['weights'][k], v) for k, v in want['weights'].items())
