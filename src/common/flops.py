"""Counts the FLOPs of training, and lists devices with their memory and peak FLOP/s."""

import re
from typing import NamedTuple, Optional


def train_flops_per_token(n_params: int, n_layers: int, d_model: int, seq_len: int, causal: bool = False) -> float:
    """FLOPs per token of a forward and a backward pass: 6 N + 12 L d S (Chowdhery et al. 2022, PaLM, appendix B).

    N is the number of parameters (tied ones count once), L of blocks, d the width, S the sequence length. This is the
    numerator of MFU, so the recomputation of activation checkpointing does not count. Attention counts as if every
    token attended to S tokens. With `causal`, attention counts half, which is what causal attention needs:
    6 N + 6 L d S. Neither form is reduced for attention within documents.
    """
    return 6 * n_params + (6 if causal else 12) * n_layers * d_model * seq_len


# Fraction of the card's memory that we plan with. The rest covers fragmentation, and an error of up to 5% in the
# prediction of the tensors' memory. The prediction includes the memory of CUDA and NCCL. GB are 10^9 bytes: HBM cards
# have up to 7% more, which is a reserve; on GDDR6 cards ECC takes as much.
USABLE_FRACTION = 0.95


class Card(NamedTuple):
    """Name, memory and speed of a device."""

    name: str  # shown to the user
    memory: float  # bytes
    peak: Optional[float]  # FLOP/s of matrix products in fp16 or bf16; None if unknown
    # Pattern of the driver's whole name: a part of a GPU (MIG), a laptop GPU or an unknown model does not match
    driver: str = ''
    is_gpu: bool = True

    @property
    def usable(self) -> float:
        return USABLE_FRACTION * self.memory


# Of an estimate. Chowdhery et al. 2022 (PaLM), table 3, lists MFUs from 0.21 (GPT-3) to 0.46. src/tools/benchmark.py
# measures yours.
ASSUMED_MFU = 0.4
# Dense peaks (no sparsity) with fp32 accumulation. MFU of fp8 layers uses them too, so that runs can be compared.
CARDS = {card.name: card for card in (
    # NVIDIA A100 Tensor Core GPU datasheet, 2021
    Card('a100-40gb', 40e9, 312e12, r'(NVIDIA )?A100-(SXM4|PCIE|PCIe)-40GB'),
    Card('a100-80gb', 80e9, 312e12, r'(NVIDIA )?A100-(SXM4|PCIE|PCIe)-80GB|NVIDIA A100 80GB PCIe'),
    # NVIDIA H100 Tensor Core GPU datasheet, 2024, halved (it counts sparsity): SXM 1,979, NVL 1,671; in 2022 PCIe 1,513
    Card('h100-sxm', 80e9, 989.4e12, r'NVIDIA H100 80GB HBM3|NVIDIA H100 SXM5?( 80GB)?'),
    Card('h100-pcie', 80e9, 756.5e12, r'NVIDIA H100 PCIe'),
    Card('h100-nvl', 94e9, 835.5e12, r'NVIDIA H100 NVL'),
    # NVIDIA H200 Tensor Core GPU datasheet, 2024, halved: SXM 1,979; NVL 1,671
    Card('h200', 141e9, 989.4e12, r'NVIDIA H200'),
    Card('h200-nvl', 141e9, 835.5e12, r'NVIDIA H200 NVL'),
    # NVIDIA DGX B200 datasheet, 2024, for 8 GPUs: 1,440 GB; 72 PFLOP/s of FP8 with sparsity, dense bf16 a quarter of it
    Card('b200', 180e9, 2250e12, r'NVIDIA B200'),
    # NVIDIA L4 and L40S datasheets, 2023: 242 with sparsity; 362 without
    Card('l4', 24e9, 121e12, r'NVIDIA L4'),
    Card('l40s', 48e9, 362e12, r'NVIDIA L40S'),
    # NVIDIA Ada GPU architecture whitepaper, 2022, appendix A: with fp32 accumulation
    Card('rtx-4090', 24e9, 165.2e12, r'NVIDIA GeForce RTX 4090'),
    # AMD Instinct MI300X data sheet, 2023
    Card('mi300x', 192e9, 1307.4e12, r'AMD Instinct MI300X( OAM| VF)?'),
)}


def peak_flops(device_name: str, precision: str) -> Optional[float]:
    """Returns the peak FLOP/s of a GPU in matrix products; None if it is not in the table, or for fp32.

    `device_name` comes from `torch.cuda.get_device_name()`; `precision` is Composer's: fp32, amp_fp16 or amp_bf16.
    """
    known = (card.peak for card in CARDS.values() if re.fullmatch(card.driver, device_name))
    return None if precision == 'fp32' else next(known, None)
