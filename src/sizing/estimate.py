"""What a run takes: how many devices, how much memory of each, how long. Computed from the config and its model."""

from collections.abc import Iterator
from itertools import takewhile
from typing import NamedTuple, Optional

from src.common.errors import UserError
from src.common.flops import Card, train_flops_per_token
from src.config.derived import device_batch_size, resolve_precision
from src.config.schema import TIME, Config, FSDPConfig
from src.sizing.memory import Memory, predict, traced
from src.sizing.remedies import Remedy, remedies
from src.sizing.step_trace import Trace

# An assumption; src/tools/benchmark.py measures it. Chowdhery et al. 2022 (PaLM), table 3: from 0.21 (GPT-3) to 0.46.
MFU = 0.4
C4_TOKENS = 170e9  # of the split train, by GPT-2's tokenizer, roughly
RULE = 16  # bytes a parameter: fp32 weights 4, gradients 4, Adam's moments 8
CHECKPOINT = 12  # bytes a parameter: without the gradients


class Estimate(NamedTuple):
    """What a run takes. None: there is no such number, or it cannot be known."""

    c: Config
    card: Card
    mfu: float
    devices: int
    microbatch: int
    smallest: Optional[int]  # number of devices that the YAML's microbatch fits on; of `auto`, a microbatch of 1
    smallest_of_one: Optional[int]  # and a microbatch of 1
    largest_microbatch: Optional[int]
    memory: Memory  # of each device
    trace: Trace

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
    def seq_len(self) -> int:
        return self.c.train_loader.dataset.max_seq_len

    @property
    def batches(self) -> Optional[int]:
        amount, unit = TIME.fullmatch(self.c.max_duration).groups()  # pyright: ignore[reportOptionalMemberAccess]
        return {'ba': int(amount), 'sp': int(amount) // self.c.global_train_batch_size}.get(unit)

    @property
    def tokens(self) -> Optional[int]:
        if self.c.max_duration.endswith('tok'):
            return int(self.c.max_duration.removesuffix('tok'))
        return self.batches and self.batches * self.c.global_train_batch_size * self.seq_len

    @property
    def flops_per_token(self) -> float:
        model = self.trace.model
        return train_flops_per_token(model.n_params, model.n_layers, model.d_model, self.seq_len)

    @property
    def flops(self) -> Optional[float]:
        return self.tokens and self.tokens * self.flops_per_token

    @property
    def peak(self) -> Optional[float]:
        """FLOP/s of a device."""
        return None if resolve_precision(self.c.precision, self.card.is_gpu) == 'fp32' else self.card.peak

    @property
    def hours(self) -> Optional[float]:
        return self.flops / (self.devices * self.peak * self.mfu) / 3600 if self.flops and self.peak else None

    @property
    def checkpoint(self) -> int:
        """Bytes of one. A full one has a tied weight once, a sharded one has it under each of its names."""
        f, model = self.c.fsdp_config, self.trace.model
        sharded = f is not None and f.state_dict_type == 'sharded'
        named = sum(p.numel() for _, p in model.named_parameters(remove_duplicate=False))
        return CHECKPOINT * self.n_params + (4 * (named - self.n_params) if sharded else 0)

    @property
    def token_bytes(self) -> int:
        """Of a packed token."""
        return 2 if self.trace.model.vocab_size <= 2**16 else 4

    @property
    def data(self) -> Optional[int]:
        """Bytes of all tokens, packed."""
        return self.tokens and self.tokens * self.token_bytes


def divisors(n: int) -> list[int]:
    return [m for m in range(1, n + 1) if n % m == 0]


def counts(c: Config) -> list[int]:
    """The numbers of devices that divide the global batch, and that the copies of `fsdp_config` divide."""
    f = c.fsdp_config or FSDPConfig()
    copies, shards = f.data_parallel_replicate_degree or 1, f.data_parallel_shard_degree
    return [n for n in divisors(c.global_train_batch_size)
            if n % copies == 0 and (shards == -1 or n == copies * shards)]


def needs(c: Config, card: Card, n: int, microbatch: int) -> Memory:
    """The predicted peak of each of n devices; a microbatch is never more than what a device has."""
    return predict(c, n, card.is_gpu, min(device_batch_size(c.global_train_batch_size, n), microbatch))


def smallest(c: Config, card: Card, microbatch: int) -> Optional[int]:
    """The smallest number of devices that fits."""
    return next((n for n in counts(c) if needs(c, card, n, microbatch).total <= card.usable), None)


def largest(c: Config, card: Card, n: int, wanted: int) -> Optional[int]:
    """The largest microbatch that fits on n devices: from the wanted size down, then up, as the step of a much larger
    microbatch takes long to follow."""
    sizes = divisors(c.global_train_batch_size // n)

    def fits(microbatch: int) -> bool:
        return needs(c, card, n, microbatch).total <= card.usable

    below = next((m for m in reversed(sizes) if m <= wanted and fits(m)), 0)
    return max(takewhile(fits, (m for m in sizes if m > below)), default=below) or None


def estimate(c: Config, card: Card, devices: Optional[int] = None, mfu: float = MFU) -> Estimate:
    """All figures of a run.

    `devices` as None means the smallest number that fits, or, where none does, the largest that there can be. `mfu` is
    the part of the peak that the model's FLOPs reach. Raises UserError where the model's memory cannot be predicted, or
    the devices do not divide the batch or the copies of the model.
    """
    possible, asked = counts(c), c.device_train_microbatch_size
    if not possible or devices and devices not in possible:
        device_batch_size(c.global_train_batch_size, devices or 1)
        raise UserError('fsdp_config.data_parallel_replicate_degree, data_parallel_shard_degree: the batch of '
                        f'{c.global_train_batch_size} and the copies of the model allow '
                        f'{", ".join(map(str, possible)) or "no number of"} devices')
    wanted = 1 if isinstance(asked, str) else asked
    fewest, fewest_of_one = smallest(c, card, wanted), smallest(c, card, 1)
    n = devices or fewest or max(possible)
    most = largest(c, card, n, wanted)
    microbatch = min(c.global_train_batch_size // n, (most or 1) if asked == 'auto' else wanted)
    return Estimate(c, card, mfu, n, microbatch, fewest, fewest_of_one, most, needs(c, card, n, microbatch),
                    traced(c, n, card.is_gpu, microbatch))


def apply_remedies(e: Estimate) -> Iterator[tuple[str, int]]:
    """What to set where it does not fit, one after another until it does, and the peak with all of them so far."""
    c, peak = e.c, e.memory.total
    for remedy in [Remedy('device_train_microbatch_size', 1), *remedies(e.c)]:
        c, before = remedy.applied(c) if '.' in remedy.key else c, peak
        peak = needs(c, e.card, e.devices, 1).total
        if peak < before:
            yield f'{remedy.key}={remedy.shown}', peak
        if peak <= e.card.usable:
            return
