"""Tests that need a GPU; skipped without one."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from composer.core import Callback
from composer.trainer import _patch_pytorch
from launch import ranks, tiny
from runs import train

import main
from src.attention import Documents, choose_attention, torch_attention
from src.causal_lm import chunked_cross_entropy
from src.common.errors import UserError
from src.config import load as config
from src.mosaic_gpt import MosaicGPT
from src.tools import benchmark
from src.tools.stopwatch import PARTS
from src.training import plugins

pytestmark = pytest.mark.gpu
KERNELS = ['flash cudnn', 'flash pytorch', 'flash flash-attn-2', 'flash flash-attn-3', 'flash flash-attn-4']


def available(impl, head_dim, within_document=False):
    """Settings of an attention implementation, or of flash with one kernel; skips if this machine lacks it."""
    impl, _, kernel = impl.partition(' ')
    try:
        return choose_attention(impl, head_dim, within_document, kernel or 'auto')[:2]
    except UserError as e:
        pytest.skip(str(e))


@pytest.mark.parametrize('head_dim', [64, 128])
@pytest.mark.parametrize('impl', ['flash', 'sdpa', 'auto', *KERNELS])
def test_attention_kernels_equal_the_fp32_reference(impl, head_dim):
    name, attention = available(impl, head_dim)
    torch.manual_seed(0)
    inputs = [torch.randn(2, 300, 4, head_dim, device='cuda').bfloat16().requires_grad_() for _ in range(3)]
    exact = [x.detach().float().requires_grad_() for x in inputs]
    direction = torch.randn(2, 300, 4, head_dim, device='cuda')
    out, want = attention(*inputs, 0.0), torch_attention(*exact)
    grads = torch.autograd.grad((out.float() * direction).sum(), inputs)
    want_grads = torch.autograd.grad((want * direction).sum(), exact)
    for a, b in zip((out, *grads), (want, *want_grads)):
        assert (a.float() - b).norm() < 2e-2 * b.norm(), name


@pytest.mark.parametrize('head_dim', [64, 128])
@pytest.mark.parametrize('impl', ['flash', 'sdpa', 'auto', *KERNELS])
def test_attention_kernels_stay_within_documents(impl, head_dim):
    name, attention = available(impl, head_dim, within_document=True)
    torch.manual_seed(0)
    lengths = torch.tensor([[300, 0, 0, 0], [1, 200, 1, 98]], device='cuda')
    sequence_id = torch.stack([torch.arange(4, device='cuda').repeat_interleave(row) for row in lengths])
    # As in CausalAttention: slices of one tensor, not contiguous.
    qkv = torch.randn(2, 300, 3, 4, head_dim, device='cuda').bfloat16().requires_grad_()
    exact = qkv.detach().float().requires_grad_()
    direction = torch.randn(2, 300, 4, head_dim, device='cuda')
    out = attention(*qkv.unbind(2), 0.0, Documents(sequence_id))
    want = torch.zeros_like(direction)
    for row, cuts in enumerate(lengths.tolist()):
        parts = zip(*(x[row].split(cuts) for x in exact.unbind(2)))
        want[row] = torch.cat([torch_attention(*(x[None] for x in part))[0] for part in parts if len(part[0])])
    grads = torch.autograd.grad((out.float() * direction).sum(), qkv)
    want_grads = torch.autograd.grad((want * direction).sum(), exact)
    for a, b in zip((out, *grads), (want, *want_grads)):
        assert (a.float() - b).norm() < 2e-2 * b.norm(), name


@pytest.mark.parametrize('documents', [False, True])
def test_flash_refuses_fp32_rather_than_falling_back(documents):
    _, attention, _ = choose_attention('flash', 64, documents)
    x = torch.randn(1, 16, 2, 64, device='cuda')
    with pytest.raises(RuntimeError):
        attention(x, x, x, 0.0, Documents(torch.zeros(1, 16, dtype=torch.long, device='cuda')) if documents else None)


@pytest.mark.parametrize('attn_impl', ['sdpa', 'flash'])
def test_documents_are_counted_once_a_forward_pass(attn_impl):
    """A model with many layers synchronises with the GPU as often as a model with one layer."""
    waits = []
    for n_layers in (1, 6):
        model = MosaicGPT(dict(d_model=128, n_heads=2, n_layers=n_layers, max_seq_len=64, vocab_size=512, attn_impl=attn_impl,
                               attn_within_document=True)).cuda()
        ids = torch.randint(0, 512, (4, 64), device='cuda')
        sequence_id = (torch.arange(64, device='cuda') // 20).expand(4, 64)
        with torch.autocast('cuda', torch.bfloat16):
            model(ids, targets=ids, sequence_id=sequence_id)  # warm up
            torch.cuda.set_sync_debug_mode('warn')
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter('always')
                    model(ids, targets=ids, sequence_id=sequence_id).backward()
            finally:
                torch.cuda.set_sync_debug_mode('default')
        waits.append(sum('synchronizing CUDA operation' in str(w.message) for w in caught))
    assert waits[0] == waits[1]


class NoWaits(Callback):
    """Makes each operation raise that waits for the GPU, from the loader of batch 4 to the end of batch 9.

    The loss of batch 6 is not finite. `weights` are the sums of a weight matrix before each batch, on the GPU.
    """

    def __init__(self):
        self.weights: list[torch.Tensor] = []

    def before_dataloader(self, state, logger):
        batch = int(state.timestamp.batch)
        torch.cuda.set_sync_debug_mode('error' if 3 <= batch < 9 else 'default')
        self.weights.append(state.model.model.transformer.wte.weight.detach().double().sum())

    def after_loss(self, state, logger):
        if int(state.timestamp.batch) == 5:
            state.loss = state.loss * math.nan


@pytest.mark.parametrize('overrides', [[], ['optimizer.name=adamw', 'device_train_microbatch_size=5'], ['optimizer.name=muon']],
                         ids=['one', 'several', 'muon'])
def test_a_step_waits_for_nothing(mds_root, monkeypatch, tmp_path, overrides):
    """Neither the kit nor Composer reads from the GPU, also where a batch is skipped. Loggers read at the console's interval."""
    monkeypatch.setitem(plugins.CALLBACKS, 'no_waits', NoWaits)
    argv = tiny(mds_root, 'callbacks.no_waits={}', 'max_duration=12ba', 'scheduler.t_warmup=0ba', 'eval_loader=null',
                'console_log_interval=100ba', f'loggers.file.filename={tmp_path}/log.txt',
                'train_loader.dataset.group_method=concat', *overrides)
    try:
        trainer = main.main(config.load(['yamls/quickstart.yaml', *argv]))
    finally:
        torch.cuda.set_sync_debug_mode('default')
    [found] = [callback.weights for callback in trainer.state.callbacks if isinstance(callback, NoWaits)]
    sums = torch.stack(found).tolist()  # before batches 1 to 12
    assert [a != b for a, b in zip(sums, sums[1:])] == [True] * 5 + [False] + [True] * 5
    assert trainer.state.algorithms[-1].total == 1
    trainer.close()
    text = (tmp_path / 'log.txt').read_text()
    assert [f'[metric][batch={n}]: loss/train/total: ' in text for n in range(13)] == [True] * 12 + [False]
    assert '[metric][batch=5]: loss/train/total: NaN' in text


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
    'every other block': [FSDP, 'fsdp_config.version=1', 'fsdp_config.activation_checkpointing=true',
                          'model.activation_checkpointing_every=2'],
    'reduced once': [FSDP, 'fsdp_config.version=2', 'fsdp_config.reduce_every_microbatch=false',
                     'device_train_microbatch_size=5'],
    'compiled': ['compile_config.scope=model', 'model.loss_impl=plain'],
    'fsdp1 compiled': [FSDP, 'fsdp_config.version=1', 'compile_config.scope=block'],
    'fsdp1 compiled, checkpointed': [FSDP, 'fsdp_config.version=1', 'compile_config.scope=block',
                                     'fsdp_config.activation_checkpointing=true'],
    'fsdp2 compiled': [FSDP, 'fsdp_config.version=2', 'compile_config.scope=block', 'device_train_microbatch_size=5'],
}


@pytest.fixture(scope='module')
def on_cpu(mds_root, tmp_path_factory):
    """Runs the same training in fp32 on the CPU, in a process of its own."""
    argv = ['yamls/quickstart.yaml', *tiny(mds_root, 'eval_loader=null')]
    return ranks(1, {'cpu': argv}, tmp_path_factory.mktemp('cpu'))['cpu']


@pytest.mark.parametrize('held', HELD)
def test_every_way_to_hold_the_model_gives_the_losses_of_a_cpu(mds_root, on_cpu, held):
    fp32 = ['precision=fp32', 'model.attn_impl=torch', 'eval_loader=null']
    got = train('yamls/quickstart.yaml', *tiny(mds_root, *fp32, *HELD[held]))
    assert got['losses'] == pytest.approx(on_cpu['losses'], rel=1e-3)
    assert got['batches'] == on_cpu['batches']


@pytest.fixture(scope='module')
def modern_on_cpu(mds_root, tmp_path_factory):
    argv = ['yamls/modern_gpt/quickstart.yaml', *tiny(mds_root, 'eval_loader=null', 'model.n_kv_heads=1')]
    return ranks(1, {'modern': argv}, tmp_path_factory.mktemp('modern'))['modern']


@pytest.mark.parametrize('precision, rel', [('fp32', 1e-3), ('amp_bf16', 1e-2)])
@pytest.mark.parametrize('held', ['plain', 'fsdp2', 'fsdp2 compiled', 'fsdp2 from meta', 'fsdp2 checkpointed'])
def test_the_modern_model_with_muon_gives_the_losses_of_a_cpu(mds_root, modern_on_cpu, held, precision, rel):
    overrides = [f'precision={precision}', 'model.n_kv_heads=1', 'eval_loader=null', *HELD[held]]
    got = train('yamls/modern_gpt/quickstart.yaml', *tiny(mds_root, *overrides))
    assert got['losses'] == pytest.approx(modern_on_cpu['losses'], rel=rel)
    assert got['batches'] == modern_on_cpu['batches']


WITHIN = ['model.attn_within_document=true', 'train_loader.dataset.group_method=concat', 'eval_loader=null', 'max_duration=6ba']


@pytest.fixture(scope='module')
def within_on_cpu(mds_root, tmp_path_factory):
    argv = ['yamls/quickstart.yaml', *tiny(mds_root, *WITHIN, 'model.attn_impl=torch')]
    return ranks(1, {'within': argv}, tmp_path_factory.mktemp('within'))['within']


@pytest.mark.parametrize('held', [held for held in HELD if 'meta' not in held])
@pytest.mark.parametrize('attn_impl', ['sdpa', 'flash'])
def test_documents_pass_every_wrapper(mds_root, within_on_cpu, attn_impl, held):
    """Losses in bf16 on the GPU are close to fp32 on the CPU."""
    got = train('yamls/quickstart.yaml', *tiny(mds_root, *WITHIN, f'model.attn_impl={attn_impl}', *HELD[held]))
    assert got['batches'] == within_on_cpu['batches']
    assert got['losses'] == pytest.approx(within_on_cpu['losses'], rel=1e-2)


@pytest.mark.parametrize('multiple', [None, 1, 128])
def test_the_loss_with_a_padded_vocabulary(multiple):
    torch.manual_seed(0)
    hidden = torch.randn(4, 300, 64, device='cuda', requires_grad=True)
    weight = (0.2 * torch.randn(50257, 64, device='cuda')).requires_grad_()
    targets = torch.randint(0, 50257, (4, 300), device='cuda')
    want = F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten())
    want_grads = torch.autograd.grad(want, (hidden, weight))
    with torch.autocast('cuda', torch.bfloat16):
        loss = chunked_cross_entropy(hidden, weight, targets, 256, multiple)
    assert loss.item() == pytest.approx(want.item(), rel=5e-3)
    for a, b in zip(torch.autograd.grad(loss, (hidden, weight)), want_grads):
        assert a.shape == b.shape and (a - b).norm() < 2e-2 * b.norm()


@pytest.mark.parametrize('microbatch', [2, 8])
def test_a_benchmark_counts_as_the_gpu_does(tmp_path, microbatch):
    argv = ['yamls/mosaic_gpt/125m.yaml', 'model.n_layers=4', 'global_train_batch_size=8', 'compile_config=null',
            f'device_train_microbatch_size={microbatch}', 'train_loader.num_workers=0', 'train_loader.prefetch_factor=null',
            'train_loader.persistent_workers=false']
    [record] = benchmark.main(benchmark.parse_args([*argv, '--steps', '5', '--warmup', '3', '--out', str(tmp_path / 'out')]))
    ms = record['ms']
    assert ms['total'] > 0 and all(ms[part] > -0.05 * ms['total'] for part in PARTS)
    assert record['predicted_memory'] == pytest.approx(record['peak_memory'], rel=0.1)


@pytest.mark.parametrize('name, microbatch', [('125m', 16), ('350m', 8), ('760m', 4), ('1b', 8), ('3b', 2)])
def test_predicted_memory_at_full_size(tmp_path, name, microbatch):
    argv = [f'yamls/mosaic_gpt/{name}.yaml', f'global_train_batch_size={microbatch}', 'compile_config=null',
            f'device_train_microbatch_size={microbatch}', '--steps', '3', '--warmup', '2', '--out', str(tmp_path / 'out')]
    [record] = benchmark.main(benchmark.parse_args(argv))
    assert record['predicted_memory'] == pytest.approx(record['peak_memory'], rel=0.1), record


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
    """With a limit on the memory of this process, a batch of 256 rows of logits does not fit at once."""
    if fsdp and not hasattr(_patch_pytorch, 'unshard_with_sync'):
        pytest.skip(f'Composer does not patch FSDP of torch {torch.__version__}')
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
