"""Causal self-attention: three implementations behind one signature and one weight layout.

Each takes queries, keys and values of shape (batch, seq, heads, head_dim) and returns the same shape. None takes
a mask of padding: `MosaicGPT` moves it to the right end of each row, where causal attention already hides it. Where
rows hold several documents, `Documents` tells each implementation how to stay within them.
"""

import logging
import math
from collections.abc import Callable
from importlib import import_module
from inspect import signature
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from src.common.errors import UserError
from src.config.model_checks import FLASH_NEEDS_GPU
from src.config.schema import MosaicGPTConfig

log = logging.getLogger(__name__)


class Documents:
    """Where the documents of a batch lie, for attention that stays within each.

    What a kernel needs is made when the first layer asks for it, or by `count` before, and kept for the other layers and for
    activation checkpointing, which runs them again. A plain class, which wrappers hand on as it is: FSDP builds tuples and
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
        self._bias: Optional[Tensor] = None
        self._cu_seqlens: Optional[Tensor] = None

    @property
    def mask(self) -> Tensor:
        """(batch, 1, seq, seq): whether a query (third dimension) sees a key (fourth)."""
        if self._mask is None:
            self._mask = self._visible()
        return self._mask

    def _visible(self) -> Tensor:
        causal = self.index <= self.index[:, None]
        return (causal & (self.index >= self.first[:, :, None]))[:, None]

    def bias(self, dtype: torch.dtype) -> Tensor:
        """The mask as PyTorch's fused attention adds it to the scores, 0 or -inf: given the mask, it would make one a layer."""
        if self._bias is None or self._bias.dtype != dtype:
            hidden = ~self._visible()
            self._bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float('-inf'))
        return self._bias

    @property
    def cu_seqlens(self) -> Tensor:
        """(documents + 1,), int32: where each document begins in the batch's rows laid end to end, then their length.

        How many there are is known once the GPU has counted them, so this waits for it.
        """
        if self._cu_seqlens is None:
            begins = (self.positions.flatten() == 0).nonzero()[:, 0]
            self._cu_seqlens = F.pad(begins, (0, 1), value=self.positions.numel()).int()
        return self._cu_seqlens

    @torch.compiler.disable  # what the count is decides a shape, at which a graph would end
    def count(self) -> None:
        """Makes `cu_seqlens` outside of compiled code, for blocks of one graph, which serves any number of documents."""
        torch._dynamo.maybe_mark_dynamic(self.cu_seqlens, 0)


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
    mask = documents.bias(q.dtype) if documents else None
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal=mask is None).transpose(1, 2)


HALF = (torch.float16, torch.bfloat16)

# Packages of FlashAttention, by the value of `flash_kernel`: the module, and the compute capabilities that it is made for.
FLASH_PACKAGES = {'flash-attn-2': ('flash_attn', range(8, 100)), 'flash-attn-3': ('flash_attn_interface', range(9, 10)),
                  'flash-attn-4': ('flash_attn.cute', range(9, 12))}


def flash_kernel(head_dim: int, within_document: bool = False, choice: str = 'auto') -> tuple[str, AttentionFn]:
    """A FlashAttention kernel for this machine, and its name.

    Args:
        head_dim: Width of one head.
        within_document: For rows of several documents, by a variable-length kernel.
        choice: One of FLASH_PACKAGES, `cudnn` or `pytorch`; `auto`: cuDNN's on Hopper and newer, where it is the faster one, if
            it can do it; else the package `flash-attn`, version 2, if it is installed; else the one that PyTorch carries.

    Raises:
        UserError: There is no GPU, or not this kernel for it.
    """
    if not torch.cuda.is_available():
        raise UserError(FLASH_NEEDS_GPU)
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0) or head_dim > 256 or head_dim % 8:
        raise UserError(f"model.attn_impl: 'flash' needs an Ampere or newer GPU and a head dimension (d_model / n_heads) that is "
                        f'a multiple of 8 up to 256; here: compute capability {capability[0]}.{capability[1]}, head dimension '
                        f'{head_dim}; set model.attn_impl=sdpa')
    cudnn = head_dim <= 128 and not within_document and torch.backends.cudnn.is_available()
    if choice == 'auto':
        choice = 'cudnn' if cudnn and capability >= (9, 0) else 'flash-attn-2' if _package_kernel('flash-attn-2') else 'pytorch'
    if choice == 'cudnn' and not cudnn:
        raise UserError("model.flash_kernel: 'cudnn' has no kernel for head dimensions above 128 or for attn_within_document; "
                        'set auto')
    if choice in ('cudnn', 'pytorch'):
        return f'PyTorch {"cuDNN" if choice == "cudnn" else "FlashAttention"}', _pytorch_flash_kernel(choice == 'cudnn')
    module, capabilities = FLASH_PACKAGES[choice]
    kernel = _package_kernel(choice)
    if kernel is None or capability[0] not in capabilities:
        why = f'its module {module} is not installed' if kernel is None else \
            f'it is not made for compute capability {capability[0]}.{capability[1]}'
        raise UserError(f'model.flash_kernel: {choice!r}: {why}; set auto, cudnn or pytorch')
    return choice, kernel


def _package_kernel(choice: str) -> Optional[AttentionFn]:
    """The kernel of a package; None where it is not installed."""
    try:
        module: Any = import_module(FLASH_PACKAGES[choice][0])
        dense, varlen = module.flash_attn_func, module.flash_attn_varlen_func
    except (ImportError, AttributeError):  # version 4 alone leaves a `flash_attn` without functions
        return None
    takes_longest = 'max_seqlen_q' in signature(varlen).parameters  # some versions of 4 do not

    def attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, documents: Optional[Documents] = None) -> Tensor:
        options: dict[str, Any] = {'causal': True} | ({'dropout_p': dropout_p} if choice == 'flash-attn-2' else {})
        if documents is None:
            return _first(dense(q, k, v, **options))
        longest = {'max_seqlen_q': q.shape[1], 'max_seqlen_k': q.shape[1]} if takes_longest else {}
        bounds = {'cu_seqlens_q': documents.cu_seqlens, 'cu_seqlens_k': documents.cu_seqlens}
        return end_to_end(lambda *qkv: _first(varlen(*qkv, **bounds, **longest, **options)), q, k, v)

    return attention


def _first(result: Any) -> Tensor:
    """The output of a kernel that may also return logsumexp."""
    return result[0] if isinstance(result, tuple) else result


def end_to_end(kernel: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Calls a kernel for sequences of any lengths, which takes all rows laid end to end, (batch * seq, heads, head_dim)."""
    return kernel(*(x.flatten(0, 1) for x in (q, k, v))).unflatten(0, (-1, q.shape[1]))


def _pytorch_flash_kernel(cudnn: bool) -> AttentionFn:
    """PyTorch's FlashAttention, or cuDNN's, which has no variable lengths here."""
    backend = SDPBackend.CUDNN_ATTENTION if cudnn else SDPBackend.FLASH_ATTENTION

    def attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, documents: Optional[Documents] = None) -> Tensor:
        if documents is None:
            with sdpa_kernel(backend):
                return sdpa_attention(q, k, v, dropout_p)
        # The operator behind `torch.nn.attention.varlen`, which torch has from 2.10 on, and behind nested tensors. No sequence
        # exceeds `seq`; to know the longest would be to wait for the GPU.
        flash: Any = torch.ops.aten._flash_attention_forward
        bounds, seq_len = documents.cu_seqlens, q.shape[1]
        return end_to_end(lambda *qkv: flash(*qkv, bounds, bounds, seq_len, seq_len, dropout_p, True, False)[0], q, k, v)

    return attention


def choose_attention(impl: str, head_dim: int, within_document: bool = False,
                     kernel: str = 'auto') -> tuple[str, AttentionFn, tuple[torch.dtype, ...]]:
    """Resolves `attn_impl`, when the model is built.

    Args:
        impl: `torch`, `sdpa`, `flash` (a FlashAttention kernel or an error) or `auto` (`flash` where the GPU allows
            it and the inputs are fp16 or bf16, else `sdpa`).
        head_dim: Width of one head.
        within_document: The function will be given `Documents`. Every one takes them; this chooses the kernel for it.
        kernel: `flash_kernel`: which FlashAttention.

    Returns:
        The kernel's name for the log, the function, and of which types it takes documents by `Documents.cu_seqlens`.
    """
    if impl == 'torch':
        return 'torch (plain maths)', torch_attention, ()
    if impl == 'flash':
        return *flash_kernel(head_dim, within_document, kernel), HALF
    if impl == 'auto' and torch.cuda.is_available():
        try:
            name, flash = flash_kernel(head_dim, within_document, kernel)
        except UserError as e:
            log.info('%s', e)
            return 'sdpa (PyTorch)', sdpa_attention, ()

        def attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, documents: Optional[Documents] = None) -> Tensor:
            fitting = flash if q.dtype in HALF else sdpa_attention
            return fitting(q, k, v, dropout_p, documents)

        return f'{name}, sdpa in fp32', attention, HALF
    return 'sdpa (PyTorch)', sdpa_attention, ()


class CausalAttention(nn.Module):
    """Multi-head causal self-attention; `Wqkv` holds queries, keys and values, in this order, for every `attn_impl`."""

    def __init__(self, cfg: MosaicGPTConfig):
        super().__init__()
        self.n_heads = cfg.n_heads
        self.head_dim = cfg.d_model // cfg.n_heads
        self.dropout_p = cfg.attn_pdrop
        self.kernel, self.attention, self.takes_lengths = choose_attention(cfg.attn_impl, self.head_dim,
                                                                           cfg.attn_within_document, cfg.flash_kernel)
        self.Wqkv = nn.Linear(cfg.d_model, 3 * cfg.d_model, device=cfg.device)
        self.out_proj = nn.Linear(cfg.d_model, cfg.d_model, device=cfg.device)

    def forward(self, x: Tensor, documents: Optional[Documents] = None) -> Tensor:
        """(batch, seq, d_model) to the same shape; with `documents` each token sees its own document alone."""
        batch, seq_len, d_model = x.shape
        q, k, v = self.Wqkv(x).view(batch, seq_len, 3, self.n_heads, self.head_dim).unbind(2)  # (batch, seq, heads, head_dim)
        out = self.attention(q, k, v, self.dropout_p if self.training else 0.0, documents)
        return self.out_proj(out.reshape(batch, seq_len, d_model))
