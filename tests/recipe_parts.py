"""Takes one part at a time away from the recipe of `modern_gpt`, or puts one in, at one size of the ladder.

    python tests/recipe_parts.py [--out ./ladder] [--size 96x2] [--tokens_per_parameter 20] [--rate 4e-3] [NAME ...]

Reads the data of `python src/tools/ladder.py --out OUT`. Each row of ROWS is one training with a last evaluation over
the whole val split; NAMEs choose rows. With several --rate, a row tries them all, and the lowest loss counts. Prints
the parameters, FLOPs, losses by rate, and the distance to the whole recipe in nats.
"""

# ruff: noqa: E402

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import main  # before Composer, because Composer reads environment variables that main sets

# isort: split
import torch
import torch.nn.functional as F
from torch import nn

from src import modern_gpt, optimizers
from src.common.flops import train_flops_per_token
from src.config.load import load
from src.modern_gpt import GroupedQueryAttention, ModernGPT
from src.mosaic_gpt import MosaicGPT
from src.tools.ladder import SEQ_LEN, Rung, parse_size

Patch = Callable[[ExitStack], Any]


class GELUMLP(nn.Module):
    """The MLP of GPT-2 without biases, as wide as in `mosaic_gpt`."""

    def __init__(self, cfg: Any):
        super().__init__()
        self.mlp_up = nn.Linear(cfg.d_model, 4 * cfg.d_model, bias=False, device=cfg.device)
        self.mlp_down = nn.Linear(4 * cfg.d_model, cfg.d_model, bias=False, device=cfg.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp_down(F.gelu(self.mlp_up(x)))


def learn_positions(stack: ExitStack) -> None:
    build = ModernGPT.build_layers

    def with_positions(self: Any, cfg: Any) -> nn.ModuleDict:
        layers = build(self, cfg)
        layers['wpe'] = nn.Embedding(cfg.max_seq_len, cfg.d_model, device=cfg.device)
        return layers

    stack.enter_context(mock.patch.object(ModernGPT, 'build_layers', with_positions))
    stack.enter_context(mock.patch.object(ModernGPT, 'embed', lambda self, ids, documents: self.transformer['wte'](ids)
                                          + self.transformer['wpe'](torch.arange(ids.shape[1]))))
    stack.enter_context(mock.patch.object(modern_gpt, 'rotate', lambda x, positions, theta: x))


def drop_qk_norm(stack: ExitStack) -> None:
    build = GroupedQueryAttention.__init__

    def without_norms(self: Any, cfg: Any) -> None:
        build(self, cfg)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()

    stack.enter_context(mock.patch.object(GroupedQueryAttention, '__init__', without_norms))


def keep_matrices_whole(stack: ExitStack) -> None:
    build = optimizers.muon_groups
    stack.enter_context(mock.patch.object(optimizers, 'muon_groups', lambda model, cfg: [
        {**group, 'rows': ()} if 'rows' in group else group for group in build(model, cfg)]))


def patch(owner: Any, name: str, value: Any) -> Patch:
    return lambda stack: stack.enter_context(mock.patch.object(owner, name, value))


def layer_norm(width: int, eps: float, device: str) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps, bias=False, device=device)


ROWS: dict[str, tuple[list[str], Patch]] = {
    'modern': ([], lambda stack: None),
    'AdamW for Muon': (['optimizer.name=adamw', 'optimizer.momentum=null'], lambda stack: None),
    'cosine for the cool-down': (['scheduler.name=cosine_with_warmup', 'scheduler.alpha_f=0.1', 'scheduler.cooldown=null',
                                  'scheduler.cooldown_shape=null'], lambda stack: None),
    '1-sqrt for the line': (['scheduler.cooldown_shape=1-sqrt'], lambda stack: None),
    'learned positions for RoPE': ([], learn_positions),
    'no norm of queries and keys': ([], drop_qk_norm),
    'LayerNorm for RMSNorm': ([], patch(torch.nn, 'RMSNorm', layer_norm)),
    'GELU for SwiGLU': ([], patch(modern_gpt, 'SwiGLU', GELUMLP)),
    'small weights for zeros': ([], patch(ModernGPT, 'residual_std', staticmethod(MosaicGPT.residual_std))),
    'fused matrices whole in Muon': ([], keep_matrices_whole),
    'weight decay 0.1': (['optimizer.weight_decay=0.1'], lambda stack: None),
    'cautious weight decay 0.1': (['optimizer.weight_decay=0.1', 'optimizer.cautious=true'], lambda stack: None),
    'half the heads of keys and values': (['model.n_kv_heads=1'], lambda stack: None),
}
PLAIN = {'plain': [], 'plain with Muon': ['optimizer.name=muon'], 'plain with Muon and cool-down': [
    'optimizer.name=muon', 'scheduler.name=warmup_stable_decay', 'scheduler.alpha_f=0']}


def train(rung: Rung, data: Path, overrides: list[str], change: Patch) -> tuple[float, Any]:
    """The loss of the last evaluation, and the model."""
    arguments = rung.arguments(data, Path('.'))  # its length is that of the whole recipe, so before the change
    with ExitStack() as stack:
        change(stack)
        trainer = main.main(load([*arguments, 'save_folder=null', 'autoresume=false', 'loggers.tensorboard=false',
                                  'log_to_console=false', *overrides]))
        loss = float(trainer.state.eval_metrics['eval']['LanguageCrossEntropy'].compute())
        trainer.close()
        return loss, trainer.state.model


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('rows', nargs='*', metavar='NAME')
    parser.add_argument('--out', type=Path, default=Path('ladder'))
    parser.add_argument('--size', type=parse_size, default=(96, 2))
    parser.add_argument('--tokens_per_parameter', type=float, default=20.0)
    parser.add_argument('--rate', type=float, nargs='+', default=[4e-3])
    args = parser.parse_args()
    whole = None
    for name in args.rows or [*ROWS, *PLAIN]:
        overrides, change = ROWS.get(name) or (PLAIN[name], lambda stack: None)
        losses, model = {}, None
        for rate in args.rate:
            rung = Rung('plain' if name in PLAIN else 'modern', *args.size, args.tokens_per_parameter, rate)
            losses[rate], model = train(rung, args.out / 'data', overrides, change)
        best = min(losses.values())
        whole = best if name == 'modern' else whole
        distance = '' if whole is None else f'{best - whole:+.4f}'
        flops = rung.tokens * train_flops_per_token(model.n_params, model.n_layers, model.d_model, SEQ_LEN)
        print(f'| {name} | {model.n_params:,} | {flops:.2e} | '
              f'{", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in losses.items())} | {distance} |', flush=True)
