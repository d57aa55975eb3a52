"""Counts against published numbers, and against sums done by hand."""

import math

import pytest
import torch
from torch import nn

from gfnet_dense.models import GlobalFilter
from gfnet_dense.openmmlab import GFNet, GFNetPyramid, count_macs, measure_complexity

# Parameters and GMACs at 224 x 224, recomputed from the architecture.
CLASSIFIERS = {
    'gfnet_ti': (7_511_784, 1.28),
    'gfnet_xs': (15_985_768, 2.85),
    'gfnet_s': (24_869_608, 4.48),
    'gfnet_b': (43_120_616, 7.92),
    'gfnet_h_ti': (15_085_096, 2.07),
    'gfnet_h_s': (32_162_632, 4.63),
    'gfnet_h_b': (53_744_200, 8.58),
}
# Parameters in millions and GMACs at 1024 x 1024, recomputed from the architecture. The paper
# reports 126, 179 and 261 GMACs, and parameters with an unused classifier.
SEMANTIC_FPN = {
    'fpn_gfnet_h_ti_ade20k': (26.11, 129),
    'fpn_gfnet_h_s_ade20k': (46.70, 184),
    'fpn_gfnet_h_b_ade20k': (73.92, 267),
}
PYRAMID = dict(embed_dims=(4, 8), depths=(1, 2), layer_scale_init_value=1.0)


@pytest.mark.parametrize(
    'name', [pytest.param(n, marks=[pytest.mark.slow] * (n[-2:] != 'ti')) for n in CLASSIFIERS]
)
def test_classifiers(name):
    parameters, gmacs = CLASSIFIERS[name]
    complexity = measure_complexity(name)
    assert complexity.shape == (224, 224)
    assert complexity.parameters.total() == parameters
    assert complexity.macs.total() / 1e9 == pytest.approx(gmacs, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize('name', SEMANTIC_FPN)
def test_semantic_fpn(name):
    parameters, gmacs = SEMANTIC_FPN[name]
    complexity = measure_complexity(name, (1024, 1024))
    assert complexity.parameters.total() / 1e6 == pytest.approx(parameters, abs=5e-3)
    assert complexity.macs.total() / 1e9 == pytest.approx(gmacs, rel=0.03)


def test_what_acts_in_training_only_has_parameters_alone():
    complexity = measure_complexity('upernet_gfnet_nano_digits')
    assert complexity.shape == (64, 64)  # the crops
    assert complexity.parameters['auxiliary_head'] > 0
    assert ('auxiliary_head', 'other') not in complexity.macs
    assert list(complexity.parameters) == [
        *(f'stage {i}' for i in (1, 2, 3, 4)), 'decode_head', 'auxiliary_head'
    ]  # fmt: skip


DETECTORS = {
    'mask-rcnn_r50_fpn': 1,
    'cascade-mask-rcnn_r50_fpn': 3,
    'retinanet_r50_fpn': 0,
}


@pytest.fixture(params=DETECTORS)
def detector(request, tmp_path) -> str:
    path = tmp_path / f'{request.param}.py'
    base = f'mmdet::_base_/models/{request.param}.py'
    path.write_text(f'_base_ = {base!r}\ndefault_scope = "mmdet"\n')
    return str(path)


def test_detectors(detector):
    complexity = measure_complexity(detector)
    assert complexity.shape == (800, 1280)
    macs = {part: n for (part, kind), n in complexity.macs.items() if kind == 'other'}
    stages = next(n for name, n in DETECTORS.items() if f'/{name}.py' in detector)
    # The head of all levels, and the backbone in each.
    cells = sum(math.ceil(800 / s) * math.ceil(1280 / s) for s in (4, 8, 16, 32, 64))
    if stages:
        assert macs['rpn_head'] == cells * (256 * 256 * 9 + 256 * (3 + 12))
        # 1000 proposals through two hidden layers; a cascade regresses one box, not one a class.
        outputs = 81 + (80 * 4 if stages == 1 else 4)
        box = 256 * 49 * 1024 + 1024 * 1024 + 1024 * outputs
        assert macs['roi_head.bbox_head'] == stages * 1000 * box
        # 100 boxes through four 3x3 convolutions on 14x14, up to 28x28, 80 masks each.
        mask = 4 * 196 * 256 * 256 * 9 + 196 * 256 * 256 * 4 + 784 * 256 * 80
        assert macs['roi_head.mask_head'] == stages * 100 * mask
    else:  # what mmdetection's documentation of its get_flops.py shows
        assert complexity.macs.total() / 1e9 == pytest.approx(239.32, rel=0.01)


# By hand


def by_definition(height: int, width: int, channels: int) -> int:
    """Count a filter: two transforms, and the product with half a spectrum."""
    cells = height * width
    return channels * (2 * cells * math.ceil(math.log2(cells)) + 4 * height * (width // 2 + 1))


@pytest.mark.parametrize('size', [(1, 1), (5, 7), (14, 14), (200, 336)])
def test_a_filter(size):
    layer = GlobalFilter(6, (8, 8))
    assert layer.macs((3, *size, 6)) == 3 * by_definition(*size, 6)


@pytest.mark.parametrize('backend', ['auto', 'fft', 'dense'])
@pytest.mark.parametrize('shape', [(32, 32), (40, 52)])
def test_every_part_of_a_pyramid_whatever_the_backend(backend, shape):
    model = GFNetPyramid(PYRAMID, img_size=32, num_classes=3, filter_backend=backend)
    complexity = count_macs(model, shape, 'small')
    (h, w), (h2, w2) = [(math.ceil(shape[0] / s), math.ceil(shape[1] / s)) for s in (4, 8)]
    assert complexity.macs == {
        ('stage 1', 'patch embedding'): h * w * 4 * 3 * 16,
        ('stage 1', 'filters'): by_definition(h, w, 4),
        ('stage 1', 'MLPs'): h * w * 8 * 4 * 4,
        ('stage 2', 'patch embedding'): h2 * w2 * 8 * 4 * 4,
        ('stage 2', 'filters'): 2 * by_definition(h2, w2, 8),
        ('stage 2', 'MLPs'): 2 * h2 * w2 * 8 * 8 * 8,
        ('head', 'other'): 8 * 3,
    }
    parts = {'stage 1': ('pos_embed', '0.'), 'stage 2': ('norm', '1.'), 'head': ('head', 'head')}
    for part, (other, index) in parts.items():
        begins = (other, f'patch_embed.{index}', f'blocks.{index}')
        own = [p.numel() for name, p in model.named_parameters() if name.startswith(begins)]
        assert complexity.parameters[part] == sum(own)
    assert complexity.parameters.total() == sum(p.numel() for p in model.parameters())


def test_an_isotropic_backbone_is_one_stage():
    model = GFNet(dict(embed_dims=8, depths=3), img_size=32, out_indices=(0, 2))
    complexity = count_macs(nn.ModuleDict({'backbone': model}).backbone, (32, 48))
    assert complexity.macs == {
        ('stage 1', 'patch embedding'): 6 * 8 * 3 * 256,
        ('stage 1', 'filters'): 3 * by_definition(2, 3, 8),
        ('stage 1', 'MLPs'): 3 * 6 * 8 * 8 * 8,
    }
    assert list(complexity.parameters) == ['stage 1']


def test_operators_outside_of_layers_count_where_they_run():
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(5, 4, 1)
            self.head = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x).flatten(2)
            return self.head((x @ x.transpose(1, 2)).mean(1))

    complexity = count_macs(Mixer(), (3, 2))
    assert complexity.macs == {
        ('stem', 'other'): 6 * 5 * 4,
        ('elsewhere', 'other'): 6 * 4 * 4,
        ('head', 'other'): 4 * 2,
    }
    assert 'elsewhere' in str(complexity)


def test_a_model_stays_as_it_is():
    model = GFNetPyramid(PYRAMID, img_size=32, frozen_stages=1).train()
    x = torch.randn(1, 3, 40, 40)
    before = [y.clone() for y in model.eval()(x)]
    model.train()
    count_macs(model, (64, 48))
    assert model.training
    assert all(p.device.type == 'cpu' for p in model.parameters())
    assert all(torch.equal(y, z) for y, z in zip(model.eval()(x), before, strict=True))


def test_the_table_adds_up_and_states_its_convention():
    model = GFNetPyramid(PYRAMID, img_size=32, num_classes=3)
    text = str(count_macs(model, (3200, 3200), 'small'))
    heading, _, columns, *rows = text.splitlines()
    assert heading == 'small, an image of 3200 x 3200 pixels (H x W)'
    assert ' '.join(columns.split()) == 'MMACs patch embedding filters MLPs total parameters'
    assert [row.split()[0] for row in rows[:4]] == ['stage', 'stage', 'head', 'total']
    stages = [list(map(float, row.split()[2:6])) for row in rows[:2]]
    total = list(map(float, rows[3].split()[1:5]))
    assert total == pytest.approx([sum(column) for column in zip(*stages, strict=True)], abs=2e-3)
    assert rows[3].split()[5] == f'{sum(p.numel() for p in model.parameters()):,}'
    assert '2 N ceil(log2(N))' in text
    assert 'Not counted: norms' in text


def test_unknown_names_and_shapes_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'no config gfnet_zz.*fpn_gfnet_h_b.*gfnet_h_s'):
        measure_complexity('gfnet_zz')
    with pytest.raises(FileNotFoundError, match='no config'):
        measure_complexity(tmp_path / 'resnet50.py')
    for shape in ((0, 224), (224,)):
        with pytest.raises(ValueError, match='positive'):
            measure_complexity('gfnet_ti', shape)
