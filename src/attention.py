"""Causal self-attention: the formula, the layer, then the choice of a kernel.

Every implementation takes queries, keys and values of shape (batch, seq, heads, head_dim) and returns the same shape.
There is no padding mask: the model moves padding to the right end of each row, where causal attention hides it.
Where a row holds several documents, `Documents` keeps attention within each of them.
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
    """The reference: softmax(Q K^T / sqrt(head_dim) + causal mask) V, step by step (Vaswani et al. 2017, eq. 1)."""
    seq_len = q.shape[1]
    scores = torch.einsum('bqhd,bkhd->bhqk', q, k) / math.sqrt(q.shape[-1])  # (batch, heads, query, key)
    hidden = ~documents.mask if documents else torch.ones(seq_len, seq_len, dtype=torch.bool, device=q.device).triu(1)
    weights = scores.float().masked_fill(hidden, float('-inf')).softmax(-1).to(v.dtype)
    return torch.einsum('bhqk,bkhd->bqhd', F.dropout(weights, dropout_p), v)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0,
                   documents: Optional['Documents'] = None) -> Tensor:
    """PyTorch's fused attention; PyTorch chooses the kernel."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (batch, heads, seq, head_dim)
    mask = documents.bias(q.dtype) if documents else None  # (batch, 1, seq, seq)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal=mask is None).transpose(1, 2)


class CausalAttention(nn.Module):
    """Multi-head causal self-attention. Its weights have one layout for every `attn_impl`.

    `Wqkv` maps a token to its queries, keys and values, in this order; `out_proj` joins the heads.
    """

    def __init__(self, cfg: MosaicGPTConfig):
        super().__init__()
        self.n_heads = cfg.n_heads
        self.head_dim = cfg.d_model // cfg.n_heads
        self.dropout_p = cfg.attn_pdrop
        self.kernel, self.attention, self.prepare = choose_attention(cfg.attn_impl, self.head_dim,
                                                                     cfg.attn_within_document, cfg.flash_kernel)
        self.Wqkv = nn.Linear(cfg.d_model, 3 * cfg.d_model, device=cfg.device)
        self.fused_rows = {'Wqkv.weight': [cfg.d_model] * 3}  # which Muon treats as separate matrices
        self.out_proj = nn.Linear(cfg.d_model, cfg.d_model, device=cfg.device)

    def forward(self, x: Tensor, documents: Optional['Documents'] = None) -> Tensor:
        """Maps (batch, seq, d_model) to the same shape; with `documents` a token sees only its own document."""
        batch, seq_len, d_model = x.shape
        q, k, v = self.Wqkv(x).view(batch, seq_len, 3, self.n_heads, self.head_dim).unbind(2)  # each (b, s, heads, dim)
        out = self.attention(q, k, v, self.dropout_p if self.training else 0.0, documents)
        return self.out_proj(out.reshape(batch, seq_len, d_model))


class Documents:
    """The document boundaries of a batch, in the formats that attention kernels need.

    Each form is computed once and kept, for all layers and for recomputed activations. The model has them computed
    before the first block, so that all blocks run the same code. This is a plain class, because FSDP copies tuples and
    dataclasses for every block: the copies would compute each form again.

    Args:
        sequence_id: (batch, seq). A new document begins where the value changes along a row.
    """

    def __init__(self, sequence_id: Tensor):
        self.index = torch.arange(sequence_id.shape[1], device=sequence_id.device)
        begins = F.pad(sequence_id.diff(dim=1) != 0, (1, 0), value=True)
        self.first = (self.index * begins).cummax(1).values  # (batch, seq), position where each token's document begins
        self.positions = self.index - self.first  # (batch, seq), from 0 in each document
        # No cached_property: before Python 3.12 it takes a lock, which torch.compile cannot.
        self._mask: Optional[Tensor] = None
        self._bias: Optional[Tensor] = None
        self._cu_seqlens: Optional[Tensor] = None

    @property
    def mask(self) -> Tensor:
        """Whether a query (third dimension) sees a key (fourth), bool of shape (batch, 1, seq, seq)."""
        if self._mask is None:
            causal = self.index <= self.index[:, None]
            self._mask = (causal & (self.index >= self.first[:, :, None]))[:, None]
        return self._mask

    def bias(self, dtype: torch.dtype) -> Tensor:
        """The mask as numbers to add to the scores, 0 or -inf, made once for all layers."""
        if self._bias is None or self._bias.dtype != dtype:
            zeros = torch.zeros(self.mask.shape, dtype=dtype, device=self.mask.device)
            self._bias = zeros.masked_fill_(~self.mask, float('-inf'))
        return self._bias

    @property
    def cu_seqlens(self) -> Tensor:
        """Start of each document in the concatenated rows, then the total length: int32, (documents + 1,).

        The shape depends on the number of documents, so the CPU waits until the GPU has counted them.
        """
        if self._cu_seqlens is None:
            begins = (self.positions.flatten() == 0).nonzero()[:, 0]
            self._cu_seqlens = F.pad(begins, (0, 1), value=self.positions.numel()).int()
        return self._cu_seqlens


@torch.compiler.disable  # a shape that depends on data would break the graph
def prepare_cu_seqlens(documents: Documents, dtype: torch.dtype) -> None:
    """Makes `cu_seqlens` outside of compiled code, so that one graph serves any number of documents."""
    torch._dynamo.maybe_mark_dynamic(documents.cu_seqlens, 0)


# ---------------------------------------------------------------- the choice of a kernel

AttentionFn = Callable[..., Tensor]  # takes the arguments of `torch_attention`
# Computes the form of `Documents` that a kernel reads, for inputs of a dtype
PrepareFn = Callable[[Documents, torch.dtype], Any]

HALF_DTYPES = (torch.float16, torch.bfloat16)
SDPA = 'sdpa (PyTorch)', sdpa_attention, Documents.bias
# Packages of FlashAttention by the value of `flash_kernel`: module, and major compute capabilities of its GPUs
PACKAGES = {'flash-attn-2': ('flash_attn', range(8, 100)), 'flash-attn-3': ('flash_attn_interface', range(9, 10)),
            'flash-attn-4': ('flash_attn.cute', range(9, 12))}


def choose_attention(impl: str, head_dim: int, within_document: bool = False,
                     kernel: str = 'auto') -> tuple[str, AttentionFn, PrepareFn]:
    """Chooses the attention function when the model is built, so that a missing kernel stops the run at its start.

    `impl` is `attn_impl`, `kernel` is `flash_kernel`. `flash` gets a FlashAttention kernel or raises UserError. `auto`
    uses one for fp16 and bf16 inputs if the GPU has it, else `sdpa`. `within_document` says that rows hold several
    documents. Returns the name for the log, the function, and the function that prepares `Documents` for it.
    """
    if impl == 'torch':
        return 'torch (plain maths)', torch_attention, lambda documents, dtype: documents.mask
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
        return name, flash, prepare_cu_seqlens

    def attention(q: Tensor, *args: Any) -> Tensor:
        return flash(q, *args) if q.dtype in HALF_DTYPES else sdpa_attention(q, *args)

    def prepare(documents: Documents, dtype: torch.dtype) -> None:
        (prepare_cu_seqlens if dtype in HALF_DTYPES else Documents.bias)(documents, dtype)

    return f'{name}, sdpa in fp32', attention, prepare


def flash_kernel(head_dim: int, within_document: bool = False, choice: str = 'auto') -> tuple[str, AttentionFn]:
    """Returns the name and the function of a FlashAttention kernel for this GPU.

    `auto` takes the first of: cuDNN's on Hopper and newer GPUs, where it is the fastest, if it can compute this
    attention; the package `flash-attn` 2, if it is installed; PyTorch's own. Raises UserError if there is no GPU, or
    the chosen kernel does not run on it.
    """
    if not torch.cuda.is_available():
        raise UserError(FLASH_NEEDS_GPU)
    major, minor = torch.cuda.get_device_capability()
    if major < 8 or head_dim > 256 or head_dim % 8:
        raise UserError("model.attn_impl: 'flash' needs an Ampere or newer GPU and a head dimension "
                        '(head_dim, or d_model / n_heads) that is a multiple of 8 up to 256; here: compute capability '
                        f'{major}.{minor}, head dimension {head_dim}; set model.attn_impl=sdpa')
    cudnn_fits = head_dim <= 128 and not within_document and torch.backends.cudnn.is_available()
    if choice == 'auto' and cudnn_fits and major >= 9:
        choice = 'cudnn'
    elif choice == 'auto':
        choice = 'flash-attn-2' if _package_kernel('flash-attn-2') else 'pytorch'
    if choice == 'pytorch':
        return 'PyTorch FlashAttention', _pytorch_flash
    if choice == 'cudnn':
        if not cudnn_fits:
            raise UserError("model.flash_kernel: 'cudnn' has no kernel for head dimensions above 128 or for "
                            'attn_within_document; set model.flash_kernel=auto')
        return 'PyTorch cuDNN', partial(_pytorch_flash, backend=SDPBackend.CUDNN_ATTENTION)
    kernel, (module, capabilities) = _package_kernel(choice), PACKAGES[choice]
    if kernel is None or major not in capabilities:
        reason = (f'its module {module} is not installed' if kernel is None else
                  f'it is not made for compute capability {major}.{minor}')
        raise UserError(f'model.flash_kernel: {choice!r}: {reason}; set auto, cudnn or pytorch')
    return choice, kernel


def _pytorch_flash(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, documents: Optional[Documents] = None,
                   backend: Any = SDPBackend.FLASH_ATTENTION) -> Tensor:
    """PyTorch's FlashAttention; for rows of one document, any `backend` of PyTorch's attention."""
    if documents is None:
        with sdpa_kernel(backend):
            return sdpa_attention(q, k, v, dropout_p)
    # The operator behind nested tensors, and behind torch.nn.attention.varlen of torch 2.10. `seq_len` bounds the
    # length of every document; the true maximum would make the CPU wait for the GPU.
    flash: Any = torch.ops.aten._flash_attention_forward
    bounds, seq_len = documents.cu_seqlens, q.shape[1]
    args = bounds, bounds, seq_len, seq_len, dropout_p, True, False
    return call_varlen_kernel(lambda *qkv: flash(*qkv, *args)[0], q, k, v)


def call_varlen_kernel(kernel: AttentionFn, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Calls a variable-length kernel on the concatenated rows, of shape (batch * seq, heads, head_dim)."""
    return kernel(*(x.flatten(0, 1) for x in (q, k, v))).unflatten(0, (-1, q.shape[1]))


def _package_kernel(choice: str) -> Optional[AttentionFn]:
    """The kernel of a package; None if the package is not installed."""
    try:
        module: Any = import_module(PACKAGES[choice][0])
        dense, varlen = _any_version(module.flash_attn_func), _any_version(module.flash_attn_varlen_func)
    except (ImportError, AttributeError):  # where only version 4 is installed, `flash_attn` has no functions
        return None

    def attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0,
                  documents: Optional[Documents] = None) -> Tensor:
        options: dict[str, Any] = {'dropout_p': dropout_p, 'causal': True}
        if documents is None:
            return dense(q, k, v, **options)
        bounds, seq_len = documents.cu_seqlens, q.shape[1]
        options |= {'cu_seqlens_q': bounds, 'cu_seqlens_k': bounds, 'max_seqlen_q': seq_len, 'max_seqlen_k': seq_len}
        return call_varlen_kernel(partial(varlen, **options), q, k, v)

    return attention


def _any_version(function: Callable[..., Any]) -> AttentionFn:
    """Makes versions of FlashAttention alike: drops keywords that one lacks, and the logsumexp that some return."""
    missing = {'dropout_p', 'max_seqlen_q', 'max_seqlen_k'} - signature(function).parameters.keys()

    def call(*qkv: Tensor, **keywords: Any) -> Tensor:
        out = function(*qkv, **{name: value for name, value in keywords.items() if name not in missing})
        return out[0] if isinstance(out, tuple) else out

    return call
