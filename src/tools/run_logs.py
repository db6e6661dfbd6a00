"""What runs have logged, read back into one form: TensorBoard's files, the file logger's, or W&B's offline ones."""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Optional

from src.common.errors import UserError, first_line

TRAIN, EVAL, TOKENS, UNIGRAM = 'loss/train/total', 'metrics/eval/LanguageCrossEntropy', 'time/token', 'baseline/unigram_entropy'
SAMPLES, DEVICES, SECONDS = 'time/sample', 'trainer/devices', 'time/train'
HPARAMS, TEXTS = 'hyperparameters', 'text_samples'  # the second is the table of callbacks.text_samples

# Name, batch and value: a number, a dict of hyperparameters, or a table as a list of rows
Event = tuple[str, int, Any]


class Run(NamedTuple):
    """One run, all its starts together."""

    name: str
    files: tuple[Path, ...]  # in the order of its starts, as far as that is known
    scalars: dict[str, dict[int, float]]  # name to batch to value
    hparams: dict[str, Any]
    samples: dict[int, list[dict[str, str]]]  # batch to rows of `prompt` and `text`


def read_run(path: str) -> Run:
    """One run's logs; of the kinds of logs that a folder has, the first of TensorBoard's, W&B's and the file logger's.

    What a later start logged replaces what an earlier one did beyond the batch at which it began.

    Args:
        path: A folder in or below which one run's logs lie, or one file of them.

    Raises:
        UserError: There is no such path, no log, more than one run, or no training loss.
    """
    path = str(Path(path).resolve()) if Path(path).is_symlink() else path  # such as W&B's latest-run
    if not Path(path).exists():
        raise UserError(f'{path}: no such file or folder; a run logs to loggers.tensorboard.log_dir or loggers.file.filename')
    kinds = ((_tensorboard_files, _tensorboard), (_wandb_files, _wandb), (_log_files, _log_file))
    found, read = next(((found, read) for find, read in kinds if (found := find(Path(path)))), ({}, None))
    if read is None:
        raise UserError(f'{path}: holds no logs of TensorBoard, W&B or the file logger; train with '
                        'loggers.tensorboard.log_dir=./runs')
    if len(found) > 1:
        raise UserError(f'{path}: holds {len(found)} runs; name one or more of them: {", ".join(sorted(found)[:4])}')
    name, files = found.popitem()
    scalars, hparams, samples = _joined(read(files))
    if TRAIN not in scalars:
        raise UserError(f'{path}: has no {TRAIN}: the run has not logged a batch yet')
    if read is _wandb:
        name = hparams.pop('name', name)
    elif read is _tensorboard or Path(path).is_dir():
        name = Path(name).resolve().name
    else:
        name = Path(name).stem
    return Run(name, tuple(files), scalars, hparams, samples)


def _joined(events: Iterable[Event]) -> tuple[dict[str, dict[int, float]], dict[str, Any], dict[int, list[dict[str, str]]]]:
    scalars: dict[str, dict[int, float]] = {}
    hparams: dict[str, Any] = {}
    samples: dict[int, list[dict[str, str]]] = {}
    for name, batch, value in events:
        if isinstance(value, dict):
            hparams.update(value)
            continue
        if name == DEVICES:  # the first that a start logs: what an earlier one did beyond is no part of this run
            for values in (*scalars.values(), samples):
                for later in [b for b in values if b > batch]:
                    del values[later]
        if isinstance(value, list):
            if name == TEXTS:
                samples[batch] = [{key: str(row.get(key, '')) for key in ('prompt', 'text')} for row in value]
        else:
            scalars.setdefault(name, {})[batch] = value
    return {name: dict(sorted(values.items())) for name, values in scalars.items()}, hparams, dict(sorted(samples.items()))


def _cut_off(file: Path, error: BaseException, n_read: int) -> None:
    """A run that is being written, or was killed, may end in the middle of a record; a file without any is no log."""
    if not n_read:
        raise UserError(f'{file}: cannot be read as a log: {type(error).__name__}: {first_line(error)}') from None
    print(f'{file}: cut off or damaged after {n_read} records: what follows is left out', file=sys.stderr)


# ---------------------------------------------------------------- TensorBoard


def _tensorboard_files(path: Path) -> dict[str, list[Path]]:
    files = [path] if path.is_file() and 'tfevents' in path.name else sorted(path.rglob('events.out.tfevents*'))
    folders = {file.parent for file in files}
    # Below a run's folder lies one of Composer's own, for hyperparameters.
    return {str(folder): [f for f in files if f.parent == folder] for folder in folders if folder.parent not in folders}


def _tensorboard(files: list[Path]) -> Iterator[Event]:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    events: list[tuple[float, Event]] = []
    for file in files:
        n = 0
        try:
            for event in EventFileLoader(str(file)).Load():
                n += 1
                for value in event.summary.value:
                    plugin, array = value.metadata.plugin_data.plugin_name, make_ndarray(value.tensor)
                    if plugin == 'scalars':
                        events.append((event.wall_time, (value.tag, event.step, float(array.item()))))
                    elif plugin == 'text' and value.tag.removesuffix('/text_summary') in (HPARAMS, TEXTS):
                        name = value.tag.removesuffix('/text_summary')
                        events.append((event.wall_time, (name, event.step, json.loads(array.item().decode()))))
        except Exception as e:  # tensorboard has its own error classes with TensorFlow and without
            _cut_off(file, e, n)
        if not n and file.stat().st_size:
            _cut_off(file, ValueError('no whole record'), n)
    # Composer begins a file at every flush, and their names do not always sort as they were written.
    yield from (event for _, event in sorted(events, key=lambda timed: timed[0]))


# ---------------------------------------------------------------- Weights & Biases


def _wandb_files(path: Path) -> dict[str, list[Path]]:
    if path.is_file():
        files = [path] if path.suffix == '.wandb' else []
    else:
        files = [file for file in path.rglob('run-*.wandb') if not file.parent.is_symlink()]
    runs: dict[str, list[Path]] = {}
    for file in files:  # each start has a folder of its own, named by its time, and the file has the name of the run
        starts = [start for start in file.parent.parent.glob(f'*run-*/{file.name}') if not start.parent.is_symlink()]
        runs[file.stem] = sorted({*starts, *runs.get(file.stem, [file])}, key=lambda start: start.parent.name)
    return runs


def _wandb(files: list[Path]) -> Iterator[Event]:
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]
    from wandb.sdk.internal.datastore import DataStore

    for file in files:
        store, n = DataStore(), 0
        try:
            store.open_for_scan(str(file))
            while (data := store.scan_data()) is not None:
                n += 1
                record = Record()
                record.ParseFromString(data)
                if record.HasField('run'):
                    yield HPARAMS, 0, {'name': record.run.display_name}
                updates = [*record.run.config.update, *record.config.update]
                yield HPARAMS, 0, {u.key: json.loads(u.value_json) for u in updates if u.key and u.key != '_wandb'}
                yield from _history(record.history, file.parent)
        except Exception as e:  # of its own checks it says AssertionError, or just Exception
            _cut_off(file, e, n)


def _history(history: Any, folder: Path) -> Iterator[Event]:
    batch = history.step.num
    for item in history.item:
        keys = list(item.nested_key) or [item.key]
        value = json.loads(item.value_json)
        if keys == [TEXTS, 'path']:
            with suppress(OSError):  # not copied along
                table = json.loads((folder / 'files/media/table' / Path(value).name).read_text('utf-8'))
                yield TEXTS, batch, [dict(zip(table['columns'], row)) for row in table['data']]
        elif keys[0][:1] != '_' and keys[0] != TEXTS and (number := _number(value)) is not None:
            yield '.'.join(keys), batch, number


def _number(value: Any) -> Optional[float]:
    """W&B and JSON have words for what is not finite."""
    with suppress(ValueError, TypeError):
        return None if isinstance(value, bool) else float(value)
    return None


# ---------------------------------------------------------------- the file logger

START = re.compile(r'(?P<stem>.+?)(\.(?P<start>\d+))?(?P<ending>\.[^.]*)?')  # log.txt, log.2.txt
LINE = re.compile(r'\[(?P<kind>metric|hyperparameter|table)\](?:\[batch=(?P<batch>\d+)\])?: (?P<name>.+?): (?P<value>.*)')


def _parts(file: Path) -> tuple[str, int]:
    """The file of the first start, if that is there, and the number of this one."""
    match = START.fullmatch(file.name)
    assert match
    first = file.with_name(match['stem'] + (match['ending'] or ''))
    start = int(match['start'] or 1)
    return (str(first), start) if start > 1 and first.exists() else (str(file), 1)


def _log_files(path: Path) -> dict[str, list[Path]]:
    near = path.parent.glob('*') if path.is_file() else path.rglob('*')
    runs: dict[str, list[tuple[int, Path]]] = {}
    for file in near:
        if file.is_file() and (path.is_dir() or _parts(file)[0] == _parts(path)[0]):
            try:
                with open(file, 'rb') as opened:
                    begins = opened.read(40)
            except OSError as e:
                if path.is_dir():
                    continue
                raise UserError(f'{file}: cannot be read: {e.strerror}') from None
            if re.match(rb'\[(metric|hyperparameter|table|trace|stdout|stderr)\]', begins):
                first, start = _parts(file)
                if path.is_file() or not re.search(r'rank[1-9]', file.name):  # all ranks log the same
                    runs.setdefault(first, []).append((start, file))
    if len(runs) == 1 and path.is_dir():
        runs = {str(path): next(iter(runs.values()))}
    return {first: [file for _, file in sorted(starts)] for first, starts in runs.items()}


def _log_file(files: list[Path]) -> Iterator[Event]:
    for file in files:
        with open(file, encoding='utf-8', errors='replace') as lines:
            for match in map(LINE.match, lines):
                if match is None:
                    continue
                with suppress(ValueError):  # a line that is being written, or of a logger that is not the kit's
                    value = float(match['value']) if match['kind'] == 'metric' else json.loads(match['value'])
                    name = match['name'] if match['kind'] != 'hyperparameter' else HPARAMS
                    yield name, int(match['batch'] or 0), {match['name']: value} if name == HPARAMS else value
