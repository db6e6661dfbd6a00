"""What a run takes: how many devices, how much memory of each, how long. Computed from the config and its model."""

from collections.abc import Iterator
from itertools import takewhile
from typing import Any, NamedTuple, Optional

from src.common.errors import UserError
from src.common.flops import peak_flops, train_flops_per_token
from src.config import remedies as settings
from src.config.derived import device_batch_size, microbatch_size, resolve_precision
from src.config.remedies import Remedy
from src.config.schema import TIME, Config
from src.sizing.memory import Memory, predict, traced
from src.sizing.step_trace import Trace

# Of a card's memory; the rest is for an allocator in fragments, and for a prediction that is within 5% of what tensors take. What
# CUDA and NCCL take is in the prediction. GB are 10^9 bytes: HBM has up to 7% more, a reserve; of GDDR6, ECC takes as much.
USABLE = 0.95
# An assumption; src/tools/benchmark.py measures it. Chowdhery et al. 2022 (PaLM), table 3: from 0.21 (GPT-3) to 0.46 (PaLM).
MFU = 0.4
C4_TOKENS = 170e9  # of the split train, by GPT-2's tokenizer, roughly
RULE = 16  # bytes a parameter: fp32 weights 4, gradients 4, Adam's moments 8
CHECKPOINT = 12  # bytes a parameter: without the gradients


class Card(NamedTuple):
    """What a device is: `memory` in bytes; `driver`, the name by which `flops.PEAKS` knows it."""

    name: str
    memory: float
    driver: str
    is_gpu: bool = True

    @property
    def usable(self) -> float:
        return USABLE * self.memory


CARDS = {card.name: card for card in (
    Card('a100-40gb', 40e9, 'A100-SXM4-40GB'),  # NVIDIA A100 datasheet, 2021
    Card('a100-80gb', 80e9, 'A100-SXM4-80GB'),  # the same
    Card('h100-sxm', 80e9, 'NVIDIA H100 80GB HBM3'),  # NVIDIA H100 datasheet, 2024
    Card('h100-pcie', 80e9, 'NVIDIA H100 PCIe'),  # NVIDIA H100 datasheet, 2022
    Card('h100-nvl', 94e9, 'NVIDIA H100 NVL'),  # NVIDIA H100 datasheet, 2024
    Card('h200', 141e9, 'NVIDIA H200'),  # NVIDIA H200 datasheet, 2024
    Card('b200', 180e9, 'NVIDIA B200'),  # NVIDIA DGX B200 datasheet, 2024: 1,440 GB for 8
    Card('l4', 24e9, 'NVIDIA L4'),  # NVIDIA L4 datasheet, 2023
    Card('l40s', 48e9, 'NVIDIA L40S'),  # NVIDIA L40S datasheet, 2023
    Card('rtx-4090', 24e9, 'NVIDIA GeForce RTX 4090'),  # NVIDIA Ada GPU architecture whitepaper, 2022
    Card('mi300x', 192e9, 'AMD Instinct MI300X'),  # AMD Instinct MI300X data sheet, 2023
)}


# ---------------------------------------------------------------- arithmetic


class Estimate(NamedTuple):
    """What a run takes. None: there is no such number, or it cannot be known."""

    c: Config
    card: Card
    devices: int
    microbatch: int
    memory: Memory  # of each device
    smallest: Optional[int]  # number of devices that the YAML's microbatch fits on; of `auto`, a microbatch of 1
    smallest_of_one: Optional[int]  # and a microbatch of 1
    largest_microbatch: Optional[int]
    trace: Trace
    flops_per_token: float
    batches: Optional[int]
    tokens: Optional[int]
    peak: Optional[float]  # FLOP/s of a device
    mfu: float

    @property
    def n_params(self) -> int:
        return self.trace.model.n_params

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.card.usable

    @property
    def rule(self) -> Optional[int]:
        """The smallest number of devices by the rule of thumb."""
        return next((n for n in counts(self.c) if n * self.card.memory > RULE * self.n_params), None)

    @property
    def flops(self) -> Optional[float]:
        return self.tokens and self.tokens * self.flops_per_token

    @property
    def hours(self) -> Optional[float]:
        return self.flops / (self.devices * self.peak * self.mfu) / 3600 if self.flops and self.peak else None

    @property
    def sharded(self) -> bool:
        """Whether checkpoints are."""
        f = self.c.fsdp_config
        return f is not None and f.state_dict_type == 'sharded'

    @property
    def checkpoint(self) -> int:
        """Bytes of one. A full one has a tied weight once, a sharded one has it under each of its names."""
        named = sum(p.numel() for _, p in self.trace.model.named_parameters(remove_duplicate=False))
        return CHECKPOINT * self.n_params + 4 * (named - self.n_params) * self.sharded

    @property
    def token_bytes(self) -> int:
        """Of a packed token."""
        return 2 if self.trace.model.vocab_size <= 2**16 else 4


def divisors(n: int) -> list[int]:
    return [m for m in range(1, n + 1) if n % m == 0]


def counts(c: Config) -> list[int]:
    """The numbers of devices that divide the global batch, and that the copies of `fsdp_config` divide."""
    f = c.fsdp_config
    copies, shards = (f.data_parallel_replicate_degree or 1, f.data_parallel_shard_degree) if f else (1, -1)
    return [n for n in divisors(c.global_train_batch_size) if n % copies == 0 and (shards == -1 or n == copies * shards)]


def needs(c: Config, card: Card, n: int, microbatch: int) -> Memory:
    """Of each of n devices; a microbatch is never more than what a device has."""
    return predict(c, n, card.is_gpu, microbatch_size(device_batch_size(c.global_train_batch_size, n), microbatch))


def smallest(c: Config, card: Card, microbatch: int) -> Optional[int]:
    """The smallest number of devices that fits."""
    return next((n for n in counts(c) if needs(c, card, n, microbatch).total <= card.usable), None)


def estimate(c: Config, card: Card, devices: Optional[int] = None, mfu: float = MFU) -> Estimate:
    """All figures of a run.

    Args:
        c: The config.
        card: What each device is.
        devices: How many; None: the smallest number that fits, or, where none does, the largest that there can be.
        mfu: Part of the peak that the model's FLOPs reach.

    Raises:
        UserError: The model's memory cannot be predicted, or the devices do not divide the batch or the copies of the model.
    """
    auto = c.device_train_microbatch_size == 'auto'
    wanted = 1 if isinstance(c.device_train_microbatch_size, str) else c.device_train_microbatch_size
    possible = counts(c)
    if not possible:
        raise UserError('fsdp_config.data_parallel_replicate_degree, data_parallel_shard_degree: no number of devices that '
                        f'divides the batch of {c.global_train_batch_size} has whole copies of the model; change one of them')
    if devices and devices not in possible:
        device_batch_size(c.global_train_batch_size, devices)
        raise UserError(f'fsdp_config.data_parallel_replicate_degree, data_parallel_shard_degree: not with {devices} devices; '
                        f'with {", ".join(map(str, possible))}')
    fewest, fewest_of_one = smallest(c, card, wanted), smallest(c, card, 1)
    n = devices or fewest or max(possible)
    device_batch = device_batch_size(c.global_train_batch_size, n)
    sizes = divisors(device_batch)

    def fits(m: int) -> bool:
        return needs(c, card, n, m).total <= card.usable

    # From the wanted size down, then up: the step of a much larger microbatch takes long to follow.
    below = next((m for m in reversed(sizes) if m <= wanted and fits(m)), 0)
    largest = max(takewhile(fits, (m for m in sizes if m > below)), default=below) or None
    microbatch = microbatch_size(device_batch, (largest or 1) if auto else wanted)
    t, seq_len = traced(c, n, card.is_gpu, microbatch), c.train_loader.dataset.max_seq_len
    amount, unit = TIME.fullmatch(c.max_duration).groups()  # pyright: ignore[reportOptionalMemberAccess]
    batches = int(amount) if unit == 'ba' else int(amount) // c.global_train_batch_size if unit == 'sp' else None
    tokens = int(amount) if unit == 'tok' else batches and batches * c.global_train_batch_size * seq_len
    return Estimate(c, card, n, microbatch, predict(c, n, card.is_gpu, microbatch), fewest, fewest_of_one, largest, t,
                    train_flops_per_token(t.model.n_params, t.model.n_layers, t.model.d_model, seq_len), batches, tokens,
                    peak_flops(card.driver, resolve_precision(c.precision, card.is_gpu)), mfu)


def remedies(e: Estimate) -> Iterator[tuple[str, int]]:
    """What to set where it does not fit, one after another until it does, and the peak with all of them so far."""
    c, peak = e.c, e.memory.total
    for remedy in [Remedy('device_train_microbatch_size', 1), *settings.remedies(e.c)]:
        c, before = remedy.applied(c) if '.' in remedy.key else c, peak
        peak = needs(c, e.card, e.devices, 1).total
        if peak < before:
            yield f'{remedy.key}={remedy.shown}', peak
        if peak <= e.card.usable:
            return
