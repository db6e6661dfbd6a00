"""The numbers of a picture of losses: how far a run had come, its loss smoothed, and the lowest that runs reach."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from src.common.errors import UserError
from src.tools.run_logs import DEVICES, EVAL, SAMPLES, SECONDS, TOKENS, TRAIN, Run

PER_DAY = {'seconds': 86400, 'minutes': 1440, 'hours': 24, 'days': 1}
Array = NDArray[np.float64]


class Curve(NamedTuple):
    """Loss against x, of training smoothed and not."""

    x: Array
    raw: Array
    smooth: Array
    eval_x: Array
    eval_loss: Array


def positions(run: Run, x: str) -> dict[int, float]:
    """How far a run had come when each batch began: the batches before it.

    Args:
        run: Its logs.
        x: `tokens` that were trained on; `flops`, those of all tokens, padding too, as in src/common/flops.py; `device-days` of
            training, without evaluation.

    Raises:
        UserError: The logs do not say.
    """
    def needed(values: Any, what: str, mend: str) -> Any:
        if not values:
            raise UserError(f'{run.name}: its logs have no {what}, so --x {x} cannot be drawn; {mend}')
        return values
    if x == 'tokens':
        return needed(run.scalars.get(TOKENS), TOKENS, 'log more batches')
    if x == 'flops':
        data = run.hparams.get('train_loader', {}).get('dataset', {})
        per_token = run.hparams.get('environment', {}).get('flops_per_token', 0) * data.get('max_seq_len', 0)
        needed(per_token, 'environment.flops_per_token', 'they are older than this figure: take --x tokens, or train again')
        return {batch: samples * per_token for batch, samples in run.scalars.get(SAMPLES, {}).items()}
    seconds = needed(run.scalars.get(SECONDS), SECONDS, 'train with callbacks.speed_monitor={}')
    starts = needed(run.scalars.get(DEVICES), DEVICES, 'they are older than this figure: take --x tokens, or train again')
    unit = ((run.hparams.get('callbacks') or {}).get('speed_monitor') or {}).get('time_unit', 'hours')
    days, total, before = {min(seconds) - 1: 0.0}, 0.0, 0.0
    for batch, time in seconds.items():  # at its end
        devices = next((n for start, n in reversed(starts.items()) if start < batch), next(iter(starts.values())))
        total += (time - before) / PER_DAY[unit] * devices
        days[batch], before = total, time
    return days


def smoothed(values: Array, n: int) -> Array:
    """The mean of the n finite values around each, of fewer at the ends; nan where there is none."""
    finite = np.isfinite(values)
    sums, counts = (np.concatenate([[0.0], np.cumsum(v)]) for v in (np.where(finite, values, 0), finite))
    at = np.arange(len(values))
    low, high = np.maximum(at - (n - 1) // 2, 0), np.minimum(at + n // 2 + 1, len(values))
    count = counts[high] - counts[low]
    return np.where(count > 0, (sums[high] - sums[low]) / np.maximum(count, 1), np.nan)


def curve(run: Run, x: str = 'tokens', n: int = 1) -> Curve:
    """What is drawn of a run.

    Raises:
        UserError: No loss is finite, or the logs do not have x.
    """
    at, losses = positions(run, x), run.scalars[TRAIN]
    batches = sorted(losses.keys() & at.keys())
    raw = np.array([losses[batch] for batch in batches], float)
    if not np.isfinite(raw).any():
        raise UserError(f'{run.name}: none of its {len(losses)} training losses is a finite number beside a value of --x {x}')
    last, evals = max(at), run.scalars.get(EVAL, {})
    rate = at[last] / max(last, 1)  # for an evaluation after the last value
    return Curve(np.array([at[batch] for batch in batches], float), raw, smoothed(raw, n),
                 np.array([at.get(batch, batch * rate) for batch in evals], float), np.array(list(evals.values()), float))


def envelope(curves: list[Curve]) -> tuple[Array, Array]:
    """The lowest smoothed training loss that any run has reached with so much compute, at each point where it falls."""
    x, loss = (np.concatenate([getattr(c, key) for c in curves]) for key in ('x', 'smooth'))
    order = np.lexsort((loss, x))
    order = order[np.isfinite(loss[order])]
    lowest = np.minimum.accumulate(loss[order])
    falls = np.concatenate([[True], lowest[1:] < lowest[:-1]])
    return x[order][falls], lowest[falls]
