"""Tokenizers: Hugging Face's, from the hub or from a folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from streaming.base.distributed import get_local_rank
from torch import distributed as dist
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from src.errors import UserError
from src.schema import Config


class HFTokenizer:
    """A Hugging Face tokenizer that has an EOS and a pad token.

    Args:
        tokenizer_name: A name on the hub, such as `gpt2`, or a folder, such as `./my-copy-c4/tokenizer`.
        max_seq_len: Tokens in a sample.

    Attributes:
        tokenizer: Hugging Face's own object. Where it has no pad token, EOS is the pad token.

    Raises:
        UserError: No such tokenizer, or the hub cannot be reached, or it has no EOS token to end a document with.
    """

    def __init__(self, tokenizer_name: str, max_seq_len: int) -> None:
        self.tokenizer_name = tokenizer_name
        self.max_seq_len = max_seq_len
        self.tokenizer = _load(tokenizer_name)
        if self.tokenizer.eos_token_id is None:
            raise UserError(f'tokenizer_name: {tokenizer_name!r} has no EOS token, which every document ends with; '
                            'choose a tokenizer of a causal language model, such as gpt2')
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @property
    def vocab_size(self) -> int:
        """Number of tokens, with those that were added to the vocabulary."""
        return len(self.tokenizer)


def _load(name: str) -> PreTrainedTokenizerBase:
    """On each node one rank alone downloads; the others then find it in the cache."""
    several = dist.is_available() and dist.is_initialized()
    if several and get_local_rank() != 0:
        dist.barrier()
    try:
        # Documents longer than a sample are the loader's to cut: without the length, no warning about them. A document that
        # spells a special token is text: the id of EOS is where a document ends, and nowhere else.
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False, model_max_length=int(1e30), split_special_tokens=True)
    except Exception as e:  # of a damaged file, tokenizers raises just that
        raise UserError(_why_not(name, e)) from None
    finally:
        if several and get_local_rank() == 0:
            dist.barrier()


def _why_not(name: str, error: Exception) -> str:
    reason = (str(error).splitlines() or [''])[0]
    if Path(name).is_dir():
        return f'tokenizer_name: folder {name!r} holds no tokenizer that can be loaded: {type(error).__name__}: {reason}'
    if name.startswith(('.', '/', '~')) or name.count('/') > 1:
        root = Path(name).parent if Path(name).name == 'tokenizer' else './my-copy-c4'
        return (f'tokenizer_name: no folder {name!r}. Make one with\n'
                f'  python convert_c4.py --source sample --out_root {root}\n'
                f'which writes {root}/tokenizer, or name a tokenizer on the hub, such as gpt2')
    return (f'tokenizer_name: {name!r} is no folder here, and it could not be loaded from the Hugging Face hub: check the name '
            f'and the network. Without a network, make one with\n'
            f'  python convert_c4.py --source sample --out_root ./my-copy-c4\n'
            f'and name the folder ./my-copy-c4/tokenizer ({type(error).__name__}: {reason})')


def encode_documents(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[NDArray[np.int64]]:
    """Token ids of each document, closed by EOS; no other special tokens, and no limit to the length."""
    documents: Any
    if tokenizer.is_fast:  # past the wrapper, which makes Python lists of masks and offsets that nobody reads
        backend: Any = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = tokenizer.split_special_tokens
        documents = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    else:
        documents = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)['input_ids']
    out = [np.full(len(ids) + 1, tokenizer.eos_token_id, np.int64) for ids in documents]
    for array, ids in zip(out, documents, strict=True):
        array[:-1] = ids
    return out


def bytes_per_token(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> NDArray[np.float64]:
    """How many UTF-8 bytes of text each token id stands for: 0 for special tokens, such as EOS.

    In a byte-level BPE every character of a token stands for one byte (Radford et al. 2019, section 2.2), so the lengths are
    exact, also of tokens that hold part of a character. Of a tokenizer that normalises its text, they are of the result.

    Args:
        tokenizer: Hugging Face's own object.
        vocab_size: Ids that the model has embeddings for.

    Returns:
        Of shape (vocab_size,); NaN where it is not known: ids without a token, added tokens that swallow the spaces beside
        them, and every token of a tokenizer that is no byte-level BPE, or one that puts a space before each document.
    """
    lengths = np.full(vocab_size, np.nan)
    if not tokenizer.is_fast:
        return lengths
    backend: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    parts = json.loads(backend.to_str())
    model, splits = parts['model'], json.dumps(parts['pre_tokenizer'])
    if (model['type'] != 'BPE' or model['continuing_subword_prefix'] or model['end_of_word_suffix']
            or '"ByteLevel"' not in splits or '"add_prefix_space": true' in splits):
        return lengths
    for token, i in model['vocab'].items():
        lengths[i] = len(token)
    for i, token in tokenizer.added_tokens_decoder.items():
        swallows = token.lstrip or token.rstrip
        lengths[i] = 0 if token.special else np.nan if swallows else len(token.content.encode())
    return lengths


def check_vocab(tokenizer: HFTokenizer, model_vocab_size: int) -> None:
    """Holds a tokenizer's ids against a model's embedding.

    Raises:
        UserError: The tokenizer has ids that the model has no embedding for.
    """
    needed = 1 + max(tokenizer.tokenizer.get_vocab().values())  # ids may have gaps: more than len(tokenizer)
    if needed > model_vocab_size:
        raise UserError(f'model.vocab_size: {model_vocab_size} is too small for tokenizer_name {tokenizer.tokenizer_name!r}, '
                        f'whose ids need {needed}; set model.vocab_size={needed} or more (of hf_causal_lm: '
                        f'model.config_overrides.vocab_size={needed})')


TOKENIZER_REGISTRY = {'hftokenizer': HFTokenizer}


def load_tokenizer(c: Config, of_loaders: bool = True) -> HFTokenizer:
    """Loads the tokenizer of the section `tokenizer`, and finds out whether the others that the config names are there.

    Args:
        c: The config.
        of_loaders: Whether the datasets of the config are read, each with its tokenizer.

    Raises:
        UserError: One of them cannot be had; the message begins with the keys that name it.
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
