"""Hugging Face causal language models for Composer's Trainer: `model:` with `name: hf_causal_lm`."""

import logging
from collections.abc import Mapping
from typing import Any, Optional, Union

import torch
from composer.utils import dist
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from src.causal_lm import ComposerCausalLM, LossOfLogits, chunked_cross_entropy, plain_cross_entropy
from src.common.errors import UserError, first_line
from src.config.check import parse
from src.config.schema import HFCausalLMConfig

log = logging.getLogger(__name__)

DTYPE_KEYS = ('dtype', 'torch_dtype')  # new and old name of one key
DERIVED_KEYS = ('head_dim', 'layer_types')  # a config class computes them from other keys unless they are set
ENCODERS = {'bert-generation', *MODEL_FOR_MASKED_LM_MAPPING_NAMES}  # causal only with `is_decoder`
NEVER_CAUSAL = ('cpmant', 'mega', 'xlm', 'xlnet')  # not causal, even with `is_decoder`
# The logits of these models are exactly `base_model(...) @ head.T`, so the loss can be computed in chunks. Other models
# may scale or cap their logits, so their loss comes from full logits.
PLAIN_HEADS = ('gpt2', 'gpt_neo', 'gpt_neox', 'llama', 'mistral', 'qwen2', 'opt')


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Returns the transformer blocks of a Hugging Face model, the units of FSDP.

    Blocks are members of module lists whose class the model names in `_no_split_modules`. If there is none, the blocks
    are the members of the outermost module list that has the most parameters.
    """
    named = {name for module in model.modules() for name in getattr(module, '_no_split_modules', None) or ()}
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    blocks = [block for modules in lists.values() for block in modules if type(block).__name__ in named]
    outer = [modules for name, modules in lists.items() if not any(name.startswith(f'{other}.') for other in lists)]
    if blocks or not outer:
        return blocks
    return list(max(outer, key=lambda modules: sum(p.numel() for p in modules.parameters())))


class HFCausalLM(nn.Module):
    """A Hugging Face model, `hf`, that returns logits, or the loss if there are targets.

    Loss, logits and generation all go through `forward`, because FSDP gathers parameters only while `forward` runs.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.hf = model
        self.config = model.config
        self.block_types = tuple({type(block) for block in find_blocks(model)})
        self.loss_of_logits = LossOfLogits()

    def forward(self, input_ids: Tensor, targets: Optional[Tensor] = None,
                generate: Optional[dict[str, Any]] = None) -> Any:
        """Returns logits, (batch, seq, vocab), or the mean loss over `targets`; both inputs are (batch, seq).

        Padding stands on the right, so no mask is needed. `generate` holds the keywords of Hugging Face's `generate`:
        if it is given, the result is that of `generate`.
        """
        if generate is not None:
            sharded = any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in self.hf.modules())
            hf: Any = self.hf
            return hf.generate(input_ids, **{'synced_gpus': sharded and dist.get_world_size() > 1, **generate})
        head = self.hf.get_output_embeddings()
        if targets is not None and self.hf.config.model_type in PLAIN_HEADS and getattr(head, 'bias', None) is None:
            hidden = self.hf.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
            return chunked_cross_entropy(hidden, head.weight, targets,  # pyright: ignore
                                         loss_of_logits=self.loss_of_logits)
        logits = self.hf(input_ids=input_ids, use_cache=False).logits  # (batch, seq, vocab)
        if targets is None:
            return logits
        return plain_cross_entropy(logits, targets)

    def fsdp_wrap_fn(self, module: nn.Module) -> bool:
        return isinstance(module, self.block_types)

    def activation_checkpointing_fn(self, module: nn.Module) -> bool:
        return isinstance(module, self.block_types)


def build_hf_config(cfg: HFCausalLMConfig, keep_nulls: bool = False) -> PretrainedConfig:
    """Builds the Hugging Face config: the named model's with `config_overrides`, or from `config_overrides` alone.

    `dtype`, the type of the trained weights, is float32 unless `config_overrides` sets it. A null in `config_overrides`
    means the model's own value; with `keep_nulls`, as in a checkpoint's manifest, null is a value. Raises UserError
    where the model or a key does not exist, a value is refused, or the hub cannot be reached.
    """
    name = cfg.pretrained_model_name_or_path
    stored: dict[str, Any] = {}
    overrides: dict[str, Any] = {key: value for key, value in cfg.config_overrides.items()
                                 if value is not None or keep_nulls}
    try:
        if name is None:
            base = AutoConfig.for_model(overrides.pop('model_type'))
        else:
            with dist.run_local_rank_zero_first():  # the other ranks then read the cache
                stored, _ = PretrainedConfig.get_config_dict(name)
                if 'model_type' not in stored and 'AutoConfig' not in stored.get('auto_map', ()):
                    # Without a model_type, transformers would choose a family whose name is in the path
                    raise ValueError('it has no config.json, or one without model_type')
                base = AutoConfig.from_pretrained(name, trust_remote_code=cfg.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as e:
        raise UserError(f'model.pretrained_model_name_or_path: {name!r}: {first_line(e)}\n'
                        '  Give a folder whose config.json names a model_type, or a model of the hub (which must be '
                        'reachable, unless the model is in the cache). Or leave the setting out and set '
                        'model.config_overrides.model_type, such as gpt2') from None
    if overrides.get('model_type', base.model_type) != base.model_type:
        raise UserError(f'model.config_overrides.model_type: {overrides["model_type"]!r}, but {name!r} is '
                        f'{base.model_type!r}; remove model_type, or leave model.pretrained_model_name_or_path out')
    unknown = [key for key in overrides if not hasattr(base, key)]
    if unknown:
        raise UserError(f'model.config_overrides: {", ".join(unknown)}: no such key in the config of '
                        f'{base.model_type}; '
                        f'remove it (on the command line: model.config_overrides.{unknown[0]}=null); known keys: '
                        f'{", ".join(sorted(base.attribute_map | base.to_dict()))}')
    try:
        # Built anew, not changed: then the class computes derived keys, such as a head dimension, from the new values
        own = {key: value for key, value in stored.items() if key not in DTYPE_KEYS}
        config = type(base)(**(_without_derived(type(base), own) if overrides else own) | overrides)
        if not any(overrides.get(key) for key in DTYPE_KEYS):
            config.dtype = torch.float32
        if not isinstance(config.dtype, torch.dtype):
            raise TypeError(f'dtype {config.dtype!r} is no type such as float32 or bfloat16')
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as e:  # the last: transformers 5
        raise UserError(f'model.config_overrides: {overrides} is refused by {base.model_type}: '
                        f'{first_line(e)}') from None
    never_causal = config.model_type in NEVER_CAUSAL
    if never_causal or config.model_type in ENCODERS and not config.is_decoder:
        hint = '' if never_causal else ', or set model.config_overrides.is_decoder=true'
        raise UserError(f'model: {name or config.model_type!r} sees the tokens that it has to predict, as encoders do; '
                        f'choose a causal model such as gpt2{hint}')
    if getattr(config, 'output_router_logits', False) and not keep_nulls:
        raise UserError(f'model: {name or config.model_type!r} has output_router_logits: true, but the kit computes '
                        "only the loss of the tokens, without Hugging Face's auxiliary loss of the router; set "
                        'model.config_overrides.output_router_logits=false')
    return config


def _without_derived(cls: Any, own: dict[str, Any]) -> dict[str, Any]:
    """Removes from a saved config the derived keys to which its class gives the same values by itself."""
    try:
        derived = cls(**{key: value for key, value in own.items() if key not in DERIVED_KEYS})
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, StrictDataclassError):
        return own  # the class needs the keys
    return {key: value for key, value in own.items() if key not in DERIVED_KEYS or value != getattr(derived, key, None)}


class ComposerHFCausalLM(ComposerCausalLM):
    """GPT-2, GPT-Neo, GPT-NeoX, Llama or another Hugging Face causal language model for Composer's Trainer.

    Args:
        cfg: `HFCausalLMConfig`, or a mapping with its keys. `pretrained: false` draws new weights from `init_seed`.

    Raises:
        UserError: The model cannot be found, or cannot be built as a causal language model.
    """

    def __init__(self, cfg: Union[HFCausalLMConfig, Mapping[str, Any]]):
        cfg = parse(HFCausalLMConfig, cfg)
        config = build_hf_config(cfg)
        name = cfg.pretrained_model_name_or_path
        if cfg.pretrained and name is None:
            raise UserError('model.pretrained: true needs model.pretrained_model_name_or_path')
        refusals = (OSError, ValueError, RuntimeError, TypeError, LookupError, ZeroDivisionError, StrictDataclassError)
        if not (cfg.trust_remote_code and hasattr(config, 'auto_map')):  # in a model's own code these may be bugs
            refusals += (AttributeError, AssertionError, StopIteration, ImportError)
        try:
            if cfg.pretrained and name:
                with dist.run_local_rank_zero_first():
                    model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=config.dtype,
                                                                 trust_remote_code=cfg.trust_remote_code)
            else:
                with torch.random.fork_rng():
                    torch.manual_seed(cfg.init_seed)
                    model = AutoModelForCausalLM.from_config(config, dtype=config.dtype,
                                                             trust_remote_code=cfg.trust_remote_code)
            head = model.get_output_embeddings()
            if head is None or config.tie_word_embeddings and head.weight is not model.get_input_embeddings().weight:
                raise ValueError('it has no output layer, or its output layer does not share the weight of the '
                                 'embeddings as its config says')
            sizes = config.num_hidden_layers, config.hidden_size, config.vocab_size
            positions = getattr(config, 'max_position_embeddings', None) or -1
            max_seq_len = positions if positions > 0 else None  # some configs have -1 for no limit
        except refusals as e:
            hint = ''
            if 'Padding_idx' in str(e):
                hint = "; set model.config_overrides.pad_token_id to the tokenizer's padding token, below vocab_size"
            elif config.sub_configs:
                hint = f'; it has several parts: choose its text model alone, {config.get_text_config().model_type}'
            raise UserError(f'model: {name or config.model_type!r} cannot be built as a causal language model: '
                            f'{first_line(e)}{hint}') from e
        log.info('attention: Hugging Face %s', config._attn_implementation)
        super().__init__(HFCausalLM(model), *sizes, max_seq_len=max_seq_len)
        # The sizes, not a name: users of a checkpoint may have neither the hub nor the folder
        known = type(config)()
        shape = {key: value for key, value in config.to_diff_dict().items()
                 if hasattr(known, key) and key != '_name_or_path'}
        self.manifest_config = cfg.model_copy(update={
            'pretrained_model_name_or_path': None, 'pretrained': False,
            'config_overrides': shape | {'model_type': config.model_type}}).model_dump()

    @property
    def config(self) -> PretrainedConfig:
        """The Hugging Face config."""
        model: Any = self.model
        return model.config

    def generate(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """Calls Hugging Face's `generate`. Call `eval()` first; under FSDP, call `generate` on every rank.

        Args:
            input_ids: The prompts, (batch, seq).
            **kwargs: Keywords of Hugging Face's `generate`, such as `max_new_tokens`.
        """
        return self.model(input_ids, generate=kwargs)
