"""Writes C4 as streaming shards: `python convert_c4.py --out_root ./my-copy-c4 --splits val`.

Every split becomes a folder of MDS shards, of text or, with --concat_tokens, of packed tokens. Each file of the source
becomes a subfolder, made by one process, in one step; an index over all of them and a manifest close the split. The
same command goes on after an interruption, and the bytes do not depend on interruptions, processes or machines.
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
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # no other package is `src`
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
from src.conversion.source_files import TXT, FolderSource, SourceFile, find_duplicates
from src.conversion.sources import C4, C4_COUNTS, HubSource, SampleSource, Source
from src.conversion.tokenizer import first_texts, load_packing_tokenizer, write_tokenizer

SPLITS = {'train': 'train', 'val': 'val', 'train_small': 'train'}  # each, and what it is read from
SMALL = 100_000  # documents of train_small
# Bytes of text in a byte of source, and of shards in a byte of text: C4 has 806 GB of text in 305 GB of files.
TEXT_BYTES = {'.gz': 2.6, '.zst': 2.8, '.parquet': 1.6}
COMPRESSED, BYTES_PER_TOKEN = 0.4, 4.5


def fraction(text: str) -> tuple[int, int]:
    """`i/n` with 0 <= i < n."""
    i, _, n = text.partition('/')
    if not (i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise argparse.ArgumentTypeError(f'{text!r} is not i/n with 0 <= i < n, such as 0/4')
    return int(i), int(n)


def folder(text: str) -> str:
    """A shell leaves the ~ of --out_root=~/data as it is; and a variable that is not set makes an empty name."""
    if not text:
        raise argparse.ArgumentTypeError('the name of a folder is missing')
    return os.path.expanduser(text)


def parse_args(argv: Optional[list[str]] = None) -> argparse.Namespace:
    """The command line, or `argv`. Leaves the process with status 2 and a usage line when it cannot be read."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    parser = argparse.ArgumentParser(description='Write C4, or another text data set, as shards that '
                                     'mosaicml-streaming reads. Stopped at any moment, the same command goes on.')
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add('--out_root', type=folder, metavar='DIR|URL',
        help='the splits become DIR/train and DIR/val; or s3://bucket/..., gs://bucket/...')
    add('--verify', type=folder, metavar='DIR', help='check a copy against its manifests, and do nothing else')

    add = parser.add_argument
    add('--splits', nargs='+', choices=list(SPLITS), default=['train', 'val'],
        help=f'default: train val; train_small: the first {SMALL:,} documents of train')
    add('--source', type=folder, default='hub', metavar='hub|sample|FOLDER',
        help='hub: a data set from the Hugging Face hub (default); sample: English prose out of the Python '
        'installation, with a tokenizer of 4096 tokens in DIR/tokenizer, no network needed; FOLDER: a folder that '
        'holds C4\'s own files, such as c4-train.00000-of-01024.json.gz, or other .jsonl, .parquet or .txt files')
    add('--dataset', default=C4, metavar='NAME', help=f'on the hub; default: {C4}')
    add('--config', metavar='NAME', help="the data set's configuration; default: en for C4")
    add('--revision', metavar='COMMIT', help="of the data set's repository; default: its newest")
    add('--text_column', default='text', metavar='NAME', help='the field of a document that holds its text')
    add('--txt_lines', action='store_true', help='each line of a .txt file is a document; default: each file is one')

    add = parser.add_argument_group('what is written').add_argument
    add('--concat_tokens', type=positive_int, metavar='N', help='sequences of N tokens instead of text')
    add('--tokenizer', type=folder, metavar='NAME|FOLDER', help='for --concat_tokens; default: DIR/tokenizer')
    add('--train_tokenizer', type=positive_int, metavar='VOCAB',
        help='train a byte-level BPE of VOCAB tokens on the text and write it to DIR/tokenizer')
    add('--compression', metavar='NAME', help="of streaming, such as zstd or zstd:7; default: none")
    add('--hashes', nargs='+', default=[], metavar='NAME', help='of streaming, such as sha1 xxh64; default: none')
    add('--size_limit', metavar='SIZE', help='of a shard, such as 32mb; default: 64mb')
    add('--max_docs', type=positive_int, metavar='N', help='only the first N documents of each split')
    add('--skip_bad_docs', action='store_true', help='count and leave out documents that cannot be read')

    add = parser.add_argument_group('how').add_argument
    add('--num_workers', type=positive_int, default=cores, metavar='N',
        help='processes; default: one for each core, here %(default)s')
    add('--partition', type=fraction, metavar='i/n', help='do the part i of n, from 0, and do not close the split')
    add('--merge', action='store_true', help='close the splits, once every --partition is done')
    add('--skip_disk_check', action='store_true', help='begin even if the disk looks too small')
    return parser.parse_args(argv)


def with_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """A copy of the arguments, with the defaults of those that are missing."""
    defaults = vars(parse_args(['--out_root', '.'])) | {'out_root': None}
    if unknown := vars(args).keys() - defaults.keys():
        raise UserError(f'{", ".join(sorted(unknown))}: no such argument; known are {", ".join(defaults)}')
    given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    return argparse.Namespace(**{**defaults, **given})


# ---------------------------------------------------------------- checks before any work
def check_out_root(out_root: str, splits: Iterable[str]) -> None:
    """Makes the output folder and refuses one that cannot be written; finds out whether a bucket is there."""
    output = open_output(out_root)
    if isinstance(output, RemoteOutput):
        output.check()
        return
    for folder in out_root, *(f'{out_root}/{split}' for split in splits):
        if wrong := find_unwritable_folder(folder):
            raise UserError(f'--out_root: {wrong} is a file or may not be written; change its permissions, or name '
                            'another folder')
    try:
        Path(out_root).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'--out_root: {error.filename} cannot be made ({error.strerror}); name a folder that may be '
                        'written') from error


def check_combinations(args: argparse.Namespace) -> None:
    """Refuses options that would be ignored, or that have no meaning."""
    first_n = args.max_docs or 'train_small' in (args.splits or ())
    of_hub = args.dataset != C4 or args.config or args.revision
    no_bpe = args.train_tokenizer and not 257 <= args.train_tokenizer <= 10_000_000
    wrong = {
        f'--splits: {args.splits!r} is not a list of one or more of {", ".join(SPLITS)}':
            isinstance(args.splits, str) or not args.splits or {*args.splits} - SPLITS.keys(),
        '--concat_tokens: 1 leaves nothing to predict; give max_seq_len, or max_seq_len + 1': args.concat_tokens == 1,
        f'--tokenizer: {args.tokenizer} is not used for text; add --concat_tokens N, or leave it out':
            args.concat_tokens is None and args.tokenizer is not None,
        '--merge: the first N documents (--max_docs, train_small) have no --partition; leave --merge out':
            args.merge and first_n,
        '--merge: closes the splits once every --partition is done; run it without --partition':
            args.merge and args.partition,
        '--partition: the first N documents (--max_docs, train_small) are read in order; leave --partition out':
            args.partition and first_n,
        '--partition: with --train_tokenizer each machine would train one; train it on one of them first, by --splits '
        'train_small --train_tokenizer and the rest without --partition': args.partition and args.train_tokenizer,
        '--train_tokenizer: --tokenizer names one that is there; leave one of the two out':
            args.train_tokenizer and args.tokenizer,
        f'--train_tokenizer: {args.train_tokenizer} tokens; a byte-level BPE has 257 (the bytes and EOS) or more, and '
        'at most 10,000,000': no_bpe,
        f'--dataset, --config and --revision are of --source hub; --source is {args.source}':
            args.source != 'hub' and of_hub,
    }
    if message := next((message for message, is_wrong in wrong.items() if is_wrong), None):
        raise UserError(message)


def check_used(args: argparse.Namespace, listed: dict[str, list[SourceFile]]) -> None:
    """Refuses options of files that are not there."""
    is_txt = {file.path.lower().endswith(TXT) for files in listed.values() for file in files}
    if args.txt_lines and True not in is_txt:
        raise UserError(f'--txt_lines: no .txt file is read from --source {args.source}; leave it out, or name another '
                        'folder')
    if args.text_column != 'text' and (False not in is_txt or args.source == 'sample'):
        raise UserError(f'--text_column: {args.text_column}, and what is read of --source {args.source} has no fields: '
                        'leave it out')


def check_disk(args: argparse.Namespace, todo: list[Job]) -> None:
    """Holds what the parts will take against what the disk has. Both are estimates on the low side."""
    disk = args.out_root
    if is_url(args.out_root):  # only what is worked on lies here
        todo, disk = sorted(todo, key=lambda job: -job.file.size)[:args.num_workers], tempfile.gettempdir()
    share = (2 / BYTES_PER_TOKEN if args.concat_tokens else 1) * (COMPRESSED if args.compression else 1)
    need = sum(job.file.size * TEXT_BYTES.get(Path(job.file.path).suffix.lower(), 1) for job in todo) * share
    free = shutil.disk_usage(disk).free
    if need > free and not args.skip_disk_check:
        raise UserError(f'--out_root: {disk} has {free / 1e9:,.3f} GB free; the {len(todo)} files that are left will '
                        f'take about {need / 1e9:,.3f} GB. Free space, name another disk, or add --compression zstd; '
                        '--skip_disk_check begins all the same')


# ---------------------------------------------------------------- the work
def plan(args: argparse.Namespace, source: Source, listed: dict[str, list[SourceFile]], folder: Path,
         ) -> dict[str, list[Job]]:
    """Every part of every split."""
    options = Options(source.columns if args.concat_tokens is None else ('text',), args.text_column, args.concat_tokens,
                      *load_packing_tokenizer(args, folder), args.compression, tuple(args.hashes), args.size_limit,
                      args.skip_bad_docs, args.txt_lines)
    jobs = {}
    for split, files in listed.items():
        limit = min(SMALL, args.max_docs or SMALL) if split == 'train_small' else args.max_docs
        found: Any = source.corpus[SPLITS[split]] if isinstance(source, SampleSource) else None
        jobs[split] = [Job(f'{args.out_root}/{split}', i, file, options, limit, found) for i, file in enumerate(files)]
    return jobs


def describe(source: Source, listed: dict[str, list[SourceFile]]) -> None:
    """Says which files were found, by split, and which are not read."""
    if isinstance(source, SampleSource):
        return
    for split, files in listed.items():
        of_c4 = f' of the {C4_COUNTS[SPLITS[split]][0]:,} files of C4' if source.is_c4 else ' files'
        print(f'{split}: {sum(len(file.paths) for file in files):,}{of_c4} in {source.name}, '
              f'{sum(file.size for file in files):,} bytes')
    if isinstance(source, FolderSource):
        for line in [*source.unread_lines(), *find_duplicates(source.read.values())]:
            print(line)


def make_tokenizer(args: argparse.Namespace, source: Source, listed: dict[str, list[SourceFile]]) -> None:
    """Trains the tokenizer that the sample always has, and other sources by --train_tokenizer."""
    if isinstance(source, SampleSource):
        texts = (document['text'] for document in source.corpus['train'])
    elif args.train_tokenizer:
        split = next((split for split in listed if SPLITS[split] == 'train'), args.splits[0])
        texts = first_texts(listed[split], args)
    else:
        return
    write_tokenizer(args.out_root, texts, args.train_tokenizer or 4096)


def convert_split(split: str, jobs: list[Job], there: list[Optional[Part]], args: argparse.Namespace, source: Source,
                  ) -> None:
    """Makes the parts of a split that are not there, and closes it."""
    start, root = time.perf_counter(), jobs[0].root
    n_files, n_documents = C4_COUNTS[SPLITS[split]]
    of_c4 = source.is_c4 and jobs[0].max_docs is None
    if args.partition:
        i, n = args.partition
        make_parts(split, jobs[i::n], there[i::n], args.num_workers)
        print(f'{root}: part {i} of {n} is done, {len(jobs[i::n])} of {len(jobs)} files; when all are: the same '
              'command with --merge in place of --partition')
        return
    if not args.merge:
        total = n_documents if of_c4 and len(jobs) == n_files else None
        jobs = make_parts(split, jobs, there, args.num_workers, total)
    manifest = merge(split, jobs, source)
    tokens = f'{manifest["tokens"]:,} tokens, ' if 'tokens' in manifest else ''
    skipped = f'{manifest["bad_documents"]:,} skipped, ' if manifest['bad_documents'] else ''
    print(f'{root}: {manifest["documents"]:,} documents, {skipped}{manifest["text_bytes"]:,} bytes of text, {tokens}'
          f'{time.perf_counter() - start:.1f} seconds')
    if of_c4 and manifest['documents'] != n_documents:
        print(f'note: C4 has {n_documents:,} documents in {split}; the source gave {manifest["documents"]:,}')


def next_step(args: argparse.Namespace) -> str:
    """The command that uses what was made."""
    if args.source == 'sample' and args.concat_tokens is None:
        elsewhere = '' if args.out_root.removeprefix('./') == 'my-copy-c4' else f' data_remote={args.out_root}'
        return f'composer main.py yamls/quickstart.yaml{elsewhere}'
    local = 'LOCAL_FOLDER ' if is_url(args.out_root) else ''
    command = f'python src/data_c4.py {args.out_root} {local}--split {args.splits[-1]}'
    command += f' --max_seq_len {args.concat_tokens}' if args.concat_tokens else ''
    return command + (f' --tokenizer {args.tokenizer}' if args.tokenizer else '')


def main(args: argparse.Namespace) -> None:
    """Converts the splits one after another, or verifies a copy.

    `args` are from `parse_args`, or a namespace with some of its attributes: the others have their defaults. Raises
    UserError where a source, an option or an output folder does not do, a disk is full, or there is damage. What is
    finished stays, and the same command goes on from there.
    """
    args = with_defaults(args)
    if bool(args.out_root) == bool(args.verify):
        raise UserError('give --out_root, or --verify alone')
    if args.verify is not None:
        if damage := verify(args.verify):
            raise UserError('\n'.join([f'--verify: {len(damage)} damaged', *damage,
                                       'Delete the subfolder of each (such as train/00012), then run the command that '
                                       'made them: it makes only those anew']))
        return
    check_combinations(args)
    args.splits, args.hashes = list(dict.fromkeys(args.splits)), sorted({*args.hashes})
    args.out_root = args.out_root if args.out_root.endswith('://') else args.out_root.rstrip('/') or '/'
    check_streaming_options(args.compression, args.hashes, args.size_limit)
    check_out_root(args.out_root, args.splits)
    source: Source = (SampleSource() if args.source == 'sample' else
                      HubSource(args.dataset, args.config, args.revision) if args.source == 'hub' else
                      FolderSource(args.source, args.out_root))
    listed = {split: source.files(SPLITS[split]) for split in args.splits}  # everything is checked first
    describe(source, listed)
    check_used(args, listed)
    for split, files in listed.items():
        check_no_foreign_files(f'{args.out_root}/{split}', len(files))
        remove_leftovers(open_output(f'{args.out_root}/{split}'))
    make_tokenizer(args, source, listed)
    with tempfile.TemporaryDirectory() as folder:
        jobs = plan(args, source, listed, Path(folder))
        # of the first N documents, nobody knows which parts hold them
        finished = {split: finished_parts(of_split) if of_split[0].max_docs is None else []
                    for split, of_split in jobs.items()}
        if not args.merge:
            check_disk(args, [job for split in jobs for job, part in zip(jobs[split], finished[split]) if part is None])
        for split in args.splits:
            convert_split(split, jobs[split], finished[split], args, source)
    if args.source == 'sample' or args.partition is None:
        print(f'next: {next_step(args)}')


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that an unfinished part is removed
    try:
        main(parse_args())
    except UserError as user_error:
        sys.exit(f'error: {user_error}')
    except KeyboardInterrupt:
        print('\ninterrupted: the unfinished parts were removed, finished ones stay; the same command goes on',
              file=sys.stderr)
        sys.exit(130)
