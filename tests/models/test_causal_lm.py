"""The loss without full logits, its metrics, and Hugging Face models in the same wrapper."""

import json

import loss_memory
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from src.causal_lm import IGNORE_INDEX, LossOfLogits, chunked_cross_entropy
from src.common.errors import UserError
from src.common.targets import get_num_tokens_in_batch
from src.hf_causal_lm import ComposerHFCausalLM
from src.mosaic_gpt import ComposerMosaicGPT

TINY = dict(d_model=32, n_heads=4, n_layers=2, max_seq_len=24, vocab_size=97, init_std=0.2)


@pytest.mark.parametrize('chunk', [1, 7, 64, 1000])
@pytest.mark.parametrize('padding', ['none', 'some', 'most'])
@pytest.mark.parametrize('multiple', [1, 43, 64])
def test_chunked_loss_equals_cross_entropy_on_full_logits(chunk, padding, multiple):
    torch.manual_seed(3)
    hidden = torch.randn(4, 33, 48).requires_grad_()
    weight = (0.3 * torch.randn(301, 48)).requires_grad_()
    targets = torch.randint(0, 301, (4, 33))
    keep = {'none': 1.0, 'some': 0.7, 'most': 0.05}[padding]
    targets[torch.rand(4, 33) > keep] = IGNORE_INDEX
    want = F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten())
    want_grads = torch.autograd.grad(3 * want, (hidden, weight))
    got = chunked_cross_entropy(hidden, weight, targets, chunk, multiple)
    got_grads = torch.autograd.grad(3 * got, (hidden, weight))
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    for a, b in zip(got_grads, want_grads, strict=True):
        assert (a - b).norm() < 1e-6 * b.norm()


def test_chunked_loss_without_targets_is_zero_with_zero_gradient():
    hidden, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    loss = chunked_cross_entropy(hidden, weight, torch.full((2, 5), IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None and not hidden.grad.any() and weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize('multiple', [1, 64])
def test_chunked_loss_under_bf16_autocast_is_close_and_keeps_dtypes(multiple):
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 16, 32, requires_grad=True), (0.2 * torch.randn(50, 32)).requires_grad_()
    targets = torch.randint(0, 50, (4, 16))
    want = F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten())
    want_grads = torch.autograd.grad(want, (hidden, weight))
    with torch.autocast('cpu', torch.bfloat16):
        loss = chunked_cross_entropy(hidden, weight, targets, 16, multiple)
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(want.item(), rel=5e-3)
    assert loss.item() != want.item()  # bf16 was used
    for a, b in zip(grads, want_grads, strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() < 2e-2 * b.norm()


@pytest.mark.parametrize('width, dtype', [(301, torch.float32), (320, torch.bfloat16)])
def test_a_compiled_chunk_gives_the_same_loss_and_gradient(width, dtype):
    plain, compiled = LossOfLogits(), LossOfLogits()
    compiled.compile(backend='aot_eager')
    logits, targets = torch.randn(40, width).to(dtype), torch.randint(0, 301, (40,))
    targets[3:7] = IGNORE_INDEX
    for with_grad in (True, False):
        (loss, gradient), (want, want_gradient) = (module(logits.clone(), targets, 301, with_grad) for module in (compiled, plain))
        assert loss.item() == pytest.approx(want.item(), rel=1e-6) and (gradient is None) == (not with_grad)
        if with_grad:
            assert gradient.dtype == dtype and gradient.shape == (40, width)
            assert torch.allclose(gradient, want_gradient, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-7)
            assert not gradient[3:7].any() and not gradient[:, 301:].any()


def test_no_gradient_is_computed_in_evaluation(monkeypatch):
    hidden, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    made = []
    like = torch.zeros_like
    monkeypatch.setattr(torch, 'zeros_like', lambda *a, **k: made.append(1) or like(*a, **k))
    with torch.no_grad():
        chunked_cross_entropy(hidden, weight, torch.zeros(2, 5, dtype=torch.long))
    assert not made, 'memory was allocated for the gradient of the head'
    chunked_cross_entropy(hidden, weight, torch.zeros(2, 5, dtype=torch.long))
    assert made


def test_chunked_loss_under_fp16_autocast_loses_no_small_gradients():
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 2048, 16, requires_grad=True), (0.2 * torch.randn(5000, 16)).requires_grad_()
    targets = torch.randint(0, 5000, (2, 2048))
    want = torch.autograd.grad(F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten()), (hidden, weight))
    with torch.autocast('cpu', torch.float16):
        loss = chunked_cross_entropy(hidden, weight, targets)
    for a, b in zip(torch.autograd.grad(loss, (hidden, weight)), want):
        assert (a - b).norm() < 2e-3 * b.norm()


def test_model_gradients_are_those_of_the_loss_on_full_logits():
    model = ComposerMosaicGPT(TINY | dict(loss_chunk_tokens=10))
    ids = torch.randint(0, 97, (3, 24), generator=torch.Generator().manual_seed(0))
    out = model({'input_ids': ids, 'labels': ids})
    out['loss'].backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    F.cross_entropy(model.model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for name, p in model.named_parameters():
        assert (grads[name] - p.grad).norm() <= 2e-6 * p.grad.norm(), name


@pytest.mark.parametrize('options', [dict(vocab_multiple=64), dict(loss_impl='plain'), dict(loss_impl='plain', vocab_multiple=64)],
                         ids=['padded vocabulary', 'plain loss', 'plain loss, padded vocabulary'])
def test_ways_to_the_loss_are_one_model(options):
    ids = torch.randint(0, 97, (3, 24), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[1, 9:] = IGNORE_INDEX
    want, got = ComposerMosaicGPT(TINY), ComposerMosaicGPT(TINY | options)
    losses = [model({'input_ids': ids, 'labels': labels})['loss'] for model in (want, got)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    for loss in losses:
        loss.backward()
    for (name, a), (same, b) in zip(want.named_parameters(), got.named_parameters(), strict=True):
        assert name == same and a.shape == b.shape and (a.grad - b.grad).norm() <= 2e-6 * a.grad.norm(), name


def test_metrics_come_from_the_loss_and_weigh_tokens():
    model = ComposerMosaicGPT(TINY)
    metrics = model.get_metrics(is_train=True)
    assert list(metrics) == ['LanguageCrossEntropy', 'Perplexity']
    total, count = 0.0, 0
    for keep in (25, 24, 5):  # 25 has a target for the last position, 24 has none
        ids = torch.randint(0, 97, (2, 25))
        labels = ids.clone()
        labels[:, keep:] = IGNORE_INDEX
        batch = {'input_ids': ids[:, :24], 'labels': labels}
        with torch.no_grad():
            out = model.eval_forward(batch)
            full = F.cross_entropy(model.model(ids[:, :24]).flatten(0, 1), labels[:, 1:].flatten(), reduction='sum')
        total, count = total + full.item(), count + 2 * (keep - 1)
        for metric in metrics.values():
            model.update_metric(batch, out, metric)
    assert metrics['LanguageCrossEntropy'].compute().item() == pytest.approx(total / count, rel=1e-5)
    assert metrics['Perplexity'].compute().item() == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-5)


def test_metrics_run_no_second_forward_pass():
    model = ComposerMosaicGPT(TINY)
    calls = []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    ids = torch.randint(0, 97, (2, 24))
    batch = {'input_ids': ids, 'labels': ids}
    out = model(batch)
    assert model.eval_forward(batch, out) is out
    for metric in model.get_metrics().values():
        model.update_metric(batch, model.eval_forward(batch, out), metric)
    assert len(calls) == 1


def test_target_count_agrees_with_the_loader():
    ids = torch.randint(0, 97, (3, 24))
    labels = ids.clone()
    labels[0, 7:] = IGNORE_INDEX
    labels[1] = IGNORE_INDEX
    batch = {'input_ids': ids, 'labels': labels}
    assert ComposerMosaicGPT(TINY)(batch)['n_targets'].item() == get_num_tokens_in_batch(batch)['total'] == 6 + 23
    longer = torch.cat([labels, torch.tensor([[5], [IGNORE_INDEX], [6]])], 1)  # one longer than the inputs
    batch = {'input_ids': ids, 'labels': longer}
    assert ComposerMosaicGPT(TINY)(batch)['n_targets'].item() == get_num_tokens_in_batch(batch)['total'] == 6 + 1 + 24
    mask = torch.ones_like(ids)
    mask[2, :5] = 0  # padding on the left
    batch = {'input_ids': ids, 'labels': labels.masked_fill(mask == 0, IGNORE_INDEX), 'attention_mask': mask}
    assert ComposerMosaicGPT(TINY)(batch)['n_targets'].item() == get_num_tokens_in_batch(batch)['total'] == 6 + 18


def test_flops_are_six_n_plus_attention():
    model = ComposerMosaicGPT(TINY)
    n = 97 * 32 + 24 * 32 + 2 * (12 * 32 * 32 + 13 * 32) + 64
    assert model.n_params == n
    batch = {'input_ids': torch.zeros(2, 24), 'labels': torch.zeros(2, 25)}
    assert model.flops_per_batch(batch) == 2 * 24 * (6 * n + 12 * 2 * 32 * 24)


@pytest.mark.slow
def test_peak_memory_is_at_least_four_times_below_the_plain_way():
    results = loss_memory.compare(batch=8, seq_len=512, d_model=64, vocab=50257)
    assert results['chunked']['loss'] == pytest.approx(results['plain']['loss'], rel=1e-6)
    assert results['plain']['mib'] > 4 * results['chunked']['mib'], results


HF = {
    'gpt2': dict(n_embd=32, n_head=4, n_layer=2, n_positions=24, vocab_size=97, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
    'gpt_neo': dict(hidden_size=32, num_heads=4, num_layers=2, attention_types=[[['global', 'local'], 1]], window_size=8,
                    max_position_embeddings=24, vocab_size=97),
    'gpt_neox': dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64, max_position_embeddings=24,
                     vocab_size=97, hidden_dropout=0.0, attention_dropout=0.0),
    'llama': dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64,
                  max_position_embeddings=24, vocab_size=97),
    'phi': dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=2, intermediate_size=64,
                max_position_embeddings=24, vocab_size=97),  # its head has a bias, so the loss comes from full logits
}


def hf_model(kind: str, **overrides) -> ComposerHFCausalLM:
    return ComposerHFCausalLM({'name': 'hf_causal_lm', 'config_overrides': {'model_type': kind} | HF[kind], **overrides})


@pytest.mark.parametrize('kind', list(HF))
@pytest.mark.parametrize('padding', ['none', 'right', 'left'])
def test_hf_loss_is_hugging_faces_own_on_each_row_alone(kind, padding):
    model = hf_model(kind).eval()
    ids = torch.randint(1, 97, (3, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 20, dtype=torch.long)
    if padding != 'none':
        mask[1, slice(-6, None) if padding == 'right' else slice(0, 6)] = 0
    out = model({'input_ids': ids, 'labels': ids.masked_fill(mask == 0, -100), 'attention_mask': mask})
    total, count = 0.0, 0
    for row in range(3):
        tokens = ids[row][mask[row].bool()][None]
        total += model.model.hf(input_ids=tokens, labels=tokens).loss.item() * (tokens.numel() - 1)
        count += tokens.numel() - 1
    assert out['n_targets'].item() == count
    assert out['loss'].item() == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize('kind', ['gpt2', 'llama', 'phi'])
def test_hf_loss_with_labels_one_longer_is_that_of_the_longer_row(kind):
    """The longer row has the same targets: its additional position has none."""
    model = hf_model(kind).eval()
    longer = torch.randint(1, 97, (3, 21), generator=torch.Generator().manual_seed(0))
    out, want = model({'input_ids': longer[:, :20], 'labels': longer}), model({'input_ids': longer, 'labels': longer})
    assert out['n_targets'].item() == want['n_targets'].item() == 60
    assert out['loss'].item() == pytest.approx(want['loss'].item(), rel=1e-5)


def test_hf_models_refuse_sequence_ids():
    ids = torch.ones(2, 8, dtype=torch.long)
    with pytest.raises(UserError, match='the model attends across documents, and the batch has a sequence_id'):
        hf_model('gpt2')({'input_ids': ids, 'labels': ids, 'sequence_id': ids})


@pytest.mark.parametrize('kind', list(HF))
def test_hf_blocks_are_found_for_fsdp_and_weights_follow_the_seed(kind):
    one, two, other = hf_model(kind), hf_model(kind), hf_model(kind, init_seed=5)
    wrapped = [m for m in one.model.modules() if one.model.fsdp_wrap_fn(m)]
    assert len(wrapped) == 2 and sum(p.numel() for m in wrapped for p in m.parameters()) > 0.5 * (one.n_params - 97 * 32 * 2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert one.vocab_size == 97


def test_hf_pretrained_weights_load_from_a_folder(tmp_path):
    source = hf_model('gpt2', init_seed=3)
    source.model.hf.save_pretrained(tmp_path)
    loaded = ComposerHFCausalLM({'name': 'hf_causal_lm', 'pretrained_model_name_or_path': str(tmp_path), 'pretrained': True})
    shape_only = ComposerHFCausalLM({'name': 'hf_causal_lm', 'pretrained_model_name_or_path': str(tmp_path)})
    want = source.model.hf.transformer.wte.weight
    assert torch.equal(loaded.model.hf.transformer.wte.weight, want)
    assert not torch.equal(shape_only.model.hf.transformer.wte.weight, want)
    assert loaded.model.hf.lm_head.weight is loaded.model.hf.transformer.wte.weight


def test_hf_overrides_are_those_of_the_model_made_with_them(tmp_path):
    for kind, overrides in (('llama', HF['llama']), ('gpt_neo', HF['gpt_neo'] | {'attention_types': [[['local'], 2]]})):
        want = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **overrides))
        want.save_pretrained(tmp_path / kind)
        new = hf_model(kind, config_overrides={'model_type': kind} | overrides)
        wider = ComposerHFCausalLM({'name': 'hf_causal_lm', 'pretrained_model_name_or_path': str(tmp_path / kind),
                                    'config_overrides': {'vocab_size': 101}})
        shapes = {n: p.shape for n, p in want.named_parameters()}
        assert {n: p.shape for n, p in new.model.hf.named_parameters()} == shapes
        changed = {n for n, p in wider.model.hf.named_parameters() if p.shape != shapes[n]}
        assert changed and all('wte' in n or 'embed_tokens' in n or 'lm_head' in n for n in changed)
        if kind == 'gpt_neo':
            assert new.model.hf.config.attention_layers == ['local', 'local']


def test_hf_encoders_are_refused():
    shape = dict(model_type='bert', hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    with pytest.raises(UserError, match="'bert' sees the tokens that it has to predict"):
        ComposerHFCausalLM({'name': 'hf_causal_lm', 'config_overrides': shape})


@pytest.mark.parametrize('bad', [{'n_layer': 'x'}, {'activation_function': 'foo'}, {'n_head': 0}, {'n_head': 5}])
def test_hf_values_that_no_model_can_have_are_named(bad):
    with pytest.raises(UserError, match='model'):
        hf_model('gpt2', config_overrides={'model_type': 'gpt2'} | HF['gpt2'] | bad)


def test_hf_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no-such-folder.*model_type"):
        try:
            ComposerHFCausalLM({'name': 'hf_causal_lm', 'pretrained_model_name_or_path': './no-such-folder'})
        except UserError as e:
            raise UserError(str(e).replace('\n', ' ')) from None
    with pytest.raises(UserError, match='n_layerz: no such key in the config of gpt2'):
        hf_model('gpt2', config_overrides={'model_type': 'gpt2', 'n_layerz': 3})
    with pytest.raises(UserError, match='model.pretrained: true needs'):
        hf_model('gpt2', pretrained=True)
    (tmp_path / 'config.json').write_text(json.dumps({'model_type': 'gpt2', 'n_layer': 'two'}))
    with pytest.raises(UserError, match="an integer|'n_layer' expected int"):
        ComposerHFCausalLM({'name': 'hf_causal_lm', 'pretrained_model_name_or_path': str(tmp_path)})
    (tmp_path / 'config.json').write_text(json.dumps({'model_type': 'bert-of-nowhere'}))
    with pytest.raises(UserError, match='pretrained_model_name_or_path'):
        ComposerHFCausalLM({'name': 'hf_causal_lm', 'pretrained_model_name_or_path': str(tmp_path)})


def test_hf_remote_code_is_off_by_default(tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps({'model_type': 'evil', 'auto_map': {'AutoConfig': 'evil.EvilConfig'}}))
    (tmp_path / 'evil.py').write_text(f'open({str(tmp_path / "ran")!r}, "w").close()')
    with pytest.raises(UserError):
        ComposerHFCausalLM({'name': 'hf_causal_lm', 'pretrained_model_name_or_path': str(tmp_path)})
    assert not (tmp_path / 'ran').exists()
