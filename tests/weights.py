"""Weights and files of weights that tests of several folders share."""

import argparse
import io
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from gfnet_dense.models.gfnet import HIERARCHICAL, ISOTROPIC

PYRAMID = {'embed_dims': (4, 6, 8, 10), 'depths': (1, 2, 1, 1), 'layer_scale_init_value': 0.5}
PATCHES = {'embed_dims': 8, 'depths': 3}


def randomized(model: nn.Module) -> nn.Module:
    """Give every parameter values of its own, norms too, so that none can be mistaken."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2 + 0.5)
    return model.eval()


def official_content(model: nn.Module) -> dict:
    """Return what the authors' training script saves."""
    return {
        'model': model.state_dict(),
        'optimizer': torch.optim.AdamW(model.parameters()).state_dict(),
        'lr_scheduler': {'t_initial': 300, 'base_values': [1e-3]},
        'epoch': 3,
        'scaler': {'scale': 65536.0, '_growth_tracker': 7},
        'args': argparse.Namespace(arch='gfnet-h-ti', lr=5e-4, data_path='.', output_dir=''),
    }


def saved(content: object, folder: Path, **arguments) -> Path:
    path = folder / 'weights.pth'
    torch.save(content, path, **arguments)
    return path


def assert_equal_states(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


def file_of(content: object, **arguments) -> bytes:
    """Return the bytes of a file of `torch.save`."""
    file = io.BytesIO()
    torch.save(content, file, **arguments)
    return file.getvalue()


def on_meta(name: str, **arguments) -> nn.Module:
    """Make a timm model without memory for its parameters."""
    with torch.device('meta'):
        return timm.create_model(name, **arguments).eval()


def narrow(name: str, **arguments) -> nn.Module:
    """Make a model of the depths of a published one and a sixteenth of its channels."""
    return timm.create_model(name, **{'arch': narrow_arch(name), 'img_size': 32, **arguments})


def narrow_arch(name: str) -> dict:
    """Return the architecture of :func:`narrow`."""
    size = name.split('.')[0].removeprefix('gfnet_').replace('_', '-')
    spec = (HIERARCHICAL | ISOTROPIC)[size]
    scale = None if spec.layer_scale_init_value is None else 0.5
    return dict(
        embed_dims=[dim // 16 for dim in spec.embed_dims],
        depths=spec.depths,
        patch_size=spec.patch_size,
        layer_scale_init_value=scale,
    )


def is_hierarchical(name: str) -> bool:
    """Tell whether a timm name is of a hierarchical network."""
    return name.startswith('gfnet_h_')


def from_file(path: Path, **arguments) -> dict:
    """Return the arguments that make timm load a file as pretrained weights."""
    return dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **arguments)
