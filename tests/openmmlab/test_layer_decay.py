import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

from gfnet_dense.openmmlab import GFNet, GFNetPyramid
from gfnet_dense.openmmlab.layer_decay import layer_ids


class Segmentor(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.decode_head = nn.Conv2d(8, 2, 1)


@pytest.fixture
def pyramid() -> Segmentor:
    arch = dict(embed_dims=(4, 8), depths=(2, 4), layer_scale_init_value=1.0)
    return Segmentor(GFNetPyramid(arch, img_size=16))


def test_every_block_is_a_layer_by_default(pyramid):
    layers = layer_ids(pyramid)
    assert layers['backbone.pos_embed'] == layers['backbone.patch_embed.0.proj.weight'] == 0
    blocks = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (1, 3)]
    for layer, (stage, i) in enumerate(blocks, start=1):
        own = {v for k, v in layers.items() if k.startswith(f'backbone.blocks.{stage}.{i}.')}
        assert own == {layer}
    # A downsampling goes with the block that follows it.
    assert layers['backbone.patch_embed.1.proj.weight'] == 3
    # What dense prediction adds learns at the full rate.
    for key in ('backbone.norm0.weight', 'backbone.norm1.bias', 'decode_head.weight'):
        assert layers[key] == 7


def test_blocks_are_divided_evenly(pyramid):
    layers = layer_ids(pyramid, num_layers=3)
    of_blocks = [
        layers[f'backbone.blocks.{stage}.{i}.gamma']
        for stage, i in [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (1, 3)]
    ]
    assert of_blocks == [1, 1, 2, 2, 3, 3]
    assert layers['decode_head.bias'] == 4


def test_more_than_ten_stages_or_blocks_are_in_numerical_order():
    model = Segmentor(GFNet(dict(embed_dims=4, depths=12), img_size=32))
    layers = layer_ids(model)
    assert [layers[f'backbone.blocks.{i}.norm1.weight'] for i in range(12)] == list(range(1, 13))
    assert layers['backbone.patch_embed.proj.weight'] == 0


def test_learning_rates_and_weight_decay_of_the_groups(pyramid):
    pyramid.backbone.blocks[0][0].requires_grad_(False)
    cfg = dict(
        type='OptimWrapper',
        optimizer=dict(type='AdamW', lr=0.1, weight_decay=0.05),
        constructor='LayerDecayOptimWrapperConstructor',
        paramwise_cfg=dict(decay_rate=0.5, num_layers=6),
    )
    groups = build_optim_wrapper(pyramid, cfg).optimizer.param_groups
    found = {id(p): (g['lr'], g['weight_decay']) for g in groups for p in g['params']}
    trained = {k: p for k, p in pyramid.named_parameters() if p.requires_grad}
    assert set(found) == {id(p) for p in trained.values()}

    def of(key):
        return found[id(trained[key])]

    assert of('backbone.pos_embed') == pytest.approx((0.1 * 0.5**7, 0))
    assert of('backbone.blocks.0.1.filter.complex_weight') == pytest.approx((0.1 * 0.5**5, 0.05))
    assert of('backbone.blocks.1.3.gamma') == pytest.approx((0.1 * 0.5, 0))
    assert of('backbone.blocks.1.3.mlp.fc1.weight') == pytest.approx((0.1 * 0.5, 0.05))
    assert of('decode_head.weight') == pytest.approx((0.1, 0.05))
    assert of('decode_head.bias') == pytest.approx((0.1, 0))


@pytest.mark.parametrize(
    ('paramwise_cfg', 'message'),
    [
        (dict(decay_rat=0.9), 'decay_rat'),
        (dict(decay_rate=1.5), '1.5'),
        (dict(decay_rate=0.0), '0.0'),
        (dict(num_layers=7), '7 and 6 blocks'),
    ],
)
def test_errors_name_the_value(pyramid, paramwise_cfg, message):
    cfg = dict(
        optimizer=dict(type='AdamW', lr=0.1, weight_decay=0.05),
        constructor='LayerDecayOptimWrapperConstructor',
        paramwise_cfg=paramwise_cfg,
    )
    with pytest.raises(ValueError, match=message):
        build_optim_wrapper(pyramid, cfg)


def test_other_backbones_are_refused():
    with pytest.raises(ValueError, match='GFNet'):
        layer_ids(Segmentor(nn.Linear(2, 2)))


def test_without_paramwise_cfg_weight_decay_still_spares_norms(pyramid):
    cfg = dict(
        optimizer=dict(type='AdamW', lr=0.1, weight_decay=0.05),
        constructor='LayerDecayOptimWrapperConstructor',
    )
    groups = build_optim_wrapper(pyramid, cfg).optimizer.param_groups
    spared = {id(p) for g in groups for p in g['params'] if g['weight_decay'] == 0}
    assert id(pyramid.backbone.norm1.weight) in spared
    assert id(pyramid.backbone.patch_embed[0].proj.weight) not in spared
    assert isinstance(groups[0]['params'][0], torch.Tensor)
