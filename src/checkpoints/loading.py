"""What a checkpoint must be to be loaded into this run, and what Composer leaves to do."""

import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Optional

from composer import Trainer
from composer.utils import checkpoint, dist, get_file, is_tar
from composer.utils.reproducibility import load_rng_state
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from src.checkpoints.manifest import Manifest
from src.checkpoints.safe_reading import no_code, read_weights, readable, weights_in
from src.checkpoints.start import Start
from src.common.errors import UserError
from src.config.check import parse
from src.config.schema import MODEL_CONFIGS

log = logging.getLogger('src')

WEIGHTS = 'state.model.'  # the prefix of the weights' names in a sharded checkpoint


@contextmanager
def reading(start: Start, trusted: Optional[bool] = None) -> Iterator[None]:
    """Has Composer's Trainer read its `load_path` without running code. A fault of the file ends in one message.

    Only the functions that read are wrapped. An error of a model, an optimizer or a callback keeps its traceback.

    Args:
        start: Names the checkpoint.
        trusted: Lets the checkpoint hold any object, and so run code. `.metadata` never may: torch alone writes it.
            None: never, and the message does not offer it.
    """
    setting, path = start.setting, str(start.path)
    reads: list[tuple[Any, str]] = [
        (checkpoint, 'download_checkpoint'), (checkpoint, '_torch_load_with_validation'), (checkpoint, 'dist_cp_load'),
        (checkpoint, 'DistCPObjectStoreReader'), (checkpoint.FileSystemReaderWithValidation, 'read_metadata')]
    originals = [getattr(owner, name) for owner, name in reads]
    load_file = checkpoint._torch_load_with_validation

    def wrapped(read: Callable, may_trust: bool) -> Callable:
        def safely(*args: Any, **kwargs: Any) -> Any:
            trust = ', or set trust_checkpoint=true if you trust who wrote this one' if may_trust and trusted is not None else ''
            fault = readable(setting, path, 'into this model and optimizer', trust)
            with fault, nullcontext() if trusted and may_trust else no_code():
                found = read(*args, **kwargs)
            if read is load_file:
                weights_in(found, setting, path)
            return found
        return safely

    for (owner, name), read in zip(reads, originals):
        setattr(owner, name, wrapped(read, name != 'read_metadata'))
    try:
        yield
    finally:
        for (owner, name), read in zip(reads, originals):
            setattr(owner, name, read)


def same_weights(start: Start, own: Mapping[str, Any]) -> Callable[[dict[str, Any]], None]:
    """A check of what a checkpoint holds, for Trainer's `load_ignore_keys`, which runs before the model is touched.

    Composer and torch leave a parameter that the checkpoint lacks as it was initialised, and say nothing.

    Args:
        start: Names the checkpoint.
        own: The model's state dict.
    """
    def shapes_of(weights: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        # The extra state of a module has no shape
        return {name: tuple(getattr(tensor, 'shape', ())) for name, tensor in weights.items()}

    shapes = shapes_of(own)

    def check(checkpoint: dict[str, Any]) -> None:
        there = checkpoint['state'].get('model')
        if there is None:  # a rank that rank 0 will send it to
            return
        found = _shapes_in_shards(start.path) if start.sharded and start.path else shapes_of(there)
        missing, unknown = set(shapes) - set(found), set(found) - set(shapes)
        other = sorted(name for name in set(shapes) & set(found) if shapes[name] != found[name])
        differ = [f'{name} has the shape {found[name]} there and {shapes[name]} here' for name in other[:1]]
        if missing or unknown:
            differ = [f'{len(missing)} are missing, {len(unknown)} are not known, such as {min(missing | unknown)}']
        if differ:
            raise UserError(f'{start.setting}: {start.path} holds other weights than this model has: {differ[0]}. Set '
                            'section model as the run had it that saved them')
    return check


def _shapes_in_shards(path: str) -> dict[str, tuple[int, ...]]:
    """Of the weights in a sharded checkpoint, by name."""
    with tempfile.TemporaryDirectory() as temp:
        if '://' in path:
            get_file(f'{path}/.metadata', os.path.join(temp, '.metadata'))
            path = temp
        with no_code():
            there = FileSystemReader(path).read_metadata().state_dict_metadata
    return {key.removeprefix(WEIGHTS): tuple(getattr(part, 'size', ()))
            for key, part in there.items() if key.startswith(WEIGHTS)}


def _load_weights(start: Start, path: str, model: nn.Module) -> None:
    """Into a model that may be sharded; every rank has to call it."""
    with tempfile.TemporaryDirectory() as temp:
        local = path
        if '://' in path:
            local = os.path.join(dist.all_gather_object(temp)[dist.get_global_rank() - dist.get_local_rank()], 'weights')
            if dist.get_local_rank() == 0:
                get_file(path, local)
        with dist.local_rank_zero_download_and_wait(local):  # a download may take longer than a barrier waits
            dist.barrier()
        weights = read_weights(local, start.setting, path)
        same_weights(start, get_model_state_dict(model))({'state': {'model': weights}})
        set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, strict=True))
        dist.barrier()


def check_loadable(start: Start, sharded: bool, trusted: bool = False) -> None:
    """Before the Trainer is built.

    Args:
        start: From `find_start`.
        sharded: Whether this run's checkpoints are sharded; Composer loads the kind that it saves.
        trusted: Whether the checkpoint may hold any object.

    Raises:
        UserError: The checkpoint is of the other kind.
    """
    if start.path is None or start.weights_of_a_file:
        return
    if start.sharded and not sharded:
        raise UserError(f'{start.setting}: {start.path} is a sharded checkpoint; set fsdp_config.state_dict_type=sharded, with '
                        'sharding_strategy FULL_SHARD or SHARD_GRAD_OP, also on one device')
    if sharded and not start.sharded:
        raise UserError(f'{start.setting}: {start.path} is a full checkpoint, and fsdp_config.state_dict_type is sharded; set '
                        'full to go on from it, or take its weights alone: load_path=FILE load_weights_only=true')
    if is_tar(start.path):  # which Composer would unpack, wherever its members point to
        raise UserError(f'{start.setting}: {start.path} is an archive; unpack it, and give the file of the checkpoint')
    if trusted:
        log.warning('trust_checkpoint: any object is loaded from %s. That runs code that it holds', start.path)


# Keys of the model that the shapes of the weights do not tell
UNTOLD = {'mosaic_gpt': ('n_heads', 'mlp_act'),
          'hf_causal_lm': ('n_head', 'num_heads', 'num_attention_heads', 'activation_function', 'hidden_act')}


def check_model(manifest: Optional[Manifest], model: Mapping[str, Any], setting: str) -> None:
    """Refuses a model that computes something else with weights of the same shapes.

    Args:
        manifest: Of the weights.
        model: Section `model` of the config.
        setting: Names the weights, for messages.

    Raises:
        UserError: It has other heads, say, than the model that was saved.
    """
    there, name = manifest.model if manifest else {}, model.get('name', 'mosaic_gpt')
    if name not in UNTOLD or there.get('name') != name:
        return
    prefix, here = 'model.', parse(MODEL_CONFIGS[name], model).model_dump()
    if name == 'hf_causal_lm':
        from transformers import CONFIG_MAPPING  # here: it takes seconds

        prefix, here, there = 'model.config_overrides.', here['config_overrides'], there['config_overrides']
        if there.get('model_type') in CONFIG_MAPPING:  # a manifest leaves out what is the class's own value
            there = CONFIG_MAPPING[there['model_type']]().to_dict() | there
    for key in UNTOLD[name]:
        if here.get(key) is not None and there.get(key, here[key]) != here[key]:
            raise UserError(f'{setting}: the model that was saved has {prefix}{key} {there[key]!r}, and here it is '
                            f'{here[key]!r}. The weights would fit and compute something else; set section model as '
                            'the run had it')


def check_place(start: Start, samples: int) -> None:
    """Refuses to go on behind the end of an epoch.

    Args:
        start: Where the run starts.
        samples: In an epoch of this run.
    """
    place = start.manifest.sample_in_epoch if start.kind == 'resume' and start.manifest else 0
    if place > samples:
        raise UserError(f'{start.setting}: {start.path} lies at sample {place:,} of its epoch, and an epoch has '
                        f'{samples:,} here. Go on with the data and epoch_size of its run, or start a new run from its '
                        'weights: load_path=FILE load_weights_only=true')


def finish_loading(start: Start, trainer: Trainer) -> None:
    """What Composer leaves to do once the Trainer has loaded a checkpoint.

    Raises:
        UserError: The weights are another model's, or there is no state of this optimizer.
    """
    if start.weights_of_a_file and start.path:
        _load_weights(start, start.path, trainer.state.model)
    if start.kind == 'resume':
        optimizer = trainer.state.optimizers[0]
        if not optimizer.state:
            raise UserError(f'{start.setting}: {start.path} holds no state of {type(optimizer).__name__}, this run\'s optimizer; '
                            'set the optimizer that it was saved with, or take its weights alone: load_path=FILE '
                            'load_weights_only=true')
        # Composer restores the random state only at the start of an epoch, or where it reads past what was trained on.
        load_rng_state(trainer._rng_state or [])
