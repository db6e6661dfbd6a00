"""The model against Hugging Face GPT-2, its initialisation, and its exactness under padding and within documents."""

import contextlib
import os
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from composer.core.data_spec import _default_split_batch
from gpt_batches import LENGTHS, VOCAB, batch, documents_of, gradients, hf_inputs, packed_batch, perturb
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from transformers import GPT2Config, GPT2LMHeadModel

from src.attention import Documents, flash_kernel, torch_attention
from src.causal_lm import next_token_targets
from src.common.errors import UserError
from src.mosaic_gpt import ComposerMosaicGPT, GPTBlock, MosaicGPT

TINY = dict(d_model=48, n_heads=4, n_layers=3, max_seq_len=32, vocab_size=VOCAB, init_std=0.08, attn_impl='torch')


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
    return perturb(MosaicGPT(TINY | overrides))


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


def test_labels_one_longer_train_the_last_position_as_well():
    ids = torch.tensor([[5, 6, 7], [8, 9, 1]])
    labels = torch.tensor([[5, 6, 7, 2], [8, 9, 1, -100]])
    inputs, targets = next_token_targets({'input_ids': ids, 'labels': labels})
    assert inputs.tolist() == ids.tolist()
    assert targets.tolist() == [[6, 7, 2], [9, 1, -100]]
    with pytest.raises(AssertionError, match=r'labels \[2, 5\] do not fit input_ids \[2, 3\]'):
        next_token_targets({'input_ids': ids, 'labels': torch.zeros(2, 5, dtype=torch.long)})


# ---------------------------------------------------------------- documents

@pytest.mark.parametrize('attn_impl', ['torch', 'sdpa'])
def test_a_packed_row_gives_what_its_documents_alone_give(attn_impl):
    model = perturbed(attn_impl=attn_impl, attn_within_document=True)
    batch = packed_batch()
    documents = documents_of(batch)
    assert [len(d) for d in documents] == [n for row in LENGTHS for n in row]

    together = model(batch['input_ids'], sequence_id=batch['sequence_id'])
    alone = torch.cat([model(document[None])[0] for document in documents])
    torch.testing.assert_close(together.flatten(0, 1), alone, rtol=0, atol=2e-6)
    rows = model(batch['input_ids'])
    assert (rows - together)[1:].abs().max() > 0.1  # without sequence_id, the logits differ
    torch.testing.assert_close(rows[0], together[0], rtol=0, atol=2e-6)  # except in a row that is one document

    direction = torch.randn(alone.shape, generator=torch.Generator().manual_seed(2))
    (together.flatten(0, 1) * direction).sum().backward()
    got = gradients(model)
    (alone * direction).sum().backward()
    want = gradients(model)
    assert got.keys() == want.keys() == dict(model.named_parameters()).keys()
    for name, grad in want.items():
        assert (got[name] - grad).norm() <= 2e-6 * grad.norm(), name


def composer_twin(model: MosaicGPT) -> ComposerMosaicGPT:
    """The model in Composer's wrapper, with the same weights."""
    twin = ComposerMosaicGPT(model.cfg.model_dump())
    twin.model.load_state_dict(model.state_dict())
    return twin


@pytest.mark.parametrize('longer', [False, True], ids=['labels', 'labels one longer'])
@pytest.mark.parametrize('attn_impl', ['torch', 'sdpa'])
def test_the_loss_of_packed_rows_is_the_mean_over_their_documents(attn_impl, longer):
    model = composer_twin(perturbed(attn_impl=attn_impl, attn_within_document=True))
    batch = packed_batch()
    documents, following = documents_of(batch), []
    if longer:  # the token after the row continues its last document, or starts another
        last = torch.tensor([3, -100, 8, -100])
        batch['labels'] = torch.cat([batch['labels'], last[:, None]], 1)
        following = [(sum(map(len, LENGTHS[:row + 1])) - 1, token) for row, token in enumerate(last.tolist()) if token >= 0]
    out = model(batch)
    out['loss'].backward()
    got = gradients(model)

    total, count = torch.zeros(()), 0
    for i, document in enumerate(documents):
        targets = torch.cat([document[1:], torch.tensor([dict(following).get(i, -100)])])
        total = total + F.cross_entropy(model.model(document[None])[0], targets, ignore_index=-100, reduction='sum')
        count += int((targets != -100).sum())
    (total / count).backward()
    assert out['n_targets'].item() == count == 80 - 10 + len(following)
    assert out['loss'].item() == pytest.approx(total.item() / count, rel=1e-6)
    for name, grad in gradients(model).items():
        assert (got[name] - grad).norm() <= 3e-6 * grad.norm(), name


@pytest.mark.parametrize('side', ['left', 'right'])
@pytest.mark.parametrize('attn_impl', ['torch', 'sdpa'])
def test_padding_beside_packed_documents_changes_nothing(attn_impl, side):
    model = composer_twin(perturbed(attn_impl=attn_impl, attn_within_document=True))
    batch = packed_batch()
    pad = (4, 0) if side == 'left' else (0, 4)
    padded = {key: F.pad(x, pad, value=-100 if key == 'labels' else 0) for key, x in batch.items()}
    mask = F.pad(torch.ones_like(batch['input_ids']), pad)
    if side == 'left':  # nothing precedes the first token, so it is no target
        padded['labels'][:, 4] = -100
    got, want = model(padded | {'attention_mask': mask}), model(batch)
    assert got['n_targets'] == want['n_targets']
    assert got['loss'].item() == pytest.approx(want['loss'].item(), rel=1e-6)
    logits = model.model(padded['input_ids'], mask, sequence_id=padded['sequence_id'])
    want = model.model(batch['input_ids'], sequence_id=batch['sequence_id'])
    torch.testing.assert_close(logits[mask.bool()], want.flatten(0, 1), rtol=0, atol=2e-6)


def test_padded_documents_of_one_number_are_rows_alone():
    """`group_method: truncate` with sequence ids: every sample is one document."""
    within, plain = ComposerMosaicGPT(TINY | dict(attn_within_document=True)), ComposerMosaicGPT(TINY)
    ids, mask = batch('right', 20)
    padded = {'input_ids': ids, 'labels': ids.masked_fill(~mask, -100), 'attention_mask': mask}
    got = within(padded | {'sequence_id': torch.zeros_like(ids)})
    assert got['loss'].item() == pytest.approx(plain(padded)['loss'].item(), rel=1e-6)


def test_microbatches_of_packed_rows_add_up():
    model = composer_twin(perturbed(attn_impl='sdpa', attn_within_document=True))
    batch = packed_batch()
    batch['labels'] = F.pad(batch['labels'], (0, 1), value=7)
    whole, parts = model(batch), [model(part) for part in _default_split_batch(batch, 1)]
    assert len(parts) == 4
    assert sum(part['n_targets'].item() for part in parts) == whole['n_targets'].item()
    total = sum(part['loss'].item() * part['n_targets'].item() for part in parts)
    assert total / whole['n_targets'].item() == pytest.approx(whole['loss'].item(), rel=1e-6)


def test_a_batch_and_the_setting_have_to_agree():
    packed = packed_batch()
    plain = {key: packed[key] for key in ('input_ids', 'labels')}
    with pytest.raises(UserError, match='the model attends within documents, and the batch has no sequence_id; set it'):
        ComposerMosaicGPT(TINY | dict(attn_within_document=True))(plain)
    with pytest.raises(UserError, match='the model attends across documents, and the batch has a sequence_id; set it'):
        ComposerMosaicGPT(TINY)(packed)


def test_documents_of_a_batch():
    documents = Documents(torch.tensor([[0, 0, 0, 1, 2], [7, 7, 8, 8, 8]]))
    assert documents.positions.tolist() == [[0, 1, 2, 0, 0], [0, 1, 0, 1, 2]]
    assert documents.cu_seqlens.tolist() == [0, 3, 4, 5, 7, 10] and documents.cu_seqlens.dtype == torch.int32
    assert documents.mask.shape == (2, 1, 5, 5)
    assert documents.mask[1, 0].int().tolist() == [[1, 0, 0, 0, 0],
                                                   [1, 1, 0, 0, 0],
                                                   [0, 0, 1, 0, 0],
                                                   [0, 0, 1, 1, 0],
                                                   [0, 0, 1, 1, 1]]


def each_alone(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, causal=False):
    """Computes what a variable-length kernel does, one sequence at a time."""
    assert causal and dropout_p == 0 and q.dim() == 3 and torch.equal(cu_seqlens_q, cu_seqlens_k)
    lengths = cu_seqlens_q.diff().tolist()
    assert max(lengths) <= max_seqlen_q == max_seqlen_k
    parts = zip(*(x.split(lengths) for x in (q, k, v)))
    return torch.cat([torch_attention(*(x[None] for x in part))[0] for part in parts])


def aten_alone(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, **kwargs):
    return each_alone(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, is_causal), None, None, None, None


def version_2(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    assert causal and dropout_p == 0
    return torch_attention(q, k, v)


def version_3(q, k, v, softmax_scale=None, causal=False):
    return version_2(q, k, v, causal=causal), None


def version_3_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
    return each_alone(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=causal), None


def version_4_varlen(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, softmax_scale=None, causal=False):
    return version_3_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, len(q), len(k), causal=causal)


@pytest.fixture
def hopper(monkeypatch):
    """A fake Hopper GPU with all FlashAttention packages: fake kernels with the real arguments, which compute the reference."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, 'is_available', lambda: True)
    monkeypatch.setattr(torch.ops.aten, '_flash_attention_forward', aten_alone)
    kernels = {'flash_attn': (version_2, each_alone), 'flash_attn_interface': (version_3, version_3_varlen),
               'flash_attn.cute': (version_3, version_4_varlen)}
    for name, (dense, varlen) in kernels.items():
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(flash_attn_func=dense, flash_attn_varlen_func=varlen))
    return monkeypatch


@pytest.mark.parametrize('documents', [False, True])
@pytest.mark.parametrize('choice', ['pytorch', 'flash-attn-2', 'flash-attn-3', 'flash-attn-4'])
def test_flash_kernels_are_given_what_they_take(choice, documents, hopper):
    hopper.setattr('src.attention.sdpa_kernel', lambda backend: contextlib.nullcontext())  # PyTorch has no such kernel for fp32
    model = perturbed(attn_impl='torch', attn_within_document=documents, n_heads=6)
    flash = MosaicGPT(model.cfg.model_copy(update={'attn_impl': 'flash', 'flash_kernel': choice}))
    flash.load_state_dict(model.state_dict())
    kernel = flash.get_submodule('transformer.blocks.0.causal_attn').kernel
    assert kernel == ('PyTorch FlashAttention' if choice == 'pytorch' else choice)
    packed = packed_batch()
    for each in (model, flash):
        each(packed['input_ids'], sequence_id=packed['sequence_id'] if documents else None).square().mean().backward()
    want, got = gradients(model), gradients(flash)
    for name, grad in want.items():
        assert (got[name] - grad).norm() <= 2e-6 * grad.norm(), name


def test_the_kernel_follows_the_hardware(hopper):
    def chosen(head_dim=64, **kwargs):
        return flash_kernel(head_dim, **kwargs)[0]

    assert chosen() == chosen(128) == chosen(choice='cudnn') == 'PyTorch cuDNN'
    assert chosen(256) == chosen(within_document=True) == 'flash-attn-2'
    for head_dim, within in ((256, False), (64, True)):
        with pytest.raises(UserError, match="flash_kernel: 'cudnn' has no kernel for head dimensions above 128 or for"):
            flash_kernel(head_dim, within, 'cudnn')
    hopper.setattr(torch.cuda, 'get_device_capability', lambda: (8, 0))
    assert chosen() == 'flash-attn-2' and chosen(choice='cudnn') == 'PyTorch cuDNN'
    for choice in ('flash-attn-3', 'flash-attn-4'):
        with pytest.raises(UserError, match=f"flash_kernel: '{choice}': it is not made for compute capability 8.0; set auto"):
            flash_kernel(64, choice=choice)
    hopper.setitem(sys.modules, 'flash_attn', types.SimpleNamespace())  # as it is where only version 4 is installed
    assert chosen() == chosen(choice='pytorch') == 'PyTorch FlashAttention'
    with pytest.raises(UserError, match="flash_kernel: 'flash-attn-2': its module flash_attn is not installed; set auto, cudnn"):
        flash_kernel(64, choice='flash-attn-2')


def test_pytorchs_flash_operator_takes_what_it_is_given(monkeypatch):
    """On meta, where operators check their arguments and compute only shapes."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda: (8, 0))
    monkeypatch.setitem(sys.modules, 'flash_attn', None)
    _, kernel = flash_kernel(8, within_document=True)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    documents = Documents(packed_batch()['sequence_id'])
    documents._cu_seqlens = documents.cu_seqlens.to('meta')
    q, k, v = torch.empty(4, 20, 3, 6, 8, device='meta', dtype=torch.bfloat16, requires_grad=True).unbind(2)
    out = kernel(q, k, v, 0.0, documents)
    assert out.shape == q.shape and out.dtype == torch.bfloat16
    out.sum().backward()


@pytest.mark.parametrize('impl', [CheckpointImpl.NO_REENTRANT, CheckpointImpl.REENTRANT])
@pytest.mark.parametrize('attn_impl', ['torch', 'sdpa'])
def test_documents_pass_activation_checkpointing_and_are_prepared_once(attn_impl, impl, monkeypatch):
    model = composer_twin(perturbed(attn_impl=attn_impl, attn_within_document=True))
    model(packed_batch())['loss'].backward()
    want = gradients(model)
    masks = []
    kept = '_bias' if attn_impl == 'sdpa' else '_mask'
    monkeypatch.setattr(Documents, kept, property(lambda _: masks[-1] if masks else None, lambda _, mask: masks.append(mask)),
                        raising=False)
    apply_activation_checkpointing(model, lambda m: checkpoint_wrapper(m, checkpoint_impl=impl),
                                   lambda m: isinstance(m, GPTBlock))
    model(packed_batch())['loss'].backward()
    assert [mask is None for mask in masks] == [True, False]  # nothing yet, then made by the first layer for all
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, want[name.replace('_checkpoint_wrapped_module.', '')])


def test_documents_pass_compilation():
    model = perturbed(attn_impl='sdpa', attn_within_document=True)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    packed = packed_batch()
    got = compiled(packed['input_ids'], sequence_id=packed['sequence_id'])
    torch.testing.assert_close(got, model(packed['input_ids'], sequence_id=packed['sequence_id']), rtol=0, atol=2e-6)


def test_dropout_within_documents_is_on_in_training_alone():
    model = MosaicGPT(TINY | dict(attn_pdrop=0.5, attn_impl='sdpa', attn_within_document=True))
    packed = packed_batch()
    run = lambda: model(packed['input_ids'], sequence_id=packed['sequence_id'])  # noqa: E731
    assert not torch.equal(run(), run())
    model.eval()
    assert torch.equal(run(), run())


# ---------------------------------------------------------------- weights


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


# ---------------------------------------------------------------- 8 bits


FP8 = dict(d_model=64, n_heads=2, n_layers=1, max_seq_len=64, vocab_size=128, attn_impl='torch')


def losses(model: MosaicGPT, steps: int) -> list[float]:
    """Losses of training on sequences in which each token has one of four successors."""
    rng, out = torch.Generator().manual_seed(0), []
    successors = torch.randint(0, 128, (128, 4), generator=rng)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(steps):
        ids = torch.randint(0, 128, (8, 65), generator=rng)
        for t in range(64):
            ids[:, t + 1] = successors[ids[:, t], ids[:, t + 1] % 4]
        loss = model(ids[:, :-1], targets=ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        out.append(loss.item())
    return out


def test_linear_layers_in_8_bits_learn_as_plain_ones_do(caplog):
    caplog.set_level('INFO')
    plain, eight = MosaicGPT(FP8), MosaicGPT(FP8 | {'linear_impl': 'fp8', 'device': 'meta'}).materialize('cpu')
    assert 'linear layers: fp8 by torchao, emulated on the CPU' in caplog.text
    weights = eight.state_dict()
    assert plain.state_dict().keys() == weights.keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in plain.state_dict().items())
    assert eight.lm_head.weight is eight.transformer['wte'].weight
    ours, theirs = losses(eight, 30), losses(plain, 30)
    differences = [abs(a - b) for a, b in zip(ours, theirs)]
    assert theirs[-1] < theirs[0] - 1
    assert 1e-5 < max(differences) < 0.03
    plain.load_state_dict(eight.state_dict())


def test_linear_layers_in_8_bits_compile_to_one_graph():
    eager, compiled = (MosaicGPT(FP8 | {'linear_impl': 'fp8'}) for _ in range(2))
    for block in compiled.transformer['blocks']:
        block.compile(backend='aot_eager', fullgraph=True)
    assert losses(compiled, 3) == losses(eager, 3)


def test_8_bits_need_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torchao.float8', None)
    with pytest.raises(UserError, match="model.linear_impl: 'fp8' needs the package torchao .*pip install torchao"):
        MosaicGPT(FP8 | {'linear_impl': 'fp8'})


def test_8_bits_need_a_gpu_that_has_them(monkeypatch):
    import torchao.float8  # noqa: F401  (here, because its first import asks the GPU, which this test invents)

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'NVIDIA A100-SXM4-80GB')
    with pytest.raises(UserError, match='needs a GPU of compute capability 8.9 or above, and NVIDIA A100-SXM4-80GB has 8.0'):
        MosaicGPT(FP8 | {'linear_impl': 'fp8'})
