"""Initial weights: the same on any number of ranks, with and without sharding, built on the CPU and on meta.

Each parameter has a seed of its own, made from a key: `init_seed` and the parameter's name. A large parameter is drawn
in chunks of whole rows, each with its own seed. So a rank draws only the chunks that it keeps a part of, and threads
share them.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from src.common.errors import UserError

CHUNK = 2**19  # numbers, as many as the largest parameter of the quick start has; a chunk has at least one row
# Of FSDP1, activation checkpointing and torch.compile
WRAPPERS = ('_fsdp_wrapped_module', '_checkpoint_wrapped_module', '_orig_mod')

_loads_weights: ContextVar[bool] = ContextVar('loads_weights', default=False)


@contextmanager
def weights_come_later(later: bool) -> Iterator[None]:
    """Models that are built in this block draw nothing if `later` is true: a checkpoint overwrites their weights."""
    token = _loads_weights.set(later)
    try:
        yield
    finally:
        _loads_weights.reset(token)


def draws_weights() -> bool:
    return not _loads_weights.get()


# ---------------------------------------------------------------- drawing


def seed_of(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], 'little')


@torch.no_grad()
def draw_normal(param: Tensor, std: float, key: str, zero_row: Optional[int] = None) -> None:
    """Draws what this rank keeps of a parameter from N(0, std), in chunks of at most `CHUNK` numbers or of one row.

    Args:
        param: Of at least one dimension; the chunks are cut along the first.
        std: The standard deviation.
        key: Chunk 0 has the seed of `key`, chunk n the seed of `key:n`. The numbers do not depend on the threads.
        zero_row: A row of zeros, such as an Embedding's `padding_idx`.
    """
    shape, first = param.shape, 0
    local = param.detach()
    if isinstance(param, DTensor):
        shape, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
        if shape[1:] != param.shape[1:]:  # not cut by rows alone
            whole = torch.empty(param.shape)
            draw_normal(whole, std, key, zero_row)
            copy_whole(param, whole)
            return
        first, local = offset[0], param.to_local().detach()
    assert local.shape == shape, f'{tuple(local.shape)} is kept, and {tuple(shape)} expected'
    last, rows = first + len(local), max(1, CHUNK // param.shape[1:].numel())

    def draw(number: int) -> None:
        start, stop = number * rows, min((number + 1) * rows, len(param))
        kept = local[max(start - first, 0):stop - first]
        in_place = len(kept) == stop - start and kept.device.type == 'cpu' and kept.dtype == torch.float32
        chunk = kept if in_place and kept.is_contiguous() else torch.empty(stop - start, *param.shape[1:])
        chunk.normal_(0.0, std, generator=torch.Generator().manual_seed(seed_of(f'{key}:{number}' if number else key)))
        if chunk is not kept:
            kept.copy_(chunk[max(first - start, 0):last - start])

    chunks = range(first // rows, -(-last // rows)) if len(local) else []
    threads = len(os.sched_getaffinity(0)) // int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    with ThreadPoolExecutor(max(1, threads)) as pool:
        list(pool.map(draw, chunks))
    if zero_row is not None and first <= zero_row < last:
        local[zero_row - first].zero_()


def copy_whole(param: Tensor, whole: Tensor) -> None:
    """Copies a tensor that every rank holds whole into a parameter, of which this rank may keep a part."""
    if isinstance(param, DTensor):
        # src_data_rank=None: every rank cuts its own part, nothing is sent.
        whole = distribute_tensor(whole.to(param.device), param.device_mesh, param.placements, src_data_rank=None)
    param.copy_(whole)


# ---------------------------------------------------------------- modules


def is_matrix(module: nn.Module) -> bool:
    """Whether a module is a Linear or an Embedding with PyTorch's `reset_parameters`: the model draws those."""
    own = getattr(type(module), 'reset_parameters', None)
    return own in (nn.Linear.reset_parameters, nn.Embedding.reset_parameters)


def set_by_hand(model: nn.Module) -> dict[str, Tensor]:
    """The weights and biases of new Linear and Embedding layers that code outside of their constructors has set."""
    return {f'{path}.{name}': p for path, module in model.named_modules() if is_matrix(module)
            if type(module).__name__ != 'NonDynamicallyQuantizableLinear'  # MultiheadAttention sets its bias to 0, too
            for name, p in module._parameters.items()
            if p is not None and p._version > 1 + (getattr(module, 'padding_idx', None) is not None)
            and first_owner(model, p) is module}


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a module by name, without those of its children."""
    return {name: t for name, t in [*module._parameters.items(), *module._buffers.items()] if t is not None}


def _own_initialisation(module: nn.Module) -> Any:
    """The method `reset_parameters`; `nn.MultiheadAttention` calls it `_reset_parameters`."""
    return getattr(module, 'reset_parameters', None) or getattr(module, '_reset_parameters', None)


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside of what FSDP, activation checkpointing and compile put around it."""
    while inner := next((module._modules[name] for name in WRAPPERS if name in module._modules), None):
        module = inner
    return module


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As `model.named_modules()`, with the names that modules had before they were wrapped."""
    for name, module in model.named_modules():
        yield '.'.join(part for part in name.split('.') if part not in WRAPPERS), module


def first_owner(model: nn.Module, param: Tensor) -> nn.Module:
    """The first module that holds a parameter, which others may be tied to."""
    return next(module for module in model.modules() if any(param is other for other in module._parameters.values()))


def check_initialisation(module: nn.Module, path: str) -> None:
    """Checks that something can give values to each parameter and buffer of a module.

    Raises:
        UserError: The module has no `reset_parameters`, or PyTorch's, which sets weight and bias alone.
    """
    names = set(own_tensors(module))
    unset = names - {'weight', 'bias'} if is_matrix(module) else names if _own_initialisation(module) is None else None
    if unset:
        raise _unset(module, path, unset)


def _unset(module: nn.Module, path: str, names: set[str]) -> UserError:
    kind = type(module).__name__
    return UserError(f'model.device: on meta nothing gives values to {", ".join(sorted(names))} of {kind} ({path}); '
                     f'write a method reset_parameters(self) in class {kind} that sets each of its own parameters and '
                     'buffers, or set model.device=cpu')


@torch.no_grad()
def reset(module: nn.Module, path: str, seed: int, has_values: bool, tied: Collection[str] = ()) -> None:
    """Calls the module's own initialisation, with random numbers that depend on the seed and the path alone.

    The initialisation sets whole tensors on the CPU, and this rank keeps its part of them.

    Args:
        module: One without `reset_parameters` stays as it is.
        path: Its name in the model.
        seed: `init_seed`.
        has_values: The module's constructor has set its values, and the user may have changed them: if the
            initialisation draws no random numbers, the module stays as it is.
        tied: Parameters that have their values from another module.

    Raises:
        UserError: The initialisation leaves a tensor without a value.
    """
    init, held = _own_initialisation(module), own_tensors(module)
    if init is None or not held:
        return
    blank = {name: t.detach().clone() if has_values else torch.empty(t.shape, dtype=t.dtype)
             for name, t in held.items()}
    for name, t in blank.items():
        if name in module._buffers:
            module._buffers[name] = t
        else:
            t = t if has_values else t.fill_(torch.nan)
            module._parameters[name] = nn.Parameter(t, held[name].requires_grad)
    with torch.random.fork_rng(devices=[]):
        state = torch.default_generator.manual_seed(seed_of(f'{seed}:{path}')).get_state()
        init()
        keeps = has_values and torch.equal(state, torch.default_generator.get_state())
    made = own_tensors(module)
    unset = {name for name, t in made.items() if name in held and not has_values
             and (t is blank[name] and not t._version if name in module._buffers else t.isnan().any())}
    if unset:
        raise _unset(module, path, unset)
    for name, t in held.items():
        if name in module._buffers:
            module._buffers[name] = t if keeps else made[name].to(t.device)
            continue
        module._parameters[name] = t  # pyright: ignore[reportArgumentType]
        if not keeps and name not in tied:
            copy_whole(t, made[name])


def leave_meta(model: nn.Module, device: Union[str, torch.device]) -> list[nn.Module]:
    """Gives memory to the tensors on meta, and moves the others to the device. Tied parameters stay tied.

    Returns:
        The modules that had tensors on meta, which have no values yet.
    """
    owners: dict[Tensor, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False):
            owners[param].append((module, name))
    empty = [module for module in model.modules() if any(t.is_meta for t in own_tensors(module).values())]
    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    for (first, first_name), *others in owners.values():
        for module, name in others:
            setattr(module, name, getattr(first, first_name))
    return empty
