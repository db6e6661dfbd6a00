"""Compares the peak memory of the chunked loss and of the plain loss. Each runs in its own process.

    python tests/loss_memory.py [--batch 8] [--seq_len 512] [--d_model 256] [--vocab 50257]

Prints one line for each loss, and the ratio. Memory is the growth of the process's peak resident size during the
forward and backward pass.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def measure(way: str, batch: int, seq_len: int, d_model: int, vocab: int) -> None:
    import torch
    import torch.nn.functional as F

    from src.causal_lm import chunked_cross_entropy
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hidden = torch.randn(batch, seq_len, d_model, requires_grad=True)
    weight = (0.02 * torch.randn(vocab, d_model)).requires_grad_()
    targets = torch.randint(0, vocab, (batch, seq_len))
    small = (hidden[:1, :8].detach(), weight[:64].detach(), targets[:1, :8] % 64)
    chunked_cross_entropy(*small)  # loads libraries before the measurement begins
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if way == 'chunked':
        loss = chunked_cross_entropy(hidden, weight, targets)
    else:
        loss = F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten())
    loss.backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({'way': way, 'mib': (peak - before) / 1024, 'loss': loss.item()}))


def compare(batch: int, seq_len: int, d_model: int, vocab: int) -> dict[str, dict]:
    """The measurements of `plain` and `chunked`, each with `mib` and `loss`."""
    sizes = [str(n) for n in (batch, seq_len, d_model, vocab)]
    results = {}
    for way in ('plain', 'chunked'):
        run = subprocess.run([sys.executable, __file__, '--way', way, '--batch', sizes[0], '--seq_len', sizes[1],
                              '--d_model', sizes[2], '--vocab', sizes[3]], capture_output=True, text=True, check=True)
        results[way] = json.loads(run.stdout.splitlines()[-1])
    return results


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--way', choices=['plain', 'chunked'])
    for key, default in (('batch', 8), ('seq_len', 512), ('d_model', 256), ('vocab', 50257)):
        parser.add_argument(f'--{key}', type=int, default=default)
    args = parser.parse_args()
    sizes = (args.batch, args.seq_len, args.d_model, args.vocab)
    if args.way:
        measure(args.way, *sizes)
    else:
        results = compare(*sizes)
        for way, r in results.items():
            print(f'{way:8} peak {r["mib"]:8.0f} MiB   loss {r["loss"]:.6f}')
        print(f'ratio    {results["plain"]["mib"] / results["chunked"]["mib"]:.1f}')
