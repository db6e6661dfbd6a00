"""Measures what a person waits for at the start: a mistake in the config, the loader's test, the first batch of a run.

    python tests/start_time.py [--against FOLDER] [--data FOLDER] [--repeat 5]

Each row is a command in a process of its own, and the median over the repetitions. All commands alternate, so that other
load on the machine meets all of them. `--against` names another checkout, whose commands alternate with those of this one.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Python runs this file at the start of each process. It prints a line when Composer's engine comes to the first batch.
MARKS = '''
import importlib.util, sys

class MarkBatches:
    def find_spec(self, name, path, target=None):
        if name != 'composer.core.engine':
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run_module = spec.loader.exec_module
        def exec_module(module):
            run_module(module)
            run_event = module.Engine.run_event
            def marked(engine, event):
                event = module.Event(event)
                if event in ('eval_batch_start', 'batch_start'):
                    print(f'mark {event.value}', flush=True)
                if event == 'batch_start':
                    raise KeyboardInterrupt
                return run_event(engine, event)
            module.Engine.run_event = marked
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, MarkBatches())
'''
COLUMNS = (('times', 'torch'), ('more than', 'streaming'), ('more than', 'composer'))
IMPORTS = ('torch', 'streaming', 'composer')
OURS = {  # name: (arguments of Python, lines of the output whose time counts; '' is the end of the process)
    'a misspelt key': (['main.py', 'yamls/quickstart.yaml', 'optimzer.lr=1'], ['']),
    'a wrong keyword of a callback': (['main.py', 'yamls/quickstart.yaml', 'callbacks.speed_monitor.windw=1'], ['']),
    'import main': (['-c', 'import main'], ['']),
    'the test of the loader, first batch': (['src/data_c4.py', '{data}'], ['batch 0']),
    'the quick start': (['main.py', 'yamls/quickstart.yaml', 'data_remote={data}', 'save_folder=null',
                         'loggers.tensorboard.log_dir={temp}'], ['mark eval_batch_start', 'mark batch_start']),
}


def time_lines(arguments: list[str], lines: list[str], cwd: Path, env: dict[str, str]) -> list[float]:
    """Runs Python and returns the seconds until the output has a line that begins with each of `lines`."""
    start, seconds, output = time.perf_counter(), [], []
    with subprocess.Popen([sys.executable, *arguments], cwd=cwd, env=env, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT) as process:
        assert process.stdout
        for line in process.stdout:
            output.append(line)
            if len(seconds) < len(lines) and lines[len(seconds)] and line.startswith(lines[len(seconds)]):
                seconds.append(time.perf_counter() - start)
    if lines == ['']:
        seconds.append(time.perf_counter() - start)
    if len(seconds) < len(lines):
        sys.exit(f'{" ".join(arguments)} did not print {lines[len(seconds)]!r}:\n{"".join(output)}')
    return seconds


def main(args: argparse.Namespace, temp: Path) -> None:
    (temp / 'sitecustomize.py').write_text(MARKS, encoding='utf-8')
    if not args.data.is_dir():
        subprocess.run([sys.executable, 'convert_c4.py', '--source', 'sample', '--out_root', args.data], cwd=ROOT, check=True)
    env = os.environ | {'PYTHONPATH': str(temp), 'CUDA_VISIBLE_DEVICES': '', 'HF_HUB_OFFLINE': '1'}
    checkouts = {'': ROOT, **({' (other checkout)': args.against.resolve()} if args.against else {})}
    seconds: dict[str, list[float]] = {}

    def record(name: str, arguments: list[str], lines: list[str], cwd: Path) -> None:
        filled = [arg.format(data=args.data.resolve(), temp=temp) for arg in arguments]
        for line, one in zip(lines, time_lines(filled, lines, cwd, env)):
            seconds.setdefault(f'{name} {line.removeprefix("mark ")}'.strip() if len(lines) > 1 else name, []).append(one)

    for _ in range(args.repeat + 1):
        for library in IMPORTS:
            record(f'import {library}', ['-c', f'import {library}'], [''], ROOT)
        for name, (arguments, lines) in OURS.items():
            for suffix, cwd in checkouts.items():
                record(name + suffix, arguments, lines, cwd)
    medians = {name: statistics.median(all_seconds[1:]) for name, all_seconds in seconds.items()}  # the first one warms up
    print(f'median of {args.repeat}\n\n| | seconds |' + ''.join(f' {how} `import {name}` |' for how, name in COLUMNS))
    print('|---|---|' + '---|' * len(COLUMNS))
    for name, median in medians.items():
        libraries = [medians[f'import {library}'] for _, library in COLUMNS]
        print(f'| {name} | {median:.2f} | {median / libraries[0]:.2f} |'
              + ''.join(f' {median - library:+.2f} |' for library in libraries[1:]))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--against', type=Path, metavar='FOLDER', help='another checkout to measure too')
    parser.add_argument('--data', type=Path, default=ROOT / 'my-copy-c4', metavar='FOLDER',
                        help='the sample of the quick start; made where it is missing; default: my-copy-c4')
    parser.add_argument('--repeat', type=int, default=5, metavar='N', help='default: %(default)s')
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        main(arguments, Path(folder))
