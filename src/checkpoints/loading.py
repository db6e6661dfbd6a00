"""Checks that a checkpoint fits this run, and does the parts of loading that Composer does not do."""

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

# Keys of section `model` that change what the model computes, but not the shapes of its weights
KEYS_WITHOUT_SHAPE = {
    'mosaic_gpt': ('n_heads', 'mlp_act'),
    'modern_gpt': ('rope_theta', 'norm_eps', 'logit_softcap', 'tie_embeddings'),
    'hf_causal_lm': ('n_head', 'num_heads', 'num_attention_heads', 'activation_function', 'hidden_act')}


# ---------------------------------------------------------------- before the Trainer is built
def check_loadable(start: Start, sharded: bool, trusted: bool = False) -> None:
    """Raises UserError for a checkpoint that Composer would not load into this run.

    `sharded` says whether this run saves sharded checkpoints: Composer loads only the kind that it saves. Warns that a
    `trusted` checkpoint may run code.
    """
    if start.path is None or start.is_weights_file:
        return
    if start.sharded and not sharded:
        raise UserError(f'{start.setting}: {start.path} is a sharded checkpoint; set '
                        'fsdp_config.state_dict_type=sharded and fsdp_config.sharding_strategy=FULL_SHARD '
                        '(or SHARD_GRAD_OP), also on one device')
    if sharded and not start.sharded:
        raise UserError(f'{start.setting}: {start.path} is a full checkpoint, and fsdp_config.state_dict_type is '
                        'sharded; set full to continue from it, or load only its weights: load_path=FILE '
                        'load_weights_only=true')
    if is_tar(start.path):  # Composer would unpack an archive, also to places outside of its folder
        raise UserError(f'{start.setting}: {start.path} is an archive; unpack it, and name the file of the checkpoint')
    if trusted:
        log.warning('trust_checkpoint: objects of any class are loaded from %s, which can run code', start.path)


def check_model(manifest: Optional[Manifest], model: Mapping[str, Any], setting: str) -> None:
    """Raises UserError if the checkpoint's model has the same shapes but, for example, another n_heads."""
    saved, name = manifest.model if manifest else {}, model.get('name', 'mosaic_gpt')
    if name not in KEYS_WITHOUT_SHAPE or saved.get('name') != name:
        return
    prefix, current = 'model.', parse(MODEL_CONFIGS[name], model).model_dump()
    if name == 'hf_causal_lm':
        from transformers import CONFIG_MAPPING  # imported here because the import takes seconds

        prefix, saved = 'model.config_overrides.', saved['config_overrides']
        current = {key: value for key, value in current['config_overrides'].items() if value is not None}
        if saved.get('model_type') in CONFIG_MAPPING:  # a manifest leaves out values that are the defaults of the class
            saved = CONFIG_MAPPING[saved['model_type']]().to_dict() | saved
    for key in KEYS_WITHOUT_SHAPE[name]:
        if key in current and saved.get(key, current[key]) != current[key]:
            raise UserError(f'{setting}: the checkpoint has {prefix}{key} {saved[key]!r}, and the config has '
                            f'{current[key]!r}. The weights would fit, but compute something else; set section model '
                            'as in the run that saved them')


def check_same_tokenizer(manifest: Optional[Manifest], tokenizer: Any, path: str,
                         setting: str = 'tokenizer_name') -> None:
    """Raises UserError if the manifest of the checkpoint at `path` has the hash of another tokenizer."""
    if manifest and manifest.tokenizer_hash:
        tokenizer.check_made_with(f'the checkpoint {path}', manifest.tokenizer_name, manifest.tokenizer_hash, setting)


def check_sample_in_epoch(start: Start, samples: int) -> None:
    """Raises UserError if the checkpoint lies after the end of an epoch of this run, which has `samples`."""
    position = start.manifest.sample_in_epoch if start.kind == 'resume' and start.manifest else 0
    if position > samples:
        raise UserError(f'{start.setting}: {start.path} lies at sample {position:,} of its epoch, and an epoch of this '
                        f'run has only {samples:,}. Set the data and epoch_size of the run that saved it, or start a '
                        'new run from its weights: load_path=FILE load_weights_only=true')


# ---------------------------------------------------------------- while it is built, and after
@contextmanager
def read_safely(start: Start, trusted: Optional[bool] = None) -> Iterator[None]:
    """Makes Composer's Trainer read `load_path` without running code, and explains a damaged file in one message.

    Wraps only Composer's reading functions, so an error of a model, an optimizer or a callback keeps its traceback.
    `trusted` allows objects of any class, and so code. If `trusted` is None, no message offers `trust_checkpoint`.
    `.metadata` is never trusted, because only torch writes that file.
    """
    load_file = checkpoint._torch_load_with_validation

    def make_safe(read: Callable, may_trust: bool) -> Callable:
        offer = ', or set trust_checkpoint=true if you trust who wrote this one' if trusted is not None else ''

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            guard = nullcontext() if trusted and may_trust else forbid_code()
            with explain_read_errors(start, 'into this model and optimizer', offer if may_trust else ''), guard:
                result = read(*args, **kwargs)
            if read is load_file:
                extract_weights(result, start)
            return result
        return wrapped

    with ExitStack() as patches:
        for owner, name in ((checkpoint, 'download_checkpoint'), (checkpoint, '_torch_load_with_validation'),
                            (checkpoint, 'dist_cp_load'), (checkpoint, 'DistCPObjectStoreReader'),
                            (checkpoint.FileSystemReaderWithValidation, 'read_metadata')):
            safe_read = make_safe(getattr(owner, name), may_trust=name != 'read_metadata')
            patches.enter_context(patch.object(owner, name, safe_read))
        yield


def check_same_weights(start: Start, state_dict: Mapping[str, Any]) -> Callable[[dict[str, Any]], None]:
    """Returns a function that raises UserError where a checkpoint lacks weights of the model, or has others.

    The Trainer takes the function as `load_ignore_keys`, and calls it before it changes the model. Without this check,
    Composer and torch silently keep the initial value of a parameter that the checkpoint lacks.
    """
    def shapes_of(weights: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        # The extra state of a module has no shape.
        return {name: tuple(getattr(tensor, 'shape', ())) for name, tensor in weights.items()}

    shapes = shapes_of(state_dict)

    def check(checkpoint: dict[str, Any]) -> None:
        weights = checkpoint['state'].get('model')
        if weights is None:  # rank 0 will send the weights to this rank
            return
        saved = shapes_in_shards(start) if start.sharded else shapes_of(weights)
        unmatched = shapes.keys() ^ saved.keys()
        reshaped = sorted(name for name in shapes.keys() & saved.keys() if shapes[name] != saved[name])
        if unmatched:
            difference = (f'{len(unmatched & shapes.keys())} are missing, and {len(unmatched & saved.keys())} are '
                          f'unknown, such as {min(unmatched)}')
        elif reshaped:
            name = reshaped[0]
            difference = f'{name} has the shape {saved[name]} in the checkpoint and {shapes[name]} in the model'
        else:
            return
        raise UserError(f'{start.setting}: {start.path} holds other weights than this model has: {difference}. Set '
                        'section model as in the run that saved them')
    return check


def names_of_algorithms() -> list[str]:
    """The algorithms that a checkpoint must not add to a run: Composer would pass its text to Python's eval."""
    from composer import algorithms  # not at the top: imports the models of transformers

    return dir(algorithms)


def finish_loading(start: Start, trainer: Trainer) -> None:
    """Loads what the Trainer does not load: weights of a full checkpoint, and the random state. Call on every rank."""
    if start.is_weights_file:
        model = trainer.state.model
        with local_copy(start) as local:
            weights = read_full_checkpoint(local, start)
            check_same_weights(start, get_model_state_dict(model))({'state': {'model': weights}})
            set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, strict=True))
    if start.kind == 'resume':
        optimizer = trainer.state.optimizers[0]
        if not optimizer.state:
            raise UserError(f'{start.setting}: {start.path} holds no state of {type(optimizer).__name__}, this run\'s '
                            'optimizer; set the optimizer of the run that saved it, or load only its weights: '
                            'load_path=FILE load_weights_only=true')
        # Composer restores the random state only at the start of an epoch, or where it skips batches of the loader.
        load_rng_state(trainer._rng_state or [])
