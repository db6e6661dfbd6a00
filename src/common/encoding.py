"""Encodes documents of any length as token ids, in bounded memory."""

import json
import re
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from hashlib import sha256
from itertools import islice
from typing import Any, Optional
from uuid import uuid4
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from src.common.errors import UserError
from src.common.fast_encoding import FastEncoder

PIECE_CHARS = 1_000_000  # characters in one call of a tokenizer, which takes up to 200 bytes of memory for each
MAX_PIECE_CHARS = 8 * PIECE_CHARS  # length of a piece in which no exact cut is found
CONTEXT_CHARS = 256  # characters on both sides of a cut that are encoded to test whether the cut is exact
FIRST_SEARCH_CHARS = 10_000  # characters before the end of a piece, where the search for a cut begins
MAX_TRIES = 8  # cuts that are tested for each pattern and range
# Ends of words: a letter or digit before a blank; then a letter or digit before any other sign.
WORD_ENDS = re.compile(r'[^\W_](?=[ \t\r\n])'), re.compile(r'[^\W_](?=[\W_])')


def encode_documents(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[NDArray[np.int64]]:
    """Returns the token ids of each document, with EOS at the end and no other special tokens.

    A document that spells a special token, such as `</s>`, is text: that token's id is not among its ids. A long
    document is encoded in pieces, with cuts that do not change the ids. If MAX_PIECE_CHARS characters have no such
    cut, the document is cut elsewhere, with a warning.

    The tokenizer is a Hugging Face tokenizer with an EOS token. Each array has shape (tokens + 1,). Raises UserError
    where a document has a character outside the vocabulary, and the tokenizer has no unknown token.
    """
    documents, arrays = [], []
    for pieces in encode_pieces(tokenizer, texts):
        for ids, is_end in pieces:
            arrays.append(ids)
            if is_end:
                documents.append(np.concatenate(arrays, dtype=np.int64))
                arrays = []
    return documents


def encode_pieces(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str],
                  ) -> Iterator[list[tuple[NDArray[np.uint32], bool]]]:
    """Encodes documents as `encode_documents` does, and holds the ids of about PIECE_CHARS characters at a time.

    Yields lists of arrays, which joined are the ids of all documents. With each array comes whether a document ends.
    """
    eos = np.array([tokenizer.eos_token_id], np.uint32)
    for batch in _batches(piece for text in texts for piece in _split(tokenizer, text)):
        pieces = []
        for (_, is_end), ids in zip(batch, _encode(tokenizer, [piece for piece, _ in batch]), strict=True):
            pieces += [(ids, False), (eos, True)] if is_end else [(ids, False)]
        yield pieces


def prepare(tokenizer: PreTrainedTokenizerBase) -> None:
    """Prepares the encoding of documents. Processes that are forked later need not do it again."""
    if tokenizer.is_fast:
        _fast_encoder(tokenizer)


def count_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the highest token id + 1. A vocabulary with gaps has fewer tokens than this."""
    return 1 + max(tokenizer.get_vocab().values())


def _batches(pieces: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Groups pieces for one call of the tokenizer: up to PIECE_CHARS characters, or one longer piece."""
    batch, size = [], 0
    for piece in pieces:
        if batch and size + len(piece[0]) > PIECE_CHARS:
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += len(piece[0])
    if batch:
        yield batch


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[NDArray[np.uint32]]:
    """Encodes each text without special tokens; their spelling is text."""
    found = _fast_encoder(tokenizer).encode(texts, partial(encode_slowly, tokenizer)) if tokenizer.is_fast else None
    return [np.array(ids, np.uint32) for ids in encode_slowly(tokenizer, texts)] if found is None else found


def _fast_encoder(tokenizer: Any) -> FastEncoder:
    if tokenizer not in _fast_encoders:
        special, content = sorted(_special_tokens(tokenizer)), _backend(tokenizer).to_str()
        key = sha256(repr([content, special]).encode()).digest()
        if key not in _by_content:
            _by_content[key] = FastEncoder(tokenizer.name_or_path, content, special, partial(encode_slowly, tokenizer))
        _fast_encoders[tokenizer] = _by_content[key]
    return _fast_encoders[tokenizer]


def _backend(tokenizer: Any) -> Any:
    if tokenizer not in _backends:
        _backends[tokenizer] = _backend_without_special_tokens(tokenizer)
    # Each call of the Transformers tokenizer sets these three again
    _backends[tokenizer].no_truncation()
    _backends[tokenizer].no_padding()
    _backends[tokenizer].encode_special_tokens = True
    return _backends[tokenizer]


def encode_slowly(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Encodes each text with the library of the tokenizer, without EOS."""
    if not tokenizer.is_fast:
        # Some Python tokenizers always find a special token. A blank inside its spelling turns it into text.
        if special := _special_tokens(tokenizer):
            spelled = re.compile('|'.join(map(re.escape, special)))
            texts = [spelled.sub(lambda found: f'{found[0][0]} {found[0][1:]}', text) for text in texts]
        return tokenizer(texts, add_special_tokens=False, return_attention_mask=False)['input_ids']  # pyright: ignore
    # Without the Transformers wrapper, which would also make lists of masks and offsets.
    try:
        return [encoding.ids for encoding in _backend(tokenizer).encode_batch_fast(texts, add_special_tokens=False)]
    except Exception as e:  # the class that tokenizers raises
        if 'unk' not in str(e).lower():
            raise
    parts = texts if len(texts) > 1 else texts[0].split()
    for part in parts if len(parts) > 1 else []:
        encode_slowly(tokenizer, [part])  # raises UserError for the first word that cannot be encoded
    raise UserError(f'tokenizer_name: {tokenizer.name_or_path!r} has no unknown token, and a document has a '
                    f'character outside the vocabulary, in {texts[0][:50]!r}; add an unknown token to it, or '
                    'set another tokenizer (convert_c4.py: --tokenizer)')


# ---------------------------------------------------------------- the text of special tokens

_backends: WeakKeyDictionary[PreTrainedTokenizerBase, Any] = WeakKeyDictionary()
_fast_encoders: WeakKeyDictionary[PreTrainedTokenizerBase, FastEncoder] = WeakKeyDictionary()
_by_content: dict[bytes, FastEncoder] = {}  # the encoders of all tokenizers


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Special tokens of two or more characters. A special token of one character is that character in a text."""
    added: Any = tokenizer.added_tokens_decoder  # pyright: ignore
    special = {token.content for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
    return {token for token in special if len(token) > 1}


def _backend_without_special_tokens(tokenizer: Any) -> Any:
    """Returns the backend of a fast tokenizer, changed so that no text gets the id of a special token.

    With `encode_special_tokens` a backend reads the spelling of a special token as text. But the vocabulary may also
    contain that token as an ordinary token. A Unigram, WordPiece or WordLevel model then finds it, and so does a BPE
    model with a merge that makes it. In a copy of such a backend these tokens get names that no text contains. All ids
    stay the same.
    """
    from tokenizers import Tokenizer, models

    special, parts = _special_tokens(tokenizer), json.loads(tokenizer.backend_tokenizer.to_str())
    model, kind = parts['model'], parts['model']['type']
    vocabulary = {token for token, _ in model['vocab']} if kind == 'Unigram' else set(model['vocab'])
    names = {token: f'\uffff{uuid4().hex}' for token in special & vocabulary}
    if kind == 'BPE':
        prefix = model['continuing_subword_prefix'] or ''
        merges = [(a, b) for a, b in model['merges'] if names.keys().isdisjoint({a, b, a + b.removeprefix(prefix)})]
        if len(merges) == len(model['merges']) and not model['ignore_merges']:
            names = {}
        model['merges'] = merges
    unmarked = [token for token in parts['added_tokens'] if token['content'] in special and not token['special']]
    if not names and not unmarked:
        return tokenizer.backend_tokenizer
    for token in unmarked:
        token['special'] = True
    for token in parts['added_tokens']:
        token['content'] = names.get(token['content'], token['content'])
    if kind == 'Unigram':
        model['vocab'] = [(names.get(token, token), score) for token, score in model['vocab']]
    else:
        model['vocab'] = {names.get(token, token): i for token, i in model['vocab'].items()}
        model['unk_token'] = names.get(model['unk_token'], model['unk_token'])
    backend: Any = Tokenizer.from_str(json.dumps(parts))
    if kind == 'Unigram':  # the original scores: JSON changes the last bit of some
        backend.model = models.Unigram(model['vocab'], model['unk_id'], model['byte_fallback'])
    return backend


# ---------------------------------------------------------------- long texts
def _split(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[tuple[str, bool]]:
    """Splits a text into pieces, most of them of about PIECE_CHARS, all of up to MAX_PIECE_CHARS characters.

    With each piece comes whether the piece is the last.
    """
    start = 0
    while len(text) - start > PIECE_CHARS:
        stop, next_start = _find_exact_cut(tokenizer, text, start) or (start + MAX_PIECE_CHARS,) * 2
        if stop >= len(text):
            break
        if stop == start + MAX_PIECE_CHARS:
            warnings.warn(f'the tokenizer {tokenizer.name_or_path!r} finds no place in {MAX_PIECE_CHARS:,} characters '
                          'of a document where a cut keeps the token ids; the document was cut anyway, to limit '
                          'the memory, and some ids at the cut differ from those of the whole document', stacklevel=2)
        yield text[start:stop], False
        start = next_start
    yield text[start:], True


def _find_exact_cut(tokenizer: PreTrainedTokenizerBase, text: str, start: int) -> Optional[tuple[int, int]]:
    """Finds a cut that does not change the ids: returns the end of one piece and the start of the next.

    A cut is at the end of a word, where a pre-tokenizer splits too. It is tested on the characters around it. The
    blank between the pieces is left out if the tokenizer adds a blank before each text.
    """
    end = start + PIECE_CHARS
    for low, high in (max(end - FIRST_SEARCH_CHARS, start), end), (start, end), (end, start + MAX_PIECE_CHARS):
        for pattern in WORD_ENDS:
            cuts = (found.end() for found in pattern.finditer(text, low, high))
            nearest = islice(cuts, MAX_TRIES) if low == end else reversed(deque(cuts, MAX_TRIES))
            for cut in nearest:
                for next_start in [cut, cut + 1][:1 + (text[cut] == ' ')]:
                    left, right = text[max(cut - CONTEXT_CHARS, 0):cut], text[next_start:cut + CONTEXT_CHARS]
                    whole, *halves = _encode(tokenizer, [left + text[cut:next_start] + right, left, right])
                    if np.array_equal(whole, np.concatenate(halves)):
                        return cut, next_start
    return None
