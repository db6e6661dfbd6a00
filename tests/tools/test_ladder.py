"""The ladder of models: its sizes, its power law, and a small ladder that is stopped, continues and ends."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from launch import ROOT

from src.common.errors import UserError
from src.config import load as config
from src.config.schema import Config, MosaicGPTConfig
from src.mosaic_gpt import MosaicGPT
from src.ranks.stop import EXIT_STOPPED
from src.tools import ladder
from src.tools.ladder import Rung


@pytest.mark.parametrize('number', ['0', '-3', 'nan', 'inf', 'many'])
def test_a_length_that_is_none_is_refused(number, capsys):
    with pytest.raises(SystemExit):
        ladder.parse_args([f'--tokens_per_parameter={number}'])
    assert re.search(rf"{number} is not a number above 0|invalid positive_float value: '{number}'", capsys.readouterr().err)


def test_a_file_in_place_of_the_folder_is_named(tmp_path, monkeypatch):
    (tmp_path / 'file').touch()
    monkeypatch.setattr(ladder, 'prepare', lambda out: pytest.fail(f'{out} is made'))
    with pytest.raises(UserError, match=f'--out: {tmp_path}/file cannot be made: File exists'):
        ladder.main(ladder.parse_args([f'--out={tmp_path}/file']))


@pytest.mark.parametrize('size', ladder.SIZES)
def test_a_size_has_the_parameters_that_it_says(size, tmp_path):
    rung = Rung(*ladder.parse_size(size), 20)
    cfg = config.load(rung.arguments(tmp_path, tmp_path))
    c = Config.model_validate(config.to_plain(cfg))
    assert isinstance(c.model, MosaicGPTConfig)
    with torch.device('meta'):
        model = MosaicGPT(c.model.model_copy(update={'device': 'meta'}))
    assert sum(p.numel() for p in model.parameters()) == rung.n_params
    assert rung.tokens / rung.n_params == pytest.approx(20, rel=0.001)
    assert c.max_duration == f'{rung.batches}ba' and c.global_train_batch_size * c.max_seq_len * rung.batches == rung.tokens


def test_a_power_law_is_recovered_and_predicts_the_next_size():
    rungs = [Rung(*ladder.parse_size(size), 20) for size in ladder.SIZES]
    losses = [2 + 1000 * rung.flops ** -0.25 for rung in rungs]
    floor, _, exponent = ladder.fit([rung.flops for rung in rungs], losses)
    assert (floor, exponent) == pytest.approx((2, 0.25), rel=0.01)
    lines = ladder.table(rungs, losses).splitlines()
    assert len(lines) == 7 and not any('%' in line for line in lines[:4])
    for loss, line in zip(losses[3:], lines[4:6]):
        found = re.search(rf'{loss:.4f}   (\d\.\d+) \([+-]0\.\d%\)', line)
        assert found and float(found[1]) == pytest.approx(loss, rel=0.003)
    assert 'at ten times the FLOPs of the largest' in lines[-1]
    assert float(lines[-1].split()[-1]) == pytest.approx(2 + 1000 * (10 * rungs[-1].flops) ** -0.25, rel=0.005)


def test_losses_without_a_floor_are_fitted_too():
    flops = [1e12, 1e13, 1e14]
    assert ladder.fit(flops, [50 * f ** -0.1 for f in flops])[0] < 0.01


def test_what_the_last_size_lost_does_not_help_to_predict_it():
    rungs = [Rung(*ladder.parse_size(size), 20) for size in ladder.SIZES]
    losses = [2 + 1000 * rung.flops ** -0.25 for rung in rungs]
    rows = [ladder.table(rungs, [*losses[:4], last]).splitlines()[5] for last in (losses[4], 4.0)]
    guesses = [re.search(r'\d\.\d{4}   (\d\.\d{4}) \(', row) for row in rows]
    assert guesses[0] and guesses[1] and guesses[0][1] == guesses[1][1]


@pytest.mark.parametrize('size', ['64', '64x0', 'x2', '60x2', '64x2x2', '-64x2'])
def test_a_size_that_is_none_is_refused(size, capsys):
    with pytest.raises(SystemExit):
        ladder.parse_args(['--sizes', size])
    said = capsys.readouterr().err
    assert ('expected at least one' if size.startswith('-') else 'is not WIDTHxLAYERS with a width in multiples of 16') in said


def test_a_model_that_ended_without_its_last_evaluation_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(ladder, 'prepare', lambda out: out)
    monkeypatch.setattr(ladder, 'train_all', lambda *_: None)
    with pytest.raises(UserError, match='16x1-21ba: the run ended without its last evaluation; delete .*/checkpoints/16x1-21ba'):
        ladder.main(ladder.parse_args(['--out', str(tmp_path), '--sizes', '16x1', '--tokens_per_parameter', '2']))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_ladder_is_stopped_and_goes_on(tmp_path):
    command = [sys.executable, 'src/tools/ladder.py', '--out', str(tmp_path), '--sizes', '16x1', '32x1', '48x1',
               '--tokens_per_parameter', '6']
    env = {**os.environ, 'CUDA_VISIBLE_DEVICES': ''}
    log = tmp_path / f'{Rung(48, 1, 6).name}.log'
    with subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 300
        while not (log.exists() and '[batch=50/' in log.read_text()) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    assert process.returncode == EXIT_STOPPED and 'run the same command again' in err
    stopped = re.search(r'stopped on request after batch (\d+)', log.read_text())
    assert stopped

    out = subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, text=True, timeout=600).stdout
    assert f'ep0-ba{stopped[1]}' in log.read_text()
    rows = [line.split() for line in out.splitlines()[1:4]]
    assert [row[0] + row[1] + row[2] for row in rows] == ['16x1', '32x1', '48x1']
    losses = [float(row[6]) for row in rows]
    assert all(3 < loss < 7 for loss in losses) and losses[2] < losses[0]
    assert re.search(r'loss = \d\.\d+ \+ ', out)
    assert all((tmp_path / f'loss-curve-{theme}.png').exists() for theme in ('light', 'dark'))
