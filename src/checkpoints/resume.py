"""A run that goes on with other settings than its checkpoint's: what takes effect, what is refused, what is said."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from composer.utils import dist

from src.checkpoints.start import Start
from src.common.errors import UserError
from src.config import load as config
from src.config.schema import Config

# Sections of the config that change nothing of the training.
ELSEWHERE = {'run_name', 'save_folder', 'load_path', 'load_weights_only', 'trust_checkpoint', 'autoresume', 'callbacks',
             'loggers', 'progress_bar', 'log_to_console', 'console_log_interval', 'log_traces'}
# They are of a run's beginning, or a checkpoint brings its own.
AT_THE_START = {'seed', 'eval_first', 'model.init_seed', 'model.init_std', 'model.pretrained'}
# Keys of `train_loader` on which the order of its samples does not depend.
NO_ORDER = {'remote', 'pin_memory', 'prefetch_factor', 'persistent_workers', 'timeout', 'drop_last', 'eval_samples',
            'predownload', 'cache_limit', 'download_retry', 'download_timeout', 'validate_hash', 'keep_zip'}
# On these neither, where the dataset counts its samples. It then keeps the checkpoint's values of the second set.
NO_ORDER_OF_COUNTED = {'num_workers', 'max_seq_len', 'tokenizer_name', 'sequence_ids'}
KEPT_BY_COUNTED = {'train_loader.dataset.shuffle_seed', 'train_loader.dataset.num_canonical_nodes'}

UNKNOWN = ('changed since the checkpoint: not known, for no manifest says what settings its run had. Data that is '
           'packed on the fly goes on at the right place only with the same batch size, devices, workers and data')
MOVED = ('{} lies within an epoch whose place is a number of batches, as where text is packed on the fly. These '
         'settings change the samples of a batch, so some would come twice and others not at all: {}. Go on with the '
         "values that the checkpoint's run had, or start a new run from its weights: load_path=FILE "
         'load_weights_only=true. With packed tokens (convert_c4.py --concat_tokens) a run can go on with another '
         'batch size, other devices and other workers')


def run_settings(c: Config, data: Mapping[str, str]) -> dict[str, Any]:
    """What a manifest says of its run, for a later run to compare with: dotted keys to JSON values, secrets masked.

    `data` holds the digests of the data sets, by the setting that names each.
    """
    world_size = dist.get_world_size()
    return {**config.flatten_masked(c), 'devices': world_size, 'nodes': world_size // dist.get_local_world_size(),
            **data}


class SettingChanges(NamedTuple):
    """What a resumed run has changed since its checkpoint."""

    lines: list[str]  # for the plan
    schedule: bool  # whether the learning rate has another schedule


def compare_settings(start: Start, now: Mapping[str, Any], counts_samples: bool) -> SettingChanges:
    """Compares a run's settings, from `run_settings`, with those of the checkpoint that it goes on from.

    `counts_samples` says whether the training set goes on from a number of samples. Otherwise Composer goes on from a
    number of batches: it reads the epoch again, and drops the batches that were trained on. Raises UserError where the
    checkpoint is within an epoch, and its number of batches is another place in this run's epoch.
    """
    if start.kind != 'resume':
        return SettingChanges([], False)
    if start.manifest is None or not start.manifest.settings:
        return SettingChanges([UNKNOWN], False)
    then, place = start.manifest.settings, start.manifest.sample_in_epoch
    changed = {}
    for key in [*now, *(then.keys() - now.keys())]:
        before, after = (settings.get(key, 'unset') for settings in (then, now))
        if before != after and key.split('.')[0] not in ELSEWHERE:
            changed[key] = f'{key} {before} → {after}'

    def listed(keys: Iterable[str]) -> str:
        return ', '.join(changed[key] for key in keys)

    moved = [key for key in changed if key in then and key in now and _moves_samples(key, now, counts_samples)]
    if moved and place and not counts_samples:
        raise UserError(MOVED.format(f'{start.setting}: {start.path}', listed(moved)))
    no_effect = [key for key in changed if key in AT_THE_START or counts_samples and key in KEPT_BY_COUNTED]
    in_effect = [key for key in changed if key not in no_effect]
    lines = [f'changed since the checkpoint: {listed(in_effect)}'] if in_effect else []
    if no_effect:
        lines.append('changed without effect, since a resumed run keeps what its checkpoint has: ' + listed(no_effect))
    if place and (moved := [key for key in moved if key not in no_effect]):
        lines.append(f'data: {listed(moved)}: this epoch goes on at its sample {place:,} in another order: it may '
                     'repeat samples and leave out some')
    in_duration = any(str(now.get(key)).endswith('dur') for key in ('scheduler.t_warmup', 'scheduler.t_max'))
    return SettingChanges(lines, any(key.startswith('scheduler.') or key == 'max_duration' and in_duration
                                     for key in changed))


def _moves_samples(key: str, now: Mapping[str, Any], counts_samples: bool) -> bool:
    """Whether the order of an epoch's samples depends on this setting."""
    last = key.rpartition('.')[2]
    if key in ('global_train_batch_size', 'devices', 'nodes'):
        by_stream = now.get('train_loader.dataset.batching_method', 'random') != 'random'
        return not counts_samples or by_stream and key == 'global_train_batch_size'
    return (key.startswith('train_loader.') and last not in NO_ORDER
            and not (counts_samples and last in NO_ORDER_OF_COUNTED))
