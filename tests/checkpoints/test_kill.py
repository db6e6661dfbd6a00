"""A run that SIGKILL ends at random moments, many times, equals a run that was never interrupted."""

import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch
from checkpoint_runs import MUON
from launch import ROOT, SCRIPTS, Popen, clean_env, free_port, tiny

from src.checkpoints.manifest import list_manifests
from src.common.storage import Folder, LocalFolder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

BATCHES = 600
ARGV = ('run_name=one', 'autoresume=true', f'max_duration={BATCHES}ba', 'save_interval=5ba', 'eval_loader=null',
        'save_num_checkpoints_to_keep=3', 'log_to_console=false', 'global_train_batch_size=24', 'model.d_model=64',
        'model.n_layers=4', 'device_train_microbatch_size=12', 'train_loader.num_workers=1', 'model.resid_pdrop=0.1',
        'dist_timeout=60')
FEW_SAVES = 'save_interval=100ba'


def start(ranks: int, *argv: str, imports: bool = False, **env: str) -> subprocess.Popen:
    """Starts the launcher with a pipe for its output; with `imports` as a user does, else with all libraries imported."""
    command = [str(SCRIPTS / 'composer'), '-n', str(ranks), '--master_port', str(free_port()), 'main.py',
               'yamls/quickstart.yaml', *argv]
    options = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True}
    return (subprocess.Popen if imports else Popen)(command, cwd=ROOT, env=clean_env(**env), **options)


def parents() -> dict[int, int]:
    """Maps every process of this machine to its parent; leaves out zombies."""
    found = {}
    for stat in Path('/proc').glob('[0-9]*/stat'):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rpartition(')')[2].split()[:2]
            if state != 'Z':
                found[int(stat.parent.name)] = int(parent)
    return found


def descendants(pid: int) -> list[int]:
    """Lists a process and all its descendants."""
    tree, family = parents(), [pid]
    for member in family:
        family += [child for child, parent in tree.items() if parent == member]
    return family


def is_rank(pid: int) -> bool:
    """Returns whether a process is a rank, and not a helper of a library, such as inductor's pool."""
    with contextlib.suppress(OSError):
        command = Path(f'/proc/{pid}/cmdline').read_bytes()
        return b'\0main.py\0' in command or b'tests/warm.py\0' in command
    return False


def kill_one(launcher: subprocess.Popen, rng: random.Random) -> str:
    """Kills the launcher or one of its ranks, waits until all of them have ended, and returns their output."""
    family = descendants(launcher.pid)
    ranks = [pid for pid, parent in parents().items() if parent == launcher.pid and is_rank(pid)]
    victim = rng.choice([launcher.pid, *ranks])
    with contextlib.suppress(ProcessLookupError):
        os.kill(victim, signal.SIGKILL)
    output = launcher.communicate(timeout=60)[0]
    deadline = time.monotonic() + 30
    while (left := set(family) & set(parents())) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, f'{left} outlived the kill of {victim} of {family}\n{output[-3000:]}'
    return output


def finish(launcher: subprocess.Popen) -> None:
    output = launcher.communicate(timeout=600)[0]
    assert launcher.returncode == 0, output[-5000:]


def state_of(folder: Path) -> dict:
    return torch.load(next(folder.glob(f'ep*-ba{BATCHES}-rank0.pt')), weights_only=False)['state']


def assert_same_state(got: dict, want: dict) -> None:
    """Checks that weights, optimizer and position in the data are the same, bit for bit."""
    for name, weight in want['model'].items():
        assert torch.equal(got['model'][name], weight), name
    [(optimizer, kept)] = want['optimizers'].items()
    assert kept['param_groups'] == got['optimizers'][optimizer]['param_groups']
    for name, values in kept['state'].items():
        for key, value in values.items():
            assert torch.equal(got['optimizers'][optimizer]['state'][name][key], value), (name, key)
    assert got['dataset_state'] == want['dataset_state']
    for key in ('epoch', 'batch', 'sample', 'token'):
        assert got['timestamp']['Timestamp'][key] == want['timestamp']['Timestamp'][key]


def newest(folder: Folder) -> int:
    return max((m.batch for m in list_manifests(folder)), default=0)


def test_25_kills_change_nothing(tokens_root, tmp_path):
    """Kills the launcher or a rank, at any time from the first import to the last batch, and cleans up nothing by hand."""
    argv = tiny(tokens_root, *ARGV)
    finish(start(2, *argv, f'save_folder={tmp_path}/whole', FEW_SAVES))

    rng, reached, to_first_save = random.Random(17), [], 0.0
    for kill in range(25):
        imports, began = kill % 8 == 0, time.monotonic()
        launcher = start(2, *argv, f'save_folder={tmp_path}/killed', imports=imports)
        before = newest(LocalFolder(tmp_path / 'killed'))
        if kill and rng.random() < 0.4:  # while it imports, connects or loads, or soon after
            until = time.monotonic() + rng.uniform(0, to_first_save if imports else to_first_save / 4)
            while time.monotonic() < until and newest(LocalFolder(tmp_path / 'killed')) == before:
                time.sleep(0.05)
        else:  # while it trains, or saves
            while newest(LocalFolder(tmp_path / 'killed')) == before:
                assert launcher.poll() is None, launcher.communicate()[0][-5000:]
                time.sleep(0.05)
            to_first_save = to_first_save or time.monotonic() - began
            time.sleep(rng.uniform(0, 0.5))
        kill_one(launcher, rng)
        reached.append(newest(LocalFolder(tmp_path / 'killed')))
    print('newest whole checkpoint after each kill:', reached, f'seconds to the first: {to_first_save:.1f}')
    assert reached == sorted(reached), 'no kill loses what was saved'
    assert 0 < reached[-1] < BATCHES and len(set(reached)) > 3, 'the kills came while it trained'
    finish(start(2, *argv, f'save_folder={tmp_path}/killed', FEW_SAVES))
    assert_same_state(state_of(tmp_path / 'killed'), state_of(tmp_path / 'whole'))
    assert len([*list_manifests(LocalFolder(tmp_path / 'killed'))]) == 3


@contextlib.contextmanager
def flaky_s3(share: float):
    """Serves S3 on loopback, and answers this share of all requests with 503."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    app, rng = DomainDispatcherApplication(create_backend_app), random.Random(0)
    counts = {'requests': 0, 'failed': 0}

    def flaky(environ, start_response):
        counts['requests'] += 1
        if not environ['PATH_INFO'].startswith('/moto-api') and rng.random() < share:
            counts['failed'] += 1
            environ['wsgi.input'].read(int(environ.get('CONTENT_LENGTH') or 0))
            start_response('503 Service Unavailable', [('Content-Type', 'text/plain'), ('Content-Length', '0')])
            return [b'']
        return app(environ, start_response)

    server = make_server('127.0.0.1', 0, flaky, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f'http://127.0.0.1:{server.server_port}', counts
    finally:
        urlopen(f'http://127.0.0.1:{server.server_port}/moto-api/reset', b'', timeout=10)  # servers of one process share the buckets
        server.shutdown()
        thread.join()
        server.server_close()


def test_8_kills_with_data_and_checkpoints_on_a_failing_s3(tokens_root, tmp_path):
    import boto3
    from botocore.config import Config

    with flaky_s3(0.1) as (url, counts):
        secrets = {'aws_access_key_id': 'none', 'aws_secret_access_key': 'none', 'region_name': 'us-east-1'}
        s3 = boto3.client('s3', endpoint_url=url, config=Config(retries={'max_attempts': 20, 'mode': 'standard'}), **secrets)
        s3.create_bucket(Bucket='bucket')
        for path in tokens_root.rglob('*'):
            if path.is_file() and path.parent.name == 'train':
                s3.upload_file(str(path), 'bucket', f'data/{path.relative_to(tokens_root)}')
        env = {'S3_ENDPOINT_URL': url, 'AWS_ACCESS_KEY_ID': 'none', 'AWS_SECRET_ACCESS_KEY': 'none',
               'AWS_DEFAULT_REGION': 'us-east-1', 'TMPDIR': str(tmp_path)}
        remote = ['data_remote=s3://bucket/data', f'data_local={tmp_path}/cache', f'tokenizer_name={tokens_root}/tokenizer',
                  'save_folder=s3://bucket/runs/{run_name}', 'train_loader.dataset.download_retry=5']
        argv = [*tiny(tokens_root, *ARGV, *MUON), *remote]

        def saved() -> int:
            keys[:] = [o['Key'] for page in s3.get_paginator('list_objects_v2').paginate(Bucket='bucket', Prefix='runs/one/')
                    for o in page.get('Contents', [])]
            return max((int(key.split('-ba')[1][:-5]) for key in keys if key.endswith('.json')), default=0)

        keys: list[str] = []
        rng, reached = random.Random(17), [0]
        for _ in range(8):
            launcher = start(1, *argv, **env)
            while saved() <= reached[-1]:
                assert launcher.poll() is None, launcher.communicate()[0][-5000:]
                time.sleep(0.1)
            time.sleep(rng.uniform(0, 1))
            kill_one(launcher, rng)
            reached.append(saved())
        print('newest whole checkpoint after each kill:', reached, counts)
        assert reached[-1] < BATCHES
        finish(start(1, *argv, **env))
        assert saved() == BATCHES
        last = next(key for key in keys if key.endswith(f'-ba{BATCHES}-rank0.pt'))
        s3.download_file('bucket', last, str(tmp_path / Path(last).name))
        assert counts['failed'] > 0.05 * counts['requests']
    finish(start(1, *tiny(tokens_root, *ARGV, *MUON), f'save_folder={tmp_path}/whole', FEW_SAVES))
    assert_same_state(state_of(tmp_path), state_of(tmp_path / 'whole'))
    assert not list(tmp_path.glob('checkpoints-*')), 'no file of an unfinished upload is left'
