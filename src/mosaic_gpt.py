"""GPT-2 in plain PyTorch (Radford et al. 2019): MLP, block, model, and the wrapper for Composer's Trainer.

LayerNorm stands before attention and MLP, positions are learned, and the head shares its weight with the token
embedding. `initialisation.py` tabulates the initial weights.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from inspect import signature
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from src.attention import CausalAttention, Documents
from src.causal_lm import (
    ComposerCausalLM,
    LossOfLogits,
    chunked_cross_entropy,
    compute_dtype,
    padded_linear,
    padding_right_order,
    plain_cross_entropy,
)
from src.common.errors import UserError
from src.config.check import parse
from src.config.model_checks import heads_error
from src.config.schema import GPTConfig, MosaicGPTConfig
from src.initialisation import Initialiser, materialize_parameters, unwrap

log = logging.getLogger(__name__)


class GPTMLP(nn.Module):
    """Two linear layers with GELU between them; the inner layer is `mlp_ratio` times as wide as the model."""

    def __init__(self, cfg: MosaicGPTConfig):
        super().__init__()
        self.mlp_up = nn.Linear(cfg.d_model, cfg.mlp_ratio * cfg.d_model, device=cfg.device)
        self.mlp_act = nn.GELU(approximate='tanh' if cfg.mlp_act == 'gelu_tanh' else 'none')
        self.mlp_down = nn.Linear(cfg.mlp_ratio * cfg.d_model, cfg.d_model, device=cfg.device)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, seq, d_model) to the same shape."""
        return self.mlp_down(self.mlp_act(self.mlp_up(x)))


class GPTBlock(nn.Module):
    """A transformer block. FSDP gathers, and activation checkpointing recomputes, one block at a time."""

    def __init__(self, cfg: MosaicGPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(cfg.d_model, device=cfg.device)
        self.causal_attn = CausalAttention(cfg)
        self.ln_2 = nn.LayerNorm(cfg.d_model, device=cfg.device)
        self.mlp = GPTMLP(cfg)
        self.resid_dropout = nn.Dropout(cfg.resid_pdrop)

    def forward(self, x: Tensor, documents: Optional[Documents] = None) -> Tensor:
        """Maps (batch, seq, d_model) to the same shape; with `documents`, attention stays within each document."""
        x = x + self.resid_dropout(self.causal_attn(self.ln_1(x), documents))
        return x + self.resid_dropout(self.mlp(self.ln_2(x)))


def compute_in_fp8(blocks: nn.Module) -> str:
    """Makes the blocks' linear layers multiply in 8-bit floats, with one scale per tensor (Micikevicius et al. 2022).

    Parameters keep their names, types and values. On a CPU, torchao emulates the rounding, which is slow. Subclasses of
    `nn.Linear` stay as they are, because they may compute something else. Returns the implementation's name for the
    log. Raises UserError if torchao is not installed, the GPU cannot multiply in 8 bits, or no `nn.Linear` is there.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as e:
        raise UserError(f"model.linear_impl: 'fp8' needs the package torchao ({e}). Run pip install torchao==0.12.0 "
                        '(for torch 2.7; 0.17.0 is for torch 2.11), or set model.linear_impl=plain') from e
    has_gpu = torch.cuda.is_available()
    if has_gpu and torch.cuda.get_device_capability() < (8, 9):
        capability = '.'.join(map(str, torch.cuda.get_device_capability()))
        raise UserError("model.linear_impl: 'fp8' needs a GPU of compute capability 8.9 or above, and "
                        f'{torch.cuda.get_device_name()} has {capability}; set model.linear_impl=plain')
    if not any(type(module) is nn.Linear for module in blocks.modules()):
        raise UserError("model.linear_impl: 'fp8': the model's blocks have no nn.Linear to compute in 8 bits; set "
                        'model.linear_impl=plain')
    convert_to_float8_training(blocks, config=Float8LinearConfig(emulate=not has_gpu),
                               module_filter_fn=lambda module, name: type(module) is nn.Linear)
    return 'fp8 by torchao' if has_gpu else 'fp8 by torchao, emulated on the CPU'


class MosaicGPT(nn.Module):
    """The model. Composer's FSDP calls `fsdp_wrap_fn`, `activation_checkpointing_fn` and `param_init_fn`.

    A model of other layers derives from this class: see `modern_gpt.py`.

    Args:
        cfg: `MosaicGPTConfig`, or a mapping with its keys. With `device: meta` the parameters take no memory until
            `materialize`, or Composer's FSDP, moves them to a device and draws them.

    Raises:
        UserError: A key is unknown, or a value is impossible.
    """

    config_class: type[GPTConfig] = MosaicGPTConfig

    def __init__(self, cfg: Union[GPTConfig, Mapping[str, Any]]):
        super().__init__()
        self.cfg: Any = (cfg := parse(self.config_class, cfg))
        if error := heads_error(cfg):
            raise UserError(error)
        self.transformer = self.build_layers(cfg)
        for block in self.blocks:
            if cfg.attn_within_document and len(signature(block.forward).parameters) < 2:
                raise UserError(f'model.attn_within_document: true, but forward of {type(block).__name__} takes no '
                                '`documents`; add this argument and keep attention within the documents, or set '
                                'model.attn_within_document=false')
        if cfg.linear_impl == 'fp8':
            log.info('linear layers: %s', compute_in_fp8(self.blocks))
        self.lm_head = self.build_head(cfg)
        self.loss_of_logits = LossOfLogits()
        self.tie_weights()
        self.prepares: dict[str, Any] = {module.kernel: module.prepare for module in self.blocks.modules()
                                         if hasattr(module, 'prepare')}
        for kernel in sorted(self.prepares):
            log.info('attention: %s (attn_impl: %s)', kernel, cfg.attn_impl)
        self.initialiser = Initialiser(self, cfg, self.residual_std(cfg))
        if cfg.device != 'meta':
            self.init_weights()

    def build_layers(self, cfg: Any) -> nn.ModuleDict:
        """Builds the layers: `wte`, `blocks` and `ln_f`, and those that `embed` needs."""
        return nn.ModuleDict({
            'wte': nn.Embedding(cfg.vocab_size, cfg.d_model, device=cfg.device),
            'wpe': nn.Embedding(cfg.max_seq_len, cfg.d_model, device=cfg.device),
            'emb_dropout': nn.Dropout(cfg.emb_pdrop),
            'blocks': nn.ModuleList([GPTBlock(cfg) for _ in range(cfg.n_layers)]),
            'ln_f': nn.LayerNorm(cfg.d_model, device=cfg.device),
        })

    def build_head(self, cfg: Any) -> nn.Linear:
        """Builds the layer that turns (batch, seq, d_model) into logits."""
        return nn.Linear(cfg.d_model, cfg.vocab_size, bias=False, device=cfg.device)

    @staticmethod
    def residual_std(cfg: Any) -> float:
        """The standard deviation of the weights `out_proj` and `mlp_down`, which write into the residual stream."""
        return cfg.init_std / math.sqrt(2 * cfg.n_layers)

    @property
    def blocks(self) -> Any:
        return self.transformer['blocks']

    def tie_weights(self) -> None:
        """Makes the head use the weight of the token embedding."""
        self.lm_head.weight = self.transformer['wte'].weight  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, input_ids: Tensor, key_padding_mask: Optional[Tensor] = None,
                targets: Optional[Tensor] = None, sequence_id: Optional[Tensor] = None) -> Tensor:
        """Returns logits, or the loss if there are targets.

        Args:
            input_ids: Token ids, (batch, seq).
            key_padding_mask: (batch, seq), true at tokens, false at padding on either side. Each token gets the logits
                that its row would give without padding; logits at padding have no meaning. None: padding, if any,
                stands on the right, where causal attention hides it.
            targets: (batch, seq), the id that each position has to predict, or -100 for none.
            sequence_id: (batch, seq), the number of each token's document. Each token gets the logits that its
                document would give alone: attention and positions start anew in each. None: a row is one document.

        Returns:
            Logits, (batch, seq, vocab), or the mean cross entropy over the targets in nats.
        """
        if (seq_len := input_ids.shape[1]) > self.cfg.max_seq_len:
            raise UserError(f'a batch of sequence length {seq_len} does not fit '
                            f'model.max_seq_len {self.cfg.max_seq_len}; give shorter samples, or set a larger one')
        order = None
        if key_padding_mask is not None:
            order = padding_right_order(key_padding_mask)
            input_ids = input_ids.gather(1, order)
            targets = None if targets is None else targets.gather(1, order)
            sequence_id = None if sequence_id is None else sequence_id.gather(1, order)
        documents = None if sequence_id is None else Documents(sequence_id)
        x = self.embed(input_ids, documents)  # (batch, seq, d_model)
        for prepare in self.prepares.values() if documents else ():
            prepare(documents, compute_dtype(x))
        for block in self.blocks:
            x = block(x, documents) if documents else block(x)  # (batch, seq, d_model)
        x = self.transformer['ln_f'](x)
        if targets is not None:
            return self._loss(x, targets)
        if order is not None:  # move padding back to where it was
            x = x.gather(1, order.argsort(1)[:, :, None].expand_as(x))
        return self.lm_head(x)  # (batch, seq, vocab)

    def embed(self, input_ids: Tensor, documents: Optional[Documents]) -> Tensor:
        """Token plus position embedding, (batch, seq, d_model)."""
        positions = documents.positions if documents else torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.transformer['emb_dropout'](self.transformer['wte'](input_ids) + self.transformer['wpe'](positions))

    def _loss(self, x: Tensor, targets: Tensor) -> Tensor:
        head, cfg = self.lm_head, self.cfg
        if type(head) is not nn.Linear or head.bias is not None:
            return plain_cross_entropy(head(x), targets)
        if cfg.loss_impl == 'plain':
            return plain_cross_entropy(padded_linear(x, head.weight, cfg.vocab_multiple), targets)
        return chunked_cross_entropy(x, head.weight, targets, cfg.loss_chunk_tokens, cfg.vocab_multiple,
                                     self.loss_of_logits)

    # ------------------------------------------------------------ weights

    def param_init_fn(self, module: nn.Module) -> None:
        """Sets the initial values of one module's own parameters and buffers, not of its children's.

        Raises UserError if the module comes from meta and one of these tensors has no initialisation.
        """
        self.initialiser.set_values(module)

    def init_weights(self, modules: Optional[Iterable[nn.Module]] = None) -> None:
        """Calls `param_init_fn` for each of `modules`, which come from meta; None: for every module.

        With None, a model that was built on the CPU draws its random weights anew. There, modules whose initialisation
        is not random, or which have none, keep their values.
        """
        if isinstance(self.transformer['wte'].weight, FakeTensor):  # tensors without data, to predict the memory
            return
        self.initialiser.has_values = modules is None and self.cfg.device == 'cpu'
        for module in self.modules() if modules is None else modules:
            self.param_init_fn(module)
        self.initialiser.has_values = False

    def materialize(self, device: Union[str, torch.device]) -> 'MosaicGPT':
        """Moves the model from meta to a device and draws its weights. Tied weights stay tied.

        Tensors that are not on meta keep their values. Raises UserError if a tensor on meta has no initialisation.
        """
        self.init_weights(materialize_parameters(self, device))
        return self

    # ------------------------------------------------------------ called by Composer's FSDP

    def fsdp_wrap_fn(self, module: nn.Module) -> bool:
        """Whether FSDP makes the module a unit of its own: every block, of whatever class."""
        return any(unwrap(block) is module for block in self.blocks)

    def activation_checkpointing_fn(self, module: nn.Module) -> bool:
        """Whether the backward pass recomputes the module's activations: every n-th block."""
        return any(unwrap(block) is module for block in self.blocks[::self.cfg.activation_checkpointing_every])


class ComposerMosaicGPT(ComposerCausalLM):
    """`MosaicGPT` for Composer's Trainer: `model:` with `name: mosaic_gpt`."""

    def __init__(self, cfg: Union[MosaicGPTConfig, Mapping[str, Any]]):
        model = MosaicGPT(cfg)
        c = model.cfg
        super().__init__(model, c.n_layers, c.d_model, vocab_size=c.vocab_size, max_seq_len=c.max_seq_len,
                         attn_within_document=c.attn_within_document)
