"""The text of an estimate: a report of one run, or a table of several."""

import math
from typing import NamedTuple, Optional

from src.common.flops import USABLE_FRACTION
from src.config.derived import fsdp_version
from src.config.schema import TIME, FSDPConfig
from src.sizing.estimate import C4_TOKENS, RULE_BYTES, Estimate, apply_remedies
from src.sizing.memory import moments


class Row(NamedTuple):
    """A line of the report: a figure with its formula. A row with a `column` is also a column of the table of runs."""

    name: str
    figure: str
    formula: str
    more: str = ''  # of this run alone; not in the legend of the table
    column: str = ''  # the head of the column; '': no column
    cell: str = ''  # the figure in the table; '': `figure`


def big(x: Optional[float]) -> str:
    """Formats tokens and FLOPs, as in 1.34e11."""
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
    """All figures except the parts of the memory."""
    c, model, memory = e.c, e.trace.model, gigabytes(e.card.memory)
    batch, hours = c.global_train_batch_size, 'unknown'
    if e.hours is not None:
        hours = f'{e.hours:,.0f}' if e.hours >= 99.5 else f'{e.hours:.2g}'
    out = [
        Row('parameters N', f'{e.n_params:,}', 'parameters; tied weights count once',
            f'; {sum(e.trace.units):,} of them in {len(e.trace.units)} blocks', 'N', f'{e.n_params / 1e9:.3f}B'),
        Row('fewest devices', str(e.fewest_devices or 'none'),
            f"that hold the config's microbatch and divide the global batch of {batch}"),
        Row('devices', str(e.devices), f"the fewest {e.card.name} that hold the config's microbatch (micro) and divide "
            'the global batch; or --gpus', column='GPUs'),
        Row('microbatch', str(e.microbatch), '', "the config's; with auto, the largest that fits", 'micro'),
        Row('peak memory', gib(e.memory.total), 'peak memory of each device, predicted (src/sizing/memory.py); usable: '
            f'{USABLE_FRACTION} x {memory} = {gib(e.card.usable)}', column='GiB',
            cell=f'{e.memory.total / 2**30:.2f}{"" if e.fits else "!"}'),
        Row('largest microbatch', str(e.largest_microbatch or 'none'), 'the largest microbatch that fits and divides '
            'the samples of a device, global batch / devices', f' = {batch // e.devices}', 'max micro'),
        Row('fewest, microbatch 1', str(e.fewest_devices_for_one or 'none'), 'the fewest devices that hold a '
            'microbatch of 1', column='min GPUs'),
        Row('rule of thumb', gigabytes(RULE_BYTES * e.n_params), f'memory of all devices together: {RULE_BYTES} bytes '
            'x N', column=f'{RULE_BYTES} N'),
        Row('  devices by the rule', str(e.fewest_by_rule or 'none'), f'the fewest devices with more memory than '
            f'{RULE_BYTES} N, at {memory} each', column='rule'),
        Row('tokens', big(e.tokens), 'batches x global batch x sequence length', duration(e), 'tokens'),
        Row('FLOPs', big(e.flops), 'tokens x (6 N + 12 x layers x width x sequence length)',
            f': {model.n_layers} x {model.d_model} x {e.seq_len}', 'FLOPs'),
        Row('hours', hours, f'FLOPs / (devices x a peak of {big(e.peak)} FLOP/s x an MFU of {e.mfu:g}) / 3600; the MFU '
            'is assumed (--mfu)', '' if e.peak else f'; src/common/flops.py has no peak of {e.card.name} for precision '
            f'{c.precision}', 'hours'),
        Row('checkpoint', gigabytes(e.checkpoint_bytes), 'fp32 weights, 4 bytes x N, and the state of the '
            'optimizer; a sharded checkpoint holds the tied embedding twice',
            f'; here {e.checkpoint_bytes / e.n_params:.3g} bytes x N{checkpoints(e)}', 'checkpoint'),
        Row('data', gigabytes(e.data_bytes), f'tokens x {e.token_bytes} bytes, as packed tokens; C4 has '
            f'{big(C4_TOKENS)} tokens ({gigabytes(C4_TOKENS * e.token_bytes)}), and longer runs read them again',
            column='data')]
    if price is not None:
        cost = f'{e.hours * e.devices * price:,.0f} $' if e.hours else 'unknown'
        out.insert(-2, Row('cost', cost, f'hours x devices x {price:g} $', column='cost'))
    return out


def duration(e: Estimate) -> str:
    if e.tokens is None:
        return f'; {e.c.max_duration} depends on the data: set max_duration to a number of batches, as in 4800ba'
    return f' = {e.batches:,} x {e.c.global_train_batch_size} x {e.seq_len}' if e.batches else ''


def checkpoints(e: Estimate) -> str:
    c = e.c
    run, every = TIME.fullmatch(c.max_duration), TIME.fullmatch(c.save_interval)
    if run is None or every is None or run[2] != every[2]:
        return ''
    kept = math.ceil(int(run[1]) / int(every[1]))
    if c.save_num_checkpoints_to_keep != -1:
        kept = min(kept, c.save_num_checkpoints_to_keep)
    condition = '' if c.save_folder else ', if save_folder is set'
    return f'; the run keeps {kept}: {gigabytes(kept * e.checkpoint_bytes)}{condition}'


def memory_rows(e: Estimate) -> list[Row]:
    """The parts of the peak memory."""
    c, m, after_step = e.c, e.memory, moments(e.c, e.devices, e.card.is_gpu, e.microbatch)[-1]  # kept between steps
    shards = round(4 * e.n_params / after_step.weights)
    share = f'N / {shards}' if shards > 1 else 'N'
    buckets = ' + 4 N of buckets' if after_step.gradients > 1.5 * after_step.weights else ''
    copies, in_reduction = m.weights - after_step.weights, m.gradients - after_step.gradients
    change = f'minus {gib(-in_reduction)} not computed yet'
    if in_reduction >= 0:
        change = f'plus {gib(in_reduction)} in reduction'
    f = c.fsdp_config if c.fsdp_config and fsdp_version(c.fsdp_config, e.card.is_gpu) else FSDPConfig()
    storage = 'checkpointed' if f.activation_checkpointing else 'all kept'
    formulas = {
        'weights': f'4 {share} = {gib(after_step.weights)} in fp32, plus {gib(copies)} of copies for the computation',
        'gradients': f'4 {share}{buckets} = {gib(after_step.gradients)} in fp32, {change}',
        'optimizer': f'{e.optimizer_bytes / e.n_params:.3g} {share}: the state of {c.optimizer.name}',
        'activations': f'of {e.microbatch} x {e.seq_len} tokens in {e.trace.model.n_layers} blocks, '
                       f'{"offloaded to the CPU" if f.activation_cpu_offload else storage}',
        'logits': 'and their gradients, in the loss',
        'workspace': 'an estimate, the same for every model: CUDA, cuBLAS, NCCL' if m.workspace else 'none on a CPU'}
    return [*(Row(f'  {part}', gib(getattr(m, part)), formula) for part, formula in formulas.items()),
            Row('  peak', gib(m.total), f'{m.moment}: {m.total / e.card.usable:.0%} of the usable memory')]


def remedy_rows(e: Estimate) -> list[Row]:
    """Lists the settings to change, for a run that does not fit into memory."""
    enough = e.fewest_devices or e.fewest_devices_for_one
    last = f'a larger device or a smaller model: with these settings no number of {e.card.name} is enough'
    if enough:
        last = f'{enough} devices' + ('' if e.fewest_devices else ', and a microbatch of 1')
    return [Row('DOES NOT FIT', '', 'set these; each line includes the lines above it:'),
            *(Row('', gib(peak), setting, ': fits' if peak <= e.card.usable else '')
              for setting, peak in apply_remedies(e)),
            Row('', '', f'or use {last}')]


def report(e: Estimate, price: Optional[float] = None) -> str:
    """The report of one run: each figure with its formula. `price` is in dollars for a GPU and hour."""
    every = [*rows(e, price), *memory_rows(e), *([] if e.fits else remedy_rows(e))]
    return '\n'.join(f'{row.name:22}{row.figure:>14}   {row.formula}{row.more}'.rstrip() for row in every)


def overview(estimates: dict[str, Estimate], price: Optional[float] = None) -> str:
    """A table with a line for each run, and a legend with the formulas of each column."""
    runs = {name: [row for row in rows(e, price) if row.column] for name, e in estimates.items()}
    columns = list(zip(*runs.values()))
    lines = [['run', *(column[0].column for column in columns)]]
    lines += [[name, *(row.cell or row.figure for row in run)] for name, run in runs.items()]
    first, *widths = (max(map(len, cells)) for cells in zip(*lines))
    table = [f'| {" | ".join([line[0].ljust(first), *map(str.rjust, line[1:], widths)])} |' for line in lines]
    table.insert(1, f'|{"|".join(["-" * (first + 2), *("-" * (width + 1) + ":" for width in widths)])}|')
    legend = [f'{column[0].column:12}{formula}' for column in columns
              for formula in dict.fromkeys(row.formula for row in column) if formula]
    if not all(e.fits for e in estimates.values()):
        legend.append('!           does not fit; estimate this YAML alone to see what to set')
    return '\n'.join([*table, '', *legend])
