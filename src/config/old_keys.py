"""Translates YAMLs of 2022 and 2023 (Composer 0.11 to 0.13), and gives sections the values of the top level.

`translate` replaces an old key or value where today's means the same. Otherwise the key stays, and
`src/config/check.py` refuses it with the advice of `advice_for_old_key`.
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

RENAMED_KEYS = {  # old key: today's key for the same value
    'tokenizer.type': 'tokenizer.name',
    'model.hf_config_name_or_path': 'model.pretrained_model_name_or_path',
    'init_device': 'model.device',
    'model.init_device': 'model.device',
    **{f'{dataset}.prefetch': f'{dataset}.predownload' for dataset in DATASETS},
    **{f'callbacks.{name}': 'callbacks.speed_monitor' for name in ('speed_monitor_v2', 'speed_monitor_mfu')},
}
RENAMED_VALUES = {  # key: {old value: today's value}
    'precision': {'bf16': 'amp_bf16', 'amp': 'amp_fp16', 'fp16': 'amp_fp16'},
    'model.attn_impl': {'triton': 'flash'},
    'model.device': {'cuda': 'meta', 'mixed': 'meta'},
    'fsdp_config.state_dict_type': {'local': 'sharded'},
}
DROPPED_KEYS = {  # key: why a run does not need it, whatever its value
    'model.tokenizer_name': 'the model reads no tokenizer',
    'fsdp_config.min_params': 'every block of the model is sharded on its own',
    'n_gpus': 'the launcher sets the number',
    'device_train_batch_size': 'global_train_batch_size and the number of devices set it',
    'python_log_level': 'the kit always shows its own messages',
    'algorithms.fused_layernorm': "PyTorch's own layer norm is fused",
    'callbacks.grad_monitor': 'trainer/grad_norm is always logged',
}
DEVICE_KEYS = ('init_device', 'model.init_device', 'model.device')  # dropped for hf_causal_lm
DROPPED_VALUES = {  # key: the value with which it is dropped, because the kit always behaves in this way
    'model.alibi': False, 'model.attn_clip_qkv': None, 'model.attn_qk_ln': False, 'model.softmax_scale': None,
    'model.embedding_fraction': 1.0, 'model.no_bias': False, 'model.low_precision_layernorm': False,
    'model.use_auth_token': False, 'fsdp_config.flatten_parameters': True, 'fsdp_config.load_planner': None,
    'fsdp_config.save_planner': None, 'icl_tasks': None, 'save_overwrite': False, 'save_weights_only': False,
}
REFUSED = {  # old key: what to write; there is no translation
    **{key: f'write {MICROBATCH}, the samples of one forward pass on a device: global_train_batch_size / '
            f'number of devices / {key}, rounded up' for key in GRAD_ACCUM},
    **dict.fromkeys(EVAL_SUBSET, 'write eval_samples: batches x device_eval_batch_size x number of devices, or -1 '
                                 'for the whole split'),
    'grad_clip_norm': f'write only {CLIPPING}: {{clipping_type: norm, clipping_threshold: ...}}',
    'tokenizer.args': 'write its keys one level up, in tokenizer',
    'icl_tasks': 'remove this key, and run the tasks after training with lm-eval (src/tools/README.md)',
}


def _in_datasets(key: str) -> list[str]:
    return [f'{dataset}.{key}' for dataset in DATASETS]


SHARED_VALUES = {  # top-level key: the keys that get its value where a section leaves them out
    'max_seq_len': ['model.max_seq_len', 'tokenizer.max_seq_len', *_in_datasets('max_seq_len')],
    'data_remote': _in_datasets('remote'),
    'data_local': _in_datasets('local'),
    'tokenizer_name': ['tokenizer.tokenizer_name', *_in_datasets('tokenizer_name')],
    'model.attn_within_document': _in_datasets('sequence_ids'),
    'seed': ['model.init_seed'],
    'eval_samples': ['eval_loader.eval_samples'],
}
ALSO_FOLLOW = {  # never filled in, but changed with the command line where a YAML repeats the value
    'max_seq_len': ['model.config_overrides.n_positions', 'model.config_overrides.max_position_embeddings'],
    'seed': ['train_loader.dataset.shuffle_seed'],
}
MUST_BE_USED = ('max_seq_len', 'data_remote', 'data_local', 'tokenizer_name')  # an error where no section has the value


def translate(merged: DictConfig, loaded: DictConfig, command_line: DictConfig) -> DictConfig:
    """Returns the config with today's keys, and with the top level's values in the sections that leave them out.

    `merged` is the YAML with the command line, `loaded` the YAML alone, `command_line` the command line alone. The
    command line wins over the YAML, also where one has the old key and the other the new one. Rank 0 prints one line to
    stderr for each change. Raises UserError if no section uses the value of a key in `MUST_BE_USED`.
    """
    trees: Any = [OmegaConf.to_container(cfg) for cfg in (merged, loaded, command_line)]
    tree, yaml, typed = trees
    notes = list(_translate_keys(tree, typed))
    for source in (yaml, typed):
        list(_translate_keys(source, {}))  # `notes` has their lines already
    _fill_sections(tree, yaml)
    notes += _follow_command_line(tree, yaml, typed)
    if os.environ.get('RANK', '0') == '0':
        for note in notes:
            print(f'config: {mask_secrets(note)}', file=sys.stderr)
    return OmegaConf.create(tree)


def fill_shared_values(cfg: Any) -> Any:
    """Gives sections the top level's values, for a config that may not come from `load`."""
    if isinstance(cfg, BaseModel):
        return cfg
    tree: Any = OmegaConf.to_container(cfg if isinstance(cfg, DictConfig) else OmegaConf.create(dict(cfg)))
    _fill_sections(tree, tree)
    return OmegaConf.create(tree)


def advice_for_old_key(key: str) -> Optional[str]:
    """Advice for an old key that is not translated; None where `key` is not an old key."""
    if key in RENAMED_KEYS:
        return f'this is the old name of {RENAMED_KEYS[key]}; keep only {RENAMED_KEYS[key]}'
    if key in DROPPED_KEYS:
        return f'remove it: {DROPPED_KEYS[key]}'
    if key in DROPPED_VALUES and key not in REFUSED:
        value = 'null' if DROPPED_VALUES[key] is None else str(DROPPED_VALUES[key]).lower()
        return f'remove it: the kit always behaves as with {value}'
    return REFUSED.get(key)


# ---------------------------------------------------------------- keys
def _translate_keys(tree: Tree, command_line: Tree) -> Iterator[str]:
    """Replaces the old keys of `tree` and yields a line for each. The keys of the command line win."""
    dropped = dict(DROPPED_KEYS)
    if _get(tree, 'model.name') == 'hf_causal_lm':
        dropped |= dict.fromkeys(DEVICE_KEYS, 'a Hugging Face model is built on the CPU')
    if _get(tree, MICROBATCH) is not None:
        dropped['device_train_grad_accum'] = f'{MICROBATCH} sets it'
    for key, why in dropped.items():
        if _pop(tree, key):
            yield f'{key}: no longer needed: {why}'
    for key, value in DROPPED_VALUES.items():
        if _get(tree, key) == value and _pop(tree, key):
            yield f'{key}: no longer needed: the kit always behaves in this way'
    for old, new, value in _renamed_settings(tree):
        old_typed, new_typed, known = _is_set(command_line, old), _is_set(command_line, new), _get(tree, new)
        if old_typed == new_typed and known is not None and known != value:
            continue  # one source has both keys with two values: src/config/check.py refuses the old one
        _pop(tree, old)
        if new_typed and not old_typed:
            if isinstance(known, dict) and isinstance(value, dict):
                _set(tree, new, value | known)
            yield f'{old}: ignored: the command line sets {new}'
        else:
            _set(tree, new, value)
            yield f'{old}: read as {new}' + (f'={value}' if new in (CLIPPING, MICROBATCH, 'eval_samples') else '')
    if not _get(tree, 'tokenizer.args'):
        _pop(tree, 'tokenizer.args')
    for key, values in RENAMED_VALUES.items():
        if (value := values.get(str(_get(tree, key)))) is not None:
            yield f'{key}={_get(tree, key)}: read as {value}'
            _set(tree, key, value)


def _renamed_settings(tree: Tree) -> list[tuple[str, str, Any]]:
    """(old key, new key, value under the new key) for each old key that `tree` has."""
    args = _get(tree, 'tokenizer.args')
    renamed = RENAMED_KEYS | {f'tokenizer.args.{key}': f'tokenizer.{key}'
                              for key in (args if isinstance(args, dict) else ())}
    found = [(old, new, _get(tree, old)) for old, new in renamed.items() if _has(tree, old)]
    if 'grad_clip_norm' in tree:
        norm = tree['grad_clip_norm']
        off = norm is None or (isinstance(norm, (int, float)) and norm <= 0)
        clipping = False if off else {'clipping_type': 'norm', 'clipping_threshold': norm}
        found.append(('grad_clip_norm', CLIPPING, clipping))
    found += [(key, MICROBATCH, 'auto') for key in GRAD_ACCUM if tree.get(key) == 'auto']
    size, world_size = tree.get('device_eval_batch_size'), os.environ.get('WORLD_SIZE', '1')
    for key in EVAL_SUBSET:
        batches = _get(tree, key)
        if _has(tree, key) and batches in (-1, None):
            found.append((key, 'eval_samples', -1))
        elif isinstance(batches, int) and isinstance(size, int) and world_size.isdecimal():
            found.append((key, 'eval_samples', batches * size * int(world_size)))  # it counted batches of each device
    return found


# ---------------------------------------------------------------- values that several sections use
def _fill_sections(tree: Tree, yaml: Tree) -> None:
    """Writes the top-level values into the sections that leave them out.

    A dataset that has `local` but no `remote` in the YAML (`yaml`, without the command line) copies nothing, so it gets
    no `remote`.
    """
    model = MODEL_CONFIGS.get(str(_get(tree, 'model.name')))
    for top, keys in SHARED_VALUES.items():
        for key in keys if _get(tree, top) is not None else ():
            section, last = _section_of(tree, key)
            copies_nothing = last == 'remote' and _has(yaml, key.replace('remote', 'local'))
            has_streams = last in ('remote', 'local') and section.get('streams')
            is_unknown = section is tree.get('model') and (model is None or last not in model.model_fields)
            if not copies_nothing and not has_streams and not is_unknown:
                section.setdefault(last, f'${{{top}}}')


def _follow_command_line(tree: Tree, yaml: Tree, command_line: Tree) -> list[str]:
    """If the command line sets a top-level value, changes the sections that repeat the old value in the YAML.

    Returns a line for each change, and for each section whose value differs from the top level's.
    """
    notes, errors = [], []
    for top in MUST_BE_USED + ('seed', 'eval_samples'):
        keys = [key for key in SHARED_VALUES[top] + ALSO_FOLLOW.get(top, [])
                if _has(tree, key) and not _is_set(command_line, key)]
        if top in command_line and tree[top] is not None:
            repeated = [key for key in keys if _get(tree, key) != f'${{{top}}}'
                        and (top == 'eval_samples' or _is_same(_get(tree, key), yaml.get(top)))]
            for key in repeated:
                _set(tree, key, f'${{{top}}}')
            if repeated and not _is_same(tree[top], yaml.get(top)):
                notes.append(f'{top}: {tree[top]} is also used for {", ".join(repeated)}, where the YAML repeats {top}')
        if top in MUST_BE_USED and tree.get(top) is not None and '${' not in str(tree[top]):
            more_notes, more_errors = _check_shared_value(tree, command_line, top)
            notes, errors = notes + more_notes, errors + more_errors
    samples = _get(tree, 'eval_loader.eval_samples')
    if isinstance(samples, int) and samples != tree.get('eval_samples', samples):
        notes.append(f'eval_loader.eval_samples: {samples} is used, although eval_samples is {tree["eval_samples"]}')
    if errors:
        raise UserError(mask_secrets('\n'.join(errors)))
    return notes


def _check_shared_value(tree: Tree, command_line: Tree, top: str) -> tuple[list[str], list[str]]:
    """Returns a note for each section that differs from the top level, or an error if all of them differ."""
    # without the model, which may have more positions
    keys = [key for key in SHARED_VALUES[top] if _has(tree, key) and not key.startswith('model.')]
    different = {key: value for key in keys if '${' not in str(value := _get(tree, key))
                 and not _is_set(command_line, key) and not _is_same(value, tree[top])}
    trained = [key for key in different if not key.startswith('eval_loader.')]  # an evaluation may read other data
    if not trained or len(different) < len(keys):
        return [f'{key}: {different[key]} is used, although {top} is {tree[top]}' for key in trained], []
    values = ', '.join(f'{key} is {value}' for key, value in different.items())
    fix = ' '.join(f'{key}={tree[top]}' for key in different)
    return [], [f'{top}: {tree[top]} has no effect, because {values}. Write ${{{top}}} in these places, or add {fix} '
                f'to the command line, or set {top} to the value that they have']


def _is_same(a: Any, b: Any) -> bool:
    """Whether two values are equal, also as paths: ./my-copy-c4 and my-copy-c4/ are."""
    return a == b or os.path.normpath(str(a)) == os.path.normpath(str(b))


# ---------------------------------------------------------------- access by dotted key
def _section_of(tree: Tree, key: str) -> tuple[Tree, str]:
    """The section that holds a dotted key (empty where it is missing), and the last part of the key."""
    *path, last = key.split('.')
    section: Any = tree
    for part in path:
        section = section.get(part) if isinstance(section, dict) else None
    return (section if isinstance(section, dict) else {}), last


def _has(tree: Tree, key: str) -> bool:
    section, last = _section_of(tree, key)
    return last in section


def _get(tree: Tree, key: str) -> Any:
    section, last = _section_of(tree, key)
    return section.get(last)


def _pop(tree: Tree, key: str) -> bool:
    """Removes the key; returns whether the tree had it."""
    section, last = _section_of(tree, key)
    was_set = last in section
    section.pop(last, None)
    return was_set


def _set(tree: Tree, key: str, value: Any) -> None:
    *path, last = key.split('.')
    for part in path:
        if not isinstance(tree.get(part), dict):
            tree[part] = {}
        tree = tree[part]
    tree[last] = value


def _is_set(command_line: Tree, key: str) -> bool:
    """Whether the command line sets the key, or sets a section above it to {}, null or a value."""
    section: Any = command_line
    for part in key.split('.'):
        if part not in section:
            return False
        section = section[part]
        if not isinstance(section, dict) or not section:
            return True
    return True
