"""A GPT of 2025 in plain PyTorch: rotary positions, attention, MLP, block, model, and the wrapper for the Trainer.

`modern_gpt` computes what Hugging Face's Qwen3 computes (Qwen Team 2025, https://arxiv.org/abs/2505.09388), weight for
weight; `checkpoints/hf_layout.py` converts both ways. The model takes everything but its layers from `mosaic_gpt.py`:

| part               | mosaic_gpt, 2019         | modern_gpt, 2025                                                 |
|--------------------|--------------------------|------------------------------------------------------------------|
| positions          | learned, added to tokens | RoPE: queries and keys turn by an angle (Su et al. 2021)         |
| norms              | LayerNorm                | RMSNorm (Zhang & Sennrich 2019), also of each query and key      |
| keys and values    | as many heads as queries | `n_kv_heads`, each for a group of queries (Ainslie et al. 2023)  |
| MLP                | GELU                     | SwiGLU: a gate multiplies the inner layer (Shazeer 2020)         |
| biases             | in each layer            | none                                                             |
| out_proj, mlp_down | small random weights     | zeros, so that each block begins as the identity                 |

Its YAMLs train it by Muon: see `optimizers.py`.
"""

from collections.abc import Mapping
from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.attention import Documents, choose_attention
from src.causal_lm import ComposerCausalLM
from src.config.derived import modern_shape
from src.config.schema import GPTConfig, ModernGPTConfig
from src.mosaic_gpt import MosaicGPT


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Turns each pair of features by an angle proportional to the position (Su et al. 2021, RoFormer, eq. 34).

    So the product of a query and a key depends on their distance. Feature i pairs with feature i + head_dim / 2, as in
    Hugging Face's models. The wavelengths grow from 2 pi to 2 pi theta positions. The angles are computed in fp32.

    Args:
        x: Queries or keys, (batch, seq, heads, head_dim).
        positions: (seq,) or (batch, seq).
        theta: The base of the wavelengths.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (torch.arange(half, device=x.device, dtype=torch.float32) / -half)  # (head_dim / 2,)
    angles = (positions[..., None].float() * frequencies)[..., None, :]  # (..., seq, 1, head_dim / 2)
    cos, sin = angles.cos(), angles.sin()
    a, b = x.float().chunk(2, dim=-1)  # each (batch, seq, heads, head_dim / 2)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class GroupedQueryAttention(nn.Module):
    """Causal self-attention with RoPE, normalised queries and keys, and fewer heads of keys and values.

    `Wqkv` maps a token to its queries, keys and values, in this order; `out_proj` joins the heads.
    """

    def __init__(self, cfg: ModernGPTConfig):
        super().__init__()
        self.head_dim, n_kv_heads, _ = modern_shape(cfg)
        self.groups = cfg.n_heads // n_kv_heads  # heads of queries for each head of keys and values
        self.theta = cfg.rope_theta
        self.kernel, self.attention, self.prepare = choose_attention(cfg.attn_impl, self.head_dim,
                                                                     cfg.attn_within_document, cfg.flash_kernel)
        d_query, d_key = cfg.n_heads * self.head_dim, n_kv_heads * self.head_dim
        self.fused_rows = {'Wqkv.weight': [d_query, d_key, d_key]}  # which Muon treats as separate matrices
        self.Wqkv = nn.Linear(cfg.d_model, d_query + 2 * d_key, bias=False, device=cfg.device)
        self.q_norm = nn.RMSNorm(self.head_dim, cfg.norm_eps, device=cfg.device)
        self.k_norm = nn.RMSNorm(self.head_dim, cfg.norm_eps, device=cfg.device)
        self.out_proj = nn.Linear(d_query, cfg.d_model, bias=False, device=cfg.device)

    def forward(self, x: Tensor, documents: Optional[Documents] = None) -> Tensor:
        """Maps (batch, seq, d_model) to the same shape; with `documents` a token sees only its own document."""
        positions = documents.positions if documents else torch.arange(x.shape[1], device=x.device)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim))  # (batch, seq, heads, head_dim)
                   for part in self.Wqkv(x).split(self.fused_rows['Wqkv.weight'], dim=-1))
        q, k = rotate(self.q_norm(q), positions, self.theta), rotate(self.k_norm(k), positions, self.theta)
        if self.groups > 1:  # not every kernel takes fewer heads of keys and values
            k, v = (part.repeat_interleave(self.groups, dim=2) for part in (k, v))
        out = self.attention(q.to(v.dtype), k.to(v.dtype), v, 0.0, documents)
        return self.out_proj(out.flatten(2))


class SwiGLU(nn.Module):
    """`gate_up` maps a token to a gate and to values, in this order; the gate multiplies the values."""

    def __init__(self, cfg: ModernGPTConfig):
        super().__init__()
        width = modern_shape(cfg).d_hidden
        self.fused_rows = {'gate_up.weight': [width, width]}  # which Muon treats as separate matrices
        self.gate_up = nn.Linear(cfg.d_model, 2 * width, bias=False, device=cfg.device)
        self.mlp_down = nn.Linear(width, cfg.d_model, bias=False, device=cfg.device)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, seq, d_model) to the same shape."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # each (batch, seq, d_hidden)
        return self.mlp_down(F.silu(gate) * up)


class ModernBlock(nn.Module):
    """A transformer block. FSDP gathers, and activation checkpointing recomputes, one block at a time."""

    def __init__(self, cfg: ModernGPTConfig):
        super().__init__()
        self.ln_1 = nn.RMSNorm(cfg.d_model, cfg.norm_eps, device=cfg.device)
        self.causal_attn = GroupedQueryAttention(cfg)
        self.ln_2 = nn.RMSNorm(cfg.d_model, cfg.norm_eps, device=cfg.device)
        self.mlp = SwiGLU(cfg)

    def forward(self, x: Tensor, documents: Optional[Documents] = None) -> Tensor:
        """Maps (batch, seq, d_model) to the same shape; with `documents`, attention stays within each document."""
        x = x + self.causal_attn(self.ln_1(x), documents)
        return x + self.mlp(self.ln_2(x))


class CappedHead(nn.Linear):
    """A head whose logits stay between -cap and cap (Gemma Team 2024). The loss then needs all logits at once."""

    cap = 0.0

    def forward(self, input: Tensor) -> Tensor:
        return self.cap * torch.tanh(super().forward(input).float() / self.cap)


class ModernGPT(MosaicGPT):
    """The model. `forward`, the loss, padding, documents, FSDP and weights on meta are those of `MosaicGPT`.

    Args:
        cfg: `ModernGPTConfig`, or a mapping with its keys.

    Raises:
        UserError: A key is unknown, or a value is impossible.
    """

    config_class = ModernGPTConfig

    def build_layers(self, cfg: ModernGPTConfig) -> nn.ModuleDict:
        return nn.ModuleDict({
            'wte': nn.Embedding(cfg.vocab_size, cfg.d_model, device=cfg.device),
            'blocks': nn.ModuleList([ModernBlock(cfg) for _ in range(cfg.n_layers)]),
            'ln_f': nn.RMSNorm(cfg.d_model, cfg.norm_eps, device=cfg.device),
        })

    def build_head(self, cfg: ModernGPTConfig) -> nn.Linear:
        if cfg.logit_softcap is None:
            return super().build_head(cfg)
        head = CappedHead(cfg.d_model, cfg.vocab_size, bias=False, device=cfg.device)
        head.cap = cfg.logit_softcap
        return head

    def tie_weights(self) -> None:
        if self.cfg.tie_embeddings:
            super().tie_weights()

    @staticmethod
    def residual_std(cfg: GPTConfig) -> float:
        return 0.0

    def embed(self, input_ids: Tensor, documents: Optional[Documents]) -> Tensor:
        """Token embedding, (batch, seq, d_model); positions come in attention."""
        return self.transformer['wte'](input_ids)


class ComposerModernGPT(ComposerCausalLM):
    """`ModernGPT` for Composer's Trainer: `model:` with `name: modern_gpt`."""

    def __init__(self, cfg: Union[ModernGPTConfig, Mapping[str, Any]]):
        model = ModernGPT(cfg)
        c = model.cfg
        super().__init__(model, c.n_layers, c.n_heads * modern_shape(c).head_dim, vocab_size=c.vocab_size,
                         max_seq_len=c.max_seq_len, attn_within_document=c.attn_within_document)
