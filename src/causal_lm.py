"""What every causal language model of the kit shares: targets, loss and metrics.

A model that Composer trains is a `ComposerCausalLM`: an `nn.Module` that returns the loss, in a thin wrapper. The
wrapped module computes the loss itself, so that the logits of a whole microbatch never exist.
"""

from collections.abc import Mapping
from typing import Any, Optional

import torch
import torch.nn.functional as F
from composer.metrics import LanguageCrossEntropy, LanguagePerplexity
from composer.models import ComposerModel
from torch import Tensor, nn
from torchmetrics import Metric

from src.common.errors import UserError
from src.common.flops import train_flops_per_token
from src.common.targets import IGNORE


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type in which layers compute with `x`: autocast's, where that is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _padded(x: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """`x` in another type and with zeros to the right or below; `x` itself where that is nothing."""
    if x.shape == shape:
        return x.to(dtype)
    out = x.new_zeros(shape, dtype=dtype)
    out[:x.shape[0], :x.shape[1]] = x
    return out


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross entropy of `hidden @ weight.T`, a chunk of rows at a time.

    The gradient of a mean is linear in the gradient that arrives, so both gradients are computed here, while a
    chunk's logits exist, and only scaled in the backward pass: no logits are kept and none are computed twice.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, dtype: torch.dtype,
                with_grad: bool, multiple: int) -> Tensor:
        vocab, width = len(weight), len(weight) + -len(weight) % multiple
        w = _padded(weight, (width, weight.shape[1]), dtype)  # what the rows of zeros give is cut off before it counts
        n_targets = (targets != IGNORE).sum().clamp(min=1)
        loss = torch.zeros((), device=hidden.device)
        d_hidden = torch.empty_like(hidden) if with_grad else None
        d_weight = torch.zeros_like(w, dtype=torch.float32) if with_grad else None
        for start in range(0, len(targets), chunk):
            rows = slice(start, start + chunk)
            h, target = hidden[rows].to(dtype), targets[rows]
            trained = target != IGNORE
            index = target.where(trained, 0)[:, None]  # (chunk, 1)
            logits = (h @ w.T)[:, :vocab].float()  # (chunk, vocab); everything below is in place
            top = logits.amax(-1, keepdim=True)
            shifted = logits.gather(1, index) - top
            exps = logits.sub_(top).exp_()
            z = exps.sum(-1, keepdim=True)
            loss += ((z.log() - shifted)[:, 0] * trained).sum()
            if d_hidden is not None and d_weight is not None:
                # d loss / d logits = (softmax - one_hot) / n_targets; the division comes last, fp16 would round it to 0
                share = trained[:, None].float()
                exps.mul_(share / z).scatter_add_(1, index, -share)
                d_logits = _padded(exps, (len(exps), width), dtype)
                del logits, exps  # else they would be there until the next chunk's are
                d_hidden[rows] = d_logits @ w
                if dtype == torch.float32:
                    d_weight.addmm_(d_logits.T, h)
                else:
                    d_weight += d_logits.T @ h
                del d_logits
        if d_weight is not None:
            ctx.save_for_backward(d_hidden, d_weight[:vocab], n_targets)
            ctx.weight_dtype = weight.dtype
        return loss / n_targets

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Optional[Tensor], ...]:
        d_hidden, d_weight, n_targets = ctx.saved_tensors
        scale = grad_outputs[0] / n_targets
        return d_hidden * scale, (d_weight * scale).to(ctx.weight_dtype), None, None, None, None, None


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int = 1024,
                          vocab_multiple: Optional[int] = None) -> Tensor:
    """Mean cross entropy of a linear head, equal to `F.cross_entropy(hidden @ weight.T, targets)`.

    At most `chunk_tokens` rows of logits exist at one time, instead of batch * seq.

    Args:
        hidden: What the head reads, (batch, seq, d_model).
        weight: The head, (vocab, d_model).
        targets: Token ids, (batch, seq); -100 where there is nothing to predict.
        chunk_tokens: Rows of logits at one time.
        vocab_multiple: The head is padded to a multiple of so many rows, which matrix products on GPUs want; the
            result is the same. None: 64 on a GPU, 1 on a CPU.

    Returns:
        The mean over the targets in nats, fp32; 0, with a gradient of 0, where there is none.
    """
    kind, dtype = hidden.device.type, compute_dtype(hidden)
    multiple = vocab_multiple or (64 if kind == 'cuda' else 1)
    with torch.autocast(kind, enabled=False):
        loss: Any = _ChunkedCrossEntropy.apply(hidden.flatten(0, -2), weight, targets.flatten(), chunk_tokens, dtype,
                                               torch.is_grad_enabled(), multiple)
    return loss


def plain_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The same from logits, (batch, seq, vocab): for heads of other kinds, and for `torch.compile` to fuse."""
    total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction='sum')
    return total / (targets != IGNORE).sum().clamp(min=1)


def padding_right_order(key_padding_mask: Tensor) -> Tensor:
    """The order of positions that moves each row's padding behind its tokens, which keep their order.

    `key_padding_mask`, (batch, seq), is true or 1 at tokens. The result, (batch, seq), holds indices for `gather` along
    the sequence; `.argsort(1)` of them is the way back.
    """
    return key_padding_mask.bool().int().argsort(dim=1, descending=True, stable=True)


def without_mask(batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The batch with its padding moved to the right end, where causal attention hides it, and no `attention_mask`."""
    if 'attention_mask' not in batch:
        return batch
    order = padding_right_order(batch['attention_mask'])
    return {key: batch[key].gather(1, order) for key in ('input_ids', 'labels', 'sequence_id') if key in batch}


def next_token_targets(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Inputs and what each position has to predict, both (batch, seq), padding moved to the right end.

    The batch has `input_ids`, (batch, seq), and `labels`, not shifted, -100 where there is nothing to predict. Labels
    of shape (batch, seq) leave nothing for the last position to predict; of shape (batch, seq + 1) they give it the
    token after the inputs. Optionally, with the former, it has `attention_mask`, (batch, seq).
    """
    batch = without_mask(batch)
    input_ids, labels = batch['input_ids'], batch['labels']
    if labels.shape[1] == input_ids.shape[1] + 1:
        return input_ids, labels[:, 1:]
    assert labels.shape == input_ids.shape, f'labels {[*labels.shape]} do not fit input_ids {[*input_ids.shape]}'
    targets = labels.roll(-1, dims=1)
    targets[:, -1] = IGNORE
    return input_ids, targets


class ComposerCausalLM(ComposerModel):
    """A causal language model for Composer's Trainer.

    Args:
        model: Called as `model(input_ids, targets=targets)`, returns the mean loss over the targets. With
            `attn_within_document` it is given `sequence_id` too, all of shape (batch, seq).
        n_layers: Number of blocks, for the FLOPs.
        d_model: Width, for the FLOPs.
        vocab_size: Token ids that it has embeddings for.
        max_seq_len: The longest sequence that it takes; None: any.
        attn_within_document: Batches have `sequence_id`, which numbers the documents of each sample.

    Attributes:
        described_by: What a checkpoint's manifest says of the model, where it is not section `model` of the config.
    """

    described_by: Optional[dict[str, Any]] = None

    def __init__(self, model: nn.Module, n_layers: int, d_model: int, vocab_size: int, max_seq_len: Optional[int],
                 attn_within_document: bool = False):
        super().__init__()
        self.attn_within_document = attn_within_document
        self.model = model
        self.vocab_size, self.max_seq_len = vocab_size, max_seq_len
        self.n_params = sum(p.numel() for p in model.parameters())  # parameters() counts tied ones once
        self.n_layers, self.d_model = n_layers, d_model

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean loss in nats over the batch's targets, and how many there are."""
        if ('sequence_id' in batch) != self.attn_within_document:
            does, has = ('within', 'no') if self.attn_within_document else ('across', 'a')
            raise UserError(f'dataset.sequence_ids: the model attends {does} documents, and the batch has {has} '
                            'sequence_id; make it the same as model.attn_within_document (which mosaic_gpt alone has)')
        batch = without_mask(batch)
        input_ids, targets = next_token_targets(batch)
        documents = {'sequence_id': batch['sequence_id']} if self.attn_within_document else {}
        return {'loss': self.model(input_ids, targets=targets, **documents), 'n_targets': (targets != IGNORE).sum()}

    def loss(self, outputs: dict[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        return outputs['loss']

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        return {'LanguageCrossEntropy': LanguageCrossEntropy(), 'Perplexity': LanguagePerplexity()}

    def update_metric(self, batch: Mapping[str, Tensor], outputs: dict[str, Tensor], metric: Metric) -> None:
        """Adds to both metrics' sums from the loss that is already there: their own update would want all logits."""
        assert isinstance(metric, LanguageCrossEntropy)
        metric.sum_loss += outputs['loss'].detach() * outputs['n_targets']
        metric.total_items += outputs['n_targets']

    def flops_per_batch(self, batch: Mapping[str, Tensor]) -> float:
        """FLOPs of one forward and backward pass; Composer's SpeedMonitor makes MFU of it.

        Attention is counted over whole rows, also where it stays within documents and does less.
        """
        rows, seq_len = batch['input_ids'].shape
        return rows * seq_len * train_flops_per_token(self.n_params, self.n_layers, self.d_model, seq_len)
