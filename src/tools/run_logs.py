"""What a run has logged, read back: from TensorBoard's files, or from the file logger's."""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from src.common.errors import UserError, first_line

TRAIN, EVAL, TOKENS, UNIGRAM = (
    'loss/train/total', 'metrics/eval/LanguageCrossEntropy', 'time/token', 'baseline/unigram_entropy')
SAMPLES, DEVICES, SECONDS = 'time/sample', 'trainer/devices', 'time/train'
HPARAMS = 'hyperparameters'
DAYS = {'seconds': 1 / 86400, 'minutes': 1 / 1440, 'hours': 1 / 24, 'days': 1}
OLD = 'they are older than this figure: take --x tokens, or train again'

Event = tuple[str, int, Any]  # name, batch, and a number or a dict of hyperparameters


class Run(NamedTuple):
    """One run, all its starts together."""

    name: str
    place: Path  # the folder of its logs, or the first of its log files
    scalars: dict[str, dict[int, float]]  # name to batch to value
    hparams: dict[str, Any]

    def positions(self, x: str) -> dict[int, float]:
        """How far the run had come when each batch began. Raises UserError where the logs do not say.

        `x` is `tokens` that were trained on; `flops`, those of all tokens, padding too, as in src/common/flops.py; or
        `device-days` of training, without evaluation.
        """
        if x == 'tokens':
            return self._needed(self.scalars.get(TOKENS), TOKENS, x, 'log more batches')
        if x == 'device-days':
            return self._device_days()
        data = self.hparams.get('train_loader', {}).get('dataset', {})
        per_token = self.hparams.get('environment', {}).get('flops_per_token', 0) * data.get('max_seq_len', 0)
        self._needed(per_token, 'environment.flops_per_token', x, OLD)
        return {batch: samples * per_token for batch, samples in self.scalars.get(SAMPLES, {}).items()}

    def _device_days(self) -> dict[int, float]:
        ends = self._needed(self.scalars.get(SECONDS), SECONDS, 'device-days', 'train with callbacks.speed_monitor={}')
        starts = self._needed(self.scalars.get(DEVICES), DEVICES, 'device-days', OLD)
        monitor = (self.hparams.get('callbacks') or {}).get('speed_monitor') or {}
        day = DAYS[monitor.get('time_unit', 'hours')]
        days, total, before = {min(ends) - 1: 0.0}, 0.0, 0.0
        for batch, time in ends.items():
            earlier = [start for start in starts if start < batch] or [min(starts)]
            total += (time - before) * day * starts[max(earlier)]
            days[batch], before = total, time
        return days

    def _needed(self, values: Any, what: str, x: str, mend: str) -> Any:
        if not values:
            raise UserError(f'{self.name}: its logs have no {what}, so --x {x} cannot be drawn; {mend}')
        return values


def read_run(path: str) -> Run:
    """One run's logs; TensorBoard's, where a folder has both kinds.

    `path` is a folder in or below which one run's logs lie, or one file of them. What a later start logged replaces
    what an earlier one did beyond the batch at which it began. Raises UserError where there is no such path, no log,
    more than one run, or no training loss.
    """
    root = Path(path).resolve()
    if not root.exists():
        raise UserError(f'{path}: no such file or folder; a run logs to loggers.tensorboard.log_dir or '
                        'loggers.file.filename')
    runs = _tensorboard_runs(root) or _log_runs(root)
    if not runs:
        raise UserError(f'{path}: holds no logs of TensorBoard or the file logger; train with '
                        'loggers.tensorboard.log_dir=./runs')
    if len(runs) > 1:
        raise UserError(f'{path}: holds {len(runs)} runs; name one or more of them: '
                        f'{", ".join(map(str, sorted(runs)[:4]))}')
    place, events = runs.popitem()
    scalars, hparams = _joined(events)
    if TRAIN not in scalars:
        raise UserError(f'{path}: has no {TRAIN}: the run has not logged a batch yet')
    return Run(place.name if place.is_dir() else place.stem, place, scalars, hparams)


def _joined(events: Iterable[Event]) -> tuple[dict[str, dict[int, float]], dict[str, Any]]:
    scalars: dict[str, dict[int, float]] = {}
    hparams: dict[str, Any] = {}
    for name, batch, value in events:
        if isinstance(value, dict):
            hparams.update(value)
            continue
        if name == DEVICES:  # the first that a start logs: what an earlier one did beyond is no part of this run
            for values in scalars.values():
                for later in [b for b in values if b > batch]:
                    del values[later]
        scalars.setdefault(name, {})[batch] = value
    return {name: dict(sorted(values.items())) for name, values in scalars.items()}, hparams


# ---------------------------------------------------------------- TensorBoard
def _tensorboard_runs(root: Path) -> dict[Path, Iterator[Event]]:
    if root.is_file():
        return {root: _tensorboard_events([root])} if 'tfevents' in root.name else {}
    folders = {file.parent for file in root.rglob('events.out.tfevents*')}
    # Below a run's folder lies one of Composer's own, for hyperparameters.
    return {folder: _tensorboard_events(folder.glob('*tfevents*'))
            for folder in folders if folder.parent not in folders}


def _tensorboard_events(files: Iterable[Path]) -> Iterator[Event]:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    events: list[tuple[float, Event]] = []
    for file in sorted(files):
        n = 0
        try:
            for event in EventFileLoader(str(file)).Load():
                n += 1
                for value in event.summary.value:
                    plugin, array = value.metadata.plugin_data.plugin_name, make_ndarray(value.tensor)
                    if plugin == 'scalars':
                        events.append((event.wall_time, (value.tag, event.step, float(array.item()))))
                    elif value.tag == f'{HPARAMS}/text_summary':
                        events.append((event.wall_time, (HPARAMS, event.step, json.loads(array.item()))))
            if not n and file.stat().st_size:
                raise ValueError('no whole record')
        except Exception as e:  # tensorboard has its own error classes with TensorFlow and without
            _cut_off(file, e, n)
    # Composer begins a file at every flush, and their names do not always sort as they were written.
    yield from (event for _, event in sorted(events, key=lambda timed: timed[0]))


def _cut_off(file: Path, error: Exception, n_read: int) -> None:
    """A run that is being written, or was killed, may end in the middle of a record; a file without any is no log."""
    if not n_read:
        raise UserError(f'{file}: cannot be read as a log: {type(error).__name__}: {first_line(error)}') from None
    print(f'{file}: cut off or damaged after {n_read} records: what follows is left out', file=sys.stderr)


# ---------------------------------------------------------------- the file logger

LINE = re.compile(r'\[(?P<kind>metric|hyperparameter)\](?:\[batch=(?P<batch>\d+)\])?: (?P<name>.+?): (?P<value>.*)')


def _log_runs(root: Path) -> dict[Path, Iterator[Event]]:
    """By the folder, if it holds one run, or by the file of the first start."""
    if root.is_file():
        found = [root] if _is_log(root, named=True) else []
    else:  # all ranks log the same
        found = [file for file in root.rglob('*') if _is_log(file) and not re.search(r'rank[1-9]', file.name)]
    runs = {}
    for first in {_first_start(file)[0] for file in found}:
        starts = [file for file in first.parent.iterdir()
                  if _first_start(file)[0] == first and _is_log(file, named=root.is_file())]
        runs[first] = _log_events(sorted(starts, key=lambda file: _first_start(file)[1]))
    return {root: next(iter(runs.values()))} if root.is_dir() and len(runs) == 1 else runs


def _is_log(file: Path, named: bool = False) -> bool:
    if not file.is_file():
        return False
    try:
        with open(file, 'rb') as opened:
            return re.match(rb'\[(metric|hyperparameter|table|trace|stdout|stderr)\]', opened.read(40)) is not None
    except OSError as e:
        if named:
            raise UserError(f'{file}: cannot be read: {e.strerror}') from None
        return False


def _first_start(file: Path) -> tuple[Path, int]:
    """The file of the run's first start, and the number of this one: log.2.txt is the second of log.txt."""
    match = re.fullmatch(r'(.+)\.(\d+)(\.[^.]*|)', file.name)
    if match and int(match[2]) > 1 and (first := file.with_name(match[1] + match[3])).exists():
        return first, int(match[2])
    return file, 1


def _log_events(files: list[Path]) -> Iterator[Event]:
    for file in files:
        with open(file, encoding='utf-8', errors='replace') as lines:
            for match in filter(None, map(LINE.match, lines)):
                with suppress(ValueError):  # a line that is being written
                    if match['kind'] == 'metric':
                        yield match['name'], int(match['batch'] or 0), float(match['value'])
                    else:
                        yield HPARAMS, 0, {match['name']: json.loads(match['value'])}
