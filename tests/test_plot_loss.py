"""The picture of the loss: drawn from TensorBoard files, refused without them."""

import pytest
from matplotlib import image
from torch.utils.tensorboard import SummaryWriter

from src import plot_loss
from src.errors import UserError


@pytest.fixture
def run(tmp_path):
    with SummaryWriter(str(tmp_path / 'my-run')) as writer:
        for step in range(1, 30):
            writer.add_scalar(plot_loss.TOKENS, 100 * step, step)
            writer.add_scalar(plot_loss.TRAIN, 8 / step, step)
        writer.add_scalar(plot_loss.EVAL, 3.0, 29)
        writer.add_scalar(plot_loss.UNIGRAM, 6.5, 0)
    return tmp_path / 'my-run'


def test_scalars_are_read_back(run):
    scalars = plot_loss.read_scalars(str(run))
    assert scalars[plot_loss.TRAIN][4] == 2.0 and scalars[plot_loss.EVAL] == {29: 3.0} and len(scalars[plot_loss.TOKENS]) == 29


@pytest.mark.parametrize('dark', [False, True])
def test_the_picture_is_drawn_in_both_themes(run, tmp_path, dark):
    out = tmp_path / 'loss.png'
    plot_loss.main([str(run), '--out', str(out), *(['--dark'] if dark else [])])
    pixels = image.imread(out)
    assert pixels.shape[0] > 400 and bool(pixels[0, 0, :3].mean() < 0.5) is dark
    assert len({tuple(p) for p in pixels[::4, ::4, :3].reshape(-1, 3).round(2).tolist()}) > 10  # lines, not a blank page


def test_a_folder_without_logs_is_named(tmp_path):
    with pytest.raises(UserError, match='holds no TensorBoard file.*loggers.tensorboard'):
        plot_loss.read_scalars(str(tmp_path))
