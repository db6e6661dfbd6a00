"""A bar for what takes long."""

import os
from typing import Optional

from tqdm import tqdm


def progress(what: str, total: Optional[float] = None, unit: str = 'B', delay: float = 0) -> tqdm:
    """A bar on stderr, of rank 0 alone, where that is a terminal; nothing is left of it in the end.

    Args:
        what: Is being done.
        total: In units; None: nobody knows.
        unit: What `update` counts.
        delay: Seconds in which it may be over without a bar.
    """
    tqdm.monitor_interval = 0  # no thread, whose lock a fork could copy
    return tqdm(desc=what, total=total, unit=unit, unit_scale=True, leave=False, delay=delay,
                disable=None if os.environ.get('RANK', '0') == '0' else True)
