"""Every config of a classifier builds, and says what its recipe says."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATA_SAMPLERS, DATASETS, HOOKS, MODELS, PARAM_SCHEDULERS
from PIL import Image
from timm.optim import param_groups_weight_decay
from timm.scheduler import create_scheduler_v2

from gfnet_dense.openmmlab import GFNetPyramid

CONFIGS = Path(__file__).parents[2] / 'configs'
# With the head, at 224: recomputed from the architecture.
PARAMETERS = {
    'gfnet_ti_imagenet': 7_511_784,
    'gfnet_xs_imagenet': 15_985_768,
    'gfnet_s_imagenet': 24_869_608,
    'gfnet_b_imagenet': 43_120_616,
    'gfnet_h_ti_imagenet': 15_085_096,
    'gfnet_h_s_imagenet': 32_162_632,
    'gfnet_h_b_imagenet': 53_744_200,
}
# At 384 the grid of 24x24 has filters of 24x13 where the one of 14x14 has 14x8.
FINER = {
    f'gfnet_{size}_imagenet_384': PARAMETERS[f'gfnet_{size}_imagenet']
    + channels * ((24 * 24 - 14 * 14) + 2 * depth * (24 * 13 - 14 * 8))
    for size, channels, depth in (('xs', 384, 12), ('s', 384, 19), ('b', 512, 19))
}
DROP_PATH = dict(ti=0.0, xs=0.0, s=0.15, b=0.25, h_ti=0.1, h_s=0.2, h_b=0.4)
FINETUNING = [*FINER, 'gfnet_xs_transfer']
EXPECTED = [*PARAMETERS, *FINETUNING, 'gfnet_nano_digits']


def load(name: str) -> Config:
    return Config.fromfile(CONFIGS / f'{name}.py')


def build(cfg: Config) -> BaseModel:
    cfg = cfg.copy()
    cfg.model.backbone.init_cfg = None
    return MODELS.build(cfg.model)


def test_the_list_of_configs():
    assert {path.stem for path in CONFIGS.glob('gfnet_*.py')} == set(EXPECTED)


@pytest.mark.parametrize('name', EXPECTED)
def test_classifier_and_its_data_agree(name):
    cfg = load(name)
    backbone, dataset = cfg.model.backbone, cfg.train_dataloader.dataset
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.type == 'ImageFolder'
        assert loader.dataset.num_classes == backbone.num_classes
        assert loader.dataset.transform.input_size == backbone.img_size
        assert loader.dataset.data_root == dataset.data_root
    assert cfg.test_dataloader == cfg.val_dataloader
    assert dataset.transform.is_training and cfg.train_dataloader.drop_last
    assert cfg.train_dataloader.batch_size % 2 == 0, 'mixup pairs images'


@pytest.mark.parametrize(
    'name', [pytest.param(n, marks=[pytest.mark.slow] * ('_xs_' not in n)) for n in FINER]
)
def test_parameters_at_384(name):
    assert sum(p.numel() for p in build(load(name)).parameters()) == FINER[name]


@pytest.mark.parametrize('name', ['gfnet_ti_imagenet', 'gfnet_h_ti_imagenet'])
def test_weight_decay_is_that_of_timm(name):
    """The official code takes timm's optimizer factory, and spares the position embedding."""
    cfg = load(name)
    model = build(cfg)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    decay = {id(p): g['weight_decay'] for g in optimizer.param_groups for p in g['params']}
    groups = param_groups_weight_decay(model.backbone, 0.05, no_weight_decay_list={'pos_embed'})
    expected = {id(p): g['weight_decay'] for g in groups for p in g['params']}
    assert decay == expected
    assert set(decay.values()) == {0.0, 0.05}
    assert {g['lr'] for g in optimizer.param_groups} == {5e-4}


@pytest.mark.slow
@pytest.mark.parametrize('name', PARAMETERS)
def test_sizes_and_hyperparameters_are_the_official_ones(name):
    cfg = load(name)
    model = build(cfg)
    size = re.fullmatch(r'gfnet_(\w+)_imagenet', name)[1]
    assert cfg.model.backbone.arch == size.replace('_', '-')
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    rates = [m.drop_prob for m in model.modules() if hasattr(m, 'drop_prob')]
    assert rates == pytest.approx(np.linspace(0, DROP_PATH[size], len(rates)).tolist())
    assert cfg.optim_wrapper.optimizer == dict(
        type='AdamW', lr=5e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05
    )
    assert cfg.optim_wrapper.clip_grad == dict(max_norm=1.0)
    assert cfg.train_dataloader.dataset.transform == dict(
        is_training=True,
        input_size=224,
        auto_augment='rand-m9-mstd0.5-inc1',
        color_jitter=0.4,
        interpolation='bicubic',
    )
    assert cfg.val_dataloader.dataset.transform == dict(
        input_size=224, crop_pct=0.875, interpolation='bicubic'
    )
    mixup = model.data_preprocessor.mixup
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.cutmix_minmax) == (0.8, 1.0, None)
    assert (mixup.mix_prob, mixup.switch_prob, mixup.mode) == (1.0, 0.5, 'batch')
    assert (mixup.label_smoothing, mixup.num_classes) == (0.1, 1000)
    # Random erasing, repeated augmentation and the moving average are off.
    assert model.data_preprocessor.random_erasing is None
    assert cfg.train_dataloader.sampler.type == 'DefaultSampler'
    assert cfg.custom_hooks == []


# As docs/training.md says them, in a config of one's own.
SWITCHES = re.findall(
    r'^\| [\w ]+ \| `(\w+ = .*)` \|$',
    (CONFIGS.parent / 'docs/training.md').read_text(),
    re.MULTILINE,
)


@pytest.fixture
def own(tmp_path):
    """Return a function that loads a config of one's own over the one of GFNet-H-S."""

    def own(*lines: str) -> Config:
        path = tmp_path / 'own.py'
        path.write_text('\n'.join([f"_base_ = '{CONFIGS}/gfnet_h_s_imagenet.py'", *lines]))
        return Config.fromfile(path)

    return own


def test_switches_of_the_docs_switch(own):
    erasing, repeated, average = SWITCHES
    erases = build(own(erasing)).data_preprocessor.random_erasing
    assert (erases.probability, erases.rand_color, erases.per_pixel) == (0.25, False, True)
    sampler = own(repeated).train_dataloader.sampler
    assert len(DATA_SAMPLERS.build(sampler, default_args=dict(dataset=range(512)))) == 512
    (hook,) = own(average).custom_hooks
    assert HOOKS.build(hook).ema_cfg['momentum'] == 4e-5
    together = own(*SWITCHES)
    for switch in (erasing, repeated, average):
        key = switch.partition(' ')[0]
        assert together[key] == own(switch)[key]


# The official arguments of timm's scheduler, and the learning rate for the official batch.
OFFICIAL = dict(sched='cosine', warmup_epochs=5, warmup_lr=1e-6, cooldown_epochs=10)
SCHEDULES = {
    **dict.fromkeys(PARAMETERS, (1e-3, dict(num_epochs=300, min_lr=1e-5))),
    **dict.fromkeys(FINER, (5e-6, dict(num_epochs=30, min_lr=5e-6))),
    'gfnet_xs_transfer': (1e-4, dict(num_epochs=1000, min_lr=1e-5)),
}


@pytest.mark.parametrize('name', SCHEDULES)
def test_learning_rate_of_every_epoch_is_that_of_timm(name):
    cfg = load(name)
    base, arguments = SCHEDULES[name]
    # As mmengine scales it, for 8 GPUs.
    lr = cfg.optim_wrapper.optimizer.lr * 8 * cfg.train_dataloader.batch_size
    lr /= cfg.auto_scale_lr.base_batch_size
    assert cfg.auto_scale_lr.enable
    assert lr == pytest.approx(base, rel=1e-12)
    ours, theirs = (torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr) for _ in 'ab')
    oracle, epochs = create_scheduler_v2(theirs, **OFFICIAL, **arguments)
    max_epochs = cfg.train_cfg.max_epochs
    scheduler = PARAM_SCHEDULERS.build(
        dict(cfg.param_scheduler[0]), default_args=dict(optimizer=ours, end=max_epochs)
    )
    # The cooldown is left out where the released loop leaves it out and nothing cools down.
    assert max_epochs == (epochs if name in PARAMETERS else epochs - 10)
    rates = []
    for epoch in range(max_epochs):
        rates.append(ours.param_groups[0]['lr'])
        assert abs(rates[-1] - theirs.param_groups[0]['lr']) < 1e-9, epoch
        ours.step()
        scheduler.step()
        oracle.step(epoch + 1)
    assert rates[0] == 1e-6
    if name in PARAMETERS:
        assert rates[-10:] == [1e-5] * 10 < rates[-11:-10]
    # By hand: the cosine is under way when the warm-up meets it.
    total = arguments['num_epochs']
    floor = arguments['min_lr']
    expected = floor + (lr - floor) * (1 + np.cos(np.pi * 5 / total)) / 2
    assert rates[5] == pytest.approx(expected, rel=1e-12)
    assert rates[3] == pytest.approx(1e-6 + (lr - 1e-6) * 3 / 5, rel=1e-12)


@pytest.mark.parametrize('name', FINETUNING)
def test_finetuning_starts_from_official_weights_and_drops_nothing(name):
    cfg = load(name)
    size = name.split('_')[1]
    assert cfg.model.backbone.arch == size
    assert cfg.model.backbone.init_cfg == dict(type='Pretrained', checkpoint=f'gfnet-{size}')
    assert cfg.model.backbone.drop_path_rate == 0
    assert 8 * cfg.train_dataloader.batch_size == 512
    weight_decay = 1e-4 if name.endswith('transfer') else 1e-8
    assert cfg.optim_wrapper.optimizer.weight_decay == weight_decay
    assert cfg.optim_wrapper.clip_grad == dict(max_norm=1.0)


def test_finetuning_resizes_as_the_official_code(tmp_path, golden):
    """The golden file holds what the official code makes of its weights at another size."""
    fixture = golden('isotropic')
    state = {k[len('state_dict.') :]: v for k, v in fixture.items() if k.startswith('state_dict.')}
    torch.save(dict(model=state), tmp_path / 'official.pth')
    cfg = load('gfnet_xs_imagenet_384')
    cfg.merge_from_dict(
        {
            'model.backbone.arch': dict(_delete_=True, embed_dims=16, depths=2),
            'model.backbone.img_size': 96,
            'model.backbone.num_classes': 10,
            'model.backbone.init_cfg.checkpoint': str(tmp_path / 'official.pth'),
        }
    )
    model = MODELS.build(cfg.model).eval()
    model.init_weights()
    logits = model(fixture['input_96'])
    torch.testing.assert_close(logits, fixture['logits_96'], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ('name', 'variable'),
    [
        ('gfnet_ti_imagenet', 'IMAGENET_ROOT'),
        ('gfnet_xs_imagenet_384', 'IMAGENET_ROOT'),
        ('gfnet_xs_transfer', 'TRANSFER_ROOT'),
        ('gfnet_nano_digits', 'DIGIT_SCANS_ROOT'),
    ],
)
def test_data_roots_can_be_named_in_the_environment(monkeypatch, name, variable):
    monkeypatch.setenv(variable, '/elsewhere')
    cfg = load(name)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.data_root == '/elsewhere'


def test_transfer_takes_any_folder_and_number_of_classes(monkeypatch, tmp_path):
    for place in ('train/cat', 'train/dog', 'train/owl', 'val/cat', 'val/dog', 'val/owl'):
        (tmp_path / place).mkdir(parents=True)
        Image.new('RGB', (40, 30)).save(tmp_path / place / '1.JPEG')
    monkeypatch.setenv('TRANSFER_ROOT', str(tmp_path))
    monkeypatch.setenv('TRANSFER_CLASSES', '3')
    cfg = load('gfnet_xs_transfer')
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        assert DATASETS.build(loader.dataset)[0]['inputs'].shape == (3, 224, 224)
    assert build(cfg).backbone.head.out_features == 3


def test_digits_train_what_the_segmentor_starts_from():
    ours = load('gfnet_nano_digits').model.backbone
    theirs = load('upernet_gfnet_nano_digits').model.backbone
    assert ours.type == theirs.type == GFNetPyramid.__name__
    assert (ours.arch, ours.img_size) == (theirs.arch, theirs.img_size)
