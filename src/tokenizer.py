"""Hugging Face tokenizers, from the hub or from a folder, and hashes that tell them apart."""

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

from src.common.encoding import count_ids, encode_slowly
from src.common.errors import UserError, first_line
from src.config.schema import Config

# Files that hold a vocabulary but do not name the class of their tokenizer. For each, a class of transformers that
# reads such a file, and the usual EOS token of that class.
VOCABULARY_FILES = {'tokenizer.model': ('LlamaTokenizer', '</s>'), 'spiece.model': ('T5Tokenizer', '</s>'),
                    'vocab.json': ('GPT2Tokenizer', '<|endoftext|>'), 'vocab.txt': ('BertTokenizer', '[SEP]')}
LIKELY_EOS = '</s>', '<|endoftext|>', '<eos>', '[SEP]'
OPTIONAL_PACKAGES = 'sentencepiece', 'tiktoken', 'protobuf'  # which some tokenizers need and the kit does not install
MAX_SHOWN = 200  # characters of another library's message, or of a list of files
# Tokenizers with equal vocabularies differ in the ids of this text: case, accents, blanks, digits, scripts, ...
PROBE = ('The  QUICK brown fox\'s\tname:\n\n  na\u00efve cafe\u0301 \uff21\ufb01 3.14159 12345678 '
         '\u4e2d\u6587\u3002 \u0416\u0443\u043a \U0001f600 <b>don\'t</b> ')


class HFTokenizer:
    """A Hugging Face tokenizer with an EOS and a pad token, which adds no tokens to a text.

    Other calls and attributes go to the Hugging Face tokenizer: `encode`, `decode`, `eos_token_id`, ... Tokens that it
    would put around a text (BOS of Llama and Gemma, [CLS] and [SEP] of BERT) are left out, because documents in
    training have none. Calls return `input_ids` and `attention_mask`, and pad on the right.

    Args:
        tokenizer_name: A name on the hub, such as `gpt2`, or a folder, such as `./my-copy-c4/tokenizer`.
        max_seq_len: Number of tokens in a sample.

    Attributes:
        tokenizer: The Hugging Face tokenizer. If it has no pad token, EOS is the pad token.

    Raises:
        UserError: The tokenizer does not exist, the hub cannot be reached, there is no EOS token to end documents with,
            or the EOS token that a folder's config names is not in the vocabulary.
    """

    def __init__(self, tokenizer_name: str, max_seq_len: int) -> None:
        self.tokenizer_name = tokenizer_name
        self.max_seq_len = max_seq_len
        self.tokenizer = _load(tokenizer_name)
        if self.tokenizer.eos_token_id is None:
            raise UserError(_explain_missing_eos(tokenizer_name, self.tokenizer))
        _check_eos(Path(tokenizer_name), self.tokenizer)
        _warn_of_lost_characters(tokenizer_name, self.tokenizer)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        _stop_adding_tokens(self.tokenizer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tokenizer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == 'tokenizer':  # not set yet, while pickle or copy builds the object
            raise AttributeError(name)
        return getattr(self.tokenizer, name)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, including tokens that were added to the vocabulary."""
        return len(self.tokenizer)

    @cached_property
    def hash(self) -> str:
        """Identifies this tokenizer; see `tokenizer_hash`."""
        return tokenizer_hash(self.tokenizer)

    def check_made_with(self, what: str, made_by: Optional[str], made_by_hash: str,
                        setting: str = 'tokenizer_name') -> None:
        """Raises UserError if `what`, such as `the tokens in ./data/train`, was made with another tokenizer.

        `made_by` and `made_by_hash` are the name (None: unknown) and hash of the tokenizer that made `what`. `setting`
        is the key of the config that names this tokenizer.
        """
        # Earlier versions of the kit hashed the serialization of every tokenizer
        if made_by_hash == self.hash or made_by_hash == _structure_hash(_open(self.tokenizer_name)):
            return
        raise UserError(f'{setting}: {self.tokenizer_name!r} (hash {self.hash[:12]}) differs from the tokenizer of '
                        f'{what}: {made_by or "one whose name is not known"} (hash {made_by_hash[:12]}); set the '
                        'one that was used')


def _load(name: str) -> PreTrainedTokenizerBase:
    """Loads a tokenizer. On each node, one rank downloads it; the others then read the cache."""
    is_distributed = dist.is_available() and dist.is_initialized()
    if is_distributed and get_local_rank() != 0:
        dist.barrier()
    try:
        return _open(name)
    except UserError:
        raise
    except Exception as e:  # for a damaged file, the library tokenizers raises Exception itself
        raise UserError(_explain_failure(name, e)) from None
    finally:
        if is_distributed and get_local_rank() == 0:
            dist.barrier()


def _open(name: str) -> PreTrainedTokenizerBase:
    # model_max_length: the loader cuts long documents, so nothing should warn about them. split_special_tokens: a
    # document that spells `</s>` is text; only the end of a document has the id of EOS. model_input_names: without
    # token_type_ids, for which GPT-2 would add an embedding.
    return _class_for(name).from_pretrained(
        name, trust_remote_code=False, model_max_length=int(1e30), padding_side='right', split_special_tokens=True,
        model_input_names=['input_ids', 'attention_mask'])


def _class_for(name: str) -> Any:
    """Chooses the class of transformers that loads a tokenizer; not every folder names its class.

    Raises UserError for a file, for a folder without a tokenizer, and for a folder that holds only a vocabulary, which
    several classes would read in different ways.
    """
    folder = Path(name)
    if folder.is_file():
        raise UserError(f'tokenizer_name: {name!r} is a file; name its folder: {str(folder.parent)!r}')
    configs = [_read_json(folder / file) for file in ('tokenizer_config.json', 'config.json')]
    if not folder.is_dir() or any(config.get('tokenizer_class') or config.get('model_type') in [*CONFIG_MAPPING]
                                  for config in configs):
        return AutoTokenizer
    if (folder / 'tokenizer.json').is_file():  # saved by the library tokenizers
        return PreTrainedTokenizerFast
    for file, (cls, eos) in VOCABULARY_FILES.items():
        if (folder / file).is_file():
            raise UserError(f'tokenizer_name: folder {name!r} holds {file}, and nothing that says which tokenizer it '
                            'belongs to; write the name of its class in transformers, and its EOS token, into '
                            f'{folder}/tokenizer_config.json, such as '
                            f'{{"tokenizer_class": "{cls}", "eos_token": "{eos}"}}')
    raise UserError(f'tokenizer_name: folder {name!r} holds no tokenizer that can be loaded: there is no '
                    f'tokenizer.json, and no config that names a tokenizer class; it holds {_list_files(folder)}; '
                    'name the folder of a tokenizer')


def _read_json(path: Path) -> dict[str, Any]:
    """Reads a config file of a tokenizer; {} if there is no such file."""
    try:
        config = json.loads(path.read_text('utf-8')) if path.is_file() else {}
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise UserError(f'tokenizer_name: {path} is not a complete JSON object; copy the file again')
    return config


def _list_files(folder: Path) -> str:
    return ', '.join(sorted(path.name for path in folder.iterdir()))[:MAX_SHOWN] or 'no files'


def _explain_failure(name: str, error: Exception) -> str:
    """The message for a tokenizer that `_open` could not load."""
    text, reason = str(error).lower(), f'{type(error).__name__}: {first_line(error)[:MAX_SHOWN]}'
    installed = {distribution.name.lower() for distribution in distributions()}
    if missing := [package for package in OPTIONAL_PACKAGES if package in text and package not in installed]:
        return f'tokenizer_name: {name!r} needs packages that are not installed: pip install {" ".join(missing)}'
    if Path(name).is_dir():
        if 'PathLike' in reason or "'endswith'" in reason:  # the class got None as the path of a file
            reason = ('a file is missing that its class reads, such as tokenizer.json, or merges.txt beside '
                      f'vocab.json; copy the file; the folder holds {_list_files(Path(name))}')
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


def _explain_missing_eos(name: str, tokenizer: Any) -> str:
    """The message for a tokenizer without EOS token, with the likely one of its special tokens."""
    special = _special_tokens(tokenizer)
    likely = [*(token for token in LIKELY_EOS if token in special), *special[-1:], '<|endoftext|>'][0]
    found = f'its special tokens are {", ".join(special[:10])}' if special else 'it has no special tokens'
    fix = (f'write the token that ends a text into {Path(name)}/tokenizer_config.json, such as '
           f'{{"eos_token": "{likely}"}}' if Path(name).is_dir() else
           'choose a tokenizer of a causal language model, such as gpt2')
    return f'tokenizer_name: {name!r} has no EOS token, which must end every document; {found}: {fix}'


def _special_tokens(tokenizer: Any) -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def _check_eos(folder: Path, tokenizer: Any) -> None:
    """Raises UserError if a folder's config misspells the EOS token: transformers would add it as a new token.

    If the tokenizer has no other special tokens, the one in its config may really be new.
    """
    eos, config = tokenizer.eos_token, _read_json(folder / 'tokenizer_config.json')
    named = config.get('eos_token')
    others = [token for token in _special_tokens(tokenizer) if token != eos]
    is_known = (tokenizer.backend_tokenizer.model.token_to_id(eos) is not None if tokenizer.is_fast else
                tokenizer.eos_token_id < tokenizer.vocab_size)
    if is_known or not others or eos not in (named, *_contents([named])):
        return
    added = [*_read_json(folder / 'tokenizer.json').get('added_tokens', []),
             *config.get('added_tokens_decoder', {}).values()]
    if eos not in {*_contents(added), *_read_json(folder / 'added_tokens.json')}:
        raise UserError(f'tokenizer_name: eos_token {eos!r} of {folder}/tokenizer_config.json is not in the '
                        f'vocabulary; the special tokens are {", ".join(others[:10])}: name the one that ends a text, '
                        'or add a token with add_special_tokens and save_pretrained of transformers')


def _contents(tokens: list[Any]) -> list[str]:
    return [token['content'] for token in tokens if isinstance(token, dict)]


def _warn_of_lost_characters(name: str, tokenizer: Any) -> None:
    """Warns of a BPE tokenizer that drops unknown characters: it has no unknown token and no tokens for bytes."""
    backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
    if backend is None or type(backend.model).__name__ != 'BPE' or get_local_rank() != 0:
        return
    steps = b''.join(step.__getstate__() for step in (backend.pre_tokenizer, backend.normalizer) if step is not None)
    if backend.model.unk_token is None and not backend.model.byte_fallback and b'"ByteLevel"' not in steps:
        warnings.warn(f'the tokenizer {name!r} has no unknown token and no tokens for bytes: characters that are '
                      'not in its vocabulary are left out', stacklevel=1)  # 1: once per process


def _stop_adding_tokens(tokenizer: Any) -> None:
    """Stops a tokenizer from adding tokens to a text; it stays so when it is saved and loaded again."""
    for name in ('add_bos_token', 'add_eos_token'):
        if getattr(tokenizer, name, False):
            setattr(tokenizer, name, False)
    if tokenizer.is_fast and tokenizer.num_special_tokens_to_add():
        tokenizer.backend_tokenizer.post_processor = None


# ---------------------------------------------------------------- which tokenizer it is
def tokenizer_hash(tokenizer: Any) -> str:
    """Returns 64 hexadecimal digits, equal for tokenizers that give every document the same ids.

    The hash does not depend on tokens that a tokenizer adds to a text, on padding, on the version of transformers, or
    on saving and loading. It takes the Hugging Face tokenizer, and switches off truncation and padding that earlier
    calls may have left on.
    """
    if tokenizer.is_fast and _is_byte_level(tokenizer):
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        return _structure_hash(tokenizer)
    ids: Any = _ids_of(tokenizer, PROBE)
    if ids is None:  # it refuses the text as a whole
        ids = [_ids_of(tokenizer, part) for part in (*PROBE.split(), *PROBE)]
    content = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id, ids])
    return hashlib.sha256(content.encode()).hexdigest()


def _ids_of(tokenizer: Any, text: str) -> Optional[list[int]]:
    """The ids of a text; None if it has a character that the tokenizer cannot encode."""
    try:
        return [*encode_slowly(tokenizer, [text])[0], tokenizer.eos_token_id]
    except UserError:
        return None


def _is_byte_level(tokenizer: Any) -> bool:
    """Whether it is a byte-level BPE, like GPT-2's and the kit's: their serialization is the same in all versions."""
    post = tokenizer.backend_tokenizer.post_processor
    kind = post is not None and json.loads(post.__getstate__())['type']
    return kind == 'ByteLevel' and type(tokenizer.backend_tokenizer.model).__name__ == 'BPE'


def _structure_hash(tokenizer: Any) -> str:
    """The hash of the serialization. Earlier versions of the kit used it for all tokenizers."""
    fast = tokenizer.is_fast
    content = tokenizer.backend_tokenizer.to_str() if fast else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(f'{content} {tokenizer.eos_token_id}'.encode()).hexdigest()


def check_vocab(tokenizer: Any, model_vocab_size: int) -> None:
    """Raises UserError if the model's embedding, of `model_vocab_size` rows, is too small for a tokenizer's ids.

    `tokenizer` is an HFTokenizer, or a dataset with the same attributes `tokenizer` and `tokenizer_name`.
    """
    needed = count_ids(tokenizer.tokenizer)
    if needed > model_vocab_size:
        raise UserError(f'model.vocab_size: {model_vocab_size} is too small for tokenizer_name '
                        f'{tokenizer.tokenizer_name!r}, whose ids need {needed}; set model.vocab_size={needed} or more '
                        f'(for hf_causal_lm: model.config_overrides.vocab_size={needed})')


TOKENIZER_REGISTRY = {'hftokenizer': HFTokenizer}


def load_tokenizer(c: Config, check_loaders: bool = True) -> HFTokenizer:
    """Loads the tokenizer of section `tokenizer`, after checking that the loaders' tokenizers load as well.

    `check_loaders` is false where the loaders are not the kit's own, and read no tokenizer. Raises UserError if a
    tokenizer cannot be loaded; the message begins with the keys that name it.
    """
    assert c.tokenizer
    keys: dict[str, list[str]] = {c.tokenizer.tokenizer_name: ['tokenizer.tokenizer_name']}
    for section, loader in (('train_loader', c.train_loader), ('eval_loader', c.eval_loader)):
        if loader and check_loaders:
            keys.setdefault(loader.dataset.tokenizer_name, []).append(f'{section}.dataset.tokenizer_name')
    built = {}
    for name, sections in keys.items():
        try:
            built[name] = TOKENIZER_REGISTRY[c.tokenizer.name](name, c.tokenizer.max_seq_len)
        except UserError as e:
            named = 'tokenizer_name' if name == c.tokenizer_name else ' and '.join(sections)
            raise UserError(str(e).replace('tokenizer_name', named, 1)) from None
    return built[c.tokenizer.tokenizer_name]
