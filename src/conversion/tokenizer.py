"""The tokenizer of a conversion: trained on its text, or an existing one."""

import argparse
import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Optional

from src.common.errors import UserError
from src.config.data_places import is_url
from src.conversion.documents import good_documents
from src.conversion.manifest import TRAINED
from src.conversion.output import open_output, read_if_exists, unfinished_folder
from src.conversion.parts import folder_info
from src.conversion.shards import load_tokenizer
from src.conversion.source_files import SourceFile
from src.conversion.sources import call_with_retries, read_source_file

TOKENIZER_FILES = ['*.json', '*.txt', '*.model', '*.tiktoken', '*.jinja']  # files to download from the hub
STORED_TOKENIZER = [  # files to download from an object store
    'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json', 'tokenizer.model',
    'spiece.model', 'vocab.json', 'merges.txt', 'vocab.txt',
]
TRAINING_BYTES = 200_000_000  # of text that --train_tokenizer reads


def texts_to_train_on(files: Iterable[SourceFile], args: argparse.Namespace) -> Iterator[str]:
    """Yields the texts of the files, up to TRAINING_BYTES.

    Raises UserError if a file or, without --skip_bad_docs, a document cannot be read; or if there is no text.
    """
    total, counts = 0, {'bad_documents': 0}
    with tempfile.TemporaryDirectory() as folder:
        of_files = (read_source_file(file, Path(folder), ['text'], args.text_column, args.txt_lines, quiet=False)
                    for file in files)
        documents = chain.from_iterable(good_documents(of_file, args.skip_bad_docs, counts, max_shown=0)
                                        for of_file in of_files)
        for document in islice(documents, args.max_docs):
            yield document['text']
            total += len(document['text'])
            if total >= TRAINING_BYTES:
                break
    if not total:
        raise UserError('--train_tokenizer: the files hold no text to train it on; check --source and --text_column')
    if counts['bad_documents']:
        print(f'--train_tokenizer: {counts["bad_documents"]:,} bad documents were left out')


def write_tokenizer(out_root: str, texts: Iterable[str], vocab_size: int) -> None:
    """Trains a tokenizer, or keeps an existing one: data may be packed with it. Raises UserError for other files."""
    from src.conversion.sample_corpus import train_tokenizer

    output, folder = open_output(out_root), Path(out_root, 'tokenizer')
    if read_if_exists(output, 'tokenizer/tokenizer.json') is not None:
        trained = read_if_exists(output, f'tokenizer/{TRAINED}')
        try:
            trained_size = vocab_size if trained is None else json.loads(trained)['vocab_size']
        except (ValueError, KeyError, TypeError):
            raise UserError(f'--train_tokenizer: {out_root}/tokenizer/{TRAINED} is damaged; delete '
                            f'{out_root}/tokenizer and the packed tokens made with it') from None
        if trained_size != vocab_size:
            raise UserError(f'--train_tokenizer: {vocab_size}, but {out_root}/tokenizer was trained with '
                            f'{trained_size}; set {trained_size}, or delete the folder and the packed tokens made with '
                            'it, or name another --out_root')
        print(f'{out_root}/tokenizer: kept, because it exists')
        return
    if not output.remote and (folder.is_file() or folder.is_dir() and any(folder.iterdir())):
        raise UserError(f'--out_root: {folder} holds something other than a trained tokenizer; move it away, or name '
                        'another --out_root')
    with unfinished_folder(output, 'tokenizer') as staging:
        n_tokens = train_tokenizer(texts, staging, vocab_size)
        (staging / TRAINED).write_text(json.dumps({'vocab_size': vocab_size, 'files': folder_info(staging)}), 'utf-8')
        output.commit(staging, 'tokenizer', 'tokenizer.json')
    print(f'{out_root}/tokenizer: trained')
    if n_tokens < vocab_size:
        print(f'note: --train_tokenizer: {vocab_size}, but the text yields only {n_tokens} tokens')


def load_packing_tokenizer(args: argparse.Namespace, folder: Path,
                           ) -> tuple[Optional[str], Optional[str], Optional[str]]:
    """Finds the tokenizer for --concat_tokens; one in an object store is copied to `folder`.

    Returns the name or local folder to load it from, the name for the manifest, and its `tokenizer_hash`. Raises
    UserError if there is no such tokenizer, or it has no EOS token.
    """
    load_tokenizer.cache_clear()  # the folder may hold another tokenizer than at the last call in this process
    if args.concat_tokens is None:
        return None, None, None
    name = args.tokenizer or f'{args.out_root}/tokenizer'
    shown_name = args.tokenizer or '../tokenizer'  # relative to the folder of a split
    if args.tokenizer is None and all(read_if_exists(open_output(name), file) is None for file in STORED_TOKENIZER[:2]):
        raise UserError(f'--tokenizer: not set, and there is no {name}; set a name on the hub, such as gpt2, or a '
                        'folder, or add --train_tokenizer VOCAB')
    if is_url(name):
        for file in STORED_TOKENIZER:
            if (data := read_if_exists(open_output(name), file)) is not None:
                (folder / file).write_bytes(data)
        name = str(folder)
    if args.tokenizer and re.fullmatch(r'\w[^/]*(/[^/]+)?', name) and not Path(name).exists():
        from huggingface_hub import snapshot_download
        # Download once, so that the workers find it on this disk
        download = partial(snapshot_download, args.tokenizer, allow_patterns=TOKENIZER_FILES)
        name = call_with_retries(download, name, 2, '--tokenizer')
    try:
        return name, shown_name, load_tokenizer(name, args.concat_tokens).hash
    except UserError as error:
        raise UserError(str(error).replace('tokenizer_name', '--tokenizer')) from None
