"""transformers loads the exported folder of any checkpoint, without the kit, as the same model."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import tokenizers_of
import torch
from composer.utils import dist
from launch import clean_env, ranks, tiny
from runs import train
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from src.checkpoints import weights
from src.checkpoints.hf_layout import TRAINING_ONLY_KEYS, hf_model, twin_config, twin_of
from src.common.encoding import encode_documents
from src.common.errors import UserError
from src.config.schema import GPTConfig, ModernGPTConfig, MosaicGPTConfig
from src.hf_causal_lm import ComposerHFCausalLM
from src.model_registry import COMPOSER_MODEL_REGISTRY
from src.tokenizer import HFTokenizer
from src.tools import export_hf

QUICKSTART, MODERN, GPT2 = 'yamls/quickstart.yaml', 'yamls/modern_gpt/quickstart.yaml', 'yamls/hf_causal_lm/gpt2-small.yaml'
EVERY = ('run_name=one', 'eval_loader=null', 'max_duration=4ba', 'scheduler.t_warmup=1ba')
SHARDED = ('fsdp_config.sharding_strategy=FULL_SHARD', 'fsdp_config.state_dict_type=sharded')
PADDED = 'model.vocab_size=576'  # the tokenizer has 512 tokens


def run(root: Path, *overrides: str) -> dict[str, Any]:
    return train(QUICKSTART, *tiny(root, *EVERY, *overrides))


def fine_tuning(root: Path, *overrides: str) -> list[str]:
    """The arguments of a run of a Hugging Face model on the same batches as `run`."""
    loader = [f'train_loader.{key}' for key in ('num_workers=0', 'prefetch_factor=null', 'persistent_workers=false',
                                                'dataset.group_method=truncate', 'dataset.num_canonical_nodes=1')]
    return [GPT2, *EVERY, *loader, f'data_remote={root}', f'tokenizer_name={root}/tokenizer', 'fsdp_config=null',
            'max_seq_len=32', 'global_train_batch_size=12', 'device_train_microbatch_size=12', *overrides]


def fine_tune(root: Path, *overrides: str) -> dict[str, Any]:
    return train(*fine_tuning(root, *overrides))


def export(*argv: str) -> None:
    export_hf.main(export_hf.parse_args([str(arg) for arg in argv]))


def refused(*argv: Any) -> str:
    with pytest.raises(UserError) as e:
        export(*argv)
    return str(e.value)


@pytest.fixture(scope='module')
def full(mds_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp('full')
    return folder, run(mds_root, f'save_folder={folder}')['weights']


@pytest.fixture(scope='module')
def sharded(mds_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp('sharded')
    return folder, run(mds_root, f'save_folder={folder}', PADDED, 'model.mlp_act=gelu_tanh', *SHARDED)['weights']


@pytest.fixture(scope='module')
def exported(full, tmp_path_factory):
    out = tmp_path_factory.mktemp('exported') / 'my-gpt'
    export(full[0] / 'ep0-ba4-rank0.pt', out)
    return out


def kit_logits(state: dict[str, torch.Tensor], ids: torch.Tensor, **model: Any) -> torch.Tensor:
    model = {'name': 'mosaic_gpt', 'd_model': 16, 'n_heads': 2, 'n_layers': 2, 'max_seq_len': 32, 'vocab_size': 512, **model}
    kit = COMPOSER_MODEL_REGISTRY[model['name']](model).eval()
    kit.load_state_dict(state)
    with torch.no_grad():
        return kit.model(ids)


IDS = torch.randint(512, (3, 32), generator=torch.Generator().manual_seed(0))


def difference(folder: Path, state: dict[str, torch.Tensor], **model: Any) -> float:
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
    assert logits.shape == (3, 32, 512)
    return float((logits - kit_logits(state, IDS, **model)[..., :512]).abs().max())


# ---------------------------------------------------------------- the same model


ALONE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
try:
    import src
    raise SystemExit('the kit is there')
except ImportError:
    pass
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
assert type(model).__name__ == 'GPT2LMHeadModel' and model.lm_head.weight is model.transformer.wte.weight
torch.save((model(torch.load(sys.argv[2])).logits.detach(), tokenizer('The river. Document 3')['input_ids']), sys.argv[3])
"""


@pytest.mark.slow
def test_it_loads_without_the_kit(exported, full, mds_root, tmp_path):
    torch.save(IDS, tmp_path / 'ids.pt')
    done = subprocess.run([sys.executable, '-I', '-c', ALONE, str(exported), str(tmp_path / 'ids.pt'), str(tmp_path / 'out.pt')],
                          cwd=tmp_path, env=clean_env(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    logits, ids = torch.load(tmp_path / 'out.pt')
    assert (logits - kit_logits(full[1], IDS)).abs().max() < 1e-5 < logits.std()
    assert ids == AutoTokenizer.from_pretrained(mds_root / 'tokenizer')('The river. Document 3')['input_ids']


def test_the_folder_holds_one_embedding_the_config_and_the_tokenizer(exported, full):
    assert sorted(p.name for p in exported.iterdir() if p.name != 'special_tokens_map.json') == [  # transformers 5 does not write it
        'config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json']
    assert len({p.stat().st_mode for p in exported.iterdir()}) == 1
    with safe_open(exported / 'model.safetensors', 'pt') as file:
        assert 'transformer.wte.weight' in file.keys() and 'lm_head.weight' not in file.keys()  # noqa: SIM118
    config = json.loads((exported / 'config.json').read_text())
    assert (config['model_type'], config['n_positions'], config['n_inner'], config['eos_token_id']) == ('gpt2', 32, 64, 0)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    text = 'Perhaps it was asked.\n  <|endoftext|> 3'
    assert tokenizer.decode(tokenizer(text)['input_ids']) == text and tokenizer.model_max_length == 32
    assert tokenizer('<|endoftext|>')['input_ids'] == [0] and tokenizer.pad_token_id == 0


def test_what_its_tokenizer_hands_the_model_gives_the_logits_of_the_kit(exported, full):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    texts = ['The river was quietly built.', 'Perhaps']
    batch = tokenizer(texts, return_tensors='pt', padding=True)
    assert sorted(batch) == ['attention_mask', 'input_ids'] and batch['attention_mask'][1].tolist()[-1] == 0
    with torch.no_grad():
        logits, alone = model(**batch).logits, model(**tokenizer(texts[0], return_tensors='pt')).logits
    for row, text in enumerate(texts):
        ids = torch.tensor([tokenizer(text)['input_ids']])
        assert (logits[row, :ids.shape[1]] - kit_logits(full[1], ids)[0]).abs().max() < 1e-5, text
    assert (alone[0] - logits[0]).abs().max() < 1e-5


@pytest.mark.parametrize('kind', ['byte-level', 'prefix'])
def test_the_exported_tokenizer_adds_no_bos(full, tmp_path, kind):
    tokenizer = tokenizers_of.save(kind, tmp_path / 'tokenizer', bos=True)
    own = AutoTokenizer.from_pretrained(tokenizer)
    own.chat_template = '{{ bos_token }}{{ messages[0].content }}'
    own.save_pretrained(tokenizer)
    assert own('The river')['input_ids'][0] == own.bos_token_id
    checkpoint = tmp_path / 'ep0-ba4-rank0.pt'
    checkpoint.write_bytes((full[0] / 'ep0-ba4-rank0.pt').read_bytes())
    export(checkpoint, tmp_path / 'out', '--yaml', QUICKSTART, *tiny(tokenizer.parent, *EVERY))
    exported = AutoTokenizer.from_pretrained(tmp_path / 'out')
    [ids] = encode_documents(HFTokenizer(str(tokenizer), 8).tokenizer, ['The river'])
    assert exported('The river')['input_ids'] == ids[:-1].tolist()
    assert exported.chat_template == own.chat_template and exported.bos_token == '<s>'
    assert exported('<s>')['input_ids'][-1] == own.bos_token_id, 'a special token in a prompt is one'


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_half_the_bytes(exported, full, tmp_path, capsys, dtype):
    export(full[0] / 'ep0-ba4-rank0.pt', tmp_path / 'out', '--dtype', dtype)
    assert f'MiB, {dtype}; from' in capsys.readouterr().out
    sizes = [(folder / 'model.safetensors').stat().st_size for folder in (tmp_path / 'out', exported)]
    assert 0.5 < sizes[0] / sizes[1] < 0.65  # the header keeps its length
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert (config.get('dtype') or config['torch_dtype']) == dtype
    model = AutoModelForCausalLM.from_pretrained(tmp_path / 'out', torch_dtype='auto')
    assert model.dtype == getattr(torch, dtype)
    with torch.no_grad():
        assert 0 < (model(IDS).logits.float() - kit_logits(full[1], IDS)).abs().max() < 0.02


def test_another_tokenizer_than_the_runs_is_refused(full, mds_root, tmp_path):
    from src.conversion.sample_corpus import train_tokenizer

    (tmp_path / 'other').mkdir()
    train_tokenizer(['another text of a few words'], tmp_path / 'other', 300)
    said = refused(full[0], tmp_path / 'out', '--tokenizer', tmp_path / 'other')
    assert said.startswith(f"--tokenizer: '{tmp_path}/other' (hash ") and f'{mds_root}/tokenizer (hash ' in said
    assert f'of the checkpoint {full[0]}/ep0-ba4-rank0.pt: ' in said


def test_a_sharded_checkpoint_without_the_padding_of_the_vocabulary(sharded, tmp_path, capsys):
    export(sharded[0], tmp_path / 'out')  # a run's folder: its newest
    n_params = (512 + 32) * 16 + 2 * (64 + 17 * 48 + 17 * 16 + 17 * 64 + 65 * 16) + 32
    assert f'gpt2, {n_params:,} parameters, 512 tokens' in capsys.readouterr().out
    assert difference(tmp_path / 'out', sharded[1], vocab_size=576, mlp_act='gelu_tanh') < 1e-5
    assert difference(tmp_path / 'out', sharded[1], vocab_size=576, mlp_act='gelu') > 1e-5, 'the activation matters'
    state, manifest, _ = weights.read_weights(str(sharded[0] / 'ep0-ba4'))
    assert manifest
    assert state.keys() == sharded[1].keys() and all(torch.equal(state[k], sharded[1][k]) for k in state)


@pytest.mark.parametrize('kind', ['full', 'sharded'])
def test_from_s3(s3, kind, full, sharded, tmp_path, retries_at_once, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')  # as in the shell of a pod whose launcher sets it for ranks
    monkeypatch.setattr(dist, 'is_initialized', lambda: False)  # earlier tests change it
    folder, state = {'full': full, 'sharded': sharded}[kind]
    for file in (p for p in folder.rglob('*') if p.is_file()):
        s3.upload_file(str(file), 'bucket', f'runs/one/{file.relative_to(folder)}')
    export('s3://bucket/runs/one/ep0-ba4-rank0.pt' if kind == 'full' else 's3://bucket/runs/one', tmp_path / 'out')
    model = {} if kind == 'full' else {'vocab_size': 576, 'mlp_act': 'gelu_tanh'}
    assert difference(tmp_path / 'out', state, **model) < 1e-5
    assert 's3://bucket/none.pt: no such file' in refused('s3://bucket/none.pt', tmp_path / 'none')
    assert 'check the address' in refused('s3://other/none.pt', tmp_path / 'none')
    assert 'no-such.yaml: no such file' in refused('s3://other/none.pt', tmp_path / 'none', '--yaml', 'no-such.yaml')
    s3.put_object(Bucket='bucket', Key='damaged.pt', Body=b'no checkpoint')
    assert refused('s3://bucket/damaged.pt', tmp_path / 'none').startswith('CHECKPOINT: s3://bucket/damaged.pt cannot be loaded')


@pytest.mark.slow
def test_a_sharded_checkpoint_of_two_ranks(mds_root, tmp_path):
    save = [*EVERY, *SHARDED, f'save_folder={tmp_path}/ck']
    state = ranks(2, {'two': [QUICKSTART, *tiny(mds_root, *save)]}, tmp_path)['two']['weights']
    assert {p.name for p in (tmp_path / 'ck' / 'ep0-ba4').iterdir()} == {'.metadata', '__0_0.distcp', '__1_0.distcp'}
    export(tmp_path / 'ck' / 'ep0-ba4', tmp_path / 'out')
    assert difference(tmp_path / 'out', state) < 1e-5


@pytest.mark.slow
def test_a_modern_gpt_becomes_a_qwen3(mds_root, tmp_path, capsys):
    model = ['model.n_kv_heads=1', 'model.vocab_size=576', 'model.tie_embeddings=false']
    state = train(MODERN, *tiny(mds_root, *EVERY, *model, f'save_folder={tmp_path}/ck'))['weights']
    export(tmp_path / 'ck', tmp_path / 'out')
    assert 'qwen3, ' in capsys.readouterr().out
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['architectures'] == ['Qwen3ForCausalLM'] and 'auto_map' not in config
    modern = {'name': 'modern_gpt', 'vocab_size': 576, 'tie_embeddings': False}
    assert difference(tmp_path / 'out', state, n_kv_heads=1, **modern) < 1e-5
    yaml = ['--yaml', MODERN, *tiny(mds_root, *EVERY, *model)]
    assert 'has model.rope_theta 10000.0, and the config has 500.0' in refused(
        tmp_path / 'ck', tmp_path / 'none', *yaml, 'model.rope_theta=500.0')
    (tmp_path / 'ck' / 'ep0-ba4.json').rename(tmp_path / 'moved.json')
    said = refused(tmp_path / 'ck' / 'ep0-ba4-rank0.pt', tmp_path / 'none', *yaml, 'model.n_kv_heads=2')
    assert said.startswith('--yaml: the weights do not fit') and '_proj.weight of shape ' in said


MODERN_SHAPE = {'name': 'modern_gpt', 'n_kv_heads': 2, 'd_hidden': 40}


@pytest.mark.parametrize('settings', [{}, {'mlp_act': 'gelu_tanh', 'mlp_ratio': 2}, {'attn_within_document': True, 'n_heads': 1},
                                      {'attn_impl': 'torch', 'n_layers': 1, 'resid_pdrop': 0.5, 'attn_pdrop': 0.5},
                                      MODERN_SHAPE, MODERN_SHAPE | {'tie_embeddings': False, 'rope_theta': 100.0},
                                      MODERN_SHAPE | {'head_dim': 6, 'norm_eps': 0.1}], ids=str)
def test_every_setting_computes_the_same(settings):
    cfg = {'name': 'mosaic_gpt', 'd_model': 16, 'n_heads': 4, 'n_layers': 2, 'max_seq_len': 32, 'vocab_size': 512, **settings}
    composer = COMPOSER_MODEL_REGISTRY[cfg['name']](cfg).eval()
    generator = torch.Generator().manual_seed(1)
    for p in composer.parameters():  # initial biases of 0 and LayerNorms of 1 would hide a mistake
        p.data.normal_(0.3, 0.3, generator=generator)
    with torch.no_grad():
        ours, theirs = composer.model(IDS), hf_model(cfg, composer.state_dict(), 'x')(IDS).logits
    assert (ours - theirs).abs().max() < 1e-5 * ours.abs().max()


class LaterMosaic(MosaicGPTConfig):
    position: Literal['learned', 'rotary'] = 'learned'


class LaterModern(ModernGPTConfig):
    name: Literal['modern_gpt'] = 'modern_gpt'
    position: Literal['rotary', 'learned'] = 'rotary'


@pytest.mark.parametrize('cls, setting, message', [
    (LaterMosaic, {'position': 'rotary'}, "position: 'rotary' cannot be exported, because GPT-2 has only 'learned'"),
    (LaterModern, {'position': 'learned'}, "position: 'learned' cannot be exported, because Qwen3 has only 'rotary'"),
    (LaterModern, {'logit_softcap': 30.0}, 'logit_softcap: 30.0 cannot be exported, because Qwen3 has only None')])
def test_a_setting_that_the_twin_lacks_is_named(cls, setting, message):
    cfg: GPTConfig = cls(d_model=16, n_heads=4, n_layers=2, max_seq_len=32, vocab_size=512)
    known = {'name', 'position', 'logit_softcap', *twin_of(cfg).keys} | TRAINING_ONLY_KEYS
    assert set(cls.model_fields) <= known, 'a new setting: can the twin express it?'
    assert twin_config(cfg).hidden_size == 16
    with pytest.raises(UserError, match=f'^model.{message}'):
        twin_config(cfg.model_copy(update=setting))


# ---------------------------------------------------------------- other architectures, and training on


def test_hugging_face_models_stay_what_they_are():
    shape = {'hidden_size': 16, 'intermediate_size': 32, 'num_hidden_layers': 2, 'num_attention_heads': 2, 'vocab_size': 512,
             'rope_scaling': {'rope_type': 'linear', 'factor': 2.0}, 'tie_word_embeddings': False}
    composer = ComposerHFCausalLM({'name': 'hf_causal_lm', 'config_overrides': {'model_type': 'llama', **shape}}).eval()
    described = json.loads(json.dumps(composer.manifest_config))
    described['config_overrides']['_attn_implementation'] = 'owner/repository'  # names code on the hub, which must not run
    model = hf_model(described, composer.state_dict(), 'x')
    assert model.config._attn_implementation in ('sdpa', 'eager')
    assert type(model).__name__ == 'LlamaForCausalLM' and model.config.rope_scaling['factor'] == 2.0
    with torch.no_grad():
        assert (model(IDS).logits - composer.model(IDS)).abs().max() < 1e-6


def test_fine_tuning_begins_with_the_loss_of_the_checkpoint(exported, full, mds_root, tmp_path):
    expected = run(mds_root, f'load_path={full[0]}/ep0-ba4-rank0.pt', 'load_weights_only=true')['losses']
    got = fine_tune(mds_root, f'model.pretrained_model_name_or_path={exported}', 'model.pretrained=true',
                    'optimizer.lr=3e-3', f'save_folder={tmp_path}/tuned')
    new = fine_tune(mds_root, f'model.pretrained_model_name_or_path={exported}', 'max_duration=1ba',
                    'scheduler.t_warmup=0ba')
    assert got['losses'][0] == pytest.approx(expected[0], abs=1e-5) and abs(new['losses'][0] - expected[0]) > 1e-3
    assert got['losses'] == pytest.approx(expected, abs=1e-3), 'the same training too'

    export(tmp_path / 'tuned', tmp_path / 'out')  # the pretrained folder may be deleted by then
    model = AutoModelForCausalLM.from_pretrained(tmp_path / 'out')
    for name, value in model.state_dict().items():
        assert torch.equal(value, got['weights'][f'model.hf.{name}']), name
    assert not torch.equal(model.transformer.wte.weight, AutoModelForCausalLM.from_pretrained(exported).transformer.wte.weight)


# ---------------------------------------------------------------- mistakes


def test_a_checkpoint_without_a_manifest_needs_the_yaml(full, mds_root, tmp_path):
    bare = tmp_path / 'bare.pt'
    bare.write_bytes((full[0] / 'ep0-ba4-rank0.pt').read_bytes())
    assert refused(bare, tmp_path / 'out').startswith('--yaml: not given, and no manifest beside')
    said = refused(bare, tmp_path / 'out', '--yaml', QUICKSTART, f'data_remote={mds_root}')
    assert said.startswith('--yaml: the weights do not fit') and '128' in said
    overrides = tiny(mds_root, *EVERY)
    assert 'layers' not in said and 'h.2' in refused(bare, tmp_path / 'out', '--yaml', QUICKSTART, *overrides, 'model.n_layers=3')
    assert not (tmp_path / 'out').exists()
    yaml = ['--yaml', QUICKSTART, *overrides]
    assert refused(bare, tmp_path / 'out', *yaml, 'model.n_heads=3').startswith('model: `embed_dim` must be div')
    for section in ('tokenizer', 'model'):
        (tmp_path / f'{section}.yaml').write_text(f'{section}: gpt2')
        said = refused(bare, tmp_path / 'out', '--yaml', tmp_path / f'{section}.yaml')
        assert said.startswith(f"{section}: 'gpt2' must be a section")
    larger = AutoTokenizer.from_pretrained(mds_root / 'tokenizer')
    larger.add_tokens([f'<{i}>' for i in range(999)])
    larger.save_pretrained(tmp_path / 'larger')
    said = refused(bare, tmp_path / 'out', '--tokenizer', tmp_path / 'larger', *yaml)
    assert said.startswith(f'--tokenizer: {tmp_path}/larger has more tokens than the 512 of the model')
    saved = full[0] / 'ep0-ba4-rank0.pt'
    assert 'has model.n_heads 2, and the config has 4' in refused(saved, tmp_path / 'out', *yaml, 'model.n_heads=4')
    export(bare, tmp_path / 'out', *yaml)
    assert difference(tmp_path / 'out', full[1]) < 1e-5


def test_a_null_in_the_yaml_is_the_models_own_value(mds_root, tmp_path):
    shape = {'model_type': 'gpt2', 'n_embd': 16, 'n_layer': 1, 'n_head': 2, 'vocab_size': 512}
    model = {'name': 'hf_causal_lm', 'config_overrides': shape}
    torch.save({'state': {'model': ComposerHFCausalLM(model).state_dict()}}, tmp_path / 'bare.pt')
    yaml = {'model': model, 'tokenizer': {'tokenizer_name': str(mds_root / 'tokenizer')}}
    (tmp_path / 'run.yaml').write_text(json.dumps(yaml))
    export(tmp_path / 'bare.pt', tmp_path / 'out', '--yaml', tmp_path / 'run.yaml', 'model.config_overrides.n_positions=null')
    assert AutoModelForCausalLM.from_pretrained(tmp_path / 'out').config.n_positions == 1024


class Runs:
    def __reduce__(self):
        return print, ('ran',)


def test_what_is_no_whole_checkpoint_is_refused_and_leaves_nothing(full, sharded, tmp_path, capsys):
    out = tmp_path / 'out'
    file = (full[0] / 'ep0-ba4-rank0.pt').read_bytes()
    (tmp_path / 'cut.pt').write_bytes(file[:len(file) // 2])
    (tmp_path / 'text.pt').write_text('no checkpoint')
    torch.save({'state': {'model': {}, 'run_name': Runs()}}, tmp_path / 'evil.pt')
    for name in ('cut.pt', 'text.pt', 'evil.pt'):
        assert refused(tmp_path / name, out).startswith(f'CHECKPOINT: {tmp_path / name} cannot be loaded as the weights of')
    assert refused(tmp_path / 'none', out).startswith(f'CHECKPOINT: {tmp_path / "none"}: no such file')

    broken = tmp_path / 'ep0-ba4'
    broken.mkdir()
    for part in (sharded[0] / 'ep0-ba4').iterdir():
        (broken / part.name).write_bytes(part.read_bytes())
    data = (broken / '__0_0.distcp').read_bytes()
    for damaged in (data[:1000], b'x' * len(data)):
        (broken / '__0_0.distcp').write_bytes(damaged)
        assert refused(broken, out).startswith(f'CHECKPOINT: {broken} cannot be loaded as the weights of a checkpoint: ')
    (broken / '__0_0.distcp').unlink()
    assert 'FileNotFoundError' in refused(broken, out)
    (tmp_path / 'ep0-ba4.json').write_bytes((sharded[0] / 'ep0-ba4.json').read_bytes())
    assert 'is not whole' in refused(broken, out)
    (tmp_path / 'ep0-ba4.json').unlink()
    (broken / '.metadata').write_bytes(pickle.dumps(Runs()))
    assert 'it holds builtins.print, and loading that would run code' in refused(broken, out)
    assert 'ran' not in capsys.readouterr().out and not out.exists()


def test_out_is_never_overwritten_and_whole_or_absent(full, tmp_path, monkeypatch):
    checkpoint = full[0] / 'ep0-ba4-rank0.pt'
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'precious').touch()
    assert refused(checkpoint, tmp_path / 'mine').startswith(f'OUT: {tmp_path / "mine"} already exists')
    assert refused(checkpoint, 's3://bucket/out').startswith('OUT: s3://bucket/out is not on a disk; name a folder')

    def full_disk(*_, **__):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr('transformers.PreTrainedTokenizerBase.save_pretrained', full_disk)
        assert refused(checkpoint, tmp_path / 'out').startswith(f'OUT: {tmp_path / "out"} cannot be written: ')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['mine'], 'nothing is left'
    (tmp_path / 'out').mkdir()
    (tmp_path / 'link').symlink_to(tmp_path / 'out')
    export(checkpoint, tmp_path / 'link')
    assert (tmp_path / 'out' / 'config.json').is_file() and (tmp_path / 'link').is_symlink()


def test_a_tokenizer_that_has_moved(full, mds_root, tmp_path):
    folder = tmp_path / 'ck'
    folder.mkdir()
    (folder / 'ep0-ba4-rank0.pt').write_bytes((full[0] / 'ep0-ba4-rank0.pt').read_bytes())
    manifest = json.loads((full[0] / 'ep0-ba4.json').read_text())
    assert manifest['tokenizer_name'] == str(mds_root / 'tokenizer') and manifest['model']['n_heads'] == 2
    (folder / 'ep0-ba4.json').write_text(json.dumps(manifest | {'tokenizer_name': './gone/tokenizer'}))
    assert refused(folder, tmp_path / 'out').startswith('--tokenizer: not given, and the tokenizer of the run, ./gone/tokenizer, does not exist')
    export(folder, tmp_path / 'out', '--tokenizer', mds_root / 'tokenizer')
    assert difference(tmp_path / 'out', full[1]) < 1e-5


def test_a_model_of_ones_own_is_named(full):
    with pytest.raises(UserError, match="model.name: 'parallel_gpt'; only mosaic_gpt, modern_gpt, hf_causal_lm can be exported"):
        hf_model({'name': 'parallel_gpt'}, {}, 'x')
