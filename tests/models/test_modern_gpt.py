"""The model against Hugging Face's Qwen3, under padding and within documents; its loss, its initial weights, its mistakes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gpt_batches import LENGTHS, VOCAB, batch, documents_of, gradients, hf_inputs, packed_batch, perturb
from launch import ROOT
from transformers import Qwen3ForCausalLM

from src.causal_lm import IGNORE_INDEX
from src.checkpoints.hf_layout import from_hf, to_hf, twin_config
from src.common.errors import UserError
from src.config import load as config
from src.config.check import check
from src.modern_gpt import ModernGPT
from src.training import plugins

TINY: dict[str, Any] = dict(name='modern_gpt', d_model=48, n_heads=4, n_layers=3, max_seq_len=32, vocab_size=VOCAB,
                            init_std=0.08, attn_impl='torch')
SHAPES: list[dict[str, Any]] = [
    {}, {'n_kv_heads': 2}, {'n_kv_heads': 1, 'attn_impl': 'sdpa'}, {'head_dim': 20, 'n_kv_heads': 2, 'd_hidden': 40},
    {'tie_embeddings': False, 'attn_impl': 'sdpa'}, {'rope_theta': 100.0, 'norm_eps': 1e-2}]


def perturbed(**overrides: Any) -> ModernGPT:
    return perturb(ModernGPT(TINY | overrides))


def hf_twin(model: ModernGPT) -> Qwen3ForCausalLM:
    """A Hugging Face Qwen3 with the same weights."""
    hf = Qwen3ForCausalLM(twin_config(model.cfg, attn_implementation='eager'))
    hf.load_state_dict(to_hf(model.state_dict(), model.cfg))
    return hf


def check_gradients(model: ModernGPT, hf: Qwen3ForCausalLM) -> None:
    ours, theirs = to_hf(gradients(model), model.cfg), gradients(hf)
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-4 * grad.abs().max().item(), msg=name)


@pytest.mark.parametrize('padding', ['none', 'right', 'left'])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_logits_and_gradients_equal_hugging_face_qwen3(shape, padding):
    model = perturbed(**shape)
    hf = hf_twin(model)
    assert (hf.lm_head.weight is hf.model.embed_tokens.weight) == shape.get('tie_embeddings', True)
    ids, mask = batch(padding, 20)
    ours = model(ids, None if padding == 'none' else mask)
    theirs = hf(**hf_inputs(ids, mask)).logits
    assert (ours - theirs)[mask].abs().max() < 1e-4
    assert theirs[mask].std() > 0.3  # not a comparison of zeros
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2)) * mask[:, :, None]
    (ours * direction).sum().backward()
    (theirs * direction).sum().backward()
    check_gradients(model, hf)


@pytest.mark.parametrize('attn_impl', ['torch', 'sdpa'])
def test_documents_of_a_row_are_those_alone_in_qwen3(attn_impl):
    model = perturbed(attn_impl=attn_impl, attn_within_document=True, n_kv_heads=2)
    hf, packed = hf_twin(model), packed_batch()
    documents = documents_of(packed)
    assert [len(document) for document in documents] == [n for row in LENGTHS for n in row]
    ours = model(packed['input_ids'], sequence_id=packed['sequence_id']).flatten(0, 1)
    theirs = torch.cat([hf(document[None]).logits[0] for document in documents])
    assert (ours - theirs).abs().max() < 1e-4
    assert (model(packed['input_ids']).flatten(0, 1) - theirs).abs().max() > 0.1  # without sequence_id, the logits differ
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    (ours * direction).sum().backward()
    (theirs * direction).sum().backward()
    check_gradients(model, hf)


@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_weights_go_to_qwen3_and_back_bit_by_bit(shape):
    model = perturbed(**shape)
    state = model.state_dict()
    back = from_hf(hf_twin(model).state_dict(), state, model.cfg)
    assert back.keys() == state.keys() and all(torch.equal(back[name], weight) for name, weight in state.items())
    assert len(to_hf(state, model.cfg)) == len(state) + 3 * TINY['n_layers']  # Wqkv is three, gate_up is two


# ---------------------------------------------------------------- loss


def loss_and_gradients(model: ModernGPT) -> tuple[float, dict[str, torch.Tensor]]:
    ids, mask = batch('right', 20)
    loss = model(ids, mask, targets=ids.roll(-1, 1).masked_fill(~mask, IGNORE_INDEX))
    loss.backward()
    return loss.item(), gradients(model)


def of_full_logits(model: ModernGPT) -> tuple[float, dict[str, torch.Tensor]]:
    ids, mask = batch('right', 20)
    loss = F.cross_entropy(model(ids, mask)[mask], ids.roll(-1, 1)[mask])
    loss.backward()
    return loss.item(), gradients(model)


@pytest.mark.parametrize('options', [
    {'loss_chunk_tokens': 7}, {'vocab_multiple': 64}, {'loss_impl': 'plain'}, {'tie_embeddings': False, 'loss_chunk_tokens': 16},
    {'logit_softcap': 2.0}, {'logit_softcap': 2.0, 'tie_embeddings': False}], ids=str)
def test_every_loss_is_that_of_the_full_logits(options):
    model = perturbed(**options)
    (loss, grads), (want, want_grads) = loss_and_gradients(model), of_full_logits(model)
    assert loss == pytest.approx(want, rel=1e-6) and grads.keys() == want_grads.keys()
    for name, grad in want_grads.items():
        assert (grads[name] - grad).norm() <= 1e-5 * grad.norm(), name


def test_the_cap_bounds_the_logits():
    capped, plain = perturbed(logit_softcap=0.5), perturbed()
    ids, _ = batch('none', 20)
    logits = plain(ids)
    assert logits.abs().max() > 1
    torch.testing.assert_close(capped(ids), 0.5 * torch.tanh(logits / 0.5), rtol=0, atol=1e-6)
    assert capped(ids).abs().max() <= 0.5


# ---------------------------------------------------------------- initial weights


def test_every_block_begins_as_the_identity():
    model = ModernGPT(TINY | {'d_model': 256, 'n_kv_heads': 2})
    x = torch.randn(2, 16, 256, generator=torch.Generator().manual_seed(0))
    for block in model.blocks:
        assert torch.equal(block(x), x)
    for name, p in model.named_parameters():
        if name.endswith(('out_proj.weight', 'mlp_down.weight')):
            assert not p.any(), name
        elif 'ln_' in name or '_norm' in name:
            assert (p == 1).all(), name
        else:
            assert p.std().item() == pytest.approx(0.08, rel=0.05), name


@pytest.mark.parametrize('tie', [True, False])
def test_meta_gives_the_same_weights(tie):
    here, meta = (ModernGPT(TINY | {'tie_embeddings': tie, 'n_kv_heads': 1, 'device': device}) for device in ('cpu', 'meta'))
    assert all(p.is_meta for p in meta.parameters())
    meta.materialize('cpu')
    assert all((model.lm_head.weight is model.transformer['wte'].weight) == tie for model in (here, meta))
    assert [name for name, _ in here.named_parameters()] == [name for name, _ in meta.named_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(here.parameters(), meta.parameters(), strict=True))


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize('settings, message', [
    ({'n_kv_heads': 3}, 'model.n_kv_heads: 3 does not divide model.n_heads 4; these do: 1, 2, 4'),
    ({'head_dim': 15}, r'model.head_dim: 15 .* is odd, but RoPE turns pairs of features'),
    ({'d_model': 36}, r'model.head_dim: 9 .* is odd, but RoPE turns pairs of features'),
    ({'d_model': 50}, 'model.n_heads: 4 does not divide model.d_model 50'),
    ({'mlp_ratio': 4}, 'mlp_ratio: no such key'),
    ({'rope_theta': 1.0}, 'rope_theta'), ({'logit_softcap': 0.0}, 'logit_softcap')], ids=str)
def test_impossible_shapes_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        ModernGPT(TINY | settings)


def checked(*overrides: str) -> None:
    yaml = str(ROOT / 'yamls/modern_gpt/quickstart.yaml')
    check(config.load([yaml, *overrides]), plugins.REGISTRIES, world_size=1, has_gpu=True)


@pytest.mark.parametrize('fits, wrong, named', [
    (['model.d_hidden=208'], ['model.d_hidden=200'], 'model.d_hidden is 200'),
    (['model.head_dim=12'], ['model.head_dim=10'], r'model.n_heads \* head_dim is 40 and \(.*\) \* head_dim is 120'),
    (['model.n_kv_heads=2', 'model.head_dim=16'], ['model.n_kv_heads=1', 'model.head_dim=20'],
     r'\(model.n_heads \+ 2 \* n_kv_heads\) \* head_dim is 120')], ids=str)
def test_8_bits_need_widths_that_they_can_compute(fits, wrong, named):
    checked('model.linear_impl=fp8', *fits)
    with pytest.raises(UserError, match=f"model.linear_impl: 'fp8' needs multiples of 16, but {named}; change the value"):
        checked('model.linear_impl=fp8', *wrong)


@pytest.mark.parametrize('override', ['loss_impl=plain', 'loss_chunk_tokens=1024', 'vocab_multiple=128'])
def test_a_capped_head_refuses_what_it_does_not_use(override):
    checked(f'model.{override}')
    with pytest.raises(UserError, match=f'model.{override.split("=")[0]}: .* has no effect with model.logit_softcap, whose loss'):
        checked(f'model.{override}', 'model.logit_softcap=30.0')
