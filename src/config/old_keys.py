"""YAMLs of 2022 and 2023 (Composer 0.11 to 0.13), and YAMLs that write one value in several places.

`translate` turns keys and values of that time into today's, where the meaning is the same. Where it is not, the key
stays, and `src/config/check.py` refuses it with the text of `what_to_write`.
"""

import os
import sys
from collections.abc import Iterator
from typing import Any, Optional

from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel

from src.common.errors import UserError, mask_secrets
from src.config.schema import MODEL_CONFIGS

Tree = dict[str, Any]  # a config as plain dictionaries, its interpolations not resolved

DATASETS = ('train_loader.dataset', 'eval_loader.dataset')
CLIPPING, MICROBATCH = 'algorithms.gradient_clipping', 'device_train_microbatch_size'
GRAD_ACCUM = ('grad_accum', 'device_train_grad_accum')
EVAL_SUBSET = ('eval_subset_num_batches', 'eval_loader.eval_subset_num_batches')

MOVED = {  # the same value under another key
    'tokenizer.type': 'tokenizer.name',
    'model.hf_config_name_or_path': 'model.pretrained_model_name_or_path',
    'init_device': 'model.device',
    'model.init_device': 'model.device',
    **{f'{dataset}.prefetch': f'{dataset}.predownload' for dataset in DATASETS},
    **{f'callbacks.{name}': 'callbacks.speed_monitor' for name in ('speed_monitor_v2', 'speed_monitor_mfu')},
}
RENAMED = {  # the same meaning under another value
    'precision': {'bf16': 'amp_bf16', 'amp': 'amp_fp16', 'fp16': 'amp_fp16'},
    'model.attn_impl': {'triton': 'flash'},
    'model.device': {'cuda': 'meta', 'mixed': 'meta'},
    'fsdp_config.state_dict_type': {'local': 'sharded'},
}
NEEDLESS = {  # left out, whatever the value
    'model.tokenizer_name': 'the model reads no tokenizer',
    'fsdp_config.min_params': 'every block of the model is sharded on its own',
    'n_gpus': 'the launcher says it',
    'device_train_batch_size': 'it follows from global_train_batch_size and the number of devices',
    'python_log_level': 'the kit shows its own messages',
    'algorithms.fused_layernorm': "PyTorch's own layer norm is fused",
    'callbacks.grad_monitor': 'trainer/grad_norm is always logged',
}
NO_DEVICE = ('init_device', 'model.init_device', 'model.device')  # of hf_causal_lm, which is built on the CPU
NEUTRAL = {  # left out with this value, which asks for what the kit does in any case
    'model.alibi': False, 'model.attn_clip_qkv': None, 'model.attn_qk_ln': False, 'model.softmax_scale': None,
    'model.embedding_fraction': 1.0, 'model.no_bias': False, 'model.low_precision_layernorm': False,
    'model.use_auth_token': False, 'fsdp_config.flatten_parameters': True, 'fsdp_config.load_planner': None,
    'fsdp_config.save_planner': None, 'icl_tasks': None, 'save_overwrite': False, 'save_weights_only': False,
}
REFUSED = {  # what to write where there is no translation
    **{key: f'write {MICROBATCH}, the samples of one forward pass on a device: global_train_batch_size / '
            f'number of devices / {key}, rounded up' for key in GRAD_ACCUM},
    **dict.fromkeys(EVAL_SUBSET, 'write eval_samples: batches x device_eval_batch_size x number of devices, or -1 '
                                 'for the whole split'),
    'grad_clip_norm': f'write {CLIPPING} alone: {{clipping_type: norm, clipping_threshold: ...}}',
    'tokenizer.args': 'write its keys one level up, in tokenizer',
    'icl_tasks': 'run tasks after training, by lm-eval (README, "Evaluate"), and remove this key',
}


def _in_datasets(key: str) -> list[str]:
    return [f'{dataset}.{key}' for dataset in DATASETS]


FILLED = {  # by the value: where it is used, and filled in where a section leaves it out
    'max_seq_len': ['model.max_seq_len', 'tokenizer.max_seq_len', *_in_datasets('max_seq_len')],
    'data_remote': _in_datasets('remote'),
    'data_local': _in_datasets('local'),
    'tokenizer_name': ['tokenizer.tokenizer_name', *_in_datasets('tokenizer_name')],
    'model.attn_within_document': _in_datasets('sequence_ids'),
    'seed': ['model.init_seed'],
    'eval_samples': ['eval_loader.eval_samples'],
}
FOLLOW = {  # not filled in; they follow the command line where a YAML repeats the value
    'max_seq_len': ['model.config_overrides.n_positions', 'model.config_overrides.max_position_embeddings'],
    'seed': ['train_loader.dataset.shuffle_seed'],
}
USED_IN_ALL = ('max_seq_len', 'data_remote', 'data_local', 'tokenizer_name')  # has no effect where no section has it


def translate(merged: DictConfig, loaded: DictConfig, given: DictConfig) -> DictConfig:
    """The config with today's keys, with one value where the YAML repeats one, and filled in.

    `merged` is the YAML with the command line, `loaded` the YAML alone, and `given` the command line alone. The command
    line wins over the YAML, also where one of the two has the old key and the other has the new one. Rank 0 prints one
    line to stderr for each change. Raises UserError where no section follows `max_seq_len`, `data_remote`, `data_local`
    or `tokenizer_name`.
    """
    trees: Any = [OmegaConf.to_container(cfg) for cfg in (merged, loaded, given)]
    tree, yaml, typed = trees
    notes = list(_todays_keys(tree, typed))
    for source in (yaml, typed):
        list(_todays_keys(source, {}))  # what it yields is said already
    _fill(tree, yaml)
    notes += _one_value(tree, yaml, typed)
    if os.environ.get('RANK', '0') == '0':
        for note in notes:
            print(f'config: {mask_secrets(note)}', file=sys.stderr)
    return OmegaConf.create(tree)


def fill_in(cfg: Any) -> Any:
    """A config that `load` may not have seen, filled in."""
    if isinstance(cfg, BaseModel):
        return cfg
    tree: Any = OmegaConf.to_container(cfg if isinstance(cfg, DictConfig) else OmegaConf.create(dict(cfg)))
    _fill(tree, tree)
    return OmegaConf.create(tree)


def advice_for_old_key(key: str) -> Optional[str]:
    """What stands in place of an old key that is not translated; None: no old key."""
    if key in MOVED:
        return f'the old name of {MOVED[key]}; keep that alone'
    if key in NEEDLESS:
        return f'remove it: {NEEDLESS[key]}'
    if key in NEUTRAL and key not in REFUSED:
        return f'remove it: the kit does what {str(NEUTRAL[key]).lower()} asked for, and nothing else'
    return REFUSED.get(key)


# ---------------------------------------------------------------- keys
def _todays_keys(tree: Tree, given: Tree) -> Iterator[str]:
    """Changes the old keys of `tree`, and yields a line for each; `given` is the command line, whose keys win."""
    needless = dict(NEEDLESS)
    if _get(tree, 'model.name') == 'hf_causal_lm':
        needless |= dict.fromkeys(NO_DEVICE, 'a Hugging Face model is built on the CPU')
    if _get(tree, MICROBATCH) is not None:
        needless['device_train_grad_accum'] = f'it follows from {MICROBATCH}'
    for key, why in needless.items():
        if _pop(tree, key):
            yield f'{key}: no longer needed: {why}'
    for key, value in NEUTRAL.items():
        if _get(tree, key) == value and _pop(tree, key):
            yield f'{key}: no longer needed: the kit does so in any case'
    for old, new, value in _moves(tree):
        old_given, new_given, known = _sets(given, old), _sets(given, new), _get(tree, new)
        if old_given == new_given and known is not None and known != value:
            continue  # one source says two things, which src/config/check.py refuses
        _pop(tree, old)
        if new_given and not old_given:
            if isinstance(known, dict) and isinstance(value, dict):
                _set(tree, new, value | known)
            yield f'{old}: left out: the command line sets {new}'
        else:
            _set(tree, new, value)
            yield f'{old}: read as {new}' + (f'={value}' if new in (CLIPPING, MICROBATCH, 'eval_samples') else '')
    if not _get(tree, 'tokenizer.args'):
        _pop(tree, 'tokenizer.args')
    for key, values in RENAMED.items():
        if (value := values.get(str(_get(tree, key)))) is not None:
            yield f'{key}={_get(tree, key)}: read as {value}'
            _set(tree, key, value)


def _moves(tree: Tree) -> list[tuple[str, str, Any]]:
    """The old key, the new key and the value there, for all that `tree` has."""
    args = _get(tree, 'tokenizer.args')
    moved = MOVED | {f'tokenizer.args.{key}': f'tokenizer.{key}' for key in (args if isinstance(args, dict) else ())}
    moves = [(old, new, _get(tree, old)) for old, new in moved.items() if _holds(tree, old)]
    if 'grad_clip_norm' in tree:
        norm = tree['grad_clip_norm']
        off = norm is None or (isinstance(norm, (int, float)) and norm <= 0)
        clipping = False if off else {'clipping_type': 'norm', 'clipping_threshold': norm}
        moves.append(('grad_clip_norm', CLIPPING, clipping))
    moves += [(key, MICROBATCH, 'auto') for key in GRAD_ACCUM if tree.get(key) == 'auto']
    size, world_size = tree.get('device_eval_batch_size'), os.environ.get('WORLD_SIZE', '1')
    for key in EVAL_SUBSET:
        batches = _get(tree, key)
        if _holds(tree, key) and batches in (-1, None):
            moves.append((key, 'eval_samples', -1))
        elif isinstance(batches, int) and isinstance(size, int) and world_size.isdecimal():
            moves.append((key, 'eval_samples', batches * size * int(world_size)))  # each device had so many batches
    return moves


# ---------------------------------------------------------------- values that are used in several places
def _fill(tree: Tree, yaml: Tree) -> None:
    """Gives sections the top-level values that they leave out.

    `yaml` is the YAML alone: a dataset with `local` and no `remote` there copies nothing.
    """
    model = MODEL_CONFIGS.get(str(_get(tree, 'model.name')))
    for top, keys in FILLED.items():
        for key in keys if _get(tree, top) is not None else ():
            section, last = _holder(tree, key)
            in_place = last == 'remote' and _holds(yaml, key.replace('remote', 'local'))
            of_streams = last in ('remote', 'local') and section.get('streams')
            unknown = section is tree.get('model') and (model is None or last not in model.model_fields)
            if not in_place and not of_streams and not unknown:
                section.setdefault(last, f'${{{top}}}')


def _one_value(tree: Tree, yaml: Tree, given: Tree) -> list[str]:
    """Lets sections that repeat a top-level value of the YAML follow the command line.

    Returns a line for each value that is not the same everywhere.
    """
    notes, errors = [], []
    for top in USED_IN_ALL + ('seed', 'eval_samples'):
        keys = [key for key in FILLED[top] + FOLLOW.get(top, []) if _holds(tree, key) and not _sets(given, key)]
        if top in given and tree[top] is not None:
            follow = [key for key in keys if _get(tree, key) != f'${{{top}}}'
                      and (top == 'eval_samples' or _same(_get(tree, key), yaml.get(top)))]
            for key in follow:
                _set(tree, key, f'${{{top}}}')
            if follow and not _same(tree[top], yaml.get(top)):
                notes.append(f'{top}: {tree[top]} is also used for {", ".join(follow)}, which repeat {top} in the YAML')
        if top in USED_IN_ALL and tree.get(top) is not None and '${' not in str(tree[top]):
            more, wrong = _differences(tree, given, top)
            notes, errors = notes + more, errors + wrong
    samples = _get(tree, 'eval_loader.eval_samples')
    if isinstance(samples, int) and samples != tree.get('eval_samples', samples):
        notes.append(f'eval_loader.eval_samples: {samples} is used, although eval_samples is {tree["eval_samples"]}')
    if errors:
        raise UserError(mask_secrets('\n'.join(errors)))
    return notes


def _differences(tree: Tree, given: Tree, top: str) -> tuple[list[str], list[str]]:
    """What to say of sections with a value of their own, and the mistake that no section has the top-level value."""
    keys = [key for key in FILLED[top] if _holds(tree, key) and not key.startswith('model.')]  # with more positions
    odd = {key: value for key in keys if '${' not in str(value := _get(tree, key)) and not _sets(given, key)
           and not _same(value, tree[top])}
    trained = [key for key in odd if not key.startswith('eval_loader.')]  # an evaluation may be of other data
    if not trained or len(odd) < len(keys):
        return [f'{key}: {odd[key]} is used, although {top} is {tree[top]}' for key in trained], []
    values = ', '.join(f'{key} is {value}' for key, value in odd.items())
    fix = ' '.join(f'{key}={tree[top]}' for key in odd)
    return [], [f'{top}: {tree[top]} has no effect: {values}. Write ${{{top}}} there, or add {fix} to the command '
                f'line, or set {top} to what they have']


def _same(a: Any, b: Any) -> bool:
    """Whether two values are one, as ./my-copy-c4 and my-copy-c4/ are."""
    return a == b or os.path.normpath(str(a)) == os.path.normpath(str(b))


# ---------------------------------------------------------------- dotted keys of a tree
def _holder(tree: Tree, key: str) -> tuple[Tree, str]:
    """The section of a dotted key (empty where there is none), and the key's last part."""
    *path, last = key.split('.')
    section: Any = tree
    for part in path:
        section = section.get(part) if isinstance(section, dict) else None
    return (section if isinstance(section, dict) else {}), last


def _holds(tree: Tree, key: str) -> bool:
    section, last = _holder(tree, key)
    return last in section


def _get(tree: Tree, key: str) -> Any:
    section, last = _holder(tree, key)
    return section.get(last)


def _pop(tree: Tree, key: str) -> bool:
    """Removes the key; returns whether it was there."""
    section, last = _holder(tree, key)
    there = last in section
    section.pop(last, None)
    return there


def _set(tree: Tree, key: str, value: Any) -> None:
    *path, last = key.split('.')
    for part in path:
        if not isinstance(tree.get(part), dict):
            tree[part] = {}
        tree = tree[part]
    tree[last] = value


def _sets(given: Tree, key: str) -> bool:
    """Whether the command line sets the key, or a section above it to {}, null or a value."""
    section: Any = given
    for part in key.split('.'):
        if part not in section:
            return False
        section = section[part]
        if not isinstance(section, dict) or not section:
            return True
    return True
