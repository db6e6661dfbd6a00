"""Long work shows a progress bar on a terminal, and nothing without a terminal."""

import errno
import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
from launch import ROOT, clean_env
from test_callbacks import train

from src.callbacks import metrics
from src.common import progress

BAR = """
import sys
sys.path.insert(0, {root!r})
from src.common.progress import progress
with progress('work', 3000, 'B') as bar:
    for _ in range(3):
        bar.mininterval = 0
        bar.update(1000)
print('done')
"""


def on_a_terminal(*command: str, **env: str) -> str:
    """Runs a command with a terminal as stderr; returns what the command writes there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 120, 0, 0))  # rows and columns, which a new terminal lacks
    process = subprocess.Popen(command, cwd=ROOT, env=without_switch(**env), stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    seen = b''
    try:
        while part := os.read(ours, 4096):
            seen += part
    except OSError as e:  # Linux's error when all writers have closed the terminal
        assert e.errno == errno.EIO
    finally:
        os.close(ours)
    assert process.wait(300) == 0, seen
    return seen.decode()


def without_terminal(*command: str, **env: str) -> str:
    done = subprocess.run(command, cwd=ROOT, env=without_switch(**env), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr


def without_switch(**env: str) -> dict[str, str]:
    """The environment without the variable by which conftest.py switches all bars off."""
    return {key: value for key, value in clean_env(**env).items() if key != 'TQDM_DISABLE'}


def test_a_bar_is_for_the_terminal_of_rank_0() -> None:
    command = sys.executable, '-c', BAR.format(root=str(ROOT))
    seen = on_a_terminal(*command)
    assert 'work:  33%|' in seen and '1.00k/3.00k' in seen and 'work: 100%|' in seen
    assert on_a_terminal(*command, RANK='1') == '' == without_terminal(*command)


@pytest.mark.slow
def test_a_conversion_with_a_tokenizer_and_a_check(tmp_path: Path) -> None:
    source = tmp_path / 'source'
    source.mkdir()
    with (source / 'train.jsonl').open('w') as file:
        for i in range(2000):
            file.write(json.dumps({'text': f'Document {i} of a river, a mountain and a letter. ' * 5}) + '\n')
    program = [sys.executable, 'convert_c4.py']
    check = [*program, '--verify', str(tmp_path / 'out')]
    seen = on_a_terminal(*program, '--source', str(source), '--out_root', str(tmp_path / 'out'), '--splits', 'train',
                         '--train_tokenizer', '300')
    assert 'Compute merges' in seen and re.search(r'train: .*2\.00k', seen)
    seen = on_a_terminal(*check)
    assert re.search(rf'{re.escape(str(tmp_path / "out/train"))}: +\d+%\|.*B/s', seen)
    assert without_terminal(*check) == ''


def test_tokens_of_a_batch_of_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    from src.tools import generate

    monkeypatch.setattr(generate, 'progress', lambda *args: progress.tqdm(total=args[1], disable=False, file=io.StringIO()))
    bar = generate.TokenBar(5)
    for value in (torch.zeros(2, 7), torch.zeros(2), torch.zeros(2)):
        bar.put(value)
    assert (bar.bar.n, bar.bar.total) == (2, 5), 'the prompts are no new tokens'


@pytest.mark.parametrize('batches', [0, 2])
def test_a_resumed_run_shows_how_far_it_has_read(batches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Composer reads the batches of the epoch that the checkpoint has seen again, and drops them."""
    bars = []

    def bar(*args: object, **kwargs: object) -> progress.tqdm:
        bars.append(progress.tqdm(total=args[1], disable=False, file=io.StringIO()))
        return bars[-1]

    class Counters(metrics.StepCounters):
        def batch_end(self, state: object, logger: object) -> None:
            """Does not count tokens: this model has none."""

    options = {}
    if batches:
        trainer = train(5, save_folder=str(tmp_path), save_interval='1ba', max_duration=f'{batches}ba')
        trainer.fit()
        trainer.close()
        options = {'load_path': str(tmp_path / f'ep0-ba{batches}-rank0.pt')}
    monkeypatch.setattr(metrics, 'progress', bar)
    trainer = train(5, callbacks=[Counters()], **options)
    trainer.fit()
    trainer.close()
    assert [(bar.n, bar.total) for bar in bars] == ([(batches + 1, batches + 1)] if batches else [])
    assert int(trainer.state.timestamp.batch) == 5
