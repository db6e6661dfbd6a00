"""Hugging Face models: the dtype of their weights, their blocks, and overrides that null removes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import tiny
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import main
from src.checkpoints.hf_layout import hf_model
from src.common.errors import UserError
from src.config import load as config
from src.hf_causal_lm import ComposerHFCausalLM, _without_derived

LLAMA = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64, max_position_embeddings=64,
             vocab_size=512)
MOE = dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=2, intermediate_size=64,
           moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=6, num_experts_per_tok=2, vocab_size=97)


def build(**cfg: Any) -> ComposerHFCausalLM:
    return ComposerHFCausalLM({'name': 'hf_causal_lm', **cfg})


@pytest.fixture(scope='module')
def bf16_llama(tmp_path_factory) -> str:
    """A folder with a model whose config and weights are bfloat16, as those of the hub are."""
    folder = tmp_path_factory.mktemp('llama')
    AutoModelForCausalLM.from_config(AutoConfig.for_model('llama', **LLAMA)).to(torch.bfloat16).save_pretrained(folder)
    assert 'bfloat16' in (folder / 'config.json').read_text()
    return str(folder)


@pytest.mark.parametrize('pretrained', [False, True])
def test_weights_are_float32_unless_another_type_is_asked_for(bf16_llama, pretrained):
    def types(**overrides: Any) -> set[torch.dtype]:
        model = build(pretrained_model_name_or_path=bf16_llama, pretrained=pretrained, config_overrides=overrides)
        assert model.config.dtype == next(model.parameters()).dtype
        return {p.dtype for p in model.parameters()}

    assert types() == types(dtype=None) == types(vocab_size=512) == {torch.float32}
    assert types(dtype='bfloat16') == types(torch_dtype='bfloat16') == {torch.bfloat16}
    with pytest.raises(UserError, match='model'):
        types(dtype='bfloat15')


@pytest.mark.parametrize('named', [['Qwen2MoeDecoderLayer'], None, [], ['NoSuchLayer'], ['Qwen2MoeForCausalLM']])
def test_blocks_are_the_decoder_layers_and_not_their_experts(monkeypatch, named):
    from transformers.models.qwen2_moe import modeling_qwen2_moe as qwen

    monkeypatch.setattr(qwen.Qwen2MoePreTrainedModel, '_no_split_modules', named)
    model = build(config_overrides={'model_type': 'qwen2_moe', **MOE}).model
    assert [name for name, module in model.named_modules() if model.fsdp_wrap_fn(module)] == [
        'hf.model.layers.0', 'hf.model.layers.1']


def test_a_key_of_the_yaml_is_taken_back_on_the_command_line(bf16_llama, mds_root):
    kept = [o for o in tiny(mds_root) if not o.startswith(('model.', 'loggers.'))]
    argv = ['yamls/hf_causal_lm/gpt2-small.yaml', f'model.pretrained_model_name_or_path={bf16_llama}', *kept,
            'tokenizer_name=${data_remote}/tokenizer', 'max_duration=1ba', 'scheduler.t_warmup=0.1dur', 'fsdp_config=null',
            'log_to_console=false', 'eval_loader=null', 'train_loader.num_workers=0', 'train_loader.prefetch_factor=null',
            'train_loader.persistent_workers=false', 'train_loader.pin_memory=false']
    with pytest.raises(UserError, match='n_positions, .* no such key in the config of llama; .*overrides.n_positions=null'):
        main.main(config.load(argv))
    nulls = [f'model.config_overrides.{key}=null' for key in ('n_positions', 'attn_pdrop', 'embd_pdrop', 'resid_pdrop')]
    trainer = main.main(config.load([*argv, *nulls, 'model.config_overrides.max_position_embeddings=null']))
    trainer.close()
    assert trainer.state.model.config.max_position_embeddings == 64
    assert {p.dtype for p in trainer.state.model.parameters()} == {torch.float32}


def test_a_null_that_a_model_has_stays_in_what_a_checkpoint_says():
    """Mistral's default is a sliding window; a model without one has null there."""
    made = AutoConfig.for_model('mistral', **LLAMA, num_key_value_heads=4, sliding_window=None)
    shape = {key: value for key, value in made.to_dict().items() if key in (*LLAMA, 'num_key_value_heads', 'model_type')}
    model = build(config_overrides=shape)
    assert model.config.sliding_window == 4096
    model.manifest_config['config_overrides']['sliding_window'] = None
    exported = hf_model(json.loads(json.dumps(model.manifest_config)), model.state_dict(), 'load_path')
    assert exported.config.sliding_window is None


TINY = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
SMALL = dict(num_key_value_heads=1, intermediate_size=16, **TINY)
SIGLIP = dict(model_type='siglip_vision_model', **SMALL, image_size=16, patch_size=4)


@pytest.mark.parametrize(('overrides', 'message'), [
    (dict(model_type='cpmant', dim_ff=16, dim_head=8, **TINY),
     "'cpmant' sees the tokens that it has to predict.*; choose a causal model .*gpt2$"),
    (dict(model_type='xlnet', is_decoder=True, d_model=16, n_layer=1, n_head=2, d_inner=16),
     "'xlnet' sees the tokens that it has to predict"),
    (dict(model_type='xlm', is_decoder=True, emb_dim=16, n_layers=1, n_heads=2),
     "'xlm' sees the tokens that it has to predict"),
    (dict(model_type='bert-generation', intermediate_size=16, **TINY),
     "'bert-generation' sees the tokens .*, or set .*is_decoder=true"),
    (dict(model_type='mixtral', output_router_logits=True, **SMALL),
     "'mixtral' has output_router_logits: true, .*=false$"),
    (dict(model_type='llama', dtype=16, **SMALL), 'is refused by llama: dtype 16 is no type such as float32'),
    (dict(model_type='phi3', vocab_size=4096, **SMALL), '.phi3. cannot be .*; set .*overrides.pad_token_id to'),
    (dict(model_type='gemma3', vision_config=SIGLIP, mm_tokens_per_image=16, text_config=dict(
        model_type='gemma3_text', head_dim=8, vocab_size=512, pad_token_id=0, **SMALL)),
     "no attribute 'num_hidden_layers'; .* text model alone, gemma3_text$"),
    (dict(model_type='open-llama', vocab_size=512, intermediate_size=16, **TINY),
     "'open-llama' cannot be built .*: it has no output layer, or its output"),
    (dict(model_type='zamba', **SMALL), "'zamba' cannot be built as a causal language model: StopIteration"),
], ids=lambda value: value.get('model_type') if isinstance(value, dict) else '')
def test_models_that_cannot_be_trained_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        build(config_overrides=overrides)


def test_a_config_that_cannot_be_derived_is_taken_as_it_is():
    class Needs:
        def __init__(self, layers, layer_types):
            self.layers = layers / len(layer_types)

    own = {'layers': 2, 'layer_types': ['full']}
    assert _without_derived(Needs, own) == own
    assert _without_derived(LlamaConfig, {'hidden_size': 64, 'num_attention_heads': 4, 'head_dim': 16}).keys() == {
        'hidden_size', 'num_attention_heads'}


@pytest.mark.parametrize('text', [None, '{"n_layer": 1}', '[1]'])
def test_a_folder_whose_config_names_no_family_is_refused(tmp_path, text):
    """Otherwise transformers would choose the family whose name is in the path."""
    folder = tmp_path / 'my-gpt2-run'
    folder.mkdir()
    if text:
        (folder / 'config.json').write_text(text)
    with pytest.raises(UserError, match='my-gpt2-run.*\n.*Give a folder whose config.json names a model_type'):
        build(pretrained_model_name_or_path=str(folder), config_overrides=dict(n_layer=1, n_embd=16, n_head=2))


def test_a_folder_s_family_stays_and_what_follows_from_other_keys_is_derived_again(bf16_llama, tmp_path):
    with pytest.raises(UserError, match="model_type: 'gpt2', but .* is 'llama'; remove model_type"):
        build(pretrained_model_name_or_path=bf16_llama, config_overrides={'model_type': 'gpt2'})
    assert '"head_dim": 8' in (Path(bf16_llama) / 'config.json').read_text()
    narrow = build(pretrained_model_name_or_path=bf16_llama, config_overrides={
        'model_type': 'llama', 'hidden_size': 16, 'max_position_embeddings': -1})
    assert narrow.config.head_dim == 4 and narrow.max_seq_len is None
    types = ['full_attention', 'full_attention', 'full_attention', 'sliding_attention']
    for name, own in {'derived': {}, 'own': {'head_dim': 5, 'layer_types': types}}.items():
        shape = LLAMA | {'num_hidden_layers': 4, 'num_key_value_heads': 4} | own
        AutoConfig.for_model('qwen2', **shape).save_pretrained(tmp_path / name)
    assert 'layer_types' in (tmp_path / 'derived/config.json').read_text()
    folder = str(tmp_path / 'derived')
    short = build(pretrained_model_name_or_path=folder, config_overrides={'num_hidden_layers': 2}).config
    assert short.num_hidden_layers == len(short.layer_types) == 2
    kept = build(pretrained_model_name_or_path=str(tmp_path / 'own'), config_overrides={'vocab_size': 97}).config
    assert (kept.head_dim, kept.layer_types) == (5, types)


@pytest.mark.parametrize('kind', [AttributeError, AssertionError, StopIteration, ImportError])
def test_a_model_s_own_code_keeps_its_mistakes(monkeypatch, bf16_llama, tmp_path, kind):
    def broken(*args: Any, **kwargs: Any) -> None:
        raise kind('of this family')

    stored = json.loads((Path(bf16_llama) / 'config.json').read_text())
    stored['auto_map'] = {'AutoModelForCausalLM': 'mine.Model'}
    (tmp_path / 'config.json').write_text(json.dumps(stored))
    monkeypatch.setattr(AutoModelForCausalLM, 'from_config', broken)
    with pytest.raises(UserError, match='cannot be built as a causal language model: of this family'):
        build(pretrained_model_name_or_path=bf16_llama, trust_remote_code=True)
    with pytest.raises(kind, match='of this family'):
        build(pretrained_model_name_or_path=str(tmp_path), trust_remote_code=True)
