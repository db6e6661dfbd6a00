"""A plain PyTorch GPT: pre-LayerNorm, learned positions, GELU MLP, biases, tied embeddings (Radford et al. 2019).

Initialisation, all in `MosaicGPT.param_init_fn`:

| parameter                            | drawn from                         |
|--------------------------------------|------------------------------------|
| wte, wpe, Wqkv, mlp_up weights       | N(0, init_std)                     |
| out_proj, mlp_down weights           | N(0, init_std / sqrt(2 n_layers))  |
| every bias                           | 0                                  |
| LayerNorm weights                    | 1                                  |
"""

import hashlib
import logging
import math
from collections.abc import Mapping
from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from src.attention import CausalAttention, Documents
from src.causal_lm import ComposerCausalLM, chunked_cross_entropy, padding_to_the_right, plain_cross_entropy
from src.config import parse
from src.errors import UserError
from src.schema import MosaicGPTConfig

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

    Parameters keep their names, type and values. A CPU computes the same rounding in a slower way.

    Returns:
        What computes them, for the log.

    Raises:
        UserError: The package is not installed, or the GPU has no such matrix products.
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
    convert_to_float8_training(blocks, config=Float8LinearConfig(emulate=not has_gpu))
    return 'fp8 by torchao' if has_gpu else 'fp8 by torchao, emulated on the CPU'


class MosaicGPT(nn.Module):
    """The model. `fsdp_wrap_fn`, `activation_checkpointing_fn` and `param_init_fn` are what Composer's FSDP asks for.

    Args:
        cfg: `MosaicGPTConfig`, or a mapping with its keys. With `device: meta` the parameters take no memory until
            `materialize`, or Composer's FSDP, gives them a device.

    Raises:
        UserError: A key is unknown or its value impossible.
    """

    def __init__(self, cfg: Union[MosaicGPTConfig, Mapping[str, Any]]):
        super().__init__()
        self.cfg = cfg = parse(MosaicGPTConfig, cfg)
        if cfg.d_model % cfg.n_heads:
            raise UserError(f'model.n_heads: {cfg.n_heads} does not divide model.d_model {cfg.d_model}')
        self.transformer = nn.ModuleDict({
            'wte': nn.Embedding(cfg.vocab_size, cfg.d_model, device=cfg.device),
            'wpe': nn.Embedding(cfg.max_seq_len, cfg.d_model, device=cfg.device),
            'emb_dropout': nn.Dropout(cfg.emb_pdrop),
            'blocks': nn.ModuleList([GPTBlock(cfg) for _ in range(cfg.n_layers)]),
            'ln_f': nn.LayerNorm(cfg.d_model, device=cfg.device),
        })
        if cfg.linear_impl == 'fp8':
            log.info('linear layers: %s', compute_in_fp8(self.transformer['blocks']))
        self.lm_head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False, device=cfg.device)
        self.tie_weights()
        # Wrappers (FSDP, compile, activation checkpointing) change the names of parameters, never this one.
        self.module_path: dict[nn.Module, str] = {m: name for name, m in self.named_modules()}
        self.module_path[self.lm_head] = self.module_path[self.transformer['wte']]
        attention: Any = self.get_submodule('transformer.blocks.0.causal_attn')
        self.takes_lengths: tuple[torch.dtype, ...] = attention.takes_lengths
        log.info('attention: %s (attn_impl: %s)', attention.kernel, cfg.attn_impl)
        if cfg.device != 'meta':
            self.init_weights()

    def tie_weights(self) -> None:
        self.lm_head.weight = self.transformer['wte'].weight  # pyright: ignore[reportAttributeAccessIssue]

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
        kind = x.device.type
        if documents and (torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype) in self.takes_lengths:
            documents.count()
        for block in self.transformer['blocks']:  # pyright: ignore[reportGeneralTypeIssues]
            x = block(x, documents)
        x = self.transformer['ln_f'](x)
        if targets is not None and self.cfg.loss_impl == 'plain':
            return plain_cross_entropy(F.linear(x, self.lm_head.weight), targets)
        if targets is not None:
            return chunked_cross_entropy(x, self.lm_head.weight, targets, self.cfg.loss_chunk_tokens, self.cfg.vocab_multiple)
        if order is not None:
            x = x.gather(1, order.argsort(1)[:, :, None].expand_as(x))
        return F.linear(x, self.lm_head.weight)  # (batch, seq, vocab)

    # ------------------------------------------------------------ weights

    @torch.no_grad()
    def param_init_fn(self, module: nn.Module) -> None:
        """Draws one module's own parameters.

        Each is drawn whole, from a CPU generator of its own seeded by (init_seed, parameter name), then sliced to
        what this rank holds: the weights do not depend on the number of ranks, on sharding or on meta.
        """
        path = self.module_path.get(module, '')
        for name, param in module.named_parameters(recurse=False):
            full = torch.empty(param.shape, dtype=torch.float32)
            if name == 'bias':
                full.zero_()
            elif isinstance(module, nn.LayerNorm):
                full.fill_(1.0)
            else:
                residual = path.endswith(('out_proj', 'mlp_down'))
                std = self.cfg.init_std / (math.sqrt(2 * self.cfg.n_layers) if residual else 1.0)
                digest = hashlib.sha256(f'{self.cfg.init_seed}:{path}.{name}'.encode()).digest()
                full.normal_(0.0, std, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7], 'little')))
            if isinstance(param, DTensor):
                # src_data_rank=None: every rank holds the same tensor and cuts its slice, nothing is sent.
                full = distribute_tensor(full.to(param.device), param.device_mesh, param.placements, src_data_rank=None)
            param.copy_(full)

    def init_weights(self) -> None:
        for module in self.modules():
            self.param_init_fn(module)

    def materialize(self, device: Union[str, torch.device]) -> 'MosaicGPT':
        """Gives a model on meta its memory and its weights, embeddings tied."""
        self.to_empty(device=device)
        self.tie_weights()  # to_empty makes two tensors of the tied one
        self.init_weights()
        return self

    # ------------------------------------------------------------ what Composer asks for

    def fsdp_wrap_fn(self, module: nn.Module) -> bool:
        return isinstance(module, GPTBlock)

    def activation_checkpointing_fn(self, module: nn.Module) -> bool:
        """Every n-th block."""
        number = self.module_path.get(module, '').rpartition('.')[2]
        return isinstance(module, GPTBlock) and int(number) % self.cfg.activation_checkpointing_every == 0


class ComposerMosaicGPT(ComposerCausalLM):
    """`MosaicGPT` for Composer's Trainer: `model:` with `name: mosaic_gpt`."""

    def __init__(self, cfg: Union[MosaicGPTConfig, Mapping[str, Any]]):
        model = MosaicGPT(cfg)
        c = model.cfg
        super().__init__(model, c.n_layers, c.d_model, vocab_size=c.vocab_size, max_seq_len=c.max_seq_len,
                         attn_within_document=c.attn_within_document)
