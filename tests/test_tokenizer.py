"""The tokenizer: what it loads, what it makes of documents, and what it says when there is none."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import EOS, documents
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from src.errors import UserError
from src.tokenizer import TOKENIZER_REGISTRY, HFTokenizer, check_vocab, encode_documents


@pytest.fixture(scope='module')
def tokenizer(tokenizer_dir: Path) -> HFTokenizer:
    return TOKENIZER_REGISTRY['hftokenizer'](tokenizer_name=str(tokenizer_dir), max_seq_len=128)


def test_pads_with_eos_where_there_is_no_pad_token(tokenizer: HFTokenizer):
    assert (tokenizer.tokenizer.eos_token, tokenizer.tokenizer.eos_token_id) == (EOS, 0)
    assert tokenizer.tokenizer.pad_token_id == 0
    assert tokenizer.max_seq_len == 128


def test_keeps_a_pad_token_of_its_own_and_counts_added_tokens(tokenizer: HFTokenizer, tokenizer_dir: Path, tmp_path: Path):
    other = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    other.add_special_tokens({'pad_token': '<pad>'})
    other.save_pretrained(tmp_path)
    added = HFTokenizer(str(tmp_path), 128)
    assert added.tokenizer.pad_token == '<pad>'
    assert added.vocab_size == tokenizer.vocab_size + 1


def test_a_batch_encodes_as_one_by_one_and_every_document_ends_with_eos(tokenizer: HFTokenizer, tokenizer_dir: Path):
    raw = Tokenizer.from_file(str(tokenizer_dir / 'tokenizer.json'))
    texts = [*documents('val'), '']
    encoded = encode_documents(tokenizer.tokenizer, texts)
    assert [ids.tolist() for ids in encoded] == [raw.encode(text).ids + [0] for text in texts]
    assert encoded[0].dtype == np.int64
    assert tokenizer.tokenizer.decode(encoded[0]) == texts[0] + EOS


def test_long_documents_draw_no_warning(tokenizer_dir: Path, caplog: pytest.LogCaptureFixture):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        encode_documents(HFTokenizer(str(tokenizer_dir), 8).tokenizer, ['a long document ' * 1000])
    assert not caplog.records


@pytest.mark.parametrize(('name', 'says'), [
    ('/nowhere/copy/tokenizer', "no folder '/nowhere/copy/tokenizer'.*convert_c4.py --source sample --out_root /nowhere/copy\n"),
    ('./nowhere', 'convert_c4.py --source sample --out_root ./my-copy-c4\n'),
    ('gpt2-of-nobody', "'gpt2-of-nobody' is no folder here.*hub: check the name and the network"),
])
def test_no_such_tokenizer(name: str, says: str):
    with pytest.raises(UserError, match=f'(?s)tokenizer_name: .*{says}') as e:
        HFTokenizer(name, 128)
    assert e.value.__suppress_context__


def test_a_folder_that_holds_none(tmp_path: Path):
    with pytest.raises(UserError, match='holds no tokenizer that can be loaded'):
        HFTokenizer(str(tmp_path), 128)


def test_without_eos_is_refused(tokenizer_dir: Path, tmp_path: Path):
    shutil.copy(tokenizer_dir / 'tokenizer.json', tmp_path)
    PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / 'tokenizer.json')).save_pretrained(tmp_path)
    with pytest.raises(UserError, match='has no EOS token'):
        HFTokenizer(str(tmp_path), 128)


def test_ids_must_fit_the_model(tokenizer: HFTokenizer):
    n = tokenizer.vocab_size
    check_vocab(tokenizer, n)
    with pytest.raises(UserError, match=f'model.vocab_size: {n - 1} is too small for tokenizer_name .*tokenizer.*need {n}'):
        check_vocab(tokenizer, n - 1)
