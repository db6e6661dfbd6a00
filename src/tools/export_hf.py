"""Exports a checkpoint of the kit to a Hugging Face folder: safetensors, config and tokenizer.

    python src/tools/export_hf.py CHECKPOINT OUT [--dtype bfloat16] [--tokenizer NAME] [--yaml YAML key=value ...]

A MosaicGPT becomes a GPT-2 that computes the same, a ModernGPT a Qwen3; `hf_causal_lm` models keep their architecture.
The manifest beside a checkpoint tells the settings of the model and the tokenizer. Give `--yaml` for a checkpoint
without one.
"""
# ruff: noqa: E402

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # import from the repository's root

from src.common import program


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Exports a checkpoint to a Hugging Face folder.')
    add = parser.add_argument
    add('checkpoint', metavar='CHECKPOINT',
        help='a file, the folder of a sharded checkpoint, or the folder of a run; also s3://...')
    add('out', metavar='OUT', help='a new or empty folder')
    add('--dtype', choices=['float32', 'bfloat16', 'float16'], default='float32',
        help='type of the weights; 16 bits halve the size of the file; default: %(default)s')
    program.add_checkpoint_arguments(parser)
    return parser.parse_args(argv)


if __name__ == '__main__':
    program.check_early(lambda: parse_args(sys.argv[1:]))  # before the imports below, which take seconds

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging as hf_logging

from src.checkpoints import weights as checkpoint
from src.checkpoints.hf_layout import hf_model
from src.checkpoints.loading import check_model, check_same_tokenizer
from src.checkpoints.manifest import Manifest
from src.common.errors import UserError, first_line
from src.config.load import load, to_plain
from src.tokenizer import HFTokenizer, check_vocab, count_ids


def load_checkpoint(path: str, tokenizer_name: Optional[str] = None, yaml: Optional[list[str]] = None,
                    setting: str = 'CHECKPOINT') -> tuple[PreTrainedModel, Tokenizer, str]:
    """Reads a checkpoint as a Hugging Face model.

    `path` is the file of a full checkpoint, the folder of a sharded one, or the folder of a run; a path or a URI.
    `setting` is the argument that names it, for messages. `tokenizer_name` is a hub name or a folder; None: the run's
    tokenizer. `yaml` is the `YAML [key=value ...]` of the run; None: read the manifest beside the checkpoint.

    Returns the model on the CPU, in fp32, with embeddings for the ids of the tokenizer only; the tokenizer; and the
    path of the checkpoint. Raises UserError if one of them is missing, or they do not belong together.
    """
    cfg = _load_sections(yaml)
    if sys.stderr.isatty():
        print(f'reading {path}', file=sys.stderr)
    hf_logging.set_verbosity_error()
    weights, manifest, path = checkpoint.read_weights(path, setting)
    model, name = _describe_model(path, manifest, tokenizer_name, cfg)
    check_model(manifest, model, f'--yaml: {path}')
    try:
        hf = hf_model(model, weights, '--yaml' if yaml else path)
    except UserError:
        raise
    except ValueError as e:  # transformers refuses the shape
        raise UserError(f'model: {first_line(e)}; give the section model of the run') from None
    kit_tokenizer = HFTokenizer(name, 2)
    check_same_tokenizer(manifest, kit_tokenizer, path, '--tokenizer' if tokenizer_name else 'tokenizer_name')
    if tokenizer_name and count_ids(kit_tokenizer.tokenizer) > hf.config.vocab_size:
        raise UserError(f'--tokenizer: {tokenizer_name} has more tokens than the {hf.config.vocab_size} of the '
                        'model; name the tokenizer that the model was trained with')
    check_vocab(kit_tokenizer, hf.config.vocab_size)
    _connect(hf, kit_tokenizer.tokenizer)
    return hf, kit_tokenizer.tokenizer, path


def _load_sections(yaml: Optional[list[str]]) -> dict[str, Any]:
    cfg = to_plain(load(yaml)) if yaml else {}
    for section in ('model', 'tokenizer'):
        if not isinstance(cfg.get(section) or {}, dict):
            raise UserError(f'{section}: {cfg[section]!r} must be a section with keys of its own, as in the YAMLs')
    return cfg


def _describe_model(path: str, manifest: Optional[Manifest], tokenizer_name: Optional[str],
                    cfg: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The section `model` of the run and the name of its tokenizer, from the config, else from the manifest."""
    model, name = cfg.get('model'), tokenizer_name or (cfg.get('tokenizer') or {}).get('tokenizer_name')
    if model and (overrides := model.get('config_overrides')):  # null means the default of the model
        model['config_overrides'] = {key: value for key, value in overrides.items() if value is not None}
    if manifest:
        model, name = model or manifest.model, name or manifest.tokenizer_name
    if model and not name:
        raise UserError(f'--tokenizer: not given, and the run of {path} had no tokenizer; give a hub name or a folder')
    if not model or not name:
        raise UserError(f'--yaml: not given, and no manifest beside {path} describes the model and tokenizer; give '
                        'the YAML and overrides of the run: --yaml YAML key=value ...')
    if not tokenizer_name and not cfg and name.startswith(('.', '/', '~')) and not Path(name).is_dir():
        raise UserError(f'--tokenizer: not given, and the tokenizer of the run, {name}, does not exist here; give its '
                        'folder, or start the program in the folder where the run started')
    return model, name


def _connect(model: PreTrainedModel, tokenizer: Any) -> None:
    """Copies values between model and tokenizer: Hugging Face's programs read each value from only one of them."""
    tokenizer.split_special_tokens = False  # Hugging Face's default; the kit splits them in documents
    tokenizer.model_max_length = getattr(model.config, 'max_position_embeddings', None) or int(1e30)
    model.resize_token_embeddings(count_ids(tokenizer), mean_resizing=False)  # no rows for ids without a token
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = {'bos_token_id': eos if bos is None else bos, 'eos_token_id': eos}
    model.config.update(ids)
    model.generation_config = GenerationConfig(**ids, pad_token_id=tokenizer.pad_token_id)


def check_out(out: str) -> None:
    """Raises UserError if OUT is not a new or empty folder on a disk."""
    path = Path(out)
    if '://' in out:
        raise UserError(f'OUT: {out} is not on a disk; name a folder on a disk, then copy it to the object store')
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f'OUT: {out} already exists; name a new or an empty folder, or move this one away')


@contextmanager
def new_folder(out: str) -> Iterator[Path]:
    """Yields a folder that becomes OUT at the end of the `with` block; after an error, nothing is left.

    Raises UserError if the disk is full or not writable.
    """
    path = Path(os.path.realpath(out))
    part = path.with_name(f'.{path.name}.part')
    shutil.rmtree(part, ignore_errors=True)  # the rest of a killed program
    try:
        part.mkdir(parents=True)
        yield part
        os.replace(part, path)
    except (OSError, SafetensorError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and 'inline_container' not in str(e):  # else torch.save, on a full disk
            raise
        raise UserError(f'OUT: {out} cannot be written: {first_line(e)}; name a folder on a disk with space') from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write(model: PreTrainedModel, tokenizer: Tokenizer, out: str) -> None:
    """Writes the folder completely or not at all. Raises UserError if the disk is full or not writable."""
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for file in filter(Path.is_file, folder.iterdir()):
            shutil.copymode(folder / 'config.json', file)  # safetensors makes its files readable for their owner only


def main(args: argparse.Namespace) -> None:
    """Exports, and prints what was exported."""
    check_out(args.out)
    model, tokenizer, path = load_checkpoint(args.checkpoint, args.tokenizer, args.yaml)
    write(model.to(getattr(torch, args.dtype)), tokenizer, args.out)  # pyright: ignore[reportArgumentType]
    size = sum(file.stat().st_size for file in Path(args.out).iterdir())
    print(f'{args.out}: {model.config.model_type}, {model.num_parameters():,} parameters, {len(tokenizer):,} tokens, '
          f'{size / 2**20:,.1f} MiB, {args.dtype}; from {path}')
    if added := tokenizer.num_special_tokens_to_add():  # pyright: ignore
        print(f'note: this tokenizer, written in Python, adds {added} special tokens to each text, unlike in training: '
              'call it with add_special_tokens=False')


if __name__ == '__main__':
    program.run(main, parse_args)
