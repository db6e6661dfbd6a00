"""Initial weights of the GPTs: the same on any number of ranks, sharded or not, on the CPU or meta.

| parameter                                  | mosaic_gpt (Radford et al. 2019)        | modern_gpt           |
|--------------------------------------------|-----------------------------------------|----------------------|
| weights of wte, wpe, Wqkv, mlp_up, gate_up | normal, std init_std                    | normal, std init_std |
| weights of out_proj, mlp_down              | normal, std init_std / sqrt(2 n_layers) | 0                    |
| weight of any other Linear or Embedding    | normal, std init_std                    | normal, std init_std |
| bias of every Linear                       | 0                                       | no biases            |
| weight and bias of LayerNorm and RMSNorm   | 1 and 0                                 | 1, no biases         |
| parameters and buffers of any other module | set by the module's `reset_parameters`  | the same             |

Each parameter has its own seed, made from `init_seed` and the parameter's name. A large parameter is drawn in chunks of
whole rows, each with its own seed. So each rank draws only the chunks that its shard touches, in several threads.
"""

import hashlib
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
from src.config.schema import GPTConfig

CHUNK = 2**19  # numbers in a chunk, which has at least one row; the quick start's largest parameter is one chunk
# Names of the inner module in the wrappers of FSDP1, activation checkpointing and torch.compile
WRAPPERS = ('_fsdp_wrapped_module', '_checkpoint_wrapped_module', '_orig_mod')

_loads_weights: ContextVar[bool] = ContextVar('loads_weights', default=False)


@contextmanager
def skip_initialisation(skip: bool) -> Iterator[None]:
    """Models that are built in this `with` block draw no weights if `skip` is true: a checkpoint brings them."""
    token = _loads_weights.set(skip)
    try:
        yield
    finally:
        _loads_weights.reset(token)


class Initialiser:
    """Sets the initial values of a model's modules, by the table above.

    `residual_std` is the standard deviation of `out_proj` and `mlp_down`. Raises UserError if other code has written
    into a Linear or an Embedding on meta, because these values are lost.

    Attributes:
        has_values: Whether modules hold the values that their constructors set. False: they come from meta.
        draws: False where a checkpoint will bring the weights. They are NaN until then.
        user_set: Names of weights and biases of layers that the user's code has set; they keep these values.
    """

    def __init__(self, model: nn.Module, cfg: GPTConfig, residual_std: float):
        self.model, self.cfg, self.residual_std = model, cfg, residual_std
        self.has_values = False
        self.draws = not _loads_weights.get()
        self.user_set = find_user_set_params(model)
        if lost := [name for name in self.user_set if model.get_parameter(name).is_meta]:
            raise UserError(f'model.device: meta loses the values of {lost[0]} that code outside of its layer set; '
                            'write a subclass of the layer with a method reset_parameters(self) that sets them, or set '
                            'model.device=cpu')

    @torch.no_grad()
    def set_values(self, module: nn.Module) -> None:
        """Sets one module's own parameters and buffers, not those of its children.

        Raises UserError if the module comes from meta and one of these tensors has no initialisation.
        """
        path = next((path for path, other in named_modules(self.model) if other is module), '')
        tensors = own_tensors(module)
        # Tied to a parameter of an earlier module, under whose name it is drawn
        tied = {name for name in tensors.keys() & module._parameters.keys()
                if first_owner(self.model, tensors[name]) is not module}
        if not is_linear_or_embedding(module):
            self._reset(module, path, tensors, tied)
            return
        if not self.has_values:
            _refuse_unset(module, path, tensors.keys() - {'weight', 'bias'})
        for name in ('weight', 'bias'):
            if name in tensors and name not in tied:
                self._draw(tensors[name], f'{path}.{name}', getattr(module, 'padding_idx', None))

    def _draw(self, param: Tensor, name: str, zero_row: Optional[int]) -> None:
        """Draws a weight, or sets a bias to 0, unless other code has set it."""
        if not self.draws:
            param.fill_(torch.nan)  # so that a weight which the checkpoint lacks is noticed
        elif name.endswith('.bias') and name not in self.user_set:
            param.zero_()
        elif name not in self.user_set:
            residual = name.endswith(('out_proj.weight', 'mlp_down.weight'))
            std = self.residual_std if residual else self.cfg.init_std
            draw_normal(param, std, f'{self.cfg.init_seed}:{name}', zero_row)

    def _reset(self, module: nn.Module, path: str, tensors: dict[str, Tensor], tied: set[str]) -> None:
        """Calls the module's `reset_parameters` with a random seed made from `init_seed` and the module's path.

        The method runs on a copy whose tensors are unsharded and on the CPU; this rank then keeps its shard. A module
        with values, which the user may have changed, stays as it is if its method draws no random numbers.
        """
        fresh = object.__new__(type(module))  # not copy.copy, which calls the constructor of an FSDPModule
        fresh.__dict__ = {**module.__dict__, '_parameters': {**module._parameters}, '_buffers': {**module._buffers}}
        for name, t in tensors.items():
            unset = torch.nan if t.is_floating_point() else 0
            start = t.detach().clone() if self.has_values else torch.full(t.shape, unset, dtype=t.dtype)
            if name in module._buffers:
                fresh._buffers[name] = start
            else:
                fresh._parameters[name] = nn.Parameter(start, t.requires_grad)
        starts = own_tensors(fresh)
        # The second is the name in nn.MultiheadAttention
        initialise = getattr(fresh, 'reset_parameters', None) or getattr(fresh, '_reset_parameters', None)
        if initialise is None:
            _refuse_unset(module, path, () if self.has_values else tensors)
        if not tensors or initialise is None:
            return
        with torch.random.fork_rng(devices=[]):
            state = torch.default_generator.manual_seed(seed_of(f'{self.cfg.init_seed}:{path}')).get_state()
            initialise()
            if self.has_values and torch.equal(state, torch.default_generator.get_state()):
                return
        module.__dict__.update({name: value for name, value in fresh.__dict__.items()
                                if name not in ('_parameters', '_buffers')})  # other attributes that the method set
        results = own_tensors(fresh)
        if not self.has_values:
            _refuse_unset(module, path, {name for name, t in results.items()
                                         if name in tensors and _is_unset(t, starts[name])})
        for name, t in tensors.items():
            if name in module._buffers:
                module._buffers[name] = results[name].to(t.device)
            elif name not in tied:
                copy_shard(t, results[name])


def _is_unset(result: Tensor, start: Tensor) -> bool:
    """Whether `reset_parameters` left a tensor as it was: floats are NaN, and nothing wrote into integers."""
    return bool(result.isnan().any()) if result.is_floating_point() else result is start and not result._version


def _refuse_unset(module: nn.Module, path: str, unset: Iterable[str]) -> None:
    """Raises UserError if `unset`, the names of tensors without values, is not empty."""
    if unset := sorted(unset):
        kind = type(module).__name__
        raise UserError(f'model.device: with meta, nothing gives values to {", ".join(unset)} of {kind} ({path}); '
                        f'write a method reset_parameters(self) in class {kind} that sets each of its own parameters '
                        'and buffers, or set model.device=cpu')


# ---------------------------------------------------------------- drawing
def seed_of(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], 'little')


@torch.no_grad()
def draw_normal(param: Tensor, std: float, key: str, zero_row: Optional[int] = None) -> None:
    """Fills this rank's shard of a parameter from N(0, std), in chunks of at most `CHUNK` numbers or of one row.

    Chunks and shards are cut along the first dimension. Chunk 0 has the seed of `key`, chunk n that of `key:n`, so the
    numbers do not depend on ranks or threads. `zero_row` is set to zeros, as an Embedding's `padding_idx` is.
    """
    first, local = 0, param.detach()  # first row of the shard, and the shard
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


def copy_shard(param: Tensor, whole: Tensor) -> None:
    """Copies an unsharded tensor, which every rank has, into a parameter that may be sharded."""
    if isinstance(param, DTensor):
        # src_data_rank=None: every rank cuts its own shard, and no rank sends any
        whole = distribute_tensor(whole.to(param.device), param.device_mesh, param.placements, src_data_rank=None)
    param.copy_(whole)


# ---------------------------------------------------------------- modules
def is_linear_or_embedding(module: nn.Module) -> bool:
    """Whether the model draws the module's weight: a Linear or Embedding with PyTorch's own `reset_parameters`."""
    own = getattr(type(module), 'reset_parameters', None)
    return own in (nn.Linear.reset_parameters, nn.Embedding.reset_parameters)


def find_user_set_params(model: nn.Module) -> list[str]:
    """Names of weights and biases of Linear and Embedding layers that other code than their constructors has set.

    PyTorch counts the writes into a tensor; a constructor makes one, or two with `padding_idx`.
    """
    found = []
    for name, param in model.named_parameters():  # a tied parameter comes once, under its first name
        module = model.get_submodule(name.rpartition('.')[0])
        writes = 1 if getattr(module, 'padding_idx', None) is None else 2
        # nn.MultiheadAttention writes 0 into the bias of its own kind of Linear
        own_kind = type(module).__name__ == 'NonDynamicallyQuantizableLinear'
        if is_linear_or_embedding(module) and not own_kind and param._version > writes:
            found.append(name)
    return found


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and buffers by name, without those of its children."""
    return {name: t for name, t in [*module._parameters.items(), *module._buffers.items()] if t is not None}


def unwrap(module: nn.Module) -> nn.Module:
    """Returns the module inside the wrappers of FSDP1, activation checkpointing and torch.compile."""
    while inner := next((module._modules[name] for name in WRAPPERS if name in module._modules), None):
        module = inner
    return module


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Like `model.named_modules()`, but with the names from before FSDP and others wrapped the modules."""
    for name, module in model.named_modules():
        yield '.'.join(part for part in name.split('.') if part not in WRAPPERS), module


def first_owner(model: nn.Module, param: Tensor) -> nn.Module:
    """The first module that has a parameter; later modules may be tied to it."""
    return next(module for module in model.modules() if any(param is other for other in module._parameters.values()))


def materialize_parameters(model: nn.Module, device: Union[str, torch.device]) -> list[nn.Module]:
    """Moves a model to a device. Tensors on meta get memory without values, and tied parameters stay tied.

    Returns the modules that had tensors on meta, so that the caller can set their values.
    """
    empty = [module for module in model.modules() if any(t.is_meta for t in own_tensors(module).values())]
    before = [(module, name, param) for module in model.modules()
              for name, param in module.named_parameters(recurse=False)]
    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    after = {}
    for module, name, param in before:
        setattr(module, name, after.setdefault(param, module.get_parameter(name)))
    return empty
