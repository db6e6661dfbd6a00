"""The whole first run of a newcomer: the sample, its tokenizer, and the quick start through the launcher."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from launch import ROOT, clean_env, composer, console


def learns_the_sample(tmp_path: Path, **env: str) -> None:
    copy = tmp_path / 'my-copy-c4'
    convert = subprocess.run([sys.executable, 'convert_c4.py', '--source', 'sample', '--out_root', str(copy)], cwd=ROOT,
                             env=clean_env(), capture_output=True, text=True)
    assert convert.returncode == 0, convert.stderr
    result = composer('yamls/quickstart.yaml', f'data_remote={copy}', f'save_folder={tmp_path}/checkpoints/{{run_name}}',
                      f'loggers.tensorboard.log_dir={tmp_path}/runs', timeout=1500, **env)
    text = result.stdout + result.stderr
    assert result.returncode == 0, text[-3000:]
    evals = [float(v) for v in re.findall(r'Eval metrics/eval/LanguageCrossEntropy: (\S+)', text)]
    assert len(evals) >= 4 and evals == sorted(evals, reverse=True), 'before, during and after, each better'
    assert evals[0] == pytest.approx(8.32, abs=0.5)  # ln 4096: an untrained model
    unigram = float(re.findall(r'unigram +(\S+)', text)[0])
    assert 6 < unigram < 7.5 and evals[-1] < unigram - 1
    losses = [float(v) for v in console(text)['loss/train/total'].values()]
    assert losses[-1] < losses[0] - 2.5
    checkpoint = re.findall(r'checkpoint +(\S+)', text)[0]
    assert (ROOT / checkpoint).exists() and len(list((ROOT / checkpoint).parent.glob('ep*.pt'))) == 2


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_the_quick_start_learns_the_sample(tmp_path):
    learns_the_sample(tmp_path)
