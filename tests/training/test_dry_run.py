"""`--dry_run` builds and prints everything, and trains and writes nothing."""

import ast
import re
from pathlib import Path

import pytest
import yaml
from composer.core import Callback
from conftest import documents
from launch import ROOT, composer, tiny
from test_yamls import SHRUNK, SHRUNK_HF

import main
from src.config import load as config
from src.config.schema import Config
from src.model_registry import COMPOSER_MODEL_REGISTRY
from src.mosaic_gpt import ComposerMosaicGPT
from src.sizing.memory import predict
from src.sizing.report import gib
from src.training.fit import this_device

QUICKSTART = str(ROOT / 'yamls/quickstart.yaml')
SECRET = '5ec2e7' * 6 + 'abcd'


def snapshot(*folders: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder below these folders, with its size and modification time."""
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for folder in folders for p in [folder, *folder.rglob('*')]}


class First(Callback):
    """Keeps the first batch that a run trains on."""

    def batch_start(self, state, logger) -> None:
        self.batch = state.batch


def test_it_says_everything_and_writes_nothing(mds_root, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    argv = [QUICKSTART, *tiny(mds_root, 'loggers.tensorboard.log_dir=./runs', 'loggers.wandb.project=kit',
                              f'loggers.wandb.init_kwargs.settings.api_key={SECRET}', 'loggers.file.filename=./log.txt',
                              'save_folder=./checkpoints/{run_name}', 'run_name=a', 'device_train_microbatch_size=5')]
    before = snapshot(mds_root, tmp_path)
    assert main.cli([*argv, '--dry_run']) == 0
    assert snapshot(mds_root, tmp_path) == before
    said = capfd.readouterr().err
    assert SECRET not in said

    shown = yaml.safe_load(said.split('config:\n')[1].split('\nattention: ')[0])
    assert shown['loggers']['wandb'] == {'project': 'kit', 'init_kwargs': {'settings': {'api_key': '***'}}}
    assert shown == config.mask_secrets(config.to_plain(Config.model_validate(config.to_plain(config.load(argv)))))

    assert '12 samples of 32 tokens = 384 tokens per step; the device computes 3 microbatches of up to 5 samples' in said
    c = Config.model_validate(shown)
    for name, size in predict(c, 1, False, 5)._replace(moment=0)._asdict().items():
        assert name == 'moment' or re.search(rf'^    {name} +{gib(size)}   ', said, re.MULTILINE)
    assert this_device().usable > 0 and not this_device().is_gpu and 'no peak of CPU' in said

    first = First()
    trainer = main.main(config.load([*argv, *(f'loggers.{name}=false' for name in ('wandb', 'file', 'tensorboard')),
                                     'save_folder=null', 'max_duration=1ba', 'scheduler.t_warmup=0.1dur', 'eval_loader=null']),
                        callbacks=[first])
    trainer.close()
    ids = first.batch['input_ids'][0][first.batch['attention_mask'][0].bool()].tolist()
    assert 'input_ids (12, 32), attention_mask (12, 32), labels (12, 32)' in said
    assert f'; {sum(first.batch["n_targets"])} targets' in said
    assert f'first sample, {len(ids)} tokens: {ids[0]}=' in said
    text = ast.literal_eval(re.findall(r'^  text: (.*)$', said, re.MULTILINE)[0])
    assert len(text) > 20 and any(document.startswith(text) for document in documents('train'))
    assert said.rstrip().endswith('dry run: all is well')


def test_nothing_is_trained(mds_root):
    trainer = main.main(config.load([QUICKSTART, *tiny(mds_root)]), dry_run=True)
    assert int(trainer.state.timestamp.batch) == 0 and not trainer.state.optimizers[0].state
    trainer.close()


def test_two_ranks_say_it_once(mds_root, tmp_path):
    argv = tiny(mds_root, 'fsdp_config={}', 'train_loader.num_workers=1', 'train_loader.persistent_workers=true',
                f'save_folder={tmp_path}/ck', 'run_name=a', f'loggers.tensorboard.log_dir={tmp_path}/tb')
    before = snapshot(mds_root, tmp_path)
    done = composer(QUICKSTART, *argv[:3], '--dry_run', *argv[3:], ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert snapshot(mds_root, tmp_path) == before
    said = done.stdout + done.stderr
    for part in ('dry run: nothing is trained', '\nconfig:\n', '\nestimate:\n', 'first batch of rank 0: input_ids (6, 32)',
                 'dry run: all is well', 'sharding: FSDP2 FULL_SHARD on 2 devices'):
        assert said.count(part) == 1, part
    assert re.search(r'4 N / 2 = .* in fp32', said) and re.search(r'^  devices +2   ', said, re.MULTILINE)
    assert 'loss/train/total' not in said


def test_a_hugging_face_model_is_estimated(mds_root, capfd):
    argv = [f'data_remote={mds_root}', f'tokenizer_name={mds_root}/tokenizer', *SHRUNK, *SHRUNK_HF['gpt-neo-125m']]
    assert main.cli(['--dry_run', str(ROOT / 'yamls/hf_causal_lm/gpt-neo-125m.yaml'), *argv]) == 0  # in any place
    said = capfd.readouterr().err
    assert re.search(r'^  parameters N +[0-9,]+   ', said, re.MULTILINE) and 'dry run: all is well' in said
    assert said.count('attention: Hugging Face') == 1


def test_a_model_without_an_estimate_is_no_mistake(mds_root, capfd, monkeypatch):
    class LooksAtValues(ComposerMosaicGPT):
        def forward(self, batch):
            assert batch['input_ids'].max().item() >= 0
            return super().forward(batch)

    monkeypatch.setitem(COMPOSER_MODEL_REGISTRY, 'mosaic_gpt', LooksAtValues)
    assert main.cli([QUICKSTART, *tiny(mds_root), '--dry_run']) == 0
    said = capfd.readouterr().err
    assert "the memory of 'mosaic_gpt' cannot be predicted" in said and 'dry run: all is well' in said


MISTAKES = {
    'key': ['model.d_modle=3'],
    'callback': ['callbacks.speed_monitor.time_unit=parsecs'],
    'a GPU': ['precision=amp_bf16'],
    'prompts': ['callbacks.text_samples={prompts: [""]}'],
    'a long prompt': ['callbacks.text_samples={prompts: ["' + 'word ' * 300 + '"]}'],
    'logger': ['loggers.cometml={}'],
    'another logger': ['loggers.neptune={}'],
    'vocabulary': ['model.vocab_size=100'],
    'data': ['train_loader.dataset.split=nowhere'],
    'little data': ['train_loader.dataset.num_canonical_nodes=1000'],
    'checkpoint': ['load_path=./nowhere.pt'],
    'save_folder': [f'save_folder={QUICKSTART}'],
    'batch': ['global_train_batch_size=1000', 'device_train_microbatch_size=1000'],
    'flag': ['--dryrun'],
}


@pytest.mark.parametrize('case', list(MISTAKES))
def test_mistakes_are_those_of_a_run(case, mds_root, capfd):
    """A dry run prints the same message as a run, which names the setting or flag, and exits with the same code."""
    argv = [QUICKSTART, *tiny(mds_root, *MISTAKES[case])]
    messages = []
    for extra in ([], ['--dry_run']):
        assert main.cli([*argv, *extra]) == 1
        said = capfd.readouterr().err
        messages.append(said[said.index('error: '):])
    assert messages[0] == messages[1]
    named = {'callback': 'speed_monitor', 'a GPU': "precision: 'amp_bf16' needs a GPU",
             'prompts': 'callbacks.text_samples.prompts', 'a long prompt': 'leaves room in max_seq_len',
             'vocabulary': 'vocab_size', 'data': 'nowhere', 'flag': "'--dryrun' is not of the form key=value"}
    assert named.get(case, MISTAKES[case][0].split('=')[0].split('.')[-1]) in messages[1]
    assert 'Traceback' not in messages[1]
