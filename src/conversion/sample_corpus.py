"""English prose from the Python installation itself: a small corpus that needs no network.

The sources are Python's own reference (`pydoc_data.topics`) and the docstrings of the standard library and of the
packages in `PACKAGES`, which are read as files and never imported. What `paragraphs()` leaves is running text, one
paragraph a line. No paragraph and no long sentence occurs twice in the corpus, so none of `val` is in `train`. Texts,
order and split depend on the installed versions only, and so does the tokenizer.
"""

import hashlib
import importlib.util
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from src.common.progress import progress

# What requirements.txt installs, in the order in which it fills the corpus. One that is absent is skipped.
PACKAGES = [
    'torch', 'composer', 'streaming', 'datasets', 'huggingface_hub', 'tokenizers', 'numpy', 'pandas', 'networkx',
    'sympy', 'matplotlib', 'torchmetrics', 'torchvision', 'fsspec', 'PIL', 'requests', 'urllib3', 'aiohttp', 'jinja2',
    'click', 'rich', 'psutil', 'cryptography', 'paramiko', 'botocore', 'boto3', 'pygments', 'wandb', 'triton', 'tqdm',
    'packaging', 'google', 'azure', 'pip', 'setuptools', 'transformers',
]
SKIPPED_FOLDERS = {'test', 'tests', 'testing', 'site-packages', 'dist-packages', 'idlelib', 'lib2to3', '_vendor'}
TIMESTAMP = '2019-04-25T00:00:00Z'  # the same for every document, in C4's form
MAX_BYTES = 12_000_000
MIN_PARAGRAPH, MIN_DOCUMENT, FULL_DOCUMENT = 60, 200, 3000  # characters; a C4 document has about 2,200
VAL_ONE_IN = 16  # documents

DOCSTRING = re.compile(r'^[^\n#\'"]{0,80}"""(.*?)"""', re.DOTALL | re.MULTILINE)
# What opens a new paragraph and is cut off: the `name (type):` of a parameter list, a list's bullet or number.
ENTRY = re.compile(r'\s*(?:[\w*`, ]+ : .*$|:?[\w*.]+(?: \w+)?(?: ?\([^()]*\))? ?:(?: |$)|[-*+] |\d+[.)] )')
RULE = re.compile(r'\s*[-=~^*"_.#]{3,}\s*$')  # underlines the heading above it
NOT_PROSE = re.compile(r'>>>|\.\. |::|\S   +\S|\|')
MARKUP = re.compile(r':[\w:+-]+:`[~!]?([^`<]*?)(?: ?<[^`>]*>)?`|`([^`<]+?) ?<[^`>]*>`_*|\[([^]]+)\]\([^)]*\)')
ODD = re.compile(r'[^A-Za-z \'",.;:!?()-]')
LETTER = re.compile(r'[A-Za-z]')
ODD_WORD = re.compile(r'\S*[^a-z\s]\S*')


def is_prose(line: str) -> bool:
    """Whether a line reads as sentences: a capital first, punctuation last, ten words or more, nearly all letters."""
    return (len(line) >= MIN_PARAGRAPH and line[0].isupper() and line[-1] in '.!?:)"' and line.count(' ') >= 9
            and len(ODD.findall(line)) <= 0.05 * len(line) and len(LETTER.findall(line)) >= 0.72 * len(line))


def paragraphs(text: str) -> Iterator[str]:
    """The running text of a docstring, one paragraph a line: no code, doctests, tables, headings or markup."""
    blocks: list[list[str]] = [[]]
    for line in text.expandtabs().splitlines():
        entry = ENTRY.match(line)
        if entry or not line.strip():
            blocks.append([])
        if RULE.match(line):
            blocks[-1].clear()
        elif line.strip():
            blocks[-1].append(line[entry.end():] if entry else line)
    for block in blocks:
        block = [line.strip() for line in block]
        if sum(map(len, block)) < MIN_PARAGRAPH - len(block) or NOT_PROSE.search('\n'.join(block)):
            continue
        line = MARKUP.sub(r'\1\2\3', ' '.join(' '.join(block).split())).replace('`', '').replace('**', '')
        if is_prose(line):
            yield line


def identities(line: str) -> set[str]:
    """What makes a paragraph a repetition of another: its plain lower-case words, or those of one of its long
    sentences.

    Words that hold a capital, digit or sign do not count: the docstrings of sibling classes differ in those alone.
    """
    parts = [line, *(part for part in re.split(r'(?<=[.!?:;]) ', line) if len(part) >= MIN_PARAGRAPH)]
    return {' '.join(ODD_WORD.sub('', part).split()) for part in parts}


def sources() -> Iterator[tuple[str, list[str]]]:
    """Name and texts of every source, in a fixed order: the reference, the standard library, the packages."""
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


def gather(max_bytes: int = MAX_BYTES) -> dict[str, list[dict[str, str]]]:
    """The corpus as C4-shaped documents (`text`, `timestamp`, `url`) under `train` and `val`.

    The hash of a document's text puts one in 16 into `val`. The source that reaches `max_bytes` of text is the last.
    """
    splits: dict[str, list[dict[str, str]]] = {'train': [], 'val': []}
    seen: set[str] = set()
    total, bar = 0, progress('sample', max_bytes)
    for name, texts in sources():
        for number, text in enumerate(_join(texts, seen)):
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


def _join(texts: list[str], seen: set[str]) -> list[str]:
    """What is new in the texts of one file: one document or, about every 3,000 characters, a further one."""
    chunks: list[list[str]] = [[]]
    for text in texts:
        for line in paragraphs(text):
            keys = identities(line)
            if seen.isdisjoint(keys):
                chunks[-1].append(line)
            seen |= keys
        if sum(map(len, chunks[-1])) >= FULL_DOCUMENT:
            chunks.append([])
    return ['\n'.join(chunk) for chunk in chunks]


def train_tokenizer(texts: Iterable[str], folder: str | Path, vocab_size: int = 4096) -> int:
    """Trains a byte-level BPE (as GPT-2's, https://openai.com/research/better-language-models), and saves it.

    The folder loads with `AutoTokenizer.from_pretrained(folder)`. `<|endoftext|>` is the one special token. Returns the
    number of tokens: fewer than `vocab_size` where the texts are few.
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
    # `save_pretrained` writes this file again, in Rust, where a full disk is a bare Exception; here it is an OSError.
    Path(folder, 'tokenizer.json').write_text(bpe.to_str(pretty=True), 'utf-8')
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=end, eos_token=end, unk_token=end, pad_token=end,
                            model_input_names=['input_ids', 'attention_mask'],  # no token_type_ids: GPT-2 adds them
                            clean_up_tokenization_spaces=False).save_pretrained(str(folder))
    return bpe.get_vocab_size()
