"""FLOPs of training."""


def train_flops_per_token(n_params: int, n_layers: int, d_model: int, seq_len: int) -> float:
    """FLOPs per token of a forward and a backward pass: 6 N + 12 L d S (Chowdhery et al. 2022, PaLM, appendix B).

    Recomputation for activation checkpointing is not counted: this is the numerator of MFU. Attention counts as if every
    token saw S tokens, though it is causal and may stay within documents.

    Args:
        n_params: Parameters N, tied ones once.
        n_layers: Blocks L.
        d_model: Width d.
        seq_len: Tokens per sequence S.
    """
    return 6 * n_params + 12 * n_layers * d_model * seq_len
