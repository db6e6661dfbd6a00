"""What a run shows and Composer lacks."""

from typing import Any, Optional

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from src.batch_size import grad_accum
from src.causal_lm import IGNORE, next_token_targets
from src.errors import UserError


class StepCounters(Callback):
    """Logs `trainer/grad_accum` (microbatches per step) and `trainer/global_step` with every batch.

    Ends a run whose epochs hold no batch: Composer would begin epoch after epoch, for ever.
    """

    def epoch_start(self, state: State, logger: Logger) -> None:
        self._batches_before = int(state.timestamp.batch)

    def epoch_end(self, state: State, logger: Logger) -> None:
        if int(state.timestamp.batch) == self._batches_before:
            raise UserError('train_loader: an epoch holds not one full batch for each device and worker; use more data, a '
                            'smaller global_train_batch_size, fewer train_loader.num_workers, or train_loader.drop_last=false')

    def batch_end(self, state: State, logger: Logger) -> None:
        assert state.device_train_microbatch_size is not None
        rows = len(state.batch['input_ids'])
        logger.log_metrics({'trainer/grad_accum': grad_accum(rows, int(state.device_train_microbatch_size)),
                            'trainer/global_step': int(state.timestamp.batch)})


class UnigramBaseline(Callback):
    """Logs `baseline/unigram_entropy`, once: the entropy in nats of the token frequencies of the evaluation set.

    It is the loss of the best model that ignores all context; one that learns anything falls below it.
    """

    def __init__(self):
        self.entropy: Optional[float] = None
        self._counts = torch.zeros(0, dtype=torch.int64)

    def state_dict(self) -> dict[str, Any]:
        return {'entropy': self.entropy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.entropy = state['entropy']

    def eval_after_forward(self, state: State, logger: Logger) -> None:
        if self.entropy is None:
            _, targets = next_token_targets(state.batch)
            counts = torch.bincount(targets[targets != IGNORE].cpu(), minlength=len(self._counts))
            counts[:len(self._counts)] += self._counts
            self._counts = counts

    def eval_end(self, state: State, logger: Logger) -> None:
        if self.entropy is None:
            gathered = dist.all_gather_object(self._counts.tolist())
            longest = max(map(len, gathered))
            total = torch.tensor([c + [0] * (longest - len(c)) for c in gathered]).sum(0)
            p = total[total > 0].double() / total.sum()
            self.entropy = -(p * p.log()).sum().item()
            logger.log_metrics({'baseline/unigram_entropy': self.entropy})
