"""The modules of the kit, and what must happen before all other imports.

Composer, torch and streaming read environment variables when they are imported, and a process may fork at any time. So
this file prepares both. It also makes `src` a regular package, which Python prefers to others of that name.
"""

import os

from src.common import machine, workers
from src.ranks import environment

machine.prepare_environment()
environment.fill_node_rank()
os.register_at_fork(before=workers.let_threads_settle)
