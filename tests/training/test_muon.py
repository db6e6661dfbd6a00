"""Muon: its arithmetic, its parameter groups, and its shards; the same step as one in plain Python, and as torch's."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import ROOT, tiny
from torch import Tensor, distributed, multiprocessing, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import main
from src.common.errors import UserError
from src.config.schema import OptimizerConfig
from src.model_registry import COMPOSER_MODEL_REGISTRY
from src.mosaic_gpt import MosaicGPT
from src.optimizers import Muon, build_optimizer, muon_groups, orthogonalize, scaled_update, sharded_update, skips_on_device

LOWEST, HIGHEST = 0.68, 1.14  # between which the iteration leaves all singular values that are not too small
SHAPE: dict[str, Any] = {'d_model': 12, 'n_heads': 3, 'n_layers': 2, 'vocab_size': 32, 'max_seq_len': 8, 'init_std': 0.1}
MODELS: dict[str, dict[str, Any]] = {
    'mosaic_gpt': SHAPE, 'modern_gpt': SHAPE | {'n_kv_heads': 1, 'd_hidden': 5},
    'hf_causal_lm': {'config_overrides': {'model_type': 'gpt2', 'n_embd': 12, 'n_head': 3, 'n_layer': 2, 'vocab_size': 32,
                                          'n_positions': 8, 'resid_pdrop': 0.0, 'embd_pdrop': 0.0, 'attn_pdrop': 0.0}}}


def matrix(height: int, width: int, seed: int = 0) -> Tensor:
    """A matrix with singular values from 0.1 to 1."""
    generator = torch.Generator().manual_seed(seed)
    (u, _), (v, _) = (torch.linalg.qr(torch.randn(n, min(height, width), generator=generator)) for n in (height, width))
    return u * torch.linspace(1, 0.1, min(height, width)) @ v.T


# ---------------------------------------------------------------- orthogonalisation


@pytest.mark.parametrize('shape', [(24, 24), (40, 12), (12, 40), (1, 7), (7, 1)], ids=str)
def test_singular_vectors_stay_and_singular_values_become_about_1(shape: tuple[int, int]) -> None:
    x = 1000 * matrix(*shape)  # the scale is lost
    u, values, vh = torch.linalg.svd(x, full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values ** 3 + 2.0315 * values ** 5
    got = u.T @ orthogonalize(x) @ vh.T
    torch.testing.assert_close(got, values.diag(), rtol=0, atol=1e-4)
    assert got.diagonal().min() >= LOWEST and got.diagonal().max() <= HIGHEST


def test_no_gradient_is_no_update() -> None:
    assert not orthogonalize(torch.zeros(4, 6)).any()
    assert not scaled_update(torch.zeros(6, 4), (2, 4)).any()


def test_parts_are_orthogonalised_one_by_one_and_have_the_size_of_adams_updates() -> None:
    """The root mean square of a part is 0.2 times that of its singular values."""
    rows = (10, 6, 2)
    parts = [scale * matrix(n, 8, seed=n) for n, scale in zip(rows, (1.0, 100.0, 0.01))]
    whole = scaled_update(torch.cat(parts), rows)
    assert torch.equal(whole, torch.cat([scaled_update(part, ()) for part in parts]))
    for part in whole.split(rows):
        assert 0.2 * LOWEST <= part.square().mean().sqrt() <= 0.2 * HIGHEST
    assert not torch.allclose(whole, scaled_update(torch.cat(parts), ()))


# ---------------------------------------------------------------- groups


def built(name: str, **settings: Any) -> tuple[nn.Module, Muon]:
    torch.manual_seed(0)
    model = COMPOSER_MODEL_REGISTRY[name]({'name': name, **MODELS[name]}).model
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))  # zeros, too: with them a block's other matrices have no gradient
    optimizer = build_optimizer(OptimizerConfig(name='muon', lr=0.02, **settings), model)
    assert isinstance(optimizer, Muon)
    return model, optimizer


PARTS = {
    'mosaic_gpt': {'Wqkv.weight': (12, 12, 12), 'out_proj.weight': (), 'mlp_up.weight': (), 'mlp_down.weight': ()},
    'modern_gpt': {'Wqkv.weight': (12, 4, 4), 'out_proj.weight': (), 'gate_up.weight': (5, 5), 'mlp_down.weight': ()},
    'hf_causal_lm': {'attn.c_attn.weight': (), 'attn.c_proj.weight': (), 'mlp.c_fc.weight': (), 'mlp.c_proj.weight': ()}}


@pytest.mark.parametrize('name', MODELS)
def test_every_parameter_is_in_one_group_and_fused_matrices_have_their_parts(name: str) -> None:
    model, optimizer = built(name, momentum=0.9, cautious=True)
    names = {p: key for key, p in model.named_parameters()}
    assert sorted(names[p] for group in optimizer.param_groups for p in group['params']) == sorted(names.values())
    rows = {names[p]: group['rows'] for group in optimizer.param_groups for p in group['params'] if 'rows' in group}
    assert len(rows) == 2 * 4
    for end, parts in PARTS[name].items():
        assert [rows[key] for key in rows if key.endswith(end)] == [parts] * 2, end
    for group in optimizer.param_groups:
        assert ('rows' in group) == ('cautious' in group) and group.get('momentum', 0.9) == 0.9
    assert skips_on_device(optimizer) is False, 'before the first step'


def test_the_kits_other_optimizers_keep_one_group() -> None:
    model, _ = built('modern_gpt')
    for name in ('adamw', 'decoupled_adamw'):
        assert len(build_optimizer(OptimizerConfig(name=name, lr=0.1), model).param_groups) == 1


def test_a_model_without_matrices_in_blocks_is_one_message(mds_root: Path, monkeypatch: pytest.MonkeyPatch,
                                                           capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="^optimizer.name: 'muon' trains the matrices .* Linear has none; set optimizer.name=adamw$"):
        muon_groups(nn.Linear(2, 2), OptimizerConfig(name='muon', lr=0.1))
    monkeypatch.setattr(MosaicGPT, 'fsdp_wrap_fn', lambda self, module: False)
    assert main.cli([str(ROOT / 'yamls/quickstart.yaml'), *tiny(mds_root, 'optimizer.name=muon', 'eval_loader=null')]) == 1
    said = capfd.readouterr().err
    assert said.count("error: optimizer.name: 'muon' trains the matrices") == 1 and 'MosaicGPT has none' in said
    assert 'Traceback' not in said


# ---------------------------------------------------------------- steps


def set_gradients(model: nn.Module, step: int) -> None:
    ids = torch.randint(32, (4, 8), generator=torch.Generator().manual_seed(step))
    model.zero_grad()
    logits = model(ids)
    logits = logits if isinstance(logits, Tensor) else logits.logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()


def reference_step(weight: Tensor, grad: Tensor, momentum: Tensor, rows: Sequence[int], lr: float, decay: float, factor: float,
                   cautious: bool) -> None:
    """One step of Muon with Nesterov momentum and decoupled decay. Changes `weight` and `momentum`."""
    momentum.mul_(factor).add_((1 - factor) * grad)
    step = (1 - factor) * grad + factor * momentum
    parts = step.split(rows) if rows else [step]
    update = torch.cat([0.2 * max(part.shape) ** 0.5 * orthogonalize(part) for part in parts])
    decayed = weight - lr * decay * weight
    if cautious:
        decayed = torch.where(weight * update > 0, decayed, weight)
    weight.copy_(decayed - lr * update)


@pytest.mark.parametrize('cautious', [False, True], ids=['decay', 'cautious'])
@pytest.mark.parametrize('name', MODELS)
def test_three_steps_are_those_of_plain_python_and_of_torchs_adamw(name: str, cautious: bool) -> None:
    model, optimizer = built(name, momentum=0.9, weight_decay=0.5, cautious=cautious, betas=[0.8, 0.9], eps=1e-3)
    *groups, others = optimizer.param_groups
    copies = {p: p.detach().clone() for p in model.parameters()}
    momenta = {p: torch.zeros_like(p) for p in copies}
    adamw = torch.optim.AdamW([copies[p] for p in others['params']], lr=0.02, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.5)
    for step in range(3):
        lr = 0.02 / (step + 1)  # a schedule
        for group in (*groups, others, *adamw.param_groups):
            group['lr'] = lr
        set_gradients(model, step)
        for p in others['params']:
            copies[p].grad = p.grad
        with torch.no_grad():
            for group in groups:
                for p in group['params']:
                    assert p.grad is not None
                    reference_step(copies[p], p.grad, momenta[p], group['rows'], lr, 0.5, 0.9, cautious)
        adamw.step()
        optimizer.step()
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), copies[p], rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f'{key}: {text}')
    assert all([*optimizer.state[p]] == ['momentum_buffer'] for group in groups for p in group['params'])


def test_a_step_computes_the_loss_of_its_closure_and_skips_matrices_without_gradient() -> None:
    model, optimizer = built('modern_gpt')
    frozen = optimizer.param_groups[0]['params'][0]
    frozen.requires_grad_(False)
    before = copy.deepcopy(frozen)
    assert optimizer.step(lambda: (set_gradients(model, 0), 7.0)[1]) == 7.0
    assert torch.equal(frozen, before) and frozen not in optimizer.state
    assert len(optimizer.param_groups) == 4 and skips_on_device(optimizer)
    optimizer.fuses = False
    optimizer.step()
    assert not skips_on_device(optimizer)


@pytest.mark.parametrize('cautious', [False, True], ids=['decay', 'cautious'])
def test_found_inf_skips_the_step(cautious: bool) -> None:
    """Also in the first step. A step that is not skipped is the same to the bit as one without `found_inf`."""
    (plain, expected), (model, optimizer) = (built('modern_gpt', weight_decay=0.5, cautious=cautious) for _ in range(2))
    for step in range(5):
        set_gradients(model, step)
        is_bad = step in (0, 2, 3)
        if is_bad:
            before = copy.deepcopy(([*model.parameters()], dict(optimizer.state)))
            for p in model.parameters():
                assert p.grad is not None
                p.grad[0] = float('nan') if step < 3 else float('inf')
        else:
            set_gradients(plain, step)
            expected.step()
        optimizer.found_inf = torch.tensor(float(is_bad))
        optimizer.step()
        for i, p in enumerate(model.parameters()):
            if is_bad:
                assert torch.equal(p, before[0][i])
    for p, q in zip(model.parameters(), plain.parameters()):
        assert torch.equal(p, q)
        assert all(torch.equal(value, expected.state[q][key]) for key, value in optimizer.state[p].items())


def test_a_step_reads_no_number_on_the_host() -> None:
    with FakeTensorMode():  # has no numbers, and raises where one is read
        weight = nn.Parameter(torch.ones(4, 3))
        weight.grad = torch.ones(4, 3)
        optimizer = Muon([{'params': [weight], 'rows': (2, 2), 'momentum': 0.9, 'cautious': True}], lr=0.1)
        optimizer.found_inf = torch.zeros(())
        with pytest.raises(DataDependentOutputException):
            bool(optimizer.found_inf)
        optimizer.step()


@pytest.mark.skipif(not hasattr(torch.optim, 'Muon'), reason='torch.optim.Muon came with torch 2.9')
def test_unfused_matrices_take_the_steps_of_torchs_muon() -> None:
    """torch's computes in bf16, so an update may differ by a few times its precision, 2^-8."""
    shapes = [(24, 24), (40, 12), (12, 40)]
    ours, theirs = ([nn.Parameter(matrix(*shape)) for shape in shapes] for _ in range(2))
    settings: dict[str, Any] = {'lr': 0.1, 'weight_decay': 0.2}
    optimizers = [
        Muon([{'params': ours, 'rows': (), 'momentum': 0.9, 'cautious': False}], **settings),
        torch.optim.Muon(theirs, momentum=0.9, adjust_lr_fn='match_rms_adamw', **settings)]  # pyright: ignore
    for step in range(3):
        before = [p.detach().clone() for p in ours]
        for i, (p, q) in enumerate(zip(ours, theirs)):
            p.grad = q.grad = matrix(*shapes[i], seed=step + 1)
        for optimizer in optimizers:
            optimizer.step()
        for p, q, old in zip(ours, theirs, before):
            assert (p - q).norm() <= 0.03 * (p - old).norm()


# ---------------------------------------------------------------- shards


SHARDED = {  # heights of the matrices of width 5, and the rows of their parts
    'even': ([8, 8, 8, 8], (4, 4)), 'odd': ([9, 9, 9], (2, 3, 4)), 'fewer rows than ranks': ([3, 3], (2, 1)),
    'one row': ([1, 1, 1, 1], ()), 'other heights': ([3, 10, 7], ()), 'one matrix': ([6], (5, 1))}


def compare_shards(rank: int, n_ranks: int, file: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group('gloo', rank=rank, world_size=n_ranks, init_method=f'file://{file}')

    def own_rows(whole: Tensor) -> Tensor:  # as FSDP divides them
        return (*whole.chunk(n_ranks), *[whole[:0]] * n_ranks)[rank]

    for name, (heights, rows) in SHARDED.items():
        matrices = [matrix(height, 5, seed=i) for i, height in enumerate(heights[:n_ranks])]
        got = sharded_update([own_rows(whole) for whole in matrices], [whole.shape for whole in matrices], rows, None)
        for whole, part in zip(matrices, got, strict=True):
            assert torch.equal(part, own_rows(scaled_update(whole, rows))), name
    distributed.destroy_process_group()


@pytest.mark.parametrize('n_ranks', [1, 2, 4])
def test_each_rank_gets_its_rows_of_the_update(n_ranks: int, tmp_path: Path) -> None:
    if distributed.is_initialized():  # by an earlier test
        distributed.destroy_process_group()
    multiprocessing.start_processes(compare_shards, (n_ranks, f'{tmp_path}/store'), n_ranks, start_method='fork')
