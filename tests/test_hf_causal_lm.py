"""Hugging Face models: the type of their weights, their blocks, and keys that are taken back."""

import json
from typing import Any

import pytest
import torch
from launch import tiny
from transformers import AutoConfig, AutoModelForCausalLM

import main
from src import config
from src.errors import UserError
from src.hf_causal_lm import ComposerHFCausalLM
from src.hf_model import hf_model

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
    """Mistral's own default is a window; a model without one has null there."""
    made = AutoConfig.for_model('mistral', **LLAMA, num_key_value_heads=4, sliding_window=None)
    shape = {key: value for key, value in made.to_dict().items() if key in (*LLAMA, 'num_key_value_heads', 'model_type')}
    model = build(config_overrides=shape)
    assert model.config.sliding_window == 4096
    model.described_by['config_overrides']['sliding_window'] = None
    exported = hf_model(json.loads(json.dumps(model.described_by)), model.state_dict(), 'load_path')
    assert exported.config.sliding_window is None
