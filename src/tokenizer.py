"""Tokenizers: Hugging Face's, from the hub or from a folder."""

import hashlib
import json
import warnings
from functools import cached_property
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, Optional

from streaming.base.distributed import get_local_rank
from torch import distributed as dist
from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from src.common.encoding import encode_documents, n_ids
from src.common.errors import UserError, first_line
from src.config.schema import Config

# Files that hold a vocabulary and do not say of which tokenizer it is. For each a class of transformers that reads such
# a file, and the EOS token that goes with it.
CLASSES = {'tokenizer.model': ('LlamaTokenizer', '</s>'), 'spiece.model': ('T5Tokenizer', '</s>'),
           'vocab.json': ('GPT2Tokenizer', '<|endoftext|>'), 'vocab.txt': ('BertTokenizer', '[SEP]')}
ENDS = '</s>', '<|endoftext|>', '<eos>', '[SEP]'  # special tokens that are likely to end a text
PACKAGES = 'sentencepiece', 'tiktoken', 'protobuf'  # that some tokenizers need, and the kit does not
SHOWN = 200  # characters of another library's message, or of a list of files
# Two tokenizers with the same vocabulary are told apart by the ids of this text: case, accents, blanks, digits, ...
PROBE = ('The  QUICK brown fox\'s\tname:\n\n  na\u00efve cafe\u0301 \uff21\ufb01 3.14159 12345678 '
         '\u4e2d\u6587\u3002 \u0416\u0443\u043a \U0001f600 <b>don\'t</b> ')


class HFTokenizer:
    """A Hugging Face tokenizer that has an EOS and a pad token, and gives the ids of a text alone.

    Calls and attributes but those below are the Hugging Face tokenizer's: `encode`, `decode`, `eos_token_id`, ... Where
    that one puts tokens around each text (BOS, as Llama's and Gemma's do, or [CLS] and [SEP]), it does so no longer:
    documents in training have none. It returns `input_ids` and `attention_mask`, and pads on the right.

    Args:
        tokenizer_name: A name on the hub, such as `gpt2`, or a folder, such as `./my-copy-c4/tokenizer`.
        max_seq_len: Tokens in a sample.

    Attributes:
        tokenizer: Hugging Face's own object. Where it has no pad token, EOS is the pad token.

    Raises:
        UserError: No such tokenizer, or the hub cannot be reached, or it has no EOS token to end a document with, or
            the config of a folder names one that is not in its vocabulary.
    """

    def __init__(self, tokenizer_name: str, max_seq_len: int) -> None:
        self.tokenizer_name = tokenizer_name
        self.max_seq_len = max_seq_len
        self.tokenizer = _load(tokenizer_name)
        if self.tokenizer.eos_token_id is None:
            raise UserError(_no_eos(tokenizer_name, self.tokenizer))
        _check_eos(Path(tokenizer_name), self.tokenizer)
        _warn_of_gaps(tokenizer_name, self.tokenizer)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        _add_nothing(self.tokenizer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tokenizer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == 'tokenizer':  # of a copy that is not filled yet
            raise AttributeError(name)
        return getattr(self.tokenizer, name)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, with those that were added to the vocabulary."""
        return len(self.tokenizer)

    @cached_property
    def hash(self) -> str:
        """What tells this tokenizer from others; see `tokenizer_hash`."""
        return tokenizer_hash(self.tokenizer)

    def check_made(self, what: str, made_by: Optional[str], its_hash: str, setting: str = 'tokenizer_name') -> None:
        """Raises UserError where `what`, such as `the tokens in ./data/train`, was made with another tokenizer.

        `made_by` is the name of the tokenizer that made it, None where that is not known, and `its_hash` is the hash of
        that one. `setting` is where this tokenizer is named.
        """
        # Earlier versions of the kit hashed the serialization of every tokenizer, as it was loaded.
        if its_hash == self.hash or its_hash == _structure_hash(_open(self.tokenizer_name)):
            return
        raise UserError(f'{setting}: {self.tokenizer_name!r} (hash {self.hash[:12]}) is another tokenizer than that of '
                        f'{what}: {made_by or "one whose name is not known"} (hash {its_hash[:12]}); set the one that '
                        'was used')


def _load(name: str) -> PreTrainedTokenizerBase:
    """On each node one rank alone downloads; the others then find it in the cache."""
    several = dist.is_available() and dist.is_initialized()
    if several and get_local_rank() != 0:
        dist.barrier()
    try:
        return _open(name)
    except UserError:
        raise
    except Exception as e:  # of a damaged file, tokenizers raises just that
        raise UserError(_why_not(name, e)) from None
    finally:
        if several and get_local_rank() == 0:
            dist.barrier()


def _open(name: str) -> PreTrainedTokenizerBase:
    # Documents longer than a sample are the loader's to cut: without the length, no warning about them. A document that
    # spells a special token is text: the id of EOS is where a document ends, and nowhere else. Training has no
    # `token_type_ids`, and GPT-2 adds an embedding for each: a tokenizer makes none.
    return _class_for(name).from_pretrained(
        name, trust_remote_code=False, model_max_length=int(1e30), padding_side='right', split_special_tokens=True,
        model_input_names=['input_ids', 'attention_mask'])


def _class_for(name: str) -> Any:
    """The class of transformers that loads a tokenizer; a folder of one file does not name it.

    Raises UserError for a file, for a folder without a tokenizer, and for one with a vocabulary alone, which several
    classes read in different ways.
    """
    folder = Path(name)
    if folder.is_file():
        raise UserError(f'tokenizer_name: {name!r} is a file; name its folder: {str(folder.parent)!r}')
    configs = [_json(folder / file) for file in ('tokenizer_config.json', 'config.json')]
    if not folder.is_dir() or any(config.get('tokenizer_class') or config.get('model_type') in [*CONFIG_MAPPING]
                                  for config in configs):
        return AutoTokenizer
    if (folder / 'tokenizer.json').is_file():  # as the library tokenizers saves
        return PreTrainedTokenizerFast
    for file, (cls, eos) in CLASSES.items():
        if (folder / file).is_file():
            raise UserError(f'tokenizer_name: folder {name!r} holds {file}, and nothing that says which tokenizer it '
                            'belongs to; write the name of its class in transformers, and its EOS token, into '
                            f'{folder}/tokenizer_config.json, such as '
                            f'{{"tokenizer_class": "{cls}", "eos_token": "{eos}"}}')
    raise UserError(f'tokenizer_name: folder {name!r} holds no tokenizer that can be loaded: there is no '
                    f'tokenizer.json, and no file names the class of another; it holds {_files(folder)}; name the '
                    'folder of a tokenizer')


def _json(path: Path) -> dict[str, Any]:
    """A file of a tokenizer; empty where there is none."""
    try:
        found = json.loads(path.read_text('utf-8')) if path.is_file() else {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f'tokenizer_name: {path} is no whole JSON object; copy it again')
    return found


def _files(folder: Path) -> str:
    return ', '.join(sorted(path.name for path in folder.iterdir()))[:SHOWN] or 'no files'


def _why_not(name: str, error: Exception) -> str:
    text, reason = str(error).lower(), f'{type(error).__name__}: {first_line(error)[:SHOWN]}'
    installed = {distribution.name.lower() for distribution in distributions()}
    if lacking := [package for package in PACKAGES if package in text and package not in installed]:
        return f'tokenizer_name: {name!r} needs packages that are not installed: pip install {" ".join(lacking)}'
    if Path(name).is_dir():
        if 'PathLike' in reason or "'endswith'" in reason:  # None in place of the path of a file that its class reads
            reason = ('a file is missing that its class reads, such as tokenizer.json, or merges.txt beside '
                      f'vocab.json; copy it; the folder holds {_files(Path(name))}')
        return f'tokenizer_name: folder {name!r} holds no tokenizer that can be loaded: {reason}'
    if name.startswith(('.', '/', '~')) or name.count('/') > 1:
        root = Path(name).parent if Path(name).name == 'tokenizer' else './my-copy-c4'
        return (f'tokenizer_name: no folder {name!r}. Make one with\n'
                f'  python convert_c4.py --source sample --out_root {root}\n'
                f'which writes {root}/tokenizer, or name a tokenizer on the hub, such as gpt2')
    return (f'tokenizer_name: {name!r} is no folder here, and it could not be loaded from the Hugging Face hub: check '
            'the name and the network. Without a network, make one with\n'
            '  python convert_c4.py --source sample --out_root ./my-copy-c4\n'
            f'and name the folder ./my-copy-c4/tokenizer ({reason})')


def _no_eos(name: str, tokenizer: Any) -> str:
    special = _special(tokenizer)
    likely = [*(token for token in ENDS if token in special), *special[-1:], '<|endoftext|>'][0]
    there = f'its special tokens are {", ".join(special[:10])}' if special else 'it has no special tokens'
    mend = (f'write the token that ends a text into {Path(name)}/tokenizer_config.json, such as '
            f'{{"eos_token": "{likely}"}}' if Path(name).is_dir() else
            'choose a tokenizer of a causal language model, such as gpt2')
    return f'tokenizer_name: {name!r} has no EOS token, which every document ends with; {there}: {mend}'


def _special(tokenizer: Any) -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def _check_eos(folder: Path, tokenizer: Any) -> None:
    """Refuses an EOS token that the config of a folder alone names: transformers makes a new token of a mistyped one.

    Where a tokenizer has no special tokens, the one that its config names may be new.
    """
    eos, config = tokenizer.eos_token, _json(folder / 'tokenizer_config.json')
    named = config.get('eos_token')
    others = [token for token in _special(tokenizer) if token != eos]
    known = (tokenizer.backend_tokenizer.model.token_to_id(eos) is not None if tokenizer.is_fast else
             tokenizer.eos_token_id < tokenizer.vocab_size)
    if known or not others or eos not in (named, *_contents([named])):
        return
    added = [*_json(folder / 'tokenizer.json').get('added_tokens', []),
             *config.get('added_tokens_decoder', {}).values()]
    if eos not in {*_contents(added), *_json(folder / 'added_tokens.json')}:
        raise UserError(f'tokenizer_name: eos_token {eos!r} of {folder}/tokenizer_config.json is no token of it; its '
                        f'special tokens are {", ".join(others[:10])}: name the one that ends a text, or add a token, '
                        'with add_special_tokens and save_pretrained of transformers')


def _contents(tokens: list[Any]) -> list[str]:
    return [token['content'] for token in tokens if isinstance(token, dict)]


def _warn_of_gaps(name: str, tokenizer: Any) -> None:
    backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
    if backend is None or type(backend.model).__name__ != 'BPE' or get_local_rank() != 0:
        return
    steps = b''.join(step.__getstate__() for step in (backend.pre_tokenizer, backend.normalizer) if step is not None)
    if backend.model.unk_token is None and not backend.model.byte_fallback and b'"ByteLevel"' not in steps:
        warnings.warn(f'the tokenizer {name!r} has no unknown token and no tokens for bytes: signs of a text that are '
                      'not in its vocabulary are left out', stacklevel=1)  # its own line: once in a process


def _add_nothing(tokenizer: Any) -> None:
    """Makes a tokenizer give the ids of a text alone, as in training; what it saves and loads again does so, too."""
    for name in ('add_bos_token', 'add_eos_token'):
        if getattr(tokenizer, name, False):
            setattr(tokenizer, name, False)
    if tokenizer.is_fast and tokenizer.num_special_tokens_to_add():
        tokenizer.backend_tokenizer.post_processor = None


# ---------------------------------------------------------------- which tokenizer it is
def tokenizer_hash(tokenizer: Any) -> str:
    """64 hexadecimal digits that are the same for tokenizers that give every document the same ids, and else differ.

    They do not depend on what a tokenizer puts around a text, on padding, or on the version of transformers. They stay
    when a tokenizer is saved and loaded again. The tokenizer, Hugging Face's own object, no longer cuts or pads, as
    calls of it may have told it.
    """
    if tokenizer.is_fast and _is_byte_level(tokenizer):
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        return _structure_hash(tokenizer)
    ids: Any = _ids_of(tokenizer, PROBE)
    if ids is None:
        ids = [_ids_of(tokenizer, part) for part in (*PROBE.split(), *PROBE)]
    says = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id, ids])
    return hashlib.sha256(says.encode()).hexdigest()


def _ids_of(tokenizer: Any, text: str) -> Optional[list[int]]:
    try:
        return encode_documents(tokenizer, [text])[0].tolist()
    except UserError:  # a sign that it does not have
        return None


def _is_byte_level(tokenizer: Any) -> bool:
    """Whether the serialization is the same in each version, as of GPT-2's tokenizer and those that the kit trains."""
    post = tokenizer.backend_tokenizer.post_processor
    kind = post is not None and json.loads(post.__getstate__())['type']
    return kind == 'ByteLevel' and type(tokenizer.backend_tokenizer.model).__name__ == 'BPE'


def _structure_hash(tokenizer: Any) -> str:
    """The hash of the serialization: that of all tokenizers in data which an earlier version of the kit has made."""
    fast = tokenizer.is_fast
    says = tokenizer.backend_tokenizer.to_str() if fast else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(f'{says} {tokenizer.eos_token_id}'.encode()).hexdigest()


def check_vocab(tokenizer: Any, model_vocab_size: int) -> None:
    """Raises UserError where a tokenizer has ids that the model's embedding, of `model_vocab_size` rows, does not have.

    `tokenizer` is an HFTokenizer, or a dataset, which has the two attributes that are read here.
    """
    needed = n_ids(tokenizer.tokenizer)
    if needed > model_vocab_size:
        raise UserError(f'model.vocab_size: {model_vocab_size} is too small for tokenizer_name '
                        f'{tokenizer.tokenizer_name!r}, whose ids need {needed}; set model.vocab_size={needed} or more '
                        f'(of hf_causal_lm: model.config_overrides.vocab_size={needed})')


TOKENIZER_REGISTRY = {'hftokenizer': HFTokenizer}


def load_tokenizer(c: Config, of_loaders: bool = True) -> HFTokenizer:
    """Loads the tokenizer of the section `tokenizer`, and finds out whether the others that the config names are there.

    `of_loaders` says whether the datasets of the config are read, each with its tokenizer. Raises UserError where one
    of the tokenizers cannot be had; the message begins with the keys that name it.
    """
    assert c.tokenizer
    keys: dict[str, list[str]] = {c.tokenizer.tokenizer_name: ['tokenizer.tokenizer_name']}
    for section, loader in (('train_loader', c.train_loader), ('eval_loader', c.eval_loader)):
        if loader and of_loaders:
            keys.setdefault(loader.dataset.tokenizer_name, []).append(f'{section}.dataset.tokenizer_name')
    built = {}
    for name, sections in keys.items():
        try:
            built[name] = TOKENIZER_REGISTRY[c.tokenizer.name](name, c.tokenizer.max_seq_len)
        except UserError as e:
            named = 'tokenizer_name' if name == c.tokenizer_name else ' and '.join(sections)
            raise UserError(str(e).replace('tokenizer_name', named, 1)) from None
    return built[c.tokenizer.tokenizer_name]
