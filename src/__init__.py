"""Prepares the process before any module of the kit imports torch, Composer or streaming.

These libraries read environment variables when they are imported, and a process may fork at any time. This file also
makes `src` a regular package, which Python prefers to a namespace package of the same name.
"""

import os
import sys

from src.common import machine, workers
from src.ranks import environment

machine.prepare_environment()
environment.fill_node_rank()
sys.meta_path.insert(0, machine.SkipTorchao())
os.register_at_fork(before=workers.let_threads_settle)
