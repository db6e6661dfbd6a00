"""Checks settings of the schedule, the devices and the output that are impossible together or on this machine."""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Optional

from src.common.errors import UserError
from src.common.machine import find_unwritable_folder
from src.config.derived import device_batch_size, run_name
from src.config.schema import TIME, Config

SAME_ON_ALL_RANKS = ('run_name', 'world_size', 'local_world_size')
OWN_SETTINGS = {  # no other optimizer or schedule has these
    ('optimizer', 'muon'): ('momentum', 'cautious'),
    ('scheduler', 'warmup_stable_decay'): ('cooldown', 'cooldown_shape')}
FIELDS_OF_NAMES = {  # the words that may stand in braces in these settings
    'save_folder': SAME_ON_ALL_RANKS, 'loggers.file.filename': (*SAME_ON_ALL_RANKS, 'rank', 'local_rank', 'node_rank')}


def schedule_errors(c: Config, packed: bool) -> Iterator[str]:
    """One line for each mistake in times. `packed`: text is packed on the fly, so the length of an epoch is unknown."""
    times = (c.max_duration, c.scheduler.t_warmup, c.scheduler.t_max)
    (run, unit), *others = ((float(m[1]), m[2]) for m in map(TIME.match, times) if m)
    comparable = {unit, 'dur', *(('ba', 'ep') if unit in ('ba', 'ep') and not packed else ())}
    if unit == 'dur':
        yield f'max_duration: {c.max_duration!r} would be a fraction of the run itself; use ba, tok, sp or ep'
    elif unit == 'ep' and packed:
        yield (f"max_duration: {c.max_duration!r}: with group_method 'concat' the number of batches in an epoch is not "
               'known; set batches (ba) or tokens (tok)')
    elif not {other for _, other in others} <= comparable:
        yield (f'scheduler.t_warmup: {c.scheduler.t_warmup!r} and max_duration {c.max_duration!r} must have the same '
               f'unit; set t_warmup (and t_max) in {unit}, or as a fraction such as 0.02dur')
    else:
        yield from _scheduler_errors(c, {unit: 1, 'dur': run})
    if c.scheduler.name == 'warmup_stable_decay' and c.scheduler.t_max != '1dur':
        yield (f"scheduler.t_max: {c.scheduler.t_max!r} has no effect with scheduler.name 'warmup_stable_decay', whose "
               'cool-down ends with the run; remove t_max')
    for key in ('max_duration', 'eval_interval', 'save_interval'):
        amount = TIME.match(getattr(c, key))
        if amount and not float(amount[1]):
            yield f'{key}: {getattr(c, key)!r} must be greater than 0'


def check_warmup(c: Config, epoch: Optional[int]) -> None:
    """Compares the scheduler's times with the run where one is in epochs and the other in batches.

    `epoch` is the number of batches in an epoch; None where the training loader has no length. Raises UserError where
    the warm-up is not shorter than the run or ends after the cool-down begins, or t_max is shorter than the run.
    """
    for error in _scheduler_errors(c, {'ba': 1, 'ep': math.nan if epoch is None else epoch}):
        raise UserError(error)


def _scheduler_errors(c: Config, units: Mapping[str, float]) -> Iterator[str]:
    """A warm-up that is too long, a t_max that is too short. `units` has the length of each unit that is known."""
    times = map(TIME.match, (c.scheduler.t_warmup, c.scheduler.t_max, c.max_duration))
    warmup, t_max, run = (float(m[1]) * units.get(m[2], math.nan) for m in times if m)
    if warmup >= run:
        yield (f'scheduler.t_warmup: {c.scheduler.t_warmup!r} is not shorter than the run (max_duration '
               f'{c.max_duration!r}); the run would end before the learning rate reaches its peak; set a shorter '
               'warm-up, such as scheduler.t_warmup=0.1dur')
    elif c.scheduler.name == 'warmup_stable_decay' and round(warmup / run + c.scheduler.cooldown, 9) > 1:
        yield (f'scheduler.t_warmup: {c.scheduler.t_warmup!r} ends after the cool-down begins, the last '
               f'{c.scheduler.cooldown} of max_duration {c.max_duration!r}; set a shorter warm-up, such as '
               'scheduler.t_warmup=0.1dur, or a smaller scheduler.cooldown')
    if t_max < run:
        yield (f'scheduler.t_max: {c.scheduler.t_max!r} must be at least max_duration {c.max_duration!r}; set '
               'scheduler.t_max=1dur')


def machine_errors(c: Config, world_size: int, has_gpu: bool) -> Iterator[str]:
    """One line for each mistake in settings of devices, batches, callbacks and checkpoints."""
    micro = c.device_train_microbatch_size
    if micro == 'auto' and not has_gpu:
        yield "device_train_microbatch_size: 'auto' needs a GPU, whose memory it fills; set a number"
    elif micro != 'auto' and micro <= 0:
        yield f"device_train_microbatch_size: {micro} must be greater than 0, or 'auto' on a GPU"
    if not has_gpu and c.precision not in ('auto', 'fp32'):
        yield f'precision: {c.precision!r} needs a GPU; on a CPU set auto or fp32'
    try:
        device_batch_size(c.global_train_batch_size, world_size)
    except UserError as e:
        yield str(e)
    if len(c.optimizer.betas) != 2 or not all(0 <= b < 1 for b in c.optimizer.betas):
        yield f'optimizer.betas: {c.optimizer.betas} must be two numbers, each at least 0 and below 1'
    yield from _unused_errors(c)
    yield from _plugin_errors(c, has_gpu)
    if c.load_weights_only and c.load_path is None:
        yield 'load_weights_only: true has no effect without load_path; set load_path too'
    yield from _saving_errors(c)


def _unused_errors(c: Config) -> Iterator[str]:
    """Settings of one optimizer or schedule, where the config has another."""
    for (name, owner), keys in OWN_SETTINGS.items():
        section = getattr(c, name)
        for key in keys if section.name != owner else ():
            value, default = getattr(section, key), type(section).model_fields[key].default
            if value != default:
                shown = str(value).lower() if isinstance(value, bool) else repr(value)
                yield (f'{name}.{key}: {shown} works only with {name}.name={owner}, but that is {section.name!r}; set '
                       f'{name}.name={owner}, or remove {key}')


def _plugin_errors(c: Config, has_gpu: bool) -> Iterator[str]:
    chosen = {name for name, kwargs in c.callbacks.items() if kwargs is not False}
    if c.tokenizer is None and 'text_samples' in chosen:
        yield 'callbacks.text_samples: needs a tokenizer, but tokenizer is null; set callbacks.text_samples=false'
    if not has_gpu:
        yield from (f'callbacks.{name}: needs a GPU, because it records GPU memory; set callbacks.{name}=false'
                    for name in ('memory_snapshot', 'oom_observer') if name in chosen)
    elif {'memory_snapshot', 'oom_observer'} <= chosen:
        yield ('callbacks.oom_observer: records nothing after callbacks.memory_snapshot has ended; set one of the two '
               'to false')
    if 'profiler' in chosen and c.device_train_microbatch_size == 'auto':
        yield ("callbacks.profiler: does not work with device_train_microbatch_size: 'auto'; set a number, or "
               'callbacks.profiler=false')
    ema = c.algorithms.get('ema') or {}
    if ema.get('half_life', '') is None and not ema.get('update_interval'):
        yield 'algorithms.ema.update_interval: missing; it has no default without half_life; set a time, such as 1ba'


def _saving_errors(c: Config) -> Iterator[str]:
    if c.autoresume and (c.save_folder is None or run_name(c) is None):
        yield 'autoresume: true needs save_folder and run_name, so that a later start finds the checkpoints'
    keep, folder = c.save_num_checkpoints_to_keep, c.save_folder or ''
    if keep == 0:
        yield 'save_num_checkpoints_to_keep: 0 would keep none; set 1 or more, or -1 for all'
    elif keep > 0 and '://' in folder and not folder.startswith('s3://'):
        yield (f'save_num_checkpoints_to_keep: {keep} works only on disks and on s3://; for {folder} set -1, which '
               'keeps all checkpoints')
    paths = {'save_folder': c.save_folder, 'load_path': c.load_path, **{
        f'loggers.{name}.{key}': str(kwargs[key]) for name, kwargs in c.loggers.items() if kwargs
        for key in ('log_dir', 'filename') if kwargs.get(key)}}
    for key, text in paths.items():
        if text:
            yield from _path_errors(key, text)
    for key, fields in FIELDS_OF_NAMES.items():
        text = paths.get(key) or ''
        if set(re.sub(rf'{{({"|".join(fields)})(:[^}}]*)?}}', '', text)) & set('{}'):
            yield (f'{key}: {text!r} has braces, but only these words may stand in braces: {", ".join(fields)}; write '
                   'one of them, as in {run_name}, or no braces')
    if set(run_name(c) or '') & set('{}'):
        yield (f'run_name: {run_name(c)!r} has braces, which have a meaning in names of files; remove them (the name '
               'may come from $COMPOSER_RUN_NAME)')


def _path_errors(key: str, text: str) -> Iterator[str]:
    """Paths that would become a folder with an unexpected name: none, $HOME/..., s3:/..."""
    if text.lower() in ('none', 'null', 'false', 'off', 'no'):
        yield f'{key}: {text!r} would be a file or folder of this name; write {key}=null for none, or ./{text}'
    elif re.search(r'^~|\$[A-Za-z_{(]', text):
        yield (f'{key}: {text!r} would keep its $ or ~, because no shell replaces them here; write '
               '${oc.env:HOME}/..., or the whole path')
    elif re.match(r'[a-z][a-z0-9]+:/(?!/)', text):
        yield f'{key}: {text!r} would be a folder on the disk; write an address with two slashes, as in s3://bucket/x'


def check_save_folder(c: Config) -> None:
    """Refuses a folder on this disk that cannot be created or written."""
    from composer.utils import format_name_with_dist  # not at the top: the import takes seconds

    if c.save_folder is None or '://' in c.save_folder:
        return
    name = run_name(c)
    folder = format_name_with_dist(c.save_folder, name) if name else c.save_folder.split('{')[0]
    if blocked := find_unwritable_folder(folder):
        raise UserError(f'save_folder: {c.save_folder} cannot be created or written: {blocked} is not a folder that '
                        'this user may write to; correct its permissions, or set another save_folder')


def check_early_stopper(c: Config, metrics: Mapping[str, Collection[str]]) -> None:
    """Refuses a metric or loader that does not exist; early_stopper would fail at its first check, or never check.

    `metrics` has the names of the metrics for each loader.
    """
    stopper = c.callbacks.get('early_stopper') or {}
    monitored = metrics.get(str(stopper.get('dataloader_label')), ())
    for key, known in (('dataloader_label', metrics), ('monitor', monitored)):
        if key in stopper and stopper[key] not in known:
            raise UserError(f'callbacks.early_stopper.{key}: {stopper[key]!r} is not one of '
                            f'{", ".join(map(repr, known))}')
