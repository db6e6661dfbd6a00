"""What Composer lacks: figures and texts that a run shows, a guard against losses that are not finite, a stop that saves."""

import logging
import math
import sys
from collections.abc import Callable
from typing import Any, Optional

import torch
from composer.core import Algorithm, Callback, Event, Precision, State, get_precision_context
from composer.loggers import ConsoleLogger, Logger
from composer.utils import dist, ensure_tuple, model_eval_mode
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor import DTensor, Replicate
from torch.utils.data import DistributedSampler
from tqdm import tqdm

from src.batch_size import grad_accum
from src.causal_lm import IGNORE, next_token_targets
from src.errors import UserError
from src.processes import Stopped, StopRequest
from src.progress import progress

log = logging.getLogger('src')


NO_BATCH = ('train_loader: an epoch holds not one full batch for each device and worker; use more data, a smaller '
            'global_train_batch_size, fewer train_loader.num_workers, or train_loader.drop_last=false')


class StepCounters(Callback):
    """Logs `trainer/grad_accum` (microbatches per step) and `trainer/global_step` with every batch, `trainer/devices` at a start.

    Ends a run whose epochs hold no batch: Composer would begin epoch after epoch, for ever. Shows how a resumed run reads up to
    where it was, which Composer does in silence.
    """

    _reading: Optional[tqdm] = None

    def fit_start(self, state: State, logger: Logger) -> None:
        logger.log_metrics({'trainer/devices': dist.get_world_size()})
        if behind := int(state.timestamp.batch_in_epoch):
            self._reading = progress('reading up to the checkpoint', behind + 1, ' batches', delay=2)

    def before_dataloader(self, state: State, logger: Logger) -> None:  # what is after it does not come for what is dropped
        if self._reading is not None:
            self._reading.update()

    def batch_start(self, state: State, logger: Logger) -> None:
        if self._reading is not None:
            self._reading.close()
            self._reading = None

    def epoch_end(self, state: State, logger: Logger) -> None:
        # Not by what `epoch_start` saw: it does not come again for an epoch that a resumed run only finishes.
        assert state.previous_timestamp is not None
        if int(state.previous_timestamp.batch_in_epoch) == 0:
            raise UserError(NO_BATCH)

    def batch_end(self, state: State, logger: Logger) -> None:
        assert state.device_train_microbatch_size is not None
        rows = len(state.batch['input_ids'])
        logger.log_metrics({'trainer/grad_accum': grad_accum(rows, int(state.device_train_microbatch_size)),
                            'trainer/global_step': int(state.timestamp.batch)})


class UnigramBaseline(Callback):
    """Logs `baseline/unigram_entropy`, once: the entropy in nats of the token frequencies of the evaluation set.

    It is the loss of the best model that ignores all context; one that learns anything falls below it. Each sample counts once,
    on any number of ranks.
    """

    def __init__(self):
        self.entropy: Optional[float] = None
        self._counts = torch.zeros(0, dtype=torch.int64)

    def state_dict(self) -> dict[str, Any]:
        return {'entropy': self.entropy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.entropy = state['entropy']

    def eval_start(self, state: State, logger: Logger) -> None:
        self._counts = torch.zeros(0, dtype=torch.int64)
        sampler = getattr(state.dataloader, 'sampler', None)
        # Where the samples do not divide by the ranks, the sampler repeats some, as the last of those ranks.
        self._rows_left = (len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))  # pyright: ignore
                           if isinstance(sampler, DistributedSampler) else sys.maxsize)

    def eval_after_forward(self, state: State, logger: Logger) -> None:
        if self.entropy is None:
            _, targets = next_token_targets(state.batch)
            self._rows_left, targets = self._rows_left - len(targets), targets[:self._rows_left]
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


class TextSamples(Callback):
    """Logs the table `text_samples` at each evaluation: how the model that is evaluated continues some prompts.

    Each token is a whole forward pass, so that every model, sharded in every way, needs nothing beyond its training form; as
    many passes on each rank. Nothing of the training changes, its random numbers included.

    Args:
        prompts: Texts; tokenized as documents are in training, without special tokens.
        max_new_tokens: For each prompt, or as many as `max_seq_len` has room for; a text ends at EOS.
        temperature: The logits are divided by it; 0: the likeliest token each time.
        seed: Of the sampling, anew at each evaluation.
    """

    def __init__(self, prompts: list[str], max_new_tokens: int = 64, temperature: float = 0.8, seed: int = 17):
        for name, value, good, allowed in (
                ('prompts', prompts, prompts and all(prompts), 'a list of texts, none of them empty'),
                ('max_new_tokens', max_new_tokens, max_new_tokens > 0, 'a whole number above 0'),
                ('temperature', temperature, 0 <= temperature < math.inf, 'a number from 0, which takes the likeliest token'),
                ('seed', seed, 0 <= seed < 2**63, 'a whole number from 0')):
            if not good:
                raise ValueError(f'{name}: {value!r}; {allowed}')
        self.prompts, self.max_new_tokens, self.temperature, self.seed = prompts, max_new_tokens, temperature, seed

    def prepare(self, tokenizer: Any, max_seq_len: int) -> None:
        """Tokenizes the prompts; called once, before the first evaluation.

        Args:
            tokenizer: Hugging Face's own.
            max_seq_len: Tokens that a text may have in all.

        Raises:
            UserError: A prompt has no token, or leaves no room for another one.
        """
        self._tokenizer = tokenizer
        self._ids = [tokenizer(prompt, add_special_tokens=False)['input_ids'] for prompt in self.prompts]
        for prompt, ids in zip(self.prompts, self._ids):
            if not 0 < len(ids) < max_seq_len:
                raise UserError(f'callbacks.text_samples.prompts: {prompt[:60]!r} has {len(ids)} tokens; 1 to {max_seq_len - 1} '
                                f'leave room for more in max_seq_len {max_seq_len}')
        longest = max(map(len, self._ids))
        self._new = min(self.max_new_tokens, max_seq_len - longest)
        # One width for all passes, for what is compiled, and a multiple of 16, for fp8; causal attention hides what lies beyond.
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
        with model_eval_mode(model), get_precision_context(state.precision, state.precision_config, fp8_autocast_enabled=False):
            for i in range(self._new):
                logits = model.model(state.device.tensor_to_device(rows))[every, ends + i - 1, :self._n_ids].float().cpu()
                logits = logits.nan_to_num(0, 1e4, -1e4)  # of a model that diverges, which NonFiniteGuard is for
                rows[every, ends + i] = logits.argmax(-1) if self.temperature == 0 else torch.multinomial(
                    (logits / self.temperature).softmax(-1), 1, generator=generator)[:, 0]
        new = [row[len(ids):len(ids) + self._new].tolist() for row, ids in zip(rows, self._ids)]
        return [ids[:ids.index(eos)] if eos in ids else ids for ids in new]


def gradient_copies(model: torch.nn.Module) -> int:
    """How many ranks hold each gradient: all under DDP, one under FSDP, the replicate degree under HSDP."""
    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel) and module.sharding_strategy != ShardingStrategy.NO_SHARD:
            group: Any = module.process_group  # the one that shards: a node's ranks under HSDP
            return dist.get_world_size() // group.size()
    for p in model.parameters():
        if isinstance(p, DTensor):
            mesh = p.device_mesh
            replicas = math.prod(mesh.size(i) for i, placement in enumerate(p.placements) if isinstance(placement, Replicate))
            return dist.get_world_size() // mesh.size() * replicas
    return dist.get_world_size()


class NonFiniteGuard(Algorithm):
    """Skips the update of a batch whose loss or gradient is nan or infinite, on all ranks alike.

    The batch counts and the schedule advances; weights, momentum and clipping see nothing of it. Logs
    `trainer/skipped_batches` when it changes and, before clipping, `trainer/grad_norm`.

    The last of the algorithms: Composer runs them backwards at `AFTER_TRAIN_BATCH`, and clipping by an infinite norm would
    turn the gradients into zeros and nans. Under amp_fp16 only the loss counts: there gradients overflow as a matter of
    course, and the scaler skips them.

    Args:
        max_in_a_row: After so many skipped batches in a row the run ends with a `UserError`.
    """

    def __init__(self, max_in_a_row: int):
        self.max_in_a_row = max_in_a_row
        self.in_a_row = self.total = 0

    def state_dict(self) -> dict[str, Any]:
        return {'in_a_row': self.in_a_row, 'total': self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.in_a_row, self.total = state['in_a_row'], state['total']

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.FIT_START, Event.BEFORE_TRAIN_BATCH, Event.AFTER_LOSS, Event.AFTER_TRAIN_BATCH)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.FIT_START:
            assert state.algorithms[-1] is self, f'NonFiniteGuard is the last algorithm, not before {state.algorithms[-1]}'
            self._copies = gradient_copies(state.model)
            logger.log_metrics({'trainer/skipped_batches': self.total})
        elif event == Event.BEFORE_TRAIN_BATCH:  # which also comes again, after a microbatch that did not fit
            self._losses: list[torch.Tensor] = []
        elif event == Event.AFTER_LOSS:
            self._losses.append(torch.stack([loss.detach().float().mean() for loss in ensure_tuple(state.loss)]).sum())
        else:
            self._judge(state, logger)

    def _judge(self, state: State, logger: Logger) -> None:
        loss, norm = self._loss_and_norm(state)
        logger.log_metrics({'trainer/grad_norm': norm})
        if math.isfinite(loss) and (math.isfinite(norm) or state.precision == Precision.AMP_FP16):
            self.in_a_row = 0
            return
        for p in state.model.parameters():
            p.grad = None
        self.in_a_row += 1
        self.total += 1
        logger.log_metrics({'trainer/skipped_batches': self.total})
        what = f'batch {int(state.timestamp.batch) + 1}: loss {loss:.4g}, gradient norm {norm:.4g}'
        log.warning('%s: update skipped (%d in a row, at most %d)', what, self.in_a_row, self.max_in_a_row)
        if self.in_a_row >= self.max_in_a_row:
            raise UserError(f'{what}; {self.in_a_row} batches in a row had a loss or gradient that is not finite: lower '
                            'optimizer.lr, lengthen scheduler.t_warmup, use precision=amp_bf16 or fp32, or look into the data')

    def _loss_and_norm(self, state: State) -> tuple[float, float]:
        """The mean loss of all microbatches and the gradient norm of the model; not finite if they are so on any rank."""
        grads = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
                 for p in state.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads).float()
        losses = torch.stack(self._losses)
        sums = torch.stack([norm.to(losses.device) ** 2 / self._copies, losses.sum(), torch.ones_like(losses).sum()])
        dist.all_reduce(sums)
        squares, loss, n_microbatches = sums.tolist()
        return loss / n_microbatches, math.sqrt(squares)


class GracefulStop(Callback):
    """Carries out a requested stop: saves after the batch at hand and raises `Stopped`.

    A stop interrupts an evaluation, or skips it. The last of the callbacks, so that all others have seen the batch.

    Args:
        stop: Which signals set, at another moment on every rank.
        save: Saves a checkpoint; called on all ranks, after a batch that this process has trained on. It may be called for
            a batch that is saved already, and while the model is in evaluation mode.
    """

    def __init__(self, stop: StopRequest, save: Optional[Callable[[State, Logger], None]] = None):
        self._stop, self._save = stop, save
        self._agreed = False
        self._trained_from: Optional[int] = None

    def _agree(self, state: State) -> bool:
        requested = state.device.tensor_to_device(torch.tensor([int(self._stop.requested)]))
        dist.all_reduce(requested, 'MAX')
        self._agreed = bool(requested.item())
        return self._agreed

    def _end(self, state: State, logger: Logger) -> None:
        batch = int(state.timestamp.batch)
        if self._save is not None and self._trained_from is not None and batch > self._trained_from:
            self._save(state, logger)
        raise Stopped(f'stopped on request after batch {batch}')

    def fit_start(self, state: State, logger: Logger) -> None:
        self._trained_from = int(state.timestamp.batch)
        if self._agree(state):
            self._end(state, logger)

    def batch_end(self, state: State, logger: Logger) -> None:
        if self._agree(state):
            for evaluator in state.evaluators:
                evaluator.eval_interval = lambda state, event: False

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        if self._agreed:
            self._end(state, logger)

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        if self._agree(state):
            self._end(state, logger)
