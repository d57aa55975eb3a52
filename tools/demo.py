"""Train and evaluate a small segmentor on the embedded digits, on a CPU: `make demo`.

Write the embedded data set, train a small UperNet with GFNet on it, print the mIoU on held-out
scenes next to a baseline that always predicts the most frequent class, and draw a picture. Data
and a finished training are used again; an interrupted training is resumed.
"""

import argparse
from pathlib import Path

import numpy as np
from mmengine.config import Config
from PIL import Image

from gfnet_dense import load
from gfnet_dense.demo import CLASSES, PALETTE, label_grid, write_digits
from gfnet_dense.openmmlab import evaluate, find_config, train

CONFIG = 'upernet_gfnet_nano_digits'
PICTURED = 8  # validation scenes in the picture, an even number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data-root', type=Path, default=Path('data/digits'))
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/demo'))
    parser.add_argument('--iterations', type=int, help='iterations to train')
    args = parser.parse_args()

    print(f'[1/4] data: scenes of handwritten digits on photographs in {args.data_root}')
    write_digits(args.data_root)

    config = Config.fromfile(find_config(CONFIG))
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.dataset.data_root = str(args.data_root)
    config.work_dir = str(args.work_dir)
    if args.iterations:
        config.train_cfg.max_iters = args.iterations
    checkpoint = args.work_dir / f'iter_{config.train_cfg.max_iters}.pth'
    if checkpoint.is_file():
        print(f'[2/4] training: done before; remove {args.work_dir} to train again')
    else:
        print(
            f'[2/4] training: {config.train_cfg.max_iters} iterations; the log estimates the time'
        )
        begun = (args.work_dir / 'last_checkpoint').exists()
        train(config, seed=0, resume='auto' if begun else None)

    print('[3/4] evaluation on held-out scenes')
    miou = evaluate(config, checkpoint)['mIoU']
    frequent, baseline = constant_miou(args.data_root)

    print('[4/4] picture')
    picture = draw(config, checkpoint, args.data_root, args.work_dir / 'demo.png')
    logs = sorted(args.work_dir.glob('*/*.log'), key=lambda path: path.stat().st_size)

    print(
        f'\nmIoU over {len(CLASSES)} classes on held-out scenes\n'
        f'  {"GFNet":<30} {miou:5.1f} %\n'
        f'  {"baseline, always " + repr(frequent):<30} {baseline:5.1f} %\n'
        f'checkpoint  {checkpoint}\n'
        f'log         {logs[-1]}\n'
        f'picture     {picture}: image, ground truth and prediction side by side'
    )


def read_labels(data_root: Path, subset: str) -> list[np.ndarray]:
    """Return the label maps of a subset: class indices, and 255 for pixels without a label."""
    paths = sorted((data_root / 'annotations' / subset).glob('*.png'))
    # As with mmseg's reduce_zero_label, 0 means no label and wraps around to 255.
    return [np.asarray(Image.open(path)) - np.uint8(1) for path in paths]


def constant_miou(data_root: Path) -> tuple[str, float]:
    """Return the most frequent class of training, and the mIoU in % of always predicting it."""
    training = np.concatenate([label.ravel() for label in read_labels(data_root, 'training')])
    frequent = int(np.bincount(training[training != 255]).argmax())
    validation = np.concatenate([label.ravel() for label in read_labels(data_root, 'validation')])
    # All other classes have no intersection.
    iou = np.mean(validation[validation != 255] == frequent)
    return CLASSES[frequent], 100 * iou / len(CLASSES)


def draw(config: Config, checkpoint: Path, data_root: Path, path: Path) -> Path:
    """Draw the first validation scenes with ground truth and prediction."""
    images = sorted((data_root / 'images' / 'validation').glob('*.jpg'))[:PICTURED]
    labels = read_labels(data_root, 'validation')[:PICTURED]
    results = load(config, checkpoint).predict(images)
    rows = [
        (result.image, label, result.labels) for result, label in zip(results, labels, strict=True)
    ]
    # Each row of the picture has two scenes, so that it fits a screen.
    rows = [left + right for left, right in zip(rows[::2], rows[1::2], strict=True)]
    titles = ('image', 'truth', 'prediction') * 2
    return label_grid(rows, path, titles=titles, classes=CLASSES, palette=PALETTE)


if __name__ == '__main__':
    main()
