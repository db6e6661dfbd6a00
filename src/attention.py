"""Causal self-attention: three implementations behind one signature and one weight layout.

Each takes queries, keys and values of shape (batch, seq, heads, head_dim) and returns the same shape. None takes
a mask of padding: `MosaicGPT` moves it to the right end of each row, where causal attention already hides it. Where
rows hold several documents, `Documents` tells each implementation how to stay within them.
"""

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from src.errors import UserError
from src.schema import MosaicGPTConfig

log = logging.getLogger(__name__)


class Documents:
    """Where the documents of a batch lie, for attention that stays within each.

    What a kernel needs is made when the first layer asks for it, and kept for the other layers and for activation
    checkpointing, which runs them again. A plain class, which wrappers hand on as it is: FSDP builds tuples and
    dataclasses anew for every block, and what they keep would be lost.

    Args:
        sequence_id: (batch, seq); a document begins where it changes along a row.
    """

    def __init__(self, sequence_id: Tensor):
        self.index = torch.arange(sequence_id.shape[1], device=sequence_id.device)
        begins = F.pad(sequence_id.diff(dim=1) != 0, (1, 0), value=True)
        self.first = (self.index * begins).cummax(1).values  # (batch, seq), where each token's document begins
        self.positions = self.index - self.first  # (batch, seq), from 0 in each document
        # No cached_property: before Python 3.12 it takes a lock, which torch.compile cannot.
        self._mask: Optional[Tensor] = None
        self._cu_seqlens: Optional[Tensor] = None

    @property
    def mask(self) -> Tensor:
        """(batch, 1, seq, seq): whether a query (third dimension) sees a key (fourth)."""
        if self._mask is None:
            causal = self.index <= self.index[:, None]
            self._mask = (causal & (self.index >= self.first[:, :, None]))[:, None]
        return self._mask

    @property
    def cu_seqlens(self) -> Tensor:
        """(documents + 1,), int32: where each document begins in the batch's rows laid end to end, then their length.

        How many there are is known once the GPU has counted them, so this waits for it.
        """
        if self._cu_seqlens is None:
            begins = (self.positions.flatten() == 0).nonzero()[:, 0]
            self._cu_seqlens = F.pad(begins, (0, 1), value=self.positions.numel()).int()
        return self._cu_seqlens


AttentionFn = Callable[[Tensor, Tensor, Tensor, float, Optional[Documents]], Tensor]  # q, k, v, dropout probability, documents


def torch_attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, documents: Optional[Documents] = None) -> Tensor:
    """softmax(Q K^T / sqrt(head_dim) + causal mask) V, as written (Vaswani et al. 2017, eq. 1): the reference."""
    seq_len = q.shape[1]
    scores = torch.einsum('bqhd,bkhd->bhqk', q, k) / math.sqrt(q.shape[-1])
    hidden = ~documents.mask if documents else torch.ones(seq_len, seq_len, dtype=torch.bool, device=q.device).triu(1)
    weights = scores.float().masked_fill(hidden, float('-inf')).softmax(-1).to(v.dtype)
    return torch.einsum('bhqk,bkhd->bqhd', F.dropout(weights, dropout_p), v)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, documents: Optional[Documents] = None) -> Tensor:
    """PyTorch's fused attention; PyTorch picks the kernel."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (batch, heads, seq, head_dim)
    mask = documents.mask if documents else None
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal=mask is None).transpose(1, 2)


def varlen_attention(kernel: Callable, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Attention by a kernel for sequences of any lengths, laid end to end: each document is one.

    Args:
        kernel: Called with q, k, v of shape (batch * seq, heads, head_dim), and for queries, then keys, the bounds of
            the sequences and the length that none exceeds: seq, since the longest would have to be waited for.
    """
    bounds, seq_len = documents.cu_seqlens, q.shape[1]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return kernel(q, k, v, bounds, bounds, seq_len, seq_len).unflatten(0, (-1, seq_len))


def flash_kernel(head_dim: int, within_document: bool = False) -> tuple[str, AttentionFn]:
    """The FlashAttention kernel of this machine, by name: the `flash-attn` package, else one that PyTorch carries.

    Args:
        head_dim: Width of one head.
        within_document: For rows of several documents, by a variable-length kernel.

    Raises:
        UserError: There is no GPU, or no kernel for it.
    """
    if not torch.cuda.is_available():
        raise UserError("model.attn_impl: 'flash' needs a GPU; set model.attn_impl=auto (or sdpa)")
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0) or head_dim > 256 or head_dim % 8:
        raise UserError(f"model.attn_impl: 'flash' needs an Ampere or newer GPU and a head dimension (d_model / n_heads) that is "
                        f'a multiple of 8 up to 256; here: compute capability {capability[0]}.{capability[1]}, head dimension '
                        f'{head_dim}; set model.attn_impl=sdpa')
    try:
        from flash_attn import flash_attn_func, flash_attn_varlen_func  # pyright: ignore[reportMissingImports]
    except ImportError:
        return _pytorch_flash_kernel(cudnn=capability >= (9, 0) and head_dim <= 128 and not within_document)

    def attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, documents: Optional[Documents] = None) -> Tensor:
        if documents is None:
            return flash_attn_func(q, k, v, dropout_p=dropout_p, causal=True)
        return varlen_attention(partial(flash_attn_varlen_func, dropout_p=dropout_p, causal=True), q, k, v, documents)

    return 'flash-attn package', attention


def _pytorch_flash_kernel(cudnn: bool) -> tuple[str, AttentionFn]:
    """PyTorch's FlashAttention, or cuDNN's, which is the faster one on Hopper and later and stops at head dimension 128."""
    cudnn = cudnn and torch.backends.cudnn.is_available()
    backend = SDPBackend.CUDNN_ATTENTION if cudnn else SDPBackend.FLASH_ATTENTION

    def attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, documents: Optional[Documents] = None) -> Tensor:
        if documents is None:
            with sdpa_kernel(backend):
                return sdpa_attention(q, k, v, dropout_p)
        # The operator behind `torch.nn.attention.varlen`, which torch has from 2.10 on, and behind nested tensors.
        flash: Any = torch.ops.aten._flash_attention_forward
        return varlen_attention(lambda *args: flash(*args, dropout_p, True, False)[0], q, k, v, documents)

    return f'PyTorch {"cuDNN" if cudnn else "FlashAttention"}', attention


def choose_attention(impl: str, head_dim: int, within_document: bool = False) -> tuple[str, AttentionFn]:
    """Resolves `attn_impl`, when the model is built.

    Args:
        impl: `torch`, `sdpa`, `flash` (a FlashAttention kernel or an error) or `auto` (`flash` where the GPU allows
            it and the inputs are fp16 or bf16, else `sdpa`).
        head_dim: Width of one head.
        within_document: The function will be given `Documents`. Every one takes them; this chooses the kernel for it.

    Returns:
        The kernel's name for the log, and the function.
    """
    if impl == 'torch':
        return 'torch (plain maths)', torch_attention
    if impl == 'flash':
        return flash_kernel(head_dim, within_document)
    if impl == 'auto' and torch.cuda.is_available():
        try:
            name, flash = flash_kernel(head_dim, within_document)
        except UserError as e:
            log.info('%s', e)
            return 'sdpa (PyTorch)', sdpa_attention

        def attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, documents: Optional[Documents] = None) -> Tensor:
            fitting = flash if q.dtype in (torch.float16, torch.bfloat16) else sdpa_attention
            return fitting(q, k, v, dropout_p, documents)

        return f'{name}, sdpa in fp32', attention
    return 'sdpa (PyTorch)', sdpa_attention


class CausalAttention(nn.Module):
    """Multi-head causal self-attention; `Wqkv` holds queries, keys and values, in this order, for every `attn_impl`."""

    def __init__(self, cfg: MosaicGPTConfig):
        super().__init__()
        self.n_heads = cfg.n_heads
        self.head_dim = cfg.d_model // cfg.n_heads
        self.dropout_p = cfg.attn_pdrop
        self.kernel, self.attention = choose_attention(cfg.attn_impl, self.head_dim, cfg.attn_within_document)
        self.Wqkv = nn.Linear(cfg.d_model, 3 * cfg.d_model, device=cfg.device)
        self.out_proj = nn.Linear(cfg.d_model, cfg.d_model, device=cfg.device)

    def forward(self, x: Tensor, documents: Optional[Documents] = None) -> Tensor:
        """(batch, seq, d_model) to the same shape; with `documents` each token sees its own document alone."""
        batch, seq_len, d_model = x.shape
        q, k, v = self.Wqkv(x).view(batch, seq_len, 3, self.n_heads, self.head_dim).unbind(2)  # (batch, seq, heads, head_dim)
        out = self.attention(q, k, v, self.dropout_p if self.training else 0.0, documents)
        return self.out_proj(out.reshape(batch, seq_len, d_model))
