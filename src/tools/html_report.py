"""One run as one HTML page: curves, throughput, evaluations, samples of its text, config and environment.

The page loads nothing from anywhere and runs no script; its colours follow the reader's light or dark theme.
"""

import io
import math
import re
from html import escape
from pathlib import Path
from statistics import median
from typing import Any, Optional

import yaml
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from src.common.errors import UserError, masked
from src.config.schema import Config
from src.tools.run_logs import EVAL, SECONDS, TOKENS, TRAIN, UNIGRAM, Run

INK = '#010203'  # becomes the colour of the page's text
STYLE: dict[str, Any] = {
    **dict.fromkeys(('text.color', 'axes.labelcolor', 'axes.edgecolor', 'xtick.color', 'ytick.color'), INK),
    **dict.fromkeys(('figure.facecolor', 'axes.facecolor', 'savefig.facecolor'), 'none'),
    'svg.fonttype': 'none', 'font.size': 9}
CURVES = {'learning rate': 'lr-', 'tokens per second': 'throughput/tokens_per_sec', 'gradient norm': 'trainer/grad_norm',
          'MFU': 'throughput/device/mfu'}
THROUGHPUT = ('throughput/tokens_per_sec', 'throughput/device/tokens_per_sec', 'throughput/batches_per_sec',
              'throughput/device/flops_per_sec', 'throughput/device/mfu')

PAGE = '''<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark"><title>{title}</title>
<style>
:root {{ --page: #fff; --ink: #1c1e21; --soft: #667; --line: #d9dce1; --box: #f5f6f8 }}
@media (prefers-color-scheme: dark) {{
  :root {{ --page: #15171a; --ink: #e4e6ea; --soft: #9aa0aa; --line: #353a42; --box: #1e2126 }}
}}
body {{ margin: 0 auto; max-width: 62rem; padding: 1rem 1.5rem 4rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif }}
h1 {{ margin-bottom: .2rem; overflow-wrap: anywhere }} h2 {{ margin-top: 2.2rem; border-bottom: 1px solid var(--line) }}
h3 {{ margin: 1.2rem 0 .4rem; font-size: 1rem }} .soft, th {{ color: var(--soft); font-weight: normal }}
svg {{ width: 100%; height: auto; color: var(--ink) }} svg text {{ font-family: system-ui, sans-serif !important }}
.curves {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem }}
.curves > .wide {{ grid-column: 1/-1 }}
table {{ border-collapse: collapse; margin-bottom: .8rem }}
td, th {{ padding: .15rem 1.2rem .15rem 0; text-align: left; vertical-align: top;
  overflow-wrap: anywhere; border-bottom: 1px solid var(--line) }}
.number {{ text-align: right; font-variant-numeric: tabular-nums }}
pre, blockquote {{ background: var(--box); padding: .7rem 1rem; margin: .4rem 0; border-radius: 6px; overflow-x: auto }}
pre {{ font-size: 13px }} blockquote {{ white-space: pre-wrap; overflow-wrap: anywhere }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
'''


def svg(figure: Figure) -> str:
    """A picture to stand in the page: without the header of a file, and with the page's colour as ink."""
    out = io.StringIO()
    figure.savefig(out, format='svg', metadata={'Date': None, 'Creator': None})
    plt.close(figure)
    text = out.getvalue()
    text = re.sub(r'<!--.*?-->|<metadata>.*?</metadata>', '', text[text.index('<svg'):], flags=re.DOTALL)
    text = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img">', text, count=1)
    return text.replace('xlink:href', 'href').replace(INK, 'currentColor')


def _curve(values: dict[int, float], label: str) -> str:
    figure, axes = plt.subplots(figsize=(3.3, 2.2), layout='constrained')
    axes.plot(list(values), list(values.values()), marker='o' if len(values) == 1 else '', lw=0.8)
    axes.set(xlabel='batch', ylabel=label)
    axes.spines[['top', 'right']].set_visible(False)
    if max(values.values()) >= 1000:
        axes.yaxis.set_major_formatter(EngFormatter(sep=''))
    return svg(figure)


def _table(rows: list[tuple[Any, ...]], head: tuple[str, ...] = ()) -> str:
    def line(row: tuple[Any, ...], tags: list[str]) -> str:
        kinds = [' class="number"' if i and head else '' for i in range(len(row))]
        cells = (f'<{tag}{kind}>{escape(number(value))}</{tag}>' for tag, kind, value in zip(tags, kinds, row))
        return f'<tr>{"".join(cells)}</tr>'
    lines = [line(head, ['th'] * len(head))] if head else []
    lines += [line(row, ['th', *['td'] * len(row)]) for row in rows]
    return f'<table>{"".join(lines)}</table>'


def number(value: Any) -> str:
    """A figure for people."""
    if isinstance(value, float) and math.isfinite(value) and abs(value) < 1e8 and (value >= 1000 or value == int(value)):
        return f'{value:,.0f}'
    return f'{value:,}' if isinstance(value, int) else f'{value:.4g}' if isinstance(value, float) else str(value)


def _last(run: Run, name: str) -> Optional[float]:
    return list(run.scalars[name].values())[-1] if run.scalars.get(name) else None


def _overview(run: Run) -> list[tuple[str, Any]]:
    unigram = _last(run, UNIGRAM)
    facts = [('batches', max(run.scalars[TRAIN]) + 1), ('tokens trained on', _last(run, TOKENS)),
             ('parameters', run.hparams.get('environment', {}).get('n_params')), ('training loss, last batch', _last(run, TRAIN)),
             ('evaluation loss, last', _last(run, EVAL)), ('evaluation perplexity, last', _last(run, 'metrics/eval/Perplexity')),
             ('unigram entropy', unigram), ('batches skipped', _last(run, 'trainer/skipped_batches'))]
    return [(name, f'{value:.4f}' if 'loss' in name or 'unigram' in name else value) for name, value in facts
            if value is not None]


def _throughput(run: Run) -> str:
    logged = [(name, list(run.scalars[name].values())) for name in THROUGHPUT if run.scalars.get(name)]
    rows: list[tuple[Any, ...]] = [(name, median(v), min(v), max(v), v[-1]) for name, v in logged]
    unit = ((run.hparams.get('callbacks') or {}).get('speed_monitor') or {}).get('time_unit', 'hours')
    times = [(f'{name} ({unit})', time) for name in (SECONDS, 'time/val', 'time/total') if (time := _last(run, name)) is not None]
    if not rows and not times:
        return '<p class="soft">not logged: train with callbacks.speed_monitor={}</p>'
    return (_table(rows, ('', 'median', 'least', 'most', 'last')) if rows else '') + (_table(times) if times else '')


def _samples(run: Run, tokens: dict[int, float]) -> str:
    parts = []
    for batch, rows in run.samples.items():
        loss = run.scalars.get(EVAL, {}).get(batch)
        says = f', evaluation loss {loss:.4f}' if loss is not None else ''
        seen = f', {tokens[batch]:,.0f} tokens' if batch in tokens else ''
        parts.append(f'<h3>batch {batch:,}{seen}{says}</h3>')
        parts += [f'<blockquote><b>{escape(row["prompt"])}</b>{escape(row["text"])}</blockquote>' for row in rows]
    return ''.join(parts) or '<p class="soft">none: callbacks.text_samples writes some at each evaluation</p>'


def page(run: Run, loss: Figure, tokens: dict[int, float]) -> str:
    """The page.

    Args:
        run: Its logs.
        loss: The picture of the loss, drawn in `STYLE`; all pictures want to be made in it.
        tokens: Trained on before each batch.
    """
    curves = [f'<div class="wide">{svg(loss)}</div>']
    for label, name in CURVES.items():
        found = next((values for tag, values in run.scalars.items() if tag.startswith(name)), None)
        curves += [f'<div>{_curve(found, label)}</div>'] if found else []
    hparams = masked(run.hparams)
    config = {key: value for key, value in hparams.items() if key in Config.model_fields}
    environment = {**hparams.get('environment', {}), **{k: v for k, v in hparams.items() if k not in (*config, 'environment')}}
    missing = '<p class="soft">not in these logs</p>'
    evals = [(batch, tokens.get(batch, ''), f'{value:.4f}', f'{math.exp(min(value, 700)):,.2f}')
             for batch, value in run.scalars.get(EVAL, {}).items()]
    text = yaml.safe_dump(config, sort_keys=False, width=110, allow_unicode=True)
    sections = {
        'Overview': _table(_overview(run)),
        'Curves': f'<div class="curves">{"".join(curves)}</div>',
        'Throughput': _throughput(run),
        'Evaluations': _table(evals, ('batch', 'tokens', 'loss', 'perplexity')) if evals else '<p class="soft">none</p>',
        'Samples of its text': _samples(run, tokens),
        'Config': f'<pre>{escape(text)}</pre>' if config else missing,
        'Environment': _table([(k, str(v)) for k, v in environment.items() if v is not None]) if environment else missing}
    return PAGE.format(title=escape(run.name), body='\n'.join(f'<h2>{name}</h2>\n{text}' for name, text in sections.items()))


def write(run: Run, loss: Figure, tokens: dict[int, float], folder: str) -> str:
    """Writes `page` to FOLDER/NAME.html, and says so.

    Raises:
        UserError: It cannot be written.
    """
    path = Path(folder, f'{run.name.replace("/", "-")}.html')
    text = page(run, loss, tokens)
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding='utf-8')
    except OSError as e:
        raise UserError(f'--html: {path} cannot be written: {e.strerror}') from None
    return f'{path}: report of {run.name}'
