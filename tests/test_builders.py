"""The optimizer's arithmetic, and every name that a YAML may use."""

import copy

import composer.optim
import pytest
import torch

from src import builders
from src.builders import DecoupledAdamW
from src.errors import UserError
from src.schema import OptimizerConfig, SchedulerConfig


def make(cls, weight_decay: float):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 11), torch.nn.Linear(11, 3))
    return model, cls(model.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay)


@pytest.mark.parametrize('weight_decay', [0.0, 1e-2])
def test_fused_decoupled_adamw_is_composers_update(weight_decay):
    ours, mine = make(DecoupledAdamW, weight_decay)
    theirs, reference = make(composer.optim.DecoupledAdamW, weight_decay)
    for step in range(30):
        lr = 1e-2 * (step + 1) / 10 if step < 10 else 1e-2 / (step - 8)  # a schedule
        x = torch.randn(5, 7, generator=torch.Generator().manual_seed(step))
        for model, optimizer in ((ours, mine), (theirs, reference)):
            optimizer.param_groups[0]['lr'] = lr
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert mine.param_groups[0]['weight_decay'] == weight_decay
    assert mine.param_groups[0]['fused'] is True
    mine.fuses = False  # as the config of a run that goes on from this one's checkpoint may have it
    mine.step()
    assert mine.param_groups[0]['fused'] is False


def test_decay_does_not_scale_with_the_peak_learning_rate():
    shrink = []
    for lr in (1e-2, 1e-4):
        p = torch.nn.Parameter(torch.ones(4))
        optimizer = DecoupledAdamW([p], lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        p.grad = torch.zeros(4)
        optimizer.step()
        shrink.append(p[0].item())
    assert shrink == pytest.approx([0.9, 0.9], rel=1e-6)


def test_optimizer_state_loads_from_composers_class_and_back():
    ours, mine = make(DecoupledAdamW, 1e-2)
    theirs, reference = make(composer.optim.DecoupledAdamW, 1e-2)
    ours(torch.ones(1, 7)).sum().backward()
    mine.step()
    state = copy.deepcopy(mine.state_dict())
    reference.load_state_dict(state)
    mine.load_state_dict(reference.state_dict())
    ours(torch.ones(1, 7)).sum().backward()
    mine.step()
    assert type(mine).__name__ == type(reference).__name__ == 'DecoupledAdamW'
    assert next(iter(mine.state.values()))['step'].item() == 2


def test_builders_by_name():
    params = [torch.nn.Parameter(torch.zeros(2))]
    assert type(builders.build_optimizer(OptimizerConfig(lr=1e-3), params)).__name__ == 'DecoupledAdamW'
    adamw = builders.build_optimizer(OptimizerConfig(name='adamw', lr=1e-3, weight_decay=0.1), params)
    assert type(adamw).__name__ == 'AdamW' and isinstance(adamw, torch.optim.AdamW)
    assert adamw.defaults['weight_decay'] == 0.1 and adamw.defaults['betas'] == (0.9, 0.95)
    names = {'cosine_with_warmup': 'CosineAnnealingWithWarmupScheduler', 'constant_with_warmup': 'ConstantWithWarmupScheduler',
             'linear_decay_with_warmup': 'LinearWithWarmupScheduler'}
    for name, cls in names.items():
        assert type(builders.build_scheduler(SchedulerConfig(name=name, t_warmup='10ba'))).__name__ == cls


@pytest.mark.parametrize('name', list(builders.CALLBACKS))
def test_every_callback_builds_with_its_defaults(name):
    kwargs = {'early_stopper': {'monitor': 'loss', 'dataloader_label': 'eval'}}.get(name, {})
    assert isinstance(builders.build_all('callbacks', {name: kwargs})[0], builders.CALLBACKS[name])


@pytest.mark.parametrize('name', ['cometml', 'neptune', 'mlflow'])
def test_a_logger_whose_package_is_missing_says_how_to_install_it(name):
    with pytest.raises(UserError, match=rf'loggers.{name}: its package is not installed; pip install'):
        builders.build_all('loggers', {name: {}})


def test_a_value_that_the_class_refuses_is_named():
    with pytest.raises(UserError, match='callbacks.speed_monitor: Invalid time_unit: parsecs. Must be one of'):
        builders.build_all('callbacks', {'speed_monitor': {'time_unit': 'parsecs'}})


@pytest.mark.parametrize('name,has_gpu,want', [('auto', False, 'fp32'), ('auto', True, 'amp_bf16'), ('fp32', True, 'fp32')])
def test_precision(name, has_gpu, want):
    assert builders.resolve_precision(name, has_gpu).value == want
