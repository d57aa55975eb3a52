"""Time the data checks on a large data set that is made up for it.

    python tools/benchmark_checks.py ade20k --images 20000
    python tools/benchmark_checks.py coco --images 118000 --boxes 860000

It prints how long it takes to build the data set, as each run does, to check it, and to check it
again with the verdict remembered. The images are hard links to eight files, and so in memory: the
time to read them from a disk comes on top.
"""

import argparse
import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.registry import init_default_scope
from PIL import Image

from gfnet_dense.data import check_data
from gfnet_dense.data.build import build_dataset
from gfnet_dense.openmmlab import find_config

FILES = 8  # different images, and label maps


def link(folder: Path, suffix: str, count: int, save: Callable[[Path], object]) -> None:
    """Fill a folder with files that are links to a few."""
    folder.mkdir(parents=True)
    for i in range(count):
        path = folder / f'{i:012}{suffix}'
        if i < FILES:
            save(path)
        else:
            os.link(folder / f'{i % FILES:012}{suffix}', path)


def photograph(
    rng: np.random.Generator, size: tuple[int, int], noise: float = 0.0
) -> Callable[[Path], object]:
    def save(path: Path) -> None:
        colours = rng.integers(0, 256, (size[1] // 16, size[0] // 16, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC))
        noisy = smooth + rng.normal(0, noise, smooth.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=85)

    return save


def write_ade20k(root: Path, images: int) -> None:
    """Write images of ADE20K's usual size, and label maps of its 150 classes."""
    rng, size = np.random.default_rng(0), (683, 512)

    def save_labels(path: Path) -> None:
        labels = Image.fromarray(rng.integers(0, 151, (16, 21), dtype=np.uint8))
        labels.resize(size, Image.Resampling.NEAREST).save(path)

    link(root / 'images/training', '.jpg', images, photograph(rng, size, noise=4.0))
    link(root / 'annotations/training', '.png', images, save_labels)


def write_coco(root: Path, images: int, boxes: int, classes: tuple[str, ...]) -> None:
    """Write images of COCO's usual size, and boxes with a polygon of 20 points each."""
    rng, size = np.random.default_rng(0), (640, 480)
    link(root / 'train2017', '.jpg', images, photograph(rng, size))
    corners = rng.integers(0, 300, (boxes, 2))
    sides = rng.integers(5, 150, (boxes, 2))
    angles = np.linspace(0, 2 * np.pi, 20, endpoint=False)
    circle = 0.5 + 0.5 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    annotations: list[dict[str, Any]] = []
    owners, labels = rng.integers(0, images, boxes), rng.integers(1, len(classes) + 1, boxes)
    for i, (corner, side) in enumerate(zip(corners, sides, strict=True)):
        annotations.append(
            dict(
                id=i + 1, image_id=int(owners[i]), category_id=int(labels[i]), iscrowd=0,
                bbox=[*corner.tolist(), *side.tolist()], area=int(side.prod()),
                segmentation=[(corner + side * circle).round(2).ravel().tolist()],
            )
        )  # fmt: skip
    names = [f'{i:012}.jpg' for i in range(images)]
    content = dict(
        images=[dict(id=i, file_name=n, width=640, height=480) for i, n in enumerate(names)],
        categories=[dict(id=i, name=name) for i, name in enumerate(classes, 1)],
        annotations=annotations,
    )
    (root / 'annotations').mkdir()
    (root / 'annotations/instances_train2017.json').write_text(json.dumps(content))


def make_config(name: str, root: Path, images: int, boxes: int) -> Config:
    """Write the data, and return the config of their training alone."""
    known = dict(ade20k='fpn_gfnet_h_s_ade20k', coco='mask_rcnn_gfnet_h_s_coco')
    cfg = Config.fromfile(find_config(known[name]))
    cfg.train_dataloader.dataset.data_root = str(root)
    for key in ('model', 'val_dataloader', 'val_evaluator', 'test_dataloader', 'test_evaluator'):
        cfg.pop(key, None)
    init_default_scope(cfg.default_scope)
    if name == 'ade20k':
        write_ade20k(root, images)
    else:
        from mmdet.datasets import CocoDataset

        write_coco(root, images, boxes, CocoDataset.METAINFO['classes'])
    return cfg


def measure(text: str, function: Callable[[], Any]) -> Any:
    """Call a function, and print its time and the most memory that was used until its end."""
    start, processor = time.perf_counter(), time.process_time()
    result = function()
    seconds, busy = time.perf_counter() - start, time.process_time() - processor
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f'{text:<28} {seconds:7.1f} s, {busy:7.1f} s of processors, peak {peak:.1f} GiB', flush=True
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description='Time the data checks on a large data set.')
    parser.add_argument('name', choices=('ade20k', 'coco'), help='like which data set')
    parser.add_argument('--images', type=int, default=20_000)
    parser.add_argument('--boxes', type=int, default=140_000, help='of coco')
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        os.environ['XDG_CACHE_HOME'] = str(Path(folder, 'cache'))
        cfg = make_config(args.name, Path(folder, 'data'), args.images, args.boxes)
        file = next(Path(folder).rglob('*.jpg'))
        print(f'{args.images} images of {file.stat().st_size // 1000} KB')
        measure('building', lambda: build_dataset(cfg.train_dataloader.dataset))
        for text in ('building and check', 'building and verdict'):
            (report,) = measure(text, lambda: check_data(cfg))
        print(report)


if __name__ == '__main__':
    main()
