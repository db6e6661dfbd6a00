"""A checkpoint of the kit → a Hugging Face folder: safetensors, config, tokenizer.

    python src/tools/export_hf.py CHECKPOINT OUT [--dtype bfloat16] [--tokenizer NAME] [--yaml YAML key=value ...]

A MosaicGPT becomes a GPT-2, which computes the same; `hf_causal_lm` models stay what they are. The manifest beside a
checkpoint says what the weights do not (heads, activation, tokenizer). For a checkpoint without one, `--yaml` does.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any, Optional

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # import from the repository's root

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging as hf_logging

from src.checkpoints import weights as checkpoint
from src.checkpoints.hf_layout import hf_model
from src.checkpoints.loading import check_model, check_same_tokenizer
from src.checkpoints.manifest import Manifest
from src.common import program
from src.common.errors import UserError, first_line
from src.config.load import load, to_plain
from src.tokenizer import HFTokenizer, check_vocab, n_ids


def load_checkpoint(path: str, tokenizer_name: Optional[str] = None, yaml: Optional[list[str]] = None,
                    setting: str = 'CHECKPOINT') -> tuple[PreTrainedModel, Tokenizer, str]:
    """Reads a checkpoint as a Hugging Face model.

    `path` is the file of a full checkpoint, the folder of a sharded one or of a run; local or a URI. `setting` is where
    it is named, for messages. `tokenizer_name` is a name on the hub or a folder; None: the run's own. `yaml` is the
    `YAML [key=value ...]` of the run; None: the manifest beside the checkpoint. Returns the model on the CPU, in fp32,
    with embeddings for the tokenizer's ids alone; the tokenizer; and the checkpoint's path. Raises UserError.
    """
    cfg = _given(yaml)
    if sys.stderr.isatty():
        print(f'reading {path}', file=sys.stderr)
    hf_logging.set_verbosity_error()
    weights, manifest, path = checkpoint.read_weights(path, setting)
    model, name = _described(path, manifest, tokenizer_name, cfg)
    check_model(manifest, model, f'--yaml: {path}')
    try:
        hf = hf_model(model, weights, '--yaml' if yaml else path)
    except UserError:
        raise
    except ValueError as e:  # transformers' of a shape that cannot be
        raise UserError(f'model: {first_line(e)}; give section model as the run had it') from None
    kit = HFTokenizer(name, 2)
    check_same_tokenizer(manifest, kit, path, '--tokenizer' if tokenizer_name else 'tokenizer_name')
    if tokenizer_name and n_ids(kit.tokenizer) > hf.config.vocab_size:
        raise UserError(f'--tokenizer: {tokenizer_name} is not that of this model, whose vocabulary has '
                        f'{hf.config.vocab_size} tokens; name the one that it was trained with')
    check_vocab(kit, hf.config.vocab_size)
    _fit_together(hf, kit.tokenizer)
    return hf, kit.tokenizer, path


def _given(yaml: Optional[list[str]]) -> dict[str, Any]:
    cfg = to_plain(load(yaml)) if yaml else {}
    for section in ('model', 'tokenizer'):
        if not isinstance(cfg.get(section) or {}, dict):
            raise UserError(f'{section}: {cfg[section]!r} must be a section with keys of its own, as in the YAMLs')
    return cfg


def _described(path: str, manifest: Optional[Manifest], tokenizer_name: Optional[str],
               cfg: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Section `model` of the run, and the name of its tokenizer; from the config, or else the manifest."""
    model, name = cfg.get('model'), tokenizer_name or (cfg.get('tokenizer') or {}).get('tokenizer_name')
    if model and (overrides := model.get('config_overrides')):  # null: the model's own value
        model['config_overrides'] = {key: value for key, value in overrides.items() if value is not None}
    if manifest:
        model, name = model or manifest.model, name or manifest.tokenizer_name
    if model and not name:
        raise UserError(f'--tokenizer: none given, and the run of {path} had none; name a hub name or a folder')
    if not model or not name:
        raise UserError(f'--yaml: none given, and no manifest beside {path} says what its model and tokenizer are; '
                        'give the YAML and overrides of the run: --yaml YAML key=value ...')
    if not tokenizer_name and not cfg and name.startswith(('.', '/', '~')) and not Path(name).is_dir():
        raise UserError(f'--tokenizer: none given, and the run\'s is not here: {name}; name its folder, or start where '
                        'the run did')
    return model, name


def _fit_together(model: PreTrainedModel, tokenizer: Any) -> None:
    """Lets each know of the other what Hugging Face's programs ask of them."""
    tokenizer.split_special_tokens = False  # as Hugging Face's are; the kit's own is for documents
    tokenizer.model_max_length = getattr(model.config, 'max_position_embeddings', None) or int(1e30)
    model.resize_token_embeddings(n_ids(tokenizer), mean_resizing=False)  # no rows beyond its ids
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = {'bos_token_id': eos if bos is None else bos, 'eos_token_id': eos}
    model.config.update(ids)
    model.generation_config = GenerationConfig(**ids, pad_token_id=tokenizer.pad_token_id)


def check_out(out: str) -> None:
    """Raises UserError where OUT is no place for a new folder."""
    path = Path(out)
    if '://' in out:
        raise UserError(f'OUT: {out}; a folder on a disk; copy it to an object store afterwards')
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f'OUT: {out} is there already; a new or an empty folder; name another, or move it away')


def write(model: PreTrainedModel, tokenizer: Tokenizer, out: str) -> None:
    """Writes the folder whole or not at all. Raises UserError where the disk is full, or cannot be written."""
    path = Path(os.path.realpath(out))
    part = path.with_name(f'.{path.name}.part')
    shutil.rmtree(part, ignore_errors=True)  # what a killed export has left
    try:
        part.mkdir(parents=True)
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        for file in filter(Path.is_file, part.iterdir()):
            shutil.copymode(part / 'config.json', file)  # safetensors' are for their owner alone
        os.replace(part, path)
    except (OSError, SafetensorError) as e:
        raise UserError(f'OUT: {out} cannot be written: {first_line(e)}; a folder on a disk with room') from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that say what a checkpoint's manifest may not."""
    parser.add_argument('--tokenizer', metavar='NAME', help="a hub name or a folder; default: the run's")
    parser.add_argument('--yaml', nargs='+', metavar=('YAML', 'key=value'), help='of the run, where no manifest is')


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='A checkpoint as a Hugging Face folder.')
    add = parser.add_argument
    add('checkpoint', metavar='CHECKPOINT', help="a file, a sharded checkpoint's folder, or a run's; s3:// too")
    add('out', metavar='OUT', help='a new folder')
    add('--dtype', choices=['float32', 'bfloat16', 'float16'], default='float32',
        help='of the weights; the two of 16 bits make a file of half the size; default: %(default)s')
    add_arguments(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Exports, and says what."""
    check_out(args.out)
    model, tokenizer, path = load_checkpoint(args.checkpoint, args.tokenizer, args.yaml)
    write(model.to(getattr(torch, args.dtype)), tokenizer, args.out)  # pyright: ignore[reportArgumentType]
    size = sum(file.stat().st_size for file in Path(args.out).iterdir())
    print(f'{args.out}: {model.config.model_type}, {model.num_parameters():,} parameters, {len(tokenizer):,} tokens, '
          f'{size / 2**20:,.1f} MiB, {args.dtype}; from {path}')
    if added := tokenizer.num_special_tokens_to_add():  # pyright: ignore
        print(f'note: the tokenizer, a class in Python, puts {added} tokens around each text, and training had none; '
              'call it with add_special_tokens=False')


if __name__ == '__main__':
    program.run(main, parse_args)
