"""The ladder of models: its sizes and recipes, its power law, and a small ladder that is stopped, continues and ends."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from launch import ROOT

from src.common.errors import UserError
from src.common.flops import train_flops_per_token
from src.config import load as config
from src.config.schema import Config
from src.model_registry import COMPOSER_MODEL_REGISTRY
from src.ranks.stop import EXIT_STOPPED
from src.sizing.power_law import Law, fit, flops_for
from src.tools import ladder
from src.tools.ladder import Rung


@pytest.mark.parametrize('number', ['0', '-3', 'nan', 'inf', 'many'])
def test_a_length_that_is_none_is_refused(number, capsys):
    with pytest.raises(SystemExit):
        ladder.parse_args([f'--tokens_per_parameter={number}'])
    assert re.search(rf"{number} is not a number above 0|invalid positive_float value: '{number}'", capsys.readouterr().err)


def test_a_file_in_place_of_the_folder_is_named(tmp_path, monkeypatch):
    (tmp_path / 'file').touch()
    monkeypatch.setattr(ladder, 'prepare', lambda out, source: pytest.fail(f'{out} is made'))
    with pytest.raises(UserError, match=f'--out: {tmp_path}/file cannot be made: File exists'):
        ladder.main(ladder.parse_args([f'--out={tmp_path}/file']))


@pytest.mark.parametrize('size', ladder.SIZES)
@pytest.mark.parametrize('recipe', ladder.RECIPES)
def test_a_size_has_the_parameters_that_it_says(recipe, size, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rung = Rung(recipe, *ladder.parse_size(size), 20, rate=8e-3, seed=3)
    cfg = config.load(rung.arguments(tmp_path, tmp_path))
    c = Config.model_validate(config.to_plain(cfg))
    model = COMPOSER_MODEL_REGISTRY[c.model.name](c.model)
    assert (c.model.name, c.optimizer.name) == {'plain': ('mosaic_gpt', 'decoupled_adamw'), 'modern': ('modern_gpt', 'muon')}[recipe]
    assert c.optimizer.lr == pytest.approx(8e-3 * (128 / rung.d_model) ** 0.5, rel=0.01) and c.seed == c.model.init_seed == 3
    assert rung.flops == rung.tokens * train_flops_per_token(model.n_params, model.n_layers, model.d_model, 128)
    assert sum(p.numel() for p in model.parameters()) == rung.n_params
    assert rung.tokens / rung.n_params == pytest.approx(20, rel=0.001)
    assert c.max_duration == f'{rung.batches}ba' and c.global_train_batch_size * c.max_seq_len * rung.batches == rung.tokens


def test_a_power_law_is_recovered_and_predicts_the_next_size():
    rungs = [Rung('plain', *ladder.parse_size(size), 20) for size in ladder.SIZES]
    losses = [2 + 1000 * rung.flops ** -0.25 for rung in rungs]
    floor, _, exponent = fit([rung.flops for rung in rungs], losses)
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
    assert fit(flops, [50 * f ** -0.1 for f in flops])[0] < 0.01


def test_what_the_last_size_lost_does_not_help_to_predict_it():
    rungs = [Rung('plain', *ladder.parse_size(size), 20) for size in ladder.SIZES]
    losses = [2 + 1000 * rung.flops ** -0.25 for rung in rungs]
    rows = [ladder.table(rungs, [*losses[:4], last]).splitlines()[5] for last in (losses[4], 4.0)]
    guesses = [re.search(r'\d\.\d{4}   (\d\.\d{4}) \(', row) for row in rows]
    assert guesses[0] and guesses[1] and guesses[0][1] == guesses[1][1]


@pytest.mark.parametrize('size', ['64', '64x0', 'x2', '60x2', '64x2x2', '-64x2'])
def test_a_size_that_is_none_is_refused(size, capsys):
    with pytest.raises(SystemExit):
        ladder.parse_args(['--sizes', size])
    said = capsys.readouterr().err
    assert ('expected at least one' if size.startswith('-') else 'is not WIDTHxLAYERS with a width in multiples of 32') in said


def test_a_model_that_ended_without_its_last_evaluation_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(ladder, 'prepare', lambda out, source: out)
    monkeypatch.setattr(ladder, 'train_all', lambda *_: None)
    with pytest.raises(UserError, match='plain-32x1-48ba: the run ended without its last .*; delete .*/checkpoints/plain-32x1-48ba'):
        ladder.main(ladder.parse_args(['--out', str(tmp_path), '--sizes', '32x1', '--tokens_per_parameter', '2']))


def test_data_of_another_source_are_not_trained_on(tmp_path):
    for split in ('train', 'val'):
        (tmp_path / 'data' / split).mkdir(parents=True)
        (tmp_path / 'data' / split / 'manifest.json').write_text('{"source": "sample", "text_bytes": 5, "tokens": 1}')
    assert ladder.prepare(tmp_path, 'sample') == tmp_path / 'data'
    with pytest.raises(UserError, match=f'--source: /my/text, but {tmp_path}/data holds text of sample, on .*; delete {tmp_path}, or set'):
        ladder.prepare(tmp_path, '/my/text')


@pytest.mark.parametrize('source', ['', 'hub'])
def test_a_source_that_is_no_folder_is_refused(source):
    with pytest.raises(UserError, match=f"--source: '{source}' is no folder of text; name one, or sample"):
        ladder.parse_args([f'--source={source}'])


def test_a_loss_that_no_cheaper_run_reached_counts():
    flops, losses = [1e13, 1e12, 2e12, 5e12], [3.0, 4.0, 4.2, 3.5]  # out of order, and one is worse than a cheaper one
    assert flops_for(3.5, flops, losses) == pytest.approx(5e12) and flops_for(4.0, flops, losses) == pytest.approx(1e12)
    assert 1e12 < flops_for(3.9, flops, losses) < 5e12
    with pytest.raises(UserError, match='--recipes: no larger run has a lower loss, so FLOPs cannot be compared; train longer'):
        flops_for(4.0, [1e12, 1e13], [4.0, 4.0])


def test_two_recipes_need_three_sizes():
    with pytest.raises(UserError, match='--recipes: two need at least three --sizes to compare, and there are 2'):
        ladder.parse_args(['--recipes', 'plain', 'modern', '--sizes', '32x1', '64x1', '64x1'])


def test_flops_for_equal_loss_are_those_of_the_power_law():
    law, flops = Law(0, 50, 0.1), [1e12, 1e13, 1e14]
    for wanted in (3e11, 2e12, 5e13, 2e15):  # also outside of the runs
        assert flops_for(law.loss(wanted), flops, [law.loss(f) for f in flops]) == pytest.approx(wanted)
    plain = [law.loss(f / 2.5) for f in flops]
    lines = ladder.comparison(['plain', 'modern'], [flops, flops], [plain, [law.loss(f) for f in flops]]).splitlines()[1:]
    assert [line.rpartition('   ')[2] for line in lines] == ['2.50 times fewer, extrapolated', *['2.50 times fewer'] * 2]


def test_the_best_rate_of_each_recipe_is_taken(tmp_path, monkeypatch, capsys):
    """The smallest size tries each rate; the larger sizes take the best one, and the middle one some seeds."""
    trained = []
    monkeypatch.setattr(ladder, 'prepare', lambda out, source: out)
    monkeypatch.setattr(ladder, 'train_all', lambda rungs, *_: trained.append({rung.name for rung in rungs}))
    best = {'plain': 0.008, 'modern': 0.002}
    monkeypatch.setattr(Rung, 'loss', lambda rung, out: 4 + abs(rung.rate - best[rung.recipe]) + rung.seed / 1000)
    args = ladder.parse_args(['--sizes', '64x1', '32x1', '32x2', '--tokens_per_parameter', '2', '--recipes', 'plain', 'modern',
                              '--rates', '2e-3', '4e-3', '8e-3', '--seeds', '2'])
    ladders = ladder.train_ladders(args, tmp_path)
    first, second = trained
    assert first == {'plain-32x1-48ba-lr0.002', 'plain-32x1-48ba', 'plain-32x1-48ba-lr0.008', 'modern-32x1-48ba-lr0.002',
                     'modern-32x1-48ba', 'modern-32x1-48ba-lr0.008'}
    assert {rung.rate for rung in ladders['plain']} == {0.008} and {rung.rate for rung in ladders['modern']} == {0.002}
    assert [(rung.d_model, rung.n_layers) for rung in ladders['modern']] == [(32, 1), (32, 2), (64, 1)]
    assert second == {rung.name for rungs in ladders.values() for rung in rungs} | {
        f'{rungs[1].name}-seed18' for rungs in ladders.values()}
    said = capsys.readouterr().out
    assert 'modern, smallest size, loss by peak learning rate: 0.002: 4.0170, 0.004: 4.0190, 0.008: 4.0230\n' in said
    assert 'plain, size in the middle, loss by seed: 4.0170, 4.0180\n' in said


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_ladder_is_stopped_and_goes_on(tmp_path):
    command = [sys.executable, 'src/tools/ladder.py', '--out', str(tmp_path), '--sizes', '32x1', '64x1', '96x1',
               '--tokens_per_parameter', '3', '--recipes', 'plain', 'modern']
    env = {**os.environ, 'CUDA_VISIBLE_DEVICES': ''}
    log = tmp_path / f'{Rung("modern", 96, 1, 3).name}.log'
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
    rows = [line.split() for line in re.findall(r'^ +\d+ x \d .*$', out, re.MULTILINE)]
    assert [''.join(row[:3]) for row in rows] == ['32x1', '64x1', '96x1'] * 2
    losses = [float(row[6]) for row in rows]
    assert all(3 < loss < 7 for loss in losses) and losses[2] < losses[0] and losses[5] < losses[3]
    assert len(re.findall(r'loss = \d\.\d+ \+ ', out)) == 2 and len(re.findall(r'\d+\.\d\d times fewer', out)) == 3
    assert all((tmp_path / f'loss-curve-{theme}.png').exists() for theme in ('light', 'dark'))
