"""A bar for what takes long."""

import os
from typing import Optional

from tqdm import tqdm


def progress(what: str, total: Optional[float] = None, unit: str = 'B', delay: float = 0) -> tqdm:
    """A bar on stderr, of rank 0 alone, where that is a terminal; nothing is left of it in the end.

    `total` is in units, None where nobody knows it; `unit` is what `update` counts. What is over within `delay` seconds
    has no bar.
    """
    tqdm.monitor_interval = 0  # no thread, whose lock a fork could copy
    return tqdm(desc=what, total=total, unit=unit, unit_scale=True, leave=False, delay=delay,
                disable=None if os.environ.get('RANK', '0') == '0' else True)
