"""Reads the logs of a run: TensorBoard's files, or those of the file logger."""

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
OLD_LOGS = 'an older version of the kit wrote them: use --x tokens, or train again'

Event = tuple[str, int, Any]  # name, batch, and a value: a number, or a dict of hyperparameters


class Run(NamedTuple):
    """The logs of one run, with all its starts joined."""

    name: str
    place: Path  # the folder of its logs, or the first of its log files
    scalars: dict[str, dict[int, float]]  # name → batch → value
    hparams: dict[str, Any]

    def positions(self, x: str) -> dict[int, float]:
        """The progress of the run at the start of each batch. Raises UserError if the logs do not contain it.

        `x` is `tokens` (targets trained on), `flops` (of all tokens, also padding, as in src/common/flops.py), or
        `device-days` (of training, without evaluation).
        """
        if x == 'tokens':
            return self._require(self.scalars.get(TOKENS), TOKENS, x, 'log more batches')
        if x == 'device-days':
            return self._device_days()
        data = self.hparams.get('train_loader', {}).get('dataset', {})
        per_token = self.hparams.get('environment', {}).get('flops_per_token', 0) * data.get('max_seq_len', 0)
        self._require(per_token, 'environment.flops_per_token', x, OLD_LOGS)
        return {batch: samples * per_token for batch, samples in self.scalars.get(SAMPLES, {}).items()}

    def _device_days(self) -> dict[int, float]:
        ends = self._require(self.scalars.get(SECONDS), SECONDS, 'device-days', 'train with callbacks.speed_monitor={}')
        starts = self._require(self.scalars.get(DEVICES), DEVICES, 'device-days', OLD_LOGS)
        monitor = (self.hparams.get('callbacks') or {}).get('speed_monitor') or {}
        day = DAYS[monitor.get('time_unit', 'hours')]
        days, total, before = {min(ends) - 1: 0.0}, 0.0, 0.0
        for batch, time in ends.items():
            earlier = [start for start in starts if start < batch] or [min(starts)]
            total += (time - before) * day * starts[max(earlier)]
            days[batch], before = total, time
        return days

    def _require(self, values: Any, key: str, x: str, remedy: str) -> Any:
        if not values:
            raise UserError(f'{self.name}: its logs have no {key}, which --x {x} needs; {remedy}')
        return values


def read_run(path: str) -> Run:
    """Reads the logs of one run; TensorBoard's, if a folder has both kinds.

    `path` is a folder that holds the logs of one run, at any depth, or one log file. If a run was
    started again at batch N, the values that its earlier start logged after batch N are dropped. Raises UserError
    where the path does not exist, or holds no log, several runs, or no training loss.
    """
    root = Path(path).resolve()
    if not root.exists():
        raise UserError(f'{path}: no such file or folder; look for the logs in loggers.tensorboard.log_dir or '
                        'loggers.file.filename of the run')
    runs = _tensorboard_runs(root) or _log_runs(root)
    if not runs:
        raise UserError(f'{path}: holds no logs of TensorBoard or the file logger; train with '
                        'loggers.tensorboard.log_dir=./runs')
    if len(runs) > 1:
        raise UserError(f'{path}: holds {len(runs)} runs; name one or more of them: '
                        f'{", ".join(map(str, sorted(runs)[:4]))}')
    place, events = runs.popitem()
    scalars, hparams = _join(events)
    if TRAIN not in scalars:
        raise UserError(f'{path}: has no {TRAIN}: the run has not logged a batch yet')
    return Run(place.name if place.is_dir() else place.stem, place, scalars, hparams)


def _join(events: Iterable[Event]) -> tuple[dict[str, dict[int, float]], dict[str, Any]]:
    scalars: dict[str, dict[int, float]] = {}
    hparams: dict[str, Any] = {}
    for name, batch, value in events:
        if isinstance(value, dict):
            hparams.update(value)
            continue
        if name == DEVICES:  # each start logs this key first; drop later batches of earlier starts
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
    # Composer writes hyperparameters to a folder below the run's folder.
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
        except Exception as e:  # the error classes depend on whether TensorFlow is installed
            _report_damage(file, e, n)
    # Composer starts a new file at every flush, and the file names do not always sort by time.
    yield from (event for _, event in sorted(events, key=lambda timed: timed[0]))


def _report_damage(file: Path, error: Exception, n_read: int) -> None:
    """Prints a warning; the log of a live or killed run may end within a record. A file without records is an error."""
    if not n_read:
        raise UserError(f'{file}: cannot be read as a log: {type(error).__name__}: {first_line(error)}') from None
    print(f'{file}: damaged or incomplete after {n_read} records; later records are left out', file=sys.stderr)


# ---------------------------------------------------------------- the file logger

LINE = re.compile(r'\[(?P<kind>metric|hyperparameter)\](?:\[batch=(?P<batch>\d+)\])?: (?P<name>.+?): (?P<value>.*)')


def _log_runs(root: Path) -> dict[Path, Iterator[Event]]:
    """The events of each run, by its folder if the folder holds one run, else by the log file of its first start."""
    if root.is_file():
        found = [root] if _is_log(root, must_be_readable=True) else []
    else:  # the logs of other ranks hold the same values
        found = [file for file in root.rglob('*') if _is_log(file) and not re.search(r'rank[1-9]', file.name)]
    runs = {}
    for first in {_first_start(file)[0] for file in found}:
        starts = [file for file in first.parent.iterdir()
                  if _first_start(file)[0] == first and _is_log(file, must_be_readable=root.is_file())]
        runs[first] = _log_events(sorted(starts, key=lambda file: _first_start(file)[1]))
    return {root: next(iter(runs.values()))} if root.is_dir() and len(runs) == 1 else runs


def _is_log(file: Path, must_be_readable: bool = False) -> bool:
    if not file.is_file():
        return False
    try:
        with open(file, 'rb') as opened:
            return re.match(rb'\[(metric|hyperparameter|table|trace|stdout|stderr)\]', opened.read(40)) is not None
    except OSError as e:
        if must_be_readable:
            raise UserError(f'{file}: cannot be read: {e.strerror}') from None
        return False


def _first_start(file: Path) -> tuple[Path, int]:
    """The log file of the run's first start, and the number of this start: 2 for log.2.txt, after log.txt."""
    match = re.fullmatch(r'(.+)\.(\d+)(\.[^.]*|)', file.name)
    if match and int(match[2]) > 1 and (first := file.with_name(match[1] + match[3])).exists():
        return first, int(match[2])
    return file, 1


def _log_events(files: list[Path]) -> Iterator[Event]:
    for file in files:
        with open(file, encoding='utf-8', errors='replace') as lines:
            for match in filter(None, map(LINE.match, lines)):
                with suppress(ValueError):  # an incomplete line
                    if match['kind'] == 'metric':
                        yield match['name'], int(match['batch'] or 0), float(match['value'])
                    else:
                        yield HPARAMS, 0, {match['name']: json.loads(match['value'])}
