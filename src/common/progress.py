"""A progress bar for long work."""

import os
from typing import Optional

from tqdm import tqdm


def progress(what: str, total: Optional[float] = None, unit: str = 'B', delay: float = 0) -> tqdm:
    """Shows a bar on stderr, on rank 0 only, if stderr is a terminal. The bar disappears at the end.

    `total` counts units, None if unknown; `unit` names what `update` counts. Work that ends within `delay` seconds
    shows no bar.
    """
    tqdm.monitor_interval = 0  # no monitor thread: a fork could copy its lock in the locked state
    return tqdm(desc=what, total=total, unit=unit, unit_scale=True, leave=False, delay=delay,
                disable=None if os.environ.get('RANK', '0') == '0' else True)
