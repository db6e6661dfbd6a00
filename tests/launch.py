"""Runs `main.py` through the Composer launcher, as a user does, and reads the console."""

import json
import re
import socket
import subprocess
from pathlib import Path
from typing import Any

import torch
from warm import ROOT, SCRIPTS, Popen, clean_env, run  # noqa: F401


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def composer(yaml: str, *overrides: str, ranks: int = 1, timeout: float = 300, **env: str) -> subprocess.CompletedProcess:
    """`composer -n RANKS main.py YAML overrides...` in the repository's root."""
    command = [str(SCRIPTS / 'composer'), '-n', str(ranks), '--master_port', str(free_port()), 'main.py', yaml, *overrides]
    return run(command, cwd=ROOT, env=clean_env(**env), timeout=timeout)


def ranks(n: int, runs: dict[str, list[str]], folder: Path, **env: str) -> dict[str, dict[str, Any]]:
    """Runs main.py several times, by name, in N real ranks; returns the `runs.record` of each run."""
    file = folder / f'runs-{n}.json'
    file.write_text(json.dumps(list(runs.items())))
    command = [str(SCRIPTS / 'composer'), '-n', str(n), '--master_port', str(free_port()), 'tests/runs.py', str(file)]
    result = run(command, cwd=ROOT, env=clean_env(**env), timeout=500)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
    return {name: torch.load(folder / f'{name}.pt', weights_only=True) for name in runs}


def tiny(mds_root: Path, *overrides: str) -> list[str]:
    """Overrides that turn the quick start into a run of seconds on the tests' data."""
    quiet = [] if any(o.startswith('loggers.tensorboard') for o in overrides) else ['loggers.tensorboard=false']
    return [f'data_remote={mds_root}', *quiet, 'max_seq_len=32', 'model.d_model=16', 'model.n_heads=2', 'model.n_layers=2',
            'model.vocab_size=512', 'train_loader.dataset.group_method=truncate', 'train_loader.dataset.num_canonical_nodes=1',
            'global_train_batch_size=12', 'device_train_microbatch_size=12', 'device_eval_batch_size=8', 'eval_samples=31',
            'max_duration=20ba', 'eval_interval=10ba', 'scheduler.t_warmup=5ba', 'save_folder=null', 'console_log_interval=1ba',
            *overrides]


def console(text: str) -> dict[str, dict[int, str]]:
    """Training values on the console: {name: {batch: printed value}}."""
    values: dict[str, dict[int, str]] = {}
    batch = 0
    for line in text.splitlines():
        if match := re.match(r'\[batch=(\d+)/\d+\]', line):
            batch = int(match[1])
        elif match := re.match(r'\s+Train (\S+): (\S+)$', line):
            values.setdefault(match[1], {})[batch] = match[2]
    return values
