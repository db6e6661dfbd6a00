"""Causal self-attention: three implementations behind one signature and one weight layout.

Each takes queries, keys and values of shape (batch, seq, heads, head_dim) and returns the same shape. None takes
a mask: `MosaicGPT` moves padding to the right end of each row, where causal attention already hides it.
"""

import logging
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from src.errors import UserError
from src.schema import MosaicGPTConfig

log = logging.getLogger(__name__)

AttentionFn = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # q, k, v, dropout probability


def torch_attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
    """softmax(Q K^T / sqrt(head_dim) + causal mask) V, as written (Vaswani et al. 2017, eq. 1): the reference."""
    seq_len = q.shape[1]
    scores = torch.einsum('bqhd,bkhd->bhqk', q, k) / math.sqrt(q.shape[-1])
    future = torch.ones(seq_len, seq_len, dtype=torch.bool, device=q.device).triu(1)
    weights = scores.float().masked_fill(future, float('-inf')).softmax(-1).to(v.dtype)
    return torch.einsum('bhqk,bkhd->bqhd', F.dropout(weights, dropout_p), v)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
    """PyTorch's fused attention; PyTorch picks the kernel."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (batch, heads, seq, head_dim)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True).transpose(1, 2)


def flash_kernel(head_dim: int) -> tuple[str, AttentionFn]:
    """The FlashAttention kernel of this machine, by name: the `flash-attn` package, else one that PyTorch carries.

    Args:
        head_dim: Width of one head.

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
        from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]
        return 'flash-attn package', lambda q, k, v, p: flash_attn_func(q, k, v, dropout_p=p, causal=True)
    except ImportError:
        # cuDNN's kernels are the faster ones on Hopper and later; they stop at head dimension 128.
        cudnn = capability >= (9, 0) and head_dim <= 128 and torch.backends.cudnn.is_available()
        backend = SDPBackend.CUDNN_ATTENTION if cudnn else SDPBackend.FLASH_ATTENTION

    def attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa_attention(q, k, v, dropout_p)

    return f'PyTorch {"cuDNN" if cudnn else "FlashAttention"}', attention


def choose_attention(impl: str, head_dim: int) -> tuple[str, AttentionFn]:
    """Resolves `attn_impl`, when the model is built.

    Args:
        impl: `torch`, `sdpa`, `flash` (a FlashAttention kernel or an error) or `auto` (`flash` where the GPU allows
            it and the inputs are fp16 or bf16, else `sdpa`).
        head_dim: Width of one head.

    Returns:
        The kernel's name for the log, and the function.
    """
    if impl == 'torch':
        return 'torch (plain maths)', torch_attention
    if impl == 'flash':
        return flash_kernel(head_dim)
    if impl == 'auto' and torch.cuda.is_available():
        try:
            name, flash = flash_kernel(head_dim)
        except UserError as e:
            log.info('%s', e)
            return 'sdpa (PyTorch)', sdpa_attention
        half = (torch.float16, torch.bfloat16)
        return f'{name}, sdpa in fp32', lambda q, k, v, p: (flash if q.dtype in half else sdpa_attention)(q, k, v, p)
    return 'sdpa (PyTorch)', sdpa_attention


class CausalAttention(nn.Module):
    """Multi-head causal self-attention; `Wqkv` holds queries, keys and values, in this order, for every `attn_impl`."""

    def __init__(self, cfg: MosaicGPTConfig):
        super().__init__()
        self.n_heads = cfg.n_heads
        self.head_dim = cfg.d_model // cfg.n_heads
        self.dropout_p = cfg.attn_pdrop
        self.kernel, self.attention = choose_attention(cfg.attn_impl, self.head_dim)
        self.Wqkv = nn.Linear(cfg.d_model, 3 * cfg.d_model, device=cfg.device)
        self.out_proj = nn.Linear(cfg.d_model, cfg.d_model, device=cfg.device)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, seq, d_model) to the same shape."""
        batch, seq_len, d_model = x.shape
        q, k, v = self.Wqkv(x).view(batch, seq_len, 3, self.n_heads, self.head_dim).unbind(2)  # (batch, seq, heads, head_dim)
        out = self.attention(q, k, v, self.dropout_p if self.training else 0.0)
        return self.out_proj(out.reshape(batch, seq_len, d_model))
