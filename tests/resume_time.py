"""Measures the time until the loader returns its first batch after a resume at a step, with packed tokens.

    python tests/resume_time.py
"""

import sys
import tempfile
import time
from pathlib import Path

if __name__ == '__main__':  # the folder of this script is already on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from conftest import EOS, documents, write_mds

from src.data_c4 import build_c4_dataloader

SEQ_LEN, BATCH, STEPS = 128, 8, (10, 100, 1_000, 10_000)


def seconds(root: Path, step: int, workers: int) -> float:
    """The time to build the loader and get the first batch after `step`."""
    cfg = {'dataset': {'local': str(root), 'split': 'train', 'tokenizer_name': str(root / 'tokenizer'), 'max_seq_len': SEQ_LEN,
                       'shuffle': True}, 'drop_last': True, 'num_workers': workers}
    start = time.perf_counter()
    loader = build_c4_dataloader(cfg, BATCH)
    loader.dataset.load_state_dict({'epoch': 0, 'sample_in_epoch': step * BATCH, 'num_canonical_nodes': 64,
                                    'shuffle_seed': 9176, 'initial_physical_nodes': 1})
    batches = iter(loader)
    next(batches)
    return time.perf_counter() - start


def main(root: Path) -> None:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(documents('train'), vocab_size=512, special_tokens=[EOS], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=EOS).save_pretrained(root / 'tokenizer')
    rows = np.random.default_rng(0).integers(0, 512, (BATCH * (STEPS[-1] + 100), SEQ_LEN), np.uint16)
    write_mds(root / 'train', [{'tokens': row} for row in rows], {'tokens': f'ndarray:uint16:{SEQ_LEN}'}, size_limit=1 << 22)
    print(f'{len(rows):,} sequences of {SEQ_LEN} tokens, batches of {BATCH}; seconds to the first batch (best of 3)')
    for workers in (0, 2):
        print(f'  {workers} workers: ' + ', '.join(f'step {step:,}: {min(seconds(root, step, workers) for _ in range(3)):.2f}'
                                                   for step in STEPS))


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
