"""What a model writes while it is trained: a callback that continues prompts at each evaluation."""

import math
from typing import Any

import torch
from composer.core import Callback, State, get_precision_context
from composer.loggers import ConsoleLogger, Logger
from composer.utils import model_eval_mode

from src.common.errors import UserError


class TextSamples(Callback):
    """Logs the table `text_samples` at each evaluation: how the model that is evaluated continues some prompts.

    Each token is a whole forward pass, so that every model, sharded in every way, needs nothing beyond its training
    form; as many passes on each rank. Nothing of the training changes, its random numbers included.

    Args:
        prompts: Texts; tokenized as documents are in training, without special tokens.
        max_new_tokens: For each prompt, or as many as `max_seq_len` has room for; a text ends at EOS.
        temperature: The logits are divided by it; 0: the likeliest token each time.
        seed: Of the sampling, anew at each evaluation.
    """

    def __init__(self, prompts: list[str], max_new_tokens: int = 64, temperature: float = 0.8, seed: int = 17):
        for name, value, good, allowed in (
                ('prompts', prompts, prompts, 'a list of texts'),
                ('max_new_tokens', max_new_tokens, max_new_tokens > 0, 'a whole number above 0'),
                ('temperature', temperature, 0 <= temperature < math.inf,
                 'a number from 0, which takes the likeliest token'),
                ('seed', seed, 0 <= seed < 1 << 63, 'a whole number from 0')):
            if not good:
                raise UserError(f'{name}: {value}; {allowed}')
        self.prompts, self.max_new_tokens, self.temperature, self.seed = prompts, max_new_tokens, temperature, seed

    def prepare(self, tokenizer: Any, max_seq_len: int) -> None:
        """Tokenizes the prompts, with Hugging Face's own; called once, before the first evaluation."""
        self._tokenizer = tokenizer
        self._ids = [tokenizer(prompt, add_special_tokens=False)['input_ids'] for prompt in self.prompts]
        for prompt, ids in zip(self.prompts, self._ids):
            if not 0 < len(ids) < max_seq_len:
                raise UserError(f'callbacks.text_samples.prompts: {prompt[:60]!r} has {len(ids)} tokens; 1 to '
                                f'{max_seq_len - 1} leave room for more in max_seq_len {max_seq_len}')
        longest = max(map(len, self._ids))
        self._new = min(self.max_new_tokens, max_seq_len - longest)
        # One width for all passes, for what is compiled, and a multiple of 16, for fp8; what lies beyond is not seen.
        self._width = min(-(-(longest + self._new) // 16) * 16, max_seq_len)
        self._n_ids = 1 + max(tokenizer.get_vocab().values())

    def eval_start(self, state: State, logger: Logger) -> None:
        """Not `eval_end`: there EMA has taken back the weights that are evaluated."""
        rows = [[prompt, self._tokenizer.decode(ids, skip_special_tokens=True)]
                for prompt, ids in zip(self.prompts, self._continued(state))]
        for destination in logger.destinations:
            if not isinstance(destination, ConsoleLogger):  # which would print them again with every line
                destination.log_table(['prompt', 'text'], rows, 'text_samples', int(state.timestamp.batch))

    @torch.no_grad()
    def _continued(self, state: State) -> list[list[int]]:
        model: Any = state.model.module if state.is_model_ddp else state.model
        generator = torch.Generator().manual_seed(self.seed)
        eos = self._tokenizer.eos_token_id
        rows = torch.full((len(self._ids), self._width), eos)  # (prompts, width)
        for row, ids in zip(rows, self._ids):
            row[:len(ids)] = torch.tensor(ids)
        every, ends = torch.arange(len(rows)), torch.tensor([len(ids) for ids in self._ids])
        precision = get_precision_context(state.precision, state.precision_config, fp8_autocast_enabled=False)
        with model_eval_mode(model), precision:
            for i in range(self._new):
                logits = model.model(state.device.tensor_to_device(rows))[every, ends + i - 1, :self._n_ids]
                logits = logits.float().cpu().nan_to_num(0, 1e4, -1e4)  # of a model that diverges
                if self.temperature == 0:
                    rows[every, ends + i] = logits.argmax(-1)
                else:
                    likely = (logits / self.temperature).softmax(-1)
                    rows[every, ends + i] = torch.multinomial(likely, 1, generator=generator)[:, 0]
        new = [row[len(ids):len(ids) + self._new].tolist() for row, ids in zip(rows, self._ids)]
        return [ids[:ids.index(eos)] if eos in ids else ids for ids in new]
