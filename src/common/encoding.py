"""Documents as token ids: the ids of their text and nothing else, in bounded memory."""

import json
import re
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Optional
from uuid import uuid4
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from src.common.errors import UserError

PIECE = 1_000_000  # characters in one call of a tokenizer, which takes up to 200 bytes of memory for each
LONGEST = 8 * PIECE  # a text without a safe place to cut may be one piece up to this length
WINDOW = 256  # characters before and after a place that decide whether a cut there is exact
NEAR = 10_000  # characters before the end of a piece, where a place is looked for first
TRIES = 8  # places of one kind that are tried
# A letter or a digit that a blank follows; else one that any other sign follows.
PLACES = re.compile(r'[^\W_](?=[ \t\r\n])'), re.compile(r'[^\W_](?=[\W_])')


def encode_documents(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[NDArray[np.int64]]:
    """Token ids of each document, closed by EOS. There are no other special tokens, and the length has no limit.

    A document that spells a special token, such as `</s>`, is text: that token's id is not among its ids. A long
    document is encoded in pieces. It is cut where the ids stay those of the whole. Where there is no such place in
    LONGEST characters, a warning says that it was cut elsewhere.

    The tokenizer is Hugging Face's own object, with an EOS token. Each array is of shape (tokens + 1,). Raises
    UserError where the tokenizer has no unknown token, and needs one for a document.
    """
    pieces = [(i, piece) for i, text in enumerate(texts) for piece in _pieces(tokenizer, text)]
    parts: list[list[NDArray[np.int64]]] = [[] for _ in texts]
    for call in _calls(pieces):
        for (i, _), ids in zip(call, _encode(tokenizer, [piece for _, piece in call]), strict=True):
            parts[i].append(np.array(ids, np.int64))
    eos = np.array([tokenizer.eos_token_id], np.int64)
    return [np.concatenate([*arrays, eos]) for arrays in parts]


def n_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the highest id. A vocabulary with gaps has fewer tokens than this."""
    return 1 + max(tokenizer.get_vocab().values())


def _calls(pieces: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    call, size = [], 0
    for piece in pieces:
        if call and size + len(piece[1]) > PIECE:
            yield call
            call, size = [], 0
        call.append(piece)
        size += len(piece[1])
    if call:
        yield call


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    if not tokenizer.is_fast:
        # Some tokenizers in Python keep a special token whole in any case: a blank inside its spelling makes it text.
        if special := _special_tokens(tokenizer):
            spelled = re.compile('|'.join(map(re.escape, special)))
            texts = [spelled.sub(lambda found: f'{found[0][0]} {found[0][1:]}', text) for text in texts]
        return tokenizer(texts, add_special_tokens=False, return_attention_mask=False)['input_ids']  # pyright: ignore
    if tokenizer not in _backends:
        _backends[tokenizer] = _blind_to_special_tokens(tokenizer)
    backend = _backends[tokenizer]
    # Transformers sets these three in each call of the tokenizer.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    # Past the wrapper, which makes Python lists of masks and offsets that nobody reads.
    try:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    except Exception as e:  # tokenizers raises just that
        if 'unk' not in str(e).lower():
            raise
    parts = texts if len(texts) > 1 else texts[0].split()
    for part in parts if len(parts) > 1 else []:
        _encode(tokenizer, [part])  # raises for the first word that it cannot encode
    raise UserError(f'tokenizer_name: {tokenizer.name_or_path!r} has no unknown token, and a document holds a sign '
                    f'that is not in its vocabulary, in {texts[0][:50]!r}; give the tokenizer an unknown token, or set '
                    'another one (of convert_c4.py: --tokenizer)')


# ---------------------------------------------------------------- the text of special tokens

_backends: WeakKeyDictionary[PreTrainedTokenizerBase, Any] = WeakKeyDictionary()


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Special tokens of two or more characters. One of a single character stays that character in a text."""
    added: Any = tokenizer.added_tokens_decoder  # pyright: ignore
    special = {token.content for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
    return {token for token in special if len(token) > 1}


def _blind_to_special_tokens(tokenizer: Any) -> Any:
    """The backend of a fast tokenizer, which gives no text the id of a special token.

    `encode_special_tokens` makes a backend take the spelling of a special token as text. But its vocabulary may hold
    that token as an ordinary piece, too. A Unigram, WordPiece or WordLevel model then finds it, and so does a BPE with
    a merge that makes it. Such a backend is copied, and the copy has names for these pieces that no text contains. All
    ids stay.
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
    if kind == 'Unigram':  # the scores as they are: from JSON the last bit of some would differ
        backend.model = models.Unigram(model['vocab'], model['unk_id'], model['byte_fallback'])
    return backend


# ---------------------------------------------------------------- long texts
def _pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[str]:
    """The text in pieces of up to LONGEST characters, most of them of PIECE."""
    start = 0
    while len(text) - start > PIECE:
        stop, following = _exact_place(tokenizer, text, start) or (start + LONGEST, start + LONGEST)
        if stop >= len(text):
            break
        if stop == start + LONGEST:
            warnings.warn(f'a document has no place in {LONGEST:,} characters where the tokenizer '
                          f'{tokenizer.name_or_path!r} can read it in two pieces with the same token ids; it was cut '
                          'all the same, to bound the memory, and some ids at the cut differ from those of the whole '
                          'document', stacklevel=2)
        yield text[start:stop]
        start = following
    yield text[start:]


def _exact_place(tokenizer: PreTrainedTokenizerBase, text: str, start: int) -> Optional[tuple[int, int]]:
    """Where the text can be cut with the same ids: the end of a piece and the start of the next.

    The places end a word, where a pre-tokenizer splits, too. Each is tried with the characters around it. The blank
    between two pieces is left out where the tokenizer puts one before each text.
    """
    end = start + PIECE
    for low, high in (max(end - NEAR, start), end), (start, end), (end, start + LONGEST):
        for pattern in PLACES:
            places = (found.end() for found in pattern.finditer(text, low, high))
            nearest = islice(places, TRIES) if low == end else reversed(deque(places, TRIES))
            for place in nearest:
                for following in [place, place + 1][:1 + (text[place] == ' ')]:
                    left, right = text[max(place - WINDOW, 0):place], text[following:place + WINDOW]
                    whole, *halves = _encode(tokenizer, [left + text[place:following] + right, left, right])
                    if whole == sum(halves, []):
                        return place, following
    return None
