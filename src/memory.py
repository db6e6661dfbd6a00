"""Peak memory of a training step on one device, predicted from the config alone: no model is built.

    python src/memory.py yamls/mosaic_gpt/1b.yaml [key=value ...] [--devices 8] [--cpu]
"""

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple, Optional

if __name__ == '__main__':  # run as `python src/memory.py`: import from the repository's root, not from src
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from src.machine import set_up_output
    set_up_output()

from src.batch_size import device_batch_size, grad_accum, microbatch_size
from src.checks import fsdp_version
from src.errors import UserError, positive
from src.schema import Config, HFCausalLMConfig, MosaicGPTConfig

# An estimate, not measured: CUDA context, cuBLAS and NCCL buffers, what the caching allocator cannot hand out again.
GPU_WORKSPACE = 3 * 2**29


class Memory(NamedTuple):
    """Bytes on one device at one moment of a training step, which is the whole step's peak where `predict` returns it.

    N are all parameters, R those outside blocks (embeddings and the last LayerNorm), n the devices that share one copy of the
    weights, T the tokens of a microbatch, d the width, V the vocabulary. What comes and goes peaks at different times, so
    each moment has its own sum.

    Attributes:
        moment: Which moment it is, in words.
        weights: fp32 master weights, 4 N / n. FSDP adds the weights gathered for compute in the precision of
            `mixed_precision`: R all along, and of the blocks two (the current one and what prefetching holds), or all of them
            with SHARD_GRAD_OP. Autocast over fp32 weights instead adds a cast copy of every block from forward to backward.
        gradients: fp32, 4 N / n, from the first microbatch on. DDP adds its buckets, 4 N. FSDP adds the gradients
            of one block before and during their reduction; they peak while a block's backward ends.
        optimizer: Adam's two moments, 8 N / n, from the second step on.
        activations: What autograd keeps of each block (Korthikanti et al. 2022, section 4, with the dtypes of autocast), or
            each block's input and one whole block where activations are checkpointed, and what passes through a block's
            backward. They peak at the end of the forward pass.
        logits: What the chunked loss holds: logits of a chunk with what is made of them, and the gradients of its input,
            4 T d, and of the head, 4 V d, which are scaled once more as the backward pass starts.
        workspace: A constant: `GPU_WORKSPACE`, an estimate; 0 on a CPU.
    """

    moment: str
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int

    @property
    def total(self) -> int:
        return sum(self[1:])


class Shape(NamedTuple):
    """A GPT-2, by this kit or by Hugging Face."""

    n_layers: int
    d_model: int
    n_heads: int
    d_hidden: int  # of the MLP
    vocab_size: int
    positions: int
    softmax_is_kept: bool  # by autograd: memory quadratic in the sequence length, else linear
    dropouts: int  # per block, over the residual stream
    attn_dropout: bool
    embed_dropout: bool
    documents: Optional[str]  # how attention stays within them: every block keeps a `mask`, or all share one `bias`
    plain_gelu: bool  # one operator; else Hugging Face's `gelu_new`, written out in seven
    loss_chunk_tokens: int
    vocab_multiple: int
    plain_loss: bool

    @property
    def block_params(self) -> int:
        d, hidden = self.d_model, self.d_hidden
        return 4 * d * d + 2 * d * hidden + 9 * d + hidden

    @property
    def root_params(self) -> int:
        return (self.vocab_size + self.positions + 2) * self.d_model


def shape_of(c: Config, has_gpu: bool) -> Shape:
    """The model's shape.

    Raises:
        UserError: A Hugging Face model that is no GPT-2.
    """
    m, multiple = c.model, 64 if has_gpu else 1
    if isinstance(m, MosaicGPTConfig):
        quadratic = m.attn_impl == 'torch' or m.attn_pdrop > 0 and not has_gpu  # on CPUs no fused kernel drops out
        flash = has_gpu and m.attn_impl not in ('torch', 'sdpa')  # which needs neither
        documents = None if flash or not m.attn_within_document else 'mask' if m.attn_impl == 'torch' else 'bias'
        return Shape(m.n_layers, m.d_model, m.n_heads, m.mlp_ratio * m.d_model, m.vocab_size, m.max_seq_len, quadratic,
                     2 * (m.resid_pdrop > 0), m.attn_pdrop > 0, m.emb_pdrop > 0, documents, True, m.loss_chunk_tokens,
                     m.vocab_multiple or multiple, m.loss_impl == 'plain')
    from src.hf_causal_lm import build_hf_config  # here, since it imports transformers

    hf: Any = build_hf_config(m) if isinstance(m, HFCausalLMConfig) else None
    if hf is None or hf.model_type != 'gpt2':
        raise UserError(f'model: the memory of {hf.model_type if hf else m.name!r} cannot be predicted; that of mosaic_gpt '
                        'can, and of hf_causal_lm with model_type gpt2')
    quadratic = hf._attn_implementation == 'eager' or hf.attn_pdrop > 0 and not has_gpu
    return Shape(hf.n_layer, hf.n_embd, hf.n_head, hf.n_inner or 4 * hf.n_embd, hf.vocab_size, hf.n_positions,
                 quadratic, 2 * (hf.resid_pdrop > 0), hf.attn_pdrop > 0, hf.embd_pdrop > 0, None,
                 hf.activation_function == 'gelu', 1024, multiple, False)


def block_activations(s: Shape, tokens: int, seq_len: int, low: int, stream: int, has_gpu: bool) -> tuple[int, int]:
    """What autograd keeps of a block, and what the block's backward pass holds besides at its largest.

    Args:
        s: The model.
        tokens: Of the microbatch.
        seq_len: Tokens of a sequence.
        low: Bytes of a number in matrix products.
        stream: Bytes of a number in the residual stream.
        has_gpu: A GPU's dropout keeps a mask of bytes, a CPU's one of the input's type.
    """
    td, th, pairs = tokens * s.d_model, tokens * s.d_hidden, tokens * seq_len * s.n_heads
    norm = 4 * td + 8 * tokens  # its input in fp32, mean and 1 / standard deviation
    attention = 5 * low * td  # what Wqkv reads, q, k, v, and what out_proj reads
    if s.softmax_is_kept:
        # With a low-precision copy, and the causal mask
        attention += (4 + low % 4) * pairs + seq_len * (tokens if s.documents == 'mask' else seq_len)
        attention += s.attn_dropout * (low + (1 if has_gpu else low)) * pairs  # what it makes of the softmax, and its mask
    else:
        attention += 4 * tokens * s.n_heads  # logsumexp
    gelu = 2 * low * th if s.plain_gelu else (12 + 2 * low) * th  # input and output; else also tanh, 1 + tanh, x / 2
    mlp = low * td + gelu  # what mlp_up reads
    dropout = s.dropouts * td * (1 if has_gpu else low)
    passing = stream * td + (low * td if stream != low else 0)  # the gradient of the residual stream, and its cast
    in_mlp = passing + (low if s.plain_gelu else 8) * th
    # Where the MLP's are freed, and what dropout made
    in_attention = passing + (8 - low * s.attn_dropout) * pairs - norm - mlp if s.softmax_is_kept else 0
    return 2 * norm + attention + mlp + dropout, max(in_mlp, in_attention)


class Sharding(NamedTuple):
    """How devices share the weights; the last three are 0 where blocks compute with the master weights themselves."""

    shards: int  # devices that together hold one copy
    buckets: bool  # DDP's, for its gradients
    weight: int  # bytes of a gathered weight, and of its gradient
    reduce: int  # bytes of a gradient on its way between devices
    ahead: int  # blocks gathered at once in the backward pass


def sharding_of(c: Config, world_size: int, has_gpu: bool, low: int) -> Sharding:
    f, version = c.fsdp_config, fsdp_version(c.fsdp_config, has_gpu)
    if f is None or version == 0:
        return Sharding(1, world_size > 1, 0, 0, 0)
    replicas = f.data_parallel_replicate_degree or 1
    shards = 1 if f.sharding_strategy == 'NO_SHARD' else f.data_parallel_shard_degree
    if shards == -1 and world_size % replicas:
        raise UserError(f'fsdp_config.data_parallel_replicate_degree: {replicas} copies of the model do not divide {world_size} '
                        'devices; set a number that does')
    shards = world_size // replicas if shards == -1 else shards
    weight = 4 if f.mixed_precision == 'FULL' else low
    if version == 1 and shards == 1 and weight == 4:
        return Sharding(1, False, 0, 0, 0)
    ahead = 2 if version == 2 else 1 + f.backward_prefetch_limit * (f.backward_prefetch == 'BACKWARD_PRE')
    return Sharding(shards, False, weight, low if f.mixed_precision == 'PURE' else 4, ahead)


def moments(c: Config, world_size: int, has_gpu: bool, microbatch: int) -> list[Memory]:
    """The moments of a step that can be its peak.

    Not counted: batches and metrics, `algorithms` that copy the model (ema, swa), what `compile_config` and `linear_impl: fp8`
    save or add, FSDP1's `keep_low_precision_grads` and `limit_all_gathers: false`.

    Args:
        c: The config.
        world_size: Number of devices.
        has_gpu: Whether they are GPUs.
        microbatch: Samples per forward pass on one device.

    Raises:
        UserError: A model that cannot be predicted, or a global batch that the devices do not divide.
    """
    s, f, version = shape_of(c, has_gpu), c.fsdp_config, fsdp_version(c.fsdp_config, has_gpu)
    low = 2 if c.precision.startswith('amp') or c.precision == 'auto' and has_gpu else 4
    shards, ddp, weight, reduce, ahead = sharding_of(c, world_size, has_gpu, low)
    tokens = microbatch * c.train_loader.dataset.max_seq_len
    td, vd, n_layers, block = tokens * s.d_model, s.vocab_size * s.d_model, s.n_layers, s.block_params
    params = n_layers * block + s.root_params
    held = weight or 4  # bytes of a weight in compute, as of the residual stream that the embeddings begin

    # What stays from step to step, and gradients, which are there from the first microbatch's backward pass on
    master, grads, adam = 4 * params // shards, 4 * params // shards, 8 * params // shards + 4 * (12 * n_layers + 4)
    buckets = 4 * params if ddp else 0
    accumulates = grad_accum(device_batch_size(c.global_train_batch_size, world_size), microbatch) > 1
    whole_sums = f is not None and not f.reduce_every_microbatch and weight > 0
    summed = (reduce if version == 2 else weight) * params if whole_sums else grads
    before = buckets + (summed if accumulates else 0)
    first = buckets + (summed if accumulates else 4 * block * (n_layers - 1) // shards)  # as the first block's turn comes

    # Activations, and the casts of weights that autograd keeps with them
    whole, passing = block_activations(s, tokens, c.train_loader.dataset.max_seq_len, low, held, has_gpu)
    always = s.embed_dropout * td * (1 if has_gpu else held)  # from the embeddings to their gradient
    always += low * tokens * c.train_loader.dataset.max_seq_len * (s.documents == 'bias')
    whole_casts = low * block if low < held else 0
    checkpointed, offloaded = (f.activation_checkpointing, f.activation_cpu_offload and has_gpu) if f and version else (0, 0)
    light = 0 if offloaded else held * td if checkpointed else whole
    every = getattr(c.model, 'activation_checkpointing_every', 1)
    kept = light * -(-n_layers // every) + whole * (n_layers - -(-n_layers // every))  # of all blocks
    last = light if (n_layers - 1) % every == 0 else whole
    casts = 0 if offloaded or checkpointed else whole_casts
    current = whole if (offloaded or checkpointed) and last == light else 0  # the block that is computed again, or fetched
    again = whole_casts - casts

    # What FSDP gathers, and the gradients of one block before and during their reduction
    root, resident = weight * s.root_params, weight * block * n_layers if f and f.sharding_strategy == 'SHARD_GRAD_OP' else 0
    in_loss = root + (resident or (weight * block if version == 2 else 0))  # FSDP2 keeps the buffer of its last gather
    in_backward = root + (resident or weight * block * min(ahead, n_layers))
    mlp_grad = (weight or low + 4 * (low < 4)) * s.d_model * s.d_hidden
    reducing = reduce * block if version == 2 else 0  # FSDP2 keeps what it reduced until the next block's turn
    block_grads = weight * block + (reducing if version == 2 else weight * block) + 4 * block // shards
    head = held * vd  # of the loss; it waits for that of the embeddings, which are the same weights
    root_grads = (weight + max(weight, reduce)) * s.root_params or (2 if accumulates else 1) * 4 * vd

    def at(moment: str, weights: int, gradients: int, activations: int, logits: int = 0) -> Memory:
        return Memory(moment, master + weights, gradients, adam, activations + (always if activations else 0), logits,
                      GPU_WORKSPACE if has_gpu else 0)

    return [
        at('in the loss', in_loss + casts * n_layers, before, kept + 8 * td, loss_bytes(s, tokens, low, held)),
        at('start of the backward pass', max(in_loss, root + weight * block) + casts * n_layers, before,
           kept + 4 * td, s.plain_loss * 12 * tokens * s.vocab_size or 8 * td + 8 * vd + (weight * vd if weight < 4 else 0)),
        at("in the last block's backward", in_backward + casts * n_layers + again,
           before + head + mlp_grad + max(0, reducing - last), kept + current + passing),
        at("end of the last block's backward", in_backward + casts * n_layers, before + head + block_grads,
           kept - last + 2 * held * td),
        at("in the first block's backward", in_backward + whole_casts, first + head + mlp_grad + reducing, whole + passing),
        at("end of the first block's backward", in_backward + whole_casts, first + head + block_grads, 2 * held * td),
        at("embeddings' backward", root, buckets + grads + root_grads, held * td),
        at('optimizer step', 0, buckets + grads, 0),
    ]


def loss_bytes(s: Shape, tokens: int, low: int, held: int) -> int:
    """What the loss allocates at its largest: all logits, or gradients, the cast weight, and a chunk's logits."""
    if s.plain_loss:  # logits, in fp32, and their logarithms
        return tokens * s.vocab_size * (8 if low == 4 else 8 + low)
    padded = -(-s.vocab_size // s.vocab_multiple) * s.vocab_multiple
    td, vd, rows = tokens * s.d_model, padded * s.d_model, min(s.loss_chunk_tokens, tokens)
    copied = low < held or padded > s.vocab_size  # of the head
    # The product and what it is in fp32; what becomes of that, and d_logits; d_logits and, in low precision, a product.
    one = low == 4 and padded == s.vocab_size  # all of them in one place
    logits = rows * (4 * padded if one else low * padded + 4 * s.vocab_size)
    return 4 * td + 4 * vd + low * vd * copied + max(logits, low * (rows * padded + vd) * (low < 4))


def predict(c: Config, world_size: int, has_gpu: bool, microbatch: int) -> Memory:
    """The peak: the largest of `moments`, whose arguments these are."""
    return max(moments(c, world_size, has_gpu, microbatch), key=lambda moment: moment.total)


def table(memory: Memory) -> str:
    """Lines for people, in GiB."""
    parts = memory._asdict() | {'peak': memory.total}
    lines = [f'predicted memory of a device, {parts.pop("moment")}:']
    return '\n'.join(lines + [f'  {name:12}{size / 2**30:9.2f} GiB' for name, size in parts.items()])


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Predict the peak memory of a training step on one device.')
    parser.add_argument('yaml', metavar='YAML')
    parser.add_argument('overrides', nargs='*', metavar='key=value', help='as for main.py')
    parser.add_argument('--devices', type=positive, default=1, metavar='N', help='over all nodes; default: %(default)s')
    parser.add_argument('--cpu', action='store_true', help='they are no GPUs')
    return parser.parse_intermixed_args(argv)


def main(args: argparse.Namespace) -> Memory:
    """Predicts for a YAML, and prints it.

    Raises:
        UserError: A mistake in the config, a microbatch of `auto`, or a model that cannot be predicted.
    """
    from src import builders, config  # here: importing Composer takes seconds

    c = config.check(config.load([args.yaml, *args.overrides]), builders.REGISTRIES, args.devices, not args.cpu)
    if not isinstance(c.device_train_microbatch_size, int):
        raise UserError("device_train_microbatch_size: 'auto' is found by trying; set a number to predict its memory")
    microbatch = microbatch_size(device_batch_size(c.global_train_batch_size, args.devices), c.device_train_microbatch_size)
    memory = predict(c, args.devices, not args.cpu, microbatch)
    print(table(memory))
    return memory


if __name__ == '__main__':
    try:
        main(parse_args(sys.argv[1:]))
    except UserError as e:
        sys.exit(f'error: {e}')
