"""The wrapper for Composer's Trainer that all causal language models share, with targets, loss and metrics.

A `ComposerCausalLM` wraps an `nn.Module` that returns its loss. The module computes the loss itself, because the logits
of a whole microbatch would be the largest tensor of the run.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Optional

import torch
import torch.nn.functional as F
from composer.metrics import LanguageCrossEntropy, LanguagePerplexity
from composer.models import ComposerModel
from torch import Tensor, nn
from torchmetrics import Metric

from src.common.errors import UserError
from src.common.flops import train_flops_per_token
from src.common.targets import IGNORE_INDEX


def compute_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype in which layers compute: autocast's dtype if autocast is on, else the dtype of `x`."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _pad_rows(x: Tensor, multiple: int, dtype: torch.dtype) -> Tensor:
    """Converts the matrix `x` to `dtype`, and adds rows of zeros up to a multiple of their number."""
    if not (n_added := -len(x) % multiple):
        return x.to(dtype)
    out = x.new_zeros(len(x) + n_added, x.shape[1], dtype=dtype)
    out[:len(x)] = x
    return out


def chunk_starts(n_rows: int, chunk: int) -> Sequence[int]:
    """Returns the first row of each chunk.

    The estimate of memory replaces this function and runs four chunks, so a chunk must keep nothing for later ones.
    """
    return range(0, n_rows, chunk)


class LossOfLogits(nn.Module):
    """Loss of a chunk of logits, and its gradient. A module, so that `compile` can fuse its steps to one kernel."""

    def forward(self, logits: Tensor, targets: Tensor, vocab: int, with_grad: bool) -> tuple[Tensor, Optional[Tensor]]:
        """Takes logits, (rows, width), of which the columns from `vocab` on are padding, and targets, (rows,).

        Returns the sum of the losses in fp32, and its gradient with respect to the logits, in their dtype and shape.
        Where it is not compiled, the memory of the logits is used for the gradient.
        """
        fuses = torch.compiler.is_compiling()  # without tensors in between; else the steps reuse memory
        trained = targets != IGNORE_INDEX
        index = targets.where(trained, 0)[:, None]  # (rows, 1)
        columns = torch.arange(logits.shape[1], device=logits.device)
        x = logits.float()  # (rows, width)
        if vocab < len(columns):
            lowest = torch.finfo(x.dtype).min  # exp of it is 0; compiled code on CPUs may assume that no number is inf
            x = x.masked_fill(columns >= vocab, lowest) if fuses else x.masked_fill_(columns >= vocab, lowest)
        top = x.amax(-1, keepdim=True)  # subtracted, so that exp does not overflow
        shifted = x[:, :vocab].gather(1, index) - top  # an error for targets that are no token
        exps = (x - top).exp() if fuses else x.sub_(top).exp_()
        z = exps.sum(-1, keepdim=True)
        loss = ((z.log() - shifted)[:, 0] * trained).sum()  # -log softmax at the targets
        if not with_grad:
            return loss, None
        mask = trained[:, None].float()  # (rows, 1)
        if fuses:  # softmax - one_hot, 0 where there is no target
            return loss, (exps * (mask / z) - mask * (columns == index)).to(logits.dtype)
        return loss, logits.copy_(exps.mul_(mask / z).scatter_add_(1, index, -mask))


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross entropy of `hidden @ weight.T`, with the logits of one chunk of rows at a time.

    The forward pass also computes both gradients, while a chunk's logits exist. The backward pass only scales them by
    the gradient of the loss. So no logits are kept, and none are computed twice.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, dtype: torch.dtype,
                with_grad: bool, multiple: int, loss_of_logits: LossOfLogits) -> Tensor:
        vocab, w = len(weight), _pad_rows(weight, multiple, dtype)
        n_targets = (targets != IGNORE_INDEX).sum().clamp(min=1)
        loss = torch.zeros((), device=hidden.device)
        d_hidden = torch.empty_like(hidden) if with_grad else None
        d_weight = torch.zeros_like(w, dtype=torch.float32) if with_grad else None
        for start in chunk_starts(len(targets), chunk):
            rows = slice(start, start + chunk)
            h = hidden[rows].to(dtype)  # (chunk, d_model)
            # Not divided by n_targets, which `backward` does: fp16 would round the quotient to 0
            chunk_loss, d_logits = loss_of_logits(h @ w.T, targets[rows], vocab, with_grad)
            loss += chunk_loss
            if d_hidden is not None and d_weight is not None and d_logits is not None:
                d_hidden[rows] = d_logits @ w
                if dtype == torch.float32:
                    d_weight.addmm_(d_logits.T, h)
                else:
                    d_weight += d_logits.T @ h
            del d_logits  # before the next chunk allocates its own
        if d_weight is not None:
            ctx.save_for_backward(d_hidden, d_weight[:vocab], n_targets)
            ctx.weight_dtype = weight.dtype
        return loss / n_targets

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Optional[Tensor], ...]:
        d_hidden, d_weight, n_targets = ctx.saved_tensors
        scale = grad_outputs[0] / n_targets
        return d_hidden * scale, (d_weight * scale).to(ctx.weight_dtype), None, None, None, None, None, None


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int = 1024,
                          vocab_multiple: Optional[int] = None,
                          loss_of_logits: Optional[LossOfLogits] = None) -> Tensor:
    """Mean cross entropy of a linear head, without the full logits: `F.cross_entropy(hidden @ weight.T, targets)`.

    Args:
        hidden: Output of the last block and norm, (batch, seq, d_model).
        weight: Weight of the head, (vocab, d_model).
        targets: Token ids, (batch, seq); -100 where there is nothing to predict.
        chunk_tokens: Number of tokens whose logits exist at one time, instead of batch * seq.
        vocab_multiple: Zero rows fill the head up to a multiple of this number, for faster matrix products on GPUs. The
            result does not change. None: 64 on a GPU, 1 on a CPU.
        loss_of_logits: A compiled `LossOfLogits`. None: not compiled.

    Returns:
        The mean over the targets in nats, fp32. Without any target it is 0, and so is its gradient.
    """
    kind, dtype = hidden.device.type, compute_dtype(hidden)
    multiple = padding_multiple(hidden, vocab_multiple)
    with torch.autocast(kind, enabled=False):
        loss: Any = _ChunkedCrossEntropy.apply(hidden.flatten(0, -2), weight, targets.flatten(), chunk_tokens, dtype,
                                               torch.is_grad_enabled(), multiple, loss_of_logits or LossOfLogits())
    return loss


def padding_multiple(hidden: Tensor, vocab_multiple: Optional[int]) -> int:
    """The multiple to which the logits of `hidden` are padded: `vocab_multiple`, or if None 64 on a GPU, 1 on a CPU."""
    return vocab_multiple or (64 if hidden.device.type == 'cuda' else 1)


def padded_linear(hidden: Tensor, weight: Tensor, vocab_multiple: Optional[int] = None) -> Tensor:
    """Logits of a linear head, (batch, seq, vocab). Zero rows fill the head up, as in `chunked_cross_entropy`."""
    w = _pad_rows(weight, padding_multiple(hidden, vocab_multiple), compute_dtype(hidden))
    return F.linear(hidden, w)[..., :len(weight)]


def plain_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy from full logits, (batch, seq, vocab): for other heads, or if `torch.compile` fuses it."""
    total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction='sum')
    return total / (targets != IGNORE_INDEX).sum().clamp(min=1)


def padding_right_order(key_padding_mask: Tensor) -> Tensor:
    """Returns the indices, (batch, seq), with which `gather` moves each row's padding behind its tokens.

    Tokens keep their order. `key_padding_mask`, (batch, seq), is true or 1 at tokens. The indices' `.argsort(1)` undoes
    the move.
    """
    return key_padding_mask.bool().int().argsort(dim=1, descending=True, stable=True)


def move_padding_right(batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Moves padding to the right end, where causal attention hides it, and removes `attention_mask`."""
    if 'attention_mask' not in batch:
        return batch
    order = padding_right_order(batch['attention_mask'])
    return {key: batch[key].gather(1, order) for key in ('input_ids', 'labels', 'sequence_id') if key in batch}


def next_token_targets(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns inputs and targets, both (batch, seq), with padding at the right end.

    The batch has `input_ids`, (batch, seq), and `labels`: the same ids, not shifted, -100 where there is nothing to
    predict. With labels of shape (batch, seq), the last position has no target; with (batch, seq + 1), it has one.
    An `attention_mask`, (batch, seq), is allowed only with labels of shape (batch, seq).
    """
    batch = move_padding_right(batch)
    input_ids, labels = batch['input_ids'], batch['labels']
    if labels.shape[1] == input_ids.shape[1] + 1:
        return input_ids, labels[:, 1:]
    assert labels.shape == input_ids.shape, f'labels {[*labels.shape]} do not fit input_ids {[*input_ids.shape]}'
    targets = labels.roll(-1, dims=1)
    targets[:, -1] = IGNORE_INDEX
    return input_ids, targets


class ComposerCausalLM(ComposerModel):
    """A causal language model for Composer's Trainer.

    Args:
        model: `model(input_ids, targets=targets)` returns the mean loss over the targets. With `attn_within_document`
            it also gets `sequence_id`. All three are of shape (batch, seq).
        n_layers: Number of blocks, to count FLOPs.
        d_model: Width of the model, to count FLOPs.
        vocab_size: Number of token ids that have an embedding.
        max_seq_len: Longest sequence that the model takes; None: any length.
        attn_within_document: Whether batches have `sequence_id`, the number of each token's document.

    Attributes:
        manifest_config: The model in the manifest of a checkpoint; None: section `model` of the config.
    """

    manifest_config: Optional[dict[str, Any]] = None

    def __init__(self, model: nn.Module, n_layers: int, d_model: int, vocab_size: int, max_seq_len: Optional[int],
                 attn_within_document: bool = False):
        super().__init__()
        self.attn_within_document = attn_within_document
        self.model = model
        self.vocab_size, self.max_seq_len = vocab_size, max_seq_len
        self.n_params = sum(p.numel() for p in model.parameters())  # parameters() counts tied ones once
        self.n_layers, self.d_model = n_layers, d_model

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns `loss`, the mean over the batch's targets in nats, and `n_targets`, their number.

        Raises UserError if the batch has `sequence_id` and the model does not use it, or the other way round.
        """
        if ('sequence_id' in batch) != self.attn_within_document:
            does, has = ('within', 'no') if self.attn_within_document else ('across', 'a')
            raise UserError(f'dataset.sequence_ids: the model attends {does} documents, and the batch has {has} '
                            'sequence_id; set it to the value of model.attn_within_document (Hugging Face models lack '
                            'this setting)')
        batch = move_padding_right(batch)
        input_ids, targets = next_token_targets(batch)
        documents = {'sequence_id': batch['sequence_id']} if self.attn_within_document else {}
        loss = self.model(input_ids, targets=targets, **documents)
        return {'loss': loss, 'n_targets': (targets != IGNORE_INDEX).sum()}

    def loss(self, outputs: dict[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        return outputs['loss']

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        return {'LanguageCrossEntropy': LanguageCrossEntropy(), 'Perplexity': LanguagePerplexity()}

    def update_metric(self, batch: Mapping[str, Tensor], outputs: dict[str, Tensor], metric: Metric) -> None:
        """Adds the loss to a metric's sums. The metric's own `update` would need all logits."""
        assert isinstance(metric, LanguageCrossEntropy)
        metric.sum_loss += outputs['loss'].detach() * outputs['n_targets']
        metric.total_items += outputs['n_targets']

    def flops_per_batch(self, batch: Mapping[str, Tensor]) -> float:
        """FLOPs of a forward and backward pass (Chowdhery et al. 2022, appendix B); SpeedMonitor turns them into MFU.

        Attention counts as if it covered whole rows, also where it stays within documents and computes less.
        """
        rows, seq_len = batch['input_ids'].shape
        return rows * seq_len * train_flops_per_token(self.n_params, self.n_layers, self.d_model, seq_len)
