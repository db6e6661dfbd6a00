"""Generates text with a checkpoint of the kit, or with a folder of a Hugging Face model.

    python src/tools/generate.py CHECKPOINT_OR_FOLDER "prompt" ["prompt" ...] [--temperature 0.8 --top_k 50 ...]

It prints one prompt token by token, and several prompts as one batch at the end.
"""
# ruff: noqa: E402

import argparse
import math
import sys
from pathlib import Path
from typing import Any, Optional

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # import from the repository's root

from src.common import program
from src.common.errors import UserError, first_line, positive_int

IN_RANGE = {  # argument: (test of its value, the allowed values in words)
    'temperature': (lambda x: 0 <= x < math.inf, 'give a number of 0 or more; 0 takes the most likely token'),
    'top_p': (lambda x: 0 < x <= 1, 'give a number above 0 and up to 1; 1 allows all tokens'),
    'seed': (lambda x: 0 <= x < 2**63, 'give a whole number of 0 or more')}


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Reads the arguments. Raises UserError if a number is out of its range."""
    parser = argparse.ArgumentParser(description='Generates text that continues prompts.')
    add = parser.add_argument
    add('model', metavar='CHECKPOINT_OR_FOLDER', help='a checkpoint, as for export_hf.py, or a Hugging Face folder')
    add('prompts', nargs='+', metavar='PROMPT')
    add('--max_new_tokens', type=positive_int, metavar='N',
        help='for each prompt; default: 100, or as many as the context allows')
    add('--temperature', type=float, default=1.0, metavar='T', help='0: the most likely token each time; default: 1')
    add('--top_k', type=positive_int, metavar='K', help='sample from the K most likely tokens; default: all')
    add('--top_p', type=float, default=1.0, metavar='P',
        help='sample from the most likely tokens that together have probability P; default: all')
    add('--seed', type=int, default=17, metavar='N', help='of the sampling; default: %(default)s')
    program.add_checkpoint_arguments(parser)
    args = parser.parse_args(argv)
    for name, (is_in_range, allowed) in IN_RANGE.items():
        if not is_in_range(value := getattr(args, name)):
            raise UserError(f'--{name}: {value}; {allowed}')
    return args


if __name__ == '__main__':
    program.check_early(lambda: parse_args(sys.argv[1:]))  # before the imports below, which take seconds

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, TextStreamer
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging as hf_logging

from src.common.progress import progress
from src.tools.export_hf import load_checkpoint

DEFAULT_TOKENS = 100


def load_folder(path: str) -> tuple[PreTrainedModel, Tokenizer]:
    """Loads a folder with transformers. Raises UserError if it is incomplete, or needs code of its own."""
    hf_logging.set_verbosity_error()
    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        model, info = load(path, trust_remote_code=False, local_files_only=True, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as e:  # the libraries that read the files raise many classes
        raise UserError(f'CHECKPOINT_OR_FOLDER: {path} cannot be loaded as a model: {type(e).__name__}: '
                        f'{first_line(e)}; give a folder with config, weights and tokenizer, such as '
                        'src/tools/export_hf.py writes') from None
    if tokenizer.eos_token_id is None:
        raise UserError(f'CHECKPOINT_OR_FOLDER: the tokenizer in {path} has no EOS token to end a text; set '
                        'eos_token in tokenizer_config.json')
    if info['missing_keys']:  # transformers would draw them at random
        raise UserError(f'CHECKPOINT_OR_FOLDER: {path} lacks weights, such as {min(info["missing_keys"])}; '
                        'export or copy the model again')
    return model.eval(), tokenizer


def check_room(model: PreTrainedModel, tokenizer: Tokenizer, prompts: list[str], max_new_tokens: Optional[int]) -> int:
    """The number of new tokens for each prompt: `max_new_tokens`, or DEFAULT_TOKENS, or fewer if the context is full.

    Raises UserError if a prompt has no tokens, or the context has no room for `max_new_tokens` more.
    """
    lengths = [len(ids) for ids in tokenizer(prompts, add_special_tokens=False)['input_ids']]  # pyright: ignore
    if 0 in lengths:
        raise UserError(f'PROMPT: number {lengths.index(0) + 1} is empty; give a text of at least one token')
    context = getattr(model.config, 'max_position_embeddings', None) or math.inf
    room = context - max(lengths)
    if room < (max_new_tokens or 1):
        remedy = f'shorten it, or set --max_new_tokens={room} or less' if room > 0 else 'shorten it'
        raise UserError(f'PROMPT: number {lengths.index(max(lengths)) + 1} has {max(lengths)} tokens, and the model '
                        f'takes {context}, including new ones; {remedy}')
    return max_new_tokens or int(min(DEFAULT_TOKENS, room))


@torch.inference_mode()
def generate(model: PreTrainedModel, tokenizer: Tokenizer, prompts: list[str], max_new_tokens: Optional[int] = None,
             temperature: float = 1.0, top_k: Optional[int] = None, top_p: float = 1.0, seed: int = 17,
             streamer: Any = None) -> list[list[int]]:
    """Continues prompts as one batch, padded on the left.

    Args:
        model: Any causal language model of transformers.
        tokenizer: The tokenizer of the model, with an EOS token.
        prompts: Texts. They are tokenized without special tokens, as documents are in training.
        max_new_tokens: For each prompt; None: 100, or fewer if the context has less room.
        temperature: Divides the logits; 0 takes the most likely token each time.
        top_k: Sample from the k most likely tokens; None: from all.
        top_p: Sample from the most likely tokens that together have this probability (Holtzman et al. 2020).
        seed: For sampling. The same batch and seed give the same text on one machine.
        streamer: Receives tokens as they are generated; transformers' TextStreamer takes one prompt only.

    Returns:
        The new token ids of each prompt, up to EOS and without it.

    Raises:
        UserError: A prompt has no tokens, or does not fit the context.
    """
    n_new = check_room(model, tokenizer, prompts, max_new_tokens)
    tokenizer.padding_side = 'left'
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    batch: Any = tokenizer(prompts, add_special_tokens=False, return_tensors='pt', padding=True).to(model.device)
    sampling = {'do_sample': True, 'temperature': temperature, 'top_k': top_k or 0, 'top_p': top_p}
    config = GenerationConfig(max_new_tokens=n_new, pad_token_id=tokenizer.pad_token_id,
                              eos_token_id=tokenizer.eos_token_id, **(sampling if temperature else {}))
    saved, model.generation_config = model.generation_config, config  # transformers fills unset values from it
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            rows = model.generate(input_ids=batch['input_ids'], attention_mask=batch['attention_mask'],
                                  generation_config=config, streamer=streamer)  # pyright: ignore
    finally:
        model.generation_config = saved
    new = rows[:, batch['input_ids'].shape[1]:].tolist()
    return [ids[:ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids for ids in new]


class TokenBar:
    """A streamer that shows a progress bar of tokens for a batch; transformers' streamers take one prompt only."""

    def __init__(self, tokens: Optional[int]):
        self.bar, self.has_prompts = progress('tokens', tokens, ' tokens'), False

    def put(self, value: torch.Tensor) -> None:
        self.bar.update(self.has_prompts)  # the first call brings the prompts
        self.has_prompts = True

    def end(self) -> None:
        self.bar.close()


def main(args: argparse.Namespace) -> None:
    """Continues the prompts and prints them."""
    if Path(args.model, 'config.json').is_file():
        for option, value in (('--tokenizer', args.tokenizer), ('--yaml', args.yaml)):
            if value:
                raise UserError(f'{option}: {value}; leave it out: {args.model} has its own model and tokenizer')
        model, tokenizer = load_folder(args.model)
    else:
        model, tokenizer, _ = load_checkpoint(args.model, args.tokenizer, args.yaml, 'CHECKPOINT_OR_FOLDER')
    model.to('cuda' if torch.cuda.is_available() else 'cpu')  # pyright: ignore
    several = len(args.prompts) > 1
    streamer: Any = TextStreamer(tokenizer, skip_special_tokens=True)  # pyright: ignore
    texts = generate(model, tokenizer, args.prompts, args.max_new_tokens, args.temperature, args.top_k, args.top_p,
                     args.seed, TokenBar(args.max_new_tokens) if several else streamer)
    if several:
        for i, (prompt, ids) in enumerate(zip(args.prompts, texts), 1):
            print(f'[{i}] {prompt}{tokenizer.decode(ids, skip_special_tokens=True)}')


if __name__ == '__main__':
    program.run(main, parse_args)
