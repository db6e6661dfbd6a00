"""Causal self-attention: the maths, then the choice of a kernel that computes it.

Every implementation takes queries, keys and values of shape (batch, seq, heads, head_dim) and returns the same shape.
None takes a mask of padding: `MosaicGPT` moves padding to the right end of each row, where causal attention already
hides it. Where rows hold several documents, `Documents` tells each implementation how to stay within them.
"""

import logging
import math
from collections.abc import Callable
from functools import partial
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


def torch_attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0,
                    documents: Optional['Documents'] = None) -> Tensor:
    """softmax(Q K^T / sqrt(head_dim) + causal mask) V, as written (Vaswani et al. 2017, eq. 1): the reference."""
    seq_len = q.shape[1]
    scores = torch.einsum('bqhd,bkhd->bhqk', q, k) / math.sqrt(q.shape[-1])
    hidden = ~documents.mask if documents else torch.ones(seq_len, seq_len, dtype=torch.bool, device=q.device).triu(1)
    weights = scores.float().masked_fill(hidden, float('-inf')).softmax(-1).to(v.dtype)
    return torch.einsum('bhqk,bkhd->bqhd', F.dropout(weights, dropout_p), v)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0,
                   documents: Optional['Documents'] = None) -> Tensor:
    """PyTorch's fused attention; PyTorch picks the kernel."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (batch, heads, seq, head_dim)
    mask = documents.bias(q.dtype) if documents else None
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal=mask is None).transpose(1, 2)


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

    def forward(self, x: Tensor, documents: Optional['Documents'] = None) -> Tensor:
        """(batch, seq, d_model) to the same shape; with `documents` each token sees its own document alone."""
        batch, seq_len, d_model = x.shape
        q, k, v = self.Wqkv(x).view(batch, seq_len, 3, self.n_heads, self.head_dim).unbind(2)
        out = self.attention(q, k, v, self.dropout_p if self.training else 0.0, documents)
        return self.out_proj(out.reshape(batch, seq_len, d_model))


class Documents:
    """Where the documents of a batch lie, for attention that stays within each.

    What a kernel needs is made when the first layer asks for it, or by `count` before, and kept for the other layers
    and for activation checkpointing, which runs them again. It is a plain class because FSDP builds tuples and
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
            causal = self.index <= self.index[:, None]
            self._mask = (causal & (self.index >= self.first[:, :, None]))[:, None]
        return self._mask

    def bias(self, dtype: torch.dtype) -> Tensor:
        """The mask as numbers to add to the scores, 0 or -inf. From the mask, PyTorch would make them in each layer."""
        if self._bias is None or self._bias.dtype != dtype:
            zeros = torch.zeros(self.mask.shape, dtype=dtype, device=self.mask.device)
            self._bias = zeros.masked_fill_(~self.mask, float('-inf'))
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
        """Makes `cu_seqlens` outside of compiled code. Blocks then share one graph for any number of documents."""
        torch._dynamo.maybe_mark_dynamic(self.cu_seqlens, 0)


# ---------------------------------------------------------------- the choice of a kernel

AttentionFn = Callable[..., Tensor]  # with the arguments of `torch_attention`

HALF = (torch.float16, torch.bfloat16)
SDPA = 'sdpa (PyTorch)', sdpa_attention, ()
# Packages of FlashAttention, by the value of `flash_kernel`: the module, and the compute capabilities it is made for
PACKAGES = {'flash-attn-2': ('flash_attn', range(8, 100)), 'flash-attn-3': ('flash_attn_interface', range(9, 10)),
            'flash-attn-4': ('flash_attn.cute', range(9, 12))}


def choose_attention(impl: str, head_dim: int, within_document: bool = False,
                     kernel: str = 'auto') -> tuple[str, AttentionFn, tuple[torch.dtype, ...]]:
    """Resolves `attn_impl` and `flash_kernel`, when the model is built.

    `flash` is a FlashAttention kernel or an error; `auto` is `flash` where the GPU allows it and the inputs are fp16 or
    bf16, else `sdpa`. Every function takes `Documents`; `within_document` chooses the kernel for them. Returns the
    kernel's name for the log, the function, and of which types it takes documents by `Documents.cu_seqlens`.
    """
    if impl == 'torch':
        return 'torch (plain maths)', torch_attention, ()
    if impl == 'sdpa' or impl == 'auto' and not torch.cuda.is_available():
        return SDPA
    try:
        name, flash = flash_kernel(head_dim, within_document, kernel)
    except UserError as e:
        if impl == 'flash':
            raise
        log.info('%s', e)
        return SDPA
    if impl == 'flash':
        return name, flash, HALF

    def attention(q: Tensor, *args: Any) -> Tensor:
        return flash(q, *args) if q.dtype in HALF else sdpa_attention(q, *args)

    return f'{name}, sdpa in fp32', attention, HALF


def flash_kernel(head_dim: int, within_document: bool = False, choice: str = 'auto') -> tuple[str, AttentionFn]:
    """A FlashAttention kernel for this machine, and its name.

    `auto` takes cuDNN's on Hopper and newer, where it is the faster one, if it can do it; else the package
    `flash-attn`, version 2, if it is installed; else the one in PyTorch. Raises UserError where there is no GPU, or not
    this kernel for it.
    """
    if not torch.cuda.is_available():
        raise UserError(FLASH_NEEDS_GPU)
    major, minor = torch.cuda.get_device_capability()
    if major < 8 or head_dim > 256 or head_dim % 8:
        raise UserError("model.attn_impl: 'flash' needs an Ampere or newer GPU and a head dimension "
                        '(d_model / n_heads) that is a multiple of 8 up to 256; here: compute capability '
                        f'{major}.{minor}, head dimension {head_dim}; set model.attn_impl=sdpa')
    cudnn = head_dim <= 128 and not within_document and torch.backends.cudnn.is_available()
    if choice == 'auto' and cudnn and major >= 9:
        choice = 'cudnn'
    elif choice == 'auto':
        choice = 'flash-attn-2' if _package_kernel('flash-attn-2') else 'pytorch'
    if choice == 'pytorch':
        return 'PyTorch FlashAttention', _pytorch_flash
    if choice == 'cudnn':
        if not cudnn:
            raise UserError("model.flash_kernel: 'cudnn' has no kernel for head dimensions above 128 or for "
                            'attn_within_document; set auto')
        return 'PyTorch cuDNN', partial(_pytorch_flash, backend=SDPBackend.CUDNN_ATTENTION)
    kernel, (module, capabilities) = _package_kernel(choice), PACKAGES[choice]
    if kernel is None or major not in capabilities:
        why = (f'its module {module} is not installed' if kernel is None else
               f'it is not made for compute capability {major}.{minor}')
        raise UserError(f'model.flash_kernel: {choice!r}: {why}; set auto, cudnn or pytorch')
    return choice, kernel


def _pytorch_flash(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, documents: Optional[Documents] = None,
                   backend: Any = SDPBackend.FLASH_ATTENTION) -> Tensor:
    """PyTorch's FlashAttention, or for rows of one document another backend's."""
    if documents is None:
        with sdpa_kernel(backend):
            return sdpa_attention(q, k, v, dropout_p)
    # The operator behind `torch.nn.attention.varlen`, which torch has from 2.10 on, and behind nested tensors. No
    # sequence exceeds `seq`; to know the longest would be to wait for the GPU.
    flash: Any = torch.ops.aten._flash_attention_forward
    bounds, seq_len = documents.cu_seqlens, q.shape[1]
    return end_to_end(lambda *qkv: flash(*qkv, bounds, bounds, seq_len, seq_len, dropout_p, True, False)[0], q, k, v)


def end_to_end(kernel: AttentionFn, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Calls a kernel for sequences of any lengths on all rows laid end to end, (batch * seq, heads, head_dim)."""
    return kernel(*(x.flatten(0, 1) for x in (q, k, v))).unflatten(0, (-1, q.shape[1]))


def _package_kernel(choice: str) -> Optional[AttentionFn]:
    """The kernel of a package; None where it is not installed."""
    try:
        module: Any = import_module(PACKAGES[choice][0])
        dense, varlen = _of_any_version(module.flash_attn_func), _of_any_version(module.flash_attn_varlen_func)
    except (ImportError, AttributeError):  # version 4 alone leaves a `flash_attn` without functions
        return None

    def attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0,
                  documents: Optional[Documents] = None) -> Tensor:
        options: dict[str, Any] = {'dropout_p': dropout_p, 'causal': True}
        if documents is None:
            return dense(q, k, v, **options)
        bounds, seq_len = documents.cu_seqlens, q.shape[1]
        options |= {'cu_seqlens_q': bounds, 'cu_seqlens_k': bounds, 'max_seqlen_q': seq_len, 'max_seqlen_k': seq_len}
        return end_to_end(partial(varlen, **options), q, k, v)

    return attention


def _of_any_version(function: Callable[..., Any]) -> AttentionFn:
    """Leaves out the keywords that a version may lack, and the logsumexp that some versions return as well."""
    lacks = {'dropout_p', 'max_seqlen_q', 'max_seqlen_k'} - signature(function).parameters.keys()

    def call(*qkv: Tensor, **keywords: Any) -> Tensor:
        out = function(*qkv, **{name: value for name, value in keywords.items() if name not in lacks})
        return out[0] if isinstance(out, tuple) else out

    return call
