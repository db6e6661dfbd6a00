"""An evaluation gives the figures of a plain loop over the texts, on any number of ranks; mistakes end in messages."""

import json
import math
import re
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import EOS, documents, write_mds
from launch import ROOT, ranks, tiny
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import main
from src.config import load as config
from src.mosaic_gpt import MosaicGPT
from src.ranks import program
from src.tools import evaluate
from src.tools.evaluate import bytes_per_token

QUICKSTART = str(ROOT / 'yamls/quickstart.yaml')
SHARDED = ['fsdp_config.sharding_strategy=FULL_SHARD', 'fsdp_config.state_dict_type=sharded']
WITHIN = 'model.attn_within_document=true'


def argv(root, *overrides: str) -> list[str]:
    """The arguments of the program, without the limit on evaluated samples that `tiny` sets."""
    return [QUICKSTART, *(o for o in tiny(root) if not o.startswith('eval_samples')), *overrides]


def run(root, *overrides: str, out=None):
    return evaluate.main(evaluate.parse_args([*argv(root, *overrides), *(['--out', str(out)] if out else [])]))


def fails(arguments: list[str], capfd, *parts: str) -> None:
    """The program ends with exit code 1 and one message, which has these parts."""
    assert program.run(lambda watch: evaluate.main(evaluate.parse_args(arguments), watch)) == 1
    said = capfd.readouterr().err
    assert said.count('error: ') == 1 and 'Traceback' not in said, said
    for part in parts:
        assert part in said, said


@pytest.fixture(scope='module')
def checkpoint(mds_root, tmp_path_factory):
    """A model that was trained for 20 batches, and the figures of the run's own evaluation on 31 documents."""
    folder = tmp_path_factory.mktemp('trained')
    trainer = main.main(config.load([QUICKSTART, *tiny(mds_root, 'log_to_console=false', f'save_folder={folder}')]))
    trainer.engine.close()
    return folder / 'ep0-ba20-rank0.pt', trainer.state.eval_metric_values


# ---------------------------------------------------------------- the plain loop


def model(weights, *overrides: str) -> MosaicGPT:
    cfg = config.to_plain(config.load([QUICKSTART, *tiny('.', *overrides)]))['model']
    gpt = MosaicGPT(cfg)
    gpt.load_state_dict({key.removeprefix('model.'): value for key, value in weights.items()})
    return gpt.eval()


def loop(gpt: MosaicGPT, tokenizer: Tokenizer, rows: list[list[int]]) -> dict[str, float]:
    """Evaluates one row at a time: predicts each token but the first from the tokens before it. The text is ASCII."""
    nats, tokens, n_bytes = 0.0, 0, 0
    with torch.no_grad():
        for row in map(torch.tensor, rows):
            log_p = gpt(row[None])[0, :-1].double().log_softmax(-1)
            nats += F.nll_loss(log_p, row[1:], reduction='sum').item()
            tokens += len(row) - 1
            n_bytes += len(tokenizer.decode(row[1:].tolist(), skip_special_tokens=True).encode())
    return {'loss': nats / tokens, 'perplexity': math.exp(nats / tokens), 'bits_per_byte': nats / math.log(2) / n_bytes,
            'tokens': tokens, 'bytes': n_bytes}


def text_rows(tokenizer: Tokenizer, n: int) -> list[list[int]]:
    return [[*tokenizer.encode(text).ids, tokenizer.token_to_id(EOS)][:32] for text in documents('val')[:n]]


def packed_rows(tokenizer: Tokenizer) -> list[list[int]]:
    ids = [i for text in documents('val') for i in [*tokenizer.encode(text).ids, tokenizer.token_to_id(EOS)]]
    return [ids[start:start + 32] for start in range(0, len(ids) - 31, 32)]


def pieces(tokenizer: Tokenizer) -> list[list[int]]:
    """The parts of documents in the packed rows."""
    out, eos = [], tokenizer.token_to_id(EOS)
    for row in packed_rows(tokenizer):
        ends = [0, *(i + 1 for i, token in enumerate(row) if token == eos and i < 31), 32]
        out += [row[a:b] for a, b in zip(ends, ends[1:])]
    return [piece for piece in out if len(piece) > 1]


@pytest.fixture(scope='module')
def tokenizer(tokenizer_dir):
    return Tokenizer.from_file(str(tokenizer_dir / 'tokenizer.json'))


def same(found, want) -> None:
    for key in ('loss', 'perplexity', 'bits_per_byte'):
        assert found[key] == pytest.approx(want[key], rel=1e-6), key
    assert {key: found[key] for key in ('tokens', 'bytes')} == {key: want[key] for key in ('tokens', 'bytes')}


# ---------------------------------------------------------------- one rank


def weights_of(path):
    return torch.load(path, weights_only=False)['state']['model']


def test_text_is_what_a_plain_loop_finds(checkpoint, mds_root, tokenizer, tmp_path, capfd):
    found = run(mds_root, f'load_path={checkpoint[0]}', 'device_eval_batch_size=7', out=tmp_path / 'found.json')
    same(found, loop(model(weights_of(checkpoint[0])), tokenizer, text_rows(tokenizer, 90)))
    assert found['documents'] == 90 and json.loads((tmp_path / 'found.json').read_text()) == found
    shown = capfd.readouterr().out
    for part in (rf'loss +{found["loss"]:.4f} ', rf'perplexity +{found["perplexity"]:.2f}\n',
                 rf'bits per byte +{found["bits_per_byte"]:.4f}\n',
                 rf'predicted +{found["tokens"]:,} tokens of 90 documents, {found["bytes"]:,} bytes'):
        assert len(re.findall(part, shown)) == 1, part
    assert str(checkpoint[0]) in shown and f'evaluation on {mds_root}/val' in shown


@pytest.mark.parametrize('within', [False, True])
def test_packed_tokens_are_what_a_plain_loop_finds(checkpoint, tokens_root, tokenizer, within):
    overrides = [WITHIN] if within else []
    found = run(tokens_root, f'load_path={checkpoint[0]}', *overrides)
    rows = packed_rows(tokenizer)
    same(found, loop(model(weights_of(checkpoint[0]), *overrides), tokenizer, pieces(tokenizer) if within else rows))
    assert found['sequences'] == len(rows) > 100 and 'documents' not in found


def test_it_finds_what_the_run_itself_found(checkpoint, mds_root):
    found = run(mds_root, f'load_path={checkpoint[0]}', 'eval_samples=31')
    assert found['documents'] == 31
    assert found['loss'] == pytest.approx(float(checkpoint[1]['LanguageCrossEntropy']), rel=1e-6)


def test_untrained_weights_are_said_to_be(mds_root, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    found = run(mds_root, 'save_folder=./saves', 'loggers.tensorboard.log_dir=./runs', '--split', 'train', 'eval_samples=8')
    assert found['loss'] == pytest.approx(math.log(512), abs=0.2) and found['data'] == f'{mds_root}/train'
    assert 'as initialised, untrained: load_path is not set' in capfd.readouterr().out
    assert not list(tmp_path.iterdir()), 'nothing is saved or logged'


# ---------------------------------------------------------------- bytes


UNICODE = ['Grüße, naïve café — “quoted”…', '日本語のテキスト 🙂🙃 mixed', 'tabs\tand\n\nlines  ',
           f'spells {EOS} out', '\u0000\u200b', '']


def test_bytes_are_those_of_the_text_to_the_last_one(tokenizer_dir):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir, split_special_tokens=True)
    lengths = bytes_per_token(tokenizer, 512)
    assert lengths[tokenizer.eos_token_id] == 0
    for text in [*UNICODE, *documents('val')]:
        ids = tokenizer(text, add_special_tokens=False)['input_ids']
        assert lengths[ids].sum() == len(text.encode()), text
    assert np.isnan(lengths[len(tokenizer):]).all(), 'ids that no text gives'


def test_a_character_cut_in_two_counts_the_bytes_on_this_side(mds_root, tmp_path, tokenizer):
    """A row of packed tokens may begin inside a character; then the counted bytes are no text that `decode` returns."""
    ids = [*tokenizer.encode('日本語のテキスト 🙂🙃').ids, tokenizer.token_to_id(EOS)]
    assert len(ids) > 32, 'one token a byte'
    write_mds(tmp_path / 'val', [{'tokens': np.array(ids[1:33], np.uint16)}], {'tokens': 'ndarray:uint16'})
    found = run(tmp_path, f'tokenizer_name={mds_root}/tokenizer')
    assert (found['tokens'], found['sequences']) == (31, 1)
    assert found['bytes'] == 31 - ids[2:33].count(tokenizer.token_to_id(EOS))


def other_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    if kind == 'prefix space':
        bpe = ByteLevelBPETokenizer(add_prefix_space=True)
        bpe.train_from_iterator(documents('train'), vocab_size=400, show_progress=False)
        backend = bpe._tokenizer
    elif kind == 'words':
        backend = Tokenizer(models.WordLevel({'the': 0, 'river': 1, '[UNK]': 2}, unk_token='[UNK]'))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        backend = Tokenizer(models.BPE({'a': 0, 'b</w>': 1, 'a</w>': 2, 'b': 3}, [], end_of_word_suffix='</w>'))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, add_prefix_space=kind == 'prefix space')


@pytest.mark.parametrize('kind', ['prefix space', 'words', 'end of word'])
def test_bytes_of_other_tokenizers_are_not_guessed(kind):
    assert np.isnan(bytes_per_token(other_tokenizer(kind), 512)).all()


def test_added_tokens_are_text_and_special_ones_are_not(tokenizer_dir):
    from tokenizers import AddedToken

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.add_tokens([AddedToken('größe'), AddedToken('eats', lstrip=True)])
    tokenizer.add_special_tokens({'additional_special_tokens': ['<mask>']})
    lengths = bytes_per_token(tokenizer, 600)
    of = dict(zip(('größe', 'eats', '<mask>'), lengths[tokenizer.convert_tokens_to_ids(['größe', 'eats', '<mask>'])]))
    assert of['größe'] == 7 and np.isnan(of['eats']) and of['<mask>'] == 0


def test_without_bytes_the_loss_is_still_told(mds_root, tmp_path, capfd):
    other_tokenizer('prefix space').save_pretrained(tmp_path / 'tokenizer')
    found = run(mds_root, f'tokenizer_name={tmp_path}/tokenizer', 'eval_samples=4', out=tmp_path / 'found.json')
    assert found['bits_per_byte'] is None and found['bytes'] is None and found['loss'] > 1
    assert 'bits per byte  unknown' in capfd.readouterr().out
    assert json.loads((tmp_path / 'found.json').read_text())['bits_per_byte'] is None


def test_a_loss_whose_perplexity_is_too_large_for_a_float(mds_root, tmp_path, capfd):
    found = run(mds_root, 'model.init_std=1000', 'eval_samples=4', out=tmp_path / 'found.json')
    assert found['loss'] > 710 and found['perplexity'] == math.inf and 'perplexity     inf' in capfd.readouterr().out
    assert json.loads((tmp_path / 'found.json').read_text()) == {**found, 'perplexity': None}


def test_what_an_evaluation_does_not_use_need_not_resolve():
    args = evaluate.parse_args([QUICKSTART, 'save_folder=${oc.env:NOPE}/x', 'load_path=${oc.env:NOPE,null}'])
    assert evaluate.load(args).load_weights_only is False


def test_settings_written_as_numbers(checkpoint, mds_root, tmp_path):
    yaml = tmp_path / 'numbers.yaml'
    yaml.write_text((ROOT / 'yamls/quickstart.yaml').read_text().replace('eval_samples: ${eval_samples}', 'eval_samples: 256'))
    found = evaluate.main(evaluate.parse_args([str(yaml), *argv(mds_root)[1:], f'load_path={checkpoint[0]}']))
    assert found['documents'] == 90


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize('overrides, parts', [
    (['eval_loader=null'], ['eval_loader: not set, ', 'yamls/quickstart.yaml']),
    (['--split', 'vall'], ['vall', 'python convert_c4.py']),
    (['load_path=none.pt'], ['load_path: none.pt: no such file']),
    (['model.d_model=32', 'load_path={checkpoint}'], ['load_path: ', 'other weights than this model has']),
    (['model.n_layers=3', 'load_path={checkpoint}'], ['load_path: ', 'other weights than this model has']),
    (['model.n_heads=4', 'load_path={checkpoint}'], ['load_path: ', 'has model.n_heads 2, and the config has 4']),
    (['max_duraton=1ba'], ["did you mean 'max_duration'"]),
    (['eval_samples=0'], ['eval_samples: 0 would evaluate nothing']),
    (['load_path=${{oc.env:NOPE}}'], ["'NOPE' not found", '(key: load_path)']),
    (["load_path=''"], ['load_path: is empty']),
    (['eval_loader.dataset.group_method=concat'], ["group_method: 'concat' has no fixed set of samples"]),
    (['--out', '/nowhere/x.json'], ['--out: /nowhere/x.json: there is no writable folder /nowhere']),
    (['--out', '{checkpoint}'], ['--out: ', 'already exists; name another file']),
], ids=lambda values: values[0].split('=')[0])
def test_mistakes_end_in_one_message(checkpoint, mds_root, capfd, overrides, parts):
    fails(argv(mds_root, *(o.format(checkpoint=checkpoint[0]) for o in overrides)), capfd, *parts)


@pytest.mark.parametrize('texts, part', [([], 'val'), (['', ''], 'holds no token to predict')])
def test_a_split_with_nothing_to_predict_is_a_message(mds_root, tmp_path, capfd, texts, part):
    write_mds(tmp_path / 'val', [{'text': text} for text in texts], {'text': 'str'})
    fails(argv(tmp_path, f'tokenizer_name={mds_root}/tokenizer'), capfd, str(tmp_path), part)


# ---------------------------------------------------------------- several ranks


@pytest.fixture(scope='module')
def on(checkpoint, mds_root, tokens_root, tmp_path_factory):
    """The figures of evaluations on n ranks, by name. Before, a run on two ranks has saved a sharded checkpoint."""
    folder = tmp_path_factory.mktemp('evaluations')
    load = f'load_path={checkpoint[0]}'

    @cache
    def runs(n: int):
        cases = {
            'text': argv(mds_root, load, 'eval_loader.drop_last=true', 'global_train_batch_size=7'),
            'packed': argv(tokens_root, load),
            'a last batch of one': argv(mds_root, load, 'eval_samples=25', 'device_eval_batch_size=4'),
            'fewer samples than ranks': argv(mds_root, load, 'eval_samples=1'),
            'sharded': argv(mds_root, load, 'eval_samples=31', *SHARDED),
            'from shards': argv(mds_root, f'load_path={folder}/saves/ep0-ba4', 'eval_samples=31', *SHARDED),
        }
        first = {'saves': [QUICKSTART, *tiny(mds_root, *SHARDED, 'max_duration=4ba', 'scheduler.t_warmup=1ba', 'eval_loader=null',
                                             'callbacks.unigram_baseline=false', f'save_folder={folder}/saves')]}
        if n != 2:
            runs(2)
        return ranks(n, {**(first if n == 2 else {}), **{f'{name} {n}': ['src/tools/evaluate.py', *a] for name, a in cases.items()}},
                     folder)
    return runs


@pytest.mark.slow
@pytest.mark.parametrize('n', [1, 2, 3])
@pytest.mark.parametrize('case', ['text', 'packed', 'a last batch of one', 'fewer samples than ranks', 'sharded', 'from shards'])
def test_every_sample_counts_once_on_any_number_of_ranks(on, checkpoint, tokenizer, n, case):
    found = on(n)[f'{case} {n}']
    n_texts = {'text': 90, 'a last batch of one': 25, 'fewer samples than ranks': 1}.get(case, 31)
    rows = packed_rows(tokenizer) if case == 'packed' else text_rows(tokenizer, n_texts)
    weights = on(2)['saves']['weights'] if case == 'from shards' else weights_of(checkpoint[0])
    same(found, loop(model(weights), tokenizer, rows))
    assert found.get('documents', found.get('sequences')) == len(rows)
    assert case != 'packed' or len(rows) % 2 and len(rows) % 3, 'a number that does not divide'
