"""Encoding documents: a special token in a text is plain text, and a long document in pieces has the same ids."""

import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers_of
from conftest import documents

from src.common import encoding
from src.common.encoding import encode_documents
from src.common.errors import UserError
from src.tokenizer import HFTokenizer


@pytest.fixture(scope='module')
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp('tokenizers')
    return {kind: HFTokenizer(str(tokenizers_of.save(kind, folder / kind)), 8).tokenizer for kind in tokenizers_of.ALL}


SPELLED = ['the </s> river', '</s>', '<pad><pad> the', 'the river <s></s>', 'a </s>\n</s> b <s> <unk>']


@pytest.mark.parametrize('kind', tokenizers_of.ALL)
def test_the_text_of_a_special_token_is_text(kinds: dict[str, Any], kind: str):
    tokenizer = kinds[kind]
    for text, ids in zip(SPELLED, encode_documents(tokenizer, SPELLED), strict=True):
        special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        assert ids[-1] == tokenizer.eos_token_id and special.isdisjoint(ids[:-1]), text
        assert len(ids) > 1, 'the text is not left out'
    if kind in ('byte-level', 'llama 3'):  # which have a token for each byte
        assert [tokenizer.decode(ids[:-1]) for ids in encode_documents(tokenizer, SPELLED)] == SPELLED


@pytest.mark.parametrize('kind', tokenizers_of.ALL)
def test_other_texts_have_the_ids_of_the_library(kinds: dict[str, Any], kind: str):
    texts = [*documents('val'), '', 'déjà  vu\n\n３ 12345']
    backend = kinds[kind].backend_tokenizer
    expected = [[*backend.encode(text, add_special_tokens=False).ids, kinds[kind].eos_token_id] for text in texts]
    assert [ids.tolist() for ids in encode_documents(kinds[kind], texts)] == expected
    assert kinds[kind].convert_ids_to_tokens(kinds[kind].eos_token_id) == '</s>', 'the tokenizer itself is as it was'


def test_an_eos_token_that_was_added_as_a_word(tmp_path: Path):
    tokenizer = tokenizers_of.with_unmarked_eos(tmp_path)
    [ids] = encode_documents(tokenizer, ['the <stop> river'])
    assert ids.tolist().count(tokenizer.eos_token_id) == 1 and tokenizer.decode(ids[:-1]) == 'the <stop> river'


def test_a_tokenizer_in_python(tmp_path: Path):
    from transformers import BertTokenizer

    (tmp_path / 'vocab.txt').write_text('\n'.join(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'the', 'sep', '[', ']']))
    tokenizer = BertTokenizer(tmp_path / 'vocab.txt', eos_token='[SEP]', split_special_tokens=True)
    [ids] = encode_documents(tokenizer, ['the [SEP] the'])
    assert tokenizer.convert_ids_to_tokens(ids) == ['the', '[', 'sep', ']', 'the', '[SEP]']


def test_a_sign_that_a_tokenizer_cannot_encode_is_named(tmp_path: Path):
    tokenizer = HFTokenizer(str(tokenizers_of.without_unknown_token('wordlevel', tmp_path)), 8).tokenizer
    assert [ids.tolist() for ids in encode_documents(tokenizer, ['ab ba', ''])] == [[1, 2, 3, 2, 1, 0], [0]]
    with pytest.raises(UserError, match="tokenizer_name: '.*' has no unknown token, and a document .* in 'a文'; add"):
        encode_documents(tokenizer, ['ab', 'ab a文 文'])


# ---------------------------------------------------------------- long documents

SIGNS = ["'s", "'ll", ' ', '  ', '\n', '\r\n', '\t', '.', '...', '_', '-', '123456', '7', 'é', 'e\u0301', '中文', '。', '\u00a0',
         '\u200d', '🙂', 'ﬁ', '</s>', '<pad>', "don't", 'ＡＢ', '\x1c', 'naïve', '²', ',000']


def hard_text(seed: int, n: int) -> str:
    rng = random.Random(seed)
    words = [word for text in documents('val')[:5] for word in text.split()]
    return ''.join(rng.choice(words if rng.random() < 0.5 else SIGNS) + ' ' * (rng.random() < 0.4) for _ in range(n))


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Makes pieces of 60 characters; returns a list that receives the pieces of each encoded document."""
    for name, value in {'PIECE_CHARS': 60, 'FIRST_SEARCH_CHARS': 20, 'CONTEXT_CHARS': 12, 'MAX_PIECE_CHARS': 2000}.items():
        monkeypatch.setattr(encoding, name, value)
    seen, cut = [], encoding._split

    def split(*args: Any) -> list[tuple[str, bool]]:
        pieces = list(cut(*args))
        seen.append([piece for piece, _ in pieces])
        return pieces

    monkeypatch.setattr(encoding, '_split', split)
    return seen


@pytest.mark.parametrize('kind', ['byte-level', 'llama 3', 'unigram', 'wordpiece', 'prefix'])
def test_a_long_document_has_the_ids_of_the_whole(kinds: dict[str, Any], kind: str, small_pieces: list[list[str]]):
    prose = ' '.join(documents('val')[:20])
    texts = [prose] if kind == 'prefix' else [prose, *(hard_text(seed, 400) for seed in range(15))]
    got = encode_documents(kinds[kind], texts)
    assert all(len(pieces) > len(text) / 200 for text, pieces in zip(texts, small_pieces)), 'they were cut'
    for text, ids in zip(texts, got):
        assert ids[:-1].tolist() == encoding.encode_slowly(kinds[kind], [text])[0], repr(text)


def test_a_document_without_a_safe_place_is_bounded_and_a_warning_says_so(kinds, small_pieces: list[list[str]]):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        [ids] = encode_documents(kinds['byte-level'], ['a' * 1900])  # one word, up to MAX_PIECE_CHARS
    assert small_pieces == [['a' * 1900]] 
    assert ids[:-1].tolist() == encoding.encode_slowly(kinds['byte-level'], ['a' * 1900])[0]
    with pytest.warns(UserWarning, match='no place in 2,000 characters .* the document was cut anyway, to limit the memory'):
        [ids] = encode_documents(kinds['byte-level'], ['a' * 9000])
    assert max(map(len, small_pieces[1])) == 2000 and kinds['byte-level'].decode(ids[:-1]) == 'a' * 9000


def test_several_documents_share_a_call_and_a_long_one_has_its_own(kinds, small_pieces, monkeypatch: pytest.MonkeyPatch):
    sizes, encode = [], encoding._encode
    texts = ['short', 'the river ' * 50, 'short', '']
    expected = [encode(kinds['byte-level'], [text])[0].tolist() for text in texts]
    monkeypatch.setattr(encoding, '_encode', lambda tokenizer, texts: sizes.append(sum(map(len, texts))) or
                        encode(tokenizer, texts))
    got = encode_documents(kinds['byte-level'], texts)
    assert [ids[:-1].tolist() for ids in got] == expected and max(sizes) <= 2 * 60 and got[3].dtype == np.int64
