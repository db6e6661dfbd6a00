"""Loss curves: both kinds of logs of a run give the same curve, and the picture shows the right numbers."""

import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from launch import tiny
from matplotlib import image
from matplotlib import pyplot as plt
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter

import main
from src.checkpoints.manifest import list_manifests
from src.common.errors import UserError
from src.common.storage import LocalFolder
from src.tools import plot_loss, run_logs
from src.tools.plot_loss import curve, envelope, smoothed
from src.tools.run_logs import DEVICES, EVAL, SAMPLES, SECONDS, TOKENS, TRAIN, UNIGRAM, Run, read_run

QUICKSTART = 'yamls/quickstart.yaml'
HPARAMS = {'train_loader': {'dataset': {'max_seq_len': 10}}, 'environment': {'flops_per_token': 6.0}}


def a_run(losses: list[float], name: str = 'a', samples: int = 2, **more: dict[int, float]) -> Run:
    """A run with one loss for each batch of `samples` samples; half of the tokens are padding."""
    scalars = {TRAIN: dict(enumerate(losses)), TOKENS: {i: 5.0 * samples * i for i in range(len(losses) + 1)},
               SAMPLES: {i: float(samples * i) for i in range(len(losses) + 1)}}
    return Run(name, Path(name), scalars | more, HPARAMS)


def plot(*argv: object) -> None:
    plot_loss.main(plot_loss.parse_args([str(arg) for arg in argv]))


@pytest.fixture
def run(tmp_path):
    """TensorBoard files without hyperparameters, as older runs have them."""
    with SummaryWriter(str(tmp_path / 'my-run')) as writer:
        for step in range(1, 30):
            writer.add_scalar(TOKENS, 100 * step, step)
            writer.add_scalar(TRAIN, 8 / step, step)
        writer.add_scalar(EVAL, 3.0, 29)
        writer.add_scalar(UNIGRAM, 6.5, 0)
    return tmp_path / 'my-run'


@pytest.fixture(scope='module')
def logs(mds_root, tmp_path_factory):
    """A run with both loggers that ended after batch 12, lost all checkpoints but that of batch 5, and resumed."""
    folder = tmp_path_factory.mktemp('logs')
    argv = tiny(mds_root, 'run_name=one', 'autoresume=true', f'save_folder={folder}/save', 'save_interval=5ba',
                'save_num_checkpoints_to_keep=-1', 'eval_interval=6ba', f'loggers.tensorboard.log_dir={folder}/tb',
                f'loggers.file.filename={folder}/log.txt', 'log_to_console=false')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('torch.cuda.is_available', lambda: False)
        assert main.cli([QUICKSTART, *argv, 'max_duration=12ba']) == 0
        newest = next(list_manifests(LocalFolder(folder / 'save')))
        assert newest.batch == 12
        for path in (folder / 'save').glob('ep0-ba1*'):
            path.unlink()
        assert main.cli([QUICKSTART, *argv, 'max_duration=15ba', 'optimizer.lr=0.1']) == 0
    return folder


# ---------------------------------------------------------------- reading


def test_two_logs_of_one_run_are_one_run(logs):
    board, file = read_run(f'{logs}/tb'), read_run(f'{logs}/log.txt')
    assert (board.name, file.name) == ('one', 'log')
    for name, values in file.scalars.items():
        assert list(board.scalars[name]) == list(values), name
        assert list(board.scalars[name].values()) == pytest.approx(list(values.values()), rel=1e-6), name
    assert list(file.scalars[TRAIN]) == list(range(15)) and list(file.scalars[EVAL]) == [0, 6, 12, 15]
    for hparams in (board.hparams, file.hparams):
        assert hparams['optimizer'] == file.hparams['optimizer'] and hparams['optimizer']['lr'] == 0.1, 'of the last start'
        assert hparams['environment'] == file.hparams['environment']
    for x in ('tokens', 'flops', 'device-days'):
        assert all(np.allclose(a, b, rtol=1e-6) for a, b in zip(curve(board, x), curve(file, x))), x


def test_a_later_start_replaces_what_came_after_its_checkpoint(logs):
    first, second = ((logs / name).read_text() for name in ('log.txt', 'log.2.txt'))
    losses = read_run(f'{logs}/tb').scalars[TRAIN]
    def logged(text: str, batch: int) -> float:
        return float(text.split(f'[metric][batch={batch}]: {TRAIN}: ')[1].split()[0])
    assert losses[4] == pytest.approx(logged(first, 4), rel=1e-6) and '[metric][batch=4]' not in second
    assert losses[11] == pytest.approx(logged(second, 11), rel=1e-6) and losses[11] != pytest.approx(logged(first, 11), rel=1e-6)


def test_a_start_that_has_not_come_as_far_ends_the_curve(tmp_path):
    def lines(start: int, end: int, loss: float) -> str:
        return f'[metric][batch={start}]: {DEVICES}: 2\n' + ''.join(
            f'[metric][batch={i}]: {TOKENS}: {i}\n[metric][batch={i}]: {TRAIN}: {loss}\n' for i in range(start, end))
    (tmp_path / 'log.txt').write_text(lines(0, 9, 4.0))
    (tmp_path / 'log.2.txt').write_text(lines(5, 7, 3.0) + '[metric][batch=7]: loss/tr')
    assert read_run(str(tmp_path)).scalars[TRAIN] == {0: 4.0, 1: 4.0, 2: 4.0, 3: 4.0, 4: 4.0, 5: 3.0, 6: 3.0}
    assert read_run(str(tmp_path / 'log.2.txt')).scalars == read_run(str(tmp_path)).scalars


def test_a_file_that_is_being_written_is_read_as_far_as_it_goes(logs, tmp_path):
    whole = max(logs.glob('tb/one/events*'), key=lambda path: path.stat().st_size)
    (tmp_path / whole.name).write_bytes(whole.read_bytes()[:-7])
    assert len(read_run(str(tmp_path)).scalars[TRAIN]) >= 2


@pytest.mark.parametrize(('name', 'content', 'message'), [
    ('', b'', 'holds no logs of TensorBoard or the file logger; train with loggers.tensorboard.log_dir'),
    ('notes.txt', b'nothing', 'holds no logs'),
    ('events.out.tfevents.1', b'no such record, but long enough for a header', 'cannot be read as a log'),
    ('log.txt', b'[metric][batch=0]: lr: 1.0\n', 'has no loss/train/total: the run has not logged a batch yet'),
], ids=['empty', 'notes', 'tensorboard', 'no loss'])
def test_what_is_no_log_is_one_message(tmp_path, name, content, message):
    if name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        plot(tmp_path, '--out', tmp_path / 'loss.png')


def test_a_damaged_or_unreadable_log_is_said(tmp_path, monkeypatch, capsys):
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar(TRAIN, 1.0, 1)
    [file] = tmp_path.iterdir()
    with open(file, 'ab') as damaged:
        RecordWriter(damaged).write(b'no event')  # a record with correct checksums
    assert read_run(str(tmp_path)).scalars[TRAIN] == {1: 1.0}
    assert re.fullmatch(f'{file}: damaged or incomplete after [0-9]+ records; later records are left out\n', capsys.readouterr().err)

    def no_open(*args):
        raise PermissionError(13, 'Permission denied')
    log = a_log(tmp_path / 'log.txt', 4.0)
    monkeypatch.setattr(run_logs, 'open', no_open, raising=False)
    with pytest.raises(UserError, match='log.txt: cannot be read: Permission denied'):
        read_run(str(log))


def test_a_folder_of_several_runs_asks_which(tmp_path):
    for name in ('a', 'b'):
        with SummaryWriter(str(tmp_path / name)) as writer:
            writer.add_scalar(TRAIN, 1.0, 1)
    with pytest.raises(UserError, match=r'holds 2 runs; name one or more of them: .*/a, .*/b'):
        read_run(str(tmp_path))


def test_of_a_folder_with_the_files_of_two_runs_one_is_read_by_its_name(tmp_path):
    for loss in (1.0, 2.0):
        with SummaryWriter(str(tmp_path), filename_suffix=f'.{loss:g}') as writer:
            writer.add_scalar(TRAIN, loss, 1)
    for file in tmp_path.iterdir():
        assert read_run(str(file)).scalars[TRAIN] == {1: float(file.suffix[1:])}
    assert len(plot_loss.read_runs([str(file) for file in tmp_path.iterdir()])) == 2


# ---------------------------------------------------------------- numbers


def test_smoothing_is_the_mean_around_each_batch():
    assert smoothed(np.array([1.0, 2.0, 6.0, 3.0]), 3) == pytest.approx([1.5, 3.0, 11 / 3, 4.5])
    assert smoothed(np.array([1.0, 2.0, 6.0, 3.0]), 1) == pytest.approx([1, 2, 6, 3])
    assert smoothed(np.array([1.0, float('nan'), float('inf'), 5.0]), 3) == pytest.approx([1, 1, 5, 5])
    assert np.isnan(smoothed(np.array([float('nan'), 1.0]), 1)[0])


def test_flops_are_of_all_tokens_padding_too():
    run = a_run([4.0, 3.0, 2.0], samples=2, **{EVAL: {3: 2.5, 9: 2.0}})
    assert list(run.positions('flops').values()) == [0, 120, 240, 360]  # 2 samples * 10 tokens * 6
    assert run.positions('tokens') == {0: 0, 1: 10, 2: 20, 3: 30}
    drawn = curve(run, 'flops', 3)
    assert drawn.x.tolist() == [0, 120, 240] and drawn.smooth.tolist() == [3.5, 3.0, 2.5]
    assert drawn.eval_x.tolist() == [360, 1080] and drawn.eval_loss.tolist() == [2.5, 2.0]


@pytest.mark.parametrize(('unit', 'day'), [('hours', 24), ('seconds', 86400)])
def test_device_days_count_the_devices_of_each_start(unit, day):
    seconds = {1: 1.0 * day, 2: 2.0 * day, 3: 4.0 * day, 4: 5.0 * day}
    run = a_run([4.0, 3.0, 2.0, 1.0], **{SECONDS: seconds, DEVICES: {0: 8, 2: 2}})
    run = run._replace(hparams={'callbacks': {'speed_monitor': {'time_unit': unit} if unit != 'hours' else None}})
    assert run.positions('device-days') == {0: 0, 1: 8, 2: 16, 3: 20, 4: 22}
    assert curve(run, 'device-days').x.tolist() == [0, 8, 16, 20]


def test_the_envelope_is_the_lowest_loss_for_each_compute():
    small, large = a_run([4.0, 3.0, 2.9, 2.95], samples=1), a_run([5.0, 3.5, 2.0, float('nan')], 'b', samples=2)
    x, loss = envelope([curve(small, 'flops'), curve(large, 'flops')])
    assert dict(zip(x.tolist(), loss.tolist())) == pytest.approx({0: 4.0, 60: 3.0, 120: 2.9, 240: 2.0})


def test_what_is_drawn_is_these_numbers():
    runs = [a_run([4.0, 3.0, 2.0], **{EVAL: {3: 2.5}, UNIGRAM: {0: 6.5}}), a_run([5.0, float('nan'), 1.0], 'b')]
    axes = plot_loss.draw(runs, 'flops', log=True, smooth=3, with_envelope=True).axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert lines['a, training'].get_ydata() == pytest.approx([3.5, 3.0, 2.5])
    assert lines['b, training'].get_ydata() == pytest.approx([5.0, 3.0, 1.0])
    assert lines['compute-optimal envelope'].get_ydata() == pytest.approx([3.5, 3.0, 1.0])
    assert lines['a, evaluation'].get_xydata().tolist() == [[360, 2.5]]
    assert lines['unigram entropy 6.50'].get_ydata() == [6.5, 6.5]
    raw = [line for line in axes.lines if line.get_alpha() == 0.4]
    assert raw[0].get_ydata().tolist() == [4, 3, 2] and raw[0].get_color() == lines['a, training'].get_color() == 'C0'
    assert raw[0].get_zorder() <= lines['a, training'].get_zorder() and axes.lines.index(raw[0]) < axes.lines.index(
        lines['a, training'])
    assert (axes.get_xscale(), axes.get_yscale(), axes.get_xlabel()) == ('log', 'log', 'training FLOPs')
    alone = plot_loss.draw(runs[:1], y='train').axes[0]
    assert {line.get_label() for line in alone.lines} == {'a, training', 'unigram entropy 6.50'}
    plt.close('all')


@pytest.mark.parametrize(('run', 'options', 'message'), [
    (a_run([float('nan')] * 3), {}, 'a: none of its 3 training losses is a finite number'),
    (a_run([1.0]), {'y': 'eval'}, 'a: no evaluation is logged; use --y train'),
    (a_run([1.0]), {'log': True}, 'a: no point has tokens above 0'),
    (a_run([1.0])._replace(hparams={}), {'x': 'flops'}, 'a: its logs have no environment.flops_per_token, which --x flops needs'),
    (a_run([1.0]), {'x': 'device-days'}, 'a: its logs have no time/train, .*speed_monitor'),
    (a_run([1.0], **{SECONDS: {1: 2.0}}), {'x': 'device-days'}, 'a: its logs have no trainer/devices'),
], ids=['nan', 'no evaluation', 'one point at 0', 'no flops', 'no time', 'no devices'])
def test_what_cannot_be_drawn_is_said(run, options, message):
    with pytest.raises(UserError, match=message):
        plot_loss.draw([run], **options)
    plt.close('all')


def test_a_name_is_no_maths_and_is_not_hidden():
    axes = plot_loss.draw([a_run([2.0, 1.0], '_a$b$')]).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [r' _a\$b\$, training']
    plt.close('all')


def test_a_single_point_is_seen():
    axes = plot_loss.draw([a_run([2.0])]).axes[0]
    assert axes.lines[0].get_marker() == 'o' and axes.lines[0].get_ydata() == [2.0]
    plt.close('all')


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize('theme', ['light', 'dark', 'both'])
def test_the_picture_is_drawn_in_both_themes(run, tmp_path, theme):
    plot(run, '--out', tmp_path / 'loss.png', '--theme', theme)
    names = ['loss-dark.png', 'loss-light.png'] if theme == 'both' else ['loss.png']
    assert sorted(path.name for path in tmp_path.glob('*.png')) == names
    for name in names:
        pixels = image.imread(tmp_path / name)
        assert pixels.shape[0] > 400 and bool(pixels[0, 0, :3].mean() < 0.5) is ('dark' in name or theme == 'dark')
        assert len({tuple(p) for p in pixels[::4, ::4, :3].reshape(-1, 3).round(2).tolist()}) > 10  # lines, not a blank page
    assert matplotlib.rcParams['figure.facecolor'] == matplotlib.rcParamsDefault['figure.facecolor'], 'of the process, as it was'


def test_several_runs_and_svg(run, logs, tmp_path, capsys):
    plot(run, f'{logs}/log.txt', f'{logs}/log.2.txt', '--out', tmp_path / 'loss.svg', '--smooth', 3)
    assert capsys.readouterr().out == f'{tmp_path}/loss.svg: loss of my-run, log\n', 'two starts are one run'
    assert '<svg' in (tmp_path / 'loss.svg').read_text()


@pytest.mark.parametrize(('argv', 'message'), [
    (['--out', '{tmp}/none/loss.png'], '--out: .*none/loss.png cannot be written: No such file or directory'),
    (['--out', '{tmp}/loss'], r'--out: .*loss; the ending must be one of .png, .svg, .pdf'),
    (['--out', '{tmp}/loss.gif'], r'--out: .*loss.gif; the ending must be one of .png, .svg, .pdf'),
    (['--envelope'], '--envelope: needs --x flops, and --x is tokens'),
    (['{tmp}/nothing'], 'nothing: no such file or folder'),
], ids=['no folder', 'no ending', 'no format', 'envelope of tokens', 'no run'])
def test_mistakes_of_the_command_line(run, tmp_path, argv, message):
    with pytest.raises(UserError, match=message):
        plot(run, *(arg.format(tmp=tmp_path) for arg in argv))


# ---------------------------------------------------------------- several runs


def a_log(path: Path, loss: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(f'[metric][batch={i}]: {TOKENS}: {i}\n[metric][batch={i}]: {TRAIN}: {loss}\n' for i in range(3)))
    return path


def test_runs_of_one_name_are_told_apart(tmp_path, capsys):
    first, second = a_log(tmp_path / 'a/log.txt', 4.0), a_log(tmp_path / 'b/log.txt', 5.0)
    plot(first, second, '--out', tmp_path / 'loss.png')
    assert f'loss of {first}, {second}\n' in capsys.readouterr().out


def test_numbered_logs_without_a_first_are_runs_of_their_own(tmp_path):
    logs = [a_log(tmp_path / f'seed.{i}.txt', i) for i in (1, 2)]
    assert [read_run(str(log)).scalars[TRAIN][0] for log in logs] == [1, 2]
    a_log(tmp_path / 'seed.txt', 3)
    assert read_run(str(logs[1])).name == 'seed', 'its second start'


def test_of_several_runs_one_that_cannot_be_drawn_is_left_out(tmp_path, capsys):
    good, died = a_log(tmp_path / 'good.txt', 4.0), tmp_path / 'died.txt'
    died.write_text(f'[metric][batch=0]: {DEVICES}: 1\n')
    plot(good, died, '--out', tmp_path / 'loss.png')
    said = capsys.readouterr()
    assert 'loss of good\n' in said.out and said.err.startswith(f'left out: {died}: has no {TRAIN}')
    with pytest.raises(UserError, match='has no loss/train/total'):
        plot(died, '--out', tmp_path / 'loss.png')
