"""The modules of the kit. With this file `src` is a regular package: Python takes no other package of that name.

What has to happen before anything else is imported happens here, and nowhere else: Composer, torch and streaming read
variables of the environment when they are imported, and a fork may come at any time.
"""

import os

from src.common import machine, workers
from src.ranks import environment

machine.prepare_environment()
environment.fill_node_rank()
os.register_at_fork(before=workers.let_threads_settle)
