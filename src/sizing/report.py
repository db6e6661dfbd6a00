"""What an estimate says to people: a report of one run, or a table of several."""

import math
from typing import Optional

from src.config.derived import device_batch_size, fsdp_version, grad_accum
from src.config.schema import TIME
from src.sizing.cards import C4_TOKENS, CHECKPOINT, RULE, USABLE, Estimate, counts, divisors, needs, remedies
from src.sizing.memory import moments, state_bytes, table

# ---------------------------------------------------------------- one YAML


def big(x: Optional[float]) -> str:
    """1.34e11: for tokens and FLOPs."""
    mantissa, _, exponent = f'{x or 0:.2e}'.partition('e')
    return f'{mantissa}e{int(exponent)}' if x else 'unknown'


def rounded(hours: Optional[float]) -> str:
    return 'unknown' if hours is None else f'{hours:,.0f}' if hours >= 99.5 else f'{hours:.2g}'


def gigabytes(x: float) -> str:
    unit, name = next((u, n) for u, n in ((1e12, 'TB'), (1e9, 'GB'), (0, 'MB')) if x >= u)
    return f'{x / (unit or 1e6):.2f} {name}'


def gib(x: float) -> str:
    return f'{x / 2**30:.2f} GiB' if x >= 2**27 else f'{x / 2**20:.2f} MiB'


def report(e: Estimate, price: Optional[float] = None) -> str:
    """Lines for people: each figure with what it is computed from."""
    units = e.trace.units
    blocks = f'{len(units)} blocks x {units[0]:,}' if len(set(units)) == 1 else f'{sum(units):,} in {len(units)} blocks'
    rows = [('parameters N', f'{e.n_params:,}', f'{blocks} + {e.n_params - sum(units):,} outside of them, such as embeddings'),
            *device_rows(e), *memory_rows(e), *time_rows(e, price), *byte_rows(e)]
    return '\n'.join(f'{what:22}{figure:>14}   {formula}'.rstrip() if formula else what for what, figure, formula in rows)


Row = tuple[str, str, str]


def device_rows(e: Estimate) -> list[Row]:
    c, n, micro = e.c, e.devices, e.c.device_train_microbatch_size
    first, whose = (1, '1: it is auto') if isinstance(micro, str) else (micro, f"{micro}, the config's")
    below = [k for k in counts(c) if k < (e.smallest or 0)]
    less = f'; {below[-1]} need{"s" * (below[-1] == 1)} {gib(needs(c, e.card, below[-1], first).total)}' if below else ''
    samples = c.global_train_batch_size // n
    above = [m for m in divisors(samples) if m > (e.largest_microbatch or 0)]
    more = f'; {above[0]} needs {gib(needs(c, e.card, n, above[0]).total)}' if above else ''
    given = 'as given' if e.smallest or n < max(counts(c)) else f'the most that divide the batch of {c.global_train_batch_size}'
    return [
        ('rule of thumb', gigabytes(RULE * e.n_params),
         f'{RULE} bytes x N over all devices' + (f', which {e.rule} x {gigabytes(e.card.memory)} exceed' if e.rule else '')),
        ('usable memory', gib(e.card.usable), f'{USABLE} x {gigabytes(e.card.memory)} of each device ({e.card.name})'),
        ('fewest devices', str(e.smallest or 'none'),
         f'that divide the batch of {c.global_train_batch_size} and fit a microbatch of {whose}{less}'),
        ('  with microbatch 1', str(e.smallest_of_one or 'none'), 'the same with a microbatch of 1'),
        ('devices', str(n), 'the fewest' if n == e.smallest else given),
        ('largest microbatch', str(e.largest_microbatch or 'none'),
         f"that fits, of the divisors of a device's {samples} = {c.global_train_batch_size} / {n} samples{more}")]


def memory_rows(e: Estimate) -> list[Row]:
    c, stays = e.c, moments(e.c, e.devices, e.card.is_gpu, e.microbatch)[-1]  # what stays from step to step
    shards = round(4 * e.n_params / stays.weights)
    by = f'N / {shards}' if shards > 1 else 'N'
    passing = e.memory.gradients - stays.gradients
    buckets = ' + 4 N of buckets' if stays.gradients > 1.5 * stays.weights else ''
    f = c.fsdp_config if fsdp_version(c.fsdp_config, e.card.is_gpu) else None
    kept = 'offloaded' if f and f.activation_cpu_offload else 'checkpointed' if f and f.activation_checkpointing else 'kept'
    chunk = getattr(c.model, 'loss_chunk_tokens', None) if getattr(c.model, 'loss_impl', None) != 'plain' else None
    formulas = [
        f'4 {by} = {gib(stays.weights)} in fp32, + {gib(e.memory.weights - stays.weights)} of copies to compute with',
        f'4 {by}{buckets} = {gib(stays.gradients)} in fp32, ' +
        (f'+ {gib(passing)} of blocks before and in reduction' if passing >= 0 else f'- {gib(-passing)} that are not there yet'),
        f'{state_bytes(c.optimizer):g} {by}: what {c.optimizer.name} keeps',
        f'of {e.microbatch} x {c.train_loader.dataset.max_seq_len} tokens in {e.trace.model.n_layers} blocks, {kept}',
        'of the loss' + (f', {chunk} tokens at a time' if chunk else ''),
        'a constant: CUDA, its libraries, NCCL' if e.memory.workspace else 'none on a CPU',
        f'the sum, {e.memory.total / e.card.usable:.0%} of what is usable' + ('' if e.fits else ': DOES NOT FIT')]
    head, *lines = table(e.memory).splitlines()
    micro = grad_accum(device_batch_size(c.global_train_batch_size, e.devices), e.microbatch)
    rows = [(f'{head[:-1]}, with {micro} microbatch{"es" * (micro > 1)} of {e.microbatch} a step:', '', '')]
    rows += [(f'  {name}', f'{size} {unit}', formula) for (name, size, unit), formula in zip(map(str.split, lines), formulas)]
    if not e.fits:
        rows.append(('what to set, each with those before it:', '', ''))
        rows += [('', gib(peak), setting + (': fits' if peak <= e.card.usable else '')) for setting, peak in remedies(e)]
        enough = e.smallest or e.smallest_of_one
        rows.append(('', '', f'or take {enough} devices' + (', and a microbatch of 1' if not e.smallest else '') if enough else
                     'or take a larger card, or a smaller model: as it is, no number of these is enough'))
    return rows


def time_rows(e: Estimate, price: Optional[float]) -> list[Row]:
    c, seq_len = e.c, e.c.train_loader.dataset.max_seq_len
    steps = f'{e.batches:,} batches x {c.global_train_batch_size} x {seq_len}' if e.batches else f'max_duration {c.max_duration}'
    if e.tokens is None:
        steps += ': the data decide how long that is; set a number of batches (ba) to know'
    how = f'FLOPs / ({e.devices} x {big(e.peak)} FLOP/s x {e.mfu:g}) / 3600, the peak and the part of it that is reached'
    unknown = f'src/common/flops.py has no peak of {e.card.driver} with precision {c.precision}'
    rows = [('tokens', big(e.tokens), steps),
            ('FLOPs', big(e.flops), f'tokens x (6 N + 12 x {e.trace.model.n_layers} x {e.trace.model.d_model} x {seq_len})'),
            ('hours', rounded(e.hours), how if e.peak else unknown)]
    if price is not None:
        rows.append(('cost', f'{e.hours * e.devices * price:,.0f} $' if e.hours else 'unknown',
                     f'hours x {e.devices} x {price:g} $ an hour'))
    return rows


def byte_rows(e: Estimate) -> list[Row]:
    c = e.c
    run, every = TIME.fullmatch(c.max_duration), TIME.fullmatch(c.save_interval)
    count = ''
    if run and every and run[2] == every[2]:
        saves = math.ceil(int(run[1]) / int(every[1]))
        kept = saves if c.save_num_checkpoints_to_keep == -1 else min(saves, c.save_num_checkpoints_to_keep)
        count = f'; {kept} kept: {gigabytes(kept * e.checkpoint)}' + ('' if c.save_folder else ', with a save_folder')
    share = e.tokens / C4_TOKENS if e.tokens else 0
    of_c4 = f'{100 * share:.3g}% of C4' if share <= 1 else f'{share:.1f} times C4, {gigabytes(C4_TOKENS * e.token_bytes)}'
    twice = f' + {gigabytes(e.checkpoint - CHECKPOINT * e.n_params)} tied' if e.sharded else ''
    return [('checkpoint', gigabytes(e.checkpoint), f'{CHECKPOINT} bytes x N: fp32, Adam\'s moments{twice}{count}'),
            ('data', gigabytes(e.tokens * e.token_bytes) if e.tokens else 'unknown',
             f'tokens x {e.token_bytes} bytes, packed' + (f'; {of_c4} ({big(C4_TOKENS)} tokens)' if e.tokens else ''))]


# ---------------------------------------------------------------- many


def overview(estimates: dict[str, Estimate], price: Optional[float] = None) -> str:
    """A table, and what its columns are computed from."""
    rows = [['run', 'N', 'GPUs', 'micro', 'GiB', 'up to', 'at 1', f'{RULE} N', 'rule', 'tokens', 'FLOPs', 'hours',
             *['cost'] * (price is not None), 'saved', 'data']]
    for name, e in estimates.items():
        cost = [f'{e.hours * e.devices * price:,.0f} $' if e.hours else 'unknown'] if price is not None else []
        rows.append([name, f'{e.n_params / 1e9:.3f}B', str(e.devices), str(e.microbatch),
                     f'{e.memory.total / 2**30:.2f}{"!" * (not e.fits)}', str(e.largest_microbatch or 'none'),
                     str(e.smallest_of_one or 'none'), gigabytes(RULE * e.n_params), str(e.rule or 'none'), big(e.tokens),
                     big(e.flops), rounded(e.hours), *cost, gigabytes(e.checkpoint),
                     gigabytes(e.tokens * e.token_bytes) if e.tokens else 'unknown'])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ['| ' + ' | '.join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))) + ' |'
             for row in rows]
    lines.insert(1, '|' + '|'.join('-' * (w + 1 + (not i)) + ':' * (i > 0) for i, w in enumerate(widths)) + '|')
    some = next(iter(estimates.values()))
    card, hour = some.card, f'{big(some.peak)} FLOP/s x {some.mfu:g}'
    legend = {
        'N': 'parameters, tied ones once',
        'GPUs': f"the fewest {card.name} that divide the global batch and fit the config's microbatch (micro), or --gpus",
        'GiB': f'of each GPU, the predicted peak (src/sizing/memory.py); usable are {USABLE} x {gigabytes(card.memory)} = '
               f'{gib(card.usable)}',
        'up to': "the largest microbatch that fits and divides a GPU's samples, global batch / GPUs",
        'at 1': 'the fewest GPUs with a microbatch of 1',
        f'{RULE} N': 'bytes over all GPUs, the rule of thumb',
        'rule': f'the fewest GPUs with more than that, at {gigabytes(card.memory)} each',
        'tokens': 'batches x global batch x sequence length',
        'FLOPs': 'tokens x (6 N + 12 x layers x width x sequence length)',
        'hours': f'FLOPs / (GPUs x {hour}) / 3600: the peak, and the part of it that is assumed to be reached (--mfu)',
        **({'cost': f'hours x GPUs x {price:g} $'} if price is not None else {}),
        'saved': f"a checkpoint, {CHECKPOINT} bytes x N: fp32 weights and Adam's moments; sharded, the tied embedding twice",
        'data': f'tokens x {some.token_bytes} bytes, packed; C4 has {big(C4_TOKENS)} tokens, and what exceeds them is read again',
    }
    if not all(e.fits for e in estimates.values()):
        legend['!'] = 'does not fit; the estimate of that YAML alone says what to set'
    return '\n'.join([*lines, '', *(f'{key:8}{text}' for key, text in legend.items())])
