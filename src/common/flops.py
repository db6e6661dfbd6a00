"""FLOPs of training, and what GPUs can do at most."""

import re
from typing import Optional


def train_flops_per_token(n_params: int, n_layers: int, d_model: int, seq_len: int, causal: bool = False) -> float:
    """FLOPs per token of a forward and a backward pass: 6 N + 12 L d S (Chowdhery et al. 2022, PaLM, appendix B).

    Recomputation for activation checkpointing is not counted: this is the numerator of MFU. Attention counts as if every
    token saw S tokens, though it is causal and may stay within documents.

    Args:
        n_params: Parameters N, tied ones once.
        n_layers: Blocks L.
        d_model: Width d.
        seq_len: Tokens per sequence S.
        causal: Count what causal attention needs, half of that: 6 N + 6 L d S.
    """
    return 6 * n_params + (6 if causal else 12) * n_layers * d_model * seq_len


# Dense (no sparsity) peak of matrix products in TFLOP/s: fp16 and bf16 with fp32 accumulation. Linear layers in fp8 are held
# against it too, so that runs compare.
# The pattern is the whole name that the driver gives, so that a part of a GPU (MIG), a laptop's or an unknown kin has no figure.
PEAKS: list[tuple[str, float]] = [
    # NVIDIA A100 Tensor Core GPU datasheet, 2021: 312
    (r'(NVIDIA )?A100-(SXM4|PCIE|PCIe)-(40|80)GB|NVIDIA A100 80GB PCIe', 312),
    # NVIDIA H100 Tensor Core GPU datasheet, 2024, halved (it counts sparsity): SXM 1,979, NVL 1,671; in 2022 PCIe 1,513
    (r'NVIDIA H100 80GB HBM3|NVIDIA H100 SXM5?( 80GB)?', 989.4),
    (r'NVIDIA H100 PCIe', 756.5),
    (r'NVIDIA H100 NVL', 835.5),
    # NVIDIA H200 Tensor Core GPU datasheet, 2024, halved: SXM 1,979; NVL 1,671
    (r'NVIDIA H200', 989.4),
    (r'NVIDIA H200 NVL', 835.5),
    # NVIDIA DGX B200 datasheet, 2024: 72 PFLOP/s of FP8 with sparsity for 8 GPUs; dense bf16 a quarter of it
    (r'NVIDIA B200', 2250),
    # NVIDIA L4 and L40S datasheets, 2023: 242 with sparsity; 362 without
    (r'NVIDIA L4', 121),
    (r'NVIDIA L40S', 362),
    # NVIDIA Ada GPU architecture whitepaper, 2022, appendix A: with fp32 accumulation
    (r'NVIDIA GeForce RTX 4090', 165.2),
    # AMD Instinct MI300X data sheet, 2023: 1,307.4
    (r'AMD Instinct MI300X( OAM| VF)?', 1307.4),
]


def peak_flops(device_name: str, precision: str) -> Optional[float]:
    """The most FLOP/s that a GPU can do in matrix products; None for one that is not in the table, or for fp32.

    Args:
        device_name: As `torch.cuda.get_device_name()` has it.
        precision: Composer's name: fp32, amp_fp16 or amp_bf16.
    """
    found = next((row for row in PEAKS if re.fullmatch(row[0], device_name)), None)
    return None if found is None or precision == 'fp32' else found[1] * 1e12
