"""A plain PyTorch GPT: pre-LayerNorm, learned positions, GELU MLP, biases, tied embeddings (Radford et al. 2019).

Initialisation, all in `MosaicGPT.param_init_fn`:

| parameter                                        | drawn from                         |
|--------------------------------------------------|------------------------------------|
| wte, wpe, Wqkv, mlp_up weights                   | N(0, init_std)                     |
| out_proj, mlp_down weights                       | N(0, init_std / sqrt(2 n_layers))  |
| any other Linear's or Embedding's weight         | N(0, init_std)                     |
| every Linear's bias                              | 0                                  |
| LayerNorm weights and biases                     | 1 and 0                            |
| parameters and buffers of any other module       | its own `reset_parameters`         |
"""

import logging
import math
from collections.abc import Iterable, Mapping
from inspect import signature
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from src import initialisation
from src.attention import CausalAttention, Documents
from src.causal_lm import ComposerCausalLM, chunked_cross_entropy, padding_to_the_right, plain_cross_entropy
from src.common.errors import UserError
from src.config.check import parse
from src.config.model_checks import heads_error
from src.config.schema import MosaicGPTConfig

log = logging.getLogger(__name__)


class GPTMLP(nn.Module):
    def __init__(self, cfg: MosaicGPTConfig):
        super().__init__()
        self.mlp_up = nn.Linear(cfg.d_model, cfg.mlp_ratio * cfg.d_model, device=cfg.device)
        self.mlp_act = nn.GELU(approximate='tanh' if cfg.mlp_act == 'gelu_tanh' else 'none')
        self.mlp_down = nn.Linear(cfg.mlp_ratio * cfg.d_model, cfg.d_model, device=cfg.device)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp_down(self.mlp_act(self.mlp_up(x)))


class GPTBlock(nn.Module):
    """The unit of sharding and of activation checkpointing."""

    def __init__(self, cfg: MosaicGPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(cfg.d_model, device=cfg.device)
        self.causal_attn = CausalAttention(cfg)
        self.ln_2 = nn.LayerNorm(cfg.d_model, device=cfg.device)
        self.mlp = GPTMLP(cfg)
        self.resid_dropout = nn.Dropout(cfg.resid_pdrop)

    def forward(self, x: Tensor, documents: Optional[Documents] = None) -> Tensor:
        """(batch, seq, d_model) to the same shape."""
        x = x + self.resid_dropout(self.causal_attn(self.ln_1(x), documents))
        return x + self.resid_dropout(self.mlp(self.ln_2(x)))


def compute_in_fp8(blocks: nn.Module) -> str:
    """Has torchao compute the linear layers of the blocks in 8 bits, scaled anew for each tensor (Micikevicius et al. 2022).

    Parameters keep their names, type and values. A CPU computes the same rounding in a slower way. Subclasses of
    `nn.Linear` stay as they are: they may compute something else.

    Returns:
        What computes them, for the log.

    Raises:
        UserError: The package is not installed, the GPU has no such matrix products, or there is no `nn.Linear`.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as e:
        raise UserError(f"model.linear_impl: 'fp8' needs the package torchao ({e}): pip install torchao==0.12.0, which goes with "
                        'torch 2.7 (0.17.0 with torch 2.11), or set plain') from e
    has_gpu = torch.cuda.is_available()
    if has_gpu and torch.cuda.get_device_capability() < (8, 9):
        raise UserError(f"model.linear_impl: 'fp8' needs a GPU of compute capability 8.9 or above, and "
                        f'{torch.cuda.get_device_name()} has {".".join(map(str, torch.cuda.get_device_capability()))}; set plain')
    if not any(type(module) is nn.Linear for module in blocks.modules()):
        raise UserError("model.linear_impl: 'fp8': the model's blocks have no nn.Linear to compute in 8 bits; set plain")
    convert_to_float8_training(blocks, config=Float8LinearConfig(emulate=not has_gpu),
                               module_filter_fn=lambda module, name: type(module) is nn.Linear)
    return 'fp8 by torchao' if has_gpu else 'fp8 by torchao, emulated on the CPU'


class MosaicGPT(nn.Module):
    """The model. `fsdp_wrap_fn`, `activation_checkpointing_fn` and `param_init_fn` are what Composer's FSDP asks for.

    Args:
        cfg: `MosaicGPTConfig`, or a mapping with its keys. With `device: meta` the parameters take no memory until
            `materialize`, or Composer's FSDP, gives them a device.

    Raises:
        UserError: A key is unknown or its value impossible.
    """

    has_values = False  # while `init_weights` runs: whether the modules hold what their constructors set

    def __init__(self, cfg: Union[MosaicGPTConfig, Mapping[str, Any]]):
        super().__init__()
        self.cfg = cfg = parse(MosaicGPTConfig, cfg)
        if error := heads_error(cfg):
            raise UserError(error)
        self.transformer = nn.ModuleDict({
            'wte': nn.Embedding(cfg.vocab_size, cfg.d_model, device=cfg.device),
            'wpe': nn.Embedding(cfg.max_seq_len, cfg.d_model, device=cfg.device),
            'emb_dropout': nn.Dropout(cfg.emb_pdrop),
            'blocks': nn.ModuleList([GPTBlock(cfg) for _ in range(cfg.n_layers)]),
            'ln_f': nn.LayerNorm(cfg.d_model, device=cfg.device),
        })
        for block in self.blocks:
            if cfg.attn_within_document and len(signature(block.forward).parameters) < 2:
                raise UserError(f'model.attn_within_document: true, but forward of {type(block).__name__} takes no '
                                '`documents`; add the argument and keep attention within them, or set false')
        if cfg.linear_impl == 'fp8':
            log.info('linear layers: %s', compute_in_fp8(self.transformer['blocks']))
        self.lm_head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False, device=cfg.device)
        self.tie_weights()
        for kernel in sorted(set(self._of_attention('kernel'))):
            log.info('attention: %s (attn_impl: %s)', kernel, cfg.attn_impl)
        self.draws_weights = initialisation.draws_weights()
        by_hand = initialisation.set_by_hand(self)
        if lost := [name for name, param in by_hand.items() if param.is_meta]:
            raise UserError(f'model.device: on meta {lost[0]} loses the values that the code around its layer has set; write '
                            'a subclass of the layer with a method reset_parameters(self) that sets them, or set '
                            'model.device=cpu')
        self.set_by_hand = {*by_hand}
        if cfg.device != 'meta':
            self.init_weights()

    @property
    def blocks(self) -> Any:
        return self.transformer['blocks']

    def tie_weights(self) -> None:
        self.lm_head.weight = self.transformer['wte'].weight  # pyright: ignore[reportAttributeAccessIssue]

    def _of_attention(self, name: str) -> list[Any]:
        """An attribute of the kit's attention, from each block that has it."""
        attentions = (getattr(block, 'causal_attn', None) for block in self.blocks)
        return [getattr(attention, name) for attention in attentions if hasattr(attention, name)]

    def forward(self, input_ids: Tensor, key_padding_mask: Optional[Tensor] = None,
                targets: Optional[Tensor] = None, sequence_id: Optional[Tensor] = None) -> Tensor:
        """Logits, or with targets the loss.

        Args:
            input_ids: (batch, seq).
            key_padding_mask: (batch, seq), true at tokens. Padding may stand on either side: positions count from
                each row's first token, and what is computed for a token is what its row alone would give. What
                stands at padding positions of the result has no meaning. Right padding needs no mask.
            targets: (batch, seq), the id that each position has to predict, or -100.
            sequence_id: (batch, seq), numbers the documents of each row. Positions count from each document's first
                token and attention stays within it: what is computed for a token is what its document alone would
                give. Without it a row is one document.

        Returns:
            Logits (batch, seq, vocab), or the mean cross entropy over the targets in nats.
        """
        seq_len = input_ids.shape[1]
        if seq_len > self.cfg.max_seq_len:
            raise UserError(f'a batch of sequence length {seq_len} does not fit model.max_seq_len {self.cfg.max_seq_len}')
        order = None
        if key_padding_mask is not None:
            order = padding_to_the_right(key_padding_mask)
            input_ids = input_ids.gather(1, order)
            targets = targets if targets is None else targets.gather(1, order)
            sequence_id = sequence_id if sequence_id is None else sequence_id.gather(1, order)
        documents = None if sequence_id is None else Documents(sequence_id)
        positions = documents.positions if documents else torch.arange(seq_len, device=input_ids.device)
        x = self.transformer['wte'](input_ids) + self.transformer['wpe'](positions)  # (batch, seq, d_model)
        x = self.transformer['emb_dropout'](x)
        if documents:
            kind = x.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
            if any(dtype in dtypes for dtypes in self._of_attention('takes_lengths')):
                documents.count()
        for block in self.blocks:
            x = block(x, documents) if documents else block(x)
        x = self.transformer['ln_f'](x)
        head = self.lm_head
        if targets is not None and self.cfg.loss_impl == 'chunked' and type(head) is nn.Linear and head.bias is None:
            return chunked_cross_entropy(x, head.weight, targets, self.cfg.loss_chunk_tokens, self.cfg.vocab_multiple)
        if targets is not None:
            return plain_cross_entropy(head(x), targets)
        if order is not None:
            x = x.gather(1, order.argsort(1)[:, :, None].expand_as(x))
        return head(x)  # (batch, seq, vocab)

    # ------------------------------------------------------------ weights

    @torch.no_grad()
    def param_init_fn(self, module: nn.Module) -> None:
        """Gives one module's own parameters and buffers their initial values, by the table above.

        They depend on `init_seed` and the module's name alone, but for a Linear or Embedding into which the code around
        it has written: there they stay. Where a checkpoint overwrites the weights
        (`initialisation.weights_come_later`), those that the model would draw are NaN: a weight that the checkpoint
        lacks cannot pass for an initial one.

        Raises:
            UserError: The module has come from meta, and nothing sets some of its parameters or buffers.
        """
        path = next((path for path, other in initialisation.named_modules(self) if other is module), '')
        if not self.has_values:
            initialisation.check_initialisation(module, path)
        params = dict(module.named_parameters(recurse=False))
        # A tied parameter is drawn under the first of its names
        tied = {name for name, param in params.items() if initialisation.first_owner(self, param) is not module}
        if not initialisation.is_matrix(module):
            initialisation.reset(module, path, self.cfg.init_seed, self.has_values, tied)
            return
        for name, param in params.items():
            if name not in ('weight', 'bias') or name in tied:
                continue
            if not self.draws_weights:
                param.fill_(torch.nan)
            elif f'{path}.{name}' in self.set_by_hand:
                continue
            elif name == 'bias':
                param.zero_()
            else:
                residual = path.endswith(('out_proj', 'mlp_down'))
                std = self.cfg.init_std / (math.sqrt(2 * self.cfg.n_layers) if residual else 1.0)
                key, zero_row = f'{self.cfg.init_seed}:{path}.{name}', getattr(module, 'padding_idx', None)
                initialisation.draw_normal(param, std, key, zero_row)

    def init_weights(self, modules: Optional[Iterable[nn.Module]] = None) -> None:
        """Calls `param_init_fn` for modules that have come from meta.

        Args:
            modules: None: for every module. A model that was built on the CPU then redraws what is random, and a
                module without `reset_parameters`, or without random numbers in it, keeps its values.
        """
        if isinstance(self.transformer['wte'].weight, FakeTensor):  # a prediction of memory: tensors without data
            return
        self.has_values = modules is None and self.cfg.device == 'cpu'
        for module in self.modules() if modules is None else modules:
            self.param_init_fn(module)
        self.has_values = False

    def materialize(self, device: Union[str, torch.device]) -> 'MosaicGPT':
        """Gives what is on meta its memory and its values; ties stay, and what is not on meta keeps its values.

        Raises:
            UserError: A module has parameters or buffers that nothing sets.
        """
        self.init_weights(initialisation.leave_meta(self, device))
        return self

    # ------------------------------------------------------------ what Composer asks for

    def _block_number(self, module: nn.Module) -> Optional[int]:
        """Which member of `transformer.blocks` the module is, of any class, in any wrapper; None: none of them."""
        return next((n for n, block in enumerate(self.blocks) if initialisation.unwrap(block) is module), None)

    def fsdp_wrap_fn(self, module: nn.Module) -> bool:
        return self._block_number(module) is not None

    def activation_checkpointing_fn(self, module: nn.Module) -> bool:
        """Every n-th block."""
        number = self._block_number(module)
        return number is not None and number % self.cfg.activation_checkpointing_every == 0


class ComposerMosaicGPT(ComposerCausalLM):
    """`MosaicGPT` for Composer's Trainer: `model:` with `name: mosaic_gpt`."""

    def __init__(self, cfg: Union[MosaicGPTConfig, Mapping[str, Any]]):
        model = MosaicGPT(cfg)
        c = model.cfg
        super().__init__(model, c.n_layers, c.d_model, vocab_size=c.vocab_size, max_seq_len=c.max_seq_len,
                         attn_within_document=c.attn_within_document)
