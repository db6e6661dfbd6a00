"""Layers that a fork might add, and runs with them on real ranks.

    composer -n 2 tests/own_layers.py FOLDER ARGUMENTS_OF_MAIN...
"""

import sys
from pathlib import Path
from typing import Any

if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from composer.utils import dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from src import mosaic_gpt
from src.config.schema import MosaicGPTConfig


class Gain(nn.Module):
    """Has two numbers for each channel: its own initialisation draws one and sets the other."""

    def __init__(self, width: int, device: str):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, device=device))
        self.floor = nn.Parameter(torch.empty(width, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight, 0.5, 0.6)
        nn.init.constant_(self.floor, 0.25)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.floor


class Tables(nn.Module):
    """Has buffers that no checkpoint holds, like the tables of rotary positions."""

    inv_freq: Tensor
    odd: Tensor

    def __init__(self, device: str):
        super().__init__()
        self.register_buffer('inv_freq', torch.empty(4, device=device), persistent=False)
        self.register_buffer('odd', torch.empty(4, dtype=torch.bool, device=device), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.inv_freq = 10.0 ** -torch.arange(4, device=self.inv_freq.device)
        self.odd.copy_(torch.arange(4) % 2 == 1)


class OwnBlock(nn.Module):
    """Takes no `documents`, and has no `causal_attn`."""

    def __init__(self, cfg: MosaicGPTConfig):
        super().__init__()
        self.norm = nn.RMSNorm(cfg.d_model, device=cfg.device)
        self.attention = nn.MultiheadAttention(cfg.d_model, cfg.n_heads, batch_first=True, device=cfg.device)
        self.gain, self.tables = Gain(cfg.d_model, cfg.device), Tables(cfg.device)
        self.linear = nn.Linear(cfg.d_model, cfg.d_model, device=cfg.device)

    def forward(self, x: Tensor) -> Tensor:
        h, mask = self.norm(x), nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device)
        h = self.attention(h, h, h, attn_mask=mask, need_weights=False)[0]
        return x + self.linear(self.gain(h)) * self.tables.inv_freq.sum() * self.tables.odd.sum()


class OwnValues(nn.Module):
    """Has no `reset_parameters`."""

    def __init__(self, width: int, device: str):
        super().__init__()
        self.scale = nn.Parameter(torch.full((width,), 0.125, device=device))
        self.norm = nn.LayerNorm(width, device=device)
        nn.init.constant_(self.norm.weight, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.norm(x)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return {name: weight.clone() for name, weight in get_model_state_dict(model, options=options).items()}


def run(*argv: str, train: bool = True) -> tuple[dict[str, Tensor], float]:
    """A run of main.py in this process: the whole weights at its end, and the last loss of this rank."""
    import main
    from src.config import load as config

    trainer = main.main(config.load([*argv, 'log_to_console=false']), dry_run=not train)
    result = whole_weights(trainer.state.model), float(trainer.state.loss) if train else 0.0
    trainer.close()
    return result


if __name__ == '__main__':
    mosaic_gpt.GPTBlock = OwnBlock
    results: dict[str, Any] = {}
    for fsdp in ('fsdp_config=null', 'fsdp_config.sharding_strategy=FULL_SHARD'):
        for device in ('cpu', 'meta'):
            settings = (fsdp, f'model.device={device}')
            results[', '.join(settings)] = run(*sys.argv[2:], *settings, train=False)[0]
    again = 'fsdp_config.activation_checkpointing=true'
    results['trained'] = run(*sys.argv[2:], 'fsdp_config.sharding_strategy=FULL_SHARD', again)[0]
    if dist.get_global_rank() == 0:
        torch.save(results, Path(sys.argv[1], 'weights.pt'))
    from src.ranks import rendezvous
    rendezvous.leave()
