"""Turns the weights of a checkpoint into a Hugging Face model. A MosaicGPT becomes a GPT-2 that computes the same."""

from typing import Any

from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GPT2Config, PretrainedConfig, PreTrainedModel

from src.common.errors import UserError
from src.config.check import parse
from src.config.schema import MODEL_CONFIGS, HFCausalLMConfig, MosaicGPTConfig
from src.hf_causal_lm import build_hf_config

# MosaicGPT's names of weights → GPT-2's. Both store queries, then keys, then values, head by head. GPT-2 has `Conv1D`
# layers, whose weights are the transposed weights of a Linear.
GPT2_NAMES = {'transformer.blocks.': 'transformer.h.', 'causal_attn.Wqkv': 'attn.c_attn',
              'causal_attn.out_proj': 'attn.c_proj', 'mlp.mlp_up': 'mlp.c_fc', 'mlp.mlp_down': 'mlp.c_proj'}
GPT2_ACTIVATIONS = {'gelu': 'gelu', 'gelu_tanh': 'gelu_pytorch_tanh'}
# Keys of MosaicGPTConfig that GPT-2 has too, and keys that change only how the model is trained. A model with
# `attn_within_document` is exported as a model of single documents: within a document it computes what GPT-2 does.
GPT2_KEYS = {'name', 'd_model', 'n_heads', 'n_layers', 'mlp_ratio', 'max_seq_len', 'vocab_size', 'init_std', 'mlp_act',
             'attn_pdrop', 'resid_pdrop', 'emb_pdrop'}
TRAINING_ONLY_KEYS = {'device', 'init_seed', 'attn_impl', 'flash_kernel', 'attn_within_document', 'linear_impl',
                      'loss_impl', 'loss_chunk_tokens', 'vocab_multiple', 'activation_checkpointing_every'}


def gpt2_config(cfg: MosaicGPTConfig, **more: Any) -> GPT2Config:
    """Builds the config of the GPT-2 that computes the same as a MosaicGPT; `more` holds settings that only GPT-2 has.

    Raises UserError if GPT-2 has no such setting.
    """
    for name, field in type(cfg).model_fields.items():
        if name not in GPT2_KEYS | TRAINING_ONLY_KEYS and getattr(cfg, name) != field.default:
            raise UserError(f'model.{name}: {getattr(cfg, name)!r} cannot be exported, because GPT-2 has only '
                            f'{field.default!r}')
    return GPT2Config(vocab_size=cfg.vocab_size, n_positions=cfg.max_seq_len, n_embd=cfg.d_model, n_layer=cfg.n_layers,
                      n_head=cfg.n_heads, n_inner=cfg.mlp_ratio * cfg.d_model,
                      activation_function=GPT2_ACTIVATIONS[cfg.mlp_act], resid_pdrop=cfg.resid_pdrop,
                      embd_pdrop=cfg.emb_pdrop, attn_pdrop=cfg.attn_pdrop, initializer_range=cfg.init_std, **more)


def gpt2_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts a MosaicGPT's state dict to the names and the layout of GPT-2."""
    renamed = {}
    for name, weight in weights.items():
        for old, new in GPT2_NAMES.items():
            name = name.replace(old, new)
        is_conv = name.endswith('.weight') and '.c_' in name
        renamed[name] = weight.T.contiguous() if is_conv else weight  # (out, in) → (in, out)
    return renamed


def hf_config(cfg: HFCausalLMConfig) -> PretrainedConfig:
    """Builds the config of an `hf_causal_lm` model. Raises UserError if the model needs code from the hub."""
    # Keys that begin with an underscore are not part of the model's shape; one of them names code on the hub.
    shape = {key: value for key, value in cfg.config_overrides.items() if not key.startswith('_')}
    config = build_hf_config(cfg.model_copy(update={'trust_remote_code': False, 'config_overrides': shape}),
                             keep_nulls=cfg.pretrained_model_name_or_path is None)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f'model: {config.model_type!r} cannot be exported, because its code is not in transformers')
    return config


def hf_model(model: dict[str, Any], weights: dict[str, Tensor], setting: str) -> PreTrainedModel:
    """Builds the Hugging Face model that holds the weights of a checkpoint, in evaluation mode.

    `model` is section `model` of the config, and `weights` is the state dict of the ComposerModel. Messages begin with
    `setting`. Raises UserError if the model cannot be exported, or the weights do not fit it.
    """
    config: PretrainedConfig
    weights = {name.removeprefix('model.').removeprefix('hf.'): weight for name, weight in weights.items()}
    if model.get('name', 'mosaic_gpt') == 'mosaic_gpt':
        config, weights = gpt2_config(parse(MosaicGPTConfig, model)), gpt2_weights(weights)
    elif model['name'] == 'hf_causal_lm':
        config = hf_config(parse(HFCausalLMConfig, model))
    else:
        raise UserError(f'model.name: {model["name"]!r}; only {", ".join(MODEL_CONFIGS)} can be exported. For a '
                        'model of your own, add its names and layout to src/checkpoints/hf_layout.py')
    cls: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    result, info = cls.from_pretrained(None, config=config, state_dict=weights, output_loading_info=True,
                                       ignore_mismatched_sizes=True)
    misfits = [f'{name} ({kind})' for kind in ('missing', 'unexpected') for name in info[f'{kind}_keys']]
    for name, expected in result.state_dict().items():
        if name in weights and weights[name].shape != expected.shape:
            misfits.append(f'{name} of shape {tuple(weights[name].shape)}, not {tuple(expected.shape)}')
    if misfits:
        raise UserError(f'{setting}: the weights do not fit the model that it describes: {len(misfits)} differ, such '
                        f'as {min(misfits)}. Give the YAML and the arguments of the run: --yaml YAML key=value ...')
    return result.eval()
