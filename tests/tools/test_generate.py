"""Generation: cache and batch change nothing, sampling follows its options, and mistakes end in messages."""

import json
import subprocess
import sys

import pytest
import torch
from launch import ROOT, Popen, clean_env, tiny
from runs import train
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from src.common.errors import UserError
from src.tools import generate as program
from src.tools.generate import generate

PROMPTS = ['The river', 'Document 3 of train. Perhaps the engine was', 'a']


@pytest.fixture(scope='module')
def folder(tokenizer_dir, tmp_path_factory):
    """A GPT-2 with large weights, so that each token depends on the whole prompt."""
    out = tmp_path_factory.mktemp('gpt2')
    torch.manual_seed(1)
    GPT2LMHeadModel(GPT2Config(vocab_size=512, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3,
                               bos_token_id=0, eos_token_id=0)).save_pretrained(out)
    AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(out)
    return out


@pytest.fixture(scope='module')
def loaded(folder):
    return program.load_folder(str(folder))


def run(*argv: object) -> None:
    program.main(program.parse_args([str(arg) for arg in argv]))


def refused(*argv: object) -> str:
    with pytest.raises(UserError) as e:
        run(*argv)
    return str(e.value)


# ---------------------------------------------------------------- what is generated


def test_greedy_is_the_likeliest_token_each_time(loaded):
    model, tokenizer = loaded
    for prompt in PROMPTS:
        ids = tokenizer(prompt)['input_ids']
        for _ in range(20):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        expected = ids[-20:]
        assert len(set(expected)) > 2 and 0 not in expected
        assert generate(model, tokenizer, [prompt], 20, temperature=0) == [expected]
        assert generate(model, tokenizer, [prompt], 20, top_k=1) == [expected]
        assert generate(model, tokenizer, [prompt], 20, top_p=1e-9) == [expected]


def test_a_batch_is_what_its_prompts_alone_are(loaded):
    together = generate(*loaded, PROMPTS, 12, temperature=0)
    assert together == [generate(*loaded, [prompt], 12, temperature=0)[0] for prompt in PROMPTS]
    assert len({tuple(ids) for ids in together}) == 3


def test_the_cache_is_used(loaded, monkeypatch):
    seen = []
    forward = GPT2LMHeadModel.forward
    monkeypatch.setattr(GPT2LMHeadModel, 'forward', lambda self, input_ids=None, **kwargs: (
        seen.append(input_ids.shape[1]), forward(self, input_ids=input_ids, **kwargs))[1])
    generate(*loaded, ['The river'], 5, temperature=0)
    assert seen[1:] == [1, 1, 1, 1]


def test_seeds_reproduce_and_differ(loaded):
    one = generate(*loaded, PROMPTS, 12, seed=1)
    assert one == generate(*loaded, PROMPTS, 12, seed=1) != generate(*loaded, PROMPTS, 12, seed=2)
    state = torch.get_rng_state()
    generate(*loaded, PROMPTS, 2, seed=3)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize('options', [{'top_k': 3}, {'top_p': 0.4}, {'temperature': 0.7}, {}], ids=str)
def test_samples_have_the_probabilities_that_the_options_give(loaded, options):
    """Compares the first token of 4000 samples with the same options applied to the softmax."""
    model, tokenizer = loaded
    with torch.no_grad():
        p = (model(torch.tensor([tokenizer('The')['input_ids']])).logits[0, -1] / options.get('temperature', 1)).softmax(-1)
    order = p.argsort(descending=True)
    kept = order[:options.get('top_k')]
    if 'top_p' in options:
        kept = order[:int((p[order].cumsum(0) < options['top_p']).sum()) + 1]
    expected = torch.zeros(512).index_copy(0, kept, p[kept] / p[kept].sum())
    rows = generate(model, tokenizer, ['The'] * 4000, 1, **options)
    counts = torch.bincount(torch.tensor([ids[0] if ids else 0 for ids in rows]), minlength=512) / 4000
    assert set(counts.nonzero().flatten().tolist()) <= set(kept.tolist())
    assert (counts - expected).abs().max() < 4 * 0.5 / 4000 ** 0.5


def test_it_ends_at_eos(loaded):
    model, tokenizer = loaded
    ids = generate(model, tokenizer, ['The river'], 20, temperature=0)[0]
    tokenizer.eos_token_id, was = ids[4], tokenizer.eos_token_id
    try:
        assert generate(model, tokenizer, ['The river'], 20, temperature=0) == [ids[:ids.index(ids[4])]]
    finally:
        tokenizer.eos_token_id = was


def test_it_fills_the_context_and_no_more(loaded):
    model, tokenizer = loaded
    prompt = 'a' + ' a' * 59
    assert len(tokenizer(prompt)['input_ids']) == 60
    assert len(generate(model, tokenizer, [prompt], temperature=0)[0]) == 4
    with pytest.raises(UserError, match=r'^PROMPT: number 2 has 60 tokens, and the model takes 64, .*--max_new_tokens=4 or less'):
        generate(model, tokenizer, ['a', prompt], 5)
    with pytest.raises(UserError, match=r'^PROMPT: number 1 has 80 tokens, and the model takes 64, including new.*shorten it$'):
        generate(model, tokenizer, ['a' + ' a' * 79])


# ---------------------------------------------------------------- the program


def test_one_prompt_streams(folder, loaded, monkeypatch):
    parts = []
    monkeypatch.setattr(program.TextStreamer, 'on_finalized_text', lambda self, text, stream_end=False: parts.append(text))
    run(folder, 'The river', '--max_new_tokens', 12, '--temperature', 0)
    model, tokenizer = loaded
    assert len(parts) > 3
    assert ''.join(parts) == 'The river' + tokenizer.decode(generate(model, tokenizer, ['The river'], 12, temperature=0)[0])


def test_several_are_printed_one_after_another(folder, loaded, capsys):
    run(folder, *PROMPTS, '--max_new_tokens', 6, '--temperature', 0.5, '--seed', 3)
    texts = generate(*loaded, PROMPTS, 6, temperature=0.5, seed=3)
    assert capsys.readouterr().out == ''.join(
        f'[{i}] {prompt}{loaded[1].decode(ids)}\n' for i, (prompt, ids) in enumerate(zip(PROMPTS, texts), 1))


@pytest.mark.parametrize('yaml, model', [('yamls/quickstart.yaml', []), ('yamls/modern_gpt/quickstart.yaml', ['model.n_kv_heads=1'])])
def test_a_checkpoint_and_its_export_say_the_same(yaml, model, mds_root, tmp_path, capsys):
    from src.tools import export_hf
    train(yaml, *tiny(mds_root, 'max_duration=2ba', 'scheduler.t_warmup=1ba', 'eval_loader=null', *model,
                      'run_name=one', f'save_folder={tmp_path}/ck'))
    capsys.readouterr()
    export_hf.main(export_hf.parse_args([f'{tmp_path}/ck', f'{tmp_path}/out']))
    capsys.readouterr()
    said = []
    for path in (f'{tmp_path}/ck', f'{tmp_path}/ck/ep0-ba2-rank0.pt', f'{tmp_path}/out'):
        run(path, 'The river', 'a', '--max_new_tokens', 8, '--top_k', 50)
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2] and said[0].startswith('[1] The river') and '\n[2] a' in said[0]


# ---------------------------------------------------------------- mistakes


def test_an_empty_prompt_is_named(folder):
    assert refused(folder, 'a', '').startswith('PROMPT: number 2 is empty; ')


def test_what_is_no_model_is_named(folder, tmp_path):
    assert refused(tmp_path / 'none', 'a').startswith(f'CHECKPOINT_OR_FOLDER: {tmp_path / "none"}: no such file')
    assert refused(tmp_path, 'a').startswith(f'CHECKPOINT_OR_FOLDER: {tmp_path}: no such file')
    for name, change in {'config.json': b'{}', 'model.safetensors': b'half', 'tokenizer.json': b'{'}.items():
        copy = tmp_path / name.split('.')[0]
        copy.mkdir()
        for file in folder.iterdir():
            (copy / file.name).write_bytes(change if file.name == name else file.read_bytes())
        assert refused(copy, 'a').startswith(f'CHECKPOINT_OR_FOLDER: {copy} cannot be loaded as a model: '), name


@pytest.mark.parametrize('option, value, allowed', [
    ('--temperature', -1, 'a number of 0 or more'), ('--temperature', 'nan', 'a number of 0 or more'),
    ('--temperature', 'inf', 'a number'), ('--top_p', 0, 'a number above 0 and up to 1'), ('--top_p', 1.5, 'up to 1'),
    ('--seed', -1, 'a whole number of 0 or more')])
def test_a_value_out_of_its_range_is_named(option, value, allowed):
    said = refused('none', 'a', option, value)
    assert said.startswith(f'{option}: ') and allowed in said


def test_a_folder_without_eos_is_named(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for name in 'tokenizer_config.json', 'special_tokens_map.json':
        if (tmp_path / name).exists():
            held = json.loads((tmp_path / name).read_text())
            left = {key: value for key, value in held.items() if key not in ('eos_token', 'pad_token')}
            (tmp_path / name).write_text(json.dumps(left))
    assert 'has no EOS token' in refused(tmp_path, 'a', 'b')


def test_options_for_checkpoints_are_not_for_folders(folder):
    assert refused(folder, 'a', '--tokenizer', 'gpt2').startswith('--tokenizer: gpt2; ')


def test_weights_that_are_missing_are_not_drawn(folder, tmp_path):
    from safetensors.torch import load_file, save_file
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / 'model.safetensors')
    del weights['transformer.h.1.ln_1.weight']
    save_file(weights, tmp_path / 'model.safetensors', {'format': 'pt'})
    assert 'lacks weights, such as transformer.h.1.ln_1.weight' in refused(tmp_path, 'a')


def test_a_mistake_is_one_line_and_exit_code_1(tmp_path):
    started = [Popen([sys.executable, f'src/tools/{name}.py', str(tmp_path / 'none'), 'out'], cwd=ROOT, env=clean_env(),
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for name in ('generate', 'export_hf')]
    for process in started:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 1 and out == '' and err.startswith('error: CHECKPOINT') and err.count('\n') == 1
