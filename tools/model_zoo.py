"""Write the model zoo, configs/README.md and the metafiles: `python tools/model_zoo.py [--check]`.

Parameters and multiply-accumulates are counted in the configs. Every accuracy has its source, or
the command that measured it here. Where there is none, the page says so.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from gfnet_dense.models.hub import ADDRESSES, OFFICIAL_WEIGHTS
from gfnet_dense.openmmlab import measure_complexity

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / 'configs'
PAPER = 'Global Filter Networks for Image Classification'
URL = 'https://arxiv.org/abs/2107.00645'
REPORTED = 'reported in arXiv 2107.00645'
NOT_PUBLISHED = 'not published for GFNet'
NOT_MEASURED = 'not measured here'

SIZES = ('ti', 'xs', 's', 'b', 'h_ti', 'h_s', 'h_b')
METRICS = {
    'Image Classification': ('Top 1 Accuracy',),
    'Semantic Segmentation': ('mIoU',),
    'Object Detection': ('box AP',),
    'Instance Segmentation': ('box AP', 'mask AP'),
}
# Families in the order of the page. `shape` is the image size for which multiply-accumulates are
# counted, if it is not the default of tools/get_flops.py. `published` is what is known besides
# REPORTED_ACCURACIES, and `metrics` replaces those of the task.
FAMILIES: dict[str, dict[str, Any]] = {
    'GFNet': dict(
        configs='gfnet_{}_imagenet',
        task='Image Classification',
        data='ImageNet-1k',
        metrics=('Top 1 Accuracy', 'Top 5 Accuracy'),
        recipe='300 epochs, batch 1024, AdamW, mixed precision (`--amp`): the official recipe',
    ),
    'GFNet at 384': dict(
        configs='gfnet_{}_imagenet_384',
        task='Image Classification',
        data='ImageNet-1k',
        recipe='30 epochs of finetuning, batch 512, mixed precision (`--amp`)',
    ),
    'Transfer': dict(
        configs='gfnet_{}_transfer',
        task='Image Classification',
        data='any image folder',
        published='98.6 on CIFAR-10, 89.1 on CIFAR-100, 98.1 on Flowers-102, 92.8 on Stanford Cars',
        recipe='1000 epochs of finetuning, batch 512; counted with the classes of Flowers-102',
    ),
    'Semantic FPN': dict(
        configs='fpn_gfnet_{}_ade20k',
        task='Semantic Segmentation',
        data='ADE20K',
        shape=(1024, 1024),
        recipe="80k iterations, batch 16: the paper's recipe",
    ),
    'UperNet': dict(
        configs='upernet_gfnet_{}_ade20k',
        task='Semantic Segmentation',
        data='ADE20K',
        shape=(1024, 1024),
        published='54.3 in the abstract of TPAMI 45(9), without model or schedule',
        recipe='160k iterations, batch 16: that of ConvNeXt and HorNet',
    ),
    'RetinaNet': dict(
        configs='retinanet_gfnet_{}_coco',
        task='Object Detection',
        data='COCO',
        recipe='12 epochs, batch 16',
    ),
    'Mask R-CNN': dict(
        configs='mask_rcnn_gfnet_{}_coco',
        task='Instance Segmentation',
        data='COCO',
        recipe='12 epochs, batch 16',
    ),
    'Cascade Mask R-CNN': dict(
        configs='cascade_mask_rcnn_gfnet_{}_coco',
        task='Instance Segmentation',
        data='COCO',
        recipe='36 epochs, batch 16, several scales',
    ),
    'Nano GFNet': dict(
        configs='gfnet_nano_digits',
        task='Image Classification',
        data='digits',
        recipe='6 epochs, batch 32',
    ),
    'Nano UperNet': dict(
        configs='upernet_gfnet_nano_digits',
        task='Semantic Segmentation',
        data='digits',
        shape=(64, 64),
        recipe='600 iterations, batch 32',
    ),
    'Nano RetinaNet': dict(
        configs='retinanet_gfnet_nano_digits',
        task='Object Detection',
        data='digits',
        shape=(64, 64),
        recipe='5 epochs, batch 16',
    ),
    'Nano Mask R-CNN': dict(
        configs='mask_rcnn_gfnet_nano_digits',
        task='Instance Segmentation',
        data='digits',
        shape=(64, 64),
        recipe='3 epochs, batch 16',
    ),
}
# Accuracies that the paper reports, in the order of the metrics of the family.
REPORTED_ACCURACIES = {
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
# Accuracies that were measured here, in the same order, with the last checkpoint on held-out data.
# `baseline` is what a constant prediction reaches, or a detector as initialised with seed 0,
# evaluated by tools/test.py. The untrained RetinaNet has no box with a score of 0.05, and an AP of
# 0.0 with any threshold.
MEASURED = {
    'gfnet_nano_digits': dict(
        values=(94.5,),
        command='python tools/train.py gfnet_nano_digits --seed 0',
        time='2 minutes',
        baseline='10, one of ten classes',
    ),
    'upernet_gfnet_nano_digits': dict(
        values=(75.4,),
        command='make demo',
        time='6 min 18 s',
        baseline='7.6, always background',
    ),
    'retinanet_gfnet_nano_digits': dict(
        values=(72.4,),
        command='python tools/train.py retinanet_gfnet_nano_digits --seed 0',
        time='5 min 24 s',
        baseline='0.0, untrained',
    ),
    'mask_rcnn_gfnet_nano_digits': dict(
        values=(72.1, 80.2),
        command='python tools/train.py mask_rcnn_gfnet_nano_digits --seed 0',
        time='6 min 59 s',
        baseline='0.0 / 0.0, untrained',
    ),
}

DIGITS = """\
## The embedded digits

These results show that an installation works. They say nothing about the data sets above.
`python tools/make_digits.py` writes the data, with `--scans` those for classification. Times are
those of two CPU cores. The baseline is a constant prediction; for detectors it is the network as
initialised with seed 0, evaluated by `tools/test.py`.
"""


def names(family: str) -> list[str]:
    """Return the names of the configs of a family."""
    candidates = dict.fromkeys(FAMILIES[family]['configs'].format(size) for size in SIZES)
    return [name for name in candidates if (CONFIGS / f'{name}.py').exists()]


def metrics(family: str) -> tuple[str, ...]:
    """Return the metrics of a family."""
    return FAMILIES[family].get('metrics') or METRICS[FAMILIES[family]['task']]


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
    measured, reported = MEASURED.get(name), REPORTED_ACCURACIES.get(name)
    values = measured['values'] if measured else reported or [None] * len(metrics(family))
    result['Metrics'] = dict(zip(metrics(family), values, strict=True))
    if measured:
        result['Source'] = f'measured here: {measured["command"]}'
    else:
        known = REPORTED if reported else about.get('published', NOT_PUBLISHED)
        result['Source'] = f'{known}, {NOT_MEASURED}'
    entry['Results'] = [result]
    weights = f'gfnet-{name.removeprefix("gfnet_").removesuffix("_imagenet").replace("_", "-")}'
    if weights in OFFICIAL_WEIGHTS:
        entry['Weights'] = ADDRESSES[0].format(OFFICIAL_WEIGHTS[weights][0])
    return entry


def metafile(family: str, models: list[dict[str, Any]]) -> str:
    """Return the metafile of a family."""
    about = FAMILIES[family]
    head = [family.removeprefix('Nano ')] if about['task'] != 'Image Classification' else []
    collection = {
        'Name': family,
        'License': 'Apache License 2.0',
        'Metadata': {
            'Training Data': [about['data']],
            'Architecture': ['GFNet', *head],
        },
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
    values = ' / '.join(metrics(family))
    lines = [
        f'## {family}, {about["data"]}',
        '',
        f'{about["recipe"][0].upper()}{about["recipe"][1:]}.',
        '',
        f'| config | parameters | GMACs, {height}x{width} | {values}, reported | measured here |',
        '|---|---|---|---|---|',
    ]
    for entry in models:
        name, data = entry['Name'], entry['Metadata']
        gmacs = data['FLOPs'] / 1e9
        reported = _joined(REPORTED_ACCURACIES.get(name)) or about.get('published', NOT_PUBLISHED)
        found = NOT_MEASURED
        if measured := MEASURED.get(name):
            found = (
                f'{_joined(measured["values"])} by `{measured["command"]}` in {measured["time"]}; '
                f'baseline {measured["baseline"]}'
            )
        lines.append(
            f'| [{name}]({name}.py) | {data["Parameters"] / 1e6:.2f}M '
            f'| {gmacs:.{2 if gmacs >= 1 else 3}f} | {reported} | {found} |'
        )
    return [*lines, '']


def _joined(values: tuple[float, ...] | None) -> str:
    return ' / '.join(map(str, values or ()))


def files() -> dict[Path, str]:
    """Return path and content of every file that is written."""
    page = [
        '# Model zoo',
        '',
        'This page is written by `python tools/model_zoo.py`, which counts parameters and',
        'multiply-accumulates (MACs) in the configs, as `tools/get_flops.py` does. Accuracies',
        f'marked "reported" are those of the paper ([arXiv 2107.00645]({URL})) and its own',
        'training. Only the networks for the embedded digits were trained here. Nobody has',
        'published GFNet on COCO.',
        '',
    ]
    written, index = {}, []
    for family, about in FAMILIES.items():
        if about['data'] == 'digits' and DIGITS not in page:
            page.append(DIGITS)
        models = [model(family, name) for name in names(family)]
        page += section(family, models)
        path = CONFIGS / 'metafiles' / f'{family.lower().replace(" ", "_")}.yml'
        written[path] = metafile(family, models)
        index.append(str(path.relative_to(ROOT)))
    written[CONFIGS / 'README.md'] = '\n'.join(page)
    written[ROOT / 'model-index.yml'] = yaml.safe_dump(dict(Import=index))
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description='Write the model zoo.')
    parser.add_argument('--check', action='store_true', help='only print which files differ')
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
