"""Makes operators on CPU tensors use the types of a GPU, and save for the backward pass what they save on a GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Autocast computes these operators in fp32 on a GPU, but in the type of their input on a CPU.
FP32_ON_GPUS = ('layer_norm', 'softmax.int', 'log_softmax.int', 'pow.Tensor_Scalar', 'rsqrt', 'exp')


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(x, p, training)[0] if training and p else x


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Optional[Tensor] = None, dropout_p: float = 0.0, *args: Any,
               **kwargs: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask, 0.0, *args, **kwargs)


class GPUDropout(TorchFunctionMode):
    """Makes dropout save a mask of bytes, and fused attention no mask."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        replaced = {F.dropout: _dropout, F.scaled_dot_product_attention: _attention}.get(func, func)
        return replaced(*args, **(kwargs or {}))


@contextmanager
def act_like_gpu() -> Iterator[None]:
    """A context in which operators on CPU tensors act as on a GPU."""
    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def in_fp32(operator: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(autocast):
                return operator(*(x.float() if isinstance(x, Tensor) else x for x in args), **kwargs)
        return run

    with torch.library._scoped_library('aten', 'IMPL') as library, GPUDropout():
        for name in FP32_ON_GPUS:
            packet, _, overload = name.partition('.')
            operator = getattr(getattr(torch.ops.aten, packet), overload or 'default')
            library.impl(name, in_fp32(operator), 'AutocastCPU')
        yield
