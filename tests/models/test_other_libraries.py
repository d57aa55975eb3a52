"""Libraries that take the networks from timm, each as its own documentation shows it."""

from collections import OrderedDict

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from torchvision.ops import FeaturePyramidNetwork

import gfnet_dense

assert gfnet_dense  # registers the models
ARCH = dict(embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1))
IMAGES = torch.zeros(2, 3, 64, 96)


@pytest.mark.parametrize('decoder', [smp.Unet, smp.FPN, smp.UPerNet])
def test_segmentation_models_pytorch(decoder):
    model = decoder('tu-gfnet_h_ti', encoder_weights=None, classes=5, arch=ARCH)
    logits = model(IMAGES)
    assert logits.shape == (2, 5, 64, 96)
    logits.sum().backward()
    assert model.encoder.model.model.blocks[3][0].filter.complex_weight.grad is not None


def test_a_decoder_that_needs_dilation_is_refused_with_the_alternatives():
    with pytest.raises(ValueError, match=r'gfnet_h_ti has an output stride of 32.*UPerNet'):
        smp.DeepLabV3Plus('tu-gfnet_h_ti', encoder_weights=None)
    assert timm.create_model('gfnet_h_ti', arch=ARCH, output_stride=32).num_features == 32


def test_torchvision_feature_pyramid():
    backbone = timm.create_model('gfnet_h_ti', features_only=True, arch=ARCH)
    pyramid = FeaturePyramidNetwork(backbone.feature_info.channels(), 12)
    maps = OrderedDict((str(i), y) for i, y in enumerate(backbone(IMAGES)))
    sizes = [tuple(y.shape) for y in pyramid(maps).values()]
    assert sizes == [(2, 12, 16, 24), (2, 12, 8, 12), (2, 12, 4, 6), (2, 12, 2, 3)]
