"""A run whose tokenizer did not make its packed tokens ends with one message, wherever the tokens lie."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import documents, write_mds

import convert_c4
from src.common.errors import UserError
from src.conversion.sample_corpus import train_tokenizer
from src.data_c4 import StreamingC4
from src.loader.contents import check_tokenizer
from src.tokenizer import HFTokenizer


def convert(*argv: Any) -> None:
    args: argparse.Namespace = convert_c4.parse_args([*map(str, argv), '--num_workers', '1'])
    convert_c4.main(args)


@pytest.fixture(scope='module')
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the split `val` as packed tokens, its tokenizer, and `other`, a tokenizer of fewer tokens."""
    root = tmp_path_factory.mktemp('packed')
    (root / 'source').mkdir()
    lines = [json.dumps({'text': text}) for text in documents('val')]
    (root / 'source' / 'val.jsonl').write_text('\n'.join(lines))
    (root / 'other').mkdir()
    train_tokenizer(documents('train')[200:], root / 'other', 290)
    convert('--source', root / 'source', '--out_root', root, '--splits', 'val', '--concat_tokens', 32,
            '--train_tokenizer', 300)
    return root


def read(root: Path, tokenizer: Path, **places: Any) -> StreamingC4:
    return StreamingC4(str(tokenizer), 32, split='val', batch_size=1, **{'remote': str(root), **places})


OTHER = (r"tokenizer_name: '.*/other' \(hash [0-9a-f]{12}\) differs from the tokenizer of the tokens in .*val: "
         r'.*/tokenizer \(hash [0-9a-f]{12}\); set the one that was used')


def test_tokens_of_another_tokenizer_are_refused(packed: Path, tmp_path: Path):
    assert len(read(packed, packed / 'tokenizer')) > 100
    shutil.copytree(packed / 'tokenizer', tmp_path / 'moved')
    assert len(read(packed, tmp_path / 'moved')) > 100, 'where a tokenizer lies does not matter'
    for places in ({}, {'local': str(tmp_path / 'copy')}, {'remote': None, 'local': str(packed)}):
        with pytest.raises(UserError, match=OTHER):
            read(packed, packed / 'other', **places)


def test_tokens_in_an_object_store(packed: Path, tmp_path: Path, s3: Any):
    for file in (path for path in (packed / 'val').rglob('*') if path.is_file()):
        s3.upload_file(str(file), 'bucket', f'data/{file.relative_to(packed)}')
    with pytest.raises(UserError, match=OTHER):
        read(packed, packed / 'other', remote='s3://bucket/data', local=str(tmp_path / 'copy'))
    assert len(read(packed, packed / 'tokenizer', remote='s3://bucket/data', local=str(tmp_path / 'copy'))) > 100
    s3.delete_object(Bucket='bucket', Key='data/val/manifest.json')
    assert len(read(packed, packed / 'other', remote='s3://bucket/data', local=str(tmp_path / 'two'))) > 100


def test_a_manifest_that_is_not_whole_is_refused(packed: Path, tmp_path: Path):
    shutil.copytree(packed / 'val', tmp_path / 'val')
    manifest = tmp_path / 'val' / 'manifest.json'
    stream: Any = read(tmp_path, packed / 'tokenizer').streams[0]
    other = HFTokenizer(str(packed / 'other'), 32)
    for text in ('', '{"options": ', '{"options": {}, "\xff'):
        manifest.write_text(text, 'latin-1')
        with pytest.raises(UserError, match='^dataset: manifest.json of .*val is not complete JSON; copy it again'):
            check_tokenizer(stream, other)
    manifest.write_text('{"options": {"tokenizer_hash": 3}}')
    with pytest.raises(UserError, match='differs from the tokenizer of'):
        check_tokenizer(stream, other)


@pytest.mark.parametrize('text', ['[]', '{"options": 3}', '{"files": {}}', '{"options": {"tokenizer_hash": null}}'])
def test_a_manifest_of_another_tool_or_an_earlier_version_says_nothing(packed: Path, tmp_path: Path, text: str):
    shutil.copytree(packed / 'val', tmp_path / 'val')
    (tmp_path / 'val' / 'manifest.json').write_text(text)
    assert len(read(tmp_path, packed / 'other')) > 100


@pytest.mark.parametrize(('dtype', 'wrong'), [('uint16', 290), ('int64', -1), ('int32', -100)])
def test_an_id_that_the_tokenizer_does_not_have_is_named(packed: Path, tmp_path: Path, dtype: str, wrong: int):
    rows = np.zeros((4, 32), dtype)
    rows[2, 5] = wrong
    write_mds(tmp_path / 'val', [{'tokens': row} for row in rows], {'tokens': f'ndarray:{dtype}'})
    with pytest.raises(UserError, match=rf'tokenizer_name: .* has ids from 0 to 289, but .*val holds the token id {wrong}; set'):
        list(read(tmp_path, packed / 'other'))
    rows[2, 5] = 289
    write_mds(tmp_path / 'good' / 'val', [{'tokens': row} for row in rows], {'tokens': f'ndarray:{dtype}'})
    assert len(list(read(tmp_path / 'good', packed / 'other'))) == 4


def test_a_tokenizer_in_an_object_store_is_copied_whole(packed: Path, tmp_path: Path, s3: Any):
    from tokenizers import Tokenizer

    Tokenizer.from_file(str(packed / 'other' / 'tokenizer.json')).model.save(str(tmp_path))
    (tmp_path / 'tokenizer_config.json').write_text('{"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}')
    for file in ('vocab.json', 'merges.txt', 'tokenizer_config.json'):
        s3.upload_file(str(tmp_path / file), 'bucket', f'tokenizer/{file}')
    convert('--source', packed / 'source', '--out_root', tmp_path / 'out', '--splits', 'val', '--concat_tokens', 32,
            '--tokenizer', 's3://bucket/tokenizer')
    manifest = json.loads((tmp_path / 'out' / 'val' / 'manifest.json').read_text())
    assert manifest['tokenizer_name'] == 's3://bucket/tokenizer' and manifest['tokens'] > 1000
