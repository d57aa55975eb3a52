"""Every config of a segmentor builds, and says what its recipe says."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS, init_default_scope

from gfnet_dense.demo import CLASSES

CONFIGS = Path(__file__).parents[2] / 'configs'
EXPECTED = {
    'fpn_gfnet_h_b_ade20k',
    'fpn_gfnet_h_s_ade20k',
    'fpn_gfnet_h_ti_ade20k',
    'upernet_gfnet_h_b_ade20k',
    'upernet_gfnet_h_s_ade20k',
    'upernet_gfnet_h_ti_ade20k',
    'upernet_gfnet_nano_digits',
}
ADE20K = sorted(name for name in EXPECTED if name.endswith('ade20k'))
# Semantic FPN recomputed from the architecture, with filters and position embedding on the 512
# grid: the paper reports 26.6, 47.5 and 74.7, which still count a 1000-way head.
PARAMETERS = {
    'fpn_gfnet_h_ti_ade20k': 26.11e6,
    'fpn_gfnet_h_s_ade20k': 46.70e6,
    'fpn_gfnet_h_b_ade20k': 73.92e6,
    'upernet_gfnet_h_ti_ade20k': 52.17e6,
    'upernet_gfnet_h_s_ade20k': 74.75e6,
    'upernet_gfnet_h_b_ade20k': 101.97e6,
}


def load(name: str) -> Config:
    return Config.fromfile(CONFIGS / f'{name}.py')


def build(cfg: Config, device: str = 'meta') -> torch.nn.Module:
    """Build the segmentor, by default without memory for its parameters."""
    import mmseg.models  # noqa: F401
    from mmseg.registry import MODELS

    init_default_scope('mmseg')
    cfg = cfg.copy()
    cfg.model.backbone.init_cfg = None
    with torch.device(device):
        return MODELS.build(cfg.model)


def test_the_list_of_configs():
    """Those of classification, `gfnet_*`, and of detection have lists of their own."""
    others = {path for path in CONFIGS.glob('*.py') if 'mmdet_runtime' in path.read_text()}
    others |= set(CONFIGS.glob('gfnet_*.py'))
    assert {path.stem for path in set(CONFIGS.glob('*.py')) - others} == EXPECTED


def bases(path: Path) -> list[str]:
    return Config._get_base_files(str(path))


def depth(path: Path) -> int:
    """Count the levels of inheritance; mmdetection's base files inherit from nothing."""
    below = [
        1 if base.startswith('mmdet::') else depth((path.parent / base).resolve())
        for base in bases(path)
    ]
    return 1 + max(below, default=0)


def registrations(path: Path) -> int:
    """Count the files of a chain that import the package."""
    own = [(path.parent / base).resolve() for base in bases(path) if '::' not in base]
    return ('custom_imports' in path.read_text()) + sum(map(registrations, own))


@pytest.mark.parametrize('path', sorted(CONFIGS.glob('*.py')), ids=lambda path: path.stem)
def test_leaves_inherit_from_bases_over_three_levels_at_most_and_import_the_package_once(path):
    assert all('_base_/' in base for base in bases(path))
    assert depth(path) <= 3
    assert registrations(path) == 1


def test_every_base_is_used():
    """A base file that no config inherits is dead."""
    used, todo = set(), sorted(CONFIGS.glob('*.py'))
    while todo:
        path = todo.pop()
        used.add(path)
        own = [(path.parent / base).resolve() for base in bases(path) if '::' not in base]
        todo += [base for base in own if base not in used]
    assert set((CONFIGS / '_base_').rglob('*.py')) <= used


def test_the_nano_configs_share_one_backbone():
    paths = sorted(CONFIGS.glob('*_nano_*.py'))
    backbones = [Config.fromfile(path).model.backbone.to_dict() for path in paths]
    assert len(paths) == 4
    for backbone in backbones:
        assert backbone['arch'] == backbones[0]['arch']
        assert backbone['img_size'] == 64


# The fast lane takes the smallest networks.
slow_names = pytest.mark.parametrize(
    'name',
    [pytest.param(n, marks=[pytest.mark.slow] * ('_h_ti_' not in n)) for n in sorted(EXPECTED)],
)


@slow_names
def test_segmentor_builds_and_its_channels_agree(name):
    cfg = load(name)
    size = cfg.model.data_preprocessor.size
    # The parameters are on the grid of the crops.
    assert (cfg.model.backbone.img_size,) * 2 == tuple(size)
    model = build(cfg, 'cpu').eval()
    with torch.no_grad():
        maps = model.backbone(torch.zeros(1, 3, 64, 96))
        logits = model.decode_head(model.neck(maps) if model.with_neck else maps)
        if model.with_auxiliary_head:
            assert model.auxiliary_head(maps).shape[1] == model.decode_head.num_classes
    assert [m.shape[-2:] for m in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert logits.shape == (1, len(class_names(cfg)), 16, 24)


def class_names(cfg: Config) -> tuple[str, ...]:
    from mmseg.datasets import ADE20KDataset

    dataset = cfg.train_dataloader.dataset
    return ADE20KDataset.METAINFO['classes'] if 'ADE' in dataset.type else dataset.metainfo.classes


@pytest.mark.parametrize('name', ADE20K)
def test_parameters_are_those_of_the_docs(name):
    model = build(load(name))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(PARAMETERS[name], abs=5e3)
    page = (CONFIGS / 'README.md').read_text()
    row = next(line for line in page.splitlines() if f'({name}.py)' in line)
    assert f'{PARAMETERS[name] / 1e6:.2f}M' in row


def test_classes_of_the_digits_are_those_of_the_data():
    assert tuple(class_names(load('upernet_gfnet_nano_digits'))) == CLASSES


@pytest.mark.parametrize('name', ADE20K)
def test_weights_are_named_in_one_place(name):
    size = name.split('_')[3]
    text = (CONFIGS / f'{name}.py').read_text()
    assert text.count('checkpoint=') == 1
    assert load(name).model.backbone.init_cfg == dict(
        type='Pretrained', checkpoint=f'gfnet-h-{size}'
    )
    assert load(name).model.backbone.arch == f'h-{size}'


@pytest.mark.parametrize('name', sorted(EXPECTED))
def test_weight_decay_spares_norms_biases_layer_scale_and_position_embedding(name):
    cfg = load(name)
    model = build(cfg)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    decay = {id(p): g['weight_decay'] for g in optimizer.param_groups for p in g['params']}
    assert len(decay) == len(list(model.parameters()))
    norms = (torch.nn.LayerNorm, torch.nn.modules.batchnorm._BatchNorm)
    of_norms = {id(p) for m in model.modules() if isinstance(m, norms) for p in m.parameters()}
    for key, param in model.named_parameters():
        spared = (
            id(param) in of_norms
            or key.rpartition('.')[2] in ('bias', 'gamma')
            or key == 'backbone.pos_embed'
        )
        assert decay[id(param)] == (0 if spared else cfg.optim_wrapper.optimizer.weight_decay), key


@pytest.mark.parametrize('name', ADE20K)
def test_learning_rates_of_the_recipe(name):
    cfg = load(name)
    model = build(cfg)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    rate = {id(p): g['lr'] for g in optimizer.param_groups for p in g['params']}
    assert rate[id(next(model.decode_head.parameters()))] == pytest.approx(1e-4)
    if name.startswith('fpn'):
        assert set(rate.values()) == {1e-4}
    else:
        layers = 12 if '_h_b_' in name else 6
        assert rate[id(model.backbone.pos_embed)] == pytest.approx(1e-4 * 0.9 ** (layers + 1))
        assert rate[id(model.backbone.blocks[-1][-1].gamma)] == pytest.approx(1e-4 * 0.9)


def learning_rates(cfg: Config, at: list[int]) -> list[float]:
    """Run the schedulers as mmengine does and return the learning rate of some iterations."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    init_default_scope('mmseg')
    schedulers = [
        PARAM_SCHEDULERS.build(dict(s), default_args=dict(optimizer=optimizer))
        for s in cfg.param_scheduler
    ]
    rates = []
    for iteration in range(cfg.train_cfg.max_iters):
        if iteration in at:
            rates.append(optimizer.param_groups[0]['lr'])
        for scheduler in schedulers:
            scheduler.step()
    return rates


def test_schedule_of_semantic_fpn_is_poly_without_warm_up():
    cfg = load('fpn_gfnet_h_s_ade20k')
    assert cfg.train_cfg.max_iters == 80_000
    at = [0, 20_000, 40_000, 79_999]
    # mmengine's poly is at its end with the last iteration, not one after it.
    expected = [1e-4 * (1 - i / 79_999) ** 0.9 for i in at]
    assert learning_rates(cfg, at) == pytest.approx(expected, rel=1e-9)


def test_schedule_of_upernet_warms_up_and_falls_linearly():
    cfg = load('upernet_gfnet_h_s_ade20k')
    assert cfg.train_cfg.max_iters == 160_000
    first, half_way, peak, middle, last = learning_rates(cfg, [0, 750, 1500, 80_750, 159_999])
    assert first == pytest.approx(1e-10)
    assert half_way == pytest.approx(0.5e-4, rel=2e-3)
    assert peak == pytest.approx(1e-4)
    assert middle == pytest.approx(0.5e-4, rel=1e-4)
    assert last == 0


@pytest.mark.parametrize('name', ADE20K)
def test_eight_gpus_give_the_batch_of_the_recipe(name):
    cfg = load(name)
    assert 8 * cfg.train_dataloader.batch_size == 16 == cfg.auto_scale_lr.base_batch_size


def test_data_roots_can_be_named_in_the_environment(monkeypatch):
    assert load('fpn_gfnet_h_s_ade20k').data_root == 'data/ade/ADEChallengeData2016'
    monkeypatch.setenv('ADE20K_ROOT', '/elsewhere')
    cfg = load('fpn_gfnet_h_s_ade20k')
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.data_root == '/elsewhere'


def test_semantic_fpn_tests_whole_images_with_sides_of_multiples_of_32(tmp_path):
    import cv2
    import numpy as np
    from mmengine.dataset import Compose

    init_default_scope('mmseg')
    for kind, expected in (('fpn', (512, 704)), ('upernet', (512, 692))):
        cfg = load(f'{kind}_gfnet_h_s_ade20k')
        cv2.imwrite(str(tmp_path / 'image.jpg'), np.zeros((301, 407, 3), np.uint8))
        steps = [step for step in cfg.test_pipeline if step.type != 'LoadAnnotations']
        packed = Compose(steps)(dict(img_path=str(tmp_path / 'image.jpg'), reduce_zero_label=True))
        # The shorter side is 512; the longer, 692.3, is rounded and in Semantic FPN aligned.
        assert packed['inputs'].shape[1:] == torch.Size(expected)
        assert cfg.model.test_cfg.mode == 'whole'
