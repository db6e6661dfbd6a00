"""The documentation: a test accounts for every command, links lead somewhere, and tables agree with the code."""

import ast
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import typing
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Optional

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import warm
import yaml
from composer.utils import FSDP2Config
from launch import ROOT, SCRIPTS, clean_env, console, free_port, tiny
from torch import Tensor, nn

import convert_c4
import main
from src.attention import Documents, torch_attention
from src.common.errors import UserError
from src.common.flops import train_flops_per_token
from src.config import load as config
from src.config.check import check
from src.config.schema import Config, FSDPConfig, MosaicGPTConfig
from src.conversion import sample_corpus
from src.data_c4 import parse_args
from src.mosaic_gpt import GPTMLP, GPTBlock, MosaicGPT
from src.ranks import stop
from src.tools import benchmark, estimate, evaluate, export_hf, generate, import_hf, ladder, plot_loss
from src.training import data, plugins, report

DOCS = {str(path.relative_to(ROOT)): path.read_text() for path in sorted([
    *ROOT.glob('*.md'), *ROOT.glob('.github/*.md'), *ROOT.glob('assets/*.md'),
    *(path for folder in ('src', 'tests', 'yamls') for path in ROOT.glob(f'{folder}/**/*.md'))])}
GUIDES = {'src/README.md', 'tests/README.md', 'yamls/README.md',
          *(f'src/{room}/README.md' for room in ('checkpoints', 'conversion', 'loader', 'ranks', 'tools', 'training'))}
QUICKSTART = 'yamls/quickstart.yaml'
SHORT = ('max_duration=4ba', 'eval_interval=4ba', 'scheduler.t_warmup=1ba')


def blocks(language: str, text: str) -> list[str]:
    """The fenced code blocks of a language, also those inside a list."""
    found = re.findall(rf'^( *)```{language}\n(.*?)^ *```$', text, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for _, block in found]


def commands() -> dict[str, list[str]]:
    """Every command of every `bash` block, with what the comments on its line or above say that it needs, by place."""
    found: dict[str, list[str]] = {}
    for paragraph in (part for text in DOCS.values() for block in blocks('bash', text) for part in block.split('\n\n')):
        above = ''
        for line in filter(None, paragraph.splitlines()):
            command, _, comment = line.partition('#')
            needs = re.search(r'\bneeds (.+)$', comment)
            if command:
                found.setdefault(command.rstrip(), []).append(needs[1] if needs else above)
            else:
                above = needs[1] if needs else ''
    return found


# How each command is checked. `test_...`: that test, here or in the file named, runs the command in a small form.
# `needs ...: ` is what the documentation says beside the command. `test_its_arguments_are_valid` checks the arguments of
# every command.
BY_ARG = BY_ENV = 'needs GPUs, two nodes: test_nodes.py::test_two_hosts_train_as_one_rank_does'
CHECKED = {
    'python3 -m venv .venv && source .venv/bin/activate': 'network: .ci/run does it',
    'pip install -r requirements.txt && python convert_c4.py --source sample --out_root ./my-copy-c4 '
    '&& composer main.py yamls/quickstart.yaml':
        'network: pip. The rest: test_quickstart.py::test_the_quick_start_learns_the_sample',
    'python src/tools/plot_loss.py runs/* --out loss.png': 'test_plot_loss.py::test_the_picture_is_drawn_in_both_themes',
    'python src/tools/plot_loss.py runs/* --x flops --log --smooth 20 --envelope --theme both --out loss.svg':
        'test_plot_loss.py::test_what_is_drawn_is_these_numbers',
    'python src/tools/benchmark.py yamls/quickstart.yaml --against hf --against bare':
        'test_benchmark.py::test_rivals_are_the_same_model',
    'python src/tools/benchmark.py yamls/quickstart.yaml --sweep model.attn_impl=torch,sdpa --sweep device_train_microbatch_size=4,8 '
    '--append':
        'test_benchmark.py::test_a_sweep_has_a_row_for_each_combination',
    'python src/tools/benchmark.py yamls/quickstart.yaml --profile --out benchmark.profile':
        'test_benchmark.py::test_a_profile_is_a_trace_and_a_table',
    'composer main.py yamls/quickstart.yaml callbacks.profiler={} max_duration=20ba scheduler.t_warmup=1ba':
        'test_builders.py::test_the_profiler_traces_the_active_batches_and_changes_no_loss',
    'composer src/tools/benchmark.py yamls/mosaic_gpt/125m.yaml --out benchmark.125m':
        'needs GPUs: test_benchmark.py::test_two_devices does it on CPUs',
    'python src/tools/evaluate.py yamls/quickstart.yaml load_path=checkpoints/first/ep0-ba1200-rank0.pt':
        'test_evaluate.py::test_text_is_what_a_plain_loop_finds',
    'composer src/tools/evaluate.py yamls/mosaic_gpt/125m.yaml load_path=s3://my-bucket/first/ep0-ba4800-rank0.pt --out val.json':
        'needs GPUs, a bucket: test_evaluate.py::test_every_sample_counts_once_on_any_number_of_ranks does it on CPUs',
    'python src/tools/ladder.py': 'test_ladder.py::test_a_ladder_is_stopped_and_goes_on',
    'python src/tools/estimate.py': 'test_estimate.py::test_the_table_of_all_is_in_the_readme',
    'python src/tools/estimate.py yamls/mosaic_gpt/7b.yaml --gpu h100-sxm --gpus 64 --mfu 0.5 --price 2':
        'test_estimate.py::test_one_yaml_is_a_report',
    'composer main.py yamls/quickstart.yaml data_remote=./my-bins tokenizer=null callbacks.text_samples=false':
        'test_the_guides_loader',
    'composer main.py yamls/quickstart.yaml --dry_run': 'test_dry_run.py::test_two_ranks_say_it_once',
    'pip install "lm_eval[hf]==0.4.13"': 'network: .ci/run does it, but for peft, in tests/requirements.txt',
    'lm_eval --model hf --model_args pretrained=./my-gpt --tasks hellaswag,lambada_openai --batch_size 8':
        'needs the hub: the tasks. test_lm_eval.py::test_lm_eval_finds_what_a_plain_loop_finds has one of its own',
    'pip install -r tests/requirements.txt && pytest': 'network: .ci/run does it',
    'pip install uv==0.13.9': 'network: by hand',
    "pip list --format=freeze | grep -E '^(torch|torchvision|transformers|tokenizers|huggingface.hub|numpy)=' > my-own.txt":
        'network: by hand, with the next',
    'uv pip install -r requirements.txt --override my-own.txt': 'network: by hand',
    'pip install flash-attn==2.8.3 --no-build-isolation': 'needs GPUs: test_flash_attn_command_is_that_of_the_requirements',
    'python convert_c4.py --out_root ./my-copy-c4 --splits val':
        'needs the hub: test_conversion.py::test_hub_that_fails_one_time_in_ten_gives_the_same_documents',
    'python convert_c4.py --out_root ./my-copy-c4 --splits train':
        'needs the hub: test_conversion.py::test_hub_that_fails_one_time_in_ten_gives_the_same_documents',
    'python convert_c4.py --source /data/c4/en --out_root ./my-copy-c4 --splits train val':
        'needs these files: test_convert_c4.py::test_folder_is_converted_in_order',
    'python convert_c4.py --out_root s3://my-bucket/my-c4-gpt2 --concat_tokens 2048 --tokenizer gpt2':
        'needs the hub, a bucket: test_conversion.py::test_s3_killed_then_in_partitions_holds_what_a_disk_would',
    'python convert_c4.py --out_root s3://my-bucket/my-copy-c4 --splits train --merge':
        'needs the hub, a bucket: test_conversion.py::test_s3_killed_then_in_partitions_holds_what_a_disk_would',
    'python convert_c4.py --verify ./my-copy-c4':
        'test_conversion.py::test_verify_names_what_is_damaged_and_the_same_command_mends_it',
    'python convert_c4.py --source sample --out_root ./my-copy-c4':
        'test_convert_c4.py::test_sample_has_enough_prose_and_no_paragraph_twice',
    'python convert_c4.py --source sample --out_root ./my-bpe --train_tokenizer 2048': 'test_another_tokenizer',
    'composer main.py yamls/quickstart.yaml data_remote=./my-bpe model.vocab_size=2048': 'test_another_tokenizer',
    'docker build -t starter-kit .': 'needs Docker, the network: test_the_dockerfile_is_that_of_the_kit',
    'docker run --rm --gpus all --ipc=host -v "$PWD/my-copy-c4:/kit/my-copy-c4" -v "$PWD/checkpoints:/kit/checkpoints" '
    'starter-kit composer main.py yamls/mosaic_gpt/125m.yaml save_folder=checkpoints/{run_name}':
        'needs Docker, GPUs: test_the_dockerfile_is_that_of_the_kit',
    'composer main.py yamls/mosaic_gpt/125m.yaml run_name=spot autoresume=true save_folder=s3://my-bucket/{run_name} '
    'save_interval=200ba save_num_checkpoints_to_keep=2':
        'needs GPUs, a bucket: test_kill.py::test_8_kills_with_data_and_checkpoints_on_a_failing_s3',
    'pip install py-spy==0.4.3': 'network: by hand',
    'py-spy dump --pid PID': 'needs a PID: by hand, on the ranks of test_a_rank_that_stands_still_ends_the_run_in_time',
    'mv my-copy-c4 my-sample': 'test_the_sample_makes_room_for_c4',
    'composer main.py yamls/quickstart.yaml data_remote=./my-sample': 'test_the_sample_makes_room_for_c4',
    'composer main.py yamls/mosaic_gpt/125m.yaml train_loader.dataset.split=val allow_same_split=true':
        'needs GPUs: test_training_on_val_alone',
    'python src/data_c4.py ./my-copy-c4 ./my-copy-c4': 'test_loader_in_place',
    'python src/data_c4.py ./my-copy-c4 /tmp/cache-c4': 'test_loader_copies_shards',
    'python src/data_c4.py s3://my-bucket/my-copy-c4 /tmp/cache-c4': 'needs a bucket: test_loader_from_s3',
    'composer main.py yamls/mosaic_gpt/125m.yaml data_remote=s3://my-bucket/my-copy-c4 data_local=/tmp/cache-c4':
        'needs GPUs, a bucket: test_loader_from_s3 reads such data',
    'composer main.py yamls/mosaic_gpt/125m.yaml': 'needs GPUs: test_yamls.py::test_shrunk_yaml_trains_two_steps',
    'composer --world_size 16 --node_rank 0 --master_addr 10.0.0.1 --master_port 7501 main.py yamls/mosaic_gpt/125m.yaml': BY_ARG,
    'composer --world_size 16 --node_rank 1 --master_addr 10.0.0.1 --master_port 7501 main.py yamls/mosaic_gpt/125m.yaml': BY_ARG,
    'torchrun --nnodes 2 --nproc_per_node 8 --node_rank 0 --master_addr 10.0.0.1 --master_port 7501 main.py '
    'yamls/mosaic_gpt/125m.yaml':
        'needs GPUs, two nodes: test_nodes.py::test_two_nodes_by_torchrun',
    'export WORLD_SIZE=16 NODE_RANK=0 MASTER_ADDR=10.0.0.1 MASTER_PORT=7501': BY_ENV,
    'composer main.py yamls/quickstart.yaml run_name=first autoresume=true': 'test_autoresume_starts_then_goes_on',
    'composer main.py yamls/quickstart.yaml run_name=first autoresume=true max_duration=2400ba': 'test_autoresume_starts_then_goes_on',
    'composer main.py yamls/quickstart.yaml run_name=second load_path=checkpoints/first load_weights_only=true':
        'test_checkpoints.py::test_weights_only_takes_the_weights_and_nothing_else',
    'composer main.py yamls/quickstart.yaml max_duration=100ba optimizer.lr=1e-3': 'test_a_shorter_run_with_another_learning_rate',
    'python convert_c4.py --source ./my-texts --out_root ./my-data':
        'needs these files: test_documents.py::test_text_files',
    'python convert_c4.py --dataset HuggingFaceFW/fineweb --config sample-10BT --splits train --out_root ./my-fineweb':
        'needs the hub: test_conversion.py::test_another_data_set_of_the_hub',
    'composer main.py yamls/mosaic_gpt/125m.yaml loggers.tensorboard.log_dir=./runs':
        'needs GPUs: test_end_to_end.py::test_tensorboard_and_wandb_hold_the_values_of_the_console',
    'tensorboard --logdir ./runs': 'a server: '
        'test_end_to_end.py::test_tensorboard_and_wandb_hold_the_values_of_the_console reads its files',
    'composer main.py yamls/mosaic_gpt/125m.yaml loggers.wandb.project=my-project':
        'needs GPUs, a W&B account: test_end_to_end.py::test_tensorboard_and_wandb_hold_the_values_of_the_console',
    'python src/tools/export_hf.py checkpoints/first ./my-gpt':
        'test_export_hf.py::test_a_sharded_checkpoint_without_the_padding_of_the_vocabulary',
    'python src/tools/export_hf.py s3://my-bucket/first/ep0-ba4800 ./my-125m': 'needs a bucket: test_export_hf.py::test_from_s3',
    'python src/tools/import_hf.py Qwen/Qwen3-0.6B-Base ./my-qwen3': 'needs the hub: test_import_hf.py::test_a_model_comes_back_bit_by_bit',
    'python src/tools/generate.py ./my-gpt "The class of an object"': 'test_generate.py::test_one_prompt_streams',
    'python src/tools/generate.py checkpoints/first "The class" "A function is" --max_new_tokens 50 --temperature 0.8 --top_k 50 '
    '--top_p 0.95 --seed 1':
        'test_generate.py::test_a_checkpoint_and_its_export_say_the_same',
    'composer main.py yamls/hf_causal_lm/gpt2-small.yaml model.pretrained_model_name_or_path=./my-gpt model.pretrained=true '
    'tokenizer_name=./my-gpt max_seq_len=128 optimizer.lr=1e-4 max_duration=500ba run_name=tuned '
    'save_folder=checkpoints/{run_name}':
        'needs GPUs: test_export_hf.py::test_fine_tuning_begins_with_the_loss_of_the_checkpoint',
    'composer main.py yamls/hf_causal_lm/gpt2-small.yaml model.pretrained=true max_seq_len=1024 optimizer.lr=3e-5 '
    'max_duration=500ba run_name=tuned-gpt2 save_folder=checkpoints/{run_name}':
        'needs GPUs, the hub: test_export_hf.py::test_fine_tuning_begins_with_the_loss_of_the_checkpoint',
    'composer main.py yamls/hf_causal_lm/gpt2-small.yaml model.pretrained_model_name_or_path=./my-gpt2 model.pretrained=true '
    'max_seq_len=1024':
        'needs GPUs: test_causal_lm.py::test_hf_pretrained_weights_load_from_a_folder',
    'composer main.py yamls/hf_causal_lm/gpt2-small.yaml model.pretrained_model_name_or_path=null '
    'model.config_overrides.model_type=gpt2 tokenizer_name=./my-copy-c4/tokenizer':
        'needs GPUs: test_yamls.py::test_shrunk_yaml_trains_two_steps',
    'composer main.py yamls/quickstart.yaml model.name=parallel_gpt': 'test_worked_example',
    'composer main.py yamls/quickstart.yaml optimizer.name=lion optimizer.lr=3e-4': 'test_the_guides_optimizer',
}


def test_every_command_is_accounted_for():
    assert sorted(commands()) == sorted(CHECKED)
    for how in CHECKED.values():
        for file, name in re.findall(r'(?:(test_\w+\.py)::)?(test_\w+)(?!\w*\.py)', how):
            assert f'def {name}(' in next((ROOT / 'tests').rglob(file or 'test_readme.py')).read_text(), how
        assert how.startswith('test_') or re.match(r'network: |needs [^:]+: |a server: ', how)


def test_what_a_command_needs_is_said_beside_it():
    for command, said in commands().items():
        needs = re.match(r'(?:needs ([^:]+): )?', CHECKED[command])[1] or ''
        assert min(said, key=len) == needs, f'{command}: {said} in the documentation, {needs!r} here'
        assert all(set(needs.split(', ')) <= set(place.split(', ')) for place in said if needs), command


@pytest.mark.parametrize('command', [part for command in commands() for part in command.split(' && ')])
def test_its_arguments_are_valid(command: str):
    """Every program, file and key in a command exists."""
    program, *argv = shlex.split(command)
    if program == 'docker' and argv[0] == 'run':
        program, *argv = argv[argv.index('starter-kit') + 1:]
    if argv[:1] == ['convert_c4.py']:
        convert_c4.parse_args(argv[1:])
    elif argv[:1] == ['src/data_c4.py']:
        parse_args(argv[1:])
    elif argv[:1] == ['src/tools/benchmark.py']:
        args = benchmark.parse_args(argv[1:])
        check(config.load([str(ROOT / args.yaml), *args.overrides]), plugins.REGISTRIES, world_size=8, has_gpu=True)
    elif argv[:1] == ['src/tools/evaluate.py']:
        args = evaluate.parse_args([str(ROOT / argv[1]), *argv[2:]])
        check(evaluate.load(args), plugins.REGISTRIES, world_size=1, has_gpu=True)
    elif argv[:1] == ['src/tools/estimate.py']:
        args = estimate.parse_args(argv[1:])
        if args.yaml:
            settings = config.load([str(ROOT / args.yaml), *args.overrides])
            check(settings, plugins.REGISTRIES, args.gpus or 1, has_gpu=True)
    elif argv[:1] == ['src/tools/export_hf.py']:
        export_hf.parse_args(argv[1:])
    elif argv[:1] == ['src/tools/import_hf.py']:
        import_hf.parse_args(argv[1:])
    elif argv[:1] == ['src/tools/generate.py']:
        generate.parse_args(argv[1:])
    elif argv[:1] == ['src/tools/plot_loss.py']:
        plot_loss.parse_args(argv[1:])
    elif argv[:1] == ['src/tools/ladder.py']:
        ladder.parse_args(argv[1:])
    elif program in ('composer', 'torchrun'):
        start = argv.index('main.py')
        launcher, (_, file, *overrides) = argv[:start], [arg for arg in argv[start:] if arg != '--dry_run']
        size = ['--world_size'] if program == 'composer' else ['--nnodes', '--nproc_per_node']
        assert launcher[::2] == [*size, '--node_rank', '--master_addr', '--master_port'][:len(launcher) // 2]
        if not {'model.name=parallel_gpt', 'optimizer.name=lion'} & {*overrides}:  # the guide's own
            check(config.load([str(ROOT / file), *overrides]), plugins.REGISTRIES, world_size=16 if launcher else 8,
                         has_gpu=True)
    elif program in ('pip', 'uv'):
        argv = argv[program == 'uv':]
        assert argv[0] == 'list' or argv[0] == 'install' and (argv[1] != '-r' or (ROOT / argv[2]).is_file())
    else:
        assert program in ('python3', 'source', 'export', 'mv', 'pytest', 'tensorboard', 'lm_eval', 'docker', 'py-spy')


def test_flash_attn_command_is_that_of_the_requirements():
    assert '#   pip install flash-attn==2.8.3 --no-build-isolation\n' in (ROOT / 'requirements.txt').read_text()


def test_training_on_val_alone(mds_root, tmp_path):
    val_alone = ['train_loader.dataset.split=val', 'allow_same_split=true', f'loggers.tensorboard.log_dir={tmp_path}']
    assert main.cli([str(ROOT / QUICKSTART), *tiny(mds_root, *SHORT, 'log_to_console=false', *val_alone)]) == 0


def test_the_sample_makes_room_for_c4(mds_root, tmp_path, monkeypatch):
    """C4 does not overwrite the sample, and the sample trains from the folder to which it was moved."""
    def convert(source: str) -> None:
        Path(source).mkdir(exist_ok=True)
        Path(source, 'train.jsonl').write_text(f'{{"text": "{source}"}}\n')
        convert_c4.main(convert_c4.parse_args(['--source', source, '--out_root', './my-copy-c4', '--splits', 'train']))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample_corpus, 'gather_sample', partial(sample_corpus.gather_sample, max_bytes=300_000))
    convert('sample')
    with pytest.raises(UserError, match='name another --out_root, or delete ./my-copy-c4/train'):
        convert('c4')
    Path('my-copy-c4').rename('my-old-sample')
    convert('c4')
    shutil.copytree(mds_root, 'my-sample')
    argv = [arg for arg in tiny(mds_root) if not arg.startswith('data_remote=')]
    assert main.cli([str(ROOT / QUICKSTART), 'data_remote=./my-sample', *argv, '--dry_run']) == 0


# ---------------------------------------------------------------- the recipes


@pytest.mark.slow
def test_another_tokenizer(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    convert_c4.main(convert_c4.parse_args(['--source', 'sample', '--out_root', './my-bpe', '--train_tokenizer', '2048']))
    argv = [str(ROOT / QUICKSTART), 'data_remote=./my-bpe', '--dry_run']
    assert main.cli([*argv, 'model.vocab_size=2048']) == 0
    assert main.cli([*argv, 'model.vocab_size=2047']) == 1
    assert 'model.vocab_size: 2047 is too small for tokenizer_name' in capfd.readouterr().err


def test_the_dockerfile_is_that_of_the_kit():
    """Without building it: the image has the pinned torch, every install is pinned, and every file that programs read is copied."""
    [text] = blocks('dockerfile', DOCS['src/ranks/README.md'])
    steps = [line.split() for line in text.splitlines()]
    image = steps[0][1]
    pin = re.search(r'^torch==(\S+)', (ROOT / 'requirements.txt').read_text(), re.MULTILINE)
    assert steps[0][0] == 'FROM' and image.split(':')[1].split('-')[0] == pin[1]
    assert image in DOCS['README.md'] and DOCS['src/ranks/README.md'].count(image) == 2
    assert [' '.join(step) for step in steps if step[0] == 'RUN'] == ['RUN pip install --no-cache-dir -r requirements.txt']
    copied = [(source, step[-1]) for step in steps if step[0] == 'COPY' for source in step[1:-1]]
    assert all((ROOT / source).exists() for source, _ in copied)
    assert all(target == ('./' if (ROOT / source).is_file() else f'./{source}') for source, target in copied)
    assert {source for source, _ in copied} == {'requirements.txt', 'main.py', 'convert_c4.py', 'src', 'yamls'}
    assert all(re.search(r'==\d', line) for line in (ROOT / 'requirements.txt').read_text().splitlines() if line[:1] not in '#')
    run = next(command for command in commands() if command.startswith('docker run'))
    [folder] = [step[1] for step in steps if step[0] == 'WORKDIR']
    assert re.findall(r'\$PWD/(\S+):(\S+)"', run) == [(name, f'{folder}/{name}') for name in ('my-copy-c4', 'checkpoints')]


@pytest.mark.slow
def test_a_rank_that_stands_still_ends_the_run_in_time(mds_root):
    argv = tiny(mds_root, 'max_duration=100000ba', 'eval_loader=null', 'dist_timeout=30', 'scheduler.t_warmup=1ba')
    command = [str(SCRIPTS / 'composer'), '-n', '2', '--master_port', str(free_port()), 'main.py', QUICKSTART, *argv]
    run = warm.Popen(command, cwd=ROOT, env=clean_env(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines = []
    for line in run.stdout:
        lines.append(line)
        if line.startswith('[batch=20/'):
            break
    children = subprocess.run(['pgrep', '-P', str(run.pid)], capture_output=True, text=True)
    ranks = [int(pid) for pid in children.stdout.split()]
    assert len(ranks) == 2, ''.join(lines)
    os.kill(max(ranks), signal.SIGSTOP)
    output = run.communicate(timeout=300)[0]
    assert run.returncode == 1 and 'Timed out waiting 30000ms' in output, output[-3000:]


def test_the_guides_test_of_a_run(mds_root, capfd):
    namespace: dict = {'__name__': 'test_guide'}
    [example] = blocks('python', DOCS['tests/README.md'])
    exec(example, namespace)
    namespace['test_the_loss_falls'](mds_root, capfd)


def test_how_much_of_mfu_is_causal():
    said = re.search(r'it is ([\d.]+) of MFU for 125m and ([\d.]+) for 7b', ' '.join(DOCS['src/training/README.md'].split()))
    for name, share in zip(('125m', '7b'), said.groups(), strict=True):
        text = (ROOT / f'yamls/mosaic_gpt/{name}.yaml').read_text()
        n_params = int(re.findall(r'# ([\d,]+) parameters', text)[0].replace(',', ''))
        model = yaml.safe_load(text)['model']
        shape = n_params, model['n_layers'], model['d_model'], yaml.safe_load(text)['max_seq_len']
        assert f'{train_flops_per_token(*shape, causal=True) / train_flops_per_token(*shape):.2f}' == share


# ---------------------------------------------------------------- the loader


def smoke_test(*argv: str) -> str:
    done = warm.run([sys.executable, 'src/data_c4.py', *argv], cwd=ROOT, env=clean_env(), timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '90 documents in 3 shards' in done.stdout and done.stdout.count('input_ids (8, 2048)') == 5
    assert re.search(r'^90 documents, [\d,]+ tokens in .*documents/s, .*tokens/s$', done.stdout, re.MULTILINE)
    return done.stdout


def shards(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file())


def test_loader_in_place(mds_root):
    before = shards(mds_root)
    assert str(mds_root / 'tokenizer') in smoke_test(str(mds_root), str(mds_root))
    assert shards(mds_root) == before


def test_loader_copies_shards(mds_root, tmp_path):
    smoke_test(str(mds_root), str(tmp_path / 'cache-c4'))
    assert shards(tmp_path / 'cache-c4' / 'val') == shards(mds_root / 'val')


@pytest.mark.slow
def test_loader_from_s3(s3, mds_root, tmp_path):
    s3.create_bucket(Bucket='my-bucket')
    for name in shards(mds_root / 'val'):
        s3.upload_file(str(mds_root / 'val' / name), 'my-bucket', f'my-copy-c4/val/{name}')
    smoke_test('s3://my-bucket/my-copy-c4', str(tmp_path / 'cache-c4'), '--tokenizer', str(mds_root / 'tokenizer'))
    assert shards(tmp_path / 'cache-c4' / 'val') == shards(mds_root / 'val')


# ---------------------------------------------------------------- training


def test_autoresume_starts_then_goes_on(mds_root, tmp_path, capfd):
    argv = tiny(mds_root, 'scheduler.t_warmup=1ba', 'run_name=first', 'autoresume=true', f'save_folder={tmp_path}/{{run_name}}',
                'save_interval=4ba', f'loggers.tensorboard.log_dir={tmp_path}/tb')
    assert main.cli([str(ROOT / QUICKSTART), *argv, 'max_duration=4ba']) == 0
    assert sorted(console(capfd.readouterr().err)['loss/train/total']) == [1, 2, 3, 4]
    assert main.cli([str(ROOT / QUICKSTART), *argv, 'max_duration=6ba']) == 0
    assert sorted(console(capfd.readouterr().err)['loss/train/total']) == [5, 6]


def test_a_shorter_run_with_another_learning_rate(mds_root, capfd):
    settings = [arg for arg in tiny(mds_root) if not arg.startswith(('max_duration', 'scheduler'))]
    assert main.cli([str(ROOT / QUICKSTART), *settings, 'eval_loader=null', 'max_duration=100ba', 'optimizer.lr=1e-3']) == 0
    rates = console(capfd.readouterr().err)['lr-DecoupledAdamW/group0']
    assert len(rates) == 100 and max(map(float, rates.values())) == pytest.approx(1e-3, rel=0.01)


# ---------------------------------------------------------------- the guide's code


def copy_of_the_kit(folder: Path) -> None:
    shutil.copy(ROOT / 'main.py', folder)
    for name in ('src', 'yamls'):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns('__pycache__'))


@pytest.mark.slow
def test_worked_example(mds_root, tmp_path):
    """The guide's three edits, made in a copy of the kit, give a model that trains."""
    schema, model, registry = blocks('python', DOCS['src/README.md'])[:3]
    copy_of_the_kit(tmp_path)
    old = (ROOT / 'src/config/schema.py').read_text()
    assert len(re.findall('^ModelConfig = .*$', old, re.MULTILINE)) == 1
    (tmp_path / 'src/config/schema.py').write_text(re.sub('^ModelConfig = .*\n', lambda _: schema, old, flags=re.MULTILINE))
    (tmp_path / 'src/parallel_gpt.py').write_text(model)
    with (tmp_path / 'src/model_registry.py').open('a') as file:
        file.write(f'\n{registry}')
    done = warm.run([str(SCRIPTS / 'composer'), 'main.py', QUICKSTART, 'model.name=parallel_gpt', *tiny(mds_root)],
                          cwd=tmp_path, env=clean_env(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    text = done.stdout + done.stderr
    # embeddings; 2 blocks of LayerNorm, Wqkv, out_proj, mlp_up, mlp_down; last LayerNorm
    n_params = (512 + 32) * 16 + 2 * (32 + 17 * 48 + 17 * 16 + 17 * 64 + 65 * 16) + 32
    assert f'model: parallel_gpt, {n_params:,} parameters' in text
    losses = [float(v) for v in console(text)['loss/train/total'].values()]
    assert len(losses) == 20 and losses[0] == pytest.approx(6.24, abs=0.1) and losses[-1] < losses[0] - 0.1  # ln 512


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_guides_optimizer(mds_root, tmp_path):
    """The guide's edits, made in a copy of the kit, train and resume, sharded over two ranks."""
    name, lion, build = next(found[i:i + 3] for found in [blocks('python', DOCS['src/README.md'])] for i in range(len(found))
                             if 'lion' in found[i])
    copy_of_the_kit(tmp_path)
    schema, builder = tmp_path / 'src/config/schema.py', tmp_path / 'src/optimizers.py'
    old, line = schema.read_text(), "    name: Literal['decoupled_adamw', 'adamw', 'muon'] = 'decoupled_adamw'\n"
    assert old.count(line) == 1
    schema.write_text(old.replace(line, textwrap.indent(name, '    ')))
    old = builder.read_text()
    function, line = old.index('def build_optimizer('), old.index('    cls = {')
    builder.write_text(f'{old[:function]}{lion}\n\n{old[function:line]}{textwrap.indent(build, "    ")}\n{old[line:]}')

    def train(duration: str, *argv: str) -> dict[int, float]:
        command = [str(SCRIPTS / 'composer'), '-n', '2', 'main.py', QUICKSTART, *tiny(mds_root), 'optimizer.name=lion',
                   'optimizer.lr=3e-3', 'scheduler.name=constant_with_warmup', 'run_name=lion', f'max_duration={duration}', *argv]
        done = warm.run(command, cwd=tmp_path, env=clean_env(), capture_output=True, text=True, timeout=480)
        assert done.returncode == 0, done.stdout + done.stderr
        return {batch: float(loss) for batch, loss in console(done.stdout + done.stderr)['loss/train/total'].items()}

    sharded = ['fsdp_config.sharding_strategy=FULL_SHARD', 'fsdp_config.state_dict_type=sharded', 'autoresume=true',
               'save_folder=checkpoints/{run_name}', 'save_interval=10ba']
    straight, begun, ended = train('20ba', sharded[0]), train('10ba', *sharded), train('20ba', *sharded)
    assert sorted(begun) == list(range(1, 11)) and sorted(ended) == list(range(11, 21))
    assert begun | ended == pytest.approx(straight, abs=1e-6) and straight[20] < straight[1] - 0.1


def test_the_guides_loader(mds_root, tmp_path, monkeypatch, capfd):
    """The guide's loader trains without a tokenizer, and reads what the files hold."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'my-bins').mkdir()
    rng = np.random.default_rng(0)
    for split, n in (('train', 1000), ('val', 33)):
        rng.integers(0, 512, n * 32 + 1).astype(np.uint16).tofile(tmp_path / f'my-bins/{split}.bin')
    code = next(b for b in blocks('python', DOCS['src/README.md']) if b.startswith('"""Rows of flat files'))
    assert 'from src.data_c4 import build_c4_dataloader\n' in (ROOT / 'src/training/data.py').read_text()
    namespace: dict = {'__name__': 'token_file'}
    exec(code, namespace)
    monkeypatch.setattr(data, 'build_c4_dataloader', namespace['build_c4_dataloader'])
    overrides = next(c for c in commands() if 'my-bins' in c).split()[3:]
    short = tiny(mds_root, 'eval_first=false', 'scheduler.t_warmup=1ba', 'max_duration=4ba', 'eval_interval=4ba')
    argv = [str(ROOT / QUICKSTART), *short, *overrides]
    trainer = main.main(config.load(argv))
    trainer.close()
    assert int(trainer.state.timestamp.token) == 4 * 12 * 32, 'the last position has a target too'
    said = capfd.readouterr().err
    assert 'DataLoader of TokenFile, with 83 batches in an epoch' in said and '  eval loss ' in said
    assert int(trainer.state.eval_timestamp.sample) == 33


def test_the_guides_optimizer_takes_steps_of_one_size():
    namespace = {'torch': torch, 'Optional': Optional, 'Callable': Callable}
    exec(next(b for b in blocks('python', DOCS['src/README.md']) if b.startswith('class Lion')), namespace)
    w, idle = torch.nn.Parameter(torch.tensor([1.0, -2.0])), torch.nn.Parameter(torch.ones(1))
    optimizer = namespace['Lion']([w, idle], {'lr': 0.1, 'betas': (0.5, 0.75), 'weight_decay': 0.5})
    w.grad = torch.tensor([4.0, -8.0])
    optimizer.step()
    assert w.tolist() == pytest.approx([1 * 0.95 - 0.1, -2 * 0.95 + 0.1])
    w.grad = torch.tensor([-2.0, 0.0])  # 0.5 * 1 - 0.5 * 2 < 0, and 0.5 * -2 < 0: the momentum's
    optimizer.step()
    assert w.tolist() == pytest.approx([0.85 * 0.95 + 0.1, -1.8 * 0.95 + 0.1])
    assert optimizer.state[w]['exp_avg'].tolist() == [0.25, -1.5] and idle.item() == 1


def test_the_guides_attention_is_causal_and_windowed():
    namespace = {'torch': torch, 'F': F, 'Tensor': Tensor, 'Optional': Optional, 'Documents': Documents}
    exec(next(b for b in blocks('python', DOCS['src/README.md']) if 'def windowed_attention' in b), namespace)
    attention = namespace['windowed_attention']
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 300, 2, 8) for _ in range(3))
    assert torch.allclose(attention(q, k, v, window=300), torch_attention(q, k, v), atol=1e-5)
    documents = Documents((torch.arange(300) // 70).expand(2, 300))
    assert torch.allclose(attention(q, k, v, 0.0, documents), torch_attention(q, k, v, 0.0, documents), atol=1e-5)
    out = attention(q, k, v)
    for end in (256, 300):  # the last 256 positions and no other
        alone = torch_attention(q[:, end - 256:end], k[:, end - 256:end], v[:, end - 256:end])
        assert torch.allclose(out[:, end - 1], alone[:, -1], atol=1e-5)
    assert not torch.allclose(out, torch_attention(q, k, v), atol=1e-3)


def test_the_guides_wrapping_wraps_every_mlp_too():
    namespace = {'nn': nn, 'GPTBlock': GPTBlock, 'GPTMLP': GPTMLP}
    exec(next(b for b in blocks('python', DOCS['src/README.md']) if b.startswith('def fsdp_wrap_fn')), namespace)
    model = MosaicGPT({'d_model': 16, 'n_heads': 2, 'n_layers': 3, 'max_seq_len': 8, 'vocab_size': 32, 'attn_impl': 'sdpa'})
    assert sum(namespace['fsdp_wrap_fn'](model, m) for m in model.modules()) == 6
    assert sum(model.fsdp_wrap_fn(m) for m in model.modules()) == 3


def test_the_guides_layer_keeps_its_initialisation_and_trains(mds_root, monkeypatch):
    namespace = {'torch': torch, 'nn': nn, 'Tensor': Tensor, 'Optional': Optional, 'Documents': Documents,
                 'GPTBlock': GPTBlock, 'MosaicGPTConfig': MosaicGPTConfig}
    exec(next(b for b in blocks('python', DOCS['src/README.md']) if 'class Gain' in b), namespace)
    monkeypatch.setattr('src.mosaic_gpt.GPTBlock', namespace['ScaledBlock'])
    trainer = main.main(config.load([str(ROOT / QUICKSTART), *tiny(mds_root, 'model.device=meta', 'scheduler.t_warmup=1ba',
                                                                            'max_duration=3ba')]))
    blocks_ = trainer.state.model.model.blocks
    for name, start in (('gain_1', 0.1), ('gain_2', 0.1), ('ln_1', 1)):
        assert 0 < (blocks_[1].get_parameter(f'{name}.weight') - start).abs().max() < 0.01, name
    trainer.close()


# ---------------------------------------------------------------- what the text says


@pytest.mark.parametrize('doc', list(DOCS))
def test_links_lead_to_files_and_headings(doc: str):
    links = re.findall(r'\]\(([^)\s]+)\)', DOCS[doc])
    assert len(links) >= 3 or doc.startswith('assets/')
    for link in links:
        if not link.startswith('https://'):
            file, _, heading = link.partition('#')
            target = ((ROOT / doc).parent / file).resolve() if file else ROOT / doc
            assert target.exists(), link
            assert not heading or heading in headings(target.read_text()), link


def without_blocks(text: str) -> str:
    """A document without its fenced code blocks."""
    return re.sub(r'^```.*?^```', '', text, flags=re.MULTILINE | re.DOTALL)


def anchor(title: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-')


def headings(text: str) -> list[str]:
    """The anchors of a document's headings."""
    return [anchor(title) for title in re.findall(r'^#+ (.+)$', without_blocks(text), re.MULTILINE)]


@pytest.mark.parametrize('doc', [doc for doc in DOCS if not doc.startswith('assets/')])  # a program writes assets
def test_a_guide_is_short(doc: str):
    assert len(DOCS[doc].splitlines()) <= 250
    prose = [line for line in without_blocks(DOCS[doc]).splitlines()
             if not re.match(r' *\||.*\]\(\S{40,}|<img|- \d', line.strip())]
    assert max(map(len, prose)) <= 125, max(prose, key=len)


def test_the_readme_leads_to_every_guide():
    links = {*re.findall(r'\]\(([^)\s]+)\)', DOCS['README.md'])}
    assert links >= GUIDES | {'.github/CONTRIBUTING.md', '.github/CHANGELOG.md', '.github/TROUBLESHOOTING.md'}
    assert {*DOCS} == GUIDES | {link for link in links if link.endswith('.md')} | {'README.md'}


def test_sections_that_messages_name_are_there():
    said = [found for text in messages() for found in re.findall(r'(\S*README\.md)(?:, "([^"]+)")?', text)]
    assert len(said) >= 3
    for file, title in said:
        assert anchor(title) in ['', *headings(DOCS[file.lstrip('(')])], (file, title)


def table(doc: str, head: str, i: int = 0) -> list[list[str]]:
    """The rows of the i-th table whose header line is `head`."""
    lines = DOCS[doc].split(head + '\n')[i + 1].splitlines()[1:]
    rows = lines[:next((i for i, line in enumerate(lines) if not line.startswith('|')), len(lines))]
    return [[cell.strip() for cell in row.strip('|').split('|')] for row in rows]


def test_the_map_holds_every_room_and_module():
    linked = {*re.findall(r'\]\(([^)]+)\)', DOCS['README.md'].split('\n## Find your way\n')[1])}
    rooms = {f'src/{room.parent.name}' for room in ROOT.glob('src/*/__init__.py')}
    modules = {f'src/{file.name}' for file in ROOT.glob('src/*.py')} - {'src/__init__.py'}
    assert rooms | modules | {'main.py', 'convert_c4.py', QUICKSTART} <= linked


def test_every_run_is_in_the_table():
    rows = {re.findall(r'\((.*)\)', row[0])[0]: row[1:] for row in
            table('README.md', '| config | parameters | tokens | global batch | peak learning rate |')}
    files = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob('yamls/*/*.yaml') if p.stem != 'quickstart')
    assert sorted(rows) == files
    for file in files:
        text = (ROOT / file).read_text()
        params, tokens = re.findall(r'# ([\d,]+) parameters, ([\d.]+B) tokens', text)[0]
        settings = yaml.safe_load(text)
        assert rows[file][:3] == [params, tokens, str(settings['global_train_batch_size'])]
        assert float(rows[file][3]) == float(settings['optimizer']['lr'])


FSDP_TABLE = '| key | default | version 1 | version 2 |'


def test_every_key_of_fsdp_config_is_in_the_guide():
    rows = {key.strip('`'): default.strip('`') for key, default, *_ in table('src/training/README.md', FSDP_TABLE)}
    words = {True: 'true', False: 'false', None: 'null'}
    assert rows == {key: words.get(field.default, str(field.default)) if not isinstance(field.default, int)
                    or isinstance(field.default, bool) else str(field.default) for key, field in FSDPConfig.model_fields.items()}


def test_what_has_no_effect_in_version_2_is_what_a_run_says():
    no_effect = {key.strip('`') for key, _, _, version_2 in table('src/training/README.md', FSDP_TABLE) if version_2 == 'no effect'}
    others = {'backward_prefetch': 'NONE', 'backward_prefetch_limit': 2, 'forward_prefetch_limit': 2}
    given = [f'fsdp_config.{key}={others.get(key, str(not FSDPConfig.model_fields[key].default).lower())}' for key in no_effect]
    c = check(config.load([str(ROOT / QUICKSTART), 'fsdp_config.activation_checkpointing=true', *given]),
              plugins.REGISTRIES, world_size=1, has_gpu=False)
    said = report.describe_sharding(c)
    assert set(said.split('; without effect in FSDP2: ')[1].split(', ')) == no_effect
    assert not no_effect & FSDP2Config.settable_attrs()


def test_mixed_precision_is_what_the_guide_says():
    from composer.distributed.mosaic_parallelism import get_mixed_precision

    rows = {name.strip('`'): cells for name, *cells in
            table('src/training/README.md', '| | gathered parameters and buffers | reduction of gradients |')}
    kinds = {torch.bfloat16: 'low', torch.float32: 'float32', None: 'float32'}  # None: as they are, which is float32
    for name, (compute, reduction) in rows.items():
        _, param, reduce, buffer = get_mixed_precision('amp_bf16', name)
        assert kinds[param] == kinds[buffer] == compute.split(': ')[-1] and kinds[reduce] == reduction.split(':')[0], name
    assert set(rows) == {'DEFAULT', 'PURE', 'FULL'}


SYMPTOMS = '| symptom | cause | command, or what to do |'
FOREIGN = {  # symptoms that other libraries print
    'Timed out waiting': 'gloo', 'Watchdog caught collective operation timeout': 'torch, for NCCL',
    'FileExistsError': 'Python', 'Reused local directory': 'streaming',
}


def messages() -> list[str]:
    """Every string in the code; a NUL stands for each value of an f-string."""
    found = []
    for path in [ROOT / 'main.py', ROOT / 'convert_c4.py', *ROOT.glob('src/**/*.py')]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append(''.join(str(part.value) if isinstance(part, ast.Constant) else '\0' for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_symptoms_in_the_troubleshooting_table_are_the_codes():
    """Every symptom in the tables is a text that the code prints, and every setting that a row names exists."""
    doc, code = '.github/TROUBLESHOOTING.md', messages()
    rows = [row for i in range(DOCS[doc].count(SYMPTOMS)) for row in table(doc, SYMPTOMS, i)]
    symptoms = [symptom for first, *_ in rows for symptom in re.findall('`([^`]+)`', first) if symptom != '/dev/shm']
    assert len(symptoms) >= len(rows) > 25
    for symptom in symptoms:
        pieces = [piece.strip() for piece in symptom.split('...') if piece.strip()]
        pattern = re.compile('.*'.join(map(re.escape, pieces)), re.DOTALL)
        assert symptom in FOREIGN or any(map(pattern.search, code)), symptom
    assert set(FOREIGN) <= set(symptoms)
    keys = {key for *_, what in rows for key in re.findall(r'`([a-z_.]+)=[^`]*`', what)}
    assert len(keys) > 10
    for key in keys:  # a setting that is not there is a KeyError
        section = Config
        if key.partition('.')[0] in plugins.REGISTRIES:
            part, name = key.split('.')
            assert name in plugins.REGISTRIES[part]
            continue
        for name in key.split('.'):
            kinds = typing.get_args(section.model_fields[name].annotation) or (section.model_fields[name].annotation,)
            section = next((kind for kind in kinds if hasattr(kind, 'model_fields')), None)


def test_every_exit_code_is_in_the_table():
    codes = ','.join(code for code, _ in table('src/checkpoints/README.md', '| exit code | meaning |'))
    signals = [128 + signal.SIGINT, 128 + signal.SIGKILL, 128 + signal.SIGTERM, 256 - signal.SIGKILL]  # the last: composer's
    assert sorted(map(int, codes.split(','))) == [0, 1, stop.EXIT_STOPPED, *signals]
