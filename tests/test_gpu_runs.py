"""Whole runs on a GPU, started and stopped as users do; skipped without a GPU."""

import gc
import os

import pytest
import torch
from launch import ranks, tiny
from runs import train
from test_benchmark import QUICKSTART, WatchGraphs
from test_benchmark import run as timed
from test_evaluate import argv as evaluation
from test_export_hf import fine_tuning
from test_quickstart import learns_the_sample
from test_stop import (  # noqa: F401  (the same tests, with a GPU)
    test_a_loss_that_is_no_number_ends_the_run_with_the_last_whole_checkpoint,
    test_a_signal_ends_the_run_with_its_batch_saved,
)
from torch._dynamo.utils import counters

import main
from src.config import load as config
from src.tools import evaluate, generate
from src.tools.stopwatch import PARTS

pytestmark = pytest.mark.gpu
VISIBLE = os.environ.get('CUDA_VISIBLE_DEVICES', '0')  # `clean_env` hides it


@pytest.mark.timeout(1500)
def test_the_quick_start_learns_the_sample(tmp_path):
    learns_the_sample(tmp_path, CUDA_VISIBLE_DEVICES=VISIBLE)


@pytest.mark.parametrize('launcher', [False, True], ids=['in this process', 'by the launcher'])
def test_a_resumed_run_ends_with_the_weights_of_one_that_never_stopped(mds_root, tmp_path, launcher):
    """Equal to the bit, with dropout, so the GPU's random state resumes too. Plain attention sums in a fixed order."""
    argv = tiny(mds_root, 'model.attn_impl=torch', 'model.resid_pdrop=0.1', 'run_name=one', f'save_folder={tmp_path}/save',
                'save_interval=10ba', 'eval_loader=null')

    def run(*more):
        if launcher:
            return ranks(1, {'run': [QUICKSTART, *argv, *more]}, tmp_path, CUDA_VISIBLE_DEVICES=VISIBLE)['run']
        return train(QUICKSTART, *argv, *more)

    whole = run()
    (tmp_path / 'save/ep0-ba20.json').unlink()
    rest = run('autoresume=true')
    assert sorted(rest['losses']) == list(range(10, 20))
    assert all(torch.equal(rest['weights'][name], weight) for name, weight in whole['weights'].items())


PACKED, WITHIN = 'train_loader.dataset.group_method=concat', 'model.attn_within_document=true'


@pytest.mark.parametrize('scope', ['block', 'model'])
@pytest.mark.parametrize('overrides', [[PACKED], ['device_train_microbatch_size=5'], [PACKED, WITHIN],
                                       [PACKED, WITHIN, 'model.attn_impl=sdpa'], ['model.loss_impl=plain']],
                         ids=['packed', 'padded, uneven', 'documents', 'documents, sdpa', 'plain loss'])
def test_nothing_is_compiled_after_the_first_step(mds_root, scope, overrides):
    seen = []
    for compiled in ([], [f'compile_config.scope={scope}']):
        watch = WatchGraphs()
        argv = tiny(mds_root, 'model.attn_impl=flash', 'max_duration=6ba', 'eval_loader=null', *overrides, *compiled)
        main.main(config.load([QUICKSTART, *argv]), callbacks=[watch]).close()
        seen.append(watch)
    plain, compiled = seen
    assert compiled.graphs[0] > 0 and len(set(compiled.graphs)) == 1
    if scope == 'block':
        sizes = 1 + ('device_train_microbatch_size=5' in overrides)
        assert compiled.graphs[0] <= sizes * (2 - ('model.loss_impl=plain' in overrides)), 'of blocks and of the loss'
    assert all(scope == 'model' and 'prepare_cu_seqlens' in why for why in counters['graph_break'])
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-2)


@pytest.mark.parametrize('overrides', [[], ['fsdp_config.sharding_strategy=FULL_SHARD', 'fsdp_config.version=2']],
                         ids=['plain', 'fsdp2'])
def test_hugging_face_models_train_as_on_a_cpu(mds_root, tmp_path, overrides):
    shape = {'model_type': 'gpt2', 'n_layer': 2, 'n_embd': 16, 'n_head': 2, 'n_positions': 32, 'vocab_size': 512,
             'resid_pdrop': 0.0, 'embd_pdrop': 0.0, 'attn_pdrop': 0.0}
    argv = fine_tuning(mds_root, 'model.pretrained_model_name_or_path=null', 'precision=fp32', 'save_folder=null',
                       *(f'model.config_overrides.{key}={value}' for key, value in shape.items()))
    on_cpu, got = ranks(1, {'hf': argv}, tmp_path)['hf'], train(*argv, *overrides)
    assert len(got['losses']) == 4 and got['losses'] == pytest.approx(on_cpu['losses'], rel=1e-3)


@pytest.mark.parametrize('overrides', [[], ['compile_config={}'],
                                       ['compile_config={}', 'fsdp_config.sharding_strategy=FULL_SHARD'],
                                       ['fsdp_config.sharding_strategy=FULL_SHARD', 'fsdp_config.version=2']],
                         ids=['plain', 'compiled', 'compiled, fsdp1', 'fsdp2'])
def test_linear_layers_in_8_bits_learn_as_those_in_16(mds_root, overrides):
    pytest.importorskip('torchao')
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip('no matrix products in 8 bits')
    argv = tiny(mds_root, 'model.d_model=64', 'eval_loader=null', *overrides)
    plain, eight = (train(QUICKSTART, *argv, f'model.linear_impl={impl}')['losses'] for impl in ('plain', 'fp8'))
    assert not any('compile' in key for key in overrides) or counters['stats']['unique_graphs'] > 0
    differences = [abs(eight[n] - plain[n]) for n in plain]
    assert plain[19] < plain[0] - 0.1 and 0 < max(differences) < 0.05


def test_a_batch_that_no_memory_holds_ends_in_one_message(mds_root, tmp_path, capfd):
    """The run ends with one message, and writes a record of the memory."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_allocated() + (1 << 30)) / total))
    try:
        argv = tiny(mds_root, 'device_train_microbatch_size=256', 'global_train_batch_size=256', 'model.vocab_size=65536',
                    'model.loss_impl=plain', 'max_duration=4ba', 'eval_loader=null', 'scheduler.t_warmup=1ba',
                    f'callbacks.oom_observer={{folder: {tmp_path}}}')
        assert main.cli([QUICKSTART, *argv]) == 1
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    text = capfd.readouterr().err
    assert text.count('error: out of memory: ') == 1 and 'Traceback' not in text
    assert 'device_train_microbatch_size: 256; set 128' in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ['rank0_oom.pickle', 'rank0_oom.segment.html',
                                                                'rank0_oom.trace.html']


def test_what_looks_into_a_run_writes_its_files_and_changes_no_loss(mds_root, tmp_path, monkeypatch):
    argv = tiny(mds_root, 'eval_loader=null', 'model.attn_impl=torch')
    without = train(QUICKSTART, *argv)
    monkeypatch.chdir(tmp_path)  # the folders are relative to it
    with_them = train(QUICKSTART, *argv, 'callbacks.memory_snapshot={skip_batches: 2}', 'callbacks.profiler={}',
                      'run_name=one')
    assert with_them['losses'] == without['losses']
    assert {path.suffix for path in (tmp_path / 'one').rglob('*memory_snapshot*')} == {'.pickle', '.html'}
    trace = next((tmp_path / 'traces/one').rglob('*.pt.trace.json')).read_text()
    assert '"cat": "kernel"' in trace and '"name": "backward"' in trace


def test_a_checkpoint_is_evaluated_and_continued_as_on_a_cpu(mds_root, tmp_path, capsys, monkeypatch):
    train(QUICKSTART, *tiny(mds_root, f'save_folder={tmp_path}', 'precision=fp32'))
    checkpoint = str(tmp_path / 'ep0-ba20-rank0.pt')
    figures = evaluation(mds_root, f'load_path={checkpoint}', 'precision=fp32')
    on_cpu = ranks(1, {'figures': ['src/tools/evaluate.py', *figures]}, tmp_path)['figures']
    got = evaluate.main(evaluate.parse_args(figures))
    assert all(got[key] == pytest.approx(on_cpu[key], rel=1e-4) for key in ('loss', 'perplexity', 'bits_per_byte', 'tokens'))
    said = []
    for has_gpu in (True, False):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda has_gpu=has_gpu: has_gpu)
        capsys.readouterr()
        generate.main(generate.parse_args([checkpoint, 'The river', '--temperature', '0', '--max_new_tokens', '8']))
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and said[0].startswith('The river')


def test_a_benchmark_times_its_rivals_on_the_same_gpu(tmp_path):
    argv = ['model.d_model=128', 'max_seq_len=64', '--against', 'hf', '--against', 'bare', '--profile']
    [record] = timed(tmp_path / 'out', *argv)
    assert set(record['against']) == {'hf', 'bare'} and all(ms > 0 for ms in record['against'].values())
    assert all(record['ms'][part] > -0.05 * record['ms']['total'] for part in PARTS)
    assert record['device'] == torch.cuda.get_device_name() and 'CUDA' in record['profile']
