"""The page of a run: whole, alone, escaped, and as a browser shows it."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib import image
from matplotlib import pyplot as plt

from src.tools import html_report, plot_loss
from src.tools.curves import positions
from src.tools.run_logs import EVAL, SAMPLES, SECONDS, TOKENS, TRAIN, UNIGRAM, Run

BROWSER = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
EVIL = '</blockquote><script>document.body.innerHTML = "taken"</script><img src=x onerror="alert(1)">'


def a_page(**change: object) -> str:
    steps = range(20)
    scalars = {TRAIN: {i: 8.0 / (i + 1) for i in steps}, TOKENS: {i: 1000.0 * i for i in range(21)},
               SAMPLES: {i: 8.0 * i for i in steps}, EVAL: {0: 8.5, 20: 0.75}, UNIGRAM: {0: 6.5},
               'lr-DecoupledAdamW/group0': dict.fromkeys(steps, 1e-3), 'trainer/grad_norm': dict.fromkeys(steps, 0.5),
               'throughput/tokens_per_sec': {i + 1: 1000.0 + i for i in steps}, SECONDS: {i + 1: i / 60 for i in steps}}
    run = Run('a <b> & $c$', (Path('a'),), scalars, {
        'model': {'name': 'mosaic_gpt', 'd_model': 16}, 'optimizer': {'lr': 3e-4}, 'loggers': {'wandb': {'api_key': 'hunter2'}},
        'environment': {'n_params': 123456, 'torch': '2.7.0', 'devices': 8}, 'composer_version': '0.32.1'},
        {0: [{'prompt': 'The', 'text': ' q\n<i>'}], 20: [{'prompt': 'Once', 'text': EVIL}]})
    run = run._replace(**change)
    with plt.rc_context(html_report.STYLE):
        return html_report.page(run, plot_loss.draw([run]), positions(run, 'tokens'))


class Reader(HTMLParser):
    """Tags with what they refer to, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.refers: list[str] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.refers += [str(value) for key, value in attrs if key in ('src', 'href', 'xlink:href', 'srcset', 'data', 'action')]
        assert not any(key.startswith('on') for key, _ in attrs), attrs

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_loads_nothing_and_runs_nothing():
    page = a_page()
    reader = Reader(page)
    assert not {'script', 'img', 'link', 'iframe', 'object', 'embed', 'i'} & set(reader.tags) and reader.tags.count('svg') == 4
    assert reader.refers and all(ref.startswith('#') for ref in reader.refers), 'clip paths of the pictures alone'
    assert 'http' not in page.replace('http-equiv', '') and '@import' not in page
    references = re.findall(r'url\(["\']?([^)]*)', page)
    assert len(references) > 2 and all(reference.startswith('#') for reference in references)


def test_the_page_has_what_the_logs_have():
    page = a_page()
    text = ' '.join(Reader(page).text)
    assert EVIL in text and ' q\n<i>' in text, 'as text'
    for part in ('a <b> & $c$', '123,456', 'batch 20, 20,000 tokens, evaluation loss 0.7500', 'd_model: 16', 'lr: 0.0003',
                 "api_key: '***'", '2.7.0', 'composer_version', '0.32.1', 'learning rate', 'tokens per second',
                 'gradient norm', 'throughput/tokens_per_sec', 'loss (nats per token)'):
        assert part in text, part
    assert 'hunter2' not in text
    median = next(line for line in page.split('<tr>') if 'throughput/tokens_per_sec' in line)
    assert [cell.split('<')[0] for cell in median.split('"number">')[1:]] == ['1,010', '1,000', '1,019', '1,019']


def test_a_run_without_evaluation_samples_or_config_says_so():
    bare = {TRAIN: {0: float('inf'), 1: 2.0}, TOKENS: {0: 0.0, 1: 10.0}}
    text = ' '.join(Reader(a_page(scalars=bare, hparams={}, samples={})).text)
    for part in ('none: callbacks.text_samples', 'not in these logs', 'train with callbacks.speed_monitor={}'):
        assert part in text, part


@pytest.mark.skipif(BROWSER is None, reason='no chromium')
def test_a_browser_shows_it_in_both_themes(tmp_path):
    assert BROWSER
    (tmp_path / 'page.html').write_text(a_page())
    for scheme, dark in ((0, True), (1, False)):
        shot = tmp_path / f'{scheme}.png'
        command = [BROWSER, '--headless', '--no-sandbox', '--disable-gpu', '--hide-scrollbars', '--window-size=1200,2400',
                   f'--user-data-dir={tmp_path}/profile', f'--blink-settings=preferredColorScheme={scheme}',
                   f'--screenshot={shot}', f'file://{tmp_path}/page.html']
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        pixels = image.imread(shot)[..., :3]
        assert pixels.shape[:2] == (2400, 1200) and bool(pixels[0, 0].mean() < 0.5) is dark
        ink = abs(pixels - pixels[0, 0]).max(-1) > 0.3
        assert ink[:, 100:1100].any(1)[:2000].mean() > 0.3, 'text and curves down the page: no script has taken it'
        blue = (pixels[..., 2] > pixels[..., 0] + 0.3).sum()
        assert blue > 300, 'the curves'
