"""Runs EleutherAI's lm-eval, by its command line, on a model that the kit trained and exported, with a task made here."""

import json
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import documents
from launch import ROOT, SCRIPTS, clean_env, run, tiny
from transformers import AutoTokenizer

import main
from src.config import load as config

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


def done(*command: str, **env: str) -> str:
    result = run(command, cwd=ROOT, env=clean_env(**env), timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize('yaml, own', [('yamls/quickstart.yaml', []), ('yamls/modern_gpt/quickstart.yaml', ['model.n_kv_heads=1'])])
def test_lm_eval_finds_what_a_plain_loop_finds(yaml, own, mds_root, tmp_path):
    trainer = main.main(config.load([str(ROOT / yaml), *tiny(
        mds_root, *own, 'max_seq_len=512', 'eval_loader=null', 'callbacks.unigram_baseline=false', 'log_to_console=false',
        f'save_folder={tmp_path}/saves')]))
    trainer.close()
    model = trainer.state.model.model.eval()  # the kit's model, not the exported one
    done(sys.executable, 'src/tools/export_hf.py', f'{tmp_path}/saves', f'{tmp_path}/my-gpt')
    texts = documents('val')[:5]
    (tmp_path / 'tiny.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    (tmp_path / 'tasks').mkdir()
    (tmp_path / 'tasks' / 'tiny.yaml').write_text(TASK.format(data=tmp_path / 'tiny.jsonl'))
    done(str(SCRIPTS / 'lm_eval'), '--model', 'hf', '--model_args', f'pretrained={tmp_path}/my-gpt,dtype=float32',
         '--tasks', 'tiny', '--include_path', f'{tmp_path}/tasks', '--device', 'cpu', '--batch_size', '2',
         '--output_path', f'{tmp_path}/results',
         HF_HOME=f'{tmp_path}/hf', HF_DATASETS_OFFLINE='1')
    results = json.loads(next((tmp_path / 'results').rglob('results_*.json')).read_text())['results']['tiny']

    tokenizer, nats, uniform = AutoTokenizer.from_pretrained(mds_root / 'tokenizer'), 0.0, 0.0
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)['input_ids']]])  # lm-eval also predicts the first token
            logits = model(ids)[0, :-1, :len(tokenizer)].double()
            nats += F.cross_entropy(logits, ids[0, 1:], reduction='sum').item()
            uniform += math.log(len(tokenizer)) * (ids.shape[1] - 1)
    n_bytes = sum(len(text.encode()) for text in texts)
    assert results['bits_per_byte,none'] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)
    assert nats < 0.95 * uniform, 'it is the trained model'
