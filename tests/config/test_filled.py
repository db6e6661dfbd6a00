"""A section that leaves out a value gets the top level's; a section with a value of its own keeps it."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf
from test_yamls import ALL

from src.config import load as config
from src.config.check import check
from src.config.schema import Config

QUICKSTART = 'yamls/quickstart.yaml'
# The values that sections of older YAMLs wrote out
WRITTEN_OUT = {
    'tokenizer': {'tokenizer_name': '${tokenizer_name}', 'max_seq_len': '${max_seq_len}'},
    **{loader: {'dataset': {'remote': '${data_remote}', 'local': '${data_local}', 'tokenizer_name': '${tokenizer_name}',
                            'max_seq_len': '${max_seq_len}'}} for loader in ('train_loader', 'eval_loader')},
    'model': {'init_seed': '${seed}'},
}
WRITTEN_OUT['eval_loader']['eval_samples'] = '${eval_samples}'
OTHERS = ['max_seq_len=64', 'data_remote=s3://bucket/c4', 'data_local=/tmp/c4', 'tokenizer_name=other', 'seed=5',
          'eval_samples=7']


def resolved(yaml: str, *overrides: str) -> Config:
    return Config.model_validate(config.to_plain(config.load([yaml, *overrides])))


@pytest.mark.parametrize('yaml', [*ALL, QUICKSTART])
@pytest.mark.parametrize('overrides', [[], OTHERS], ids=['as it is', 'command line'])
def test_a_yaml_that_says_every_value_is_the_same_run(yaml: str, overrides: list[str], tmp_path: Path):
    of_mosaic = {'model': {'max_seq_len': '${max_seq_len}'}, **{f'{name}_loader': {'dataset': {
        'sequence_ids': '${model.attn_within_document}'}} for name in ('train', 'eval')}}
    full = OmegaConf.merge(OmegaConf.load(yaml), WRITTEN_OUT, {} if 'hf_causal_lm' in yaml else of_mosaic)
    OmegaConf.save(full, tmp_path / 'before.yaml')
    assert resolved(yaml, *overrides) == resolved(str(tmp_path / 'before.yaml'), *overrides)


@pytest.mark.parametrize(('yaml', 'length', 'tokenizer', 'samples'), [
    (QUICKSTART, 128, './my-copy-c4/tokenizer', 256), ('yamls/mosaic_gpt/125m.yaml', 2048, 'gpt2', 16384)])
def test_what_the_sections_have(yaml: str, length: int, tokenizer: str, samples: int):
    c = resolved(yaml)
    datasets = c.train_loader.dataset, c.eval_loader.dataset
    assert {(d.remote, d.local, d.tokenizer_name, d.max_seq_len, d.sequence_ids) for d in datasets} == {
        ('./my-copy-c4', './my-copy-c4', tokenizer, length, False)}
    assert (c.tokenizer.tokenizer_name, c.tokenizer.max_seq_len) == (tokenizer, length)
    assert (c.model.max_seq_len, c.model.init_seed, c.eval_loader.eval_samples) == (length, 17, samples)


def test_the_command_line_reaches_every_place():
    c = resolved(QUICKSTART, *OTHERS, 'model.attn_within_document=true')
    for data in (c.train_loader.dataset, c.eval_loader.dataset):
        assert (data.remote, data.local, data.tokenizer_name) == ('s3://bucket/c4', '/tmp/c4', 'other')
        assert (data.max_seq_len, data.sequence_ids) == (64, True)
    assert (c.tokenizer.max_seq_len, c.model.max_seq_len, c.model.init_seed) == (64, 64, 5)
    assert c.eval_loader.eval_samples == 7


def test_a_section_keeps_what_it_says(capfd):
    c = resolved(QUICKSTART, 'eval_loader.eval_samples=7', 'train_loader.dataset.local=/tmp/x', 'model.init_seed=3',
                 'eval_loader.dataset.sequence_ids=true')
    assert (c.eval_loader.eval_samples, c.model.init_seed, c.eval_loader.dataset.sequence_ids) == (7, 3, True)
    assert (c.train_loader.dataset.remote, c.train_loader.dataset.local) == ('./my-copy-c4', '/tmp/x')
    assert 'config: eval_loader.eval_samples: 7 is used, although eval_samples is 256' in capfd.readouterr().err


def test_data_in_place_is_not_copied_over(tmp_path: Path):
    """A dataset with its own `local` and no `remote` reads its folder in place."""
    yaml = tmp_path / 'own.yaml'
    yaml.write_text(Path(QUICKSTART).read_text().replace('split: val', 'split: val\n    local: ./mine'))
    c = resolved(str(yaml))
    assert (c.eval_loader.dataset.remote, c.eval_loader.dataset.local) == (None, './mine')
    assert c.train_loader.dataset.remote == './my-copy-c4'


def test_streams_name_places_of_their_own():
    data = resolved(QUICKSTART, 'train_loader.dataset.streams={a: {local: x}}').train_loader.dataset
    assert (data.remote, data.local, data.max_seq_len) == (None, None, 128)


def test_a_config_that_load_has_not_seen_is_filled_in_too():
    assert check(OmegaConf.load(QUICKSTART), {}, 1, False) == check(config.load([QUICKSTART]), {}, 1, False)
