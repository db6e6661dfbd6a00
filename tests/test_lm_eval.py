"""EleutherAI's lm-eval, by its own command line, on a folder in Hugging Face's format and a task made here."""

import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import documents
from launch import ROOT, clean_env
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

pytest.importorskip('lm_eval', reason='pip install "lm_eval[hf]==0.4.13"')

TASK = """task: tiny
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
"""


@pytest.mark.slow
def test_lm_eval_finds_what_a_plain_loop_finds(tokenizer_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_positions=512, n_embd=16, n_layer=2, n_head=2,
                                       bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id)).eval()
    model.save_pretrained(tmp_path / 'exported')
    tokenizer.save_pretrained(tmp_path / 'exported')
    texts = documents('val')[:5]
    (tmp_path / 'tiny.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    (tmp_path / 'tasks').mkdir()
    (tmp_path / 'tasks' / 'tiny.yaml').write_text(TASK.format(data=tmp_path / 'tiny.jsonl'))

    command = [sys.executable, '-m', 'lm_eval', '--model', 'hf', '--model_args', f'pretrained={tmp_path}/exported,dtype=float32',
               '--tasks', 'tiny', '--include_path', str(tmp_path / 'tasks'), '--device', 'cpu', '--batch_size', '1',
               '--output_path', str(tmp_path / 'results')]
    done = subprocess.run(command, cwd=ROOT, env=clean_env(HF_HOME=str(tmp_path / 'hf'), HF_DATASETS_OFFLINE='1'),
                          capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(next((tmp_path / 'results').rglob('results_*.json')).read_text())['results']['tiny']

    nats = 0.0
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)['input_ids']]])  # lm-eval predicts the first token too
            log_p = model(ids).logits[0, :-1].double().log_softmax(-1)
            nats += F.nll_loss(log_p, ids[0, 1:], reduction='sum').item()
    n_bytes = sum(len(text.encode()) for text in texts)
    assert results['bits_per_byte,none'] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)
