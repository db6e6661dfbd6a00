"""What an estimate says to people: a report of one run, or a table of several."""

import math
from typing import NamedTuple, Optional

from src.common.flops import USABLE
from src.config.derived import fsdp_version
from src.config.schema import TIME, FSDPConfig
from src.sizing.estimate import C4_TOKENS, CHECKPOINT, RULE, Estimate, apply_remedies
from src.sizing.memory import moments, state_bytes


class Row(NamedTuple):
    """A figure, what it is computed from, and what more there is to say of this run."""

    name: str
    figure: str
    formula: str
    more: str = ''
    column: str = ''  # its head in the table of several runs; '': it has no column
    cell: str = ''  # the figure in that table, where it is shorter


def big(x: Optional[float]) -> str:
    """1.34e11: for tokens and FLOPs."""
    mantissa, _, exponent = f'{x or 0:.2e}'.partition('e')
    return f'{mantissa}e{int(exponent)}' if x else 'unknown'


def gigabytes(x: Optional[float]) -> str:
    if not x:
        return 'unknown'
    unit, name = (1e12, 'TB') if x >= 1e12 else (1e9, 'GB') if x >= 1e9 else (1e6, 'MB')
    return f'{x / unit:.2f} {name}'


def gib(x: float) -> str:
    return f'{x / 2**30:.2f} GiB' if x >= 2**27 else f'{x / 2**20:.2f} MiB'


def rows(e: Estimate, price: Optional[float]) -> list[Row]:
    """All figures but those of the memory's parts."""
    c, model, memory = e.c, e.trace.model, gigabytes(e.card.memory)
    batch, hours = c.global_train_batch_size, 'unknown'
    if e.hours is not None:
        hours = f'{e.hours:,.0f}' if e.hours >= 99.5 else f'{e.hours:.2g}'
    out = [
        Row('parameters N', f'{e.n_params:,}', 'parameters, tied ones once',
            f': {sum(e.trace.units):,} in {len(e.trace.units)} blocks, and those outside, such as embeddings', 'N',
            f'{e.n_params / 1e9:.3f}B'),
        Row('fewest devices', str(e.smallest or 'none'),
            f"that divide the batch of {batch} and fit the config's microbatch"),
        Row('devices', str(e.devices), f"the fewest {e.card.name} that divide the global batch and fit the config's "
            'microbatch (micro), or --gpus', column='GPUs'),
        Row('microbatch', str(e.microbatch), '', "the config's; of auto, the largest that fits", 'micro'),
        Row('peak memory', gib(e.memory.total), 'of each device, predicted (src/sizing/memory.py); usable are '
            f'{USABLE} x {memory} = {gib(e.card.usable)}', column='GiB',
            cell=f'{e.memory.total / 2**30:.2f}{"" if e.fits else "!"}'),
        Row('largest microbatch', str(e.largest_microbatch or 'none'), 'the largest microbatch that fits and divides '
            'the samples of a device, global batch / devices', f' = {batch // e.devices}', 'up to'),
        Row('fewest of 1', str(e.smallest_of_one or 'none'), 'the fewest devices with a microbatch of 1',
            column='at 1'),
        Row('rule of thumb', gigabytes(RULE * e.n_params), f'{RULE} bytes x N over all devices',
            column=f'{RULE} N'),
        Row('  devices by it', str(e.rule or 'none'), f'the fewest with more than that, at {memory} each',
            column='rule'),
        Row('tokens', big(e.tokens), 'batches x global batch x sequence length', duration(e), 'tokens'),
        Row('FLOPs', big(e.flops), 'tokens x (6 N + 12 x layers x width x sequence length)',
            f': {model.n_layers} x {model.d_model} x {e.seq_len}', 'FLOPs'),
        Row('hours', hours, f'FLOPs / (devices x {big(e.peak)} FLOP/s x {e.mfu:g}) / 3600: the peak, and the part '
            'of it that is assumed to be reached (--mfu)', '' if e.peak else '; src/common/flops.py has no peak of '
            f'{e.card.name} with precision {c.precision}', 'hours'),
        Row('checkpoint', gigabytes(e.checkpoint), f'a checkpoint: {CHECKPOINT} bytes x N: fp32 weights, moments of '
            'Adam; sharded, the tied embedding twice', checkpoints(e), 'saved'),
        Row('data', gigabytes(e.data), f'tokens x {e.token_bytes} bytes, packed; C4 has {big(C4_TOKENS)} tokens, '
            f'{gigabytes(C4_TOKENS * e.token_bytes)}, and what exceeds them is read again', column='data')]
    if price is not None:
        cost = f'{e.hours * e.devices * price:,.0f} $' if e.hours else 'unknown'
        out.insert(-2, Row('cost', cost, f'hours x devices x {price:g} $', column='cost'))
    return out


def duration(e: Estimate) -> str:
    if e.tokens is None:
        return f'; the data decide how long that is, {e.c.max_duration}: set a number of batches (ba) to know'
    return f' = {e.batches:,} x {e.c.global_train_batch_size} x {e.seq_len}' if e.batches else ''


def checkpoints(e: Estimate) -> str:
    c = e.c
    run, every = TIME.fullmatch(c.max_duration), TIME.fullmatch(c.save_interval)
    if run is None or every is None or run[2] != every[2]:
        return ''
    kept = math.ceil(int(run[1]) / int(every[1]))
    if c.save_num_checkpoints_to_keep != -1:
        kept = min(kept, c.save_num_checkpoints_to_keep)
    return f'; {kept} kept: {gigabytes(kept * e.checkpoint)}' + ('' if c.save_folder else ', with a save_folder')


def memory_rows(e: Estimate) -> list[Row]:
    """The parts of the peak."""
    c, m, stays = e.c, e.memory, moments(e.c, e.devices, e.card.is_gpu, e.microbatch)[-1]  # from step to step
    shards = round(4 * e.n_params / stays.weights)
    by = f'N / {shards}' if shards > 1 else 'N'
    buckets = ' + 4 N of buckets' if stays.gradients > 1.5 * stays.weights else ''
    copies, passing = m.weights - stays.weights, m.gradients - stays.gradients
    now = f'+ {gib(passing)} of blocks in reduction' if passing >= 0 else f'- {gib(-passing)} that are not there yet'
    f = c.fsdp_config if c.fsdp_config and fsdp_version(c.fsdp_config, e.card.is_gpu) else FSDPConfig()
    kept = 'offloaded' if f.activation_cpu_offload else 'checkpointed' if f.activation_checkpointing else 'kept'
    formulas = {
        'weights': f'4 {by} = {gib(stays.weights)} in fp32, + {gib(copies)} of copies to compute with',
        'gradients': f'4 {by}{buckets} = {gib(stays.gradients)} in fp32, {now}',
        'optimizer': f'{state_bytes(c.optimizer):g} {by}: what {c.optimizer.name} keeps',
        'activations': f'of {e.microbatch} x {e.seq_len} tokens in {e.trace.model.n_layers} blocks, {kept}',
        'logits': 'of the loss',
        'workspace': 'a constant: CUDA, its libraries, NCCL' if m.workspace else 'none on a CPU'}
    return [*(Row(f'  {part}', gib(getattr(m, part)), formula) for part, formula in formulas.items()),
            Row('  peak', gib(m.total), f'{m.moment}: {m.total / e.card.usable:.0%} of what is usable')]


def remedy_rows(e: Estimate) -> list[Row]:
    """What to set where it does not fit."""
    enough = e.smallest or e.smallest_of_one
    last = 'a larger card, or a smaller model: as it is, no number of these is enough'
    if enough:
        last = f'{enough} devices' + ('' if e.smallest else ', and a microbatch of 1')
    return [Row('DOES NOT FIT', '', 'what to set, each with those before it:'),
            *(Row('', gib(peak), setting, ': fits' if peak <= e.card.usable else '')
              for setting, peak in apply_remedies(e)),
            Row('', '', f'or take {last}')]


def report(e: Estimate, price: Optional[float] = None) -> str:
    """Lines for people: each figure with what it is computed from."""
    every = [*rows(e, price), *memory_rows(e), *([] if e.fits else remedy_rows(e))]
    return '\n'.join(f'{row.name:22}{row.figure:>14}   {row.formula}{row.more}'.rstrip() for row in every)


def overview(estimates: dict[str, Estimate], price: Optional[float] = None) -> str:
    """A table, and what its columns are computed from."""
    columns = [row for row in rows(next(iter(estimates.values())), price) if row.column]
    lines = [['run', *(row.column for row in columns)]]
    lines += [[name, *(row.cell or row.figure for row in rows(e, price) if row.column)]
              for name, e in estimates.items()]
    first, *widths = (max(map(len, cells)) for cells in zip(*lines))
    table = [f'| {" | ".join([line[0].ljust(first), *map(str.rjust, line[1:], widths)])} |' for line in lines]
    table.insert(1, f'|{"|".join(["-" * (first + 2), *("-" * (width + 1) + ":" for width in widths)])}|')
    legend = [f'{row.column:8}{row.formula}' for row in columns if row.formula]
    if not all(e.fits for e in estimates.values()):
        legend.append('!       does not fit; the estimate of that YAML alone says what to set')
    return '\n'.join([*table, '', *legend])
