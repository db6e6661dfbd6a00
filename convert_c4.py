"""Writes C4 as streaming shards: `python convert_c4.py --out_root ./my-copy-c4 --splits val`.

Each split becomes a folder of MDS shards, which hold text or, with --concat_tokens, packed tokens. One process converts
one source file into a subfolder, which appears when it is complete. An index over all subfolders and a manifest finish
the split. After an interruption the same command continues, and the resulting bytes are the same.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Optional

if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # so that `src` is this kit's
    from src.common.machine import set_up_output
    set_up_output()

from src.common.errors import UserError, positive_int
from src.common.machine import find_unwritable_folder
from src.config.data_places import is_url
from src.conversion.manifest import check_no_foreign_files, merge, verify
from src.conversion.output import RemoteOutput, open_output, remove_leftovers
from src.conversion.parts import Job, Part, finished_parts
from src.conversion.pool import make_parts
from src.conversion.shards import Options, check_streaming_options
from src.conversion.source_files import TXT_ENDINGS, FolderSource, SourceFile, find_duplicates
from src.conversion.sources import C4, C4_COUNTS, HubSource, SampleSource, Source
from src.conversion.tokenizer import load_packing_tokenizer, texts_to_train_on, write_tokenizer

SPLITS = {'train': 'train', 'val': 'val', 'train_small': 'train'}  # name of --splits → split of the source
N_SMALL = 100_000  # documents in train_small
# To estimate sizes: bytes of text per byte of a source file (C4 has 806 GB of text in 305 GB of .gz files), bytes of a
# compressed shard per byte of text, and bytes of text per token.
TEXT_BYTES = {'.gz': 2.6, '.zst': 2.8, '.parquet': 1.6}
COMPRESSED, BYTES_PER_TOKEN = 0.4, 4.5


def parse_partition(text: str) -> tuple[int, int]:
    """Reads the argument `i/n` with 0 <= i < n."""
    i, _, n = text.partition('/')
    if not (i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise argparse.ArgumentTypeError(f'{text!r} is not i/n with 0 <= i < n, such as 0/4')
    return int(i), int(n)


def parse_folder(text: str) -> str:
    """Reads the name of a folder, and replaces a ~ that the shell has left, as in --out_root=~/data."""
    if not text:  # such as a shell variable that is not set
        raise argparse.ArgumentTypeError('the name of a folder is missing')
    return os.path.expanduser(text)


def parse_args(argv: Optional[list[str]] = None) -> argparse.Namespace:
    """Reads `argv`, or the command line. Exits with status 2 and a usage line where an argument is wrong."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    parser = argparse.ArgumentParser(description='Write C4, or another text dataset, as shards for '
                                     'mosaicml-streaming. If the command is stopped, run it again: it continues.')
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add('--out_root', type=parse_folder, metavar='DIR|URL',
        help='where to write: the splits become DIR/train and DIR/val; or s3://bucket/..., gs://bucket/...')
    add('--verify', type=parse_folder, metavar='DIR', help='only check that no file in DIR is missing or changed')

    add = parser.add_argument
    add('--splits', nargs='+', choices=list(SPLITS), default=['train', 'val'],
        help=f'what to convert (default: train val); train_small is the first {N_SMALL:,} documents of train')
    add('--source', type=parse_folder, default='hub', metavar='hub|sample|FOLDER',
        help='hub: a dataset from the Hugging Face hub (default); sample: English prose from the Python '
        'installation (no network), with a tokenizer of 4096 tokens in DIR/tokenizer; FOLDER: a folder with '
        'C4\'s own files, such as c4-train.00000-of-01024.json.gz, or with other .jsonl, .parquet or .txt files')
    add('--dataset', default=C4, metavar='NAME', help='the dataset on the hub (default: %(default)s)')
    add('--config', metavar='NAME', help='the configuration of the dataset (default: en for C4)')
    add('--revision', metavar='COMMIT', help='the commit of the dataset on the hub (default: the newest)')
    add('--text_column', default='text', metavar='NAME', help='the field that holds the text (default: text)')
    add('--txt_lines', action='store_true', help='each line of a .txt file is a document (default: each file)')

    add = parser.add_argument_group('what to write').add_argument
    add('--concat_tokens', type=positive_int, metavar='N', help='write sequences of N tokens instead of text')
    add('--tokenizer', type=parse_folder, metavar='NAME|FOLDER',
        help='the tokenizer for --concat_tokens, on the hub or in a folder (default: DIR/tokenizer)')
    add('--train_tokenizer', type=positive_int, metavar='VOCAB',
        help='train a byte-level BPE of VOCAB tokens on the text and write it to DIR/tokenizer')
    add('--compression', metavar='NAME', help='compress the shards, for example zstd or zstd:7 (default: no)')
    add('--hashes', nargs='+', default=[], metavar='NAME',
        help='hashes of each shard for the index, for example sha1 xxh64 (default: none)')
    add('--size_limit', metavar='SIZE', help='the largest size of a shard, for example 32mb (default: 64mb)')
    add('--max_docs', type=positive_int, metavar='N', help='convert only the first N documents of each split')
    add('--skip_bad_docs', action='store_true', help='leave out and count documents that cannot be read')

    add = parser.add_argument_group('how to do the work').add_argument
    add('--num_workers', type=positive_int, default=cores, metavar='N',
        help='number of processes (default: one for each core, here %(default)s)')
    add('--partition', type=parse_partition, metavar='i/n',
        help='convert only partition i of n, counted from 0, such as 0/4; run --merge when all of them are done')
    add('--merge', action='store_true', help='finish the splits when every --partition is done')
    add('--skip_disk_check', action='store_true', help='start even if the disk looks too small')
    return parser.parse_args(argv)


def fill_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """Returns a copy of the arguments, in which missing ones have their defaults."""
    defaults = vars(parse_args(['--out_root', '.'])) | {'out_root': None}
    if unknown := vars(args).keys() - defaults.keys():
        raise UserError(f'{", ".join(sorted(unknown))}: no such argument; known are {", ".join(defaults)}')
    values = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    return argparse.Namespace(**{**defaults, **values})


# ---------------------------------------------------------------- checks before any work
def check_out_root(out_root: str, splits: Iterable[str]) -> None:
    """Makes the output folder. Raises UserError if it cannot be written, or the bucket does not exist."""
    output = open_output(out_root)
    if isinstance(output, RemoteOutput):
        output.check()
        return
    for folder in out_root, *(f'{out_root}/{split}' for split in splits):
        if blocked := find_unwritable_folder(folder):
            raise UserError(f'--out_root: {blocked} is a file or cannot be written; change its permissions, or name '
                            'another folder')
    try:
        Path(out_root).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'--out_root: {error.filename} cannot be made ({error.strerror}); name a folder that can be '
                        'written') from error


def check_combinations(args: argparse.Namespace) -> None:
    """Raises UserError for options that would be ignored, or that contradict each other."""
    is_limited = args.max_docs or 'train_small' in (args.splits or ())
    has_hub_options = args.dataset != C4 or args.config or args.revision
    is_wrong_vocab = args.train_tokenizer and not 257 <= args.train_tokenizer <= 10_000_000
    wrong = {
        f'--splits: {args.splits!r} is not a list of one or more of {", ".join(SPLITS)}':
            isinstance(args.splits, str) or not args.splits or {*args.splits} - SPLITS.keys(),
        '--concat_tokens: 1 leaves nothing to predict; set max_seq_len, or max_seq_len + 1': args.concat_tokens == 1,
        f'--tokenizer: {args.tokenizer} is not used for text; add --concat_tokens N, or leave --tokenizer out':
            args.concat_tokens is None and args.tokenizer is not None,
        '--merge: --max_docs and train_small are converted without --partition; leave --merge out':
            args.merge and is_limited,
        '--merge: does not go with --partition; when every --partition is done, run the command with --merge instead':
            args.merge and args.partition,
        '--partition: --max_docs and train_small are converted on one machine; leave --partition out':
            args.partition and is_limited,
        '--partition: with --train_tokenizer each machine would train a tokenizer of its own; run --splits train_small '
        '--train_tokenizer on one machine first, then each --partition without --train_tokenizer':
            args.partition and args.train_tokenizer,
        '--train_tokenizer: --tokenizer names an existing tokenizer; leave one of the two out':
            args.train_tokenizer and args.tokenizer,
        f'--train_tokenizer: {args.train_tokenizer} must be at least 257 (256 bytes and EOS), and at most 10,000,000':
            is_wrong_vocab,
        f'--dataset, --config, --revision: only for --source hub, but --source is {args.source}; leave them out':
            args.source != 'hub' and has_hub_options,
    }
    if message := next((message for message, is_wrong in wrong.items() if is_wrong), None):
        raise UserError(message)


def check_source_options(args: argparse.Namespace, split_files: dict[str, list[SourceFile]]) -> None:
    """Raises UserError for options that apply to none of the files that were found."""
    is_txt = {file.path.lower().endswith(TXT_ENDINGS) for files in split_files.values() for file in files}
    if args.txt_lines and True not in is_txt:
        raise UserError(f'--txt_lines: no .txt file is read from --source {args.source}; leave it out, or name another '
                        'folder')
    if args.text_column != 'text' and (False not in is_txt or args.source == 'sample'):
        raise UserError(f'--text_column: {args.text_column}: the documents of --source {args.source} have no fields; '
                        'leave --text_column out')


def check_disk(args: argparse.Namespace, todo: list[Job]) -> None:
    """Raises UserError if the disk has less free space than a low estimate of what the parts need."""
    disk = args.out_root
    if is_url(args.out_root):  # only unfinished parts lie on this machine, one for each worker
        todo, disk = sorted(todo, key=lambda job: -job.file.size)[:args.num_workers], tempfile.gettempdir()
    share = (2 / BYTES_PER_TOKEN if args.concat_tokens else 1) * (COMPRESSED if args.compression else 1)
    need = sum(job.file.size * TEXT_BYTES.get(Path(job.file.path).suffix.lower(), 1) for job in todo) * share
    free = shutil.disk_usage(disk).free
    if need > free and not args.skip_disk_check:
        raise UserError(f'--out_root: {disk} has {free / 1e9:,.3f} GB free; the {len(todo)} files still to convert '
                        f'need about {need / 1e9:,.3f} GB. Free space, name another disk, or add --compression zstd; '
                        '--skip_disk_check starts anyway')


# ---------------------------------------------------------------- the work
def list_jobs(args: argparse.Namespace, source: Source, split_files: dict[str, list[SourceFile]], folder: Path,
              ) -> dict[str, list[Job]]:
    """Returns the jobs of every split: one for each file."""
    options = Options(source.columns if args.concat_tokens is None else ('text',), args.text_column, args.concat_tokens,
                      *load_packing_tokenizer(args, folder), args.compression, tuple(args.hashes), args.size_limit,
                      args.skip_bad_docs, args.txt_lines)
    jobs = {}
    for split, files in split_files.items():
        limit = min(N_SMALL, args.max_docs or N_SMALL) if split == 'train_small' else args.max_docs
        texts: Any = source.corpus[SPLITS[split]] if isinstance(source, SampleSource) else None
        jobs[split] = [Job(f'{args.out_root}/{split}', i, file, options, limit, texts) for i, file in enumerate(files)]
    return jobs


def print_files(source: Source, split_files: dict[str, list[SourceFile]]) -> None:
    """Prints how many files each split has, and which files are not read."""
    if isinstance(source, SampleSource):
        return
    for split, files in split_files.items():
        kind = f'of the {C4_COUNTS[SPLITS[split]][0]:,} files of C4' if source.is_c4 else 'files'
        print(f'{split}: {sum(len(file.paths) for file in files):,} {kind} in {source.name}, '
              f'{sum(file.size for file in files):,} bytes')
    if isinstance(source, FolderSource):
        for line in [*source.unread_lines(), *find_duplicates(source.read_files.values())]:
            print(line)


def make_tokenizer(args: argparse.Namespace, source: Source, split_files: dict[str, list[SourceFile]]) -> None:
    """Trains a tokenizer on the text: always for the sample, for other sources only with --train_tokenizer."""
    if isinstance(source, SampleSource):
        texts = (document['text'] for document in source.corpus['train'])
    elif args.train_tokenizer:
        split = next((split for split in split_files if SPLITS[split] == 'train'), args.splits[0])
        texts = texts_to_train_on(split_files[split], args)
    else:
        return
    write_tokenizer(args.out_root, texts, args.train_tokenizer or 4096)


def convert_split(split: str, jobs: list[Job], finished: list[Optional[Part]], args: argparse.Namespace, source: Source,
                  ) -> None:
    """Converts the parts of a split that are missing, and finishes the split unless --partition is set."""
    start, root = time.perf_counter(), jobs[0].root
    n_files, n_documents = C4_COUNTS[SPLITS[split]]
    is_full_c4 = source.is_c4 and jobs[0].max_docs is None
    if args.partition:
        i, n = args.partition
        make_parts(split, jobs[i::n], finished[i::n], args.num_workers)
        print(f'{root}: partition {i} of {n} is done, {len(jobs[i::n])} of {len(jobs)} files. When all are done, run '
              'the same command with --merge instead of --partition')
        return
    if not args.merge:
        total = n_documents if is_full_c4 and len(jobs) == n_files else None
        jobs = make_parts(split, jobs, finished, args.num_workers, total)
    manifest = merge(split, jobs, source)
    tokens = f'{manifest["tokens"]:,} tokens, ' if 'tokens' in manifest else ''
    skipped = f'{manifest["bad_documents"]:,} skipped, ' if manifest['bad_documents'] else ''
    print(f'{root}: {manifest["documents"]:,} documents, {skipped}{manifest["text_bytes"]:,} bytes of text, {tokens}'
          f'{time.perf_counter() - start:.1f} seconds')
    if is_full_c4 and manifest['documents'] != n_documents:
        print(f'note: C4 has {n_documents:,} documents in {split}; the source has {manifest["documents"]:,}')


def next_step(args: argparse.Namespace) -> str:
    """Returns the command to run next, on the new data."""
    if args.source == 'sample' and args.concat_tokens is None:
        elsewhere = '' if args.out_root.removeprefix('./') == 'my-copy-c4' else f' data_remote={args.out_root}'
        return f'composer main.py yamls/quickstart.yaml{elsewhere}'
    local = 'LOCAL_FOLDER ' if is_url(args.out_root) else ''
    command = f'python src/data_c4.py {args.out_root} {local}--split {args.splits[-1]}'
    command += f' --max_seq_len {args.concat_tokens}' if args.concat_tokens else ''
    return command + (f' --tokenizer {args.tokenizer}' if args.tokenizer else '')


def main(args: argparse.Namespace) -> None:
    """Converts the splits one after another, or checks a copy.

    `args` come from `parse_args`, or are a namespace with some of its attributes; the others take their defaults.
    Raises UserError if a source, an option or an output folder cannot be used, a disk is full, or files are damaged.
    Finished parts stay, and the same command continues from them.
    """
    args = fill_defaults(args)
    if bool(args.out_root) == bool(args.verify):
        raise UserError('give --out_root, or --verify alone')
    if args.verify is not None:
        if damage := verify(args.verify):
            raise UserError('\n'.join([f'--verify: {len(damage)} damaged', *damage,
                                       'Delete the subfolder of each damaged file, such as train/00012, then run the '
                                       'command that made the data again: it makes only those again']))
        return
    check_combinations(args)
    args.splits, args.hashes = list(dict.fromkeys(args.splits)), sorted({*args.hashes})
    args.out_root = args.out_root if args.out_root.endswith('://') else args.out_root.rstrip('/') or '/'
    check_streaming_options(args.compression, args.hashes, args.size_limit)
    check_out_root(args.out_root, args.splits)
    source: Source = (SampleSource() if args.source == 'sample' else
                      HubSource(args.dataset, args.config, args.revision) if args.source == 'hub' else
                      FolderSource(args.source, args.out_root))
    split_files = {split: source.files(SPLITS[split]) for split in args.splits}  # check all splits before any work
    print_files(source, split_files)
    check_source_options(args, split_files)
    for split, files in split_files.items():
        check_no_foreign_files(f'{args.out_root}/{split}', len(files))
        remove_leftovers(open_output(f'{args.out_root}/{split}'))
    make_tokenizer(args, source, split_files)
    with tempfile.TemporaryDirectory() as folder:
        jobs = list_jobs(args, source, split_files, Path(folder))
        # with a limit of documents, the number of parts is not known before they are made
        finished = {split: finished_parts(todo) if todo[0].max_docs is None else [] for split, todo in jobs.items()}
        if not args.merge:
            check_disk(args, [job for split in jobs for job, part in zip(jobs[split], finished[split]) if part is None])
        for split in args.splits:
            convert_split(split, jobs[split], finished[split], args, source)
    if args.source == 'sample' or args.partition is None:
        print(f'next: {next_step(args)}')


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception removes unfinished parts
    try:
        main(parse_args())
    except UserError as user_error:
        sys.exit(f'error: {user_error}')
    except KeyboardInterrupt:
        print('\ninterrupted: unfinished parts were removed, finished parts stay; to continue, run the same command '
              'again', file=sys.stderr)
        sys.exit(130)
