"""fastokens: the ids are those of `tokenizers` for every type of tokenizer, and any doubt leads to `tokenizers`."""

import builtins
import multiprocessing
import os
import pickle
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers_of
from conftest import documents
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from src.common import encoding, fast_encoding
from src.common.encoding import encode_documents, encode_pieces, encode_slowly
from src.tokenizer import HFTokenizer

QWEN = tokenizers_of.LLAMA_3.replace(r'\p{N}{1,3}', r'\p{N}')
# fastokens gives other ids to a spelled `<0x0A>` with the backend 'byte fallback', which the hard texts show
FAST = ('byte-level', 'llama 3', 'prefix', 'qwen', 'qwen nfc', 'space first', 'digits', 'added', 'affixes')


def more(kind: str) -> Tokenizer:
    """A backend of a type that tokenizers_of does not have."""
    byte_level: Any = pre_tokenizers.ByteLevel
    if kind == 'byte fallback':  # as in Llama 2: a character that is not in the vocabulary becomes its bytes
        vocabulary = {token: i for i, token in enumerate([*tokenizers_of.SPECIAL, *(f'<0x{i:02X}>' for i in range(256)), '▁',
                                                          *'abcdefghijklmnopqrstuvwxyz', 'th', 'the', 'er'])}
        backend = Tokenizer(models.BPE(vocabulary, [('t', 'h'), ('th', 'e'), ('e', 'r')], unk_token='<unk>', fuse_unk=True,
                                       byte_fallback=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
        return backend
    if kind.startswith('qwen'):
        splits = [pre_tokenizers.Split(Regex(QWEN), 'isolated'), byte_level(add_prefix_space=False, use_regex=False)]
        backend = tokenizers_of.bpe(pre_tokenizers.Sequence(splits))
        backend.normalizer = normalizers.NFC() if kind == 'qwen nfc' else None  # pyright: ignore
        return backend
    if kind == 'digits':
        return tokenizers_of.bpe(pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level(add_prefix_space=False)]))
    if kind == 'affixes':
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=tokenizers_of.SPECIAL, show_progress=False,
                                      end_of_word_suffix='</w>')
        return tokenizers_of.train(models.BPE(end_of_word_suffix='</w>', unk_token='<unk>'), trainer, byte_level())
    backend = tokenizers_of.bpe(byte_level(add_prefix_space=kind == 'space first'))
    if kind == 'lower case':
        backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])  # pyright: ignore
    if kind == 'added':
        backend.add_tokens([AddedToken('river', single_word=True), AddedToken('  two', lstrip=True), AddedToken('wörd')])
        backend.add_special_tokens([AddedToken('<|end|>'), AddedToken('▁', rstrip=True)])
    return backend


def load(kind: str, folder: Path) -> Any:
    if kind in tokenizers_of.ALL:
        tokenizers_of.save(kind, folder)
    else:
        PreTrainedTokenizerFast(tokenizer_object=more(kind), **tokenizers_of.NAMES).save_pretrained(folder)
    return HFTokenizer(str(folder), 8).tokenizer


def hard_texts() -> list[str]:
    rng, signs = random.Random(0), [text for text in fast_encoding.HARD_TEXTS if len(text) < 100]
    words = ' '.join([*documents('val')[:3], '</s> <pad> <|end|>  two wörd ', *signs]).split(' ')
    odd = [chr(rng.choice([rng.randrange(0x3000), rng.randrange(0xE000, 0x110000)])) for _ in range(500)]
    return [''.join(rng.choice(rng.choice([words, words, signs, odd])) + ' ' * rng.randrange(2) for _ in range(40))
            for _ in range(200)]


@pytest.fixture(autouse=True)
def no_encoder_yet(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(encoding, '_by_content', {})


@pytest.mark.parametrize('kind', [*tokenizers_of.ALL, 'qwen', 'qwen nfc', 'space first', 'digits', 'byte fallback', 'added',
                                  'affixes', 'lower case'])
def test_the_ids_are_those_of_tokenizers(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture):
    tokenizer = load(kind, tmp_path)
    texts = [*hard_texts(), *fast_encoding.HARD_TEXTS, *documents('val')]
    expected = encode_slowly(tokenizer, texts)
    assert [ids[:-1].tolist() for ids in encode_documents(tokenizer, texts)] == expected
    said = capfd.readouterr().err
    assert said.count('note: tokenizer ') == (kind not in FAST), said
    assert (encoding._fast_encoder(tokenizer).encode(['the'], None) is None) == (kind not in FAST)  # pyright: ignore


def test_every_character_has_the_ids_of_tokenizers(tmp_path: Path):
    tokenizer = load('llama 3', tmp_path)
    signs = [chr(i) for i in [*range(0xD800), *range(0xE000, 0x110000, 31)]]
    texts = [' '.join(f'a{sign}b{sign}\u0301' for sign in signs[i:i + 500]) for i in range(0, len(signs), 500)]
    assert [ids[:-1].tolist() for ids in encode_documents(tokenizer, texts)] == encode_slowly(tokenizer, texts)


class Liar:
    """A fast encoder that is wrong about texts with a sign, or fails at them."""

    def __init__(self, sign: str, fails: bool, serialized: str) -> None:
        from fastokens import Tokenizer

        self.sign, self.fails, self.tokenizer = sign, fails, Tokenizer.from_json_str(serialized)

    def encode_batch_flat(self, texts: list[str], *args: Any) -> Any:
        found = [text for text in texts if self.sign in text]
        if found and self.fails:
            raise ValueError('match limit exceeded')
        return self.tokenizer.encode_batch_flat([text.replace(self.sign, '') for text in texts], *args)


@pytest.mark.parametrize(('sign', 'fails', 'says'), [
    ('\0', False, "fastokens gives other ids for '\\x00'"),
    ('river\n', False, "fastokens gives other ids for 'the <pad> river"),  # only beside a special token
    ('wörd', False, "fastokens gives other ids for 'a wörd'"),  # only in the first documents
    ('👍🏽', True, "fastokens cannot encode '' (match limit exceeded)"),
    ('wörd', True, "fastokens cannot encode 'the' (match limit exceeded)"),
])
def test_one_difference_and_tokenizers_encodes(sign: str, fails: bool, says: str, tmp_path: Path, monkeypatch, capfd):
    if sign == 'river\n':
        monkeypatch.setattr(fast_encoding, 'HARD_TEXTS', ['the'])
        sign, says = '<pad>', "fastokens gives other ids for 'the <pad> river"
    monkeypatch.setattr(fast_encoding, 'open_tokenizer', lambda serialized: Liar(sign, fails, serialized))
    tokenizer = load('byte-level', tmp_path)
    for texts in (['the', 'a wörd', 'a\0 👍🏽'], ['<pad>'], ['wörd' * 30_000]):
        assert [ids[:-1].tolist() for ids in encode_documents(tokenizer, texts)] == encode_slowly(tokenizer, texts)
    said = [line for line in capfd.readouterr().err.splitlines() if 'note:' in line]
    assert len(said) == 1 and f"note: tokenizer '{tmp_path}': the slower library tokenizers encodes the texts" in said[0]
    assert says in said[0]


def test_the_first_documents_are_compared_and_later_ones_not(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(fast_encoding, 'FIRST_CHARS', 1000)
    tokenizer, slow = load('byte-level', tmp_path), []
    encoding.prepare(tokenizer)
    encode = encode_slowly
    monkeypatch.setattr(encoding, 'encode_slowly', lambda tokenizer, texts: slow.append(len(texts)) or encode(tokenizer, texts))
    for n in (3, 20, 5):
        encode_documents(tokenizer, ['x' * 100] * n)
    assert slow == [3, 7]


@pytest.mark.parametrize('rank', ['0', '1'])
def test_without_fastokens_the_first_rank_says_so(rank: str, tmp_path: Path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, 'fastokens', None)
    monkeypatch.setenv('RANK', rank)
    tokenizer, again = load('byte-level', tmp_path), HFTokenizer(str(tmp_path), 8).tokenizer
    for one in (tokenizer, again):
        assert encode_documents(one, ['the river'])[0][:-1].tolist() == encode_slowly(one, ['the river'])[0]
    said = capfd.readouterr().err
    assert said.count('fastokens cannot be imported') == (rank == '0'), 'once for both'


def test_a_hash_needs_no_fast_encoder(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(fast_encoding, 'open_tokenizer', builtins.exec)
    tokenizers_of.save('unigram', tmp_path)
    assert len(HFTokenizer(str(tmp_path), 8).hash) == 64 and not encoding._by_content


def ids_of(tokenizer: Any, texts: list[str]) -> tuple[list[list[int]], int]:
    return [ids.tolist() for ids in encode_documents(tokenizer, texts)], len(os.listdir('/proc/self/task'))


@pytest.mark.skipif(sys.platform != 'linux', reason='fork')
def test_forked_processes_encode_on_one_thread(tmp_path: Path):
    tokenizer, texts = load('byte-level', tmp_path), [text * 20 for text in documents('val')]
    expected, _ = ids_of(tokenizer, texts)
    with multiprocessing.get_context('fork').Pool(2) as pool:  # which pickles the tokenizer
        found = pool.starmap(ids_of, [(tokenizer, texts)] * 4)
        assert [ids for ids, _ in found] == [expected] * 4 and {threads for _, threads in found} == {1}
    assert ids_of(pickle.loads(pickle.dumps(tokenizer)), texts)[0] == expected


def test_pieces_of_a_long_document_are_bounded(tmp_path: Path, monkeypatch):
    tokenizer, text = load('byte-level', tmp_path), ' '.join(documents('train'))
    [expected] = encode_documents(tokenizer, [text])
    monkeypatch.setattr(encoding, 'PIECE_CHARS', 1000)
    pieces = list(encode_pieces(tokenizer, iter([text, ''])))
    assert max(sum(len(ids) for ids, _ in batch) for batch in pieces) <= 1000 < len(expected)
    joined = np.concatenate([ids for batch in pieces for ids, _ in batch])
    assert joined.tolist() == [*expected, tokenizer.eos_token_id] and joined.dtype == np.uint32
    assert [is_end for batch in pieces for _, is_end in batch].count(True) == 2
