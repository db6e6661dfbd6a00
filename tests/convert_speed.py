"""Measures conversion: `python tests/convert_speed.py [DOCUMENTS]`, with the input on the local disk.

The input is eight files in C4's form, with random documents of the sample. The tokenizer is the sample's, of 4096 tokens. The
straightforward way, for comparison, is one process that streams the JSON files with `datasets` into one MDSWriter. The rates leave
out the seconds in which Python imports its libraries.
"""

import gzip
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

FILES = 8
STRAIGHTFORWARD = '''
import sys, time
from datasets import load_dataset
from streaming import MDSWriter
from tqdm import tqdm
start = time.perf_counter()
documents = load_dataset('json', data_files=sys.argv[1] + '/*.json.gz', split='train', streaming=True)
with MDSWriter(out=sys.argv[2], columns={'text': 'str', 'timestamp': 'str', 'url': 'str'}) as writer:
    for document in tqdm(documents):
        writer.write(document | {'timestamp': document['timestamp'].strftime('%Y-%m-%dT%H:%M:%SZ')})
print(f'{time.perf_counter() - start:.1f} seconds')
'''


def make_input(folder: Path, n_documents: int, n_files: int = FILES) -> int:
    """Writes files in C4's form; returns the bytes of text in them."""
    from src.conversion.sample_corpus import gather_sample

    corpus, rng, size = gather_sample()['train'], random.Random(0), 0
    for i in range(n_files):
        with gzip.open(folder / f'c4-train.{i:05}-of-01024.json.gz', 'wt') as file:
            for document in rng.choices(corpus, k=n_documents // n_files):
                file.write(json.dumps(document) + '\n')
                size += len(document['text'].encode())
    return size


def timed(command: list[str], log: Path) -> tuple[float, float, float]:
    """Runs a command; returns its seconds, those of the conversion alone, and MiB of its largest process."""
    start = time.perf_counter()
    with log.open('w') as out:
        process = subprocess.Popen(command, stdout=out, env={**os.environ, 'TQDM_DISABLE': '1'})
        _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    found = re.findall(r'([\d.]+) seconds', log.read_text())
    return time.perf_counter() - start, float(found[-1]), usage.ru_maxrss / 1024


SHARE = """
import sys, time
sys.path.insert(0, '.')
from src import tokenizer
from src.conversion import parts, shards, sources
spent = 0.0
class Timed:
    def __init__(self, backend):
        self.__dict__['backend'] = backend
    def __getattr__(self, name):
        return getattr(self.backend, name)
    def __setattr__(self, name, value):
        setattr(self.backend, name, value)
    def encode_batch_fast(self, *args, **kwargs):
        global spent
        start = time.perf_counter()
        try:
            return self.backend.encode_batch_fast(*args, **kwargs)
        finally:
            spent += time.perf_counter() - start
load = tokenizer._load
def timed(name):
    loaded = load(name)
    loaded._tokenizer = Timed(loaded._tokenizer)
    return loaded
tokenizer._load = timed
file = sources.SourceFile(sys.argv[1], 0)
options = shards.Options(('text',), concat_tokens=2048, tokenizer=sys.argv[2])
shards._load_tokenizer(sys.argv[2], 2048)
import streaming
start = time.perf_counter()
part = parts.convert(parts.Job(sys.argv[3], 0, file, options))
seconds = time.perf_counter() - start
print(f'one process, one file, all loaded: {part["tokens"] / seconds:,.0f} tokens/s, {spent / seconds:.1%} in the tokenizer')
"""


def main(n_documents: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out, source, few = Path(folder), Path(folder, 'c4'), Path(folder, 'few')
        source.mkdir()
        few.mkdir()
        size = make_input(source, n_documents)
        n_documents = n_documents // FILES * FILES
        for path in sorted(source.iterdir())[:2]:
            (few / path.name).symlink_to(path)
        gzipped = sum(f.stat().st_size for f in source.iterdir())
        print(f'{n_documents:,} documents, {size / 1e6:,.0f} MB of text in {gzipped / 1e6:,.0f} MB of gzip, {FILES} files; '
              f'{os.cpu_count()} cores')
        subprocess.run([sys.executable, 'convert_c4.py', '--source', 'sample', '--out_root', str(out / 'sample')], cwd=ROOT,
                       check=True, capture_output=True)
        tokenizer = out / 'sample/tokenizer'
        convert = [sys.executable, str(ROOT / 'convert_c4.py'), '--splits', 'train', '--source', str(source), '--out_root']
        tokens = [*convert[:-2], str(few), '--concat_tokens', '2048', '--tokenizer', str(tokenizer), '--out_root']
        runs = {'straightforward': ([sys.executable, '-c', STRAIGHTFORWARD, str(source), str(out / '0')], 1),
                'text, 1 process': ([*convert, str(out / '1'), '--num_workers', '1'], 1),
                'text, 2 processes': ([*convert, str(out / '2'), '--num_workers', '2'], 1),
                'text zstd, 2 processes': ([*convert, str(out / '3'), '--num_workers', '2', '--compression', 'zstd'], 1),
                'tokens, 1 process': ([*tokens, str(out / '4'), '--num_workers', '1'], 2 / FILES),
                'tokens, 2 processes': ([*tokens, str(out / '5'), '--num_workers', '2'], 2 / FILES)}
        table = []
        for name, (command, share) in runs.items():
            whole, seconds, memory = timed(command, out / 'log')
            table.append((name, whole, seconds, n_documents * share / seconds, size * share / seconds / 1e6, memory))
            shutil.rmtree(out / str(len(table) - 1))
        print(f'\n{"":24} {"command, s":>11} {"conversion, s":>14} {"documents/s":>12} {"MB/s of text":>13} {"times":>6} '
              f'{"MiB":>6}')
        for name, whole, seconds, documents, text, memory in table:
            print(f'{name:24} {whole:11.1f} {seconds:14.1f} {documents:12,.0f} {text:13.1f} {documents / table[0][3]:6.2f} '
                  f'{memory:6,.0f}')
        first = sorted(source.iterdir())[0]
        subprocess.run([sys.executable, '-c', SHARE, str(first), str(tokenizer), str(out / '6/train')], cwd=ROOT, check=True)


if __name__ == '__main__':
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
