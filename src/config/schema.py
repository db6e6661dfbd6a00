"""Every setting of a YAML: its name, type, range and default.

A key that is not in these classes is an error. `src/config/check.py` compares the YAML and the command line with them.
"""

import re
from types import NoneType
from typing import Annotated, Any, Literal, Optional, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

Count = Annotated[int, Field(gt=0, le=2**31 - 1)]
Length = Annotated[int, Field(gt=1, le=2**31 - 1)]  # tokens in a sequence
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
InitSeed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Seconds = Annotated[float, Field(gt=0, le=2e6)]  # the system counts them as milliseconds in a 32-bit number


def must_match(pattern: str, description: str) -> BeforeValidator:
    """Refuses a value that does not match the pattern; the message says that it must be `description`."""
    def check(value: Any) -> Any:
        if value is not None and not re.fullmatch(pattern, str(value)):
            raise PydanticCustomError('must_match', 'must be {description}', {'description': description})
        return value
    return BeforeValidator(check)


# A whole number of epochs, batches, samples or tokens, or a fraction of the run
TIME = re.compile(r'([0-9]+(?:_[0-9]+)*(?!\.)|[0-9]+\.[0-9]+(?=dur))(ep|ba|sp|tok|dur)')
TimeString = Annotated[str, must_match(
    TIME.pattern, 'a time: a whole number with a unit, as in 100ba (batches), 1ep (epochs), 5000sp (samples), '
                  '2000000tok (tokens), or a fraction of the run, as in 0.1dur')]
LogInterval = Annotated[str, must_match(
    '[1-9][0-9]*(ep|ba)', 'a number of batches or epochs above 0, as in 10ba or 1ep')]
# The notations that streaming reads as a number. Streaming takes 0 to mean "not set", so 0 is refused
Bytes = Annotated[Union[int, str, None], must_match(
    '(?i)(?=.*[1-9])([0-9]{1,18}b?|[0-9]*[.]?[0-9]+(e[0-9]+)? *[kmgtpezy]b)',
    'a number of bytes above 0, such as 5000000 or 100gb')]
Samples = Annotated[Union[int, str, None], must_match(
    '(?i)(?=.*[1-9])([0-9]{1,18}|[0-9]*[.]?[0-9]+(e[0-9]+)? *[kmbt])',
    'a number of samples above 0, such as 5000000 or 2.5m')]
Plugins = dict[str, Union[dict[str, Any], Literal[False], None]]  # name: its arguments; null: none; false: off


class Section(BaseModel):
    """A section of the YAML. Unknown keys are errors, types are not converted, and null means the default.

    Empty text is an error, too: it usually comes from a shell variable that is not set.
    """

    model_config = ConfigDict(extra='forbid', strict=True, frozen=True, protected_namespaces=(), str_min_length=1,
                              regex_engine='python-re', allow_inf_nan=False)

    @model_validator(mode='before')
    @classmethod
    def _drop_null_without_meaning(cls, values: Any) -> Any:
        """Drops a null where the type does not allow it, so that `key=null` on the command line means the default."""
        if not isinstance(values, dict):
            return values
        no_null = {key for key, field in cls.model_fields.items() if NoneType not in get_args(field.annotation)}
        return {key: value for key, value in values.items() if value is not None or key not in no_null}


class TokenizerConfig(Section):
    name: Literal['hftokenizer'] = 'hftokenizer'
    tokenizer_name: str  # a hub name or a folder
    max_seq_len: Length


class GPTConfig(Section):
    """The settings that all GPTs of the kit share."""

    name: str
    device: Literal['cpu', 'meta'] = 'cpu'  # meta: the weights take no memory until FSDP draws each shard
    d_model: Count
    n_heads: Count
    n_layers: Count
    max_seq_len: Length
    vocab_size: Count
    init_std: float = Field(default=0.02, gt=0)
    init_seed: InitSeed = 17  # a YAML that leaves it out gets the value of `seed`
    attn_impl: Literal['torch', 'sdpa', 'flash', 'auto'] = 'auto'
    # Only for attn_impl flash
    flash_kernel: Literal['auto', 'cudnn', 'pytorch', 'flash-attn-2', 'flash-attn-3', 'flash-attn-4'] = 'auto'
    attn_within_document: bool = False  # true: no attention across documents; positions start at 0 in each
    linear_impl: Literal['plain', 'fp8'] = 'plain'  # for the linear layers in the blocks
    loss_impl: Literal['chunked', 'plain'] = 'chunked'  # plain: all logits at once, which torch.compile can fuse
    loss_chunk_tokens: Count = 4096  # tokens per chunk; only one chunk's logits are in memory
    vocab_multiple: Optional[Count] = None  # pads the logits to this multiple in the loss; null: 64 on a GPU, else 1
    activation_checkpointing_every: Count = 1  # n: checkpoints every n-th block, if fsdp_config turns it on


class MosaicGPTConfig(GPTConfig):
    """`model:` with `name: mosaic_gpt`."""

    name: Literal['mosaic_gpt'] = 'mosaic_gpt'
    mlp_ratio: Count = 4
    mlp_act: Literal['gelu', 'gelu_tanh'] = 'gelu'
    attn_pdrop: float = Field(default=0.0, ge=0, lt=1)
    resid_pdrop: float = Field(default=0.0, ge=0, lt=1)
    emb_pdrop: float = Field(default=0.0, ge=0, lt=1)


class ModernGPTConfig(GPTConfig):
    """`model:` with `name: modern_gpt`."""

    name: Literal['modern_gpt']
    n_kv_heads: Optional[Count] = None  # heads of keys and values, each for n_heads / n_kv_heads queries; null: n_heads
    head_dim: Optional[Count] = None  # null: d_model / n_heads
    d_hidden: Optional[Count] = None  # width of the MLP; null: 8/3 d_model, rounded up to a multiple of 128
    rope_theta: float = Field(default=1e4, gt=1)  # base of the wavelengths of RoPE; larger for longer sequences
    norm_eps: float = Field(default=1e-6, gt=0)
    tie_embeddings: bool = True  # the head uses the weight of the token embedding
    logit_softcap: Optional[float] = Field(default=None, gt=0)  # logits become softcap * tanh(logits / softcap)


class HFCausalLMConfig(Section):
    """`model:` with `name: hf_causal_lm`."""

    name: Literal['hf_causal_lm']
    pretrained_model_name_or_path: Optional[str] = None  # a hub name or a folder; null: only config_overrides count
    pretrained: bool = False  # true: load its weights; false: only its shape
    config_overrides: dict[str, Any] = {}
    init_seed: InitSeed = 17
    trust_remote_code: bool = False


ModelConfig = Union[MosaicGPTConfig, ModernGPTConfig, HFCausalLMConfig]
MODEL_CONFIGS: dict[str, type[Section]] = {
    get_args(cls.model_fields['name'].annotation)[0]: cls for cls in get_args(ModelConfig)}


class StreamConfig(Section):
    """One entry of `streams:`. Where `split` or a key from `download_retry` on is null, the dataset's value counts."""

    remote: Optional[str] = None  # null or equal to `local`: nothing is copied
    local: str
    split: Optional[str] = Field(default=None, min_length=0)
    # Set at most one of these three; `proportion` either for all streams or for none
    proportion: Optional[float] = Field(default=None, gt=0)  # this stream's part of an epoch
    repeat: Optional[float] = Field(default=None, gt=0)  # how often an epoch reads its samples
    choose: Optional[int] = Field(default=None, gt=0)  # how many samples an epoch reads
    download_retry: Optional[int] = Field(default=None, ge=1)
    download_timeout: Optional[Seconds] = None
    validate_hash: Optional[str] = None
    keep_zip: Optional[bool] = None


class DatasetConfig(Section):
    """`dataset:` of a loader. The keys from `shuffle` on are those of streaming's StreamingDataset."""

    remote: Optional[str] = None  # null or equal to `local`: nothing is copied
    local: Optional[str] = None  # null is allowed only with `streams`
    streams: Optional[dict[str, StreamConfig]] = Field(default=None, min_length=1)  # in place of remote and local
    split: str = Field(min_length=0)  # '': the shards lie directly in `remote`
    tokenizer_name: str
    max_seq_len: Length
    group_method: Literal['truncate', 'concat'] = 'truncate'
    sequence_ids: bool = False  # true: number the documents of a sample, and predict no document's first token
    shuffle: bool = False
    shuffle_algo: Literal['py1e', 'py1br', 'py1s', 'py2s', 'naive'] = 'py1e'
    shuffle_seed: Seed = 9176
    shuffle_block_size: Optional[Count] = None
    predownload: Optional[Count] = None
    cache_limit: Bytes = None
    num_canonical_nodes: Count = 64  # this and shuffle_seed fix the order of samples on any number of devices
    download_retry: int = Field(default=2, ge=1)  # further attempts after the first one
    download_timeout: Seconds = 60.0
    validate_hash: Optional[str] = None  # also check the shards that are in `local` at the start; downloads always are
    keep_zip: bool = False
    epoch_size: Samples = None
    sampling_method: Literal['balanced', 'fixed'] = 'balanced'
    sampling_granularity: Count = 1
    batching_method: Literal['random', 'stratified', 'per_stream'] = 'random'


class LoaderConfig(Section):
    """`train_loader:` and `eval_loader:`. The keys from `drop_last` on are those of torch's DataLoader."""

    name: Literal['c4'] = 'c4'
    dataset: DatasetConfig
    eval_samples: int = Field(default=16384, ge=-1)  # eval_loader only, over all devices; -1: the whole split
    drop_last: bool = False
    num_workers: int = Field(default=0, ge=0)
    pin_memory: bool = False
    prefetch_factor: Optional[Count] = None
    persistent_workers: bool = False
    timeout: float = Field(default=0, ge=0, le=2e6)


class OptimizerConfig(Section):
    name: Literal['decoupled_adamw', 'adamw', 'muon'] = 'decoupled_adamw'
    lr: float = Field(gt=0)
    betas: list[float] = [0.9, 0.95]  # of Adam; Muon has Adam for embeddings, head, norms and biases
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    fused: bool = True  # update all parameters in one kernel; of Muon, those that have Adam
    momentum: float = Field(default=0.95, ge=0, lt=1)  # only muon
    cautious: bool = False  # only muon: decay only weights that the update of this step makes smaller


class SchedulerConfig(Section):
    name: Literal['cosine_with_warmup', 'constant_with_warmup', 'linear_decay_with_warmup',
                  'warmup_stable_decay'] = 'cosine_with_warmup'
    t_warmup: TimeString
    alpha_f: float = Field(default=0.1, ge=0, le=1)
    t_max: TimeString = '1dur'
    cooldown: float = Field(default=0.4, gt=0, le=1)  # only warmup_stable_decay: the last part of the run, which decays
    cooldown_shape: Literal['linear', '1-sqrt'] = 'linear'  # only warmup_stable_decay


class FSDPConfig(Section):
    """`fsdp_config:`, with Composer's keys. Composer's own class would accept any key without a message."""

    version: Literal[1, 2, None] = None  # null: 1 on GPUs; 2 on CPUs and with muon
    sharding_strategy: Literal['FULL_SHARD', 'SHARD_GRAD_OP', 'NO_SHARD', 'HYBRID_SHARD'] = 'FULL_SHARD'
    mixed_precision: Literal['DEFAULT', 'PURE', 'FULL'] = 'DEFAULT'
    activation_checkpointing: bool = False
    activation_checkpointing_reentrant: bool = False
    activation_cpu_offload: bool = False
    backward_prefetch: Literal['BACKWARD_PRE', 'BACKWARD_POST', 'NONE'] = 'BACKWARD_PRE'
    backward_prefetch_limit: Count = 1
    cpu_offload: Literal[False] = False  # Composer does not allow true
    data_parallel_shard_degree: int = Field(default=-1, ge=-1)
    data_parallel_replicate_degree: Optional[Count] = None
    forward_prefetch: bool = False
    forward_prefetch_limit: Count = 1
    keep_low_precision_grads: bool = False
    limit_all_gathers: bool = True
    load_monolith_rank0_only: bool = False
    sharded_ckpt_prefix_dir: Literal['ep{epoch}-ba{batch}'] = 'ep{epoch}-ba{batch}'  # autoresume looks for these names
    state_dict_type: Literal['full', 'sharded'] = 'full'
    sync_module_states: bool = False
    use_orig_params: bool = True
    verbose: bool = False
    reduce_every_microbatch: bool = True  # the kit's own key; false: once per step, with full gradients in memory


class CompileConfig(Section):
    """`compile_config:`. The keys from `mode` on are those of torch.compile."""

    # block: one graph that all blocks share; model: one for everything; auto: block on a GPU, if it can; else none
    scope: Literal['auto', 'block', 'model'] = 'block'
    mode: Optional[Literal['default', 'reduce-overhead', 'max-autotune', 'max-autotune-no-cudagraphs']] = None
    backend: str = 'inductor'
    fullgraph: bool = False
    dynamic: Optional[bool] = None
    options: Optional[dict[str, Any]] = None


class Config(Section):
    """The whole YAML."""

    # A section that leaves out one of these gets it from here
    data_remote: Optional[str] = None
    data_local: str
    tokenizer_name: str
    max_seq_len: Length
    run_name: Optional[str] = None  # null: $COMPOSER_RUN_NAME, else a random name
    seed: Seed = 17

    model: ModelConfig = Field(discriminator='name')
    tokenizer: Optional[TokenizerConfig]  # null: for your own loader that needs no tokenizer
    train_loader: LoaderConfig
    eval_loader: Optional[LoaderConfig] = None
    eval_samples: int = Field(default=16384, ge=-1)
    allow_same_split: bool = False  # true: training and evaluation may read one split, as for profiling

    optimizer: OptimizerConfig
    scheduler: SchedulerConfig
    algorithms: Plugins = {}

    max_duration: TimeString
    eval_interval: TimeString = '1ep'
    eval_first: bool = False  # also evaluate before the first batch
    global_train_batch_size: Count  # samples per optimizer step, over all devices
    device_train_microbatch_size: Union[int, Literal['auto']]  # samples per forward pass on one device
    device_eval_batch_size: Optional[Count] = None  # null: the same as the microbatch, if that is a number
    precision: Literal['auto', 'fp32', 'amp_fp16', 'amp_bf16'] = 'auto'
    fsdp_config: Optional[FSDPConfig] = None
    compile_config: Optional[CompileConfig] = None  # {}: torch.compile with its defaults; null: no compilation
    dist_timeout: Seconds = 600.0
    max_nonfinite_in_a_row: Count = 10  # batches whose loss or gradients are not finite, before the run ends

    progress_bar: bool = True
    log_to_console: bool = True
    console_log_interval: LogInterval = '1ba'
    log_traces: bool = False
    callbacks: Plugins = {}
    loggers: Plugins = {}

    save_folder: Optional[str] = None
    save_interval: TimeString = '1000ba'
    save_num_checkpoints_to_keep: int = Field(default=-1, ge=-1)
    load_path: Optional[str] = None
    load_weights_only: bool = False
    trust_checkpoint: bool = False  # true: load objects of any class; this runs code that a checkpoint may hold
    autoresume: bool = False

    @model_validator(mode='before')
    @classmethod
    def _defaults_that_follow(cls, raw: Any) -> Any:
        """The evaluation's batch size is the microbatch. Muon takes FSDP version 2, which keeps matrices whole."""
        if not isinstance(raw, dict):
            return raw
        microbatch, optimizer, fsdp = map(raw.get, ('device_train_microbatch_size', 'optimizer', 'fsdp_config'))
        if raw.get('device_eval_batch_size') is None and isinstance(microbatch, int) and microbatch > 0:
            raw = {**raw, 'device_eval_batch_size': microbatch}
        is_muon = isinstance(optimizer, dict) and optimizer.get('name') == 'muon'
        if is_muon and isinstance(fsdp, dict) and fsdp.get('version') is None:
            raw = {**raw, 'fsdp_config': {**fsdp, 'version': 2}}
        return raw


# ---------------------------------------------------------------- types of settings
def types_below(parent: Any, key: Any) -> list[Any]:
    """The types that a key's value may have; `parent` is a section or a type such as `dict[str, StreamConfig]`."""
    if isinstance(parent, type) and issubclass(parent, BaseModel):
        return union_members(parent.model_fields[key].annotation) if key in parent.model_fields else []
    return union_members(get_args(parent)[1]) if get_origin(parent) is dict else []


def union_members(annotation: Any) -> list[Any]:
    """The members of a Union, or the type itself."""
    return list(get_args(annotation)) if get_origin(annotation) is Union else [annotation]
