"""What a checkpoint must be to be loaded into this run, and what Composer leaves to do."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Optional
from unittest.mock import patch

from composer import Trainer
from composer.utils import checkpoint, is_tar
from composer.utils.reproducibility import load_rng_state
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from src.checkpoints.manifest import Manifest
from src.checkpoints.safe_reading import explain_read_errors, extract_weights, forbid_code
from src.checkpoints.start import Start
from src.checkpoints.weights import local_copy, read_full_checkpoint, shapes_in_shards
from src.common.errors import UserError
from src.config.check import parse
from src.config.schema import MODEL_CONFIGS

log = logging.getLogger('src')

# Keys of the model that the shapes of the weights do not tell
UNTOLD = {'mosaic_gpt': ('n_heads', 'mlp_act'),
          'hf_causal_lm': ('n_head', 'num_heads', 'num_attention_heads', 'activation_function', 'hidden_act')}


# ---------------------------------------------------------------- before the Trainer is built
def check_loadable(start: Start, sharded: bool, trusted: bool = False) -> None:
    """Refuses a checkpoint that Composer would not load into this run.

    `sharded` says of which kind this run's checkpoints are: Composer loads the kind that it saves. A checkpoint that is
    `trusted` may hold any object, and a warning says so.
    """
    if start.path is None or start.weights_of_a_file:
        return
    there = f'{start.setting}: {start.path} is'
    if start.sharded and not sharded:
        raise UserError(f'{there} a sharded checkpoint; set fsdp_config.state_dict_type=sharded, with '
                        'sharding_strategy FULL_SHARD or SHARD_GRAD_OP, also on one device')
    if sharded and not start.sharded:
        raise UserError(f'{there} a full checkpoint, and fsdp_config.state_dict_type is sharded; set full to go on '
                        'from it, or take its weights alone: load_path=FILE load_weights_only=true')
    if is_tar(start.path):  # which Composer would unpack, wherever its members point to
        raise UserError(f'{there} an archive; unpack it, and give the file of the checkpoint')
    if trusted:
        log.warning('trust_checkpoint: any object is loaded from %s. That runs code that it holds', start.path)


def check_model(manifest: Optional[Manifest], model: Mapping[str, Any], setting: str) -> None:
    """Refuses a model that computes something else with weights of the same shapes: one of other heads, say."""
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


def check_same_tokenizer(manifest: Optional[Manifest], tokenizer: Any, path: str,
                         setting: str = 'tokenizer_name') -> None:
    """Refuses another tokenizer than that of the checkpoint at `path`, where its manifest has the hash of one."""
    if manifest and manifest.tokenizer_hash:
        tokenizer.check_made(f'the checkpoint {path}', manifest.tokenizer_name, manifest.tokenizer_hash, setting)


def check_sample_in_epoch(start: Start, samples: int) -> None:
    """Refuses to go on behind the end of an epoch, which has so many samples."""
    place = start.manifest.sample_in_epoch if start.kind == 'resume' and start.manifest else 0
    if place > samples:
        raise UserError(f'{start.setting}: {start.path} lies at sample {place:,} of its epoch, and an epoch has '
                        f'{samples:,} here. Go on with the data and epoch_size of its run, or start a new run from its '
                        'weights: load_path=FILE load_weights_only=true')


# ---------------------------------------------------------------- while it is built, and after
@contextmanager
def reading_safely(start: Start, trusted: Optional[bool] = None) -> Iterator[None]:
    """Has Composer's Trainer read its `load_path` without running code. A fault of the file ends in one message.

    Only the functions that read are wrapped. An error of a model, an optimizer or a callback keeps its traceback.
    `trusted` lets the checkpoint hold any object, and so run code; with None it does not, and the message does not
    offer it. `.metadata` never may: torch alone writes it.
    """
    load_file = checkpoint._torch_load_with_validation

    def safely(read: Callable, may_trust: bool) -> Callable:
        offer = ', or set trust_checkpoint=true if you trust who wrote this one' if trusted is not None else ''

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            guard = nullcontext() if trusted and may_trust else forbid_code()
            with explain_read_errors(start, 'into this model and optimizer', offer if may_trust else ''), guard:
                found = read(*args, **kwargs)
            if read is load_file:
                extract_weights(found, start)
            return found
        return wrapped

    with ExitStack() as replaced:
        for owner, name in ((checkpoint, 'download_checkpoint'), (checkpoint, '_torch_load_with_validation'),
                            (checkpoint, 'dist_cp_load'), (checkpoint, 'DistCPObjectStoreReader'),
                            (checkpoint.FileSystemReaderWithValidation, 'read_metadata')):
            safe = safely(getattr(owner, name), may_trust=name != 'read_metadata')
            replaced.enter_context(patch.object(owner, name, safe))
        yield


def check_same_weights(start: Start, own: Mapping[str, Any]) -> Callable[[dict[str, Any]], None]:
    """A check of what a checkpoint holds, for Trainer's `load_ignore_keys`, which runs before the model is touched.

    Composer and torch leave a parameter that the checkpoint lacks as it was initialised, and say nothing. `own` is the
    model's state dict.
    """
    def shapes_of(weights: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        # The extra state of a module has no shape
        return {name: tuple(getattr(tensor, 'shape', ())) for name, tensor in weights.items()}

    shapes = shapes_of(own)

    def check(checkpoint: dict[str, Any]) -> None:
        there = checkpoint['state'].get('model')
        if there is None:  # a rank that rank 0 will send it to
            return
        found = shapes_in_shards(start) if start.sharded else shapes_of(there)
        unmatched = shapes.keys() ^ found.keys()
        other = sorted(name for name in shapes.keys() & found.keys() if shapes[name] != found[name])
        if unmatched:
            differ = (f'{len(unmatched & shapes.keys())} are missing, {len(unmatched & found.keys())} are not known, '
                      f'such as {min(unmatched)}')
        elif other:
            differ = f'{other[0]} has the shape {found[other[0]]} there and {shapes[other[0]]} here'
        else:
            return
        raise UserError(f'{start.setting}: {start.path} holds other weights than this model has: {differ}. Set section '
                        'model as the run had it that saved them')
    return check


def finish_loading(start: Start, trainer: Trainer) -> None:
    """What Composer leaves to do once the Trainer is built. Every rank has to call it."""
    if start.weights_of_a_file:
        model = trainer.state.model
        with local_copy(start) as local:
            weights = read_full_checkpoint(local, start)
            check_same_weights(start, get_model_state_dict(model))({'state': {'model': weights}})
            set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, strict=True))
    if start.kind == 'resume':
        optimizer = trainer.state.optimizers[0]
        if not optimizer.state:
            raise UserError(f'{start.setting}: {start.path} holds no state of {type(optimizer).__name__}, this run\'s '
                            'optimizer; set the optimizer that it was saved with, or take its weights alone: '
                            'load_path=FILE load_weights_only=true')
        # Composer restores the random state only at the start of an epoch, or where it reads past what was trained on.
        load_rng_state(trainer._rng_state or [])
