"""See GFNet learn to segment, on a CPU, without a download: `make demo`.

Writes the embedded data set, trains a small UperNet on it, and evaluates on held-out scenes.
What is there already, data or a finished or interrupted training, is used.
"""

import argparse
from pathlib import Path

import numpy as np
from mmengine.config import Config
from PIL import Image

from gfnet_dense.demo import CLASSES, PALETTE, label_grid, write_digits
from gfnet_dense.openmmlab import evaluate, find_config, train
from gfnet_dense.serialization import plain_types

CONFIG = 'upernet_gfnet_nano_digits'
PICTURED = 8  # validation scenes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data-root', type=Path, default=Path('data/digits'))
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/demo'))
    parser.add_argument('--iterations', type=int, help='how long to train')
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
        print(f'[2/4] training: done before; to train again, remove {args.work_dir}')
    else:
        print(f'[2/4] training: {config.train_cfg.max_iters} iterations, some minutes; see eta')
        begun = (args.work_dir / 'last_checkpoint').exists()
        train(config, seed=0, resume='auto' if begun else None)

    print('[3/4] evaluation on scenes of digits and photographs that training never saw')
    miou = evaluate(config, checkpoint)['mIoU']
    frequent, baseline = constant_miou(args.data_root)

    print('[4/4] a picture')
    picture = draw(config, checkpoint, args.data_root, args.work_dir / 'demo.png')
    logs = sorted(args.work_dir.glob('*/*.log'), key=lambda path: path.stat().st_size)

    print(
        f'\nmIoU over {len(CLASSES)} classes on held-out scenes\n'
        f'  GFNet                     {miou:5.1f} %\n'
        f'  {"always " + repr(frequent):<25} {baseline:5.1f} %\n'
        f'checkpoint  {checkpoint}\n'
        f'log         {logs[-1]}\n'
        f'picture     {picture}: image, truth and prediction side by side'
    )


def read_labels(data_root: Path, subset: str) -> list[np.ndarray]:
    """Return the label maps of a subset: class indices, 255 where nothing is labelled."""
    paths = sorted((data_root / 'annotations' / subset).glob('*.png'))
    # As mmseg's reduce_zero_label: 0 is no label, and wraps around to 255.
    return [np.asarray(Image.open(path)) - np.uint8(1) for path in paths]


def constant_miou(data_root: Path) -> tuple[str, float]:
    """Return the class most frequent in training, and the mIoU in % of always answering it."""
    training = np.concatenate([label.ravel() for label in read_labels(data_root, 'training')])
    frequent = int(np.bincount(training[training != 255]).argmax())
    validation = np.concatenate([label.ravel() for label in read_labels(data_root, 'validation')])
    # Only the class that is answered has an intersection.
    iou = np.mean(validation[validation != 255] == frequent)
    return CLASSES[frequent], 100 * iou / len(CLASSES)


def draw(config: Config, checkpoint: Path, data_root: Path, path: Path) -> Path:
    """Draw the first validation scenes with truth and prediction."""
    from mmseg.apis import inference_model, init_model

    with plain_types():
        model = init_model(config.copy(), str(checkpoint), device='cpu')
    images = sorted((data_root / 'images' / 'validation').glob('*.jpg'))[:PICTURED]
    results = inference_model(model, [str(image) for image in images])
    rows = [
        (np.asarray(Image.open(image)), label, result.pred_sem_seg.data[0].numpy())
        for image, label, result in zip(
            images, read_labels(data_root, 'validation')[:PICTURED], results, strict=True
        )
    ]
    # Two scenes in a row, so that the picture fits a screen.
    rows = [left + right for left, right in zip(rows[::2], rows[1::2], strict=True)]
    titles = ('image', 'truth', 'prediction') * 2
    return label_grid(rows, path, titles=titles, classes=CLASSES, palette=PALETTE)


if __name__ == '__main__':
    main()
