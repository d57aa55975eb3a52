"""Time prediction beside a plain loop over mmseg's `inference_model`, in images per second.

    python tools/benchmark_predict.py upernet_gfnet_nano_digits data/digits/images/validation

Both run the same model, whose weights are random, on the same files, and take turns. The first two
predict only; the other two also write the labels, in ours with a picture of each image.
"""

import argparse
import os
import statistics
from contextlib import redirect_stderr
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image

from gfnet_dense.benchmark import machine, measure, speedup
from gfnet_dense.inference import Predictor, load_model, predict_files
from gfnet_dense.openmmlab import find_config


def build_model(config: str, device: str, folder: Path) -> tuple[Any, Config]:
    """Return the model of a config with random weights, and its config."""
    cfg = Config.fromfile(find_config(config))
    cfg.model.backbone.init_cfg = None
    with MODELS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
        torch.save(registry.build(cfg.model).state_dict(), folder / 'random.pth')
    model, cfg = load_model(cfg, folder / 'random.pth', device)
    return model, cfg


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time prediction beside mmseg's.")
    parser.add_argument('config', help='a segmentor: a path, or the name of one of ours')
    parser.add_argument('images', type=Path, help='folder of images, not searched deeper')
    parser.add_argument('--count', type=int, default=64, help='how many of the images to take')
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--repeats', type=int, default=7, help='turns of each, 2 or more')
    return parser.parse_args()


def main() -> None:
    from mmseg.apis import inference_model

    args = parse_args()
    paths = sorted(map(str, args.images.glob('*.[jJpP][pPnN]*')))[: args.count]
    with TemporaryDirectory() as name:
        folder = Path(name)
        model, cfg = build_model(args.config, args.device, folder)
        predictor = Predictor(model, cfg, batch_size=args.batch)
        model.cfg = cfg.copy()
        model.cfg.test_pipeline = cfg.test_dataloader.dataset.pipeline
        init_default_scope(cfg.default_scope)  # as mmseg's init_model does

        def loop(write: bool) -> None:
            for path in paths:
                labels = inference_model(model, path).pred_sem_seg.data[0].cpu().numpy()
                if write:
                    Image.fromarray(labels.astype('uint8')).save(folder / f'{Path(path).stem}.png')

        def ours() -> None:
            for _ in predictor.predict(iter(paths)):
                pass

        def ours_to_files() -> None:
            with open(os.devnull, 'w') as quiet, redirect_stderr(quiet):
                predict_files(predictor, paths, folder / 'out')

        tasks = {
            "mmseg's loop": lambda: loop(write=False),
            'ours': ours,
            "mmseg's loop, labels written": lambda: loop(write=True),
            'ours, labels and pictures written': ours_to_files,
        }
        times = measure(tasks, args.repeats, 0.0, args.device)
    print(
        f'{machine(args.device)}, {os.cpu_count()} cores; {len(paths)} images, batch {args.batch}'
    )
    print('\n| | images/s | times as fast as the loop: median (quartiles) |\n|---|---|---|')
    names = list(tasks)
    for i, name in enumerate(names):
        rate = len(paths) / statistics.median(times[name])
        print(f'| {name} | {rate:.0f} | {speedup(times, name, names[i // 2 * 2])} |')


if __name__ == '__main__':
    main()
