"""The tokenizer: loading, encoding documents, and the error messages where it cannot be loaded."""

import hashlib
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers_of
from conftest import EOS, documents
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from src import tokenizer as tokenizer_module
from src.common.encoding import encode_documents
from src.common.errors import UserError
from src.tokenizer import TOKENIZER_REGISTRY, HFTokenizer, check_vocab, count_ids


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


MISSING = 'a file is missing that its class reads, .*; the folder holds'


@pytest.mark.parametrize(('files', 'says'), [
    ({}, 'there is no tokenizer.json, and no config that names a tokenizer class; it holds no files; name'),
    ({'x.tiktoken': ''}, 'it holds x.tiktoken; name'),
    ({'config.json': '{"model_type": "own"}'}, 'it holds config.json; name'),
    ({'tokenizer_config.json': '{"tokenizer_class": "PreTrainedTokenizerFast"}'}, f'{MISSING} tokenizer_config.json$'),
    ({'tokenizer_config.json': '{"tokenizer_class": "GPT2Tokenizer"}', 'vocab.json': '{}'}, MISSING),
])
def test_a_folder_that_holds_none(tmp_path: Path, files: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, Path('.')):
        with pytest.raises(UserError, match=f'^tokenizer_name: folder .* holds no tokenizer that can be .*{says}'):
            HFTokenizer(str(folder), 128)


def test_files_that_are_no_folder_or_no_json(tokenizer_dir: Path, tmp_path: Path):
    said = refused(tokenizer_dir / 'tokenizer.json')
    assert said == f"tokenizer_name: '{tokenizer_dir}/tokenizer.json' is a file; name its folder: '{tokenizer_dir}'"
    for text in ('', '[]', '{"eos'):
        (tmp_path / 'tokenizer_config.json').write_text(text)
        assert refused(tmp_path).endswith(f'{tmp_path}/tokenizer_config.json is not a complete JSON object; copy the file again')


def test_without_eos_is_refused(tokenizer_dir: Path, tmp_path: Path):
    shutil.copy(tokenizer_dir / 'tokenizer.json', tmp_path)
    PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / 'tokenizer.json')).save_pretrained(tmp_path)
    with pytest.raises(UserError, match='has no EOS token'):
        HFTokenizer(str(tmp_path), 128)


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as e:
        HFTokenizer(str(folder), 128)
    return str(e.value)


def test_a_folder_with_tokenizer_json_alone_needs_to_name_its_eos(tokenizer: HFTokenizer, tokenizer_dir: Path, tmp_path: Path):
    shutil.copy(tokenizer_dir / 'tokenizer.json', tmp_path)
    said = refused(tmp_path)
    assert 'its special tokens are <|endoftext|>: write the token that ends a text into' in said and len(said) < 500
    (tmp_path / 'tokenizer_config.json').write_text(said.rpartition('such as ')[2])
    alone = HFTokenizer(str(tmp_path), 128)
    assert (alone.eos_token_id, alone.hash) == (tokenizer.eos_token_id, tokenizer.hash)
    assert alone.encode('The river') == tokenizer.encode('The river')
    (tmp_path / 'config.json').write_text('{"model_type": "own"}')  # of a model that transformers does not have
    assert HFTokenizer(str(tmp_path), 128).hash == tokenizer.hash


def test_a_likely_token_is_proposed_for_eos(tmp_path: Path):
    (tmp_path / 'vocab.txt').write_text('\n'.join(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'the']))
    (tmp_path / 'tokenizer_config.json').write_text('{"tokenizer_class": "BertTokenizer"}')
    assert refused(tmp_path).endswith('such as {"eos_token": "[SEP]"}')


def test_an_eos_token_that_the_tokenizer_does_not_have(tokenizer: HFTokenizer, tokenizer_dir: Path, tmp_path: Path):
    copy = shutil.copytree(tokenizer_dir, tmp_path / 'copy')
    config = json.loads((copy / 'tokenizer_config.json').read_text())
    for eos in ('<|endoftxt|>', {'content': '<|endoftxt|>', '__type': 'AddedToken'}):
        (copy / 'tokenizer_config.json').write_text(json.dumps(config | {'eos_token': eos}))
        assert refused(copy).startswith(f"tokenizer_name: eos_token '<|endoftxt|>' of {copy}/tokenizer_config.json is "
                                        f'not in the vocabulary; the special tokens are {EOS}: name the one')
    tokenizer = HFTokenizer(str(tokenizer_dir), 8)
    tokenizer.tokenizer.add_special_tokens({'eos_token': '<|endoftxt|>'})
    tokenizer.tokenizer.save_pretrained(copy)
    assert HFTokenizer(str(copy), 8).eos_token_id == tokenizer.vocab_size - 1, 'one that was added is one of it'
    (tmp_path / 'vocab.txt').write_text('\n'.join(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'the']))
    (tmp_path / 'tokenizer_config.json').write_text('{"tokenizer_class": "BertTokenizer", "eos_token": "[SPE]"}')
    assert "eos_token '[SPE]' of" in refused(tmp_path)


@pytest.mark.parametrize('file', ['tokenizer.model', 'spiece.model', 'vocab.json', 'vocab.txt'])
def test_a_folder_with_a_vocabulary_alone_needs_to_name_its_class(tmp_path: Path, file: str):
    (tmp_path / file).write_text('{}')
    said = refused(tmp_path)
    assert f'holds {file}, and nothing that says which tokenizer it belongs to; write' in said and len(said) < 500
    assert 'Tokenizer' in json.loads(said.rpartition('such as ')[2])['tokenizer_class']


def test_the_files_of_a_byte_level_bpe(tmp_path: Path):
    backend = tokenizers_of.backend_of('byte-level')
    backend.model.save(str(tmp_path))  # vocab.json and merges.txt
    (tmp_path / 'tokenizer_config.json').write_text('{"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>"}')
    assert HFTokenizer(str(tmp_path), 8).encode('The river') == backend.encode('The river').ids


def test_packages_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / 'tokenizer_config.json').write_text('{"tokenizer_class": "LlamaTokenizer"}')

    def fails(*_: Any, **__: Any) -> None:
        raise ImportError('LlamaTokenizer requires the SentencePiece library but it was not found')

    monkeypatch.setattr(tokenizer_module, 'distributions', list)
    monkeypatch.setattr(AutoTokenizer, 'from_pretrained', fails)
    assert 'needs packages that are not installed: pip install sentencepiece' in refused(tmp_path)


def test_a_long_message_of_another_library_is_cut(tmp_path: Path):
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'tokenizer_class': 'x' * 1000}))
    assert 'ValueError: Tokenizer class xxx' in refused(tmp_path) and len(refused(tmp_path)) < 500


# ---------------------------------------------------------------- the same tokenizer


@pytest.mark.parametrize('kind', tokenizers_of.ALL)
def test_it_is_the_same_when_saved_and_loaded_again(tmp_path: Path, kind: str):
    first = HFTokenizer(str(tokenizers_of.save(kind, tmp_path / 'bos', bos=True)), 8)
    assert first.encode('The river') == encode_documents(first.tokenizer, ['The river'])[0][:-1].tolist(), 'no BOS'
    first.tokenizer.save_pretrained(tmp_path / 'again')
    again = HFTokenizer(str(tmp_path / 'again'), 8)
    assert again.hash == first.hash
    assert again.encode('The river') == first.encode('The river')


def test_the_hash_of_packed_data_stays(tmp_path: Path):
    """The hash of the serialization and EOS must not change: manifests of existing data hold it."""
    from src.conversion.sample_corpus import train_tokenizer

    train_tokenizer(documents('train'), tmp_path, 300)
    says = Tokenizer.from_file(str(tmp_path / 'tokenizer.json')).to_str()
    assert HFTokenizer(str(tmp_path), 8).hash == hashlib.sha256(f'{says} 0'.encode()).hexdigest()
    unigram = HFTokenizer(str(tokenizers_of.save('unigram', tmp_path / 'unigram')), 8)
    old = hashlib.sha256(f'{unigram.tokenizer.backend_tokenizer.to_str()} {unigram.eos_token_id}'.encode()).hexdigest()
    assert old != unigram.hash
    unigram.check_made_with('the tokens in x', None, old)
    with pytest.raises(UserError, match=r'differs from the tokenizer of the tokens in x: gpt2 \(hash 000\)'):
        unigram.check_made_with('the tokens in x', 'gpt2', '000')


def test_tokenizers_of_one_vocabulary_are_told_apart(tmp_path: Path):
    from tokenizers import normalizers

    cased = PreTrainedTokenizerFast.from_pretrained(tokenizers_of.save('wordpiece', tmp_path / 'cased'))
    cased.backend_tokenizer.normalizer = normalizers.Lowercase()
    cased.save_pretrained(tmp_path / 'uncased')
    assert HFTokenizer(str(tmp_path / 'cased'), 8).hash != HFTokenizer(str(tmp_path / 'uncased'), 8).hash


@pytest.mark.parametrize('kind', ['byte-level', 'unigram'])
def test_the_hash_of_a_tokenizer_that_cut_and_padded_stays(tmp_path: Path, kind: str):
    first = HFTokenizer(str(tokenizers_of.save(kind, tmp_path / 'plain')), 8)
    first(['The river', 'The'], padding=True, truncation=True, max_length=4)  # the backend keeps these settings
    first.tokenizer.save_pretrained(tmp_path / 'saved')
    says = Tokenizer.from_file(str(tmp_path / 'saved' / 'tokenizer.json')).to_str()
    assert '"truncation":{' in says and '"padding":{' in says
    again = HFTokenizer(str(tmp_path / 'saved'), 8)
    assert again.hash == first.hash
    old = hashlib.sha256(f'{says} {again.eos_token_id}'.encode()).hexdigest()
    again.check_made_with('the tokens in x', None, old)  # the hash of an earlier version of the kit


@pytest.mark.parametrize('kind', ['wordlevel', 'wordpiece', 'unigram', 'bpe'])
def test_tokenizers_without_an_unknown_token(tmp_path: Path, kind: str):
    from tokenizers import normalizers

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('default')
        folder = str(tokenizers_of.without_unknown_token(kind, tmp_path / 'plain'))
        plain, again = HFTokenizer(folder, 8), HFTokenizer(folder, 8)
    assert plain.encode('ab ba') == [1, 2, 3, 2, 1] and plain.hash == again.hash
    said = [str(warning.message) for warning in caught if 'has no unknown token' in str(warning.message)]
    assert len(said) == (kind == 'bpe'), 'once; the others refuse such a document'
    other = PreTrainedTokenizerFast.from_pretrained(tmp_path / 'plain')
    other.backend_tokenizer.normalizer = normalizers.Replace('e', 'a')
    other.save_pretrained(tmp_path / 'other')
    assert HFTokenizer(str(tmp_path / 'other'), 8).hash != plain.hash, 'they are told apart all the same'


def test_the_wrapper_is_the_tokenizer(tokenizer: HFTokenizer):
    batch = tokenizer(['The river', 'The'], padding=True, return_tensors='np')
    assert sorted(batch) == ['attention_mask', 'input_ids'] and batch['attention_mask'][1, -1] == 0
    assert tokenizer.decode(tokenizer.encode('The river')) == 'The river'
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (None, 0, 0)


def test_ids_must_fit_the_model(tokenizer: HFTokenizer):
    n = tokenizer.vocab_size
    check_vocab(tokenizer, n)
    with pytest.raises(UserError, match=f'model.vocab_size: {n - 1} is too small for tokenizer_name .*tokenizer.*need {n}'):
        check_vocab(tokenizer, n - 1)


def test_a_vocabulary_with_gaps_needs_its_highest_id(tmp_path: Path):
    from tokenizers import models

    words = Tokenizer(models.WordLevel({'<eos>': 0, 'the': 7, 'river': 90}, '<eos>'))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token='<eos>').save_pretrained(tmp_path)
    gaps = HFTokenizer(str(tmp_path), 8)
    assert (gaps.vocab_size, count_ids(gaps.tokenizer)) == (3, 91)
    with pytest.raises(UserError, match='model.vocab_size: 90 is too small .*need 91'):
        check_vocab(gaps, 90)
