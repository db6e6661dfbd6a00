"""Mistakes are found before torch and Composer are imported, with the message of the whole check."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch import ROOT, clean_env, composer, free_port

from src.common import program
from src.common.errors import UserError
from src.config.check import check, check_without_torch
from src.config.load import load
from src.ranks import environment
from src.training import early
from src.training.plugins import REGISTRIES

QUICKSTART = 'yamls/quickstart.yaml'
MISSPELT = "error: 1 mistake in the config:\n  - optimzer: no such key; did you mean 'optimizer'?\n"


@pytest.fixture
def no_libraries(tmp_path: Path) -> str:
    """A folder for PYTHONPATH in which torch, Composer and others end the process that imports them."""
    for name in ('torch', 'composer', 'streaming', 'transformers', 'matplotlib', 'numpy'):
        (tmp_path / f'{name}.py').write_text(f'import os\nos.write(2, b"{name} is imported")\nos._exit(99)\n')
    return str(tmp_path)


def run(no_libraries: str, *command: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=clean_env(PYTHONPATH=no_libraries, **env),
                          capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize(('command', 'error'), [
    (['main.py', QUICKSTART, 'optimzer.lr=1'], MISSPELT),
    (['main.py', '--dry_run', QUICKSTART, 'optimzer.lr=1'], MISSPELT),
    (['main.py', 'yamls/quickstrat.yaml'], 'error: yamls/quickstrat.yaml: no such file. Did you mean yamls/quickstart.yaml?\n'),
    (['main.py', QUICKSTART, 'grad_clip_norm=2', 'optimzer.lr=1'],
     "config: grad_clip_norm: read as algorithms.gradient_clipping={'clipping_type': 'norm', 'clipping_threshold': 2}\n" + MISSPELT),
    (['src/tools/estimate.py', QUICKSTART, 'optimzer.lr=1'], MISSPELT),
    (['src/tools/estimate.py', '--mfu', '2'], 'error: --mfu: 2 must be above 0 and at most 1, such as 0.4\n'),
    (['src/tools/benchmark.py', QUICKSTART, 'optimzer.lr=1'], MISSPELT),
    (['src/tools/benchmark.py', QUICKSTART, '--sweep', 'lr'], "error: --sweep: 'lr' must have the form key=a,b,c\n"),
    (['src/tools/evaluate.py', QUICKSTART, 'optimzer.lr=1'], MISSPELT),
    (['src/tools/generate.py', 'x', 'y', '--seed', '-1'], 'error: --seed: -1; give a whole number of 0 or more\n'),
    (['src/tools/plot_loss.py', 'x', '--out', 'loss.gif'],
     'error: --out: loss.gif; the ending must be one of .png, .svg, .pdf\n'),
], ids=lambda value: ' '.join(value) if isinstance(value, list) else '')
def test_a_mistake_is_told_before_torch_is_imported(command: list[str], error: str, no_libraries: str) -> None:
    done = run(no_libraries, *command)
    assert (done.returncode, done.stderr, done.stdout) == (1, error, '')


@pytest.mark.parametrize('command', [['benchmark.py'], ['evaluate.py'], ['export_hf.py'], ['ladder.py', '--sizes', 'big']],
                         ids=' '.join)
def test_a_wrong_argument_is_told_before_torch_is_imported(command: list[str], no_libraries: str) -> None:
    done = run(no_libraries, 'src/tools/' + command[0], *command[1:])
    assert done.returncode == 2
    assert done.stderr.startswith(f'usage: {command[0]} ') and f'\n{command[0]}: error: ' in done.stderr


def test_without_a_mistake_the_program_goes_on_to_torch(no_libraries: str) -> None:
    """Otherwise the tests above could pass because of a program that never imports anything."""
    for command in (['main.py', QUICKSTART], ['src/tools/evaluate.py', QUICKSTART], ['src/tools/estimate.py']):
        assert run(no_libraries, *command).returncode == 99


@pytest.mark.parametrize('mistakes', [
    ['optimzer.lr=1'], ['model.d_model=abc', 'max_duration=5', 'callbacks.lr_moniter={}'], ['model.n_heads=3'],
    ['loggers.file=true', 'save_interval=0ba', 'algorithms.emma={}'], ['eval_samples=0', 'scheduler.t_warmup=9999ba'],
    ['optimizer.momentum=0.9', 'optimizer.cautious=true', 'scheduler.cooldown=0.5'],
    ['model.name=gpt'], ['optimizer.betas=[0.9]', 'load_weights_only=true', 'optimizer.eps=x'],
], ids=' '.join)
def test_the_message_is_that_of_the_whole_check(mistakes: list[str]) -> None:
    def message(find) -> str:
        with pytest.raises(UserError) as e:
            find(load([str(ROOT / QUICKSTART), *mistakes]), REGISTRIES, 1)
        return str(e.value)

    whole = message(lambda *args: check(*args, has_gpu=False))
    assert message(check_without_torch) == whole
    assert whole.count('\n  - ') == len(mistakes)


@pytest.mark.parametrize('setting', ['precision=amp_bf16', 'device_train_microbatch_size=auto', 'model.attn_impl=flash',
                                     'callbacks.oom_observer={}', 'compile_config.backend=x', 'callbacks.lr_monitor.x=1',
                                     'train_loader.dataset.cache_limit=1gb'])
def test_what_depends_on_the_machine_or_a_class_is_left_to_the_whole_check(setting: str) -> None:
    cfg = load([str(ROOT / QUICKSTART), setting, 'device_eval_batch_size=8'])
    check_without_torch(cfg, REGISTRIES, 1)
    with pytest.raises(UserError, match=setting.split('=')[0].removeprefix('train_loader.')):
        check(cfg, REGISTRIES, 1, has_gpu=False)


def test_an_estimate_knows_that_it_is_about_gpus() -> None:
    cfg = load([str(ROOT / QUICKSTART), 'callbacks.memory_snapshot={}', 'callbacks.oom_observer={}'])
    check_without_torch(cfg, REGISTRIES, 1)
    with pytest.raises(UserError, match='callbacks.oom_observer: records nothing after callbacks.memory_snapshot'):
        check_without_torch(cfg, REGISTRIES, 1, gpu=[True])


def test_the_number_of_ranks_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = {'RANK': '1', 'WORLD_SIZE': '3', 'LOCAL_RANK': '1', 'LOCAL_WORLD_SIZE': '3', 'NODE_RANK': '0'}
    for name, value in {**launcher, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': '29500'}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match='global_train_batch_size: 8 does not divide by 3 devices; set 6 or 9'):
        early.check_command_line([str(ROOT / QUICKSTART)])
    monkeypatch.delenv('NODE_RANK')
    with pytest.raises(UserError, match='NODE_RANK: not set, although RANK=1'):
        early.check_command_line([str(ROOT / QUICKSTART)])


# ---------------------------------------------------------------- several ranks
def test_of_two_ranks_one_prints_the_mistake(no_libraries: str) -> None:
    launcher = {'WORLD_SIZE': '2', 'LOCAL_WORLD_SIZE': '2', 'NODE_RANK': '0', 'MASTER_ADDR': '127.0.0.1',
                'MASTER_PORT': str(free_port())}
    ranks = [subprocess.Popen([sys.executable, 'main.py', QUICKSTART, 'optimzer.lr=1'], cwd=ROOT, text=True,
                              env=clean_env(PYTHONPATH=no_libraries, RANK=str(i), LOCAL_RANK=str(i), **launcher),
                              stderr=subprocess.PIPE) for i in (0, 1)]
    assert ranks[0].communicate(timeout=100)[1] == MISSPELT and ranks[0].returncode == 1
    ranks[1].terminate()  # as the launcher does
    assert ranks[1].communicate(timeout=100)[1] == ''


def test_a_mistake_of_another_rank_alone_names_that_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    monkeypatch.setattr(time, 'sleep', waited.append)
    monkeypatch.setenv('RANK', '3')
    monkeypatch.setenv('NODE_RANK', '1')
    with pytest.raises(SystemExit) as e:
        environment.leave_together(UserError('no such key'))
    assert str(e.value) == f'rank 3 on node 1 ({os.uname().nodename}):\nerror: no such key'
    assert waited == [environment.WAIT_FOR_RANK_0_S]


@pytest.mark.slow
def test_composers_launcher_shows_one_message() -> None:
    done = composer(QUICKSTART, 'optimzer.lr=1', ranks=2)
    assert done.returncode == 1
    assert (done.stdout + done.stderr).count(MISSPELT) == 1


# ---------------------------------------------------------------- what is printed, what is imported
def test_what_a_check_prints_is_shown_only_before_a_mistake(capfd: pytest.CaptureFixture) -> None:
    def find(error: BaseException) -> None:
        print('config: an old key', file=sys.stderr)
        raise error

    program.check_early(lambda: print('config: an old key', file=sys.stderr))
    assert capfd.readouterr().err == ''
    with pytest.raises(SystemExit, match='error: no such key'):
        program.check_early(lambda: find(UserError('no such key')))
    assert capfd.readouterr().err == 'config: an old key\n'
    with pytest.raises(SystemExit, match='2'):
        program.check_early(lambda: find(SystemExit(2)))
    assert capfd.readouterr().err == 'config: an old key\n'
    with pytest.raises(SystemExit, match='130'):
        program.check_early(lambda: find(KeyboardInterrupt()))


IMPORTS = """import sys
import composer, streaming
before = {name.split('.')[0] for name in sys.modules}
import main, composer.algorithms
print(*sorted({name.split('.')[0] for name in sys.modules} - before - sys.stdlib_module_names))
print([name for name in ('torchao', 'torch._inductor.lowering', 'tensorboard', 'wandb', 'datasets') if name in sys.modules])"""
# omegaconf and pydantic read the config. The others take milliseconds; attr belongs to omegaconf, xxhash to streaming.
OURS = {'src', 'main', 'omegaconf', 'pydantic', 'pydantic_core', 'annotated_types', 'typing_inspection', 'attr', 'xxhash'}


@pytest.mark.slow
def test_a_run_imports_little_that_composer_does_not_import() -> None:
    done = subprocess.run([sys.executable, '-c', IMPORTS], cwd=ROOT, env=clean_env(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    new, slow = done.stdout.splitlines()[-2:]
    assert slow == '[]'
    assert {*new.split()} <= OURS
