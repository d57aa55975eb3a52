"""Checkpoints of the small models of the digits, with random weights, and random images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS

from gfnet_dense.openmmlab import find_config

SEGMENTOR = 'upernet_gfnet_nano_digits'
DETECTOR = 'retinanet_gfnet_nano_digits'
INSTANCE_SEGMENTOR = 'mask_rcnn_gfnet_nano_digits'
CLASSIFIER = 'gfnet_nano_digits'
SIZES = [(64, 64), (48, 80), (64, 64), (75, 61), (48, 80), (64, 64)]


def random_checkpoint(name: str, folder: Path) -> Path:
    """Write weights for the model of a config, of which a detector finds many objects."""
    cfg = Config.fromfile(find_config(name))
    torch.manual_seed(0)
    with MODELS.switch_scope_and_registry(cfg.default_scope) as registry:
        model = registry.build(cfg.model)
    if name == DETECTOR:
        torch.nn.init.normal_(model.bbox_head.retina_cls.weight, std=0.1)
    path = folder / f'{name}.pth'
    torch.save({'state_dict': model.state_dict(), 'meta': {}}, path)
    return path


def random_images(sizes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """Return RGB images of squares in random colours."""
    generator = np.random.default_rng(0)
    coarse = [generator.integers(0, 256, (1 + h // 16, 1 + w // 16, 3)) for h, w in sizes]
    fine = [np.kron(c, np.ones((16, 16, 1))).astype(np.uint8) for c in coarse]
    return [f[:h, :w] for f, (h, w) in zip(fine, sizes, strict=True)]
