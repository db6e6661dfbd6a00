"""The estimate of GPUs, memory and hours: compares each figure with arithmetic by hand, and with the rule of thumb."""

import re
import runpy
import sys

import pytest
from launch import ROOT, tiny

import main
from src.common.errors import UserError
from src.common.flops import CARDS, USABLE_FRACTION
from src.config import load as config
from src.config.check import check
from src.config.schema import Config
from src.sizing import report as sizing_report
from src.sizing.estimate import C4_TOKENS, Estimate, apply_remedies, device_counts, estimate, peak_memory
from src.sizing.memory import moments, predict
from src.tools import estimate as program

NAMES = ('125m', '350m', '760m', '1b', '3b', '7b', '13b', '30b', '70b')
MODERN = NAMES[:6]
SOME = [name if name == '125m' else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
FEW = 'model.n_layers=4'  # tracing takes time for each block, and for each chunk of the loss
SHORT = 'model.loss_chunk_tokens=65536'


def parsed(name: str, *overrides: str, family: str = 'mosaic_gpt') -> Config:
    return check(config.load([str(ROOT / f'yamls/{family}/{name}.yaml'), *overrides]), {}, 1, True)


def sized(name: str, card: str = 'a100-40gb', *overrides: str, **kwargs) -> Estimate:
    return estimate(parsed(name, *overrides), CARDS[card], **kwargs)


def run(*argv: str) -> list[Estimate]:
    return program.main(program.parse_args([str(arg) for arg in argv]))


# ---------------------------------------------------------------- arithmetic


def test_7b_of_four_blocks_by_hand():
    e = sized('7b', 'a100-40gb', FEW)
    d, layers, rest = 4096, 4, 50257 + 2048 + 2  # embeddings, positions, the last LayerNorm
    block = 12 * d * d + 13 * d
    assert e.n_params == layers * block + rest * d == 1_019_768_832
    assert (e.devices, e.microbatch, e.fits) == (1, 8, True)
    assert e.memory.moment == 'in the backward pass of block 4 of 4'
    gathered = 2 * rest * d + 2 * 2 * block  # in bf16: the root and two blocks
    assert e.memory.weights - 4 * e.n_params == pytest.approx(gathered, rel=1e-4)
    assert e.memory.optimizer == 8 * e.n_params
    assert e.card.usable == 0.95 * 40e9
    assert e.tokens == 63_900 * 1024 * 2048 == 134_008_012_800
    assert e.flops_per_token == 6 * e.n_params + 12 * layers * d * 2048 == 6_521_266_176
    assert e.hours == pytest.approx(134_008_012_800 * 6_521_266_176 / (312e12 * 0.4) / 3600)
    assert sized('7b', 'a100-40gb', FEW, devices=8, mfu=0.5).hours == pytest.approx(e.hours / 8 * 0.4 / 0.5)


def test_tokens_of_other_units():
    assert sized('125m', 'l4', FEW, 'max_duration=5000sp', 'scheduler.t_warmup=0.1dur').tokens == 5000 // 256 * 256 * 2048
    assert sized('125m', 'l4', FEW, 'max_duration=5000tok', 'scheduler.t_warmup=0.1dur').tokens == 5000
    e = sized('125m', 'l4', FEW, 'max_duration=2ep', 'scheduler.t_warmup=0.1dur', 'train_loader.dataset.group_method=truncate')
    assert e.tokens is e.flops is e.hours is None
    assert '2ep depends on the data: set max_duration to a number of batches' in sizing_report.report(e, 2.0)


@pytest.mark.parametrize('card', ['a100-40gb', 'l4'])
@pytest.mark.parametrize('name', SOME)
def test_no_smaller_number_fits_and_no_larger_microbatch(name, card):
    e = sized(name, card)
    limit, batch = USABLE_FRACTION * CARDS[card].memory, e.c.global_train_batch_size
    powers = [n for n in (2**i for i in range(12)) if n <= batch]  # powers of two: only they divide these batches
    assert device_counts(e.c) == powers

    def fits(n: int, microbatch: int) -> bool:
        return predict(e.c, n, True, min(microbatch, batch // n)).total <= limit

    for fewest, microbatch in ((e.fewest_devices, e.c.device_train_microbatch_size), (e.fewest_devices_for_one, 1)):
        assert isinstance(microbatch, int) and fewest and fits(fewest, microbatch)
        assert not any(fits(n, microbatch) for n in powers if n < fewest)
    assert e.fits and e.devices == e.fewest_devices
    assert e.largest_microbatch and fits(e.devices, e.largest_microbatch)
    assert not any(fits(e.devices, m) for m in powers if e.largest_microbatch < m <= batch // e.devices)


def test_a_microbatch_is_never_more_than_a_device_has():
    e = sized('1b', 'a100-40gb', FEW, devices=64)  # 8 samples of the batch of 512, and the YAML's microbatch is 16
    assert (e.microbatch, e.largest_microbatch) == (8, 8)


def test_a_microbatch_of_auto_is_the_largest_that_fits():
    e = sized('1b', 'l4', FEW, 'device_train_microbatch_size=auto')
    assert e.fewest_devices == e.fewest_devices_for_one == 1 and e.microbatch == e.largest_microbatch == 64
    assert peak_memory(e.c, e.card, 1, 128).total > e.card.usable >= peak_memory(e.c, e.card, 1, 64).total


def test_copies_of_the_model_take_whole_groups_of_devices():
    hybrid = ('fsdp_config.sharding_strategy=HYBRID_SHARD', 'fsdp_config.data_parallel_replicate_degree=4')
    e = sized('7b', 'l4', FEW, *hybrid)
    one = sized('7b', 'l4', FEW)
    assert (e.fewest_devices, e.devices) == (4 * (one.fewest_devices or 0),) * 2  # 4 copies
    with pytest.raises(UserError, match='data_parallel_replicate_degree.*the batch of 1024 and .* allow 4, 8, 16, .* devices'):
        sized('7b', 'l4', FEW, *hybrid, devices=2)
    for none in (['fsdp_config.sharding_strategy=HYBRID_SHARD', 'fsdp_config.data_parallel_replicate_degree=3'],
                 [*hybrid, 'fsdp_config.data_parallel_shard_degree=6']):
        with pytest.raises(UserError, match='batch of 1024 and the copies of the model allow no number of devices'):
            sized('7b', 'l4', FEW, *none)
    degree = parsed('7b', *hybrid, 'fsdp_config.data_parallel_shard_degree=8')
    assert device_counts(degree) == [32]


def test_what_does_not_fit_says_what_to_set():
    e = sized('7b', 'l4', FEW, 'fsdp_config.activation_checkpointing=false', devices=2)
    assert not e.fits
    steps = dict(apply_remedies(e))
    assert list(steps) == ['device_train_microbatch_size=1']  # nothing more, because now it fits
    assert steps['device_train_microbatch_size=1'] == peak_memory(e.c, e.card, 2, 1).total <= e.card.usable
    ddp = sized('7b', 'l4', 'model.n_layers=6', 'fsdp_config=null')
    assert (ddp.fewest_devices, ddp.fewest_devices_for_one, ddp.largest_microbatch, ddp.devices) == (None, None, None, 1024)
    assert list(apply_remedies(ddp))[-1][0] == 'fsdp_config.sharding_strategy=FULL_SHARD'
    text = sizing_report.report(ddp)
    assert 'DOES NOT FIT' in text and 'FULL_SHARD: fits' in text and 'with these settings no number of l4 is enough' in text


@pytest.mark.parametrize('name', CARDS)
def test_cards_have_their_labels_memory(name):
    label = re.search(r'(\d+)gb', name)
    assert not label or CARDS[name].memory == int(label[1]) * 1e9


# ---------------------------------------------------------------- the rule of thumb


@pytest.mark.parametrize('name', SOME)
def test_the_rule_of_thumb_is_what_stays_from_step_to_step(name):
    """16 N over all devices, plus copies in low precision that FSDP gathers while blocks compute.

    The copies are not divided among devices, so their part of the memory grows with the number of devices, here up to a
    third. mixed_precision PURE also keeps fp32 weights, so it does not change the memory between steps.
    """
    e = sized(name)
    n, rule = e.devices, 16 * e.n_params
    stays = moments(e.c, n, True, e.microbatch)[-1]
    assert n * (stays.weights + stays.gradients + stays.optimizer) == pytest.approx(rule, rel=1e-5)
    assert 1 <= n * (e.memory.weights + e.memory.gradients + e.memory.optimizer) / rule < 1.34
    # In bf16: the root and up to two blocks; in fp32: autocast's copies of the two norms of a block
    copies = e.memory.weights - stays.weights
    norms = 4 * 4 * e.c.model.d_model
    root, block = 2 * (e.n_params - sum(e.trace.units)), 2 * e.trace.units[0]
    assert root <= copies <= root + 2 * block + norms
    by_rule = e.fewest_by_rule
    assert by_rule and by_rule <= e.devices and by_rule * 40e9 > rule and (by_rule == 1 or by_rule / 2 * 40e9 <= rule)
    other = 'DEFAULT' if name in ('30b', '70b') else 'PURE'
    assert moments(parsed(name, f'fsdp_config.mixed_precision={other}'), n, True, e.microbatch)[-1] == stays


@pytest.mark.parametrize('name', SOME[:len(MODERN)])
def test_a_modern_run_keeps_less_and_fits_on_the_devices_of_its_namesake(name):
    e = estimate(parsed(name, family='modern_gpt'), CARDS['a100-40gb'])
    stays = moments(e.c, e.devices, True, e.microbatch)[-1]
    assert 12 < e.devices * (stays.weights + stays.gradients + stays.optimizer) / e.n_params < 13.3
    row = next(row for row in rows(readme_table()) if row[0] == name)
    assert e.fits and [str(e.devices), str(e.microbatch)] == row[2:4]


@pytest.mark.slow
def test_the_rules_own_example():
    """A GPT-13B needs 8 x A100-40GB or 4 x A100-80GB; with a microbatch of 1 the prediction agrees."""
    for card, n in (('a100-40gb', 8), ('a100-80gb', 4)):
        e = sized('13b', card)
        assert (e.fewest_by_rule, e.fewest_devices_for_one) == (n, n)


# ---------------------------------------------------------------- bytes on disks


@pytest.mark.parametrize('kind', ['full', 'sharded', 'muon'])
def test_a_checkpoint_is_as_large_as_it_says(kind, mds_root, tmp_path):
    argv = tiny(mds_root, 'max_duration=1ba', 'scheduler.t_warmup=0.1dur', 'eval_loader=null', 'model.d_model=128',
                'model.n_layers=4', 'log_to_console=false', 'model.vocab_size=4096', f'save_folder={tmp_path}', 'run_name=a')
    more = {'full': [], 'sharded': ['fsdp_config={}', 'fsdp_config.state_dict_type=sharded'], 'muon': ['optimizer.name=muon']}
    cfg = config.load([str(ROOT / 'yamls/quickstart.yaml'), *argv, *more[kind]])
    main.main(cfg).close()
    e = estimate(check(cfg, {}, 1, True), CARDS['l4'])
    more_numbers = {'sharded': 4096 * 128, 'muon': -4 * 12 * 128**2}.get(kind, 0)  # the embedding again; one moment less
    assert e.n_params > 1e6 and e.checkpoint_bytes == 12 * e.n_params + 4 * more_numbers
    size = sum(p.stat().st_size for p in tmp_path.rglob('*') if p.is_file())
    assert e.checkpoint_bytes < size < 1.04 * e.checkpoint_bytes  # with names, and padding of small tensors


def test_bytes_of_data_and_checkpoints():
    text = sizing_report.report(sized('13b', 'h200', FEW, SHORT, 'save_num_checkpoints_to_keep=3', 'save_folder=a/{run_name}'))
    tokens = 124_000 * 1024 * 2048
    assert f'{2 * tokens / 1e9:.2f} GB' == '520.09 GB' and '520.09 GB' in text
    assert tokens > C4_TOKENS and 'C4 has 1.70e11 tokens (340.00 GB), and longer runs read them again' in text
    n_params = 4 * (12 * 5120**2 + 13 * 5120) + (50257 + 2048 + 2) * 5120
    assert f'the run keeps 3: {3 * 12 * n_params / 1e9:.2f} GB' in text
    kept = f'the run keeps 25: {25 * 12 * n_params / 1e9:.2f} GB, if save_folder is set'  # 124000 / 5000, and the end
    assert kept in sizing_report.report(sized('13b', 'h200', FEW, SHORT))
    assert sized('125m', 'l4', FEW, 'model.vocab_size=100000').token_bytes == 4


# ---------------------------------------------------------------- the program


def rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in table.splitlines() if line.startswith('| ')]


def readme_table() -> str:
    shown = re.search(r'```text\n(\| run .*?)```', (ROOT / 'yamls' / 'README.md').read_text(), re.DOTALL)
    assert shown
    return shown[1]


def test_a_row_of_the_table():
    out = sizing_report.overview({'125m': sized('125m')}, 1.5)
    head, row = rows(out)
    assert head == ['run', 'N', 'GPUs', 'micro', 'GiB', 'max micro', 'min GPUs', '16 N', 'rule', 'tokens', 'FLOPs', 'hours',
                    'cost', 'checkpoint', 'data']
    cost = head.index('cost')
    assert row[cost] == '8 $'  # 5.5 hours x 1.5 $
    assert row[:cost] + row[cost + 1:] == next(row for row in rows(readme_table()) if row[0] == '125m')
    legend = out.split('\n\n')[1]
    assert all(re.search(rf'^{name}  ', legend, re.MULTILINE) for name in head[1:] if name != 'micro')


def test_a_folder_is_a_table_whose_legend_holds_for_each_run(tmp_path, capsys):
    for file, family, vocab_size in (('a', 'mosaic_gpt', 70000), ('b', 'modern_gpt', 50257)):
        text = (ROOT / f'yamls/{family}/125m.yaml').read_text()
        text = re.sub(r'n_layers: \d+', 'n_layers: 1', text).replace('vocab_size: 50257', f'vocab_size: {vocab_size}')
        (tmp_path / f'{file}.yaml').write_text(text)
    modern, mosaic = run(tmp_path, SHORT, 'max_seq_len=256')
    out = capsys.readouterr().out
    table, legend = out.split('\n\n')
    matrices, rest = 4 * 768**2 + 3 * 768 * 2048, (50257 + 3) * 768 + 2 * 64  # three RMSNorms, and two of heads
    assert modern.n_params == matrices + rest and modern.checkpoint_bytes == 8 * matrices + 12 * rest
    assert mosaic.checkpoint_bytes == 12 * mosaic.n_params
    head, *lines = rows(table)
    assert [(line[0], line[head.index('checkpoint')]) for line in lines] == [
        (name, sizing_report.gigabytes(e.checkpoint_bytes)) for name, e in (('b', modern), ('a', mosaic))]  # by size
    assert re.findall(r'^checkpoint +(.*?);', legend, re.MULTILINE) == ['fp32 weights, 4 bytes x N, and the state of the optimizer']
    assert re.findall(r'^data +tokens x (\d) bytes', legend, re.MULTILINE) == ['2', '4']
    assert len(legend.splitlines()) == len(head) - 1  # without `run` and `micro`, and with two lines for `data`
    assert f'; here {modern.checkpoint_bytes / modern.n_params:.3g} bytes x N' in sizing_report.report(modern)


@pytest.mark.slow
def test_the_table_of_all_is_in_the_readme(capsys):
    run()
    out = capsys.readouterr().out
    assert tuple(row[0] for row in rows(out)[1:]) == NAMES
    assert {len(line) for line in out.splitlines() if line.startswith('|')} == {len(out.splitlines()[0])}
    assert readme_table() == out


def test_one_yaml_is_a_report(capsys):
    yaml = ROOT / 'yamls/mosaic_gpt/7b.yaml'
    e, = run(yaml, '--gpus', 64, '--mfu', 0.5, '--price', 2, 'device_train_microbatch_size=4', FEW)
    out = capsys.readouterr().out
    assert e == estimate(parsed('7b', 'device_train_microbatch_size=4', FEW), CARDS['a100-40gb'], 64, 0.5)
    figures = {'parameters N': '1,019,768,832', 'rule of thumb': '16.32 GB', 'devices': '64', 'tokens': '1.34e11',
               'fewest devices': '1', 'cost': f'{e.hours * 64 * 2:,.0f} $', 'largest microbatch': '16'}
    for what, figure in figures.items():
        assert re.search(rf'^{what} +{re.escape(figure)}   ', out, re.MULTILINE), what
    for name, size in {**e.memory._asdict(), 'moment': e.memory.total}.items():
        assert re.search(rf'^  {name.replace("moment", "peak")} +{sizing_report.gib(size)}   ', out, re.MULTILINE)


def test_settings_without_a_yaml_are_for_all(monkeypatch):
    monkeypatch.setattr(program, 'estimate', lambda c, *_: sized('125m', 'a100-40gb', FEW)._replace(c=c))
    assert {e.c.device_train_microbatch_size for e in run('device_train_microbatch_size=2')} == {2}


@pytest.mark.parametrize('argv, message', {
    'mfu': (['--mfu', '1.5'], '--mfu: 1.5 must be above 0 and at most 1'),
    'no mfu': (['--mfu', 'nan'], '--mfu: nan must be above 0'),
    'price': (['--price', '-1'], '--price: -1 must be a number of dollars, 0 or more'),
    'gpus': (['yamls/mosaic_gpt/7b.yaml', '--gpus', '3'], '1024 does not divide by 3 devices; set 1023 or 1026'),
    'one of all': (['--gpus', '512'], '125m.yaml: .*\n.*256 does not divide by 512 devices'),
    'key': (['yamls/mosaic_gpt/7b.yaml', 'model.d_modle=3'], 'model.d_modle: no such key'),
    'yaml': (['yamls/mosaic_gpt/8b.yaml'], 'no such file. Did you mean'),
    'empty folder': (['tests'], '^tests: this folder has no YAML; name a file'),
}.values(), ids=['mfu', 'no mfu', 'price', 'gpus', 'one of all', 'key', 'yaml', 'empty folder'])
def test_mistakes(argv, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=message):
        run('--mfu', 0.4, *argv)


def test_an_unknown_gpu(capsys):
    with pytest.raises(SystemExit):
        run('--gpu', 'tpu')
    assert "--gpu: invalid choice: 'tpu'" in capsys.readouterr().err


def test_a_mistake_is_one_message(monkeypatch):
    monkeypatch.setattr(sys, 'path', [*sys.path])
    monkeypatch.setattr(sys, 'argv', ['src/tools/estimate.py', '--mfu', '2'])
    with pytest.raises(SystemExit, match='^error: --mfu: 2 must be [^\n]*$'):
        runpy.run_path(str(ROOT / 'src/tools/estimate.py'), run_name='__main__')


def test_every_yaml_is_there():
    for folder, names in (('mosaic_gpt', NAMES), ('modern_gpt', (*MODERN, 'quickstart'))):
        assert sorted(names) == sorted(p.stem for p in (ROOT / 'yamls' / folder).glob('*.yaml'))
