"""A user's own layers and blocks: their initial values, sharding and training. And how weights are drawn."""

import copy
import math
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import warm
from composer.models import ComposerClassifier
from launch import ROOT, SCRIPTS, clean_env, free_port, tiny
from own_layers import OwnBlock, OwnValues, run
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import main
from src import initialisation, mosaic_gpt
from src.checkpoints import loading
from src.common.errors import UserError
from src.config import load as config
from src.config.schema import FSDPConfig
from src.initialisation import draw_normal, seed_of
from src.model_registry import COMPOSER_MODEL_REGISTRY
from src.mosaic_gpt import ComposerMosaicGPT, GPTBlock, MosaicGPT
from src.training.sharding import check_blocks

TINY = dict(d_model=16, n_heads=2, n_layers=3, max_seq_len=8, vocab_size=64, init_std=0.08, attn_impl='sdpa')
DEVICES = pytest.mark.parametrize('device', ['cpu', 'meta'])
IDS = torch.arange(16).reshape(2, 8)
QUICKSTART = 'yamls/quickstart.yaml'


def built(device: str, **overrides) -> MosaicGPT:
    model = MosaicGPT(TINY | overrides | {'device': device})
    return model.materialize('cpu') if device == 'meta' else model


@pytest.fixture
def own_block(monkeypatch) -> None:
    """Replaces GPTBlock by a block of the user's own."""
    monkeypatch.setattr(mosaic_gpt, 'GPTBlock', OwnBlock)


def equal_tensors(model: nn.Module, other: nn.Module) -> bool:
    tensors, others = ([*m.named_parameters(), *m.named_buffers()] for m in (model, other))
    return all(name == other_name and torch.equal(a, b)
               for (name, a), (other_name, b) in zip(tensors, others, strict=True))


# ---------------------------------------------------------------- initial values


@DEVICES
def test_own_layers_keep_their_own_initialisation(own_block, device):
    model = built(device, d_model=64, n_heads=4)
    first, second = model.blocks[:2]
    for block in (first, second):
        assert (block.norm.weight == 1).all() and (block.gain.floor == 0.25).all()
        assert ((block.gain.weight >= 0.5) & (block.gain.weight <= 0.6)).all()
        assert (block.attention.in_proj_bias == 0).all() and (block.attention.out_proj.bias == 0).all()
        xavier = math.sqrt(2 / (64 + 3 * 64))
        assert block.attention.in_proj_weight.std().item() == pytest.approx(xavier, rel=0.05)
        assert block.tables.inv_freq.tolist() == pytest.approx([1, 0.1, 0.01, 0.001])
        assert block.tables.odd.tolist() == [False, True, False, True]
        # The model draws Linear layers, also those within other modules
        assert block.attention.out_proj.weight.std().item() == pytest.approx(0.08 / math.sqrt(6), rel=0.05)
        assert block.linear.weight.std().item() == pytest.approx(0.08, rel=0.05) and (block.linear.bias == 0).all()
    for name in ('gain.weight', 'attention.in_proj_weight'):
        assert not torch.equal(first.get_parameter(name), second.get_parameter(name)), name
    torch.rand(5)
    assert equal_tensors(built('cpu', d_model=64, n_heads=4), model)
    assert not equal_tensors(built(device, d_model=64, n_heads=4, init_seed=18), model)
    model(IDS, targets=IDS).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_what_a_constructor_set_stays_on_the_cpu_and_is_an_error_on_meta(monkeypatch):
    class Block(GPTBlock):
        def __init__(self, cfg):
            super().__init__(cfg)
            self.values = OwnValues(cfg.d_model, cfg.device)

    monkeypatch.setattr(mosaic_gpt, 'GPTBlock', Block)
    values = built('cpu').blocks[1].values
    assert (values.scale == 0.125).all() and (values.norm.weight == 0.5).all()
    message = (r'with meta, nothing gives values to scale of OwnValues \(transformer.blocks.0.values\); write a method '
               r'reset_parameters\(self\) in class OwnValues that .*, or set model.device=cpu')
    with pytest.raises(UserError, match=message):
        built('meta')
    model = MosaicGPT(TINY | {'device': 'meta'})
    with pytest.raises(UserError, match='nothing gives values to scale of OwnValues'):
        model.param_init_fn(model.blocks[0].values)  # as Composer calls it


@DEVICES
def test_what_the_code_around_a_matrix_writes_into_it_stays_or_is_an_error_on_meta(monkeypatch, device):
    class Gated(GPTBlock):
        def __init__(self, cfg):
            super().__init__(cfg)
            self.ids = nn.Embedding(64, 16, padding_idx=0, device=cfg.device)
            self.gate = nn.Linear(16, 4, device=cfg.device)
            nn.init.zeros_(self.gate.weight)
            nn.init.constant_(self.gate.bias, -3)

    monkeypatch.setattr(mosaic_gpt, 'GPTBlock', Gated)
    if device == 'meta':
        with pytest.raises(UserError, match='model.device: meta loses the values of transformer.blocks.0.gate.weight'):
            built('meta')
        return
    model = built('cpu')
    for _ in range(2):
        assert all((block.gate.weight == 0).all() and (block.gate.bias == -3).all() for block in model.blocks)
        assert model.blocks[0].ids.weight.std().item() == pytest.approx(0.08, rel=0.1)
        model.init_weights()


def test_a_head_that_is_tied_to_an_embedding_with_padding_comes_from_meta(monkeypatch):
    class Padded(nn.Embedding):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs, padding_idx=0)

    monkeypatch.setattr(mosaic_gpt.nn, 'Embedding', Padded)
    here, meta = built('cpu'), built('meta')
    assert equal_tensors(here, meta) and meta.lm_head.weight is meta.transformer['wte'].weight and (meta.lm_head.weight[0] == 0).all()


@DEVICES
def test_a_tied_head_with_an_initialisation_of_its_own_leaves_the_embedding_alone(device):
    class Head(nn.Linear):
        def reset_parameters(self):
            nn.init.uniform_(self.weight, 5, 6)

    model = MosaicGPT(TINY | {'device': device})
    model.lm_head = Head(16, 64, bias=False, device=device)
    model.tie_weights()
    model.materialize('cpu') if device == 'meta' else model.init_weights()
    assert model.lm_head.weight is model.transformer['wte'].weight and equal_tensors(model.transformer, MosaicGPT(TINY).transformer)


def test_one_block_in_several_places_is_refused_with_fsdp2():
    model = MosaicGPT(TINY)
    fsdp = FSDPConfig(sharding_strategy='FULL_SHARD')
    check_blocks(fsdp, model, has_gpu=False)
    model.transformer['blocks'] = nn.ModuleList([model.blocks[0]] * 3)
    check_blocks(None, model, has_gpu=False)
    with pytest.raises(UserError, match='transformer.blocks.1, transformer.blocks.2 are one and the same module, .*version 2'):
        check_blocks(fsdp, model, has_gpu=False)


def test_a_model_of_another_class_is_refused(mds_root, monkeypatch):
    monkeypatch.setitem(COMPOSER_MODEL_REGISTRY, 'mosaic_gpt', lambda cfg: ComposerClassifier(nn.Linear(1, 1), num_classes=2))
    with pytest.raises(UserError, match="model.name: 'mosaic_gpt' is a ComposerClassifier; derive it from ComposerCausalLM"):
        main.main(config.load([QUICKSTART, *tiny(mds_root)]))


@pytest.mark.parametrize('forgotten', ['weight', 'mask', 'table'])
def test_an_initialisation_that_forgets_something_is_an_error_on_meta(forgotten):
    class Forgetful(nn.Module):
        def __init__(self, device):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, device=device))
            self.register_buffer('mask', torch.ones(4, dtype=torch.bool, device=device), persistent=False)
            self.register_buffer('table', torch.ones(4, device=device), persistent=False)
            self.reset_parameters()

        def reset_parameters(self):
            for name in {'weight', 'mask', 'table'} - {forgotten}:
                self.mask.fill_(True) if name == 'mask' else getattr(self, name).data.fill_(1)

    model = MosaicGPT(TINY | {'device': 'meta'})
    model.blocks[2].own = Forgetful('meta')
    with pytest.raises(UserError, match=rf'gives values to {forgotten} of Forgetful \(transformer.blocks.2.own\)'):
        model.materialize('cpu')


def test_subclasses_of_pytorchs_layers():
    class Eye(nn.Linear):
        def reset_parameters(self):
            nn.init.eye_(self.weight)
            nn.init.ones_(self.bias)

    class Scaled(nn.Linear):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.scale = nn.Parameter(torch.full((1,), 3.0, device=self.weight.device))

    for device in ('cpu', 'meta'):
        model = MosaicGPT(TINY | {'device': device})
        model.blocks[0].own = Eye(4, 4, device=device)
        model.blocks[1].own = nn.Embedding(40, 16, padding_idx=7, device=device)
        model.blocks[2].own = nn.LayerNorm(4, bias=False, device=device)
        model.materialize('cpu') if device == 'meta' else model.init_weights()
        assert torch.equal(model.blocks[0].own.weight, torch.eye(4)) and (model.blocks[0].own.bias == 1).all()
        assert (model.blocks[2].own.weight == 1).all() and model.blocks[2].own.bias is None
        embedding = model.blocks[1].own.weight
        assert (embedding[7] == 0).all() and embedding.std().item() == pytest.approx(0.08, rel=0.1)
    model = MosaicGPT(TINY)
    model.blocks[0].own = Scaled(4, 4)
    model.init_weights()
    assert model.blocks[0].own.scale.item() == 3
    model = MosaicGPT(TINY | {'device': 'meta'})
    model.blocks[0].own = Scaled(4, 4, device='meta')
    with pytest.raises(UserError, match='nothing gives values to scale of Scaled'):
        model.materialize('cpu')


def test_a_subclass_may_initialise_modules_itself():
    class Own(MosaicGPT):
        def param_init_fn(self, module: nn.Module) -> None:
            if isinstance(module, OwnValues):
                with torch.no_grad():
                    module.scale.fill_(0.75)
            else:
                super().param_init_fn(module)

    here, meta = Own(TINY), Own(TINY | {'device': 'meta'})
    for model in (here, meta):
        model.blocks[0].values = OwnValues(16, model.cfg.device)
        model.materialize('cpu') if model is meta else model.init_weights()
        assert (model.blocks[0].values.scale == 0.75).all()
    assert equal_tensors(here.blocks[1], meta.blocks[1])


def test_modules_may_come_from_meta_one_by_one_and_untied(own_block):
    """As FSDP1 takes them from meta through Composer: the head before the embedding, tied again later."""
    model = MosaicGPT(TINY | {'device': 'meta'})
    for module in (model.lm_head, *model.transformer.modules()):
        if initialisation.own_tensors(module):
            module.to_empty(device='cpu', recurse=False)
            model.param_init_fn(module)
    model.tie_weights()
    assert equal_tensors(model, MosaicGPT(TINY))


# ---------------------------------------------------------------- replaced after the build


def test_blocks_that_are_replaced_after_the_build():
    model = MosaicGPT(TINY)
    model.blocks[1] = OwnBlock(model.cfg)
    before = copy.deepcopy(model.blocks[1])
    model(IDS)
    assert equal_tensors(model.blocks[1], before)

    meta = MosaicGPT(TINY | {'device': 'meta'})
    for n in (0, 1):
        meta.blocks[n] = OwnBlock(meta.cfg)
    meta.blocks[2] = here = OwnBlock(model.cfg)
    kept = copy.deepcopy(here)
    meta.materialize('cpu')
    assert equal_tensors(meta.blocks[2], kept)  # it had its values
    assert not torch.equal(meta.blocks[0].linear.weight, meta.blocks[1].linear.weight)
    model.init_weights()
    assert equal_tensors(model.blocks[1], meta.blocks[1])  # drawn by name
    for each in (model, meta):
        units = [m for m in each.modules() if each.fsdp_wrap_fn(m)]
        assert units == [*each.blocks] == [m for m in each.modules() if each.activation_checkpointing_fn(m)]
    every_other = MosaicGPT(TINY | {'activation_checkpointing_every': 2})
    every_other.blocks[2] = OwnBlock(every_other.cfg)
    checkpointed = [m for m in every_other.modules() if every_other.activation_checkpointing_fn(m)]
    assert checkpointed == [*every_other.blocks[::2]]


def test_wrappers_change_neither_blocks_nor_names():
    plain, wrapped = MosaicGPT(TINY), MosaicGPT(TINY | {'device': 'meta'})
    inner = [*wrapped.blocks]
    apply_activation_checkpointing(wrapped, check_fn=lambda m: m in inner)
    wrapped.blocks[0].causal_attn = torch.compile(wrapped.blocks[0].causal_attn)
    assert wrapped.blocks[1] is not inner[1]
    assert [m for m in wrapped.modules() if wrapped.fsdp_wrap_fn(m)] == inner
    assert [m for m in wrapped.modules() if wrapped.activation_checkpointing_fn(m)] == inner
    wrapped.materialize('cpu')
    for a, b in zip(wrapped.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


@DEVICES
def test_a_head_of_the_users_own_is_not_tied(device):
    class Untied(MosaicGPT):
        def tie_weights(self):
            pass

    model = Untied(TINY | {'device': device})
    model.lm_head = nn.Linear(16, 64, device=device)
    model.materialize('cpu') if device == 'meta' else model.init_weights()
    assert model.lm_head.weight is not model.transformer['wte'].weight
    assert model.lm_head.weight.std().item() == pytest.approx(0.08, rel=0.1)
    assert not torch.equal(model.lm_head.weight, model.transformer['wte'].weight)
    with torch.no_grad():
        model.lm_head.bias.uniform_()
    logits = model(IDS)
    model.lm_head.bias.data.zero_()
    assert not torch.equal(model(IDS), logits)
    loss = model(IDS, targets=IDS)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten()))
    loss.backward()
    assert model.lm_head.bias.grad is not None


def test_a_tie_of_the_users_own_stays_on_meta():
    def tied(device: str) -> MosaicGPT:
        model = MosaicGPT(TINY | {'device': device})
        model.blocks[2].mlp.mlp_up.weight = model.blocks[0].mlp.mlp_up.weight
        return model

    here, meta = tied('cpu'), tied('meta').materialize('cpu')
    here.init_weights()
    assert meta.blocks[2].mlp.mlp_up.weight is meta.blocks[0].mlp.mlp_up.weight
    assert equal_tensors(here, meta)
    assert torch.equal(meta.blocks[0].mlp.mlp_up.weight, MosaicGPT(TINY).blocks[0].mlp.mlp_up.weight)


def test_a_block_that_takes_no_documents_cannot_keep_attention_within_them(own_block):
    with pytest.raises(UserError, match='within_document: true, but forward of OwnBlock takes no `documents`; add'):
        MosaicGPT(TINY | {'attn_within_document': True})


def test_8_bits_leave_layers_of_the_users_own(own_block):
    model = MosaicGPT(TINY | {'linear_impl': 'fp8'})
    assert type(model.blocks[0].linear).__name__ == 'Float8Linear'
    assert type(model.blocks[0].attention.out_proj).__name__ == 'NonDynamicallyQuantizableLinear'
    assert equal_tensors(model, MosaicGPT(TINY))
    with pytest.raises(UserError, match="linear_impl: 'fp8': the model's blocks have no nn.Linear to compute in 8 bits"):
        mosaic_gpt.compute_in_fp8(nn.ModuleList([nn.RMSNorm(4)]))


# ---------------------------------------------------------------- drawing


def test_a_large_parameter_is_drawn_in_chunks_with_their_own_seeds(monkeypatch):
    def numbers(rows: int, key: str) -> torch.Tensor:
        return torch.empty(rows, 32).normal_(0, 0.5, generator=torch.Generator().manual_seed(seed_of(key)))

    whole = torch.empty(100, 32)
    draw_normal(whole, 0.5, 'k')
    assert torch.equal(whole, numbers(100, 'k'))
    monkeypatch.setattr(initialisation, 'CHUNK', 40 * 32 + 5)
    chunks = torch.cat([numbers(40, 'k'), numbers(40, 'k:1'), numbers(20, 'k:2')])
    for world in ('1', '1000'):  # many threads, one thread
        monkeypatch.setenv('LOCAL_WORLD_SIZE', world)
        draw_normal(whole, 0.5, 'k')
        assert torch.equal(whole, chunks)
    half, columns = torch.empty(100, 32, dtype=torch.bfloat16), torch.empty(32, 100).T
    for other in (half, columns):
        draw_normal(other, 0.5, 'k')
        assert torch.equal(other, chunks.to(other.dtype))
    monkeypatch.setattr(initialisation, 'CHUNK', 5)  # less than a row
    draw_normal(whole, 0.5, 'k')
    assert torch.equal(whole[99], numbers(1, 'k:99')[0])


def test_no_parameter_of_the_quick_start_is_cut():
    assert 4096 * 128 <= initialisation.CHUNK == 2**19  # otherwise its loss curve changes


@pytest.fixture
def fake_rank() -> Iterator:
    def join(rank: int, world_size: int, *shape: int):
        if dist.is_initialized():
            dist.destroy_process_group()
        # This cache keeps meshes, which hold the rank; a real process has one rank
        DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache.cache_clear()  # pyright: ignore
        dist.init_process_group('fake', rank=rank, world_size=world_size, store=FakeStore())
        return dist.init_device_mesh('cpu', shape or (world_size,))

    yield join
    dist.destroy_process_group()


def test_a_rank_draws_the_chunks_that_it_keeps_and_no_others(fake_rank, monkeypatch):
    monkeypatch.setattr(initialisation, 'CHUNK', 3 * 8)
    whole, drawn = torch.empty(22, 8), []
    draw_normal(whole, 1.0, 'k', zero_row=13)
    monkeypatch.setattr(initialisation, 'seed_of', lambda key: drawn.append(key) or seed_of(key))
    for shape, placements in (((4,), [Shard(0)]), ((16,), [Shard(0)]), ((2, 2), [Replicate(), Shard(0)]),
                              ((2, 2), [Shard(0), Shard(0)]), ((4,), [Replicate()])):
        for rank in range(math.prod(shape)):
            mesh = fake_rank(rank, math.prod(shape), *shape)
            param = distribute_tensor(torch.zeros(22, 8), mesh, placements, src_data_rank=None)
            drawn.clear()
            draw_normal(param, 1.0, 'k', zero_row=13)
            want = distribute_tensor(whole, mesh, placements, src_data_rank=None)
            assert torch.equal(param.to_local(), want.to_local()), (shape, placements, rank)
            if placements == [Shard(0)]:  # 6 rows a rank of 4: at most 3 chunks of 8
                assert len(drawn) <= (3 if shape == (4,) else 2) and (len(drawn) > 0) == (len(param.to_local()) > 0)


@pytest.mark.parametrize('world_size', [1, 2, 4])
def test_sharded_models_have_the_weights_of_whole_ones(own_block, fake_rank, monkeypatch, world_size):
    monkeypatch.setattr(initialisation, 'CHUNK', 100)
    whole = MosaicGPT(TINY)
    for rank in range(world_size):
        mesh = fake_rank(rank, world_size)
        model = MosaicGPT(TINY | {'device': 'meta'})
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.materialize('cpu')
        assert model.lm_head.weight is model.transformer['wte'].weight
        for (name, param), want in zip(model.named_parameters(), whole.parameters(), strict=True):
            part = distribute_tensor(want.detach(), mesh, param.placements, src_data_rank=None)  # pyright: ignore
            assert torch.equal(param.to_local(), part.to_local()), name  # pyright: ignore
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), whole.buffers(), strict=True))


# ---------------------------------------------------------------- through main


def test_a_changed_block_trains_and_a_loaded_model_is_not_drawn(own_block, mds_root, tmp_path, monkeypatch):
    argv = [QUICKSTART, *tiny(mds_root, 'max_duration=4ba', 'scheduler.t_warmup=1ba', f'save_folder={tmp_path}/one',
                              'run_name=one', 'model.device=meta', 'eval_first=false', 'callbacks.text_samples=false')]
    weights, loss = run(*argv)
    assert 0 < loss < 6.3 and (weights['model.transformer.blocks.0.norm.weight'] - 1).abs().max() < 0.1

    def draw(*_):
        raise AssertionError('weights are drawn that a checkpoint overwrites')

    monkeypatch.setattr(initialisation, 'draw_normal', draw)
    file = f'{tmp_path}/one/ep0-ba4-rank0.pt'
    finish, name = loading.finish_loading, 'model.transformer.blocks.1.tables.inv_freq'
    monkeypatch.setattr(loading, 'finish_loading', lambda start, trainer: (
        finish(start, trainer), tables.append(trainer.state.model.get_buffer(name))))
    for settings in (['load_weights_only=true', 'model.device=cpu'], ['fsdp_config.sharding_strategy=FULL_SHARD']):
        tables: list[torch.Tensor] = []
        loaded, _ = run(*argv, f'load_path={file}', 'save_folder=null', *settings, train=False)
        assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())
        assert tables[0].tolist() == pytest.approx([1, 0.1, 0.01, 0.001])
    with pytest.raises(AssertionError, match='that a checkpoint overwrites'):
        MosaicGPT(TINY)  # the next model is drawn


def test_rms_norm_trains(mds_root, monkeypatch):
    class Block(GPTBlock):
        def __init__(self, cfg):
            super().__init__(cfg)
            self.ln_1, self.ln_2 = (nn.RMSNorm(cfg.d_model, device=cfg.device) for _ in range(2))

    monkeypatch.setattr(mosaic_gpt, 'GPTBlock', Block)
    argv = [QUICKSTART, *tiny(mds_root, 'model.device=meta', 'max_duration=3ba', 'scheduler.t_warmup=1ba',
                              'callbacks.text_samples=false',
                              'fsdp_config.sharding_strategy=FULL_SHARD', 'fsdp_config.activation_checkpointing=true',
                              'model.attn_within_document=true')]
    weights, loss = run(*argv)
    assert 5.5 < loss < 6.3  # ln 512 = 6.24
    norm = weights['model.transformer.blocks.1.ln_2.weight']
    assert 0 < (norm - 1).abs().max() < 0.01


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_own_layers_are_the_same_on_two_ranks(own_block, mds_root, tmp_path):
    argv = [QUICKSTART, *tiny(mds_root, 'max_duration=3ba', 'scheduler.t_warmup=1ba',
                              'eval_first=false', 'callbacks.text_samples=false')]
    launcher = [str(SCRIPTS / 'composer'), '-n', '2', '--master_port', str(free_port())]
    done = warm.run([*launcher, 'tests/own_layers.py', str(tmp_path), *argv], cwd=ROOT, env=clean_env(),
                          capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    results = torch.load(tmp_path / 'weights.pt', weights_only=True)
    trained, (want, _) = results.pop('trained'), run(*argv, train=False)
    assert len(results) == 4
    for settings, weights in results.items():
        assert weights.keys() == want.keys() and all(torch.equal(weights[name], want[name]) for name in want), settings
    for name, weight in run(*argv)[0].items():
        assert not torch.equal(weight, want[name]), name
        assert (weight - trained[name]).abs().max() < 1e-5, name


def test_composer_model_with_a_replaced_block_learns():
    model = ComposerMosaicGPT(TINY)
    model.model.blocks[1] = OwnBlock(model.model.cfg)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        loss = model({'input_ids': IDS, 'labels': IDS})['loss']
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
