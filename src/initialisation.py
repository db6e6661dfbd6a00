"""Initial weights: the same on any number of ranks, with and without sharding, built on the CPU and on meta.

| parameter                                        | drawn from                         |
|--------------------------------------------------|------------------------------------|
| wte, wpe, Wqkv, mlp_up weights                   | N(0, init_std)                     |
| out_proj, mlp_down weights                       | N(0, init_std / sqrt(2 n_layers))  |
| any other Linear's or Embedding's weight         | N(0, init_std)                     |
| every Linear's bias                              | 0                                  |
| LayerNorm weights and biases                     | 1 and 0                            |
| parameters and buffers of any other module       | its own `reset_parameters`         |

Each parameter has a seed of its own, made from `init_seed` and the parameter's name. A large parameter is drawn in
chunks of whole rows, each with its own seed. So a rank draws only the chunks that it keeps a part of, and threads share
them.
"""

import hashlib
import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Optional, Union

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from src.common.errors import UserError
from src.config.schema import MosaicGPTConfig

CHUNK = 2**19  # numbers, as many as the largest parameter of the quick start has; a chunk has at least one row
# Of FSDP1, activation checkpointing and torch.compile
WRAPPERS = ('_fsdp_wrapped_module', '_checkpoint_wrapped_module', '_orig_mod')

_loads_weights: ContextVar[bool] = ContextVar('loads_weights', default=False)


@contextmanager
def skip_initialisation(later: bool) -> Iterator[None]:
    """Models that are built in this block draw nothing if `later` is true: a checkpoint overwrites their weights."""
    token = _loads_weights.set(later)
    try:
        yield
    finally:
        _loads_weights.reset(token)


class Initialiser:
    """Gives the modules of a model their initial values, by the table above.

    Raises UserError where a matrix on meta loses what the code around its layer has written into it.
    """

    def __init__(self, model: nn.Module, cfg: MosaicGPTConfig):
        self.model, self.cfg = model, cfg
        self.has_values = False  # whether modules hold what their constructors set; False: they have come from meta
        self.draws = not _loads_weights.get()
        self.by_hand = set_by_hand(model)
        if lost := [name for name in self.by_hand if model.get_parameter(name).is_meta]:
            raise UserError(f'model.device: on meta {lost[0]} loses the values that the code around its layer has set; '
                            'write a subclass of the layer with a method reset_parameters(self) that sets them, or set '
                            'model.device=cpu')

    @torch.no_grad()
    def set_values(self, module: nn.Module) -> None:
        """Sets the module's own parameters and buffers, not those of its children.

        Raises UserError where the module has come from meta, and nothing sets some of its parameters or buffers.
        """
        path = next((path for path, other in named_modules(self.model) if other is module), '')
        tensors = own_tensors(module)
        # A tied parameter is drawn under the first of its names
        tied = {name for name in tensors.keys() & module._parameters.keys()
                if first_owner(self.model, tensors[name]) is not module}
        if not is_matrix(module):
            self._reset(module, path, tensors, tied)
            return
        if not self.has_values:
            _check_none_is_unset(module, path, tensors.keys() - {'weight', 'bias'})
        for name in ('weight', 'bias'):
            if name in tensors and name not in tied:
                self._draw(tensors[name], f'{path}.{name}', getattr(module, 'padding_idx', None))

    def _draw(self, param: Tensor, name: str, zero_row: Optional[int]) -> None:
        """Draws the weight of a matrix, or sets its bias to 0, but where code around the layer has set them."""
        if not self.draws:
            param.fill_(torch.nan)  # a weight that the checkpoint lacks cannot pass for an initial one
        elif name.endswith('.bias') and name not in self.by_hand:
            param.zero_()
        elif name not in self.by_hand:
            residual = name.endswith(('out_proj.weight', 'mlp_down.weight'))
            std = self.cfg.init_std / (math.sqrt(2 * self.cfg.n_layers) if residual else 1.0)
            draw_normal(param, std, f'{self.cfg.init_seed}:{name}', zero_row)

    def _reset(self, module: nn.Module, path: str, tensors: dict[str, Tensor], tied: set[str]) -> None:
        """Calls the module's own initialisation, with random numbers that depend on the seed and the path alone.

        It runs on a copy with whole tensors on the CPU, of which this rank keeps its part. A module that has values,
        which its user may have changed, and whose initialisation draws no random numbers, stays as it is.
        """
        fresh = object.__new__(type(module))  # not copy.copy, which calls the constructor of an FSDPModule
        fresh.__dict__ = {**module.__dict__, '_parameters': {**module._parameters}, '_buffers': {**module._buffers}}
        for name, t in tensors.items():
            nothing = torch.nan if t.is_floating_point() else 0
            blank = t.detach().clone() if self.has_values else torch.full(t.shape, nothing, dtype=t.dtype)
            if name in module._buffers:
                fresh._buffers[name] = blank
            else:
                fresh._parameters[name] = nn.Parameter(blank, t.requires_grad)
        # nn.MultiheadAttention calls it `_reset_parameters`
        blanks = own_tensors(fresh)
        initialise = getattr(fresh, 'reset_parameters', None) or getattr(fresh, '_reset_parameters', None)
        if initialise is None:
            _check_none_is_unset(module, path, () if self.has_values else tensors)
        if not tensors or initialise is None:
            return
        with torch.random.fork_rng(devices=[]):
            state = torch.default_generator.manual_seed(seed_of(f'{self.cfg.init_seed}:{path}')).get_state()
            initialise()
            if self.has_values and torch.equal(state, torch.default_generator.get_state()):
                return
        module.__dict__.update({name: value for name, value in fresh.__dict__.items()
                                if name not in ('_parameters', '_buffers')})  # what it may keep besides tensors
        made = own_tensors(fresh)
        if not self.has_values:
            _check_none_is_unset(module, path, {name for name, t in made.items()
                                                if name in tensors and _is_unset(t, blanks[name])})
        for name, t in tensors.items():
            if name in module._buffers:
                module._buffers[name] = made[name].to(t.device)
            elif name not in tied:
                copy_whole(t, made[name])


def _is_unset(made: Tensor, blank: Tensor) -> bool:
    """Whether a tensor is as `_reset` gave it to an initialisation: NaN, or whole numbers that nobody wrote."""
    return bool(made.isnan().any()) if made.is_floating_point() else made is blank and not made._version


def _check_none_is_unset(module: nn.Module, path: str, names: Iterable[str]) -> None:
    if names := sorted(names):
        kind = type(module).__name__
        raise UserError(f'model.device: on meta nothing gives values to {", ".join(names)} of {kind} ({path}); write a '
                        f'method reset_parameters(self) in class {kind} that sets each of its own parameters and '
                        'buffers, or set model.device=cpu')


# ---------------------------------------------------------------- drawing
def seed_of(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], 'little')


@torch.no_grad()
def draw_normal(param: Tensor, std: float, key: str, zero_row: Optional[int] = None) -> None:
    """Draws what this rank keeps of a parameter from N(0, std), in chunks of at most `CHUNK` numbers or of one row.

    The parameter has at least one dimension; the chunks, and the parts of ranks, are cut along the first. Chunk 0 has
    the seed of `key`, chunk n the seed of `key:n`. The numbers do not depend on the threads. `zero_row` is a row of
    zeros, such as an Embedding's `padding_idx`.
    """
    first, local = 0, param.detach()
    if isinstance(param, DTensor):
        _, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
        first, local = offset[0], param.to_local().detach()
    last, rows = first + len(local), max(1, CHUNK // param.shape[1:].numel())

    def draw(number: int) -> None:
        start, stop = number * rows, min((number + 1) * rows, len(param))
        generator = torch.Generator().manual_seed(seed_of(f'{key}:{number}' if number else key))
        chunk = torch.empty(stop - start, *param.shape[1:]).normal_(0.0, std, generator=generator)
        local[max(start - first, 0):stop - first].copy_(chunk[max(first - start, 0):last - start])

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


def set_by_hand(model: nn.Module) -> list[str]:
    """The weights and biases of new Linear and Embedding layers that code outside of their constructors has set."""
    found = []
    for name, param in model.named_parameters():  # a tied one under the first of its names alone
        module = model.get_submodule(name.rpartition('.')[0])
        writes = 1 if getattr(module, 'padding_idx', None) is None else 2  # of the constructor
        # nn.MultiheadAttention sets the bias of its own kind of Linear to 0, too
        own_kind = type(module).__name__ == 'NonDynamicallyQuantizableLinear'
        if is_matrix(module) and not own_kind and param._version > writes:
            found.append(name)
    return found


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a module by name, without those of its children."""
    return {name: t for name, t in [*module._parameters.items(), *module._buffers.items()] if t is not None}


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


def materialize_parameters(model: nn.Module, device: Union[str, torch.device]) -> list[nn.Module]:
    """Gives memory to the tensors on meta, and moves the others to the device. Tied parameters stay tied.

    Returns the modules that had tensors on meta, which have no values yet.
    """
    empty = [module for module in model.modules() if any(t.is_meta for t in own_tensors(module).values())]
    before = [(module, name, param) for module in model.modules()
              for name, param in module.named_parameters(recurse=False)]
    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    after = {}
    for module, name, param in before:
        setattr(module, name, after.setdefault(param, module.get_parameter(name)))
    return empty
