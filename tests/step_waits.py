"""Counts what a training step waits for: collectives, and reads of tensors on the host. `python tests/step_waits.py DATA`.

DATA is a folder that convert_c4.py made. For 1 and 2 ranks on CPUs, with packed tokens or padded text (whatever DATA holds), it
prints for each kind the mean number of a step. `--root DIR` measures another checkout. `--as_gpu` takes the code for GPUs, which
reads one step late; a console that prints every 1,000 batches reads nothing in the measured steps.

Collectives are all calls of torch.distributed from Python, by the kit, by Composer and by torchmetrics, without the reductions
of gradients by DDP and FSDP's own collectives. Reads are calls of `item`, `tolist`, `cpu`, `numpy` and conversions to Python
numbers, by the file and function that called, outside of the loader. `HOST` lists the two that read numbers on the host.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import Any

FIRST, LAST = 4, 12  # the measured batches
COLLECTIVES = ('all_reduce', 'broadcast', 'barrier', 'all_gather', 'all_gather_object', 'reduce',
               'gather', 'scatter', 'broadcast_object_list')
READS = ('item', 'tolist', 'cpu', 'numpy', '__bool__', '__int__', '__float__', '__index__', '__complex__', '__array__')
HOST = ('step_sums.py peek', 'trainer.py _count_over_ranks')


def caller() -> str:
    """The file and function of the kit, of Composer or of torchmetrics that is running; empty in a loader."""
    frame, found = sys._getframe(2), ''
    while frame is not None:
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_name
        if 'torch/utils/data' in str(path):
            return ''
        if not found and {'src', 'composer', 'torchmetrics', 'optim'} & set(path.parts):
            found = f'{path.name} {name}'
        frame = frame.f_back
    return found or 'other'


def count_calls(owner: Any, name: str, counts: Counter, label: str = '') -> None:
    call = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is threading.main_thread() and (who := caller()):
            counts[label or who] += 1
        return call(*args, **kwargs)

    setattr(owner, name, counted)


def measure(argv: list[str], as_gpu: bool) -> dict[str, dict[str, float]]:
    """Trains in this process; the mean numbers of a step, by kind and by name."""
    import torch
    from composer.core import Callback, State
    from composer.loggers import Logger

    import main
    from src.config import load
    from src.training import plugins

    if as_gpu:
        from src.callbacks import step_sums
        step_sums.reads_wait = lambda state: True
    counts = {'collectives': Counter(), 'reads': Counter()}
    seen: dict[int, dict[str, Counter]] = {}

    class Window(Callback):
        def before_dataloader(self, state: State, logger: Logger) -> None:
            seen[int(state.timestamp.batch)] = {kind: Counter(counter) for kind, counter in counts.items()}

    plugins.CALLBACKS['window'] = Window
    restored = [(torch.distributed, name, getattr(torch.distributed, name)) for name in COLLECTIVES]
    restored += [(torch.Tensor, name, getattr(torch.Tensor, name)) for name in READS]
    for name in COLLECTIVES:
        count_calls(torch.distributed, name, counts['collectives'])
    for name in READS:
        count_calls(torch.Tensor, name, counts['reads'])
    try:
        main.main(load.load(argv)).close()
    finally:
        for owner, name, call in restored:
            setattr(owner, name, call)
        del plugins.CALLBACKS['window']
    return {kind: {who: (n - seen[FIRST][kind][who]) / (LAST - FIRST) for who, n in seen[LAST][kind].items()
                   if n > seen[FIRST][kind][who]} for kind in counts}


def arguments(data: str) -> list[str]:
    """Arguments of main.py: the quick start, smaller, on the data in this folder."""
    return ['yamls/quickstart.yaml', f'data_remote={data}', 'max_seq_len=32', 'model.d_model=16', 'model.n_heads=2',
            'model.n_layers=2', 'train_loader.dataset.group_method=truncate', 'eval_loader=null', 'save_folder=null',
            f'max_duration={LAST + 1}ba', 'scheduler.t_warmup=2ba', 'global_train_batch_size=8', 'device_train_microbatch_size=2',
            'console_log_interval=1000ba', 'train_loader.num_workers=1', 'train_loader.prefetch_factor=2', 'callbacks.window={}',
            'loggers.tensorboard=false']


def launch(ranks: int, root: Path, flags: list[str]) -> dict[str, dict[str, float]]:
    """Measures in `ranks` processes; returns what rank 0 found."""
    from launch import clean_env, free_port

    env = {'WORLD_SIZE': str(ranks), 'LOCAL_WORLD_SIZE': str(ranks), 'NODE_RANK': '0', 'MASTER_ADDR': '127.0.0.1',
           'MASTER_PORT': str(free_port())}
    with tempfile.TemporaryDirectory() as logs:
        command = [sys.executable, __file__, *flags, '--root', str(root), '--logs', logs]
        processes = [subprocess.Popen(command, cwd=root, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                      env=clean_env(RANK=str(rank), LOCAL_RANK=str(rank), **env)) for rank in range(ranks)]
        try:
            outputs = [process.communicate(timeout=300) for process in processes]
        finally:
            for process in processes:
                process.kill()
    assert not any(process.returncode for process in processes), outputs
    return json.loads(outputs[0][0].splitlines()[-1])


def main_program() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('data', type=os.path.abspath)
    parser.add_argument('--root', type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument('--as_gpu', action='store_true')
    parser.add_argument('--set', nargs='*', default=[], help='more arguments of main.py')
    parser.add_argument('--logs', help=argparse.SUPPRESS)  # the folder of a rank's logs
    args = parser.parse_args()
    if args.logs:
        sys.path.insert(0, str(args.root))
        found = measure([*arguments(args.data), f'loggers.file.filename={args.logs}/log.txt', *args.set], args.as_gpu)
        from src.ranks import rendezvous
        rendezvous.leave()
        print(json.dumps(found))
        return
    flags = [args.data, *['--as_gpu'] * args.as_gpu, *(['--set', *args.set] if args.set else [])]
    for ranks in (1, 2):
        found = launch(ranks, args.root, flags)
        for kind, numbers in found.items():
            print(f'{ranks} rank{"s" * (ranks > 1)}: {sum(numbers.values()):g} {kind} a step')
            for who, number in sorted(numbers.items()):
                print(f'    {number:5g}  {who}{"  (on the host anyway)" * (who in HOST)}')


if __name__ == '__main__':
    main_program()
