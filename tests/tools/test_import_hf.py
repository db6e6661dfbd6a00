"""A Qwen3 or a GPT-2 of Hugging Face becomes a checkpoint that runs train further; what would compute something else is refused."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from launch import ROOT, tiny
from runs import train
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

import main
from src.checkpoints.hf_layout import hf_model, kit_config
from src.checkpoints.loading import check_model
from src.checkpoints.weights import read_weights
from src.common.errors import UserError
from src.model_registry import COMPOSER_MODEL_REGISTRY
from src.tools import import_hf
from src.tools.export_hf import load_checkpoint

QWEN3: dict[str, Any] = dict(vocab_size=512, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
                             num_key_value_heads=2, head_dim=8, max_position_embeddings=64, rope_theta=1_000_000,
                             rms_norm_eps=1e-5, initializer_range=0.1)
GPT2: dict[str, Any] = dict(vocab_size=512, n_embd=24, n_layer=2, n_head=4, n_positions=48, initializer_range=0.1)
MODELS = {'qwen3': Qwen3Config(**QWEN3, tie_word_embeddings=True), 'qwen3-untied': Qwen3Config(**QWEN3),
          'gpt2': GPT2Config(**GPT2), 'gpt2-exact': GPT2Config(**GPT2, n_inner=48, activation_function='gelu', attn_pdrop=0.0)}
IDS = torch.randint(512, (3, 32), generator=torch.Generator().manual_seed(0))


def run(*argv: Any) -> None:
    import_hf.main(import_hf.parse_args([str(arg) for arg in argv]))


def refused(*argv: Any) -> str:
    with pytest.raises(UserError) as e:
        run(*argv)
    return str(e.value)


@pytest.fixture(scope='module')
def folders(tokenizer_dir, tmp_path_factory) -> dict[str, Path]:
    """A folder of each model with its tokenizer."""
    root, found = tmp_path_factory.mktemp('hub'), {}
    for name, hf_config in MODELS.items():
        torch.manual_seed(3)
        model: Any = (GPT2LMHeadModel if 'gpt2' in name else Qwen3ForCausalLM)(hf_config)
        for p in model.parameters():  # biases of 0 and norms of 1 would hide a mistake
            p.data.add_(0.05 * torch.randn_like(p))
        model.save_pretrained(root / name)
        AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(root / name)
        found[name] = root / name
    return found


def changed(folder: Path, out: Path, **settings: Any) -> Path:
    """A copy of a model's folder with other settings in its config.json."""
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    (out / 'config.json').write_text(json.dumps(json.loads((folder / 'config.json').read_text()) | settings))
    return out


# ---------------------------------------------------------------- the same model


@pytest.mark.parametrize('name', MODELS)
def test_a_model_comes_back_bit_by_bit(name, folders, tmp_path):
    run(folders[name], tmp_path / 'out')
    assert sorted(file.name for file in (tmp_path / 'out').iterdir()) == ['ep0-ba0-rank0.pt', 'ep0-ba0.json']
    weights, manifest, path = read_weights(str(tmp_path / 'out'))
    assert manifest and path == f'{tmp_path}/out/ep0-ba0-rank0.pt' and manifest.tokenizer_name == str(folders[name])
    kit = COMPOSER_MODEL_REGISTRY[manifest.model['name']](manifest.model).eval()
    kit.load_state_dict(weights)
    back, theirs = hf_model(manifest.model, weights, 'x'), AutoModelForCausalLM.from_pretrained(folders[name])
    with torch.no_grad():
        logits = theirs(IDS).logits
        assert all((other - logits).abs().max() < 1e-5 < logits.std() for other in (kit.model(IDS), back(IDS).logits))
    want, got = theirs.state_dict(), back.state_dict()
    assert torch.equal(load_checkpoint(str(tmp_path / 'out'))[0].lm_head.weight, theirs.lm_head.weight), 'for generate.py'
    assert want.keys() == got.keys() and all(torch.equal(got[key], weight) for key, weight in want.items())
    assert all(getattr(back.config, key) == value for key, value in (GPT2 if 'gpt2' in name else QWEN3).items())


def test_files_as_those_of_the_hub_are_read(folders, tmp_path):
    """The hub's GPT-2 has names without a prefix, and its masks; other models are in bf16."""
    folder = changed(folders['gpt2'], tmp_path / 'gpt2')
    weights = {key.removeprefix('transformer.'): weight for key, weight in load_file(folder / 'model.safetensors').items()}
    save_file(weights | {'h.0.attn.bias': torch.ones(1, 1, 48, 48)}, folder / 'model.safetensors', {'format': 'pt'})
    run(folder, tmp_path / 'out')
    run(folders['gpt2'], tmp_path / 'want')
    got, want = (read_weights(str(tmp_path / name))[0] for name in ('out', 'want'))
    assert want.keys() == got.keys() and all(torch.equal(got[key], weight) for key, weight in want.items())

    half = AutoModelForCausalLM.from_pretrained(folders['qwen3'], torch_dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / 'half')
    run(tmp_path / 'half', tmp_path / 'from-half', '--tokenizer', folders['gpt2'])
    got, manifest, _ = read_weights(str(tmp_path / 'from-half'))
    assert manifest and manifest.tokenizer_name == str(folders['gpt2'])
    assert torch.equal(got['model.transformer.wte.weight'], half.model.embed_tokens.weight.float())
    assert got['model.lm_head.weight'].data_ptr() == got['model.transformer.wte.weight'].data_ptr(), 'stored once'


@pytest.mark.parametrize('name', ['qwen3-untied', 'gpt2'])
def test_the_printed_command_trains_from_the_loss_of_the_model(name, folders, mds_root, tmp_path, capsys):
    run(folders[name], tmp_path / 'out')
    said = capsys.readouterr().out
    assert said.startswith(f'{tmp_path}/out: {"mosaic" if name == "gpt2" else "modern"}_gpt, ')
    composer, program, *argv = shlex.split(said.splitlines()[2])
    assert (composer, program) == ('composer', 'main.py') and (ROOT / argv[0]).is_file()
    own = [arg for arg in tiny(mds_root) if not arg.startswith(('model.', 'max_seq_len'))]
    result = train(str(ROOT / argv[0]), *own, *argv[1:], 'eval_loader=null', 'max_duration=1ba', 'scheduler.t_warmup=0ba',
                   *(['model.attn_pdrop=0', 'model.resid_pdrop=0', 'model.emb_pdrop=0'] if name == 'gpt2' else []))
    hf, nats, count = AutoModelForCausalLM.from_pretrained(folders[name]), 0.0, 0
    with torch.no_grad():
        for row in map(torch.tensor, result['batches'][0]):
            n = len(row) if 0 not in row else row.tolist().index(0) + 1  # up to the first EOS, which also pads
            nats += F.cross_entropy(hf(row[None, :n]).logits[0, :-1], row[1:n], reduction='sum').item()
            count += n - 1
    assert result['losses'][0] == pytest.approx(nats / count, abs=1e-5)


# ---------------------------------------------------------------- mistakes


LINEAR = {'rope_type': 'linear', 'factor': 2.0}


@pytest.mark.parametrize('name, settings, message', [
    ('qwen3', {'model_type': 'llama'}, "model_type 'llama', but the kit has its own model only for gpt2 or qwen3. Train"),
    ('qwen3', {'attention_bias': True}, 'attention_bias True, but the kit has its own model only for False. Train this'),
    ('qwen3', {'layer_types': ['full_attention', 'sliding_attention']}, "layer_types 'full_attention, sliding_attention'"),
    ('qwen3', {'layer_types': None, 'use_sliding_window': True, 'sliding_window': 8, 'max_window_layers': 0},
     "layer_types 'sliding_attention'"),
    ('qwen3', {'rope_scaling': LINEAR}, "rope_type 'linear', but the kit has its own model only for default"),
    ('qwen3', {'rope_parameters': LINEAR | {'rope_theta': 5.0}}, "rope_type 'linear'"),
    ('qwen3', {'hidden_act': 'gelu'}, "hidden_act 'gelu', but the kit has its own model only for silu"),
    ('qwen3', {'attention_dropout': 0.1}, 'attention_dropout 0.1'),
    ('qwen3', {'quantization_config': {'quant_method': 'fp8'}}, 'quantization_config'),
    ('gpt2', {'activation_function': 'relu'}, "activation_function 'relu', but the kit has its own model only for gelu_new or"),
    ('gpt2', {'scale_attn_by_inverse_layer_idx': True}, 'scale_attn_by_inverse_layer_idx True'),
    ('gpt2', {'scale_attn_weights': False}, 'scale_attn_weights False'),
    ('gpt2', {'layer_norm_epsilon': 1e-6}, 'layer_norm_epsilon 1e-06'),
    ('gpt2', {'n_inner': 100}, 'n_inner 100, but the kit has its own model only for a multiple of n_embd 24')], ids=str)
def test_a_model_that_the_kit_lacks_is_named(name, settings, message, folders, tmp_path):
    folder = changed(folders[name], tmp_path / 'model', **settings)
    said = refused(folder, tmp_path / 'out')
    assert said.startswith(f'MODEL: {folder}: the model has {message}') and 'model.name=hf_causal_lm' in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ['model']


def test_the_settings_of_transformers_5_are_read():
    stored = {key: value for key, value in QWEN3.items() if key != 'rope_theta'} | {'model_type': 'qwen3'}
    cfg: Any = kit_config(stored | {'rope_parameters': {'rope_type': 'default', 'rope_theta': 5000.0}}, 'x')
    assert (cfg.rope_theta, cfg.tie_embeddings, cfg.n_kv_heads, cfg.norm_eps) == (5000.0, False, 2, 1e-5)


def test_what_is_no_model_is_named_and_leaves_nothing(folders, mds_root, tmp_path):
    qwen3, out = folders['qwen3-untied'], tmp_path / 'out'
    assert refused(tmp_path / 'none', out).startswith(f"MODEL: '{tmp_path}/none' has no config.json that can be read: ")
    pickled = changed(qwen3, tmp_path / 'pickled')
    torch.save(load_file(qwen3 / 'model.safetensors'), pickled / 'pytorch_model.bin')
    (pickled / 'model.safetensors').unlink()
    said = refused(pickled, out)
    assert said.startswith(f'MODEL: the weights of {pickled} cannot be read: ') and 'give a model with safetensors' in said
    cut = changed(qwen3, tmp_path / 'cut')
    weights = load_file(cut / 'model.safetensors')
    lost = weights.pop('model.layers.1.mlp.up_proj.weight')
    save_file(weights, cut / 'model.safetensors', {'format': 'pt'})
    assert '1 are missing, such as model.layers.1.mlp.up_proj.weight; copy' in refused(cut, out)
    save_file(weights | {'model.layers.1.mlp.up_proj.weight': lost, 'other': lost.clone()}, cut / 'model.safetensors', {'format': 'pt'})
    assert '1 are unexpected, such as other; copy' in refused(cut, out)
    assert 'cannot be read: ' in refused(changed(qwen3, tmp_path / 'wider', intermediate_size=48), out)
    bare = changed(qwen3, tmp_path / 'bare')
    for file in bare.glob('*token*'):
        file.unlink()
    assert refused(bare, out).startswith(f"--tokenizer: folder '{bare}' holds no tokenizer that can be loaded")
    few = GPT2LMHeadModel(GPT2Config(**GPT2 | {'vocab_size': 100}))
    few.save_pretrained(tmp_path / 'few')
    said = refused(tmp_path / 'few', out, '--tokenizer', mds_root / 'tokenizer')
    assert said.startswith(f'--tokenizer: {mds_root}/tokenizer has more tokens than the 100 of the model; ')
    assert not out.exists() and not list(tmp_path.glob('.out*'))
    out.mkdir()
    (out / 'precious').touch()
    assert refused(qwen3, out).startswith(f'OUT: {out} already exists')


def test_a_full_disk_is_named(folders, tmp_path, monkeypatch):
    def full_disk(*_: Any, **__: Any) -> None:
        raise RuntimeError('[enforce fail at inline_container.cc:659] . unexpected pos 704 vs 598')

    monkeypatch.setattr('torch.save', full_disk)
    assert refused(folders['gpt2'], tmp_path / 'out').startswith(f'OUT: {tmp_path}/out cannot be written: ')
    assert not list(tmp_path.iterdir())


def test_it_is_a_start_and_no_run_to_resume(folders, mds_root, tmp_path, capfd):
    run(folders['qwen3'], tmp_path / 'out')
    *_, argv = (shlex.split(line)[2:] for line in capfd.readouterr().out.splitlines() if 'composer' in line)
    own = [arg for arg in tiny(mds_root) if not arg.startswith(('model.', 'max_seq_len'))]
    assert main.cli([str(ROOT / argv[0]), *own, *argv[1:-1]]) == 1
    said = capfd.readouterr().err
    assert said.count('error: ') == 1 and 'Traceback' not in said and 'load_weights_only=true' in said


def test_settings_that_no_shape_shows_must_be_those_of_the_checkpoint(folders, tmp_path):
    run(folders['qwen3-untied'], tmp_path / 'out')
    manifest = read_weights(str(tmp_path / 'out'))[1]
    assert manifest
    check_model(manifest, manifest.model, 'load_path')
    for key, value in {'rope_theta': 1e4, 'norm_eps': 1e-6, 'logit_softcap': 30.0, 'tie_embeddings': True}.items():
        with pytest.raises(UserError, match=f'^load_path: the checkpoint has model.{key} {manifest.model[key]!r}, and'):
            check_model(manifest, manifest.model | {key: value}, 'load_path')
    manifest.model['logit_softcap'] = 30.0
    with pytest.raises(UserError, match='the checkpoint has model.logit_softcap 30.0, and the config has None'):
        check_model(manifest, manifest.model | {'logit_softcap': None}, 'load_path')
