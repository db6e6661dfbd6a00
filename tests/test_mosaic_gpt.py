"""The model against Hugging Face GPT-2, its initialisation, and its exactness under padding."""

import os
import subprocess
import sys

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from src.causal_lm import next_token_targets
from src.errors import UserError
from src.mosaic_gpt import ComposerMosaicGPT, MosaicGPT

TINY = dict(d_model=48, n_heads=4, n_layers=3, max_seq_len=32, vocab_size=211, init_std=0.08, attn_impl='torch')


def hf_twin(model: MosaicGPT) -> GPT2LMHeadModel:
    """A Hugging Face GPT-2 with the same weights; its Conv1D layers store them transposed."""
    c = model.cfg
    hf = GPT2LMHeadModel(GPT2Config(n_embd=c.d_model, n_head=c.n_heads, n_layer=c.n_layers, n_positions=c.max_seq_len,
                                    vocab_size=c.vocab_size, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0,
                                    activation_function='gelu' if c.mlp_act == 'gelu' else 'gelu_new',
                                    attn_implementation='eager'))
    names = {'causal_attn.Wqkv': 'attn.c_attn', 'causal_attn.out_proj': 'attn.c_proj', 'mlp.mlp_up': 'mlp.c_fc',
             'mlp.mlp_down': 'mlp.c_proj'}
    state = {}
    for key, value in model.state_dict().items():
        new = key.replace('transformer.blocks.', 'transformer.h.')
        for ours, theirs in names.items():
            if ours in new:
                new = new.replace(ours, theirs)
                value = value.T if new.endswith('weight') else value
        state[new] = value
    missing, unexpected = hf.load_state_dict(state, strict=False)
    assert not missing and not unexpected
    return hf


def perturbed(**overrides) -> MosaicGPT:
    """A model whose biases and LayerNorms are not at their initial 0 and 1, where mistakes would hide."""
    model = MosaicGPT(TINY | overrides)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def batch(padding: str, seq_len: int, rows: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, TINY['vocab_size'], (rows, seq_len), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(rows, seq_len, dtype=torch.bool)
    for row in range(rows):
        n = 3 * row
        if padding == 'right' and n:
            mask[row, -n:] = False
        if padding == 'left':
            mask[row, :n] = False
    return ids, mask


def hf_inputs(ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    return {'input_ids': ids, 'attention_mask': mask.long(), 'position_ids': (mask.long().cumsum(1) - 1).clamp(min=0)}


@pytest.mark.parametrize('seq_len', [32, 17])
@pytest.mark.parametrize('padding', ['none', 'right', 'left'])
@pytest.mark.parametrize('mlp_act', ['gelu', 'gelu_tanh'])
@pytest.mark.parametrize('attn_impl', ['torch', 'sdpa'])
def test_logits_and_gradients_equal_hugging_face_gpt2(attn_impl, mlp_act, padding, seq_len):
    model = perturbed(attn_impl=attn_impl, mlp_act=mlp_act)
    hf = hf_twin(model)
    ids, mask = batch(padding, seq_len)
    ours = model(ids, None if padding == 'none' else mask)
    theirs = hf(**hf_inputs(ids, mask)).logits
    assert (ours - theirs)[mask].abs().max() < 1e-4
    assert theirs[mask].std() > 0.3  # not a comparison of zeros

    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2)) * mask[:, :, None]
    (ours * direction).sum().backward()
    (theirs * direction).sum().backward()
    twin = dict(hf.named_parameters())
    pairs = [(name, name, False) for name in ('transformer.wte.weight', 'transformer.wpe.weight')]
    for n in range(TINY['n_layers']):
        pairs += [(f'transformer.blocks.{n}.causal_attn.Wqkv.weight', f'transformer.h.{n}.attn.c_attn.weight', True),
                  (f'transformer.blocks.{n}.causal_attn.Wqkv.bias', f'transformer.h.{n}.attn.c_attn.bias', False),
                  (f'transformer.blocks.{n}.mlp.mlp_down.weight', f'transformer.h.{n}.mlp.c_proj.weight', True),
                  (f'transformer.blocks.{n}.ln_1.weight', f'transformer.h.{n}.ln_1.weight', False)]
    for mine, other, transposed in pairs:
        a, b = model.get_parameter(mine).grad, twin[other].grad
        assert a is not None and b is not None
        torch.testing.assert_close(a, b.T if transposed else b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize('attn_impl', ['torch', 'sdpa'])
def test_padded_logits_are_those_of_the_row_alone(attn_impl):
    model = perturbed(attn_impl=attn_impl).eval()
    for padding in ('left', 'right'):
        ids, mask = batch(padding, 20)
        together = model(ids, mask)
        for row in range(len(ids)):
            alone = model(ids[row][mask[row]][None])[0]
            torch.testing.assert_close(together[row][mask[row]], alone, rtol=0, atol=2e-6)


def test_left_padding_without_a_mask_would_be_wrong():
    model = perturbed().eval()
    ids, mask = batch('left', 20)
    assert (model(ids) - model(ids, mask))[mask].abs().max() > 0.1


@pytest.mark.parametrize('padding', ['none', 'right', 'left'])
def test_composer_loss_equals_the_mean_over_rows_alone(padding):
    model = ComposerMosaicGPT(TINY)
    ids, mask = batch(padding, 20)
    out = model({'input_ids': ids, 'labels': ids.masked_fill(~mask, -100), 'attention_mask': mask})
    total, count = 0.0, 0
    for row in range(len(ids)):
        tokens = ids[row][mask[row]]
        logits = model.model(tokens[None])[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, tokens[1:], reduction='sum').item()
        count += len(tokens) - 1
    assert out['n_targets'].item() == count
    assert out['loss'].item() == pytest.approx(total / count, rel=1e-6)


def test_targets_are_the_next_tokens():
    ids = torch.tensor([[5, 6, 7, 0], [0, 0, 8, 9]])
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]])
    inputs, targets = next_token_targets({'input_ids': ids, 'labels': ids.masked_fill(mask == 0, -100), 'attention_mask': mask})
    assert inputs.tolist() == [[5, 6, 7, 0], [8, 9, 0, 0]]
    assert targets.tolist() == [[6, 7, -100, -100], [9, -100, -100, -100]]


def test_initial_weights_have_the_documented_deviations():
    cfg = TINY | dict(d_model=256, n_layers=8, init_std=0.02)
    model = MosaicGPT(cfg)
    for name, p in model.named_parameters():
        if name.endswith('bias'):
            assert (p == 0).all(), name
        elif 'ln_' in name:
            assert (p == 1).all(), name
        else:
            want = 0.02 / 4 if name.endswith(('out_proj.weight', 'mlp_down.weight')) else 0.02
            assert p.std().item() == pytest.approx(want, rel=0.05), name
            assert abs(p.mean().item()) < 5 * want / p.numel() ** 0.5, name


def test_weights_depend_on_the_seed_and_the_name_alone():
    one, two = MosaicGPT(TINY), MosaicGPT(TINY)
    torch.manual_seed(123)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), MosaicGPT(TINY).parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    other = MosaicGPT(TINY | dict(init_seed=18))
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    a, b = (one.transformer['blocks'][i].mlp.mlp_up.weight for i in (0, 1))
    assert not torch.equal(a, b)
    deeper = MosaicGPT(TINY | dict(n_layers=5))
    assert torch.equal(deeper.transformer['blocks'][2].mlp.mlp_up.weight, one.transformer['blocks'][2].mlp.mlp_up.weight)


def test_meta_takes_no_memory_then_gives_the_same_tied_weights():
    meta = MosaicGPT(TINY | dict(device='meta'))
    assert all(p.is_meta for p in meta.parameters())
    assert meta.lm_head.weight is meta.transformer['wte'].weight
    meta.materialize('cpu')
    assert meta.lm_head.weight is meta.transformer['wte'].weight
    here = MosaicGPT(TINY)
    assert [n for n, _ in meta.named_parameters()] == [n for n, _ in here.named_parameters()]
    for a, b in zip(meta.parameters(), here.parameters(), strict=True):
        assert torch.equal(a, b)


SHARDED = '''
import sys, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from src.mosaic_gpt import MosaicGPT, GPTBlock
dist.init_process_group('gloo')
cfg = dict(d_model=48, n_heads=4, n_layers=3, max_seq_len=32, vocab_size=211, device='meta')
model = MosaicGPT(cfg)
mesh = dist.init_device_mesh('cpu', (dist.get_world_size(),)) if hasattr(dist, 'init_device_mesh') else None
for block in model.transformer['blocks']:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
model.to_empty(device='cpu')
model.tie_weights()
model.init_weights()
reference = dict(MosaicGPT(cfg | {'device': 'cpu'}).named_parameters())
local = 0
for name, p in model.named_parameters():
    local += p.to_local().numel()
    assert torch.equal(p.full_tensor(), reference[name]), name
assert local < 0.7 * sum(p.numel() for p in reference.values()), 'nothing is sharded'
assert model.lm_head.weight is model.transformer['wte'].weight
print('equal on rank', dist.get_rank(), 'of', dist.get_world_size())
dist.destroy_process_group()
'''


@pytest.mark.slow
@pytest.mark.parametrize('ranks', [3])
def test_sharded_meta_initialisation_gives_the_same_weights_on_any_ranks(ranks, tmp_path):
    script = tmp_path / 'sharded.py'
    script.write_text(SHARDED)
    env = os.environ | {'PYTHONPATH': os.getcwd(), 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '',
                        'TMPDIR': str(tmp_path)}
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}', str(script)]
    run = subprocess.run(command, capture_output=True, text=True, env=env, timeout=240)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count('equal on rank') == ranks


def test_every_weight_layout_is_one_layout():
    a, b = perturbed(attn_impl='torch').eval(), MosaicGPT(TINY | dict(attn_impl='sdpa')).eval()
    b.load_state_dict(a.state_dict())
    ids, _ = batch('none', 32)
    torch.testing.assert_close(a(ids), b(ids), rtol=0, atol=2e-5)


def test_flash_without_a_gpu_says_what_to_set_instead(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(UserError, match=r"attn_impl: 'flash' needs a GPU; set model.attn_impl=auto"):
        MosaicGPT(TINY | dict(attn_impl='flash'))
    assert MosaicGPT(TINY | dict(attn_impl='auto')).transformer['blocks'][0].causal_attn.kernel.startswith('sdpa')


def test_mistakes_in_the_model_config_are_named():
    with pytest.raises(UserError, match='n_heads: 5 does not divide model.d_model 48'):
        MosaicGPT(TINY | dict(n_heads=5))
    with pytest.raises(UserError, match="n_layer: no such key; did you mean 'n_layers'"):
        MosaicGPT({k: v for k, v in TINY.items() if k != 'n_layers'} | dict(n_layer=3))
    with pytest.raises(UserError, match='sequence length 33 does not fit model.max_seq_len 32'):
        MosaicGPT(TINY)(torch.zeros(1, 33, dtype=torch.long))


def test_dropout_is_off_in_evaluation_and_on_in_training():
    model = MosaicGPT(TINY | dict(attn_pdrop=0.3, resid_pdrop=0.3, emb_pdrop=0.3, attn_impl='sdpa'))
    ids, _ = batch('none', 16)
    assert not torch.equal(model.train()(ids), model(ids))
    assert torch.equal(model.eval()(ids), model(ids))
