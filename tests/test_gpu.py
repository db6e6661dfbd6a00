"""What only a GPU can show; skipped without one."""

import pytest
import torch
from launch import ranks, tiny
from runs import train

import main
from src import config
from src.attention import choose_attention, torch_attention

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


FSDP = 'fsdp_config.sharding_strategy=FULL_SHARD'
HELD = {
    'plain': [],
    'fsdp1': [FSDP, 'fsdp_config.version=1'],
    'fsdp1 from meta': [FSDP, 'fsdp_config.version=1', 'model.device=meta'],
    'fsdp1 checkpointed': [FSDP, 'fsdp_config.version=1', 'fsdp_config.activation_checkpointing=true'],
    'fsdp1 offloaded': [FSDP, 'fsdp_config.version=1', 'fsdp_config.activation_cpu_offload=true'],
    'fsdp2': [FSDP, 'fsdp_config.version=2'],
    'fsdp2 from meta': [FSDP, 'fsdp_config.version=2', 'model.device=meta'],
    'fsdp2 checkpointed': [FSDP, 'fsdp_config.version=2', 'model.device=meta', 'fsdp_config.activation_checkpointing=true'],
}


@pytest.fixture(scope='module')
def on_cpu(mds_root, tmp_path_factory):
    """The same run in fp32 without a GPU, in a process of its own."""
    argv = ['yamls/quickstart.yaml', *tiny(mds_root, 'eval_loader=null')]
    return ranks(1, {'cpu': argv}, tmp_path_factory.mktemp('cpu'))['cpu']


@pytest.mark.parametrize('held', HELD)
def test_every_way_to_hold_the_model_gives_the_losses_of_a_cpu(mds_root, on_cpu, held):
    fp32 = ['precision=fp32', 'model.attn_impl=torch', 'eval_loader=null']
    got = train('yamls/quickstart.yaml', *tiny(mds_root, *fp32, *HELD[held]))
    assert got['losses'] == pytest.approx(on_cpu['losses'], rel=1e-3)
    assert got['batches'] == on_cpu['batches']


@pytest.mark.parametrize('version', [1, 2])
def test_flash_in_bf16_learns_and_resumes_from_shards(mds_root, tmp_path, version):
    argv = tiny(mds_root, 'model.attn_impl=flash', FSDP, f'fsdp_config.version={version}', 'model.device=meta', 'run_name=one',
                'fsdp_config.state_dict_type=sharded', f'save_folder={tmp_path}', 'save_interval=10ba', 'eval_loader=null')
    whole = train('yamls/quickstart.yaml', *argv)
    assert len(whole['losses']) == 20 and whole['losses'][19] < whole['losses'][0] - 0.1
    (tmp_path / 'ep0-ba20.json').unlink()
    rest = train('yamls/quickstart.yaml', *argv, 'autoresume=true')
    assert rest['losses'] == pytest.approx({n: v for n, v in whole['losses'].items() if n >= 10}, rel=1e-3)


@pytest.mark.parametrize('fsdp', [[], [FSDP, 'fsdp_config.version=1']], ids=['plain', 'fsdp1'])
def test_auto_microbatch_fits_after_a_real_out_of_memory(mds_root, fsdp):
    """With the memory of this process bounded, a batch of 256 rows of logits does not fit in one go."""
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_allocated() + (1 << 30)) / total))
    try:
        argv = tiny(mds_root, 'device_train_microbatch_size=auto', 'global_train_batch_size=256', 'model.vocab_size=65536',
                    'model.loss_chunk_tokens=1000000', 'max_duration=4ba', 'eval_loader=null', 'scheduler.t_warmup=1ba', *fsdp)
        trainer = main.main(config.load(['yamls/quickstart.yaml', *argv]))
        size = trainer.state.device_train_microbatch_size
        assert isinstance(size, int) and 1 <= size < 256 and int(trainer.state.timestamp.batch) == 4
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
