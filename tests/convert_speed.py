"""Measures conversion, with the input on the local disk:

    python tests/convert_speed.py [--documents 1000000] [--tokenizer FOLDER] [--rounds 3]

The input is eight files in C4's form, with random documents of the sample, in which one word of 40 is replaced by random
letters: web text, too, has many words that occur once. The tokenizer is the sample's, of 4096 tokens, unless one is named. The
straightforward way, for comparison, is one process that streams the JSON files with `datasets` into one MDSWriter. The rates leave
out the seconds in which Python imports its libraries.

The second table compares the packing of tokens with fastokens, and with the library `tokenizers` alone. One process converts one
file; the two ways take turns.
"""

import argparse
import gzip
import itertools
import json
import os
import random
import re
import shutil
import statistics
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Optional

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

FILES, RARE, ONE_FILE_DOCUMENTS = 8, 40, 40_000
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
    """Writes the files; returns the bytes of text in them."""
    from src.conversion.sample_corpus import gather_sample

    corpus, rng, size = gather_sample()['train'], random.Random(0), 0
    for i in range(n_files):
        with gzip.open(folder / f'c4-train.{i:05}-of-01024.json.gz', 'wt') as file:
            for document in rng.choices(corpus, k=n_documents // n_files):
                words = document['text'].split(' ')
                for k in range(rng.randrange(RARE), len(words), RARE):
                    words[k] = ''.join(rng.choices(string.ascii_lowercase, k=rng.randrange(4, 12)))
                text = ' '.join(words)
                file.write(json.dumps(document | {'text': text}) + '\n')
                size += len(text.encode())
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


ONE_FILE = """
import json, resource, sys, time
sys.path.insert(0, '.')
from src.common import encoding, fast_encoding
from src.conversion import parts, shards, sources
way, source, folder, out = sys.argv[1:]
def refuse(serialized):
    raise ImportError('this run leaves it out')
if way == 'tokenizers':
    fast_encoding.open_tokenizer = refuse
spent, encode = 0.0, encoding._encode
def timed(*args):
    global spent
    start = time.process_time()
    found = encode(*args)
    spent += time.process_time() - start
    return found
encoding._encode = timed
import streaming
shards.load_tokenizer(folder, 2048)
start, cpu = time.perf_counter(), time.process_time()
part = parts.convert(parts.Job(out, 0, sources.SourceFile(source, 0),
                               shards.Options(('text',), concat_tokens=2048, tokenizer=folder)))
print(json.dumps({'text_bytes': part['text_bytes'], 'tokens': part['tokens'], 'files': part['files'],
                  'seconds': time.perf_counter() - start, 'cpu': time.process_time() - cpu, 'spent': spent,
                  'mib': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
"""


def compare_ways(source: Path, tokenizer: Path, out: Path, rounds: int) -> None:
    """Converts one file with either library, in turns, and prints the medians."""
    found: dict[str, list[dict]] = {'tokenizers': [], 'fastokens': []}
    for _ in range(rounds):
        for way, runs in found.items():
            run = subprocess.run([sys.executable, '-c', ONE_FILE, way, str(source), str(tokenizer), str(out)], cwd=ROOT, check=True,
                                 stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            runs.append(json.loads(run.stdout))
            shutil.rmtree(out)
    print(f'\none process, one file of {found["fastokens"][0]["text_bytes"] / 1e6:,.0f} MB of text, packed tokens, all loaded; '
          f'medians of {rounds} rounds')
    print(f'{"":12} {"MB/s":>7} {"tokens/s":>12} {"times":>6} {"MB/s of CPU":>12} {"in the tokenizer":>17} {"MiB":>6}')
    medians: dict[str, list[float]] = {}
    for way, runs in found.items():
        medians[way] = [statistics.median(run[key] / run[per] for run in runs) for key, per in (
            ('text_bytes', 'seconds'), ('tokens', 'seconds'), ('text_bytes', 'cpu'), ('spent', 'cpu'))]
        text, tokens, cpu, share = medians[way]
        print(f'{way:12} {text / 1e6:7.1f} {tokens:12,.0f} {text / medians["tokenizers"][0]:6.1f} {cpu / 1e6:12.1f} {share:17.0%} '
              f'{max(run["mib"] for run in runs):6,.0f}')
    files = [run['files'] for runs in found.values() for run in runs]
    print(f'all {len(files)} runs wrote the same bytes: {all(one == files[0] for one in files)}')


def main(n_documents: int, tokenizer: Optional[Path], rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out, source = Path(folder), Path(folder, 'c4')
        source.mkdir()
        size = make_input(source, n_documents)
        n_documents = n_documents // FILES * FILES
        gzipped = sum(f.stat().st_size for f in source.iterdir())
        print(f'{n_documents:,} documents, {size / 1e6:,.0f} MB of text in {gzipped / 1e6:,.0f} MB of gzip, {FILES} files; '
              f'{os.cpu_count()} cores')
        subprocess.run([sys.executable, 'convert_c4.py', '--source', 'sample', '--out_root', str(out / 'sample')], cwd=ROOT,
                       check=True, capture_output=True)
        tokenizer = tokenizer or out / 'sample/tokenizer'
        convert = [sys.executable, str(ROOT / 'convert_c4.py'), '--splits', 'train', '--source', str(source), '--out_root']
        tokens = [*convert[:-1], '--concat_tokens', '2048', '--tokenizer', str(tokenizer), '--out_root']
        runs = {'straightforward': [sys.executable, '-c', STRAIGHTFORWARD, str(source), str(out / '0')],
                'text, 1 process': [*convert, str(out / '1'), '--num_workers', '1'],
                'text, 2 processes': [*convert, str(out / '2'), '--num_workers', '2'],
                'text zstd, 2 processes': [*convert, str(out / '3'), '--num_workers', '2', '--compression', 'zstd'],
                'tokens, 1 process': [*tokens, str(out / '4'), '--num_workers', '1'],
                'tokens, 2 processes': [*tokens, str(out / '5'), '--num_workers', '2']}
        table = []
        for name, command in runs.items():
            whole, seconds, memory = timed(command, out / 'log')
            table.append((name, whole, seconds, n_documents / seconds, size / seconds / 1e6, memory))
            shutil.rmtree(out / str(len(table) - 1))
        print(f'\n{"":24} {"command, s":>11} {"conversion, s":>14} {"documents/s":>12} {"MB/s of text":>13} {"times":>6} '
              f'{"MiB":>6}')
        for name, whole, seconds, documents, text, memory in table:
            print(f'{name:24} {whole:11.1f} {seconds:14.1f} {documents:12,.0f} {text:13.1f} {documents / table[0][3]:6.2f} '
                  f'{memory:6,.0f}')
        one = out / 'one.json.gz'
        with gzip.open(sorted(source.iterdir())[0], 'rb') as file, gzip.open(one, 'wb') as small:
            small.writelines(itertools.islice(file, ONE_FILE_DOCUMENTS))
        compare_ways(one, tokenizer, out / '6/train', rounds)


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--documents', type=int, default=1_000_000)
    parser.add_argument('--tokenizer', type=Path)
    parser.add_argument('--rounds', type=int, default=3)
    parsed = parser.parse_args()
    main(parsed.documents, parsed.tokenizer and parsed.tokenizer.resolve(), parsed.rounds)
