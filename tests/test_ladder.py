"""The ladder of models: its sizes, its power law, and a small one that is stopped, goes on and ends."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from launch import ROOT

from src import config, ladder
from src.errors import UserError
from src.ladder import Rung
from src.mosaic_gpt import MosaicGPT
from src.schema import Config, MosaicGPTConfig


@pytest.mark.parametrize('size', ladder.SIZES)
def test_a_size_has_the_parameters_that_it_says(size, tmp_path):
    rung = Rung(*ladder.parse_size(size), 20)
    cfg = config.load(rung.arguments(tmp_path, tmp_path))
    c = Config.model_validate(config.plain(cfg))
    assert isinstance(c.model, MosaicGPTConfig)
    with torch.device('meta'):
        model = MosaicGPT(c.model.model_copy(update={'device': 'meta'}))
    assert sum(p.numel() for p in model.parameters()) == rung.n_params
    assert rung.tokens / rung.n_params == pytest.approx(20, rel=0.001)
    assert c.max_duration == f'{rung.batches}ba' and c.global_train_batch_size * c.max_seq_len * rung.batches == rung.tokens


def test_a_power_law_is_found_again_and_foretells_the_next_size():
    rungs = [Rung(*ladder.parse_size(size), 20) for size in ladder.SIZES]
    losses = [50 * rung.flops ** -0.1 for rung in rungs]
    assert ladder.fit([rung.flops for rung in rungs], losses) == pytest.approx((50, 0.1))
    lines = ladder.table(rungs, losses).splitlines()
    assert len(lines) == 7 and not any('%' in line for line in lines[:3])
    assert all(f'{loss:.4f}   {loss:.4f} (+0.0%)' in line or f'{loss:.4f}   {loss:.4f} (-0.0%)' in line
               for loss, line in zip(losses[2:], lines[3:], strict=False))
    assert f'** -0.1000; at ten times the FLOPs of the largest {losses[-1] * 10 ** -0.1:.3f}' in lines[-1]


def test_what_the_last_size_lost_does_not_help_to_predict_it():
    rungs = [Rung(*ladder.parse_size(size), 20) for size in ladder.SIZES]
    losses = [50 * rung.flops ** -0.1 for rung in rungs[:4]]
    lines = ladder.table(rungs, [*losses, 4.0]).splitlines()
    guess = 50 * rungs[4].flops ** -0.1
    assert f'4.0000   {guess:.4f} ({guess / 4 - 1:+.1%})' in lines[5]


@pytest.mark.parametrize('size', ['64', '64x0', 'x2', '60x2', '64x2x2', '-64x2'])
def test_a_size_that_is_none_is_refused(size, capsys):
    with pytest.raises(SystemExit):
        ladder.parse_args(['--sizes', size])
    assert 'WIDTHxLAYERS' in capsys.readouterr().err or size.startswith('-')


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    ladder.check_overrides(tmp_path, ['optimizer.lr=1e-3'])
    ladder.check_overrides(tmp_path, ['optimizer.lr=1e-3'])
    with pytest.raises(UserError, match='--out: the models in .* name another folder'):
        ladder.check_overrides(tmp_path, ['optimizer.lr=2e-3'])


@pytest.mark.slow
def test_a_ladder_is_stopped_and_goes_on(tmp_path):
    command = [sys.executable, 'src/ladder.py', '--out', str(tmp_path), '--sizes', '16x1', '32x1', '48x1',
               '--tokens_per_parameter', '4', 'save_interval=2ba']
    env = {**os.environ, 'CUDA_VISIBLE_DEVICES': ''}
    log = tmp_path / '48x1-159ba.log'
    with subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 300
        while ladder.trained_batches(log) < 50 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and 'the same command goes on' in err
    stopped = re.search(r'stopped on request after batch (\d+)', log.read_text())
    assert stopped

    out = subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, text=True, timeout=600).stdout
    assert f'ep0-ba{stopped[1]}' in log.read_text()
    rows = [line.split() for line in out.splitlines()[1:4]]
    assert [row[0] + row[1] + row[2] for row in rows] == ['16x1', '32x1', '48x1']
    losses = [float(row[6 - 1 + 1]) for row in rows]
    assert all(3 < loss < 7 for loss in losses) and losses[2] < losses[0]
    assert 'loss = ' in out and '%)' in out.splitlines()[3]
