"""Makes a small corpus of English prose from the Python installation, without a network.

The sources are Python's own reference (`pydoc_data.topics`) and the docstrings of the standard library and of the
packages in `PACKAGES`, which are read as files and never imported. `paragraphs()` keeps only running text, one
paragraph a line. No paragraph and no long sentence occurs twice, so nothing of `val` is in `train`. Texts, order,
splits and tokenizer depend only on the installed versions.
"""

import hashlib
import importlib.util
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from src.common.progress import progress

# Packages of requirements.txt, in the order in which they fill the corpus. Missing ones are skipped.
PACKAGES = [
    'torch', 'composer', 'streaming', 'datasets', 'huggingface_hub', 'tokenizers', 'numpy', 'pandas', 'networkx',
    'sympy', 'matplotlib', 'torchmetrics', 'torchvision', 'fsspec', 'PIL', 'requests', 'urllib3', 'aiohttp', 'jinja2',
    'click', 'rich', 'psutil', 'cryptography', 'paramiko', 'botocore', 'boto3', 'pygments', 'wandb', 'triton', 'tqdm',
    'packaging', 'google', 'azure', 'pip', 'setuptools', 'transformers',
]
SKIPPED_FOLDERS = {'test', 'tests', 'testing', 'site-packages', 'dist-packages', 'idlelib', 'lib2to3', '_vendor'}
TIMESTAMP = '2019-04-25T00:00:00Z'  # of every document, in C4's form
MAX_BYTES = 12_000_000
MIN_PARAGRAPH, MIN_DOCUMENT, FULL_DOCUMENT = 60, 200, 3000  # characters; a C4 document has about 2,200
VAL_ONE_IN = 16  # one document in so many goes to val

DOCSTRING = re.compile(r'^[^\n#\'"]{0,80}"""(.*?)"""', re.DOTALL | re.MULTILINE)
# A start that opens a new paragraph and is cut off: the `name (type):` of a parameter, a list's bullet or number
ENTRY = re.compile(r'\s*(?:[\w*`, ]+ : .*$|:?[\w*.]+(?: \w+)?(?: ?\([^()]*\))? ?:(?: |$)|[-*+] |\d+[.)] )')
RULE = '-=~^*"_.#'  # of these is a line under a heading
NOT_PROSE = re.compile(r'>>>|\.\. |::|\S   +\S|\|')
MARKUP = re.compile(r':[\w:+-]+:`[~!]?([^`<]*?)(?: ?<[^`>]*>)?`|`([^`<]+?) ?<[^`>]*>`_*|\[([^]]+)\]\([^)]*\)')
UNUSUAL = re.compile(r'[^A-Za-z \'",.;:!?()-]')
LETTER = re.compile(r'[A-Za-z]')


def is_prose(line: str) -> bool:
    """Whether a line is sentences: it starts with a capital, ends with punctuation, has ten words, mostly letters."""
    return (len(line) >= MIN_PARAGRAPH and line[0].isupper() and line[-1] in '.!?:)"' and line.count(' ') >= 9
            and len(UNUSUAL.findall(line)) <= 0.05 * len(line) and len(LETTER.findall(line)) >= 0.72 * len(line))


def paragraphs(text: str) -> Iterator[str]:
    """Yields the running text of a docstring, one paragraph a line, without code, doctests, tables or markup."""
    blocks: list[list[str]] = [[]]
    for line in text.expandtabs().splitlines():
        if not (words := line.strip()):
            blocks.append([])
            continue
        # Most lines can be no entry, and a match takes longer than this
        entry = ENTRY.match(line) if ':' in words or words[0] in '-*+' or words[0].isdigit() else None
        if entry:
            blocks.append([])
        if len(words) >= 3 and not words.strip(RULE):
            blocks[-1].clear()
        else:
            blocks[-1].append(line[entry.end():].strip() if entry else words)
    for block in blocks:
        if sum(map(len, block)) < MIN_PARAGRAPH - len(block) or NOT_PROSE.search('\n'.join(block)):
            continue
        line = MARKUP.sub(r'\1\2\3', ' '.join(' '.join(block).split())).replace('`', '').replace('**', '')
        if is_prose(line):
            yield line


def repetition_keys(line: str) -> set[str]:
    """Returns keys that find repeated text: the lower-case words of a paragraph, and of each long sentence in it.

    Words with a capital, digit or sign do not count, since docstrings of similar classes differ only in such words.
    """
    parts = [line, *(part for part in re.split(r'(?<=[.!?:;]) ', line) if len(part) >= MIN_PARAGRAPH)]
    return {' '.join(word for word in part.split() if word.isalpha() and word.islower() and word.isascii())
            for part in parts}


def read_sources() -> Iterator[tuple[str, list[str]]]:
    """Yields the name and the texts of every source in a fixed order: reference, standard library, packages."""
    from pydoc_data.topics import topics
    yield from ((f'pydoc_data/topics.py#{name}', [text]) for name, text in sorted(topics.items()))
    roots = [('', Path(sysconfig.get_paths()['stdlib']))]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        roots += [(f'{package}/', Path(folder)) for folder in sorted(spec and spec.submodule_search_locations or [])]
    for prefix, root in roots:
        files = {path.relative_to(root).as_posix(): path for path in root.rglob('*.py')}
        for name, path in sorted(files.items()):
            if SKIPPED_FOLDERS.isdisjoint(name.split('/')):
                yield prefix + name, DOCSTRING.findall(path.read_text('utf-8', errors='replace'))


def gather_sample(max_bytes: int = MAX_BYTES) -> dict[str, list[dict[str, str]]]:
    """Returns the documents of `train` and `val`, with C4's fields `text`, `timestamp` and `url`.

    The hash of a document's text puts one in 16 into `val`. The source that reaches `max_bytes` of text is the last.
    """
    splits: dict[str, list[dict[str, str]]] = {'train': [], 'val': []}
    seen: set[str] = set()
    total, bar = 0, progress('sample', max_bytes)
    for name, texts in read_sources():
        for number, text in enumerate(_new_documents(texts, seen)):
            if len(text) >= MIN_DOCUMENT:
                total += len(text.encode())
                bar.update(len(text.encode()))
                split = 'train' if int(hashlib.sha256(text.encode()).hexdigest(), 16) % VAL_ONE_IN else 'val'
                url = f'python://{name}' + (f'?part={number + 1}' if number else '')
                splits[split].append({'text': text, 'timestamp': TIMESTAMP, 'url': url})
        if total >= max_bytes:
            break
    bar.close()
    return splits


def _new_documents(texts: list[str], seen: set[str]) -> list[str]:
    """Returns the new paragraphs in the texts of one file, as documents of about 3,000 characters."""
    chunks: list[list[str]] = [[]]
    for text in texts:
        for line in paragraphs(text):
            keys = repetition_keys(line)
            if seen.isdisjoint(keys):
                chunks[-1].append(line)
            seen |= keys
        if sum(map(len, chunks[-1])) >= FULL_DOCUMENT:
            chunks.append([])
    return ['\n'.join(chunk) for chunk in chunks]


def train_tokenizer(texts: Iterable[str], folder: str | Path, vocab_size: int = 4096) -> int:
    """Trains a byte-level BPE (as GPT-2's, https://openai.com/research/better-language-models), and saves it.

    `AutoTokenizer.from_pretrained(folder)` loads it. `<|endoftext|>` is the only special token. Returns the number of
    tokens, which is below `vocab_size` if there is little text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    end = '<|endoftext|>'
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    bpe.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[end], show_progress=sys.stderr.isatty(),
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(texts, trainer)
    # `save_pretrained` writes this file too, but raises a bare Exception on a full disk; this raises an OSError.
    Path(folder, 'tokenizer.json').write_text(bpe.to_str(pretty=True), 'utf-8')
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=end, eos_token=end, unk_token=end, pad_token=end,
                            model_input_names=['input_ids', 'attention_mask'],  # no token_type_ids: GPT-2 adds them
                            clean_up_tokenization_spaces=False).save_pretrained(str(folder))
    return bpe.get_vocab_size()
