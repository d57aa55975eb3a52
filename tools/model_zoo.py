"""Write the model zoo, configs/README.md and the metafiles: `python tools/model_zoo.py [--check]`.

Parameters and multiply-accumulates are counted in the configs. Accuracies carry their source, and
where there is none it says so.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from gfnet_dense.engine import measure_complexity
from gfnet_dense.hub import ADDRESSES, OFFICIAL_WEIGHTS

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / 'configs'
PAPER = 'Global Filter Networks for Image Classification'
URL = 'https://arxiv.org/abs/2107.00645'
REPORTED = 'reported in arXiv 2107.00645'
NOT_PUBLISHED = 'not published for GFNet'

SIZES = ('ti', 'xs', 's', 'b', 'h_ti', 'h_s', 'h_b')
# Families in the order of the page. `shape` is that of the image that multiply-accumulates are
# counted for, where it is not the one that tools/get_flops.py takes.
FAMILIES: dict[str, dict[str, Any]] = {
    'GFNet': dict(
        configs='gfnet_{}_imagenet',
        task='Image Classification',
        data='ImageNet-1k',
        metrics=('Top 1 Accuracy', 'Top 5 Accuracy'),
        recipe='300 epochs, batch 1024, AdamW: the official recipe',
    ),
    'GFNet at 384': dict(
        configs='gfnet_{}_imagenet_384',
        task='Image Classification',
        data='ImageNet-1k',
        metrics=('Top 1 Accuracy',),
        recipe='30 epochs of finetuning, batch 512',
    ),
    'Semantic FPN': dict(
        configs='fpn_gfnet_{}_ade20k',
        task='Semantic Segmentation',
        data='ADE20K',
        metrics=('mIoU',),
        shape=(1024, 1024),
        recipe="80k iterations, batch 16: the paper's recipe",
    ),
    'UperNet': dict(
        configs='upernet_gfnet_{}_ade20k',
        task='Semantic Segmentation',
        data='ADE20K',
        metrics=('mIoU',),
        shape=(1024, 1024),
        recipe='160k iterations, batch 16: that of ConvNeXt and HorNet',
    ),
    'RetinaNet': dict(
        configs='retinanet_gfnet_{}_coco',
        task='Object Detection',
        data='COCO',
        metrics=('box AP',),
        recipe='12 epochs, batch 16',
    ),
    'Mask R-CNN': dict(
        configs='mask_rcnn_gfnet_{}_coco',
        task='Instance Segmentation',
        data='COCO',
        metrics=('box AP', 'mask AP'),
        recipe='12 epochs, batch 16',
    ),
    'Cascade Mask R-CNN': dict(
        configs='cascade_mask_rcnn_gfnet_{}_coco',
        task='Instance Segmentation',
        data='COCO',
        metrics=('box AP', 'mask AP'),
        recipe='36 epochs, batch 16, several scales',
    ),
}
# What the paper reports, in the order of the metrics of the family.
ACCURACIES = {
    'gfnet_ti_imagenet': (74.6, 92.2),
    'gfnet_xs_imagenet': (78.6, 94.2),
    'gfnet_s_imagenet': (80.0, 94.9),
    'gfnet_b_imagenet': (80.7, 95.1),
    'gfnet_h_ti_imagenet': (80.1, 95.1),
    'gfnet_h_s_imagenet': (81.5, 95.6),
    'gfnet_h_b_imagenet': (82.9, 96.2),
    'gfnet_xs_imagenet_384': (80.6,),
    'gfnet_s_imagenet_384': (81.7,),
    'gfnet_b_imagenet_384': (82.1,),
    'fpn_gfnet_h_ti_ade20k': (41.0,),
    'fpn_gfnet_h_s_ade20k': (42.5,),
    'fpn_gfnet_h_b_ade20k': (44.8,),
}

OTHERS = """\
## Transfer

[gfnet_xs_transfer](gfnet_xs_transfer.py) finetunes GFNet-XS on any image folder. Reported
for GFNet-XS, not measured here: 98.6 on CIFAR-10, 89.1 on CIFAR-100, 98.1 on Flowers-102, 92.8 on
Stanford Cars.

## The embedded digits

Very small networks that show that an installation works. They are no evidence about the data sets
above. Write the data with `python tools/make_digits.py`, for classification with `--scans`, and
train with `python tools/train.py CONFIG --seed 0`. Held-out digits, the last checkpoint:

| config | metric | measured here | without training |
|---|---|---|---|
| [classifier](gfnet_nano_digits.py) | top-1 | 94.5 | 10, of ten classes |
| [UperNet](upernet_gfnet_nano_digits.py) | mIoU | 74.7 | 7.6, always background |
| [Mask R-CNN](mask_rcnn_gfnet_nano_digits.py) | box AP / mask AP | 72.3 / 80.2 | 0.0 |
| [RetinaNet](retinanet_gfnet_nano_digits.py) | box AP | 21.4 | not measured |

Two CPU cores took 2 minutes for the first; the detectors took 15 and 17 on cores that much other
work shared, 8 and 7 of them computing. UperNet and the detectors were measured before random
numbers were tied to the place in the run, so that repeating them gives slightly other figures.
"""


def names(family: str) -> list[str]:
    """Return the configs of a family."""
    candidates = (FAMILIES[family]['configs'].format(size) for size in SIZES)
    return [name for name in candidates if (CONFIGS / f'{name}.py').exists()]


def model(family: str, name: str) -> dict[str, Any]:
    """Return the entry of a config in its metafile."""
    about = FAMILIES[family]
    counted = measure_complexity(CONFIGS / f'{name}.py', about.get('shape'))
    entry: dict[str, Any] = dict(Name=name)
    entry['In Collection'] = family
    entry['Config'] = f'configs/{name}.py'
    entry['Metadata'] = {
        'Training Data': about['data'],
        'Parameters': counted.parameters.total(),
        'FLOPs': counted.macs.total(),
        'Image Size': list(counted.shape),
    }
    result: dict[str, Any] = dict(Task=about['task'], Dataset=about['data'])
    if name in ACCURACIES:
        result['Metrics'] = dict(zip(about['metrics'], ACCURACIES[name], strict=True))
        result['Source'] = f'{REPORTED}, not measured here'
    else:
        result['Source'] = f'{NOT_PUBLISHED}, not measured here'
    entry['Results'] = [result]
    weights = f'gfnet-{name.removeprefix("gfnet_").removesuffix("_imagenet").replace("_", "-")}'
    if weights in OFFICIAL_WEIGHTS:
        entry['Weights'] = ADDRESSES[0].format(OFFICIAL_WEIGHTS[weights][0])
    return entry


def metafile(family: str, models: list[dict[str, Any]]) -> str:
    """Return the metafile of a family."""
    about = FAMILIES[family]
    collection = {
        'Name': family,
        'License': 'Apache License 2.0',
        'Metadata': {'Training Data': [about['data']], 'Architecture': ['GFNet', family]},
        'Paper': {'Title': PAPER, 'URL': URL},
        'README': 'configs/README.md',
    }
    text = yaml.safe_dump(dict(Collections=[collection], Models=models), sort_keys=False, width=100)
    return (
        '# Written by tools/model_zoo.py. FLOPs are multiply-accumulates, the filters included.\n'
        + text
    )


def section(family: str, models: list[dict[str, Any]]) -> list[str]:
    """Return the section of a family on the page."""
    about = FAMILIES[family]
    height, width = models[0]['Metadata']['Image Size']
    metrics = ' / '.join(about['metrics'])
    lines = [
        f'## {family}, {about["data"]}',
        '',
        f'{about["recipe"][0].upper()}{about["recipe"][1:]}.',
        '',
        f'| config | parameters | GMACs, {height}x{width} | {metrics}, reported | measured here |',
        '|---|---|---|---|---|',
    ]
    for entry in models:
        data, (result,) = entry['Metadata'], entry['Results']
        reported = ' / '.join(map(str, result.get('Metrics', {}).values())) or NOT_PUBLISHED
        lines.append(
            f'| [{entry["Name"]}]({entry["Name"]}.py) | {data["Parameters"] / 1e6:.2f}M '
            f'| {data["FLOPs"] / 1e9:.2f} | {reported} | not measured here |'
        )
    return [*lines, '']


def files() -> dict[Path, str]:
    """Return path and content of everything that is written."""
    page = [
        '# Model zoo',
        '',
        'Written by `python tools/model_zoo.py`, which counts parameters and multiply-accumulates',
        '(MACs) in the configs, as `tools/get_flops.py` does. Accuracies are those that the paper',
        f'reports ([arXiv 2107.00645]({URL})), of its own training; nothing on this page but the',
        'last table was trained here. Nobody has published GFNet on COCO.',
        '',
    ]
    written, index = {}, []
    for family in FAMILIES:
        models = [model(family, name) for name in names(family)]
        page += section(family, models)
        path = CONFIGS / 'metafiles' / f'{family.lower().replace(" ", "_")}.yml'
        written[path] = metafile(family, models)
        index.append(str(path.relative_to(ROOT)))
    page.append(OTHERS)
    written[CONFIGS / 'README.md'] = '\n'.join(page)
    written[ROOT / 'model-index.yml'] = yaml.safe_dump(dict(Import=index))
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description='Write the model zoo.')
    parser.add_argument('--check', action='store_true', help='only say what differs')
    check = parser.parse_args().check
    different = 0
    for path, text in files().items():
        if not path.exists() or path.read_text() != text:
            different += 1
            print(f'{"differs" if check else "written"}: {path.relative_to(ROOT)}')
            if not check:
                path.parent.mkdir(exist_ok=True)
                path.write_text(text)
    return int(check and different > 0)


if __name__ == '__main__':
    sys.exit(main())
