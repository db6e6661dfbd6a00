"""The same samples, losses and weights on 1, 2 and 4 ranks, under DDP and every way of sharding."""

import os
from functools import cache

import pytest
import torch
from conftest import s3_server
from launch import ranks, tiny

FSDP = 'fsdp_config.sharding_strategy'
# An epoch of 500 sequences has 20 batches of 24, so the last four batches are of a second epoch. The eps is as large as
# the gradients, so that Adam does not hide a wrong factor of the gradients.
BASE = ['log_to_console=false', 'eval_loader=null', 'global_train_batch_size=24', 'device_train_microbatch_size=5',
        'max_duration=24ba', 'optimizer.eps=1e-5', 'optimizer.weight_decay=1e-4', 'callbacks.speed_monitor=false']
HELD = {
    'ddp': [],
    'ddp from meta': ['model.device=meta'],
    'ddp with workers': ['train_loader.num_workers=2', 'train_loader.persistent_workers=true'],
    'no shard': [f'{FSDP}=NO_SHARD', 'model.device=meta'],
    'full shard': [f'{FSDP}=FULL_SHARD'],
    'full shard from meta': [f'{FSDP}=FULL_SHARD', 'model.device=meta', 'train_loader.num_workers=1'],
    'shard grad op': [f'{FSDP}=SHARD_GRAD_OP', 'fsdp_config.activation_checkpointing=true', 'model.device=meta'],
    'reduced once': [f'{FSDP}=FULL_SHARD', 'fsdp_config.reduce_every_microbatch=false'],
    'compiled blocks': [f'{FSDP}=FULL_SHARD', 'compile_config.backend=aot_eager', 'fsdp_config.activation_checkpointing=true',
                        'model.activation_checkpointing_every=2'],
    'compiled': [f'{FSDP}=FULL_SHARD', 'compile_config.backend=aot_eager', 'compile_config.scope=model'],
    'compiled ddp': ['compile_config.backend=aot_eager', 'model.loss_impl=plain'],
}
HF = ['yamls/hf_causal_lm/gpt2-small.yaml', 'model.pretrained_model_name_or_path=null', 'model.config_overrides.model_type=gpt2',
      'model.config_overrides.n_embd=16', 'model.config_overrides.n_head=2', 'model.config_overrides.n_layer=2',
      'model.config_overrides.vocab_size=512', 'model.config_overrides.n_positions=32', 'train_loader.num_workers=0',
      'train_loader.prefetch_factor=null', 'train_loader.persistent_workers=false', 'train_loader.pin_memory=false']
# Few ranks hold whole rows of these matrices: 30, 18 and 6 rows, of which a fourth rank has 6, 3 and none
MUON = ['model.d_model=18', 'model.n_heads=3', 'model.n_kv_heads=1', 'model.d_hidden=3', 'optimizer.weight_decay=0.1',
        'optimizer.cautious=true', 'run_name=muon', 'save_interval=10ba', 'save_num_checkpoints_to_keep=-1']


def argv(root, *overrides: str) -> list[str]:
    return ['yamls/quickstart.yaml', *tiny(root, *BASE, *overrides)]


def muon(root, *overrides: str) -> list[str]:
    return ['yamls/modern_gpt/quickstart.yaml', *tiny(root, *BASE, *MUON, *overrides)]


def hf(root, *overrides: str) -> list[str]:
    kept = [o for o in tiny(root, *BASE) if not o.startswith(('model.', 'loggers.tensorboard'))]
    return [*HF, 'tokenizer_name=${data_remote}/tokenizer', *kept, *overrides]


@pytest.fixture(scope='module')
def runs(tokens_root, mds_root, tmp_path_factory):
    """All runs on each number of ranks, with one launch for each number."""
    folder = tmp_path_factory.mktemp('runs')
    shared = {'hf': hf(tokens_root, 'fsdp_config=null'), 'hf sharded': hf(tokens_root, f'{FSDP}=FULL_SHARD'),
              'text': argv(mds_root, 'global_train_batch_size=12', f'{FSDP}=FULL_SHARD'),
              'muon': muon(tokens_root), 'muon sharded': muon(tokens_root, f'{FSDP}=FULL_SHARD', 'model.device=meta')}
    sharded = argv(tokens_root, f'{FSDP}=FULL_SHARD', 'fsdp_config.state_dict_type=sharded', 'save_interval=10ba', 'run_name=one',
                   'save_num_checkpoints_to_keep=-1')
    bucket = f's3://bucket/{os.getpid()}'  # the folder for files on their way has this name
    loads = {'loads': [*sharded, f'load_path={folder}/saves/ep0-ba10'],
             'loads from s3': [*sharded, f'load_path={bucket}/one/ep0-ba10']}
    saves = {'saves': [*sharded, f'save_folder={folder}/saves'],
             'saves to s3': [*sharded, f'save_folder={bucket}/{{run_name}}']}
    for kind, name in {'full': 'ep0-ba10-rank0.pt', 'sharded': 'ep0-ba10'}.items():
        run = [*shared['muon sharded'], f'fsdp_config.state_dict_type={kind}']
        saves[f'muon saves {kind}'] = [*run, f'save_folder={folder}/muon-{kind}']
        loads[f'muon loads {kind}'] = [*run, f'load_path={folder}/muon-{kind}/{name}']

    @cache
    def on(n: int):
        held = {name: argv(tokens_root, *how) for name, how in HELD.items()}
        if n == 1:
            on(2)  # its shards are loaded below
            return ranks(1, {'one': argv(tokens_root), 'full shard': held['full shard'], **shared, **loads}, folder)
        if n == 2:
            return ranks(2, {**held, **shared, **saves, **loads}, folder)
        on(2)
        return ranks(n, {**held, **shared, **loads}, folder)
    with pytest.MonkeyPatch.context() as env, s3_server(env):
        yield on


pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # the first test makes all the runs


def close(got, want, start: int = 0) -> None:
    """Losses agree within 1e-5, and each weight tensor within 1e-5 of its norm."""
    losses = {n: v for n, v in want['losses'].items() if n >= start}
    assert len(losses) == 24 - start and got['losses'] == pytest.approx(losses, rel=1e-5)
    for name, weight in want['weights'].items():
        assert (got['weights'][name] - weight).norm() <= 1e-5 * weight.norm() + 1e-7, name


@pytest.mark.parametrize('held', HELD)
@pytest.mark.parametrize('n', [2, 4])
def test_more_ranks_give_the_run_of_one(runs, n, held):
    close(runs(n)[held], runs(1)['one'])
    assert runs(n)[held]['batches'] == runs(1)['one']['batches']


@pytest.mark.parametrize('which', ['hf', 'hf sharded', 'text', 'muon', 'muon sharded'])
@pytest.mark.parametrize('n', [2, 4])
def test_hugging_face_text_and_muon_too(runs, n, which):
    close(runs(n)[which], runs(1)[which.removesuffix(' sharded')])
    assert runs(n)[which]['batches'] == runs(1)[which]['batches']


def test_one_device_sharded_is_one_device(runs):
    close(runs(1)['full shard'], runs(1)['one'])
    close(runs(1)['muon sharded'], runs(1)['muon'])


@pytest.mark.parametrize(('saves', 'loads'), [('saves', 'loads'), ('saves to s3', 'loads from s3')], ids=['folder', 's3'])
@pytest.mark.parametrize('n', [1, 4])
def test_what_two_ranks_saved_in_shards_loads_on_other_numbers(runs, n, saves, loads):
    close(runs(2)[saves], runs(1)['one'])
    close(runs(n)[loads], runs(1)['one'], start=10)
    assert runs(n)[loads]['batches'] == runs(1)['one']['batches'][10:]


@pytest.mark.parametrize('kind', ['full', 'sharded'])
@pytest.mark.parametrize('n', [1, 2, 4])
def test_muon_goes_on_from_what_two_ranks_saved(runs, n, kind):
    """On two ranks to the bit."""
    whole, rest = runs(2)[f'muon saves {kind}'], runs(n)[f'muon loads {kind}']
    close(rest, whole, start=10)
    assert rest['lrs'] == {batch: lr for batch, lr in whole['lrs'].items() if batch > 10} and len(rest['lrs']) >= 13
    if n == 2:
        assert rest['losses'] == {batch: loss for batch, loss in whole['losses'].items() if batch >= 10}
        assert all(torch.equal(rest['weights'][name], weight) for name, weight in whole['weights'].items())


def test_gradients_are_reduced_once_a_step(runs):
    every, once = (runs(2)[name]['reductions'] for name in ('full shard', 'reduced once'))
    assert once == 24 * 3 and every == 3 * once, 'two blocks and the root, in 24 steps of 3 microbatches'


def test_the_head_stays_tied(runs):
    for name in ('full shard from meta', 'hf sharded'):
        weights = runs(2)[name]['weights']
        head, embedding = (next(v for k, v in weights.items() if k.endswith(end)) for end in ('lm_head.weight', 'wte.weight'))
        assert torch.equal(head, embedding)
