"""The detection configs build, inherit what they should, and say what their recipes say."""

import copy
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS, init_default_scope

from gfnet_dense.demo import CLASSES, PALETTE

CONFIGS = Path(__file__).parents[2] / 'configs'
# Whole detectors of 80 classes, filters and position embedding on the 224 grid.
PARAMETERS = {
    'retinanet_gfnet_h_ti_coco': 24_806_452,
    'retinanet_gfnet_h_s_coco': 42_332_884,
    'retinanet_gfnet_h_b_coco': 63_914_452,
    'mask_rcnn_gfnet_h_ti_coco': 34_724_016,
    'mask_rcnn_gfnet_h_s_coco': 51_668_880,
    'mask_rcnn_gfnet_h_b_coco': 73_250_448,
    'cascade_mask_rcnn_gfnet_h_ti_coco': 72_559_218,
    'cascade_mask_rcnn_gfnet_h_s_coco': 89_504_082,
    'cascade_mask_rcnn_gfnet_h_b_coco': 111_085_650,
}
COCO = sorted(PARAMETERS)
SMALL = [name for name in COCO if '_s_' in name]
DIGITS = ['mask_rcnn_gfnet_nano_digits', 'retinanet_gfnet_nano_digits']


def load(name: str) -> Config:
    return copy.deepcopy(_read(name))


@functools.cache
def _read(name: str) -> Config:
    return Config.fromfile(CONFIGS / f'{name}.py')


def build(cfg: Config, device: str = 'meta') -> torch.nn.Module:
    import mmdet.models  # noqa: F401
    from mmdet.registry import MODELS

    init_default_scope('mmdet')
    cfg = cfg.copy()
    cfg.model.backbone.init_cfg = None
    with torch.device(device):
        return MODELS.build(cfg.model)


def kind(name: str) -> str:
    return name.partition('_gfnet')[0]


def size(name: str) -> str:
    return name.split('_')[-2]


def test_the_list_of_configs():
    detection = {p.stem for p in CONFIGS.glob('*.py') if 'mmdet_runtime' in p.read_text()}
    assert detection == {*COCO, *DIGITS}


@pytest.mark.parametrize('name', COCO)
def test_parameters(name):
    model = build(load(name))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    # Stage 1 has a norm where its map is used, and only there.
    assert hasattr(model.backbone, 'norm0') == (kind(name) != 'retinanet')
    assert model.backbone.grid == (56, 56)


@pytest.mark.parametrize('name', COCO)
def test_size_weights_and_drop_path(name):
    backbone = load(name).model.backbone
    assert backbone.arch == f'h-{size(name)}'
    assert backbone.init_cfg == dict(type='Pretrained', checkpoint=f'gfnet-h-{size(name)}')
    rates = dict(ti=0.2, s=0.3, b=0.4) if 'cascade' in name else dict(ti=0.1, s=0.2, b=0.3)
    assert backbone.drop_path_rate == rates[size(name)]


@pytest.mark.parametrize('name', SMALL)
def test_weight_decay_spares_norms_biases_layer_scale_and_position_embedding(name):
    cfg = load(name)
    model = build(cfg)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    decay = {id(p): group['weight_decay'] for group in groups for p in group['params']}
    assert len(decay) == len(list(model.parameters()))
    for key, param in model.named_parameters():
        spared = param.ndim == 1 or key == 'backbone.pos_embed'
        assert decay[id(param)] == (0 if spared else cfg.optim_wrapper.optimizer.weight_decay), key
    assert {group['lr'] for group in groups} == {2e-4 if kind(name) == 'mask_rcnn' else 1e-4}
    assert cfg.optim_wrapper.optimizer.weight_decay == (0.05 if 'cascade' in name else 1e-4)
    assert cfg.optim_wrapper.optimizer.type == 'AdamW'


@pytest.mark.parametrize('name', SMALL)
def test_schedule(name):
    """Warm-up over 500 iterations, then steps by 10 at two thirds and at the last epochs."""
    cfg = load(name)
    epochs, steps = (36, (27, 33)) if 'cascade' in name else (12, (8, 11))
    assert (cfg.train_cfg.type, cfg.train_cfg.max_epochs) == ('EpochBasedTrainLoop', epochs)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedulers = [
        PARAM_SCHEDULERS.build(dict(s), default_args=dict(optimizer=optimizer))
        for s in cfg.param_scheduler
    ]
    iterations = 1000  # an epoch of that many
    rates = []
    for _ in range(epochs):
        for _ in range(iterations):
            rates.append(optimizer.param_groups[0]['lr'])
            optimizer.step()
            for scheduler in schedulers:
                if not scheduler.by_epoch:
                    scheduler.step()
        for scheduler in schedulers:
            if scheduler.by_epoch:
                scheduler.step()
    assert rates[0] == pytest.approx(1e-3)
    assert rates[250] == pytest.approx(0.5, abs=2e-3)
    assert rates[499:501] == pytest.approx([1.0, 1.0])
    assert rates[steps[0] * iterations - 1 :][:2] == pytest.approx([1.0, 0.1])
    assert rates[steps[1] * iterations - 1 :][:2] == pytest.approx([0.1, 0.01])


@pytest.mark.parametrize('name', COCO)
def test_eight_gpus_give_the_batch_of_the_recipe(name):
    cfg = load(name)
    assert 8 * cfg.train_dataloader.batch_size == 16 == cfg.auto_scale_lr.base_batch_size


@pytest.mark.parametrize('name', COCO)
def test_the_data_root_can_be_named_in_the_environment(monkeypatch, name):
    def places(cfg: Config) -> set[str]:
        loaders = (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader)
        return {loader.dataset.data_root for loader in loaders} | {
            evaluator.ann_file.removesuffix('/annotations/instances_val2017.json')
            for evaluator in (cfg.val_evaluator, cfg.test_evaluator)
        }

    path = CONFIGS / f'{name}.py'
    monkeypatch.delenv('COCO_ROOT', raising=False)
    assert places(Config.fromfile(path)) == {'data/coco'}
    monkeypatch.setenv('COCO_ROOT', '/elsewhere')
    assert places(Config.fromfile(path)) == {'/elsewhere'}


def test_cascade_trains_at_many_scales():
    import mmdet.datasets.transforms  # noqa: F401
    from mmengine.registry import TRANSFORMS

    init_default_scope('mmdet')
    steps = load('cascade_mask_rcnn_gfnet_h_s_coco').train_dataloader.dataset.pipeline
    whole, cropped = next(step for step in steps if step.type == 'RandomChoice').transforms
    # Swin's list.
    sides = [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]
    assert [tuple(scale) for scale in whole[0].scales] == [(side, 1333) for side in sides]
    assert cropped[-1] == whole[0]
    for step in (*whole, *cropped):
        TRANSFORMS.build(step)


@pytest.mark.parametrize('name', COCO)
def test_boxes_can_be_averaged_over_scales_and_flips_and_masks_cannot(name):
    import mmdet.datasets.transforms  # noqa: F401
    from mmengine.dataset import Compose

    cfg = load(name)
    assert ('tta_model' in cfg) == ('tta_pipeline' in cfg) == (kind(name) == 'retinanet')
    if kind(name) != 'retinanet':
        return
    init_default_scope('mmdet')
    image = dict(img=np.zeros((48, 64, 3), np.uint8), img_id=0, img_path='', ori_shape=(48, 64))
    views = Compose(cfg.tta_pipeline[1:])(dict(image, img_shape=(48, 64)))
    shapes = {(tuple(s.img_shape), s.flip) for s in views['data_samples']}
    sizes = [(800, 1067), (400, 533), (1200, 1600)]
    assert shapes == {(size, flip) for size in sizes for flip in (False, True)}


@pytest.mark.parametrize('name', [*COCO, *DIGITS])
def test_masks_are_loaded_and_evaluated_where_a_head_predicts_them(name):
    cfg = load(name)
    masks = 'mask_head' in cfg.model.get('roi_head', {})
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        (step,) = (t for t in loader.dataset.pipeline if t.type == 'LoadAnnotations')
        assert step.get('with_mask', False) == masks
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        assert as_list(evaluator.metric) == (['bbox', 'segm'] if masks else ['bbox'])


@pytest.mark.parametrize('name', COCO)
def test_classes_are_those_of_coco_and_of_the_heads(name):
    from mmdet.datasets import CocoDataset

    cfg = load(name)
    assert cfg.train_dataloader.dataset.type == 'CocoDataset'
    heads = cfg.model.bbox_head if kind(name) == 'retinanet' else cfg.model.roi_head.bbox_head
    for head in as_list(heads):
        assert head.num_classes == len(CocoDataset.METAINFO['classes']) == 80


@pytest.mark.parametrize('name', DIGITS)
def test_digits_have_their_classes_and_colours(name):
    cfg = load(name)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert tuple(loader.dataset.metainfo.classes) == CLASSES[1:]
        assert tuple(map(tuple, loader.dataset.metainfo.palette)) == PALETTE[1:]


# A forward pass of each kind, on real tensors and one of the small backbones.


def shrink(cfg: Config) -> Config:
    """Give the detector few channels and proposals; its structure stays."""
    dims = (8, 16, 24, 32)
    model = cfg.model
    model.backbone.update(
        arch=dict(embed_dims=dims, depths=(1, 1, 1, 1)), drop_path_rate=0.0, init_cfg=None
    )
    model.neck.update(in_channels=list(dims[-len(model.neck.in_channels) :]), out_channels=16)
    narrow = dict(in_channels=16, feat_channels=16)
    if 'roi_head' not in model:
        model.bbox_head.update(narrow)
        return cfg
    model.rpn_head.update(narrow)
    model.roi_head.bbox_roi_extractor.out_channels = 16
    model.roi_head.mask_roi_extractor.out_channels = 16
    model.roi_head.mask_head.update(in_channels=16, conv_out_channels=16)
    for head in as_list(model.roi_head.bbox_head):
        head.update(in_channels=16, fc_out_channels=16)
        if 'norm_cfg' in head:
            head.conv_out_channels = 16
    for stage in as_list(model.train_cfg.rcnn):
        stage.sampler.num = 16
    model.train_cfg.rpn_proposal.max_per_img = model.test_cfg.rpn.max_per_img = 32
    return cfg


def as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def samples(sizes: list[tuple[int, int]], pad: tuple[int, int], boxes: list[int]) -> list:
    """Return annotated samples as a pipeline packs them, of `boxes[i]` objects each."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    result = []
    for (height, width), count in zip(sizes, boxes, strict=True):
        sample = DetDataSample(
            metainfo=dict(
                img_shape=(height, width),
                ori_shape=(height, width),
                pad_shape=pad,
                batch_input_shape=pad,
                scale_factor=(1.0, 1.0),
            )
        )
        corners = torch.tensor([[8.0, 8.0, 40.0, 30.0], [20.0, 10.0, 60.0, 50.0]])[:count]
        masks = torch.zeros(count, *pad, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, corners.int(), strict=True):
            mask[y1:y2, x1:x2] = 1
        sample.gt_instances = InstanceData(
            bboxes=corners, labels=torch.arange(count), masks=BitmapMasks(masks.numpy(), *pad)
        )
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4))
        result.append(sample)
    return result


@pytest.mark.parametrize('name', SMALL)
def test_every_parameter_receives_a_gradient(name):
    # One that no loss reaches stays as it was initialised, and several processes stop at it.
    model = build(shrink(load(name)), 'cpu').train()
    pad = (64, 96)
    losses = model.loss(torch.randn(2, 3, *pad), samples([(64, 90), (50, 96)], pad, [2, 1]))
    total, _ = model.parse_losses(losses)
    total.backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []
    assert [key for key, p in model.backbone.named_parameters() if not p.grad.any()] == []


@pytest.mark.parametrize('name', SMALL)
def test_batches_of_any_size_in_one_run(name):
    model = build(shrink(load(name)), 'cpu').train()
    for pad, boxes in (((64, 96), [2, 0]), ((96, 64), [0, 0]), ((32, 128), [1, 2])):
        inner = (pad[0] - 5, pad[1])
        losses = model.loss(torch.randn(2, 3, *pad), samples([pad, inner], pad, boxes))
        total, _ = model.parse_losses(losses)
        assert total.isfinite()
    model.eval()
    with torch.no_grad():
        found = model.predict(torch.randn(1, 3, 64, 96), samples([(64, 96)], (64, 96), [0]))
    assert found[0].pred_instances.bboxes.shape[1] == 4


@pytest.mark.parametrize('name', SMALL)
def test_inference_needs_no_data_and_no_pretrained_weights(name, monkeypatch, tmp_path):
    from mmdet.apis import inference_detector, init_detector

    monkeypatch.chdir(tmp_path)
    cfg = shrink(load(name))
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint='gfnet-h-s')
    cfg.test_dataloader.dataset.pipeline[1].scale = (128, 96)
    model = init_detector(cfg, device='cpu')
    assert len(model.dataset_meta['classes']) == len(model.dataset_meta['palette']) == 80
    found = inference_detector(model, np.zeros((48, 60, 3), np.uint8)).pred_instances
    assert (found.bboxes <= torch.tensor([60, 48, 60, 48])).all()
