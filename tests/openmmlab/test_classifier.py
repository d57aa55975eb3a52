import argparse
import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import load_state_dict
from mmengine.structures import BaseDataElement
from torchvision.transforms import v2

from gfnet_dense.openmmlab import ClassificationPreprocessor, GFNetPyramid, ImageClassifier

ISOTROPIC = dict(type='GFNet', arch=dict(embed_dims=16, depths=2), img_size=32, num_classes=5)
PYRAMID = dict(
    type='GFNetPyramid',
    arch=dict(embed_dims=(8, 16, 24, 32), depths=(1, 1, 2, 1), layer_scale_init_value=1.0),
    img_size=32,
    num_classes=5,
)
NORM = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
MIXUP = dict(mixup_alpha=0.8, cutmix_alpha=1.0, switch_prob=0.5)


def classifier(backbone=PYRAMID, label_smoothing=0.1, **preprocessor) -> ImageClassifier:
    preprocessor = dict(type='ClassificationPreprocessor', **{**NORM, **preprocessor})
    return MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=backbone,
            data_preprocessor=preprocessor,
            label_smoothing=label_smoothing,
        )
    )


def batch(labels=(0, 1, 2, 4), size=32) -> dict:
    images = torch.randint(256, (len(labels), 3, size, size), dtype=torch.uint8)
    samples = [
        BaseDataElement(gt_label=label, metainfo=dict(img_path=f'{i}.JPEG'))
        for i, label in enumerate(labels)
    ]
    return dict(inputs=images, data_samples=samples)


# The network.


@pytest.mark.parametrize('backbone', [ISOTROPIC, PYRAMID], ids=lambda b: b['type'])
def test_all_weights_are_those_of_the_backbone(backbone):
    model = classifier(backbone)
    assert isinstance(model, BaseModel)
    assert set(model.state_dict()) == {f'backbone.{key}' for key in model.backbone.state_dict()}


def test_modes_agree():
    model = classifier().eval()
    data = model.data_preprocessor(batch())
    logits = model(data['inputs'])
    assert torch.equal(logits, model.backbone(data['inputs']))
    samples = model(data['inputs'], data['data_samples'], mode='predict')
    for sample, row, label in zip(samples, logits, (0, 1, 2, 4), strict=True):
        torch.testing.assert_close(sample.pred_score, row.exp() / row.exp().sum())
        assert sample.pred_label == row.argmax()
        assert sample.gt_label == label
        assert sample.img_path.endswith('.JPEG')
    unknown = model(data['inputs'], mode='predict')
    assert [sample.pred_label for sample in unknown] == [sample.pred_label for sample in samples]
    with pytest.raises(ValueError, match="'loss', but got 'losses'"):
        model(data['inputs'], mode='losses')


def test_a_dumped_prediction_is_as_large_as_itself():
    model = classifier().eval()
    one = model(torch.zeros(1, 3, 32, 32), mode='predict')[0]
    of_many = model(torch.zeros(64, 3, 32, 32), mode='predict')[0]
    assert len(pickle.dumps(of_many.to_dict())) == len(pickle.dumps(one.to_dict()))


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_losses_are_cross_entropies(smoothing):
    model = classifier(label_smoothing=smoothing).eval()
    data = model.data_preprocessor(batch())
    logits = model(data['inputs'])
    hard = model(**data, mode='loss')['loss']
    expected = F.cross_entropy(logits, torch.tensor([0, 1, 2, 4]), label_smoothing=smoothing)
    torch.testing.assert_close(hard, expected)
    targets = torch.rand(4, 5).softmax(dim=1)
    soft = model(data['inputs'], targets=targets, mode='loss')['loss']
    torch.testing.assert_close(soft, F.cross_entropy(logits, targets))


@pytest.mark.parametrize('mixup', [None, MIXUP])
def test_loss_is_computed_in_single_precision_where_the_network_is_not(mixup):
    model = classifier(mixup=mixup).eval()
    with torch.autocast('cpu', torch.bfloat16):
        data = model.data_preprocessor(batch(), training=True)
        loss = model(**data, mode='loss')['loss']
        assert model(data['inputs']).dtype == torch.bfloat16
    assert data['inputs'].dtype == loss.dtype == torch.float32
    torch.testing.assert_close(loss, model(**data, mode='loss')['loss'], rtol=0.02, atol=0)


def test_a_backbone_without_head_is_refused():
    with pytest.raises(ValueError, match='num_classes'):
        classifier({**PYRAMID, 'num_classes': 0})


def test_training_steps_lower_the_loss():
    from mmengine.optim import OptimWrapper

    model = classifier(mixup=MIXUP)
    optimizer = OptimWrapper(torch.optim.AdamW(model.parameters(), lr=1e-2))
    data = batch()
    losses = [model.train_step(data, optimizer)['loss'].item() for _ in range(10)]
    model.data_preprocessor.mixup = None
    losses += [model.train_step(data, optimizer)['loss'].item() for _ in range(10)]
    assert losses[-1] < 0.6 < 1.2 < losses[0]


# What a batch goes through.


def test_images_are_normalised_as_torchvision_does():
    data = batch()
    out = classifier(mixup=MIXUP).data_preprocessor(copy.deepcopy(data))
    normalise = v2.Normalize([m / 255 for m in NORM['mean']], [s / 255 for s in NORM['std']])
    expected = normalise(data['inputs'].double() / 255).float()
    torch.testing.assert_close(out['inputs'], expected, rtol=1e-5, atol=1e-5)
    assert out['targets'].tolist() == [0, 1, 2, 4]


def weight_of_own(targets: torch.Tensor, labels: list[int], smoothing: float) -> torch.Tensor:
    """Solve targets for the share that the image itself has, given the labels of both images."""
    own, other = (F.one_hot(torch.tensor(x), 5) for x in (labels, labels[::-1]))
    off = smoothing / 5
    own, other = (x * (1 - smoothing) + off for x in (own, other))
    return ((targets - other) * (own - other)).sum(1) / ((own - other) ** 2).sum(1)


def test_mixup_mixes_images_and_targets_in_the_same_proportion():
    preprocessor = classifier(mixup=dict(mixup_alpha=0.8)).data_preprocessor
    data = batch()
    plain = preprocessor(data)['inputs']
    shares = set()
    for _ in range(4):
        out = preprocessor(data, training=True)
        share = weight_of_own(out['targets'], [0, 1, 2, 4], 0.1)
        assert share.max() - share.min() < 1e-5
        expected = share[0] * plain + (1 - share[0]) * plain.flip(0)
        torch.testing.assert_close(out['inputs'], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out['targets'].sum(1), torch.ones(4))
        shares.add(round(share[0].item(), 3))
    assert len(shares) == 4


def test_cutmix_pastes_what_the_targets_say():
    preprocessor = classifier(mixup=dict(mixup_alpha=0.0, cutmix_alpha=1.0)).data_preprocessor
    data = batch()
    plain = preprocessor(data)['inputs']
    for _ in range(4):
        out = preprocessor(data, training=True)
        own = (out['inputs'] == plain).all(dim=1)
        assert (own | (out['inputs'] == plain.flip(0)).all(dim=1)).all()
        share = weight_of_own(out['targets'], [0, 1, 2, 4], 0.1)
        torch.testing.assert_close(own.float().mean(dim=(1, 2)), share, rtol=0, atol=2e-3)


def test_erasing_happens_in_training_alone_and_before_mixing():
    erasing = dict(probability=1.0, mode='const')
    preprocessor = classifier(random_erasing=erasing).data_preprocessor
    data = batch()
    plain = preprocessor(data)['inputs']
    erased = preprocessor(data, training=True)['inputs']
    gone = (erased == 0).all(dim=1)
    assert (gone | (erased == plain).all(dim=1)).all()
    assert all(0.01 < share < 0.4 for share in gone.float().mean(dim=(1, 2)))

    halves = classifier(random_erasing=erasing, mixup=dict(mixup_alpha=1e6)).data_preprocessor
    mixed = halves(data, training=True)['inputs']
    # Half and half, so that both images of a pair become the same one, unless they are erased then.
    torch.testing.assert_close(mixed, mixed.flip(0), rtol=0, atol=0.05)


def test_images_without_labels_are_normalised():
    out = classifier(mixup=MIXUP).data_preprocessor(dict(inputs=[torch.zeros(3, 8, 8)] * 2))
    assert out['inputs'].shape == (2, 3, 8, 8)
    assert 'targets' not in out


def test_errors_of_a_batch_name_what_is_wrong():
    preprocessor = classifier(mixup=MIXUP).data_preprocessor
    with pytest.raises(ValueError, match=r'but there are 3: set an even batch_size'):
        preprocessor(batch(labels=(0, 1, 2)), training=True)
    preprocessor(batch(labels=(0, 1, 2)))
    with pytest.raises(ValueError, match=r'label 5 of 1\.JPEG is none of the 5 classes'):
        preprocessor(batch(labels=(4, 5)))
    with pytest.raises(ValueError, match=r'label -1 of 0\.JPEG'):
        ClassificationPreprocessor(5)(batch(labels=(-1, 2)), training=True)


# Checkpoints.


def test_official_files_are_taken_as_they_are(golden):
    """Logits of the official code, through mmengine's strict loading of an official file."""
    fixture = golden('hierarchical')
    state = {
        key.removeprefix('state_dict.'): value
        for key, value in fixture.items()
        if key.startswith('state_dict.')
    }
    arch = dict(embed_dims=(8, 16, 24, 32), depths=(1, 1, 2, 1), layer_scale_init_value=1e-5)
    backbone = dict(type='GFNetPyramid', arch=arch, img_size=64, num_classes=10)
    official = dict(model=state, epoch=299, args=argparse.Namespace(lr=1e-3))
    for content in (official, state):
        model = classifier(backbone).eval()
        load_state_dict(model, content, strict=True)
        logits = model(fixture['input'])
        torch.testing.assert_close(logits, fixture['logits'], rtol=1e-5, atol=1e-5)


def test_weights_of_the_network_and_of_the_classifier_load_alike():
    source = classifier()
    for state in (source.state_dict(), source.backbone.state_dict()):
        model = classifier()
        model.load_state_dict(state)
        for key, value in source.state_dict().items():
            assert torch.equal(model.state_dict()[key], value), key
    wrapper = torch.nn.ModuleDict({'module': classifier()})
    wrapper.load_state_dict({f'module.{k}': v for k, v in source.backbone.state_dict().items()})
    assert torch.equal(wrapper['module'].backbone.pos_embed, source.backbone.pos_embed)
    with pytest.raises(RuntimeError, match=r'backbone\.stem'):
        model.load_state_dict({**source.backbone.state_dict(), 'stem': torch.zeros(1)})


def test_checkpoints_are_what_dense_backbones_take(tmp_path):
    source = classifier()
    torch.save(dict(state_dict=source.state_dict(), meta=dict(epoch=1)), tmp_path / 'a.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'a.pth'))
    backbone = GFNetPyramid(PYRAMID['arch'], img_size=32, init_cfg=init_cfg)
    backbone.init_weights()
    expected = source.backbone.state_dict()
    for key, value in backbone.state_dict().items():
        if not key.startswith(('norm0', 'norm1.', 'norm2')):
            key = key.replace('norm3', 'norm') if key.startswith('norm3') else key
            assert torch.equal(value, expected[key]), key
    head = classifier({**PYRAMID, 'init_cfg': init_cfg})
    head.init_weights()
    for key, value in head.backbone.state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_a_timm_model_takes_a_checkpoint_and_gives_it_back(tmp_path):
    source = classifier().eval()
    file = str(tmp_path / 'a.pth')
    torch.save(dict(state_dict=source.state_dict(), meta=dict(epoch=1)), file)
    model = timm.create_model(
        'gfnet_h_ti',
        arch=PYRAMID['arch'],
        img_size=32,
        num_classes=5,
        pretrained=True,
        pretrained_cfg_overlay=dict(file=file, num_classes=5),
    ).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), source(x))
    again = classifier().eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), source(x))
