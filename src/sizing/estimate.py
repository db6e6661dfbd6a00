"""Estimates the resources of a run from its config and model: devices, memory of each, FLOPs, hours, disk space."""

from collections.abc import Iterator
from itertools import takewhile
from typing import NamedTuple, Optional

from src.common.errors import UserError
from src.common.flops import ASSUMED_MFU, Card, train_flops_per_token
from src.config.derived import device_batch_size, resolve_precision
from src.config.schema import TIME, Config, FSDPConfig
from src.sizing.memory import Memory, optimizer_state_bytes, predict, trace_config
from src.sizing.remedies import Remedy, remedies
from src.sizing.step_trace import Trace

C4_TOKENS = 170e9  # roughly, in the split train with GPT-2's tokenizer
RULE_BYTES = 16  # per parameter: fp32 weights 4, gradients 4, Adam's moments 8


class Estimate(NamedTuple):
    """The resources that a run needs. A property is None if there is no such number, or the config does not set it."""

    c: Config
    card: Card
    mfu: float
    devices: int
    microbatch: int
    fewest_devices: Optional[int]  # on which the config's microbatch fits; with `auto`, a microbatch of 1
    fewest_devices_for_one: Optional[int]  # on which a microbatch of 1 fits
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
    def fewest_by_rule(self) -> Optional[int]:
        """The fewest devices by the rule of thumb."""
        return next((n for n in device_counts(self.c) if n * self.card.memory > RULE_BYTES * self.n_params), None)

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
        """FLOP/s of one device."""
        return None if resolve_precision(self.c.precision, self.card.is_gpu) == 'fp32' else self.card.peak

    @property
    def hours(self) -> Optional[float]:
        return self.flops / (self.devices * self.peak * self.mfu) / 3600 if self.flops and self.peak else None

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of optimizer state, over all devices."""
        return optimizer_state_bytes(self.c.optimizer, self.trace.model.model)

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of one checkpoint. A full one holds a tied weight once, a sharded one once for each of its names."""
        f, model = self.c.fsdp_config, self.trace.model
        sharded = f is not None and f.state_dict_type == 'sharded'
        named = sum(p.numel() for _, p in model.named_parameters(remove_duplicate=False))
        return 4 * self.n_params + self.optimizer_bytes + (4 * (named - self.n_params) if sharded else 0)

    @property
    def token_bytes(self) -> int:
        """Bytes of one packed token."""
        return 2 if self.trace.model.vocab_size <= 2**16 else 4

    @property
    def data_bytes(self) -> Optional[int]:
        """Bytes of all tokens of the run, packed."""
        return self.tokens and self.tokens * self.token_bytes


def divisors(n: int) -> list[int]:
    return [m for m in range(1, n + 1) if n % m == 0]


def device_counts(c: Config) -> list[int]:
    """The possible numbers of devices: they divide the global batch, and agree with the degrees in `fsdp_config`."""
    f = c.fsdp_config or FSDPConfig()
    copies, shards = f.data_parallel_replicate_degree or 1, f.data_parallel_shard_degree
    return [n for n in divisors(c.global_train_batch_size)
            if n % copies == 0 and (shards == -1 or n == copies * shards)]


def peak_memory(c: Config, card: Card, n: int, microbatch: int) -> Memory:
    """The predicted peak memory of each of n devices. A device never gets a larger microbatch than its samples."""
    return predict(c, n, card.is_gpu, min(device_batch_size(c.global_train_batch_size, n), microbatch))


def find_fewest_devices(c: Config, card: Card, microbatch: int) -> Optional[int]:
    """The fewest devices on which the microbatch fits."""
    return next((n for n in device_counts(c) if peak_memory(c, card, n, microbatch).total <= card.usable), None)


def find_largest_microbatch(c: Config, card: Card, n: int, wanted: int) -> Optional[int]:
    """The largest microbatch that fits on n devices.

    Searches from the wanted size down, then up, because tracing a step with a large microbatch takes long.
    """
    sizes = divisors(c.global_train_batch_size // n)

    def fits(microbatch: int) -> bool:
        return peak_memory(c, card, n, microbatch).total <= card.usable

    below = next((m for m in reversed(sizes) if m <= wanted and fits(m)), 0)
    return max(takewhile(fits, (m for m in sizes if m > below)), default=below) or None


def estimate(c: Config, card: Card, devices: Optional[int] = None, mfu: float = ASSUMED_MFU) -> Estimate:
    """Estimates the devices, memory, FLOPs, hours and bytes of a run.

    `devices` as None means the fewest that fit, or, if the run fits on none, the largest possible number. `mfu` is the
    fraction of the peak FLOP/s that the model reaches. Raises UserError if the memory of the model cannot be
    predicted, or the devices do not divide the global batch or the copies of the model.
    """
    possible, setting = device_counts(c), c.device_train_microbatch_size
    if not possible or devices and devices not in possible:
        device_batch_size(c.global_train_batch_size, devices or 1)
        raise UserError('fsdp_config.data_parallel_replicate_degree, data_parallel_shard_degree: the batch of '
                        f'{c.global_train_batch_size} and the copies of the model allow '
                        f'{", ".join(map(str, possible)) or "no number of"} devices')
    wanted = 1 if isinstance(setting, str) else setting
    fewest, fewest_for_one = find_fewest_devices(c, card, wanted), find_fewest_devices(c, card, 1)
    n = devices or fewest or max(possible)
    most = find_largest_microbatch(c, card, n, wanted)
    microbatch = min(c.global_train_batch_size // n, (most or 1) if setting == 'auto' else wanted)
    return Estimate(c, card, mfu, n, microbatch, fewest, fewest_for_one, most, peak_memory(c, card, n, microbatch),
                    trace_config(c, n, card.is_gpu, microbatch))


def apply_remedies(e: Estimate) -> Iterator[tuple[str, int]]:
    """Applies settings that save memory, one after another, until the run fits.

    Yields each setting that saves memory as `key=value`, with the peak of all settings so far in bytes.
    """
    c, peak = e.c, e.memory.total
    for remedy in [Remedy('device_train_microbatch_size', 1), *remedies(e.c)]:
        c, before = remedy.applied(c) if '.' in remedy.key else c, peak
        peak = peak_memory(c, e.card, e.devices, 1).total
        if peak < before:
            yield f'{remedy.key}={remedy.shown}', peak
        if peak <= e.card.usable:
            return
