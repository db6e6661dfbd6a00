"""Settings that save memory, for a run that does not fit."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from src.config.schema import Config, FSDPConfig

SMALL_CHUNK = 256  # tokens; the logits of such a chunk take little memory


class Remedy(NamedTuple):
    """A setting that saves memory: its dotted key, its value, and its effect, as the end of a sentence."""

    key: str
    value: Any
    effect: str = ''

    @property
    def shown(self) -> str:
        """The value as a YAML writes it."""
        return str(self.value).lower() if isinstance(self.value, bool) else str(self.value)

    def applied(self, c: Config) -> Config:
        """The config with this setting."""
        section, name = self.key.split('.')
        part = getattr(c, section) or FSDPConfig(version=2 if c.optimizer.name == 'muon' else None)
        return c.model_copy(update={section: part.model_copy(update={name: self.value})})


FSDP = (
    Remedy('fsdp_config.sharding_strategy', 'FULL_SHARD', ', which shares weights, gradients and optimizer state'),
    Remedy('fsdp_config.activation_checkpointing', True, ' (slower)'),
    Remedy('fsdp_config.activation_cpu_offload', True, ' (slower still)'),
)


def remedies(c: Config) -> Iterator[Remedy]:
    """The settings that this config can still change, the cheapest first. Try a smaller microbatch before them."""
    has_chunks = getattr(c.model, 'logit_softcap', None) is None  # a cap needs all logits
    if getattr(c.model, 'loss_impl', None) == 'plain':
        yield Remedy('model.loss_impl', 'chunked', ', which never holds all logits')
    elif has_chunks and getattr(c.model, 'loss_chunk_tokens', 0) > SMALL_CHUNK:
        yield Remedy('model.loss_chunk_tokens', SMALL_CHUNK)
    for remedy in FSDP:
        name = remedy.key.split('.')[1]
        if name == 'activation_checkpointing' and c.compile_config and c.compile_config.scope == 'model':
            continue  # a compiled model excludes activation checkpointing
        if c.fsdp_config is None or getattr(c.fsdp_config, name) != remedy.value:
            yield remedy
