"""Turns a GPT-2 or a Qwen3 of Hugging Face into a checkpoint of the kit, which a run can train further.

    python src/tools/import_hf.py MODEL OUT [--tokenizer NAME]

A GPT-2 becomes a `mosaic_gpt`, a Qwen3 a `modern_gpt`; both compute the same as before. The program reads only files of
safetensors, and prints the command that trains the checkpoint further.
"""
# ruff: noqa: E402

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == '__main__':
    sys.path[0] = str(ROOT)  # import from the repository's root

from src.common import program


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Imports a GPT-2 or a Qwen3 of Hugging Face as a checkpoint.')
    add = parser.add_argument
    add('model', metavar='MODEL', help='a folder, or a name on the Hugging Face hub')
    add('out', metavar='OUT', help='a new or empty folder')
    add('--tokenizer', metavar='NAME', help='a hub name or a folder; default: MODEL')
    return parser.parse_args(argv)


if __name__ == '__main__':
    program.check_early(lambda: parse_args(sys.argv[1:]))  # before the imports below, which take seconds

import json
import shlex
from dataclasses import asdict

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig
from transformers.utils import logging as hf_logging

from src.checkpoints.hf_layout import from_hf, kit_config, twin_config, twin_of
from src.checkpoints.manifest import Manifest
from src.common.errors import UserError, first_line
from src.config.load import load, to_plain
from src.config.schema import GPTConfig
from src.model_registry import COMPOSER_MODEL_REGISTRY
from src.tokenizer import HFTokenizer, count_ids
from src.tools.export_hf import check_out, new_folder

YAMLS = {'mosaic_gpt': 'yamls/quickstart.yaml', 'modern_gpt': 'yamls/modern_gpt/quickstart.yaml'}
NAME = 'ep0-ba0'  # of the checkpoint, as of a run before its first batch
SAMPLE_TOKENS = 1024  # at most so many in the command that is printed


def read_config(model: str) -> GPTConfig:
    """Reads the config.json of a folder or a model of the hub. Raises UserError if the kit has no such model."""
    try:
        stored, _ = PretrainedConfig.get_config_dict(model)
    except (OSError, ValueError) as e:
        raise UserError(f'MODEL: {model!r} has no config.json that can be read: {first_line(e)}; give the folder of a '
                        'model, or a name on the hub, which must be reachable unless the model is in the cache'
                        ) from None
    return kit_config(stored, f'MODEL: {model}')


def load_tokenizer(name: str, vocab_size: int) -> HFTokenizer:
    """Loads the tokenizer. Raises UserError if there is none, or the model has too few embeddings."""
    try:
        tokenizer = HFTokenizer(name, 2)
    except UserError as e:
        raise UserError(str(e).replace('tokenizer_name', '--tokenizer', 1)) from None
    if count_ids(tokenizer.tokenizer) > vocab_size:
        raise UserError(f'--tokenizer: {name} has more tokens than the {vocab_size} of the model; name the tokenizer '
                        'that the model was trained with')
    return tokenizer


def read_weights(model: str, cfg: GPTConfig) -> dict[str, Tensor]:
    """Reads the weights in fp32, by their names in Hugging Face. Raises UserError if some are missing or too many."""
    config = twin_config(cfg)
    cls: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    try:
        hf, info = cls.from_pretrained(model, config=config, dtype=torch.float32, use_safetensors=True,
                                       output_loading_info=True)
    except Exception as e:  # the libraries that read the files raise many classes
        raise UserError(f'MODEL: the weights of {model} cannot be read: {type(e).__name__}: {first_line(e)}; give a '
                        'model with safetensors, because files of other formats can run code') from None
    for kind in ('missing', 'unexpected'):
        if names := info[f'{kind}_keys']:
            raise UserError(f'MODEL: the weights of {model} do not fit its config.json: {len(names)} are {kind}, such '
                            f'as {min(names)}; copy the model again')
    return hf.state_dict()


def command(cfg: GPTConfig, tokenizer: str, out: str) -> str:
    """The command that trains the checkpoint further: the YAML, with the settings of the model that differ."""
    yaml = YAMLS[cfg.name]
    old = {key: field.default for key, field in type(cfg).model_fields.items()}
    old |= to_plain(load([str(ROOT / yaml)]))['model']
    changed = {key: value for key, value in cfg.model_dump().items() if key in twin_of(cfg).keys and old[key] != value}
    return shlex.join(['composer', 'main.py', yaml,
                       *(f'model.{key}={str(value).lower()}' for key, value in changed.items()),
                       f'tokenizer_name={tokenizer}', f'max_seq_len={min(cfg.max_seq_len, SAMPLE_TOKENS)}',
                       'optimizer.lr=3e-5', f'load_path={out}', 'load_weights_only=true'])


def main(args: argparse.Namespace) -> None:
    """Imports the model, and prints what was imported and how to train it further."""
    check_out(args.out)
    hf_logging.set_verbosity_error()
    cfg, name = read_config(args.model), args.tokenizer or args.model
    kit = COMPOSER_MODEL_REGISTRY[cfg.name](cfg.model_copy(update={'device': 'meta'}))
    tokenizer = load_tokenizer(name, cfg.vocab_size)
    shapes = {weight: tensor.shape for weight, tensor in kit.model.state_dict().items()}
    weights = from_hf(read_weights(args.model, cfg), shapes, cfg)
    assert all(weights[weight].shape == shape for weight, shape in shapes.items())
    file = f'{NAME}-rank0.pt'
    with new_folder(args.out) as folder:
        torch.save({'state': {'model': {f'model.{weight}': tensor for weight, tensor in weights.items()}}},
                   folder / file)
        manifest = Manifest(NAME, sharded=False, epoch=0, batch=0, sample=0, token=0, world_size=1,
                            files={file: (folder / file).stat().st_size}, model=cfg.model_dump(), tokenizer_name=name,
                            tokenizer_hash=tokenizer.hash)
        (folder / f'{NAME}.json').write_text(json.dumps(asdict(manifest), indent=1), 'utf-8')
    print(f'{args.out}: {cfg.name}, {sum(p.numel() for p in kit.parameters()):,} parameters, '
          f'{len(tokenizer.tokenizer):,} tokens; from {args.model}\n'
          'Train it further, with your own data_remote (3e-5 is a usual rate for more training):\n'
          f'  {command(cfg, name, args.out)}\n'
          f'max_seq_len, the tokens of a sample, may be up to {cfg.max_seq_len}.')


if __name__ == '__main__':
    program.run(main, parse_args)
