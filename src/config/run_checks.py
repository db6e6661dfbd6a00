"""Settings of the schedule, the devices and the places of output that are impossible together, or on this machine."""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Optional

from src.common.errors import UserError
from src.common.machine import find_unwritable_folder
from src.config.derived import device_batch_size, run_name
from src.config.schema import TIME, Config

SAME_ON_ALL = ('run_name', 'world_size', 'local_world_size')
FIELDS = {'save_folder': SAME_ON_ALL, 'loggers.file.filename': (*SAME_ON_ALL, 'rank', 'local_rank', 'node_rank')}


def schedule_errors(c: Config, packed: bool) -> Iterator[str]:
    """One line for each mistake in durations. Where text is `packed` on the fly, nobody knows how long an epoch is."""
    times = (c.max_duration, c.scheduler.t_warmup, c.scheduler.t_max)
    (run, unit), *others = ((float(m[1]), m[2]) for m in map(TIME.match, times) if m)
    alike = {unit, 'dur', *(('ba', 'ep') if unit in ('ba', 'ep') and not packed else ())}
    if unit == 'dur':
        yield f'max_duration: {c.max_duration!r} is a fraction of itself; use ba, tok, sp or ep'
    elif unit == 'ep' and packed:
        yield (f"max_duration: {c.max_duration!r}: with group_method 'concat' an epoch has no length to schedule by; "
               'give batches (ba) or tokens (tok)')
    elif not {other for _, other in others} <= alike:
        yield (f'scheduler.t_warmup: {c.scheduler.t_warmup!r} and max_duration {c.max_duration!r} must have one unit; '
               f'give t_warmup (and t_max) in {unit}, or as a fraction such as 0.02dur')
    else:
        yield from _misfits(c, {unit: 1, 'dur': run})
    for key in ('max_duration', 'eval_interval', 'save_interval'):
        amount = TIME.match(getattr(c, key))
        if amount and not float(amount[1]):
            yield f'{key}: {getattr(c, key)!r} must be greater than 0'


def check_warmup(c: Config, epoch: Optional[int]) -> None:
    """Refuses a warm-up in epochs or batches that is not shorter than a run in the other unit, and a t_max that is.

    `epoch` is the number of batches in one; None where the training loader has no length.
    """
    for error in _misfits(c, {'ba': 1, 'ep': math.nan if epoch is None else epoch}):
        raise UserError(error)


def _misfits(c: Config, units: Mapping[str, float]) -> Iterator[str]:
    """Times of the scheduler that do not go with the run's; `units` has the length of each unit that is known."""
    times = map(TIME.match, (c.scheduler.t_warmup, c.scheduler.t_max, c.max_duration))
    warmup, t_max, run = (float(m[1]) * units.get(m[2], math.nan) for m in times if m)
    if warmup >= run:
        yield (f'scheduler.t_warmup: {c.scheduler.t_warmup!r} is not shorter than the run (max_duration '
               f'{c.max_duration!r}), which would end before the learning rate reaches its peak; set a shorter one, '
               'such as scheduler.t_warmup=0.1dur')
    if t_max < run:
        yield f'scheduler.t_max: {c.scheduler.t_max!r} must be at least max_duration {c.max_duration!r}, or 1dur'


def machine_errors(c: Config, world_size: int, has_gpu: bool) -> Iterator[str]:
    """One line for each mistake in the use of devices and in what the run writes."""
    micro = c.device_train_microbatch_size
    if micro == 'auto' and not has_gpu:
        yield "device_train_microbatch_size: 'auto' needs a GPU (it searches for what fits); set a number"
    elif micro != 'auto' and micro <= 0:
        yield f"device_train_microbatch_size: {micro} must be greater than 0, or 'auto' on a GPU"
    if not has_gpu and c.precision not in ('auto', 'fp32'):
        yield f'precision: {c.precision!r} needs a GPU; on a CPU set auto or fp32'
    try:
        device_batch_size(c.global_train_batch_size, world_size)
    except UserError as e:
        yield str(e)
    if len(c.optimizer.betas) != 2 or not all(0 <= b < 1 for b in c.optimizer.betas):
        yield f'optimizer.betas: {c.optimizer.betas} must be two numbers from 0 up to, not including, 1'
    yield from _plugin_errors(c, has_gpu)
    if c.load_weights_only and c.load_path is None:
        yield 'load_weights_only: true does nothing without load_path'
    yield from _saving_errors(c)


def _plugin_errors(c: Config, has_gpu: bool) -> Iterator[str]:
    chosen = {name for name, kwargs in c.callbacks.items() if kwargs is not False}
    if c.tokenizer is None and 'text_samples' in chosen:
        yield 'callbacks.text_samples: writes with the tokenizer, which is null; set callbacks.text_samples=false'
    if not has_gpu:
        yield from (f'callbacks.{name}: needs a GPU, whose memory it records; set callbacks.{name}=false'
                    for name in ('memory_snapshot', 'oom_observer') if name in chosen)
    elif {'memory_snapshot', 'oom_observer'} <= chosen:
        yield ('callbacks.oom_observer: remembers nothing once callbacks.memory_snapshot has ended; set one of them to '
               'false')
    if 'profiler' in chosen and c.device_train_microbatch_size == 'auto':
        yield ("callbacks.profiler: does not go with device_train_microbatch_size: 'auto'; set a number, or "
               'callbacks.profiler=false')
    ema = c.algorithms.get('ema') or {}
    if ema.get('half_life', '') is None and not ema.get('update_interval'):
        yield 'algorithms.ema.update_interval: missing; without half_life it has no default; set one, such as 1ba'


def _saving_errors(c: Config) -> Iterator[str]:
    if c.autoresume and (c.save_folder is None or run_name(c) is None):
        yield 'autoresume: true needs save_folder and run_name, so that a later start finds the checkpoints'
    keep, place = c.save_num_checkpoints_to_keep, c.save_folder or ''
    if keep == 0:
        yield 'save_num_checkpoints_to_keep: 0 would keep none; set 1 or more, or -1 for all'
    elif keep > 0 and '://' in place and not place.startswith('s3://'):
        yield (f'save_num_checkpoints_to_keep: {keep} works on disks and on s3://; for {place} set -1, which keeps all')
    places = {'save_folder': c.save_folder, 'load_path': c.load_path, **{
        f'loggers.{name}.{key}': str(kwargs[key]) for name, kwargs in c.loggers.items() if kwargs
        for key in ('log_dir', 'filename') if kwargs.get(key)}}
    for key, text in places.items():
        if text:
            yield from _place_errors(key, text)
    for key, fields in FIELDS.items():
        text = places.get(key) or ''
        if set(re.sub(rf'{{({"|".join(fields)})(:[^}}]*)?}}', '', text)) & set('{}'):
            yield (f'{key}: {text!r} has braces around something else than {", ".join(fields)}; write one of these, as '
                   'in {run_name}, or no braces')
    if set(run_name(c) or '') & set('{}'):
        yield (f'run_name: {run_name(c)!r} has braces, which stand for a field in the names of files; write it without '
               '(it may be of $COMPOSER_RUN_NAME)')


def _place_errors(key: str, text: str) -> Iterator[str]:
    """Names that no shell reads, and addresses that are none."""
    if text.lower() in ('none', 'null', 'false', 'off', 'no'):
        yield f'{key}: {text!r} would be a file or folder of this name; write {key}=null, or ./{text} if you mean it'
    elif re.search(r'^~|\$[A-Za-z_{(]', text):
        yield (f'{key}: {text!r} is read as it stands, for no shell expands it; write ${{oc.env:HOME}}/..., or the '
               'whole path')
    elif re.match(r'[a-z][a-z0-9]+:/(?!/)', text):
        yield f'{key}: {text!r} would be a folder on the disk; write an address with two slashes, as in s3://bucket/x'


def check_save_folder(c: Config) -> None:
    """Refuses a folder on this disk that cannot be made or written."""
    from composer.utils import format_name_with_dist  # here: it takes seconds

    if c.save_folder is None or '://' in c.save_folder:
        return
    name = run_name(c)
    folder = format_name_with_dist(c.save_folder, name) if name else c.save_folder.split('{')[0]
    if wrong := find_unwritable_folder(folder):
        raise UserError(f'save_folder: {c.save_folder} cannot be made or written: {wrong} is no folder that may be '
                        'written')


def check_early_stopper(c: Config, metrics: Mapping[str, Collection[str]]) -> None:
    """Refuses a metric or a loader that there is none of: the stopper would fail at its first look, or never look."""
    stopper = c.callbacks.get('early_stopper') or {}
    monitored = metrics.get(str(stopper.get('dataloader_label')), ())
    for key, known in (('dataloader_label', metrics), ('monitor', monitored)):
        if key in stopper and stopper[key] not in known:
            raise UserError(f'callbacks.early_stopper.{key}: {stopper[key]!r} is not one of '
                            f'{", ".join(map(repr, known))}')
