"""Every mistake in a config ends in one message that names the setting, the value and what is allowed."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from composer.utils import FSDP2Config
from composer.utils import FSDPConfig as ComposerFSDPConfig
from omegaconf import OmegaConf

from src.common.errors import UserError
from src.config import load as config
from src.config.check import check as check_config
from src.config.data_places import check_places
from src.config.derived import compile_scope, device_batch_size, fsdp_version, grad_accum, to_batches_samples_or_tokens
from src.config.run_checks import check_early_stopper, check_save_folder, check_warmup
from src.config.schema import CompileConfig, FSDPConfig
from src.tools import evaluate
from src.training import plugins
from src.training.sharding import build_parallelism

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = str(ROOT / 'yamls/quickstart.yaml')
WSD = 'scheduler.name=warmup_stable_decay'


@pytest.fixture(autouse=True)
def folder_without_data(tmp_path, monkeypatch):
    """The tests must not read a ./my-copy-c4 of the person who runs them."""
    monkeypatch.chdir(tmp_path)


def check(*overrides: str, world_size: int = 1, has_gpu: bool = False, yaml: str = QUICKSTART, num_nodes: int = 1):
    return check_config(config.load([yaml, *overrides]), plugins.REGISTRIES, world_size, has_gpu, num_nodes)


BAD = [
    # override, parts of the message
    (['max_duraton=10ba'], ['max_duraton', "did you mean 'max_duration'"]),
    (['model.n_layerz=3'], ['model.n_layerz', "did you mean 'n_layers'"]),
    (['train_loader.dataset.shufle=true'], ['train_loader.dataset.shufle', "did you mean 'shuffle'"]),
    (['train_loader.dataset.predownlod=3'], ['train_loader.dataset.predownlod', "did you mean 'predownload'"]),
    (['optimizer.learning_rate=1'], ['optimizer.learning_rate', 'known: betas, cautious, eps, fused, lr, momentum']),
    (['optimizer.lr=fast'], ["optimizer.lr: 'fast' must be a number"]),
    (['optimizer.lr=-1'], ['optimizer.lr: -1 must be greater than 0']),
    (['optimizer.name=adam'], ["optimizer.name: 'adam' must be 'decoupled_adamw', 'adamw' or 'muon'"]),
    (['optimizer.betas=[0.9]'], ['optimizer.betas: [0.9] must be two numbers']),
    (['optimizer.momentum=0.9', 'optimizer.cautious=true'],
     ['2 mistakes', "optimizer.momentum: 0.9 works only with optimizer.name=muon, but that is 'decoupled_adamw'; set optimizer.name=muon,"
      ' or remove momentum', 'optimizer.cautious: true works only with optimizer.name=muon']),
    (['optimizer.name=muon', 'optimizer.momentum=1'], ['optimizer.momentum: 1 must be less than 1']),
    (['scheduler.name=cosine'], ["scheduler.name: 'cosine' must be 'cosine_with_warmup'"]),
    (['scheduler.t_warmup=100'], ["scheduler.t_warmup: '100' must be a time: a whole number with a unit, as in 100ba"]),
    (['scheduler.t_warmup=100 batches'], ["'100 batches' must be a time", '100ba']),
    (['max_duration=1_000_000tok'], ["scheduler.t_warmup: '50ba' and max_duration '1_000_000tok' must have the same unit"]),
    (['max_duration=1ep', 'scheduler.t_warmup=0.1dur'], ["max_duration: '1ep'", 'concat', 'ba']),
    (['max_duration=0ba'], ["max_duration: '0ba' must be greater than 0"]),
    (['max_duration=1dur'], ["max_duration: '1dur' would be a fraction of the run itself"]),
    (['model.n_heads=5'], ['model.n_heads: 5 does not divide model.d_model 128', '1, 2, 4, 8']),
    (['model.max_seq_len=64'], ['128 is above model.max_seq_len 64; set model.max_seq_len=128, or train_loader.dataset.'
                                'max_seq_len=64', 'eval_loader.dataset.max_seq_len: 128 is above']),
    (['model.name=gpt5'], ["model: name must be 'mosaic_gpt' or 'modern_gpt' or 'hf_causal_lm', not 'gpt5'"]),
    (['model.attn_impl=xformers'], ["model.attn_impl: 'xformers' must be 'torch', 'sdpa', 'flash' or 'auto'"]),
    (['model.attn_impl=flash'], ["model.attn_impl: 'flash' needs a GPU; set model.attn_impl=auto"]),
    (['model.attn_within_document=true', 'eval_loader.dataset.sequence_ids=false'],
     ['1 mistake', 'attn_within_document: true does not go with eval_loader.dataset.sequence_ids false; remove',
      'from both datasets: it then follows the model']),
    (['train_loader.dataset.sequence_ids=true'],
     ['attn_within_document: false does not go with train_loader.dataset.sequence_ids true']),
    (['precision=amp_bf16'], ["precision: 'amp_bf16' needs a GPU; on a CPU set auto or fp32"]),
    (['precision=fp8'], ["precision: 'fp8' must be 'auto'"]),
    (['device_train_microbatch_size=auto'], ["device_train_microbatch_size: 'auto' needs a GPU"]),
    (['callbacks.memory_snapshot={}', 'callbacks.oom_observer={}', 'callbacks.profiler={}'],
     ['2 mistakes', 'callbacks.memory_snapshot: needs a GPU, because it records GPU memory; set callbacks.memory_snapshot=false',
      'callbacks.oom_observer: needs a GPU']),
    (['callbacks.profiler.active=many'], ["1 mistake", "callbacks.profiler.active: 'many' must be a whole number"]),
    (['callbacks.profiler.actve=1'], ["callbacks.profiler.actve: no such key; did you mean 'active'?"]),
    (['device_train_microbatch_size=0'], ['device_train_microbatch_size: 0 must be greater than 0']),
    (['global_train_batch_size=24.5'], ['global_train_batch_size: 24.5 must be a whole number']),
    (['fsdp_config.sharding_stratgy=FULL_SHARD'], ['fsdp_config.sharding_stratgy', "did you mean 'sharding_strategy'"]),
    (['fsdp_config.sharding_strategy=FULL'], ["fsdp_config.sharding_strategy: 'FULL' must be 'FULL_SHARD'"]),
    (['fsdp_config.auto_wrap=true'], ['fsdp_config.auto_wrap: no such key; known: activation_checkpointing, ']),
    (['compile_config.moed=default'], ["compile_config.moed: no such key; did you mean 'mode'?"]),
    (['compile_config.backend=inducter'], ["compile_config.backend: 'inducter' is not one of ", 'inductor']),
    (['compile_config.mode=default', 'compile_config.options.max_autotune=true'],
     ['compile_config.mode and options: torch.compile takes only one of the two']),
    (['compile_config.mode=reduce-overhead'], ["compile_config.mode: 'reduce-overhead' uses CUDA graphs", 'set compile_config.scope=model']),
    (['compile_config.scope=layer'], ["compile_config.scope: 'layer' must be 'auto', 'block' or 'model'"]),
    (['compile_config.mode=fast'], ["compile_config.mode: 'fast' must be 'default', 'reduce-overhead'"]),
    (['model.flash_kernel=cudnn', 'model.attn_impl=sdpa'],
     ["model.flash_kernel: 'cudnn' works only with model.attn_impl=flash, but that is 'sdpa'; set model.attn_impl=flash"]),
    (['model.flash_kernel=flash-attn-3', 'model.attn_pdrop=0.1'],
     ["model.flash_kernel: 'flash-attn-3' has no dropout, but model.attn_pdrop is 0.1; set model.attn_pdrop=0"]),
    (['model.loss_impl=fused'], ["model.loss_impl: 'fused' must be 'chunked' or 'plain'"]),
    (['model.vocab_multiple=0'], ['model.vocab_multiple: 0 must be greater than 0']),
    (['train_loader.dataset.cache_limit=1gb'],
     ["train_loader.dataset.cache_limit: '1gb' with no remote would delete the only copy"]),
    (['train_loader.dataset.split=val'],
     ["eval_loader.dataset.split: 'val' is also what train_loader reads", 'allow_same_split=true']),
    (['eval_loader.dataset.group_method=concat'], ["eval_loader.dataset.group_method: 'concat'", 'truncate', 'packed tokens']),
    (['train_loader.dataset.group_method=pack'], ["'pack' must be 'truncate' or 'concat'"]),
    (['train_loader.prefetch_factor=2'], ['train_loader.prefetch_factor: 2 needs worker processes', 'num_workers']),
    (['train_loader.eval_samples=5'], ['train_loader.eval_samples: 5 has no effect on training']),
    (['callbacks.speed_monitr={}'], ['callbacks.speed_monitr: no such name', "did you mean 'speed_monitor'"]),
    (['callbacks.speed_monitor.window=3'], ['callbacks.speed_monitor.window: no such key', "did you mean 'window_size'"]),
    (['loggers.wnadb={}'], ['loggers.wnadb', "did you mean 'wandb'"]),
    (['algorithms.gradient_clipping.threshold=1'],
     ['algorithms.gradient_clipping.threshold', "did you mean 'clipping_threshold'"]),
    (['callbacks={2: {}, on: {}}'], ['callbacks.2: no such name', 'callbacks.True: no such name']),
    (['callbacks.early_stopper={monitor: loss, dataloader_label: eval, min_delta: .nan}'],
     ['callbacks.early_stopper.min_delta: nan must be a number']),
    (['callbacks.early_stopper=null'], ['callbacks.early_stopper.monitor: missing; it has no default']),
    (['algorithms.dropout=3'], ['algorithms.dropout: no such name']),
    (['autoresume=true'], ['autoresume: true needs save_folder and run_name']),
    (['load_weights_only=true'], ['load_weights_only: true has no effect without load_path']),
    (['optimizer=null'], ['optimizer: missing; it has no default']),
    (['model=null'], ['model: missing; it has no default']),
    (['model={}'], ["model: name must be 'mosaic_gpt' or 'modern_gpt' or 'hf_causal_lm', not null"]),
    (['model=[1,2]'], ['override model=...: the config has a section with keys there and the override a list']),
    (['callbacks=[speed_monitor]'], ['override callbacks=...']),
    (['callbacks.speed_monitor=5'], ['1 mistake', 'callbacks.speed_monitor: must be a section with keys, {} for']),
    (['callbacks.speed_monitor.window_size=x'], ["callbacks.speed_monitor.window_size: 'x' must be a whole number"]),
    (['callbacks.speed_monitor.window_size=0'], ['callbacks.speed_monitor.window_size: 0 must be greater than 0']),
    (['callbacks.early_stopper={}'],
     ['callbacks.early_stopper.monitor: missing', 'callbacks.early_stopper.dataloader_label: missing']),
    (['loggers.tensorboard.log_dir=5'],
     ['loggers.tensorboard.log_dir: 5 must be text: put it in quotes', "loggers.tensorboard.log_dir=\"'5'\" in a shell"]),
    (['loggers.tensorboard.flush_interval=0'], ['loggers.tensorboard.flush_interval: 0 must be greater than 0']),
    (['loggers.wandb.init_kwargs=5'], ['loggers.wandb.init_kwargs: 5 must be a section']),
    (['algorithms.gradient_clipping.clipping_threshold=x'],
     ["algorithms.gradient_clipping.clipping_threshold: 'x' must be a number"]),
    (['max_duration=4.5ba'], ["max_duration: '4.5ba' must be a time: a whole number with a unit"]),
    (['max_duration=1__0ba'], ["max_duration: '1__0ba' must be a time"]),
    (['eval_interval=1.5ba'], ["eval_interval: '1.5ba' must be a time"]),
    (['scheduler.t_warmup=1ep'], ["scheduler.t_warmup: '1ep' and max_duration '1200ba' must have the same unit"]),
    (['scheduler.t_warmup=1.5dur'], ["scheduler.t_warmup: '1.5dur' is not shorter than the run"]),
    (['scheduler.t_warmup=50ba', 'max_duration=20ba'],
     ["scheduler.t_warmup: '50ba' is not shorter than the run (max_duration '20ba')", 'scheduler.t_warmup=0.1dur']),
    (['scheduler.t_warmup=20ba', 'max_duration=20ba'], ["scheduler.t_warmup: '20ba' is not shorter"]),
    (['scheduler.t_warmup=300tok', 'max_duration=200tok'], ["scheduler.t_warmup: '300tok' is not shorter"]),
    (['callbacks.speed_monitor={}', 'callbacks={}', 'callbacks.speed_monitr={}'], ['1 mistake', 'callbacks.speed_monitr']),
    (['eval_loader={}'], ['eval_loader.dataset: missing']),
    (['run_name='], ['override run_name=: has no value', 'that variable is empty', 'write run_name=null']),
    (['load_path= '], ['override load_path=: has no value']),
    (['optimizer.lr=1e-3 # high'], ["override optimizer.lr=...: YAML reads '#' as the start of a comment here"]),
    (['loggers.wandb.project=fix #3'], ['override loggers.wandb.project=...', "loggers.wandb.project=\"'no #3'\""]),
    (['loggers.wandb.project=#3'], ["override loggers.wandb.project=...: YAML reads '#' as the start of a comment"]),
    (['train_loader=null'], ['train_loader: missing; it has no default']),
    (['scheduler.t_max=2ba'], ["scheduler.t_max: '2ba' must be at least max_duration '1200ba'"]),
    (['scheduler.cooldown=0.5', 'scheduler.cooldown_shape=1-sqrt'],
     ['2 mistakes', "scheduler.cooldown: 0.5 works only with scheduler.name=warmup_stable_decay, but that is 'cosine_with_warmup'",
      "scheduler.cooldown_shape: '1-sqrt' works only with", 'or remove cooldown_shape']),
    ([WSD, 'scheduler.cooldown=0'], ['scheduler.cooldown: 0 must be greater than 0']),
    ([WSD, 'scheduler.t_max=1200ba'],
     ['1 mistake', "scheduler.t_max: '1200ba' has no effect with scheduler.name 'warmup_stable_decay', whose", 'remove t_max']),
    ([WSD, 'scheduler.t_warmup=721ba'],
     ['1 mistake', "scheduler.t_warmup: '721ba' ends after the cool-down begins, the last 0.4 of max_duration '1200ba'; set a shorter"]),
    ([WSD, 'scheduler.t_warmup=0.61dur'], ['1 mistake', "scheduler.t_warmup: '0.61dur' ends after the cool-down begins"]),
    ([WSD, 'scheduler.t_warmup=1dur'], ['1 mistake', "scheduler.t_warmup: '1dur' is not shorter than the run"]),
    (['scheduler.t_max=2tok'], ['must have the same unit', 't_max']),
    (['console_log_interval=0ba'], ["console_log_interval: '0ba' must be a number of batches or epochs above 0"]),
    (['seed=99999999999'], ['seed: 99999999999 must be less than or equal to 4294967295']),
    (['eval_samples=0'], ['eval_samples: 0 would evaluate nothing']),
    (['max_seq_len=1'], ['max_seq_len: 1 must be greater than 1']),
    (['eval_loader.dataset.remote=./my-copy-c4/', 'eval_loader.dataset.split=train'],
     ["eval_loader.dataset.split: 'train' is also"]),
    (['fsdp_config.version=3'], ['fsdp_config.version: 3 must be 1, 2 or null']),
    (['fsdp_config.version=1'], ['fsdp_config.version: 1 needs a GPU; set fsdp_config.version=null, which is version 2 on CPUs']),
    (['fsdp_config.sharding_strategy=HYBRID_SHARD'],
     ["FSDP version 2 (the only one on CPUs) has no 'HYBRID_SHARD'; set FULL_SHARD, or on GPUs fsdp_config.version=1"]),
    (['fsdp_config.data_parallel_shard_degree=2'],
     ['data_parallel_shard_degree and data_parallel_replicate_degree: FSDP version 2 (the only one on CPUs) always shards']),
    (['fsdp_config.sharding_strategy=NO_SHARD', 'fsdp_config.activation_checkpointing=true'],
     ["activation_checkpointing, activation_cpu_offload: 'NO_SHARD' in", 'set fsdp_config.sharding_strategy to SHARD_GRAD_OP']),
    (['fsdp_config.sharding_strategy=NO_SHARD', 'fsdp_config.state_dict_type=sharded'],
     ["fsdp_config.state_dict_type: 'NO_SHARD' in FSDP version 2", "is DDP, which cannot save 'sharded'; set full"]),
    (['fsdp_config.load_monolith_rank0_only=true'],
     ['fsdp_config.load_monolith_rank0_only: FSDP version 2 (the only one on CPUs) cannot do this; set false']),
    (['fsdp_config.sharded_ckpt_prefix_dir=x'], ["fsdp_config.sharded_ckpt_prefix_dir: 'x' must be"]),
    (['fsdp_config.sharding=FULL_SHARD'], ["fsdp_config.sharding: no such key; did you mean 'sharding_strategy'?"]),
    (['train_loader.dataset.batching_method=device_per_stream'], ["'device_per_stream' must be 'random'"]),
    (['save_num_checkpoints_to_keep=0'], ['save_num_checkpoints_to_keep: 0 would keep none; set 1 or more, or -1 for all']),
    (['save_folder=gs://bucket/x'], ['save_num_checkpoints_to_keep: 2 works only on disks and on s3://; for gs://bucket/x set -1']),
    (['save_folder=None'], ["save_folder: 'None' would be a file or folder", 'write save_folder=null for none, or ./None']),
    (["save_folder='null'", 'load_path=false', 'loggers.tensorboard.log_dir=none'],
     ['3 mistakes', "save_folder: 'null' would", "load_path: 'false' would", 'loggers.tensorboard.log_dir=null']),
    (['save_folder=$HOME/ck'], ["save_folder: '$HOME/ck' would keep its $ or ~", 'write ${oc.env:HOME}/..., or']),
    (['save_folder=/$(whoami)/ck', 'load_path=~nobodyx/ck', 'loggers.file.filename=~nobodyx/x'],
     ['3 mistakes', "save_folder: '/$(whoami)/ck' would", "load_path: '~nobodyx/ck' would", 'loggers.file.filename: ']),
    (['save_folder=dbfs:/x', 'load_path=s3:/b/x'],
     ['2 mistakes', "save_folder: 'dbfs:/x' would be a folder on the disk", "load_path: 's3:/b/x' would", 's3://b']),
    (['save_folder=./ck/{run_name'], ["save_folder: './ck/{run_name' has braces, but only these words may stand in braces: run_name"]),
    (['save_folder=./{foo}', 'loggers.file.filename=a{foo.txt'], ['2 mistakes', "'./{foo}' has", 'node_rank; write']),
    (['save_folder=./{}'], ["save_folder: './{}' has braces"]),
    (['save_folder=./{rank}'], ["save_folder: './{rank}' has braces, but only"]),
    (['run_name=a{b'], ["run_name: 'a{b' has braces", '$COMPOSER_RUN_NAME']),
    (['max_nonfinite_in_a_row=0'], ['max_nonfinite_in_a_row: 0 must be greater than 0']),
    (['fsdp_config.cpu_offload=true'], ['fsdp_config.cpu_offload: true must be false']),
    (['train_loader.dataset.download_retry=0'], ['train_loader.dataset.download_retry: 0 must be greater than or equal to 1']),
    (['data_local=${nowhere}'],
     ["'nowhere' not found; for a variable of the shell write ${oc.env:nowhere} (key: data_local)"]),
    (["load_path=''"], ['1 mistake', 'load_path: is empty; write a value, or load_path=null for none. A shell '
                        'variable that is not set gives']),
    (['save_folder=${oc.env:EMPTY}', "run_name=''", 'autoresume=true'],
     ['save_folder: is empty', 'run_name: is empty']),
    (["data_remote=''"], ['data_remote: is empty', 'train_loader.dataset.remote: is empty']),
    (['max_duration="1200ba\\n"'], ["max_duration: '1200ba\\n' must be a time"]),
    (['console_log_interval="1ba\\n"'], ["console_log_interval: '1ba\\n' must be a number of batches"]),
    (['dist_timeout=1e30', 'train_loader.timeout=1e7', 'train_loader.num_workers=1',
      'eval_loader.dataset.download_timeout=1e7'],
     ['3 mistakes', 'dist_timeout: 1e+30 must be less than or equal to 2000000', 'train_loader.timeout: 1', 'download_timeout: 1']),
    (['algorithms.gradient_clipping.clipping_threshold=.nan', 'optimizer.betas=[.nan,0.9]'],
     ['2 mistakes', 'clipping_threshold: nan must be greater than 0', 'optimizer.betas.0: nan must be a']),
    (['algorithms.ema={half_life: null, smoothing: 0.9}'],
     ['1 mistake', 'algorithms.ema.update_interval: missing; it has no default without half_life']),
    (['train_loader.dataset.epoch_size=0', 'eval_loader.dataset.epoch_size=abc'],
     ['2 mistakes', 'train_loader.dataset.epoch_size: 0 must be a number of samples above 0, such as 5000000 or 2.5m',
      "eval_loader.dataset.epoch_size: 'abc' must be"]),
    (['train_loader.dataset.cache_limit=0', 'eval_loader.dataset.cache_limit=0gb'],
     ["2 mistakes", "train_loader.dataset.cache_limit: 0 must be a number of bytes above 0, such as 5000000 or 100gb",
      "eval_loader.dataset.cache_limit: '0gb' must"]),
    (['seed=017'], ['override seed=...: YAML reads a number that begins with 0 in base 8, and one with colons']),
    (['global_train_batch_size=1:30'], ['override global_train_batch_size=...', 'in base 60; write it in base 10']),
    (['algorithms.gradient_clipping.clipping_type=foo', 'callbacks.optimizer_monitor.batch_log_interval=0',
      'callbacks.runtime_estimator.skip_batches=-1', 'callbacks.memory_monitor.dist_aggregate_batch_interval=0'],
     ['4 mistakes', "clipping_type: 'foo' must be 'norm', 'value' or 'adaptive'", 'batch_log_interval: 0 must be',
      'skip_batches: -1 must be greater than or equal to 0', 'dist_aggregate_batch_interval: 0 must be greater than 0']),
    (['seed=!!int abc'], ['override seed=...: its value cannot be read as YAML']),
    (['seed=!!bool abc'], ['override seed=...: its value cannot be read as YAML']),
    (['seed=!!timestamp abc'], ['override seed=...: its value cannot be read as YAML']),
    ([f'seed={"9" * 5000}'], ['override seed=...: its value cannot be read as YAML']),
    (['callbacks.text_samples.prompts=[1,2]'], ['text_samples.prompts.0: 1 must be text', 'text_samples.prompts.1: 2 must be text']),
    (['loggers.tensorboard.log_dir=false'], ['log_dir: false must be text; write null for none']),
    *(([f'{key}={2**80}'], [f'{key}: {2**80} must be less than or equal to ']) for key in (
        'train_loader.dataset.shuffle_seed', 'model.init_seed', 'global_train_batch_size', 'device_eval_batch_size',
        'train_loader.dataset.shuffle_block_size', 'max_seq_len', 'model.n_layers')),
    *(([f'{key}=.inf'], ['1 mistake', f'{key}: inf must be a finite number']) for key in (
        'optimizer.lr', 'optimizer.eps', 'optimizer.weight_decay', 'model.init_std', 'dist_timeout')),
]


@pytest.mark.parametrize('overrides,parts', BAD, ids=[o[0][:60] for o, _ in BAD])
def test_a_bad_value_is_named_with_what_is_allowed(overrides, parts, monkeypatch):
    monkeypatch.setenv('EMPTY', '')
    with pytest.raises(UserError) as e:
        check(*overrides)
    for part in parts:
        assert part in str(e.value)
    assert 'pydantic' not in str(e.value) and 'Traceback' not in str(e.value)


@pytest.mark.parametrize('overrides, key, value', [
    (['run_name=12345'], 'run_name', '12345'),
    (['run_name=007'], 'run_name', '007'),
    (['run_name=1e5'], 'run_name', '1e5'),
    (['run_name=true'], 'run_name', 'true'),
    (['run_name=fix #3'], 'run_name', 'fix #3'),
    (['run_name=a: b'], 'run_name', 'a: b'),
    (["run_name='12 # 3'"], 'run_name', '12 # 3'),
    (['run_name=null'], 'run_name', None),
    (['loggers.wandb.init_kwargs={notes: "a # b"}', 'loggers.wandb.project=x#3'], 'loggers.wandb',
     {'init_kwargs': {'notes': 'a # b'}, 'project': 'x#3'}),
    (['callbacks.text_samples.prompts=["# The", "a #b"]'], 'callbacks.text_samples.prompts', ['# The', 'a #b']),
    (['run_name=~'], 'run_name', None),
    (['save_folder=./c/{run_name}'], 'save_folder', './c/{run_name}'),
    (['save_folder=${data_remote}/c', 'data_remote=/d'], 'save_folder', '/d/c'),
    (['save_folder=./none/{world_size}{run_name}'], 'save_folder', './none/{world_size}{run_name}'),
    (['save_folder=${oc.env:HOME}/c$5~'], 'save_folder', '/home/me/c$5~'),
    (['load_path=s3://b:1/x', 'loggers.file.filename=./{run_name}-{rank}'], 'load_path', 's3://b:1/x'),
    (['save_folder=~/c'], 'save_folder', '/home/me/c'),
    (['data_remote=~/d'], 'train_loader.dataset.local', '/home/me/d'),
    (['loggers.tensorboard.log_dir=~/runs'], 'loggers.tensorboard.log_dir', '/home/me/runs'),
    (['tokenizer.tokenizer_name=5'], 'tokenizer.tokenizer_name', '5'),
    (['callbacks={}'], 'callbacks', {}),
    (['callbacks=null'], 'callbacks', {}),
    (['algorithms=null', 'loggers={}'], 'algorithms', {}),
    (['callbacks={}', 'callbacks.lr_monitor={}'], 'callbacks', {'lr_monitor': {}}),
    (['callbacks.speed_monitor={}'], 'callbacks.speed_monitor', {}),
    (['callbacks.speed_monitor.window_size=null'], 'callbacks.speed_monitor', {}),
    (['callbacks.early_stopper={monitor: Perplexity, dataloader_label: train, patience: null}'],
     'callbacks.early_stopper', {'monitor': 'Perplexity', 'dataloader_label': 'train'}),
    (['algorithms={ema: {half_life: null, smoothing: 0.9, update_interval: 1ba}}'], 'algorithms.ema',
     {'half_life': None, 'smoothing': 0.9, 'update_interval': '1ba'}),
    (['run_name=017'], 'run_name', '017'),
    (["train_loader.dataset.split=''"], 'train_loader.dataset.split', ''),
    (['train_loader.dataset.epoch_size=0.1k'], 'train_loader.dataset.epoch_size', '0.1k'),
    (['compile_config={}'], 'compile_config.scope', 'block'),
    (['compile_config.scope=model', 'compile_config={}'], 'compile_config.scope', 'block'),
    (['fsdp_config.verbose=true', 'fsdp_config={}'], 'fsdp_config.verbose', False),
    (['model.init_std=null'], 'model.init_std', 0.02),
    (['optimizer.betas=null'], 'optimizer.betas', [0.9, 0.95]),
    (['eval_interval=null'], 'eval_interval', '1ep'),
    (['train_loader.dataset.shuffle=null'], 'train_loader.dataset.shuffle', False),
])
def test_what_a_shell_and_yaml_make_of_a_value(overrides, key, value, monkeypatch):
    monkeypatch.setenv('HOME', '/home/me')
    found = config.to_plain(check(*overrides))
    for part in key.split('.'):
        found = found[part]
    assert found == value


@pytest.mark.parametrize('yaml, message', [
    ('save_folder: false', 'save_folder: false must be text; write null for none'),
    ('run_name: 12345', 'run_name: 12345 must be text: put it in quotes, run_name: \'12345\' in a YAML'),
    ('eval_interval: 100', 'eval_interval: 100 must be a time: a whole number with a unit, as in 100ba'),
    ('console_log_interval: 10', 'console_log_interval: 10 must be a number of batches or epochs above 0, as in 10ba')])
def test_a_number_where_a_yaml_must_have_text(yaml, message):
    cfg = OmegaConf.merge(config.load([QUICKSTART]), OmegaConf.create(yaml))
    with pytest.raises(UserError) as e:
        check_config(cfg, plugins.REGISTRIES, 1, False)
    assert message in str(e.value)


def test_a_fraction_of_the_run_in_its_units():
    for interval, run, found in (('0.5dur', '6ba', '3ba'), ('0.1dur', '30ba', '3ba'), ('0.333dur', '6ba', '2ba'),
                                 ('1dur', '9ba', '9ba'),
                                 ('0.25dur', '1_000tok', '250tok'), ('0.5dur', '2ep', '0.5dur'), ('7ba', '2ep', '7ba')):
        assert to_batches_samples_or_tokens(interval, run) == found


def test_a_warm_up_in_epochs_is_held_against_a_run_in_batches():
    c = check('scheduler.t_warmup=1ep', 'max_duration=100ba', 'train_loader.dataset.group_method=truncate')
    check_warmup(c, 99)
    check_warmup(c, None)
    with pytest.raises(UserError, match=r"scheduler.t_warmup: '1ep' is not shorter than the run \(max_duration '100ba'\)"):
        check_warmup(c, 100)


def test_a_warm_up_may_end_where_the_cool_down_begins():
    for warmup, *more in (('0.6dur',), ('720ba',), ('0ba', 'scheduler.cooldown=1'), ('0.9dur', 'scheduler.cooldown=0.1')):
        check(WSD, f'scheduler.t_warmup={warmup}', *more)
    c = check(WSD, 'scheduler.t_warmup=1ep', 'max_duration=100ba', 'train_loader.dataset.group_method=truncate')
    check_warmup(c, 60)
    check_warmup(c, None)
    with pytest.raises(UserError, match="scheduler.t_warmup: '1ep' ends after the cool-down begins, the last 0.4 of max_duration"):
        check_warmup(c, 61)


@pytest.mark.parametrize('t_max, run, epoch', [('10ba', '2ep', 6), ('1ep', '20ba', 19)])
def test_t_max_in_epochs_or_batches_is_held_against_the_run(t_max, run, epoch):
    c = check(f'scheduler.t_max={t_max}', f'max_duration={run}', 'scheduler.t_warmup=1ba',
              'train_loader.dataset.group_method=truncate')
    check_warmup(c, 5 if run == '2ep' else 20)
    check_warmup(c, None)
    with pytest.raises(UserError, match=f"scheduler.t_max: '{t_max}' must be at least max_duration '{run}'; set scheduler.t_max=1dur"):
        check_warmup(c, epoch)


def test_sizes_of_a_hugging_face_model_are_above_zero():
    yaml = str(ROOT / 'yamls/hf_causal_lm/gpt2-small.yaml')
    with pytest.raises(UserError, match='2 mistakes.*\n.*overrides.n_embd: 0 must be greater than 0\n.*n_layer: -1'):
        check('model.config_overrides.n_embd=0', 'model.config_overrides.n_layer=-1', yaml=yaml)
    with pytest.raises(UserError, match="train_loader.dataset.sequence_ids: true works only with mosaic_gpt and modern_gpt"):
        check('train_loader.dataset.sequence_ids=true', yaml=yaml)


def test_a_section_that_others_refer_to_is_named():
    cfg = OmegaConf.merge(config.load([QUICKSTART]), {'model': None, 'train_loader': {
        'dataset': {'sequence_ids': '${model.attn_within_document}'}}})
    with pytest.raises(UserError, match='^model: None must be a section with keys of its own; train_loader.dataset.seq'):
        check_config(cfg, plugins.REGISTRIES, 1, False)


def test_the_index_is_read_where_the_data_lies(tokens_root, mds_root, s3):
    for root, name in ((tokens_root, 'tokens'), (mds_root, 'text')):
        for split in ('train', 'val'):
            s3.upload_file(str(root / split / 'index.json'), 'bucket', f'{name}/{split}/index.json')
    remote = ['data_local=/tmp/x', 'scheduler.t_warmup=0.1dur', 'max_duration=1ep']
    assert check('data_remote=s3://bucket/tokens', *remote).max_duration == '1ep'
    check('data_remote=s3://bucket/tokens', *remote, 'train_loader.dataset.num_canonical_nodes=64', world_size=8, num_nodes=4)
    for place in ('text', 'nothing'):
        with pytest.raises(UserError, match="max_duration: '1ep': with group_method 'concat' the number of batches in an"):
            check(f'data_remote=s3://bucket/{place}', *remote)


def test_val_alone_is_enough_to_profile(mds_root, tmp_path):
    (tmp_path / 'val').symlink_to(mds_root / 'val')
    with pytest.raises(UserError, match='no split .train.; it has: val. .*train_loader.dataset.split=val allow_same_split=true'):
        check_places(None, str(tmp_path), 'train', None)


def test_a_linked_split_has_no_cache_limit(mds_root, tmp_path):
    (tmp_path / 'train').symlink_to(mds_root / 'train')
    with pytest.raises(UserError, match='train_loader.dataset.cache_limit: .* would delete the only copy'):
        check(f'data_remote={mds_root}', f'data_local={tmp_path}', 'train_loader.dataset.cache_limit=1gb')


@pytest.mark.parametrize('key, message', [
    ('seeed', "did you mean 'seed'?"),
    ('model.n_layrs', "did you mean 'n_layers'?"),
    ('model.heads', "did you mean 'n_heads'?"),
    ('batch_size', "did you mean 'global_train_batch_size' or 'device_eval_batch_size'?"),
    ('epochs', 'known: algorithms, '),
    ('load', "did you mean 'load_path' or 'load_weights_only'?"),
    ('model.hidden_size', 'known: activation_checkpointing_every, '),
    ('fsdp_config.orig_params', "did you mean 'use_orig_params'?"),
    ('fsdp_config.max_params', 'known: activation_checkpointing, '),
    ('train_loader.dataset.buffer', 'known: batching_method, '),
])
def test_a_near_key_is_offered_and_else_all(key, message):
    with pytest.raises(UserError) as e:
        check(f'{key}=1')
    assert f'{key}: no such key; {message}' in str(e.value)


def test_the_quick_start_itself_has_no_mistake():
    assert check().model.d_model == 128
    assert check('data_remote=/elsewhere').eval_loader.dataset.local == '/elsewhere'  # reaches every place
    assert check(has_gpu=True, world_size=8).global_train_batch_size % 8 == 0


def test_all_mistakes_are_reported_at_once():
    with pytest.raises(UserError) as e:
        check('max_duraton=1ba', 'optimizer.lr=fast', 'callbacks.lr_monitr={}', 'model.mlp_act=relu')
    assert '4 mistakes' in str(e.value)
    for part in ('max_duraton', 'optimizer.lr', 'lr_monitr', "'relu' must be 'gelu' or 'gelu_tanh'"):
        assert part in str(e.value)


def test_flash_in_fp32_is_refused():
    with pytest.raises(UserError, match="model.attn_impl: 'flash' computes in fp16 or bf16, but precision is 'fp32'"):
        check('model.attn_impl=flash', 'precision=fp32', has_gpu=True)
    assert check('model.attn_impl=flash', has_gpu=True).model.attn_impl == 'flash'


def test_a_typo_does_not_hide_impossible_combinations():
    with pytest.raises(UserError) as e:
        check('model.n_heads=5', 'precision=amp_bf16', 'max_duraton=1ba')
    assert '3 mistakes' in str(e.value)
    for part in ('n_heads: 5 does not divide', "precision: 'amp_bf16' needs a GPU", 'max_duraton: no such key'):
        assert part in str(e.value)


def test_fp8():
    with pytest.raises(UserError, match=r"model.linear_impl: 'fp8' needs multiples of 16, but train_loader.*_seq_len is 40"):
        check('model.linear_impl=fp8', 'max_seq_len=40')
    assert check('model.linear_impl=fp8').model.linear_impl == 'fp8'


@pytest.mark.parametrize('overrides, message', [
    (['compile_config.options={triton.cudagraphs: true}'], r"compile_config.options: .* uses CUDA graphs"),
    (['compile_config.backend=cudagraphs'], "compile_config.backend: 'cudagraphs' uses CUDA graphs"),
    (['compile_config.options={nonsense: 1}'], 'compile_config.options: nonsense: inductor has no such option'),
    (['model.activation_checkpointing_every=2'], 'activation_checkpointing_every: 2 has no effect'),
    (['model.loss_impl=plain', 'model.loss_chunk_tokens=8'], 'model.loss_chunk_tokens: 8 works only with'),
    (['compile_config.scope=model', 'fsdp_config.activation_checkpointing=true'], "compile_config.scope: 'model' does not compile blocks"),
    (['model.flash_kernel=cudnn'], "model.flash_kernel: 'cudnn' works only with model.attn_impl=flash, but that is 'auto'")])
def test_what_would_not_be_as_asked(overrides, message):
    with pytest.raises(UserError, match=message):
        check(*overrides)
    assert check('compile_config.options={max_autotune: true}').compile_config
    assert check('model.activation_checkpointing_every=2', 'fsdp_config.activation_cpu_offload=true').fsdp_config
    assert check('model.loss_impl=plain').model.loss_impl == 'plain'


def test_autoresume_takes_the_run_name_of_the_environment(monkeypatch):
    monkeypatch.setenv('COMPOSER_RUN_NAME', 'from-env')
    assert check('autoresume=true').autoresume
    monkeypatch.setenv('COMPOSER_RUN_NAME', 'a}')
    with pytest.raises(UserError, match="run_name: 'a}' has braces"):
        check()


def test_the_folder_of_the_run_itself_is_checked(tmp_path):
    (tmp_path / 'a').touch()
    c = check(f'save_folder={tmp_path}/{{run_name}}', 'run_name=a')
    with pytest.raises(UserError, match=f'save_folder: .* cannot be created or written: {tmp_path}/a is not a folder'):
        check_save_folder(c)
    for name in ('b', 'null'):
        check_save_folder(check(f'save_folder={tmp_path}/{{run_name}}', f'run_name={name}'))


def test_messages_hold_no_secret():
    for bad in (['loggers.neptune.api_token=TOPSECRET', 'optimizer.betas=[0.9'], ['optimizer.api_key=TOPSECRET'],
                ['loggers.wandb=TOPSECRET'], ['--password=TOPSECRET']):
        with pytest.raises(UserError) as e:
            check(*bad)
        assert 'TOPSECRET' not in str(e.value), bad


def test_all_impossible_combinations_are_reported_at_once():
    with pytest.raises(UserError) as e:
        check('model.n_heads=3', 'precision=amp_fp16', 'global_train_batch_size=10', world_size=4)
    assert '3 mistakes' in str(e.value) and '4 devices' in str(e.value)


def test_a_global_batch_that_does_not_divide_lists_the_nearest():
    with pytest.raises(UserError, match=r'global_train_batch_size: 256 does not divide by 48 devices; set 240 or 288, '
                                        r'or run on 32 or 64 devices'):
        device_batch_size(256, 48)
    with pytest.raises(UserError, match='16 devices; set 16$'):
        device_batch_size(3, 16)
    assert [device_batch_size(256, n) for n in (1, 8, 256)] == [256, 32, 1]


@pytest.mark.parametrize('device_batch,micro,accum', [(32, 16, 2), (32, 5, 7), (8, 8, 1), (1, 1, 1)])
def test_microbatches(device_batch, micro, accum):
    assert grad_accum(device_batch, micro) == accum
    assert (accum - 1) * micro < device_batch <= accum * micro


@pytest.mark.parametrize(('monitor', 'label', 'message'), [
    ('foo', 'eval', "monitor: 'foo' is not one of 'Perplexity'"), ('Perplexity', 'bar', "dataloader_label: 'bar' is not one of")])
def test_a_stopper_that_would_never_look_is_refused(monitor, label, message):
    c = check(f'callbacks.early_stopper={{monitor: {monitor}, dataloader_label: {label}}}')
    with pytest.raises(UserError, match=f'callbacks.early_stopper.{message}'):
        check_early_stopper(c, {'train': ['Loss'], 'eval': ['Perplexity']})


def test_reading_a_yaml_imports_nothing_that_is_slow():
    code = 'import src.config.load, sys; assert not {"torch", "streaming", "composer", "transformers"} & {*sys.modules}'
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)


def test_a_threshold_may_be_without_end():
    assert check('algorithms.gradient_clipping.clipping_threshold=.inf')


def test_missing_keys_are_named(tmp_path):
    (tmp_path / 'a.yaml').write_text('data_local: x\n')
    with pytest.raises(UserError) as e:
        check(yaml=str(tmp_path / 'a.yaml'))
    for key in ('tokenizer_name', 'max_seq_len', 'model', 'optimizer', 'device_train_microbatch_size'):
        assert f'{key}: missing' in str(e.value)


@pytest.mark.parametrize('argv,message', [
    ([], 'the first argument must be a YAML file'),
    (['max_duration=1ba'], 'the first argument must be a YAML file'),
    ([QUICKSTART.replace('.yaml', '.yml')], f'no such file. Did you mean {QUICKSTART}?'),
    (['x' * 300], 'x: no such file'),
    ([str(ROOT / 'yamls')], 'yamls: a folder, not a YAML file'),
    ([QUICKSTART, 'max_duration'], "override 'max_duration' is not of the form key=value"),
    ([QUICKSTART, '--max_duration=3'], "override '--max_duration' is not of the form key=value"),
    ([QUICKSTART, 'optimizer.betas=[0.9'], 'override optimizer.betas=...: its value cannot be read as YAML; put text in '),
    ([QUICKSTART, 'optimizer.betas.0=0.9'], 'Write a list as a whole, as in optimizer.betas=[0.9,0.95]'),
    ([QUICKSTART, 'seed=???'], 'override seed=???: has no value'),
    ([QUICKSTART, 'optimizer.betas.x={}'], 'override optimizer.betas.x=...: the config has a section with keys there'),
])
def test_a_bad_command_line_is_named(argv, message):
    with pytest.raises(UserError) as e:
        config.load(argv)
    assert message in str(e.value)


@pytest.mark.parametrize('secret', ['*abc', '!abc x', '${abc', '{abc'])
def test_a_value_that_cannot_be_read_is_not_printed(secret):
    with pytest.raises(UserError, match='loggers.wandb.api_key=...: its value cannot be read') as e:
        config.load([QUICKSTART, f'loggers.wandb.api_key={secret}'])
    assert 'abc' not in str(e.value)


@pytest.mark.parametrize('text', ['a: [1, 2', 'a: b: c', '- 1\n- 2', '\t- x', 'a: !!int abc', 'a: !!bool abc',
                                  'a: ' + '9' * 5000], ids=lambda text: text[:15])
def test_a_broken_yaml_is_named(tmp_path, text):
    path = tmp_path / 'broken.yaml'
    path.write_text(text)
    with pytest.raises(UserError, match='broken.yaml'):
        config.load([str(path)])


ON_GPUS = [
    (['fsdp_config.version=2', 'fsdp_config.sharding_strategy=HYBRID_SHARD'],
     "fsdp_config.sharding_strategy: FSDP version 2 has no 'HYBRID_SHARD'; set FULL_SHARD, or on GPUs fsdp_config.version=1"),
    (['fsdp_config.version=2', 'device_train_microbatch_size=auto'],
     "device_train_microbatch_size: FSDP version 2 has no 'auto'; set a number, or on GPUs fsdp_config.version=1"),
    (['fsdp_config.reduce_every_microbatch=false'], 'reduce_every_microbatch: false would sum the gradients in low precision'),
    (['fsdp_config.reduce_every_microbatch=false', 'device_train_microbatch_size=auto', 'fsdp_config.mixed_precision=FULL'],
     "fsdp_config.reduce_every_microbatch: false needs a number in device_train_microbatch_size, but that is 'auto'"),
    (['callbacks.profiler={}', 'device_train_microbatch_size=auto', 'callbacks.memory_snapshot={}'],
     "callbacks.profiler: does not work with device_train_microbatch_size: 'auto'; set a number"),
    (['callbacks.memory_snapshot={}', 'callbacks.oom_observer={}'],
     'callbacks.oom_observer: records nothing after callbacks.memory_snapshot has ended; set one of the two to false'),
    (['fsdp_config.version=2', 'fsdp_config.data_parallel_replicate_degree=2'], 'FSDP version 2 always shards over all'),
    (['fsdp_config.sharding_strategy=HYBRID_SHARD'], "'HYBRID_SHARD' needs fsdp_config.data_parallel_replicate_degree"),
    (['fsdp_config.load_monolith_rank0_only=true'], 'fsdp_config.load_monolith_rank0_only: true needs fsdp_config.sync_module_states=true'),
    (['fsdp_config.load_monolith_rank0_only=true', 'fsdp_config.sync_module_states=true', 'model.device=meta'],
     'fsdp_config.load_monolith_rank0_only: true needs model.device=cpu'),
    (['fsdp_config.load_monolith_rank0_only=true', 'fsdp_config.sync_module_states=true', 'fsdp_config.state_dict_type=sharded'],
     'fsdp_config.load_monolith_rank0_only: true needs fsdp_config.state_dict_type=full'),
]


@pytest.mark.parametrize('overrides,message', ON_GPUS, ids=[' '.join(o) for o, _ in ON_GPUS])
def test_what_composer_cannot_do_on_gpus_is_refused(overrides, message):
    with pytest.raises(UserError) as e:
        check(*overrides, has_gpu=True)
    assert message in str(e.value) and '1 mistake' in str(e.value)


def test_fsdp_version_follows_the_device():
    for version, gpu, strategy, want in ((None, True, 'FULL_SHARD', 1), (None, False, 'FULL_SHARD', 2), (2, True, 'NO_SHARD', 0),
                                         (1, True, 'NO_SHARD', 1), (None, False, 'NO_SHARD', 0), (2, True, 'SHARD_GRAD_OP', 2)):
        f = FSDPConfig(version=version, sharding_strategy=strategy)
        assert fsdp_version(f, gpu) == want
        built = build_parallelism(f, gpu)
        if want == 2:
            assert isinstance(built['fsdp'], FSDP2Config) and built['fsdp'].state_dict_type == 'full'
            assert built['fsdp'].reshard_after_forward is (strategy == 'FULL_SHARD')
        else:
            assert built is None if want == 0 else isinstance(built['fsdp'], ComposerFSDPConfig)
    assert fsdp_version(None, True) == 0


@pytest.mark.parametrize('has_gpu', [False, True], ids=['CPU', 'GPU'])
def test_muon_takes_fsdp_version_2_and_is_not_told_to_take_another(has_gpu):
    muon = 'optimizer.name=muon'
    assert check(muon, has_gpu=has_gpu).fsdp_config is None
    assert check(muon, 'fsdp_config={}', has_gpu=has_gpu).fsdp_config.version == 2
    refused = {
        'fsdp_config.version=1': "optimizer.name: 'muon' needs whole matrices, which fsdp_config.version 1 flattens; set "
                                 r'fsdp_config.version=2 \(also what null means with muon\)',
        'fsdp_config.sharding_strategy=HYBRID_SHARD': r"\(the only one with muon\) has no 'HYBRID_SHARD'; set FULL_SHARD",
        'fsdp_config.data_parallel_replicate_degree=2': 'always shards over all devices; remove both keys'}
    if has_gpu:
        refused['fsdp_config={} device_train_microbatch_size=auto'] = "muon.* has no 'auto'; set a number"
    for settings, message in refused.items():
        with pytest.raises(UserError, match=f'^1 mistake.*\n.*{message}$'):
            check(muon, *settings.split(), has_gpu=has_gpu)


def test_text_packed_on_the_fly_needs_canonical_nodes_that_fit():
    packed = ['train_loader.dataset.group_method=concat', 'train_loader.dataset.num_canonical_nodes=64',
              'global_train_batch_size=48']
    check(*packed, world_size=16, num_nodes=4)
    with pytest.raises(UserError, match='num_canonical_nodes: 64 must be a multiple or a divisor of the number of nodes, which is 6; .* such as 384'):
        check(*packed, world_size=48, num_nodes=6)
    check(*packed, 'train_loader.dataset.group_method=truncate', world_size=48, num_nodes=6)


def test_fsdp_keys_are_composers():
    theirs = {f.name for f in dataclasses.fields(ComposerFSDPConfig)}
    assert set(FSDPConfig.model_fields) - theirs == {'version', 'reduce_every_microbatch'}
    assert FSDP2Config.settable_attrs() - set(FSDPConfig.model_fields) == {'device_mesh', 'reshard_after_forward'}


def test_secrets_are_masked_everywhere():
    cfg = {'loggers': {'wandb': {'init_kwargs': {'api_key': 'abc123'}}, 'mlflow': {'tracking_uri': 'https://me:pass@host/x'}},
           'neptune_api_token': 'abc123', 'list': [{'password': 'abc123'}], 'tokenizer_name': 'gpt2', 'max_seq_len': 5,
           'data_remote': 's3://AKIA:abc123@bucket/x', 'monkey': 'banana', 'eos_token': 'abc123', 'secret': {'v': 'abc123'},
           'client_secret': ['abc123'], 'passwd': 9912345, 'url': 'https://me:p@ssabc123@host', 'api_key': None}
    text = str(config.mask_secrets(cfg))
    assert 'abc123' not in text and 'pass@' not in text and '9912345' not in text and "'api_key': None" in text
    assert "'tokenizer_name': 'gpt2'" in text and "'monkey': 'banana'" in text and "'max_seq_len': 5" in text


def test_interpolations_reach_nested_sections():
    cfg = OmegaConf.merge(config.load([QUICKSTART]), {'max_seq_len': 64})
    c = check_config(cfg, plugins.REGISTRIES, 1, False)
    assert c.train_loader.dataset.max_seq_len == c.tokenizer.max_seq_len == 64


@pytest.mark.parametrize('has_gpu, language', [(False, 'C\\+\\+'), (True, 'C')], ids=['CPU', 'GPU'])
def test_compilation_needs_a_compiler_and_the_headers_of_python(monkeypatch, tmp_path, has_gpu, language):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: has_gpu)
    check('compile_config={}', has_gpu=has_gpu)
    with monkeypatch.context() as patch:
        patch.setattr('sysconfig.get_path', lambda name: str(tmp_path))
        with pytest.raises(UserError, match=f'headers of Python on a .PU, and there is no {tmp_path}/Python.h') as e:
            check('compile_config={}', has_gpu=has_gpu)
    assert '1 mistake' in str(e.value)
    monkeypatch.setattr('shutil.which', lambda name: None)
    with pytest.raises(UserError, match=f'torch.compile needs a {language} compiler on a .PU, .* install one'):
        check('compile_config={}', has_gpu=has_gpu)
    check('compile_config.backend=aot_eager', has_gpu=has_gpu)
    check('compile_config={}', has_gpu=not has_gpu)  # an estimate for another machine


def test_auto_compiles_where_a_gpu_and_a_compiler_are(monkeypatch):
    auto, block, model = (CompileConfig(scope=scope) for scope in ('auto', 'block', 'model'))
    assert [compile_scope(cfg, False) for cfg in (None, auto, block, model)] == [None, None, 'block', 'model']
    assert [compile_scope(cfg, True) for cfg in (None, auto, block, model)] == [None, 'block', 'block', 'model']
    monkeypatch.setattr('shutil.which', lambda name: None)
    assert [compile_scope(cfg, True) for cfg in (None, auto, block, model)] == [None, None, 'block', 'model']
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    check('compile_config.scope=auto', has_gpu=True)
    with pytest.raises(UserError, match='uses CUDA graphs'):
        check('compile_config.scope=auto', 'compile_config.backend=cudagraphs')


def test_an_evaluation_has_batches_of_a_microbatch_unless_set():
    for override in ('device_eval_batch_size=null', 'console_log_interval=1ba'):
        cfg = config.load([QUICKSTART, override, 'device_train_microbatch_size=6'])
        if override.startswith('console'):
            del cfg['device_eval_batch_size']
        assert check_config(cfg, plugins.REGISTRIES, 1, False).device_eval_batch_size == 6
    assert check('device_train_microbatch_size=6').device_eval_batch_size == 32
    auto = ['device_train_microbatch_size=auto', 'device_eval_batch_size=null']
    with pytest.raises(UserError, match="1 mistake.*\n.*device_eval_batch_size: missing; .* is 'auto', .*; set a number"):
        check(*auto, has_gpu=True)
    check(*auto, 'eval_loader=null', has_gpu=True)
    with pytest.raises(UserError, match='device_eval_batch_size: 0 must be greater than 0'):
        check('device_eval_batch_size=0')


def test_an_evaluation_program_has_the_same_default():
    args = evaluate.parse_args([QUICKSTART, 'device_eval_batch_size=null', 'device_train_microbatch_size=6'])
    assert check_config(evaluate.load(args), plugins.REGISTRIES, 1, False).device_eval_batch_size == 6
