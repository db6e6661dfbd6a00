"""What only a GPU can show; skipped without one."""

import pytest
import torch
from launch import tiny

import main
from src.attention import choose_attention, torch_attention
from src.plot_loss import read_scalars

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize('head_dim', [64, 128])
@pytest.mark.parametrize('impl', ['flash', 'sdpa', 'auto'])
def test_attention_kernels_equal_the_fp32_reference(impl, head_dim):
    name, attention = choose_attention(impl, head_dim)
    torch.manual_seed(0)
    inputs = [torch.randn(2, 300, 4, head_dim, device='cuda').bfloat16().requires_grad_() for _ in range(3)]
    exact = [x.detach().float().requires_grad_() for x in inputs]
    direction = torch.randn(2, 300, 4, head_dim, device='cuda')
    out, want = attention(*inputs, 0.0), torch_attention(*exact)
    grads = torch.autograd.grad((out.float() * direction).sum(), inputs)
    want_grads = torch.autograd.grad((want * direction).sum(), exact)
    for a, b in zip((out, *grads), (want, *want_grads)):
        assert (a.float() - b).norm() < 2e-2 * b.norm(), name


def test_flash_refuses_fp32_rather_than_falling_back():
    _, attention = choose_attention('flash', 64)
    x = torch.randn(1, 16, 2, 64, device='cuda')
    with pytest.raises(RuntimeError):
        attention(x, x, x, 0.0)


FSDP = ['fsdp_config.sharding_strategy=FULL_SHARD', 'model.device=meta']


@pytest.mark.parametrize('fsdp', [[], FSDP], ids=['plain', 'fsdp-meta'])
def test_the_quick_start_trains_on_a_gpu(mds_root, tmp_path, fsdp):
    argv = tiny(mds_root, f'loggers.tensorboard.log_dir={tmp_path}', 'log_to_console=false', 'model.attn_impl=flash', *fsdp)
    assert main.cli(['yamls/quickstart.yaml', *argv]) == 0
    losses = list(read_scalars(tmp_path)['loss/train/total'].values())
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.1
