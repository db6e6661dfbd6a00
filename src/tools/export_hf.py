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

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # import from the repository's root

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from src.common import program
from src.common.errors import UserError, first_line
from src.tools.trained_model import add_arguments, load_checkpoint


def check_out(out: str) -> None:
    """Raises UserError where OUT is no place for a new folder."""
    path = Path(out)
    if '://' in out:
        raise UserError(f'OUT: {out}; a folder on a disk; copy it to an object store afterwards')
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f'OUT: {out} is there already; a new or an empty folder; name another, or move it away')


def write(model: PreTrainedModel, tokenizer: Tokenizer, out: str) -> None:
    """Writes the folder whole or not at all.

    Raises:
        UserError: The disk is full, or cannot be written.
    """
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
    """Exports, and says what.

    Raises:
        UserError: All that the user can mend.
    """
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
