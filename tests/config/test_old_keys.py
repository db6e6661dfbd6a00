"""YAMLs of 2022 and 2023 run as they are; a value that a YAML repeats stays one value, or the run prints a line."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from test_yamls import HF, MOSAIC, SHRUNK, SHRUNK_HF, SHRUNK_MOSAIC

import main
from src.common.errors import UserError
from src.config import load as config
from src.config.check import check as check_config
from src.config.schema import Config
from src.tools import evaluate
from src.training import plugins

DATASET = """
  name: c4
  dataset:
    remote: *data_remote
    local: *data_local
    split: {split}
    shuffle: {shuffle}
    prefetch: {prefetch}
    tokenizer_name: *tokenizer_name
    max_seq_len: *max_seq_len
    group_method: {group_method}
  drop_last: {shuffle}
  num_workers: 8
  pin_memory: true
  prefetch_factor: 2
  persistent_workers: true
  timeout: 0
"""
TRAIN_DATA = DATASET.format(split='train', shuffle='true', prefetch='1_000_000', group_method='concat')
EVAL_DATA = DATASET.format(split='val', shuffle='false', prefetch='1000', group_method='truncate')
OLD = """
data_remote: &data_remote ./my-copy-c4
data_local: &data_local ./my-copy-c4
tokenizer_name: &tokenizer_name gpt2
max_seq_len: &max_seq_len 2048
run_name: {name}
model:
{model}
tokenizer:
  type: hftokenizer
  args:
    tokenizer_name: *tokenizer_name
    max_seq_len: *max_seq_len
train_loader:{train}
eval_loader:{val}
scheduler:
  name: cosine_with_warmup
  t_warmup: 100ba
  alpha_f: 0.1
optimizer:
  name: decoupled_adamw
  lr: {lr}
  betas:
  - 0.9
  - 0.95
  eps: 1.0e-08
  weight_decay: 0.0
max_duration: {batches}ba
eval_interval: {every}ba
global_train_batch_size: {batch}
grad_clip_norm: 1.0
seed: 17
device_eval_batch_size: {micro}
device_train_microbatch_size: {micro}
precision: bf16
fsdp_config:
  sharding_strategy: FULL_SHARD
  min_params: 2e8
  mixed_precision: {mixed}
  activation_checkpointing: {checkpoint}
  activation_checkpointing_reentrant: false
  activation_cpu_offload: false
  verbose: true
progress_bar: false
log_to_console: true
console_log_interval: 1ba
callbacks:
  speed_monitor:
    window_size: 10
  lr_monitor: {{}}
  memory_monitor: {{}}
loggers:
  wandb: {{}}
"""
MOSAIC_MODEL = """
  name: mosaic_gpt
  device: meta
  tokenizer_name: *tokenizer_name
  d_model: {d_model}
  n_heads: {heads}
  n_layers: {layers}
  mlp_ratio: 4
  max_seq_len: *max_seq_len
  vocab_size: 50257
  init_std: 0.02
  attn_pdrop: 0.0
  resid_pdrop: 0.0
  emb_pdrop: 0.0
  attn_impl: flash
"""
HF_MODEL = """
  name: hf_causal_lm
  device: cpu
  hf_config_name_or_path: {hub}
  tokenizer_name: *tokenizer_name
"""
HUB = {'gpt2-small': 'gpt2', 'gpt-neo-125m': 'EleutherAI/gpt-neo-125M'}
# Overrides for a small machine, as the user of such a YAML would write them
SMALL_RUN = [*SHRUNK, 'precision=fp32', 'loggers.wandb=false', 'callbacks.memory_monitor=false']


def old_text(name: str) -> str:
    """The YAML of a pre-baked run as it was in 2022."""
    _, d_model, heads, layers, lr, batch, batches, every, micro, checkpoint = MOSAIC.get(name, MOSAIC['125m'])
    micro = 8 if name in HF else micro
    mosaic = MOSAIC_MODEL.format(d_model=d_model, heads=heads, layers=layers)
    model = HF_MODEL.format(hub=HUB[name]) if name in HF else mosaic
    return OLD.format(name=name, model=model.strip('\n'), lr=lr, batch=batch, batches=batches, every=every, micro=micro,
                      checkpoint=str(checkpoint).lower(), mixed='PURE' if name in ('30b', '70b') else 'DEFAULT',
                      train=TRAIN_DATA.rstrip(), val=EVAL_DATA.rstrip())


def data_overrides(root: Path) -> list[str]:
    """The overrides that point to the data of the tests."""
    return [f'data_remote={root}', f'data_local={root}', f'tokenizer_name={root}/tokenizer']


@pytest.fixture
def write(tmp_path: Path):
    """Writes a YAML with some of its lines replaced, and returns its path."""
    def to(name: str, *lines: tuple[str, str]) -> str:
        text = old_text(name)
        for old, new in lines:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / 'old.yaml').write_text(text)
        return str(tmp_path / 'old.yaml')
    return to


def check(*argv: str, has_gpu: bool = True) -> Config:
    return check_config(config.load([*argv]), plugins.REGISTRIES, 8, has_gpu)


@pytest.mark.parametrize('name', [*MOSAIC, *HF])
def test_an_old_yaml_is_the_run_of_today_and_trains(name, write, mds_root, capsys):
    yaml = write(name)
    today, old = (check(path).model_dump() for path in
                  (f'yamls/{"hf_causal_lm" if name in HF else "mosaic_gpt"}/{name}.yaml', yaml))
    for section in ('optimizer', 'scheduler', 'algorithms', 'tokenizer', 'max_duration', 'eval_interval', 'data_local',
                    'global_train_batch_size', 'device_train_microbatch_size', 'device_eval_batch_size'):
        assert old[section] == today[section], section
    assert old['fsdp_config'] == {**today['fsdp_config'], 'verbose': True}
    assert name in HF or old['model'] == today['model']
    assert old['model']['init_seed'] == 17 and old['precision'] == 'amp_bf16'
    assert [old[f'{name}_loader']['dataset']['predownload'] for name in ('train', 'eval')] == [1_000_000, 1000]
    assert name not in HF or old['model']['pretrained_model_name_or_path'] == HUB[name]

    capsys.readouterr()
    cfg = config.load([yaml, *data_overrides(mds_root), *SMALL_RUN, *(SHRUNK_HF[name] if name in HF else SHRUNK_MOSAIC)])
    stderr = capsys.readouterr().err.splitlines()
    device = ['config: model.device: no longer needed: a Hugging Face model is built on the CPU']
    shape = ['config: model.hf_config_name_or_path: ignored: the command line sets '
             'model.pretrained_model_name_or_path']
    assert stderr[:-4] == [
        'config: model.tokenizer_name: no longer needed: the model reads no tokenizer',
        'config: fsdp_config.min_params: no longer needed: every block of the model is sharded on its own',
        *(device if name in HF else []),
        'config: tokenizer.type: read as tokenizer.name', *(shape if name in HF else []),
        'config: train_loader.dataset.prefetch: read as train_loader.dataset.predownload',
        'config: eval_loader.dataset.prefetch: read as eval_loader.dataset.predownload',
        'config: tokenizer.args.tokenizer_name: read as tokenizer.tokenizer_name',
        'config: tokenizer.args.max_seq_len: read as tokenizer.max_seq_len',
        'config: grad_clip_norm: read as algorithms.gradient_clipping='
        "{'clipping_type': 'norm', 'clipping_threshold': 1.0}"]
    assert [line.split()[1] for line in stderr[-4:]] == ['max_seq_len:', 'data_remote:', 'data_local:', 'tokenizer_name:']
    trainer = main.main(cfg)
    assert (int(trainer.state.timestamp.batch), int(trainer.state.timestamp.token)) == (2, 2 * 4 * 31)  # not 2047
    assert 5.5 < trainer.state.eval_metric_values['LanguageCrossEntropy'].item() < 6.5  # ln 512 = 6.24
    assert f'batch: 4 samples of 32 tokens = {4 * 32} tokens per step' in capsys.readouterr().err
    trainer.close()


@pytest.mark.parametrize('override, key, value', [
    ('grad_clip_norm=0.5', 'algorithms.gradient_clipping', {'clipping_type': 'norm', 'clipping_threshold': 0.5}),
    ('grad_clip_norm=-1', 'algorithms.gradient_clipping', False),
    ('grad_clip_norm=null', 'algorithms.gradient_clipping', False),
    ('algorithms.gradient_clipping.clipping_threshold=2.0', 'algorithms.gradient_clipping',
     {'clipping_type': 'norm', 'clipping_threshold': 2.0}),
    ('algorithms.gradient_clipping=false', 'algorithms.gradient_clipping', False),
    ('tokenizer.args.max_seq_len=1024', 'tokenizer.max_seq_len', 1024),
    ('tokenizer.max_seq_len=1024', 'tokenizer.max_seq_len', 1024),
    ('train_loader.dataset.prefetch=5', 'train_loader.dataset.predownload', 5),
    ('train_loader.dataset.predownload=5', 'train_loader.dataset.predownload', 5),
    ('precision=amp', 'precision', 'amp_fp16'),
    ('precision=fp16', 'precision', 'amp_fp16'),
    ('precision=auto', 'precision', 'auto'),
    ('model.device=cuda', 'model.device', 'meta'),
    ('model.init_device=cpu', 'model.device', 'cpu'),
    ('init_device=mixed', 'model.device', 'meta'),
    ('model.attn_impl=triton', 'model.attn_impl', 'flash'),
    ('model.alibi=false', 'model.attn_impl', 'flash'),
    ('model.attn_clip_qkv=null', 'model.attn_impl', 'flash'),
    ('fsdp_config=null', 'fsdp_config', None),
    ('fsdp_config.state_dict_type=local', 'fsdp_config.state_dict_type', 'sharded'),
    ('fsdp_config.load_planner=null', 'fsdp_config.verbose', True),
    ('callbacks.speed_monitor_v2={window_size: 3}', 'callbacks.speed_monitor', {'window_size': 3}),
    ('device_train_grad_accum=4', 'device_train_microbatch_size', 16),
    ('grad_accum=auto', 'device_train_microbatch_size', 'auto'),
    ('eval_subset_num_batches=-1', 'eval_samples', -1),
    ('eval_loader.eval_subset_num_batches=3', 'eval_samples', 3 * 16 * 8),
    ('n_gpus=8', 'global_train_batch_size', 256),
    ('seed=3', 'model.init_seed', 3),
])
def test_an_old_key_on_the_command_line(override, key, value, write, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '8')
    c = check(write('125m'), override).model_dump()
    assert OmegaConf.select(OmegaConf.create(c), key) == value
    assert c['eval_loader']['eval_samples'] == c['eval_samples']


@pytest.mark.parametrize('lines, message', [
    ((('grad_clip_norm: 1.0', 'grad_clip_norm: 1.0\nalgorithms: {gradient_clipping: {clipping_threshold: 2.0}}'),),
     'grad_clip_norm: no such key; write only algorithms.gradient_clipping: {clipping_type'),
    ((('prefetch: 1000\n', 'prefetch: 1000\n    predownload: 5\n'),),
     'eval_loader.dataset.prefetch: no such key; this is the old name of eval_loader.dataset.predownload; keep only eval_loader.'),
    ((('device_train_microbatch_size: 16', 'grad_accum: 4'),),
     'grad_accum: no such key; write device_train_microbatch_size, the samples of one forward pass on a device: '
     'global_train_batch_size / number of devices / grad_accum, rounded up'),
    ((('seed: 17', 'seed: 17\neval_subset_num_batches: many'),),
     'eval_subset_num_batches: no such key; write eval_samples: batches x device_eval_batch_size x number of devices'),
    ((('attn_impl: flash', 'alibi: true'),), 'model.alibi: no such key; remove it: the kit always behaves as with false'),
    ((('min_params: 2e8', 'load_planner: {a: 1}'),), 'fsdp_config.load_planner: no such key; remove it: the kit always behaves as with null'),
    ((('seed: 17', 'seed: 17\nicl_tasks: [a]'),), 'icl_tasks: no such key; remove this key, and run the tasks after training with lm-eval'),
    ((('grad_clip_norm: 1.0', 'grad_clip_norm: fast'),), "clipping.clipping_threshold: 'fast' must be a number"),
])
def test_what_has_no_same_meaning_is_refused_with_what_to_write(lines, message, write):
    with pytest.raises(UserError) as e:
        check(write('125m', *lines))
    assert message in str(e.value)


def test_a_config_that_load_has_not_seen_is_told_the_new_names(write):
    with pytest.raises(UserError) as e:
        check_config(OmegaConf.load(write('125m')), plugins.REGISTRIES, 8, True)
    for message in ('model.tokenizer_name: no such key; remove it: the model reads no tokenizer',
                 'tokenizer.type: no such key; this is the old name of tokenizer.name',
                 'tokenizer.args: no such key; write its keys one level up',
                 'fsdp_config.min_params: no such key; remove it'):
        assert message in str(e.value)


def test_rank_0_alone_speaks(write, capsys, monkeypatch):
    monkeypatch.setenv('RANK', '1')
    check(write('125m'))
    assert not capsys.readouterr().err
    monkeypatch.setenv('RANK', '0')
    check(write('125m'), 'data_remote=s3://me:pass@bucket/c4')
    stderr = capsys.readouterr().err
    assert stderr.count('config: grad_clip_norm: ') == 1
    assert 's3://***@bucket/c4 is also used for' in stderr and 'pass' not in stderr


# ---------------------------------------------------------------- values that are written in several places

SHARED = {'max_seq_len': 64, 'data_remote': 's3://b/x', 'data_local': '/tmp/x', 'tokenizer_name': 'other', 'seed': 5}


def used(c: Config) -> dict[str, set[Any]]:
    """The values that the sections have for each of `SHARED`."""
    data = [c.train_loader.dataset, *([c.eval_loader.dataset] if c.eval_loader else [])]
    return {'max_seq_len': {c.tokenizer.max_seq_len, c.model.max_seq_len, *(d.max_seq_len for d in data)},
            'data_remote': {d.remote for d in data}, 'data_local': {d.local for d in data},
            'tokenizer_name': {c.tokenizer.tokenizer_name, *(d.tokenizer_name for d in data)},
            'seed': {c.model.init_seed}}


@pytest.mark.parametrize('key', list(SHARED))
@pytest.mark.parametrize('repeats', ['anchors', 'by hand'])
def test_the_command_line_reaches_what_repeats_the_value(key, repeats, write, capsys):
    yaml = write('125m', ('n_layers: 12', 'n_layers: 12\n  init_seed: 17'))
    if repeats == 'by hand':
        Path(yaml).write_text(OmegaConf.to_yaml(OmegaConf.load(yaml), resolve=True))
        assert '&' not in Path(yaml).read_text()
    before = used(check(yaml))
    capsys.readouterr()
    assert used(check(yaml, f'{key}={SHARED[key]}')) == {**before, key: {SHARED[key]}}
    assert f'config: {key}: {SHARED[key]} is also used for ' in capsys.readouterr().err


def test_a_section_that_is_set_on_purpose_stays(write, capsys):
    c = check(write('125m'), 'max_seq_len=256', 'train_loader.dataset.max_seq_len=128', 'model.max_seq_len=2048',
              'seed=3', 'model.init_seed=17', 'eval_loader.dataset.remote=./there', 'eval_loader.dataset.local=./there')
    assert (c.train_loader.dataset.max_seq_len, c.tokenizer.max_seq_len, c.model.max_seq_len) == (128, 256, 2048)
    assert (c.seed, c.model.init_seed) == (3, 17) and 'although' not in capsys.readouterr().err
    # Of the YAML, too: another evaluation, and another length for training alone
    elsewhere = EVAL_DATA.replace('*data_remote', './there').replace('*data_local', './there')
    c = check(write('125m', (EVAL_DATA, elsewhere)), 'data_remote=./here', 'data_local=./here')
    assert (c.train_loader.dataset.remote, c.eval_loader.dataset.remote) == ('./here', './there')
    assert 'although' not in capsys.readouterr().err
    c = check(write('125m', (TRAIN_DATA, TRAIN_DATA.replace('*max_seq_len', '1024'))))
    assert c.train_loader.dataset.max_seq_len == 1024
    stderr = capsys.readouterr().err
    assert 'config: train_loader.dataset.max_seq_len: 1024 is used, although max_seq_len is 2048' in stderr


@pytest.mark.parametrize('key, value, values', [
    ('max_seq_len', 2048, 'tokenizer.max_seq_len is 512, train_loader.dataset.max_seq_len is 512, eval_loader.dataset'),
    ('data_remote', './my-copy-c4', 'train_loader.dataset.remote is 512, eval_loader.dataset.remote is 512'),
    ('data_local', './my-copy-c4', 'train_loader.dataset.local is 512, eval_loader.dataset.local is 512'),
    ('tokenizer_name', 'gpt2', 'tokenizer.tokenizer_name is 512, train_loader.dataset.tokenizer_name is 512, eval_'),
])
def test_a_value_that_no_section_follows_is_refused(key, value, values, write):
    yaml = write('125m', (f'*{key}', '512'))
    with pytest.raises(UserError) as e:
        config.load([yaml])
    assert f'{key}: {value} has no effect, because {values}' in str(e.value)
    assert f'Write ${{{key}}} in these places, or add ' in str(e.value)
    assert f'={value} to the command line, or set {key} to' in str(e.value)
    with pytest.raises(UserError, match=f'{key}: 99 has no effect'):
        config.load([yaml, f'{key}=99'])
    fix = str(e.value).split('or add ')[1].split(' to the command line')[0].split()
    config.load([yaml, *fix])
    config.load([yaml, f'{key}=512'])


def test_the_plan_says_what_is_trained(mds_root, write, capsys):
    argv = [write('125m'), *data_overrides(mds_root), *SMALL_RUN, *SHRUNK_MOSAIC, 'train_loader.dataset.max_seq_len=16']
    trainer = main.main(config.load(argv), dry_run=True)
    assert 'batch: 4 samples of 16 tokens = 64 tokens per step' in capsys.readouterr().err
    trainer.close()


def test_evaluate_takes_an_old_yaml(write):
    yaml = write('125m', ('seed: 17', 'seed: 17\neval_subset_num_batches: 5'))
    args = evaluate.parse_args([yaml, 'model.attn_impl=auto', 'precision=auto'])
    c = check_config(evaluate.load(args), plugins.REGISTRIES, 1, False)
    assert c.eval_loader.eval_samples == c.eval_samples == -1


# ---------------------------------------------------------------- messages


@pytest.mark.parametrize('keys, keys_named', [
    (['tokenizer_name'], 'tokenizer_name'),
    (['tokenizer.tokenizer_name'], 'tokenizer.tokenizer_name'),
    (['train_loader.dataset.tokenizer_name', 'eval_loader.dataset.tokenizer_name'],
     'train_loader.dataset.tokenizer_name and eval_loader.dataset.tokenizer_name'),
    (['eval_loader.dataset.tokenizer_name'], 'eval_loader.dataset.tokenizer_name'),
])
def test_a_tokenizer_that_is_not_there_is_said_with_the_key_that_counts(keys, keys_named, write, mds_root):
    argv = [write('125m'), *data_overrides(mds_root), *SMALL_RUN, *SHRUNK_MOSAIC]
    with pytest.raises(UserError) as e:
        main.main(config.load([*argv, *(f'{key}=no/such' for key in keys)]))
    assert str(e.value).startswith(f"{keys_named}: 'no/such' is no folder here")
