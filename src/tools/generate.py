"""Text from a checkpoint of the kit, or from a folder of a Hugging Face model.

    python src/tools/generate.py CHECKPOINT_OR_FOLDER "prompt" ["prompt" ...] [--temperature 0.8 --top_k 50 ...]

One prompt is written to the terminal token by token; several are one batch.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any, Optional

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # import from the repository's root

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, TextStreamer
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging as hf_logging

from src.common import program
from src.common.errors import UserError, first_line, positive_int
from src.common.progress import progress
from src.tools.export_hf import add_arguments, load_checkpoint

DEFAULT_TOKENS = 100
IN_RANGE = {  # argument: what its value has to be, and how that is said
    'temperature': (lambda x: 0 <= x < math.inf, 'a number from 0, which takes the likeliest token'),
    'top_p': (lambda x: 0 < x <= 1, 'a number above 0 and up to 1, which is all tokens'),
    'seed': (lambda x: 0 <= x < 2**63, 'a whole number from 0')}


def load_folder(path: str) -> tuple[PreTrainedModel, Tokenizer]:
    """A model that transformers can load without code of its own. Raises UserError where it cannot."""
    hf_logging.set_verbosity_error()
    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        model, info = load(path, trust_remote_code=False, local_files_only=True, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as e:  # each library that reads a part has error classes of its own, or none
        raise UserError(f'CHECKPOINT_OR_FOLDER: {path} cannot be loaded as a model: {type(e).__name__}: '
                        f'{first_line(e)}; a folder with config, weights and tokenizer; write one with '
                        'src/tools/export_hf.py') from None
    if tokenizer.eos_token_id is None:
        raise UserError(f'CHECKPOINT_OR_FOLDER: the tokenizer in {path} has no EOS token, at which a text ends; set '
                        'eos_token in its tokenizer_config.json')
    if info['missing_keys']:  # which transformers would draw at random
        raise UserError(f'CHECKPOINT_OR_FOLDER: {path} lacks weights, such as {min(info["missing_keys"])}; a whole '
                        'model; export or copy it again')
    return model.eval(), tokenizer


def room_for(model: PreTrainedModel, tokenizer: Tokenizer, prompts: list[str], max_new_tokens: Optional[int]) -> int:
    """How many tokens each prompt is continued by: what was asked for, or DEFAULT_TOKENS, or what fits the context.

    Raises UserError where a prompt has no tokens, or does not fit the context.
    """
    lengths = [len(ids) for ids in tokenizer(prompts, add_special_tokens=False)['input_ids']]  # pyright: ignore
    if 0 in lengths:
        raise UserError(f'PROMPT: number {lengths.index(0) + 1} is empty; a text of at least one token to go on from')
    context = getattr(model.config, 'max_position_embeddings', None) or math.inf
    room = context - max(lengths)
    if room < (max_new_tokens or 1):
        mend = f'shorten it, or set --max_new_tokens={room} or less' if room > 0 else 'shorten it'
        raise UserError(f'PROMPT: number {lengths.index(max(lengths)) + 1} has {max(lengths)} tokens, and the model '
                        f'takes {context}, new ones included; {mend}')
    return max_new_tokens or int(min(DEFAULT_TOKENS, room))


@torch.inference_mode()
def generate(model: PreTrainedModel, tokenizer: Tokenizer, prompts: list[str], max_new_tokens: Optional[int] = None,
             temperature: float = 1.0, top_k: Optional[int] = None, top_p: float = 1.0, seed: int = 17,
             streamer: Any = None) -> list[list[int]]:
    """Continues prompts, as one batch, with padding on the left and its positions masked.

    Args:
        model: Any causal language model of transformers.
        tokenizer: Its tokenizer, with an EOS token.
        prompts: Texts; tokenized as documents are in training, without special tokens.
        max_new_tokens: Per prompt; None: 100, or what the context has room for.
        temperature: The logits are divided by it; 0: the likeliest token each time.
        top_k: Sample from so many likeliest tokens; None: from all.
        top_p: Sample from the likeliest tokens that together have this probability (Holtzman et al. 2020).
        seed: Of the sampling: the same batch and seed give the same text on one machine.
        streamer: Takes tokens as they come; transformers' own is for one prompt.

    Returns:
        Of each prompt the new token ids, up to EOS, which is left out.

    Raises:
        UserError: A prompt has no tokens, or does not fit the context.
    """
    n_new = room_for(model, tokenizer, prompts, max_new_tokens)
    tokenizer.padding_side = 'left'
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    batch: Any = tokenizer(prompts, add_special_tokens=False, return_tensors='pt', padding=True).to(model.device)
    sampling = {'do_sample': True, 'temperature': temperature, 'top_k': top_k or 0, 'top_p': top_p}
    config = GenerationConfig(max_new_tokens=n_new, pad_token_id=tokenizer.pad_token_id,
                              eos_token_id=tokenizer.eos_token_id, **(sampling if temperature else {}))
    own, model.generation_config = model.generation_config, config  # transformers fills in from it what is unset
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            rows = model.generate(input_ids=batch['input_ids'], attention_mask=batch['attention_mask'],
                                  generation_config=config, streamer=streamer)  # pyright: ignore
    finally:
        model.generation_config = own
    new = rows[:, batch['input_ids'].shape[1]:].tolist()
    return [ids[:ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids for ids in new]


class TokenBar:
    """A streamer that shows how many tokens a batch has; transformers has none for more than one prompt."""

    def __init__(self, tokens: Optional[int]):
        self.bar, self.put_prompts = progress('tokens', tokens, ' tokens'), False

    def put(self, value: torch.Tensor) -> None:
        self.bar.update(self.put_prompts)  # the first are the prompts
        self.put_prompts = True

    def end(self) -> None:
        self.bar.close()


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Continue prompts.')
    add = parser.add_argument
    add('model', metavar='CHECKPOINT_OR_FOLDER', help='as for src/tools/export_hf.py, or what that wrote')
    add('prompts', nargs='+', metavar='PROMPT')
    add('--max_new_tokens', type=positive_int, metavar='N', help='per prompt; default: 100, or what fits the context')
    add('--temperature', type=float, default=1.0, metavar='T', help='0: the likeliest token each time')
    add('--top_k', type=positive_int, metavar='K', help='sample from the K likeliest tokens; default: all')
    add('--top_p', type=float, default=1.0, metavar='P', help='from those that together have probability P')
    add('--seed', type=int, default=17, metavar='N', help='default: %(default)s')
    add_arguments(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Continues the prompts and prints them."""
    for name, (is_in_range, allowed) in IN_RANGE.items():
        if not is_in_range(value := getattr(args, name)):
            raise UserError(f'--{name}: {value}; {allowed}')
    if Path(args.model, 'config.json').is_file():
        for option, given in (('--tokenizer', args.tokenizer), ('--yaml', args.yaml)):
            if given:
                raise UserError(f'{option}: {given}; {args.model} has a model and a tokenizer of its own; leave it out')
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
