"""Converts models between the kit and Hugging Face, both ways: their settings, and the names and layout of weights.

| the kit    | Hugging Face | where the weights differ in more than names                                       |
|------------|--------------|-----------------------------------------------------------------------------------|
| mosaic_gpt | GPT-2        | GPT-2 has `Conv1D` layers, whose weights are the transposed weights of a Linear   |
| modern_gpt | Qwen3        | Qwen3 has a matrix each for queries, keys and values, and for gate and values     |

Both models of a row compute the same. An `hf_causal_lm` model keeps its names.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, get_args

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GPT2Config, PretrainedConfig, PreTrainedModel, Qwen3Config

from src.common.errors import UserError, first_line
from src.config.check import parse
from src.config.derived import modern_shape
from src.config.schema import MODEL_CONFIGS, GPTConfig, HFCausalLMConfig, ModernGPTConfig, MosaicGPTConfig
from src.hf_causal_lm import build_hf_config


class Twin(NamedTuple):
    """The architecture of Hugging Face that computes what a model of the kit computes."""

    title: str
    kit: type[GPTConfig]
    hf: type[PretrainedConfig]
    keys: dict[str, str]  # settings of the kit → of Hugging Face
    only: dict[str, Any]  # settings that the kit lacks → the only value that its model computes
    names: dict[str, str]  # parts of the names of weights; {a,b}: the rows of one matrix become two matrices
    is_transposed: bool = False  # matrices of layers named `c_...` are stored as (in, out)


GPT2 = Twin(
    'GPT-2', MosaicGPTConfig, GPT2Config,
    keys={'vocab_size': 'vocab_size', 'max_seq_len': 'n_positions', 'd_model': 'n_embd', 'n_layers': 'n_layer',
          'n_heads': 'n_head', 'mlp_ratio': 'n_inner', 'mlp_act': 'activation_function', 'attn_pdrop': 'attn_pdrop',
          'resid_pdrop': 'resid_pdrop', 'emb_pdrop': 'embd_pdrop', 'init_std': 'initializer_range'},
    only={'scale_attn_weights': True, 'scale_attn_by_inverse_layer_idx': False, 'add_cross_attention': False,
          'layer_norm_epsilon': 1e-5, 'tie_word_embeddings': True, 'quantization_config': None},
    names={'transformer.blocks.': 'transformer.h.', 'causal_attn.Wqkv': 'attn.c_attn',
           'causal_attn.out_proj': 'attn.c_proj', 'mlp.mlp_up': 'mlp.c_fc', 'mlp.mlp_down': 'mlp.c_proj'},
    is_transposed=True)

QWEN3 = Twin(
    'Qwen3', ModernGPTConfig, Qwen3Config,
    keys={'vocab_size': 'vocab_size', 'max_seq_len': 'max_position_embeddings', 'd_model': 'hidden_size',
          'n_layers': 'num_hidden_layers', 'n_heads': 'num_attention_heads', 'n_kv_heads': 'num_key_value_heads',
          'head_dim': 'head_dim', 'd_hidden': 'intermediate_size', 'rope_theta': 'rope_theta',
          'norm_eps': 'rms_norm_eps', 'tie_embeddings': 'tie_word_embeddings', 'init_std': 'initializer_range'},
    only={'layer_types': 'full_attention', 'rope_type': 'default', 'hidden_act': 'silu', 'attention_bias': False,
          'attention_dropout': 0.0, 'quantization_config': None},
    names={'transformer.wte': 'model.embed_tokens', 'transformer.blocks.': 'model.layers.',
           'transformer.ln_f': 'model.norm', 'ln_1': 'input_layernorm', 'ln_2': 'post_attention_layernorm',
           'causal_attn.': 'self_attn.', 'Wqkv': '{q_proj,k_proj,v_proj}', 'out_proj': 'o_proj',
           'gate_up': '{gate_proj,up_proj}', 'mlp_down': 'down_proj'})

TWINS = {'gpt2': GPT2, 'qwen3': QWEN3}  # by `model_type`
ACTIVATIONS = {'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu': 'gelu'}  # GPT-2's → mlp_act
# Keys that change only how a model is trained. A model with `attn_within_document` is exported as a model of single
# documents: within a document it computes what its twin computes.
TRAINING_ONLY_KEYS = {'device', 'init_seed', 'attn_impl', 'flash_kernel', 'attn_within_document', 'linear_impl',
                      'loss_impl', 'loss_chunk_tokens', 'vocab_multiple', 'activation_checkpointing_every'}


def twin_of(cfg: GPTConfig) -> Twin:
    return next(twin for twin in TWINS.values() if isinstance(cfg, twin.kit))


# ---------------------------------------------------------------- settings
def twin_config(cfg: GPTConfig, **more: Any) -> PretrainedConfig:
    """Builds the config of the twin of a model of the kit; `more` holds settings that only the twin has.

    Raises UserError if the twin lacks a setting of the kit.
    """
    twin, values = twin_of(cfg), cfg.model_dump()
    for name, field in type(cfg).model_fields.items():
        if name not in {'name', *twin.keys} | TRAINING_ONLY_KEYS and values[name] != field.default:
            raise UserError(f'model.{name}: {values[name]!r} cannot be exported, because {twin.title} has only '
                            f'{field.default!r}')
    if isinstance(cfg, ModernGPTConfig):
        values |= modern_shape(cfg)._asdict()
    elif isinstance(cfg, MosaicGPTConfig):
        values['mlp_ratio'] *= cfg.d_model
        values['mlp_act'] = {ours: theirs for theirs, ours in ACTIVATIONS.items()}[cfg.mlp_act]
    return twin.hf(**{theirs: values[ours] for ours, theirs in twin.keys.items()}, **more)


def kit_config(stored: Mapping[str, Any], setting: str) -> GPTConfig:
    """Builds the config of the kit's model that computes the same as a GPT-2 or a Qwen3.

    `stored` is the content of a `config.json`. Messages begin with `setting`. Raises UserError if the kit has no such
    model.
    """
    kind = stored.get('model_type')
    if kind not in TWINS:
        raise _unlike(setting, 'model_type', kind, *TWINS)
    twin = TWINS[kind]
    try:  # keys that begin with an underscore are not part of the model's shape; one of them names code on the hub
        values = twin.hf(**{key: value for key, value in stored.items() if not key.startswith('_')}).to_dict()
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as e:  # the last: transformers 5
        raise UserError(f'{setting}: transformers refuses its config.json: {first_line(e)}; copy the model again'
                        ) from None
    # transformers 5 writes `rope_parameters`, which transformers 4 would silently ignore
    rope = stored.get('rope_parameters') or stored.get('rope_scaling') or {}
    values['rope_theta'] = rope.get('rope_theta', stored.get('rope_theta', 1e4))
    values['rope_type'] = rope.get('rope_type', rope.get('type', 'default'))
    values['layer_types'] = ', '.join(sorted({*(values.get('layer_types') or ())}))
    for key, value in twin.only.items():
        if values.get(key) != value:
            raise _unlike(setting, key, values.get(key), value)
    if twin is GPT2:
        width, inner, activation = values['n_embd'], values['n_inner'], values['activation_function']
        if inner and inner % width:
            raise _unlike(setting, 'n_inner', inner, f'a multiple of n_embd {width}')
        if activation not in ACTIVATIONS:
            raise _unlike(setting, 'activation_function', activation, *ACTIVATIONS)
        values |= {'n_inner': inner // width if inner else 4, 'activation_function': ACTIVATIONS[activation]}
    name = get_args(twin.kit.model_fields['name'].annotation)[0]
    return parse(twin.kit, {'name': name, **{ours: values[theirs] for ours, theirs in twin.keys.items()}})


def _unlike(setting: str, key: str, value: Any, *allowed: Any) -> UserError:
    return UserError(f'{setting}: the model has {key} {value!r}, but the kit has its own model only for '
                     f'{" or ".join(map(str, allowed))}. Train this model with model.name=hf_causal_lm instead, as in '
                     'src/tools/README.md, "Fine-tune"')


def hf_config(cfg: HFCausalLMConfig) -> PretrainedConfig:
    """Builds the config of an `hf_causal_lm` model. Raises UserError if the model needs code from the hub."""
    # Keys that begin with an underscore are not part of the model's shape; one of them names code on the hub.
    shape = {key: value for key, value in cfg.config_overrides.items() if not key.startswith('_')}
    config = build_hf_config(cfg.model_copy(update={'trust_remote_code': False, 'config_overrides': shape}),
                             keep_nulls=cfg.pretrained_model_name_or_path is None)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f'model: {config.model_type!r} cannot be exported, because its code is not in transformers')
    return config


# ---------------------------------------------------------------- weights
def names_in_twin(name: str, twin: Twin) -> list[str]:
    """The names in the twin of a weight of the kit; several, if its rows are several matrices there."""
    for ours, theirs in twin.names.items():
        name = name.replace(ours, theirs)
    before, _, rest = name.partition('{')
    parts, _, after = rest.partition('}')
    return [before + part + after for part in parts.split(',')]


def _transpose(name: str, weight: Tensor, twin: Twin) -> Tensor:
    """Turns (out, in) into (in, out), or back, if `name` is the name of a weight that the twin stores like this."""
    is_conv = twin.is_transposed and name.endswith('.weight') and '.c_' in name
    return weight.T.contiguous() if is_conv else weight


def to_hf(weights: Mapping[str, Tensor], cfg: GPTConfig) -> dict[str, Tensor]:
    """Converts the state dict of a GPT of the kit to the names and the layout of its twin."""
    twin, cuts, result = twin_of(cfg), {}, {}
    if isinstance(cfg, ModernGPTConfig):
        head_dim, n_kv_heads, d_hidden = modern_shape(cfg)
        keys = cfg.n_heads * head_dim  # the row of Wqkv where keys begin
        cuts = {'Wqkv': [keys, keys + n_kv_heads * head_dim], 'gate_up': [d_hidden]}
    for name, weight in weights.items():
        cut = cuts.get(name.rpartition('.')[0].rpartition('.')[2])
        parts = torch.tensor_split(weight, cut) if cut else [weight]
        result |= {theirs: _transpose(theirs, part, twin) for theirs, part in zip(names_in_twin(name, twin), parts)}
    return result


def from_hf(weights: Mapping[str, Tensor], names: Iterable[str], cfg: GPTConfig) -> dict[str, Tensor]:
    """Converts the state dict of the twin to that of a GPT of the kit, whose weights have these `names`."""
    twin, result = twin_of(cfg), {}
    for name in names:
        parts = [_transpose(theirs, weights[theirs], twin) for theirs in names_in_twin(name, twin)]
        result[name] = torch.cat(parts) if len(parts) > 1 else parts[0]  # tied weights stay one tensor
    return result


def hf_model(model: dict[str, Any], weights: dict[str, Tensor], setting: str) -> PreTrainedModel:
    """Builds the Hugging Face model that holds the weights of a checkpoint, in evaluation mode.

    `model` is section `model` of the config, and `weights` is the state dict of the ComposerModel. Messages begin with
    `setting`. Raises UserError if the model cannot be exported, or the weights do not fit it.
    """
    config: PretrainedConfig
    weights = {name.removeprefix('model.').removeprefix('hf.'): weight for name, weight in weights.items()}
    name = model.get('name', 'mosaic_gpt')
    if name not in MODEL_CONFIGS:
        raise UserError(f'model.name: {name!r}; only {", ".join(MODEL_CONFIGS)} can be exported. For a '
                        'model of your own, add its names and layout to src/checkpoints/hf_layout.py')
    cfg = parse(MODEL_CONFIGS[name], model)
    if isinstance(cfg, HFCausalLMConfig):
        config = hf_config(cfg)
    else:
        assert isinstance(cfg, GPTConfig)
        config, weights = twin_config(cfg), to_hf(weights, cfg)
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
