"""Compares a resumed run's settings with its checkpoint's; refuses changes that would repeat or skip samples."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from composer.utils import dist

from src.checkpoints.start import Start
from src.common.errors import UserError
from src.config import load as config
from src.config.schema import Config

# Keys of the config that do not change the training.
NOT_OF_TRAINING = {'run_name', 'save_folder', 'load_path', 'load_weights_only', 'trust_checkpoint', 'autoresume',
                   'callbacks', 'loggers', 'progress_bar', 'log_to_console', 'console_log_interval', 'log_traces'}
# Keys without effect on a resumed run: only a new run reads them, or the checkpoint has its own values.
ONLY_AT_START = {'seed', 'eval_first', 'model.init_seed', 'model.init_std', 'model.pretrained'}
# Keys of `train_loader` that do not change the order of samples.
KEEP_ORDER = {'remote', 'pin_memory', 'prefetch_factor', 'persistent_workers', 'timeout', 'drop_last', 'eval_samples',
              'predownload', 'cache_limit', 'download_retry', 'download_timeout', 'validate_hash', 'keep_zip'}
# More such keys, for a dataset that resumes by samples; and keys that such a dataset takes from the checkpoint.
KEEP_ORDER_IF_COUNTED = {'num_workers', 'max_seq_len', 'tokenizer_name', 'sequence_ids'}
FROM_CHECKPOINT_IF_COUNTED = {'train_loader.dataset.shuffle_seed', 'train_loader.dataset.num_canonical_nodes'}

UNKNOWN = ('changed since the checkpoint: unknown, because the checkpoint has no manifest with its settings. '
           'Text packed on the fly continues at the right sample only with the same batch size, devices, workers and '
           'data')
MOVED = ('{} lies within an epoch counted in batches, not samples, as for text packed on the fly. These changed '
         'settings put other samples into each batch, so the run would repeat some samples and leave out others: {}. '
         'Set the values of the run that saved the checkpoint, or start a new run from its weights: load_path=FILE '
         'load_weights_only=true. With packed tokens (convert_c4.py --concat_tokens), a run can continue with another '
         'batch size, and with other numbers of devices and workers')


def run_settings(c: Config, data: Mapping[str, str]) -> dict[str, Any]:
    """Returns the settings that a manifest stores for later runs: dotted key → JSON value, with secrets masked.

    `data` maps the section of each dataset to the fingerprint of the dataset.
    """
    world_size = dist.get_world_size()
    return {**config.flatten_masked(c), 'devices': world_size, 'nodes': world_size // dist.get_local_world_size(),
            **data}


class SettingChanges(NamedTuple):
    """The differences between the settings of a resumed run and those of its checkpoint."""

    lines: list[str]  # for the plan
    schedule: bool  # whether the schedule of the learning rate differs


def compare_settings(start: Start, now: Mapping[str, Any], resumes_by_samples: bool) -> SettingChanges:
    """Compares a run's settings, from `run_settings`, with those of the checkpoint that it goes on from.

    `resumes_by_samples` says whether the training set continues at a number of samples. Otherwise Composer reads the
    epoch again and drops as many batches as the checkpoint has seen. Raises UserError if the checkpoint lies within an
    epoch, and those batches would hold other samples in this run.
    """
    if start.kind != 'resume':
        return SettingChanges([], False)
    if start.manifest is None or not start.manifest.settings:
        return SettingChanges([UNKNOWN], False)
    then, position = start.manifest.settings, start.manifest.sample_in_epoch
    changed = {}
    for key in [*now, *(then.keys() - now.keys())]:
        before, after = (settings.get(key, 'unset') for settings in (then, now))
        if before != after and key.split('.')[0] not in NOT_OF_TRAINING:
            changed[key] = f'{key} {before} → {after}'

    def join_changes(keys: Iterable[str]) -> str:
        return ', '.join(changed[key] for key in keys)

    moved = [key for key in changed if key in then and key in now and _moves_samples(key, now, resumes_by_samples)]
    if moved and position and not resumes_by_samples:
        raise UserError(MOVED.format(f'{start.setting}: {start.path}', join_changes(moved)))
    no_effect = [key for key in changed
                 if key in ONLY_AT_START or resumes_by_samples and key in FROM_CHECKPOINT_IF_COUNTED]
    in_effect = [key for key in changed if key not in no_effect]
    lines = [f'changed since the checkpoint: {join_changes(in_effect)}'] if in_effect else []
    if no_effect:
        lines.append('changed without effect, because a resumed run keeps the values of its checkpoint: '
                     + join_changes(no_effect))
    if position and (moved := [key for key in moved if key not in no_effect]):
        lines.append(f'data: {join_changes(moved)}: this epoch continues at its sample {position:,} in another order: '
                     'some samples may come twice, and others not at all')
    in_duration = any(str(now.get(key)).endswith('dur') for key in ('scheduler.t_warmup', 'scheduler.t_max'))
    return SettingChanges(lines, any(key.startswith('scheduler.') or key == 'max_duration' and in_duration
                                     for key in changed))


def _moves_samples(key: str, now: Mapping[str, Any], resumes_by_samples: bool) -> bool:
    """Returns whether another value of this setting changes which samples come next in an epoch."""
    last = key.rpartition('.')[2]
    if key in ('global_train_batch_size', 'devices', 'nodes'):
        by_stream = now.get('train_loader.dataset.batching_method', 'random') != 'random'
        return not resumes_by_samples or by_stream and key == 'global_train_batch_size'
    return (key.startswith('train_loader.') and last not in KEEP_ORDER
            and not (resumes_by_samples and last in KEEP_ORDER_IF_COUNTED))
