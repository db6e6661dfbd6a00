"""A callback that lets the model continue some prompts at each evaluation, and logs the texts."""

import math
from typing import Any

import torch
from composer.core import Callback, State, get_precision_context
from composer.loggers import ConsoleLogger, Logger
from composer.utils import model_eval_mode

from src.common.errors import UserError


class TextSamples(Callback):
    """Logs the table `text_samples` at each evaluation: how the evaluated model continues some prompts.

    Each token takes a whole forward pass. So any model works, sharded or not, without code for generation. Every rank
    runs the same number of passes. The training does not change, and neither do its random numbers.

    Args:
        prompts: Texts; tokenized as documents are in training, without special tokens.
        max_new_tokens: The most tokens for each prompt, also limited by `max_seq_len`; a text ends at EOS.
        temperature: Divides the logits; 0: the most likely token each time.
        seed: The seed of the sampling, set again at each evaluation.
    """

    def __init__(self, prompts: list[str], max_new_tokens: int = 64, temperature: float = 0.8, seed: int = 17):
        for name, value, good, allowed in (
                ('prompts', prompts, prompts, 'a list of texts'),
                ('max_new_tokens', max_new_tokens, max_new_tokens > 0, 'a whole number above 0'),
                ('temperature', temperature, 0 <= temperature < math.inf,
                 'a number of 0 or more (0: the most likely token)'),
                ('seed', seed, 0 <= seed < 1 << 63, 'a whole number of 0 or more')):
            if not good:
                raise UserError(f'{name}: {value}; set {allowed}')
        self.prompts, self.max_new_tokens, self.temperature, self.seed = prompts, max_new_tokens, temperature, seed

    def prepare(self, tokenizer: Any, max_seq_len: int) -> None:
        """Tokenizes the prompts with a Hugging Face tokenizer; called once, before the first evaluation."""
        self._tokenizer = tokenizer
        self._ids = [tokenizer(prompt, add_special_tokens=False)['input_ids'] for prompt in self.prompts]
        for prompt, ids in zip(self.prompts, self._ids):
            if not 0 < len(ids) < max_seq_len:
                raise UserError(f'callbacks.text_samples.prompts: {prompt[:60]!r} has {len(ids)} tokens; give a prompt '
                                f'of 1 to {max_seq_len - 1} tokens, which leaves room in max_seq_len {max_seq_len}')
        longest = max(map(len, self._ids))
        self._n_new = min(self.max_new_tokens, max_seq_len - longest)
        # All passes have one width, for torch.compile, and it is a multiple of 16, for fp8. Attention is causal, so
        # the padding at the end has no effect.
        self._width = min(-(-(longest + self._n_new) // 16) * 16, max_seq_len)
        self._n_ids = 1 + max(tokenizer.get_vocab().values())

    def eval_start(self, state: State, logger: Logger) -> None:
        """Logs the texts here, not in `eval_end`: by then, EMA has restored the weights of training."""
        rows = [[prompt, self._tokenizer.decode(ids, skip_special_tokens=True)]
                for prompt, ids in zip(self.prompts, self._continue_prompts(state))]
        for destination in logger.destinations:
            if not isinstance(destination, ConsoleLogger):  # the console would print the table again with every line
                destination.log_table(['prompt', 'text'], rows, 'text_samples', int(state.timestamp.batch))

    @torch.no_grad()
    def _continue_prompts(self, state: State) -> list[list[int]]:
        """The new token ids of each prompt, up to EOS."""
        model: Any = state.model.module if state.is_model_ddp else state.model
        generator = torch.Generator().manual_seed(self.seed)
        eos = self._tokenizer.eos_token_id
        rows = torch.full((len(self._ids), self._width), eos)  # (prompts, width)
        for row, ids in zip(rows, self._ids):
            row[:len(ids)] = torch.tensor(ids)
        every_row, ends = torch.arange(len(rows)), torch.tensor([len(ids) for ids in self._ids])
        precision = get_precision_context(state.precision, state.precision_config, fp8_autocast_enabled=False)
        with model_eval_mode(model), precision:
            for i in range(self._n_new):
                logits = model.model(state.device.tensor_to_device(rows))[every_row, ends + i - 1, :self._n_ids]
                logits = logits.float().cpu().nan_to_num(0, 1e4, -1e4)  # a model that diverges has nans
                if self.temperature == 0:
                    rows[every_row, ends + i] = logits.argmax(-1)
                else:
                    probabilities = (logits / self.temperature).softmax(-1)
                    rows[every_row, ends + i] = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        new_ids = [row[len(ids):len(ids) + self._n_new].tolist() for row, ids in zip(rows, self._ids)]
        return [ids[:ids.index(eos)] if eos in ids else ids for ids in new_ids]
