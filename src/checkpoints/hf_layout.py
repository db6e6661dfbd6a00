"""The weights of a checkpoint as a Hugging Face model: a MosaicGPT becomes a GPT-2, which computes the same."""

from typing import Any

from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GPT2Config, PretrainedConfig, PreTrainedModel

from src.common.errors import UserError
from src.config.check import parse
from src.config.schema import MODEL_CONFIGS, HFCausalLMConfig, MosaicGPTConfig
from src.hf_causal_lm import build_hf_config

# MosaicGPT's names → GPT-2's. Both hold queries, keys and values in this order, head by head; the weights of GPT-2's
# `Conv1D` layers are those of a Linear transposed.
GPT2_NAMES = {'transformer.blocks.': 'transformer.h.', 'causal_attn.Wqkv': 'attn.c_attn',
              'causal_attn.out_proj': 'attn.c_proj', 'mlp.mlp_up': 'mlp.c_fc', 'mlp.mlp_down': 'mlp.c_proj'}
GPT2_ACTIVATIONS = {'gelu': 'gelu', 'gelu_tanh': 'gelu_pytorch_tanh'}
# Keys of MosaicGPTConfig that GPT-2 has too, or that change how the model is trained and not what it computes. Within a
# document attention and positions are GPT-2's, so `attn_within_document` is exported as a model of single documents.
GPT2_HAS = {'name', 'd_model', 'n_heads', 'n_layers', 'mlp_ratio', 'max_seq_len', 'vocab_size', 'init_std', 'mlp_act',
            'attn_pdrop', 'resid_pdrop', 'emb_pdrop'}
TRAINING_ALONE = {'device', 'init_seed', 'attn_impl', 'flash_kernel', 'attn_within_document', 'linear_impl',
                  'loss_impl', 'loss_chunk_tokens', 'vocab_multiple', 'activation_checkpointing_every'}


def gpt2_config(cfg: MosaicGPTConfig, **more: Any) -> GPT2Config:
    """The GPT-2 that computes what a MosaicGPT does, with `more` settings of GPT-2 alone."""
    for name, field in type(cfg).model_fields.items():
        if name not in GPT2_HAS | TRAINING_ALONE and getattr(cfg, name) != field.default:
            raise UserError(f'model.{name}: {getattr(cfg, name)!r}; GPT-2 has {field.default!r} alone, so this model '
                            'cannot be exported as one')
    return GPT2Config(vocab_size=cfg.vocab_size, n_positions=cfg.max_seq_len, n_embd=cfg.d_model, n_layer=cfg.n_layers,
                      n_head=cfg.n_heads, n_inner=cfg.mlp_ratio * cfg.d_model,
                      activation_function=GPT2_ACTIVATIONS[cfg.mlp_act], resid_pdrop=cfg.resid_pdrop,
                      embd_pdrop=cfg.emb_pdrop, attn_pdrop=cfg.attn_pdrop, initializer_range=cfg.init_std, **more)


def gpt2_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A MosaicGPT's state dict under GPT-2's names and in its layout."""
    renamed = {}
    for name, weight in weights.items():
        for old, new in GPT2_NAMES.items():
            name = name.replace(old, new)
        conv = name.endswith('.weight') and '.c_' in name  # (out, in) to (in, out)
        renamed[name] = weight.T.contiguous() if conv else weight
    return renamed


def hf_config(cfg: HFCausalLMConfig) -> PretrainedConfig:
    """The shape of an `hf_causal_lm` model, without code from the hub."""
    # Keys with an underscore are no part of the shape; one of them names code on the hub.
    shape = {key: value for key, value in cfg.config_overrides.items() if not key.startswith('_')}
    config = build_hf_config(cfg.model_copy(update={'trust_remote_code': False, 'config_overrides': shape}),
                             keep_nulls=cfg.pretrained_model_name_or_path is None)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f'model: {config.model_type!r} needs code that is not in transformers; only what is can be '
                        'exported')
    return config


def hf_model(model: dict[str, Any], weights: dict[str, Tensor], setting: str) -> PreTrainedModel:
    """A Hugging Face model with the weights of a checkpoint.

    `model` is section `model` of the config, and `weights` the state dict of the ComposerModel. `setting` is what is at
    fault if the two do not fit.
    """
    config: PretrainedConfig
    weights = {name.removeprefix('model.').removeprefix('hf.'): weight for name, weight in weights.items()}
    if model.get('name', 'mosaic_gpt') == 'mosaic_gpt':
        config, weights = gpt2_config(parse(MosaicGPTConfig, model)), gpt2_weights(weights)
    elif model['name'] == 'hf_causal_lm':
        config = hf_config(parse(HFCausalLMConfig, model))
    else:
        raise UserError(f'model.name: {model["name"]!r}; what can be exported is {", ".join(MODEL_CONFIGS)}; a model '
                        'of your own needs its names and layout in src/checkpoints/hf_layout.py')
    cls: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    result, info = cls.from_pretrained(None, config=config, state_dict=weights, output_loading_info=True,
                                       ignore_mismatched_sizes=True)
    wrong = [f'{name} ({what})' for what in ('missing', 'unexpected') for name in info[f'{what}_keys']]
    for name, expected in result.state_dict().items():
        if name in weights and weights[name].shape != expected.shape:
            wrong.append(f'{name} of {tuple(weights[name].shape)} in place of {tuple(expected.shape)}')
    if wrong:
        raise UserError(f'{setting}: the weights are not those of the model that it describes: {len(wrong)} do not '
                        f'fit, such as {min(wrong)}; give the YAML and overrides of the run: --yaml YAML key=value ...')
    return result.eval()
