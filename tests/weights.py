"""Weights and files of weights that tests of several folders share."""

import argparse
import io
from pathlib import Path

import torch
from torch import Tensor, nn

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
