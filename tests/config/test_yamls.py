"""Every pre-baked run: validates, has exactly the parameters that it should, and trains when shrunk."""

import re
from pathlib import Path

import pytest
import torch
from runs import train
from transformers import AutoConfig, AutoModelForCausalLM

import main
from src.common.errors import UserError
from src.config import load as config
from src.config.check import check as check_config
from src.config.derived import fsdp_version
from src.config.schema import Config
from src.modern_gpt import ModernGPT
from src.mosaic_gpt import MosaicGPT
from src.training import plugins

MOSAIC = {
    # parameters, d_model, heads, layers, peak lr, global batch, batches, eval every, microbatch, checkpoint activations
    '125m': (125_226_240, 768, 12, 12, 6.0e-4, 256, 4800, 500, 16, False),
    '350m': (355_871_744, 1024, 16, 24, 3.0e-4, 256, 13400, 1000, 8, False),
    '760m': (760_300_032, 1536, 12, 24, 2.5e-4, 256, 29000, 2000, 4, False),
    '1b': (1_315_723_264, 2048, 16, 24, 2.0e-4, 512, 24800, 2000, 16, True),
    '3b': (2_651_553_280, 2560, 20, 32, 2.0e-4, 512, 51500, 5000, 8, True),
    '7b': (6_658_404_352, 4096, 32, 32, 1.2e-4, 1024, 63900, 5000, 8, True),
    '13b': (12_853_386_240, 5120, 40, 40, 1.0e-4, 1024, 124000, 5000, 8, True),
    '30b': (29_974_418_432, 7168, 56, 48, 1.0e-4, 2048, 143100, 10000, 8, True),
    '70b': (64_861_528_064, 8192, 64, 80, 8.0e-5, 2048, 333800, 10000, 4, True),
}
MODERN = {
    # parameters, d_model, heads, heads of keys and values, layers, batches, microbatch, checkpoint activations
    '125m': (123_552_768, 768, 12, 12, 12, 4700, 16, False),
    '350m': (359_797_760, 1024, 16, 16, 24, 13700, 8, False),
    '760m': (756_753_408, 1536, 12, 12, 24, 28900, 4, False),
    '1b': (1_343_515_648, 2048, 16, 4, 28, 25600, 16, True),
    '3b': (2_629_707_776, 2560, 20, 5, 36, 50200, 8, True),
    '7b': (6_791_549_952, 4096, 32, 8, 36, 64800, 8, True),
}
# The shapes in the hub's configs, written out because the tests do not reach the hub
HF = {
    'gpt2-small': (125_226_240, {'model_type': 'gpt2', 'n_positions': 2048}),
    'gpt-neo-125m': (125_198_592, {'model_type': 'gpt_neo', 'hidden_size': 768, 'num_heads': 12, 'num_layers': 12,
                                   'attention_types': [[['global', 'local'], 6]], 'vocab_size': 50257}),
}
GPTS = [*(f'yamls/mosaic_gpt/{n}.yaml' for n in MOSAIC), *(f'yamls/modern_gpt/{n}.yaml' for n in MODERN)]
ALL = [*GPTS, *(f'yamls/hf_causal_lm/{n}.yaml' for n in HF)]
QUICKSTARTS = ['yamls/quickstart.yaml', 'yamls/modern_gpt/quickstart.yaml']
SHRUNK = ['max_seq_len=32', 'max_duration=2ba', 'eval_interval=1ba', 'eval_samples=6', 'global_train_batch_size=4',
          'device_train_microbatch_size=2', 'device_eval_batch_size=4', 'train_loader.num_workers=0', 'eval_loader.num_workers=0',
          'train_loader.prefetch_factor=null', 'eval_loader.prefetch_factor=null', 'train_loader.persistent_workers=false',
          'eval_loader.persistent_workers=false', 'log_to_console=false', 'scheduler.t_warmup=1ba',
          'train_loader.dataset.num_canonical_nodes=1']
SHRUNK_MOSAIC = ['model.d_model=16', 'model.n_heads=2', 'model.n_layers=2', 'model.vocab_size=512', 'model.attn_impl=auto']
SHRUNK_HF = {
    'gpt2-small': ['model.pretrained_model_name_or_path=null', 'model.config_overrides.model_type=gpt2',
                   'model.config_overrides.n_embd=16', 'model.config_overrides.n_head=2', 'model.config_overrides.n_layer=2',
                   'model.config_overrides.vocab_size=512'],
    'gpt-neo-125m': ['model.pretrained_model_name_or_path=null', 'model.config_overrides.model_type=gpt_neo',
                     'model.config_overrides.hidden_size=16', 'model.config_overrides.num_heads=2',
                     'model.config_overrides.num_layers=2', 'model.config_overrides.vocab_size=512',
                     'model.config_overrides.attention_types=[[[global,local],1]]'],
}


def load(yaml: str, *overrides: str, has_gpu: bool = True):
    return check_config(config.load([yaml, *overrides]), plugins.REGISTRIES, 8, has_gpu)


def test_these_are_all_the_yamls():
    assert sorted(ALL + QUICKSTARTS) == sorted(str(p) for p in Path('yamls').rglob('*.yaml'))


def test_the_guide_names_every_top_level_key():
    table = Path('yamls/README.md').read_text().split('| section or key | what it decides |\n')[1].split('\n\n')[0]
    keys = [key for row in table.splitlines() for key in re.findall(r'`(\w+)`', row.split('|')[1])]
    assert sorted(keys) == sorted(Config.model_fields)


@pytest.mark.parametrize('yaml', ALL)
def test_yaml_has_the_recipe_that_all_share(yaml):
    c = load(yaml)
    o, s, modern = c.optimizer, c.scheduler, 'modern_gpt' in yaml
    assert (c.max_seq_len, c.seed, o.betas, o.eps, s.t_warmup, s.t_max) == (2048, 17, [0.9, 0.95], 1e-8, '100ba', '1dur')
    assert (o.name, o.weight_decay, s.name, s.alpha_f) == (
        ('muon', 0.1, 'warmup_stable_decay', 0) if modern else ('decoupled_adamw', 0, 'cosine_with_warmup', 0.1))
    assert not modern or (o.momentum, o.cautious, s.cooldown, s.cooldown_shape) == (0.95, False, 0.4, 'linear')
    assert c.algorithms == {'gradient_clipping': {'clipping_type': 'norm', 'clipping_threshold': 1.0}}
    assert c.train_loader.dataset.num_canonical_nodes == 64
    assert not Path(yaml).read_text().count('&'), 'interpolation, never anchors'
    assert c.fsdp_config and c.fsdp_config.sharding_strategy == 'FULL_SHARD'
    assert fsdp_version(c.fsdp_config, has_gpu=True) == (2 if modern else 1)
    no_effect = {'activation_checkpointing_reentrant', 'limit_all_gathers'}  # in version 2
    assert no_effect & c.fsdp_config.model_fields_set == (set() if modern else no_effect)


@pytest.mark.parametrize('name', list(MOSAIC))
def test_mosaic_yaml_is_the_row_of_the_table(name):
    params, d_model, heads, layers, lr, batch, batches, every, micro, checkpoint = MOSAIC[name]
    c = load(f'yamls/mosaic_gpt/{name}.yaml')
    assert (c.model.d_model, c.model.n_heads, c.model.n_layers) == (d_model, heads, layers)
    assert (c.model.vocab_size, c.model.mlp_ratio, c.model.attn_impl, c.model.device) == (50257, 4, 'flash', 'meta')
    assert (c.optimizer.lr, c.global_train_batch_size, c.device_train_microbatch_size) == (lr, batch, micro)
    assert (c.max_duration, c.eval_interval) == (f'{batches}ba', f'{every}ba')
    assert c.fsdp_config.activation_checkpointing is checkpoint
    assert c.fsdp_config.mixed_precision == ('PURE' if name in ('30b', '70b') else 'DEFAULT')

    model = MosaicGPT(c.model.model_copy(update={'attn_impl': 'sdpa'}))
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == params
    tokens = batch * 2048 * batches
    assert 19.5 < tokens / params < 21.6
    head = Path(f'yamls/mosaic_gpt/{name}.yaml').read_text()
    assert f'{params:,} parameters, {tokens / 1e9:.1f}B tokens ({tokens / params:.1f} per parameter' in head
    assert bool(re.search('C4 holds roughly 170B tokens', head)) is (tokens > 170e9)
    *_, kv_heads, more_layers, more_batches, _, _ = MODERN.get(name, [None] * 8)
    pairs = ' | '.join(f'{n:,}' if more is None else f'{n:,} / {more:,}' for n, more in
                       ((heads, kv_heads), (layers, more_layers), (batches, more_batches)))
    row = f'| {name} | {d_model} | {heads} × {d_model // heads} | {pairs} | {micro} | {"yes" if checkpoint else "no"} |'
    assert row in Path('yamls/README.md').read_text()


@pytest.mark.parametrize('name', list(MODERN))
def test_modern_yaml_is_the_row_of_the_table(name):
    params, d_model, heads, kv_heads, layers, batches, micro, checkpoint = MODERN[name]
    n_mosaic, *shape, _, lr, batch, _, every, mosaic_micro, mosaic_checkpoint = MOSAIC[name]
    yaml = f'yamls/modern_gpt/{name}.yaml'
    c = load(yaml)
    assert (c.model.n_kv_heads, c.model.n_layers) == (kv_heads, layers)
    assert [c.model.d_model, c.model.n_heads] == [d_model, heads] == shape
    assert (c.model.d_hidden, c.model.head_dim, c.model.logit_softcap) == (None, None, None)
    assert (c.model.vocab_size, c.model.init_std, c.model.attn_impl, c.model.device) == (50257, 0.02, 'flash', 'meta')
    assert c.model.tie_embeddings is (name != '7b')
    assert (c.optimizer.lr, c.global_train_batch_size, c.max_duration) == (lr, batch, f'{batches}ba')
    assert (c.eval_interval, c.save_interval) == (f'{every}ba', f'{every}ba')
    assert c.device_train_microbatch_size == c.device_eval_batch_size == micro == mosaic_micro
    assert c.fsdp_config.activation_checkpointing is checkpoint is mosaic_checkpoint

    model = ModernGPT(c.model.model_copy(update={'attn_impl': 'sdpa'}))
    assert all(p.is_meta for p in model.parameters()) and model.transformer['blocks'][0].causal_attn.head_dim in (64, 128)
    assert sum(p.numel() for p in model.parameters()) == params
    assert 0.98 < params / n_mosaic < 1.03
    tokens = batch * 2048 * batches
    assert 19.9 < tokens / params < 20.1
    head = Path(yaml).read_text()
    assert f'{params:,} parameters, {tokens / 1e9:.1f}B tokens ({tokens / params:.1f} per parameter' in head


@pytest.mark.parametrize('name', list(MODERN))
def test_modern_and_mosaic_yamls_differ_in_model_optimizer_and_schedule_alone(name):
    mosaic, modern = (load(f'yamls/{family}/{name}.yaml').model_dump() for family in ('mosaic_gpt', 'modern_gpt'))
    differ = {'model', 'optimizer', 'scheduler', 'max_duration', 'fsdp_config'}
    assert {key for key in mosaic if mosaic[key] != modern[key]} == differ


@pytest.mark.parametrize('yaml', [*QUICKSTARTS, *GPTS])
def test_one_setting_keeps_attention_within_documents(yaml):
    for value in (False, True):
        c = load(yaml, *([f'model.attn_within_document={str(value).lower()}'] if value else []))
        assert c.model.attn_within_document is value
        assert c.train_loader.dataset.sequence_ids is c.eval_loader.dataset.sequence_ids is value


@pytest.mark.parametrize('name', list(HF))
def test_hf_yaml_has_exactly_its_parameters(name):
    params, shape = HF[name]
    c = load(f'yamls/hf_causal_lm/{name}.yaml')
    overrides = {k: v for k, v in c.model.config_overrides.items() if k not in shape}
    shape = dict(shape)
    with torch.device('meta'):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.pop('model_type'), **shape, **overrides))
    assert sum(p.numel() for p in model.parameters()) == params
    assert f'{params:,} parameters' in Path(f'yamls/hf_causal_lm/{name}.yaml').read_text()


def test_a_hub_model_with_too_few_positions_is_refused(mds_root):
    cfg = config.load(['yamls/hf_causal_lm/gpt2-small.yaml', f'data_remote={mds_root}', f'tokenizer_name={mds_root}/tokenizer',
                       *SHRUNK, *SHRUNK_HF['gpt2-small'], 'model.config_overrides.n_positions=16'])
    with pytest.raises(UserError, match='train_loader.dataset.max_seq_len: 32 is above the 16 positions of the model'):
        main.main(cfg)


@pytest.mark.parametrize('yaml', ALL)
def test_shrunk_yaml_trains_two_steps(yaml, mds_root, tmp_path):
    shape = SHRUNK_HF.get(Path(yaml).stem) or [*SHRUNK_MOSAIC, *(['model.n_kv_heads=1'] if 'modern_gpt' in yaml else [])]
    cfg = config.load([yaml, f'data_remote={mds_root}', f'tokenizer_name={mds_root}/tokenizer', *SHRUNK, *shape,
                       'model.init_seed=1'])
    trainer = main.main(cfg)
    assert int(trainer.state.timestamp.batch) == 2
    assert int(trainer.state.timestamp.token) == 2 * 4 * 31
    loss = trainer.state.eval_metric_values['LanguageCrossEntropy'].item()
    assert 5.5 < loss < 6.5  # ln 512 = 6.24
    trainer.close()


@pytest.mark.slow
def test_documents_pass_sharding_checkpointing_and_microbatches(mds_root):
    """Attention within documents, in every wrapper at once and in none: the losses are the same."""
    argv = ['yamls/mosaic_gpt/125m.yaml', f'data_remote={mds_root}', f'tokenizer_name={mds_root}/tokenizer', *SHRUNK,
            *SHRUNK_MOSAIC, 'eval_interval=2ba', 'max_duration=3ba']
    wrapped = train(*argv, 'model.attn_within_document=true', 'fsdp_config.activation_checkpointing=true')
    bare = ['fsdp_config=null', 'device_train_microbatch_size=4']
    within, across = train(*argv, *bare, 'model.attn_within_document=true'), train(*argv, *bare)
    assert wrapped['losses'] == pytest.approx(within['losses'], rel=1e-6)
    assert wrapped['batches'] == within['batches'] == across['batches']  # sequence ids do not change the samples
    assert abs(within['losses'][0] - across['losses'][0]) > 1e-4
