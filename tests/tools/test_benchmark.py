"""The benchmark: its times, counts and files. And what a training step must not do."""

import gc
import json
import os
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional
from unittest.mock import MagicMock

import gpu_speed
import pytest
import torch
import torch.nn.functional as F
import warm
from composer.core import Callback, Event, Precision, State
from composer.loggers import Logger
from hosts import need_nodes, start
from launch import ROOT, SCRIPTS, clean_env, free_port, tiny
from torch._dynamo import register_backend
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import main
from src import attention
from src.attention import Documents, call_varlen_kernel
from src.common.errors import UserError
from src.common.flops import peak_flops, train_flops_per_token
from src.config import load as config
from src.config.check import check
from src.mosaic_gpt import ComposerMosaicGPT, MosaicGPT
from src.tools import benchmark
from src.tools.stopwatch import PARTS, Stopwatch, build_baselines
from src.training.plugins import REGISTRIES

QUICKSTART = str(ROOT / 'yamls/quickstart.yaml')
SMALL = ['max_seq_len=16', 'model.d_model=16', 'model.n_heads=2', 'model.n_layers=2', 'model.vocab_size=300',
         'global_train_batch_size=6', 'device_train_microbatch_size=4']


def run(out: Path, *argv: str) -> list[dict[str, Any]]:
    return benchmark.main(benchmark.parse_args([QUICKSTART, *SMALL, '--steps', '3', '--warmup', '1', '--out', str(out), *argv]))


# ---------------------------------------------------------------- FLOPs


def test_flops_of_a_token_by_hand() -> None:
    # Of the 125M model: 6 * 125,226,240 + 12 * 12 layers * 768 * 2048, then half the attention
    assert train_flops_per_token(125_226_240, 12, 768, 2048) == 751_357_440 + 226_492_416
    assert train_flops_per_token(125_226_240, 12, 768, 2048, causal=True) == 751_357_440 + 113_246_208


@pytest.mark.parametrize('name, precision, tflops', [
    ('NVIDIA A100-SXM4-80GB', 'amp_bf16', 312), ('NVIDIA A100-PCIE-40GB', 'amp_fp16', 312),
    ('NVIDIA A100 80GB PCIe', 'amp_bf16', 312), ('NVIDIA H200 NVL', 'amp_bf16', 835.5),
    ('NVIDIA H100 80GB HBM3', 'fp32', None),
    # similar names of other GPUs
    ('NVIDIA L40', 'amp_bf16', None), ('NVIDIA GH200 480GB', 'amp_bf16', None),
    ('NVIDIA H100 80GB HBM3 MIG 1g.10gb', 'amp_bf16', None),
    ('NVIDIA GeForce RTX 4090 Laptop GPU', 'amp_bf16', None), ('NVIDIA GeForce RTX 4090 D', 'amp_bf16', None),
    ('', 'amp_bf16', None),
])
def test_peak_of_known_gpus_alone(name: str, precision: str, tflops: Optional[float]) -> None:
    assert peak_flops(name, precision) == (None if tflops is None else pytest.approx(tflops * 1e12))


@pytest.mark.parametrize('name', gpu_speed.ROWS)
def test_rows_of_the_table_for_gpus_are_configs(name: str) -> None:
    args = benchmark.parse_args(gpu_speed.ROWS[name])
    c = check(config.load([args.yaml, *args.overrides]), REGISTRIES, 1, True)
    assert c.global_train_batch_size % int(c.device_train_microbatch_size) == 0, 'microbatches of one size'


# ---------------------------------------------------------------- records


def test_a_record_adds_up(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    before = set(Path(benchmark.tempfile.gettempdir()).glob('benchmark-*'))
    [record] = run(tmp_path / 'out')
    ms = record['ms']
    assert set(ms) == {'total', *PARTS} and all(ms[part] > 0 for part in PARTS if part != 'rest') and record['steps'] == 3
    assert record['ms_fastest'] <= ms['total'] <= record['ms_slowest']
    assert record['tokens_per_second'] == pytest.approx(6 * 16 / ms['total'] * 1000)
    assert record['mfu'] is None and record['mfu_causal'] is None, 'a CPU has no MFU'
    assert record['parameters'] == 300 * 16 + 16 * 16 + 2 * (12 * 16 * 16 + 13 * 16) + 2 * 16
    assert [record[key] for key in ('global_batch', 'microbatch', 'precision', 'attention')] == [6, 4, 'fp32', 'sdpa (PyTorch)']
    assert json.loads((tmp_path / 'out.json').read_text()) == [record]
    page = (tmp_path / 'out.md').read_text()
    assert f'| {record["tokens_per_second"]:,.0f} | – | – | {ms["total"]:.1f} |' in page and 'python src/tools/benchmark.py' in page
    assert f'{ms["total"]:.1f}' in capsys.readouterr().out
    columns = {line.count('|') for line in page.splitlines() if line.startswith('|')}
    assert len(columns) == 1, page
    assert set(Path(benchmark.tempfile.gettempdir()).glob('benchmark-*')) <= before


def test_parts_of_a_step_sum_to_the_step() -> None:
    watch = benchmark.Stopwatch(0, 1, {})
    watch.timed = [{'data': [(0.5, 1.0)], 'forward': [(1.5, 3.5), (8.0, 9.0)], 'backward': [(4.0, 8.0), (9.0, 11.0)],
                    'update': [(11.0, 14.0)], 'total': [(0.0, 14.0)]}]
    [parts] = watch.milliseconds()
    assert parts == {'data': 500, 'forward': 3000, 'backward': 6000, 'total': 14000, 'update': 3000, 'rest': 1500}


def test_epochs_that_end_within_the_timed_steps(mds_root: Path, tmp_path: Path) -> None:
    small = ['train_loader.dataset.epoch_size=12', 'train_loader.dataset.group_method=truncate', 'model.vocab_size=512',
             'train_loader.dataset.num_canonical_nodes=1']
    [record] = run(tmp_path / 'out', '--real_data', f'data_remote={mds_root}', *small)
    assert record['steps'] == 3 and record['ms']['rest'] > -1


@pytest.mark.slow
def test_no_run_of_a_sweep_is_kept_in_memory(tmp_path: Path) -> None:
    def models() -> int:
        gc.collect()
        return sum(isinstance(x, MosaicGPT) for x in gc.get_objects())

    before = models()
    run(tmp_path / 'out', '--sweep', 'seed=1,2,3')
    assert models() <= before + 1  # the last model lives until the next run begins


@pytest.mark.slow
def test_a_sweep_has_a_row_for_each_combination(tmp_path: Path) -> None:
    sweep = ['--sweep', 'model.attn_impl=torch,sdpa', '--sweep', 'device_train_microbatch_size=3,none']
    records = run(tmp_path / 'out', *sweep)
    assert [record['overrides'][-2:] for record in records] == [
        [f'model.attn_impl={attn}', f'device_train_microbatch_size={n}'] for attn in ('torch', 'sdpa') for n in (3, 'none')]
    assert [record.get('microbatch') for record in records] == [3, None, 3, None]
    assert [record.get('attention') for record in records] == ['torch (plain maths)', None, 'sdpa (PyTorch)', None]
    assert records[1]['error'] == "device_train_microbatch_size: 'none' must be a whole number or 'auto'"
    section = '\n## Written by hand\n\n| a | table |\n'
    with (tmp_path / 'out.md').open('a') as file:
        file.write(section)
    run(tmp_path / 'out', '--append')
    assert len(json.loads((tmp_path / 'out.json').read_text())) == 5
    page, found, rest = (tmp_path / 'out.md').read_text().partition(section)
    assert found and not rest
    assert len({line.count('|') for line in page.splitlines() if line.startswith('|')}) == 1, page
    records = run(tmp_path / 'lists', '--sweep', 'optimizer.betas=[0.9,0.95],[0.9,0.99]', '--steps', '1')
    assert [record['overrides'][-1] for record in records] == ['optimizer.betas=[0.9,0.95]', 'optimizer.betas=[0.9,0.99]']
    with pytest.raises(UserError, match="--sweep: 'lr' must have the form key=a,b,c"):
        run(tmp_path / 'out', '--sweep', 'lr')
    (tmp_path / 'other.json').write_text('no JSON')
    (tmp_path / 'numbers.json').write_text('[1, 2]')
    (tmp_path / 'page.md').mkdir()
    for out in tmp_path / 'other', tmp_path / 'numbers', tmp_path / 'page', Path('.'), tmp_path / 'other.json' / 'x':
        with pytest.raises(UserError, match='--out: .* cannot be read or written: .*; name another'):
            run(out, '--append')


def test_a_try_that_did_not_fit_is_not_timed() -> None:
    watch, nothing = Stopwatch(0, 1, {}), MagicMock()
    for event in ('BEFORE_DATALOADER', 'AFTER_DATALOADER', *['BEFORE_TRAIN_BATCH', 'BEFORE_FORWARD', 'AFTER_FORWARD'] * 2):
        watch.run_event(Event[event], nothing, nothing)
    assert {part: len(pairs) for part, pairs in watch._step.items()} == {'data': 1, 'forward': 1}


def test_rivals_are_the_same_model(tmp_path: Path) -> None:
    [record] = run(tmp_path / 'out', '--against', 'hf', '--against', 'bare')
    assert set(record['against']) == {'hf', 'bare'} and all(ms > 0 for ms in record['against'].values())
    assert f'hf {record["against"]["hf"]:.0f} ms, ratio' in (tmp_path / 'out.md').read_text()
    c = check(config.load([QUICKSTART, *SMALL, 'model.mlp_act=gelu_tanh']), REGISTRIES, 1, False)
    rivals = build_baselines(['hf', 'bare'], c)
    hf, bare = rivals['hf'].model, rivals['bare'].model
    assert sum(p.numel() for p in hf.parameters()) == sum(p.numel() for p in bare.parameters()) == record['parameters']
    assert hf.config._attn_implementation == 'sdpa' and hf.config.activation_function == 'gelu_pytorch_tanh'
    batch = {'input_ids': torch.randint(1, 300, (6, 16))}
    batch['labels'] = batch['input_ids']
    before = [p.clone() for p in bare.parameters()]
    rivals['bare'].step(batch)
    assert any(not torch.equal(a, b) for a, b in zip(before, bare.parameters(), strict=True)), 'it trains'
    assert record['peak_memory'] is None, 'it would be theirs too'
    with pytest.raises(UserError, match='--against: a bare loop needs one device'):
        run(tmp_path / 'out', '--against', 'bare', 'fsdp_config.sharding_strategy=FULL_SHARD')
    with pytest.raises(UserError, match='--against hf: only mosaic_gpt and modern_gpt without attn_within_document'):
        run(tmp_path / 'out', '--against', 'hf', 'model.attn_within_document=true')


def test_the_rival_of_a_modern_gpt_is_a_qwen3(tmp_path: Path) -> None:
    modern = ['yamls/modern_gpt/quickstart.yaml', *SMALL, 'model.n_kv_heads=1']
    argv = [*modern, '--steps', '1', '--warmup', '1', '--out', str(tmp_path / 'out'), '--against', 'hf', '--against', 'bare']
    [record] = benchmark.main(benchmark.parse_args(argv))
    assert record['attention'] == 'sdpa (PyTorch)' and set(record['against']) == {'hf', 'bare'}
    hf = build_baselines(['hf'], check(config.load(modern), REGISTRIES, 1, False))['hf'].model
    assert (hf.config.model_type, hf.config.num_key_value_heads, hf.config._attn_implementation) == ('qwen3', 1, 'sdpa')
    assert sum(p.numel() for p in hf.parameters()) == record['parameters'] == 300 * 16 + 2 * (3 * 16**2 + 3 * 16 * 128 + 48) + 16


def test_mfu_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    c = check(config.load([QUICKSTART, *SMALL]), REGISTRIES, 1, False)
    state = SimpleNamespace(model=ComposerMosaicGPT(c.model), precision=Precision('amp_bf16'), device_train_microbatch_size=4)
    watch = benchmark.Stopwatch(0, 1, {})
    watch.timed = [{'total': [(0.0, 0.5)]} | {part: [(0.0, 0.1)] for part in PARTS}]
    for name, value in (('is_available', True), ('get_device_name', 'NVIDIA L4'), ('synchronize', None),
                        ('is_current_stream_capturing', False),
                        ('max_memory_allocated', 7)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    args = benchmark.parse_args([QUICKSTART])
    record = benchmark.describe(args, [], SimpleNamespace(state=state), c, watch)
    flops = 6 * record['parameters'] + 12 * 2 * 16 * 16
    assert record['mfu'] == pytest.approx(flops * 6 * 16 / 0.5 / 121e12)
    assert record['mfu_causal'] == pytest.approx((flops - 6 * 2 * 16 * 16) * 6 * 16 / 0.5 / 121e12)
    assert record['peak_memory'] == 7 and 0 < record['predicted_memory'] < 2**20, 'what the allocator counts'
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'NVIDIA L40')
    assert benchmark.describe(args, [], SimpleNamespace(state=state), c, watch)['mfu'] is None


@pytest.mark.slow
def test_each_run_of_a_sweep_is_compiled_as_if_alone(tmp_path: Path) -> None:
    seen: list[Any] = []

    @register_backend
    def recording(graph: Any, inputs: list[Any]) -> Any:
        seen.append([x for x in inputs if isinstance(x, torch.SymInt)])
        return graph.forward

    run(tmp_path / 'out', 'compile_config.backend=recording', 'compile_config.fullgraph=true', 'device_train_microbatch_size=6',
        '--sweep', 'train_loader.dataset.max_seq_len=16,12,8')
    assert seen == [[]] * 6, 'a graph of blocks and one of the loss in each run, and none for any length'


def test_settings_of_the_yamls_own_data_and_weights(tmp_path: Path) -> None:
    [record] = run(tmp_path / 'out', 'load_path=/none', 'load_weights_only=true', 'train_loader.dataset.validate_hash=xxh64',
                   'train_loader.dataset.max_seq_len=8', 'run_name=a|b')
    assert record['seq_len'] == 8 and record['tokens_per_second'] == pytest.approx(6 * 8 / record['ms']['total'] * 1000)
    lines = (tmp_path / 'out.md').read_text().splitlines()
    assert len({re.sub(r'\\\|', '', line).count('|') for line in lines if line[:1] == '|'}) == 1


@pytest.mark.slow
def test_rivals_take_what_the_loader_gives(tokens_root: Path, mds_root: Path, tmp_path: Path) -> None:
    longer = ['train_loader.dataset.max_seq_len=31', 'max_seq_len=31', 'model.max_seq_len=32', 'model.vocab_size=512']
    for argv in ([f'data_remote={tokens_root}', *longer], [f'data_remote={mds_root}', 'model.vocab_size=512']):
        [record] = run(tmp_path / 'out', '--real_data', '--against', 'hf', '--against', 'bare', *argv, '--steps', '1',
                       'train_loader.dataset.group_method=truncate')
        assert set(record['against']) == {'hf', 'bare'}


def test_a_profile_is_a_trace_and_a_table(tmp_path: Path) -> None:
    [record] = run(tmp_path / 'out', '--profile', '--against', 'hf')
    assert 'Optimizer.step#DecoupledAdamW.step' in record['profile'] and '#AdamW.step' not in record['profile']
    assert record['steps'] == 3 and 'aten::addmm' in record['profile'] and 'aten::addmm' in (tmp_path / 'out.md').read_text()
    events = json.loads((tmp_path / 'out.1.trace.json').read_text())['traceEvents']
    assert any('Optimizer.step' in event.get('name', '') for event in events)


def test_real_data(mds_root: Path, tmp_path: Path) -> None:
    [record] = run(tmp_path / 'out', '--real_data', f'data_remote={mds_root}', 'model.vocab_size=512')
    assert record['data'] == 'real'


@pytest.mark.parametrize('argv, message', [
    (['model.n_heads=3'], 'model.n_heads: 3 does not divide'), (['--real_data', 'data_remote=/none'], '/none'),
    (['optimizer.lr=x'], "optimizer.lr: 'x' must be a number")])
def test_mistakes_are_those_of_a_run(argv: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        run(tmp_path / 'out', *argv)
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_two_devices(tmp_path: Path) -> None:
    command = [str(SCRIPTS / 'composer'), '-n', '2', '--master_port', str(free_port()), 'src/tools/benchmark.py', QUICKSTART, *SMALL,
               '--steps', '2', '--warmup', '1', '--out', str(tmp_path / 'out'), 'fsdp_config.sharding_strategy=FULL_SHARD']
    done = warm.run(command, cwd=ROOT, env=clean_env(), timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    [record] = json.loads((tmp_path / 'out.json').read_text())
    assert record['devices'] == 2 and record['global_batch'] == 6 and record['parameters'] == 11_648
    assert 'composer -n 2 src/tools/benchmark.py' in record['command']


@pytest.mark.slow
def test_two_nodes(tmp_path: Path) -> None:
    need_nodes()
    port = str(free_port())
    nodes = [start([str(SCRIPTS / 'composer'), '-n', '1', '--world_size', '2', '--node_rank', str(rank),
                    '--master_addr', '127.0.0.1', '--master_port', port, 'src/tools/benchmark.py', QUICKSTART, *SMALL,
                    '--steps', '2', '--warmup', '1', '--out', str(tmp_path / f'out-{rank}')], {}) for rank in range(2)]
    said = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    [record] = json.loads((tmp_path / 'out-0.json').read_text())
    assert record['devices'] == 2 and not (tmp_path / 'out-1.json').exists()


# ---------------------------------------------------------------- what a step must not do


READS = ('tolist', 'cpu', 'numpy')  # methods of a tensor; `item` and the like are operators


class Watch(Callback):
    """Counts how often the host waits for the device in each batch of a run."""

    def __init__(self) -> None:
        self.mode: Any = None
        self.waits: list[int] = []
        self.graphs: list[int] = []
        self.losses: list[float] = []

    def batch_start(self, state: State, logger: Logger) -> None:
        self.mode = Ops()
        self.mode.__enter__()
        self.read = 0
        for name in READS:
            setattr(torch.Tensor, name, self.counted(getattr(torch.Tensor, name)))

    def counted(self, method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.read += 1
            return method(*args, **kwargs)
        call.method = method  # pyright: ignore[reportFunctionMemberAccess]
        return call

    def batch_end(self, state: State, logger: Logger) -> None:
        self.mode.__exit__(None, None, None)
        for name in READS:
            setattr(torch.Tensor, name, getattr(torch.Tensor, name).method)
        self.waits.append(self.mode.seen['aten::_local_scalar_dense'] + self.mode.seen['aten::nonzero'] + self.read)
        self.graphs.append(counters['stats']['unique_graphs'])
        self.losses.append(float(state.loss))


class Ops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def watched(mds_root: Path, *overrides: str) -> Watch:
    watch = Watch()
    quiet = ['max_duration=3ba', 'scheduler.t_warmup=1ba', 'eval_loader=null', 'log_to_console=false',
             'callbacks.unigram_baseline=false']
    main.main(config.load([QUICKSTART, *tiny(mds_root, *quiet, *overrides)]), callbacks=[watch]).close()
    return watch


@pytest.mark.parametrize('packing', ['truncate', 'concat'])
def test_the_host_waits_for_no_microbatch(packing: str, mds_root: Path) -> None:
    """On a GPU, reading a number of a microbatch makes the host wait for it."""
    group = f'train_loader.dataset.group_method={packing}'
    one, four = (watched(mds_root, group, f'device_train_microbatch_size={n}').waits for n in (12, 3))
    assert len(one) == 3 and one == four and max(one) <= 12


class WatchGraphs(Watch):
    """Compiled code bypasses the mode that counts operators, so this test does not use the mode."""

    def batch_start(self, state: State, logger: Logger) -> None:
        self.mode = Ops()

    def batch_end(self, state: State, logger: Logger) -> None:
        self.graphs.append(counters['stats']['unique_graphs'])
        self.losses.append(float(state.loss))


COMPILED = {'packed': ['train_loader.dataset.group_method=concat'], 'padded, uneven': ['device_train_microbatch_size=5'],
            'documents': ['model.attn_within_document=true'], 'plain loss': ['model.loss_impl=plain']}
CHECKPOINTED = {'documents, checkpointed': [  # which a model that is compiled as a whole does not have
    'model.attn_within_document=true', 'fsdp_config.sharding_strategy=FULL_SHARD', 'fsdp_config.activation_checkpointing=true']}


@pytest.mark.parametrize('scope, case', [*(('block', case) for case in COMPILED | CHECKPOINTED),
                                         *(pytest.param('model', case, marks=pytest.mark.slow) for case in COMPILED)])
def test_nothing_is_compiled_after_the_first_step(scope: str, case: str, mds_root: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), 'Watch', WatchGraphs)
    overrides = ['model.n_layers=5', 'max_duration=4ba', *(COMPILED | CHECKPOINTED)[case]]
    plain = watched(mds_root, *overrides)
    torch._dynamo.reset()
    counters.clear()
    compiled = watched(mds_root, *overrides, f'compile_config.scope={scope}',
                       'compile_config.backend=aot_eager')
    assert compiled.graphs[0] > 0 and len(set(compiled.graphs)) == 1 and not counters['graph_break']
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-6)
    sizes = 2 if 'device_train_microbatch_size=5' in overrides else 1
    losses = sizes if 'model.loss_impl=plain' not in overrides else 0
    blocks = compiled.graphs[0] - losses
    assert scope == 'model' or blocks <= sizes, 'blocks share one'


def by_lengths(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float, documents: Documents) -> torch.Tensor:
    """Computes the same as the kernels of variable lengths, from the same arguments."""

    def kernel(*qkv: torch.Tensor) -> torch.Tensor:
        index = torch.arange(len(qkv[0]))
        number = torch.searchsorted(documents.cu_seqlens, index, right=True)
        seen = (number[:, None] == number) & (index[:, None] >= index)
        return F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in qkv), seen).transpose(0, 1)  # pyright: ignore

    return call_varlen_kernel(kernel, q, k, v)


def test_lengths_are_counted_for_those_who_take_them_alone(mds_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(attention, 'flash_kernel', lambda *_: ('none', lambda *_: pytest.fail('flash in fp32')))
    chosen = attention.choose_attention('auto', 64, True)
    monkeypatch.undo()
    monkeypatch.setattr(attention, 'choose_attention', lambda *_: chosen)
    monkeypatch.setattr(attention, 'prepare_cu_seqlens', lambda *_: pytest.fail('counted for nothing'))
    watched(mds_root, 'model.attn_within_document=true', 'max_duration=2ba', 'scheduler.t_warmup=1ba')


@pytest.mark.parametrize('scope', ['block', pytest.param('model', marks=pytest.mark.slow)])
def test_one_graph_serves_any_number_of_documents(scope: str, mds_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), 'Watch', WatchGraphs)
    overrides = ['model.attn_within_document=true', 'train_loader.dataset.group_method=concat', 'max_duration=6ba']
    plain = watched(mds_root, *overrides)
    monkeypatch.setattr(attention, 'choose_attention', lambda *_: ('by lengths', by_lengths, attention.prepare_cu_seqlens))
    torch._dynamo.reset()
    counters.clear()
    compiled = watched(mds_root, *overrides, f'compile_config.scope={scope}', 'compile_config.backend=aot_eager')
    assert len(set(compiled.graphs)) == 1 and (scope == 'model' or compiled.graphs[0] == 2), 'of blocks and of the loss'
    breaks = counters['graph_break']
    assert all('prepare_cu_seqlens' in why for why in breaks) and (scope == 'model' or not breaks)
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-6)
