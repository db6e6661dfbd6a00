"""TextSamples logs what a plain loop would write, on any number of ranks, and does not change the training."""

import json
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer.core import Precision
from composer.loggers import InMemoryLogger
from launch import ranks, tiny
from transformers import AutoTokenizer

import main
from src.callbacks.text_samples import TextSamples
from src.common.errors import UserError
from src.config import load as config
from src.config.check import check
from src.mosaic_gpt import MosaicGPT
from src.tools.run_logs import EVAL, TRAIN, read_run
from src.training import plugins

QUICKSTART = 'yamls/quickstart.yaml'
PROMPTS = ['The river', 'A letter was written slowly by the']


@pytest.fixture(scope='module')
def tokenizer(mds_root):
    return AutoTokenizer.from_pretrained(mds_root / 'tokenizer')


def gpt() -> MosaicGPT:
    return MosaicGPT({'d_model': 16, 'n_heads': 2, 'n_layers': 2, 'max_seq_len': 32, 'vocab_size': 600, 'init_std': 0.5,
                      'attn_impl': 'torch', 'resid_pdrop': 0.5})


def sampled(callback: TextSamples, model: Any) -> list[list[str]]:
    """The rows that the callback logs for a model at batch 7."""
    log: Any = InMemoryLogger()
    log.log_table = lambda columns, rows, name, step: seen.append((columns, rows, name, step))
    seen: list[Any] = []
    state: Any = SimpleNamespace(model=torch.nn.ModuleDict({'model': model}), is_model_ddp=False, precision=Precision.FP32,
                                 precision_config=None, timestamp=SimpleNamespace(batch=7),
                                 device=SimpleNamespace(tensor_to_device=lambda x: x))
    callback.eval_start(state, SimpleNamespace(destinations=[log]))  # type: ignore[arg-type]
    assert [(columns, name, step) for columns, _, name, step in seen] == [(['prompt', 'text'], 'text_samples', 7)]
    return seen[0][1]


def test_the_likeliest_tokens_are_those_of_a_plain_loop(tokenizer):
    model, callback = gpt(), TextSamples(PROMPTS, max_new_tokens=12, temperature=0)
    callback.prepare(tokenizer, 32)
    said = sampled(callback, model)
    model.eval()
    for prompt, (logged, text) in zip(PROMPTS, said):
        ids = tokenizer(prompt)['input_ids']
        new: list[int] = []
        with torch.no_grad():
            for _ in range(12):
                new.append(int(model(torch.tensor([ids + new]))[0, -1, :len(tokenizer)].argmax()))
        new = new[:new.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in new else new
        assert (logged, text) == (prompt, tokenizer.decode(new))


def test_a_text_ends_at_eos_and_at_the_models_length(tokenizer):
    class Says(torch.nn.Module):
        """Gives the same likeliest token at every position before 20, and then EOS."""

        def forward(self, ids):
            widths.append(ids.shape)
            logits = torch.zeros(*ids.shape, 600)
            logits[..., 599] = 9.0  # an id that the tokenizer does not have
            logits[..., 7] = 5.0
            logits[:, 20:, tokenizer.eos_token_id] = 8.0
            return logits

    widths: list[Any] = []
    callback = TextSamples(PROMPTS, max_new_tokens=64, temperature=0)
    callback.prepare(tokenizer, 26)
    short, long = (len(tokenizer(prompt)['input_ids']) for prompt in PROMPTS)
    said = sampled(callback, Says())
    assert [text for _, text in said] == [tokenizer.decode([7] * min(21 - n, 26 - long)) for n in (short, long)]
    assert widths == [(2, 26)] * (26 - long), 'as many passes whatever is said, all of one width'


def test_sampling_follows_its_seed_alone(tokenizer):
    model, said = gpt(), {}
    for seed in (1, 2):
        callback = TextSamples(PROMPTS, max_new_tokens=12, seed=seed)
        callback.prepare(tokenizer, 32)
        torch.manual_seed(seed + 100)
        before = torch.get_rng_state()
        said[seed] = sampled(callback, model)
        assert torch.equal(torch.get_rng_state(), before) and model.training
        torch.manual_seed(5)
        assert sampled(callback, model) == said[seed]
    assert said[1] != said[2]


def test_a_model_that_diverges_still_says_something(tokenizer):
    model, callback = gpt(), TextSamples(PROMPTS, max_new_tokens=3)
    torch.nn.init.constant_(model.transformer['wpe'].weight, float('nan'))  # pyright: ignore
    callback.prepare(tokenizer, 32)
    assert len(sampled(callback, model)) == 2


def logged(folder: Any, name: str) -> dict[int, Any]:
    """The tables of the file logger, by batch."""
    lines = (folder / f'{name}.txt').read_text('utf-8').splitlines()
    found = [re.fullmatch(r'\[table\]\[batch=(\d+)\]: text_samples: (.*)', line) for line in lines]
    return {int(table[1]): json.loads(table[2]) for table in found if table}


def test_a_run_trains_alike_with_and_without(mds_root, tmp_path):
    argv = tiny(mds_root, 'model.resid_pdrop=0.2', 'max_duration=8ba', 'eval_interval=3ba', 'log_to_console=false')
    for name, samples in (('with', []), ('without', ['callbacks.text_samples=false'])):
        assert main.cli([QUICKSTART, *argv, f'loggers.file.filename={tmp_path}/{name}.txt', *samples]) == 0
    ours, other = read_run(f'{tmp_path}/with.txt'), read_run(f'{tmp_path}/without.txt')
    samples = logged(tmp_path, 'with')
    for tag in (TRAIN, EVAL, 'trainer/grad_norm'):
        assert len(ours.scalars[tag]) >= 4 and ours.scalars[tag] == other.scalars[tag], tag
    assert list(samples) == [0, 3, 6, 8] and not logged(tmp_path, 'without') and samples[0] != samples[8]


@pytest.mark.slow
def test_two_ranks_say_what_one_does(mds_root, tmp_path):
    argv = [QUICKSTART, *tiny(mds_root, 'max_duration=4ba', 'scheduler.t_warmup=1ba', 'eval_interval=2ba',
                               'callbacks.text_samples.temperature=0')]
    runs = {'ddp': [], 'sharded': ['fsdp_config.sharding_strategy=FULL_SHARD']}
    file = 'loggers.file.filename=' + str(tmp_path)
    ranks(2, {name: [*argv, *more, f'{file}/{name}-rank{{rank}}.txt'] for name, more in runs.items()}, tmp_path)
    assert main.cli([*argv, f'{file}/one.txt', 'log_to_console=false']) == 0
    want = logged(tmp_path, 'one')
    for name in runs:
        for rank in (0, 1):
            assert logged(tmp_path, f'{name}-rank{rank}') == want and list(want) == [0, 2, 4], name


@pytest.mark.parametrize(('keywords', 'message'), [
    ({'prompts': []}, r'callbacks.text_samples: prompts: \[\]; set a list of texts'),
    ({'prompts': ['a'], 'max_new_tokens': 0}, 'max_new_tokens: 0; set a whole number above 0'),
    ({'prompts': ['a'], 'seed': -1}, 'seed: -1; set a whole number of 0 or more'),
    ({'prompts': ['a'], 'temperature': -1.0}, 'temperature: -1.0; set a number of 0 or more'),
], ids=['no prompt', 'no tokens', 'seed', 'temperature'])
def test_values_out_of_range_are_refused(keywords, message):
    with pytest.raises(UserError, match=message):
        plugins.build_plugins('callbacks', {'text_samples': keywords})


def test_what_cannot_work_is_refused(mds_root, tokenizer):
    cfg = config.load([QUICKSTART, *tiny(mds_root, 'callbacks.text_samples.prompts=one', 'callbacks.text_samples.seeds=1')])
    with pytest.raises(UserError, match=r"prompts: 'one' must be a list(.|\n)*text_samples.seeds: no such key"):
        check(cfg, plugins.REGISTRIES, 1, False)
    with pytest.raises(UserError, match="callbacks.text_samples.prompts: 'The river' has . tokens; give a prompt of 1 to 1 "):
        TextSamples(['The river']).prepare(tokenizer, 2)
    with pytest.raises(UserError, match="callbacks.text_samples.prompts: '' has 0 tokens; give a prompt of 1 to 31 tokens"):
        TextSamples(['The river', '']).prepare(tokenizer, 32)
