"""A config for one's own data: what was guessed about them, as a short file over `_base_`."""

import json
import math
import os
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS

from gfnet_dense.data.errors import DataError
from gfnet_dense.data.guess import (
    Boxes,
    Folders,
    Masks,
    class_colour,
    look_at_coco,
    look_at_folders,
    look_at_masks,
    parse_value,
    read_classes,
)
from gfnet_dense.models.checkpoint import find_weights
from gfnet_dense.models.gfnet import HIERARCHICAL, ISOTROPIC, official_network
from gfnet_dense.models.hub import OFFICIAL_WEIGHTS
from gfnet_dense.serialization import write_whole

from .launch import find_config

SEGMENTORS = ('upernet', 'fpn')
DETECTORS = ('retinanet', 'mask-rcnn')
HEADS = (*SEGMENTORS, *DETECTORS, 'classifier')
ARCHS = (*HIERARCHICAL, *ISOTROPIC, 'nano')

_TITLES = {
    'upernet': 'UperNet',
    'fpn': 'Semantic FPN',
    'retinanet': 'RetinaNet',
    'mask-rcnn': 'Mask R-CNN',
    'classifier': 'A classifier',
}
# The config that a new one changes.
_BASES = {
    'upernet': 'upernet_gfnet_{}_ade20k',
    'fpn': 'fpn_gfnet_{}_ade20k',
    'retinanet': 'retinanet_gfnet_{}_coco',
    'mask-rcnn': 'mask_rcnn_gfnet_{}_coco',
    'classifier': 'gfnet_{}_imagenet',
}
_NANO_BASES = {
    'upernet': 'upernet_gfnet_nano_digits',
    'retinanet': 'retinanet_gfnet_nano_digits',
    'mask-rcnn': 'mask_rcnn_gfnet_nano_digits',
    'classifier': 'gfnet_nano_digits',
}
_MOST_BATCH = {'classifier': 64}  # of one process; 16 for all others, the recipes' total


@dataclass
class NewConfig:
    """A config that was written.

    Attributes:
        path: The file.
        notes: What was guessed.
        config: The config, as the file says it.
    """

    path: Path
    notes: list[str]
    config: Config

    def __str__(self) -> str:
        lines = [f'{self.path} is written. What was guessed, to be corrected there:']
        return '\n'.join([*lines, *(f'  - {note}' for note in self.notes)])


def new_config(
    name: str,
    *,
    images: str | None = None,
    masks: str | None = None,
    coco: str | None = None,
    val_coco: str | None = None,
    classes: str | None = None,
    ignore: Sequence[str] = (),
    head: str | None = None,
    arch: str = 'h-s',
    weights: str | None = None,
    crop: int | None = None,
    batch: int | None = None,
    iterations: int | None = None,
    force: bool = False,
) -> NewConfig:
    """Look at one's own data and write a config for them.

    Args:
        name: The config to write, with or without `.py`. Lists of the images of each split, or
            their annotation files, lie beside it.
        images: Folder of the images. Without `masks` and `coco` it has a folder for each class.
        masks: Folder of their label maps.
        coco: Annotation file in COCO's layout.
        val_coco: That of the validation images; without it some images are held out.
        classes: Names of the classes, see :func:`gfnet_dense.data.guess.read_classes`.
        ignore: Values of the pixels of masks that have no class: `'0'`, `'224,224,192'`.
        head: A name of :data:`HEADS`; by default UperNet for masks, Mask R-CNN or RetinaNet for
            COCO with and without segmentations, a classifier for folders.
        arch: A name of :data:`ARCHS`.
        weights: A checkpoint whose GFNet to start from, a name of official weights, or `'none'`;
            by default the official weights of `arch`.
        crop: Side of training crops in pixels; segmentors and detectors resize images so that
            their shorter side has this length, too. By default that of the images, at most 512
            (224 for classifiers, 800 for detectors).
        batch: Images of an iteration and process; by default what memory is estimated to hold.
        iterations: Length of training; by default 100 epochs, within 2,000 to 80,000 iterations.
        force: Overwrite a config of that name, and the lists or links beside it.

    Raises:
        FileExistsError: If there are such files, or one of them belongs to the data.
        DataError: If the data are not there or cannot be understood.
        ValueError: If the options do not belong together, or UperNet is given a batch of 1.
    """
    path = Path(name if name.endswith('.py') else f'{name}.py')
    if path.exists() and not force:
        raise FileExistsError(f'{path} exists: choose another name, or overwrite it with --force')
    if (masks or not coco) and not images:
        raise ValueError(
            'give --images DIR, and --masks DIR or --coco FILE unless classes are folders'
        )
    if masks and coco:
        raise ValueError('give either --masks or --coco')
    if val_coco and not coco:
        raise ValueError('--val-coco is for --coco: other data have folders train and val')
    if (classes or ignore) and not masks:
        raise ValueError('--classes and --ignore are for --masks: other data name their classes')
    named = read_classes(classes) if classes else []
    found: Masks | Boxes | Folders
    if masks:
        found = look_at_masks(
            _absolute(images), _absolute(masks), named, [parse_value(text) for text in ignore]
        )
    elif coco:
        found = look_at_coco(
            _absolute(coco).resolve(),
            _absolute(images) if images else None,
            _absolute(val_coco) if val_coco else None,
        )
    else:
        found = look_at_folders(_absolute(images))
    head = head or _default_head(found)
    _check_head(head, arch, found)
    builder = _Builder(path, found, head, arch, crop)
    builder.check_outputs([Path(given) for given in (coco, val_coco, classes) if given], force)
    builder.choose_weights(weights)
    builder.choose_length(batch, iterations)
    return builder.write()


def _absolute(path: str | None) -> Path:
    return Path(os.path.abspath(path or ''))


def _default_head(found: Masks | Boxes | Folders) -> str:
    if isinstance(found, Masks):
        return 'upernet'
    if isinstance(found, Boxes):
        return 'mask-rcnn' if found.has_masks else 'retinanet'
    return 'classifier'


def _check_head(head: str, arch: str, found: Masks | Boxes | Folders) -> None:
    fits = {Masks: SEGMENTORS, Boxes: DETECTORS, Folders: ('classifier',)}[type(found)]
    if head not in fits:
        raise ValueError(f'{head} does not fit these data, choose {" or ".join(fits)}')
    if head == 'mask-rcnn' and isinstance(found, Boxes) and not found.has_masks:
        raise DataError('mask-rcnn needs a segmentation in every annotation: choose retinanet')
    if arch == 'nano' and head not in _NANO_BASES:
        raise ValueError(f'{head} has no nano backbone: choose {" or ".join(_NANO_BASES)}')
    if arch in ISOTROPIC and head != 'classifier':
        raise ValueError(f'{arch} has maps of one stride: choose {", ".join(HIERARCHICAL)} or nano')


class _Builder:
    """Collects the values of a config, and writes it as text."""

    def __init__(
        self, path: Path, found: Masks | Boxes | Folders, head: str, arch: str, crop: int | None
    ) -> None:
        self.path, self.found, self.head, self.arch = path, found, head, arch
        self.notes = found.notes
        largest = {'classifier': 224}.get(head, 800 if head in DETECTORS else 512)
        if arch == 'nano':
            largest = min(largest, 128)
        self.crop = crop or min(largest, max(32, found.side // 32 * 32))
        where = 'shorter side of the images' if head in DETECTORS else 'side of the crops'
        self.notes.append(f'{where}: {self.crop} pixels (--crop)')
        if head in SEGMENTORS:
            self.notes.append(
                f'images are resized so that their shorter side has {self.crop} pixels (--crop)'
            )
        self.init_cfg: dict[str, Any] | None = None
        self.batch = self.iterations = self.epochs = 0

    # Choices

    def choose_weights(self, weights: str | None) -> None:
        if weights is None:
            weights = 'none' if self.arch == 'nano' else f'gfnet-{self.arch}'
        if weights == 'none':
            self.notes.append('trained from scratch (--weights)')
            return
        if weights in OFFICIAL_WEIGHTS:
            self.notes.append(
                f'starts from the official weights {weights}, which the first run downloads '
                '(--weights)'
            )
        else:
            weights = str(_absolute(str(find_weights(weights, official_network))))
            self.notes.append(
                f'starts from the GFNet of {weights}; neck and heads of that file are left out, '
                'since they belong to its classes (--weights)'
            )
        self.init_cfg = dict(type='Pretrained', checkpoint=weights)

    def choose_length(self, batch: int | None, iterations: int | None) -> None:
        count = max(1, len(self.found.train) or len(self._coco('train')['images']))
        largest = min(count, _MOST_BATCH.get(self.head, 16))
        least = 2 if self.head == 'upernet' else 1  # it pools to one pixel, and norms need two
        if batch is None:
            batch, text = self._batch_for_memory(largest)
            if batch < least:
                batch, text = least, f'UperNet needs {least} images; {text}'
            self.notes.append(f'batch {batch}, since {text} (--batch)')
        elif batch < least:
            raise ValueError(
                f'UperNet normalises maps of 1x1 pixels, which takes {least} images: give --batch '
                f'{least} or more'
            )
        if self.head == 'classifier':  # mixup pairs images, and incomplete batches are dropped
            batch = max(2, min(batch, count) // 2 * 2)
        self.batch = batch
        epoch = max(1, count // batch)
        self.iterations = iterations or min(80_000, max(2_000, 100 * count // batch))
        self.epochs = max(1, round(self.iterations / epoch))
        if self.head not in SEGMENTORS:
            self.iterations = self.epochs * epoch
        self.notes.append(
            f'{self.iterations} iterations, {self.iterations * batch / count:,.0f} times through '
            f'{count} training images (--iterations)'
        )

    def _batch_for_memory(self, largest: int) -> tuple[int, str]:
        """Return a power of two, by what the network keeps of an image for its backward pass."""
        if torch.cuda.is_available():
            memory, where = torch.cuda.mem_get_info()[0], 'the GPU has'
        else:
            pages = os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
            memory, where = pages, 'this machine has'
        fixed, each = self._training_memory()
        fitting = (0.7 * memory - fixed) / each
        batch = 2 ** int(math.log2(min(largest, max(1, fitting))))
        text = f'{where} {memory / 2**30:.0f} GiB free and an image takes about '
        return batch, f'{text}{each / 2**30:.2g} GiB in training'

    def _training_memory(self) -> tuple[float, float]:
        """Return the bytes of weights and optimizer, and of what an image adds."""
        cfg = Config.fromstring(self.text(), '.py')
        kept = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            # Every layer keeps its input, which another may have kept already.
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
            return tensor

        alive: list[torch.Tensor] = []
        with MODELS.switch_scope_and_registry(cfg.default_scope) as registry:
            with torch.device('meta'):
                model: Any = revert_sync_batchnorm(registry.build(cfg.model)).train()
                width = round(self.crop * 4 / 3) if self.head in DETECTORS else self.crop
                images = torch.zeros(2, 3, self.crop, width)
                with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                    if self.head in DETECTORS:
                        model.extract_feat(images)
                    else:
                        model(images, mode='tensor')
            weights = sum(p.numel() for p in model.parameters())
        # Four numbers for a weight: itself, its gradient, AdamW's two averages. Losses, temporary
        # maps and the heads of detectors add about as much as the two images keep each.
        return 16.0 * weights, float(max(1, sum(kept.values()) - 4 * weights))

    # Files and text

    def check_outputs(self, inputs: Sequence[Path], force: bool) -> None:
        """Raise FileExistsError before files of the user would be overwritten or removed."""
        resolved = [path.resolve() for path in inputs]
        lists = [] if isinstance(self.found, Folders) else [self._file('train'), self._file('val')]
        for file in (self.path, *lists):
            if file.resolve() in resolved:
                raise FileExistsError(f'{file} is an input: choose another NAME')
        existing = [file for file in (self.path, *lists) if file.exists()]
        if self._has_links and os.path.lexists(self._links):
            files = (path for path in self._links.rglob('*') if not path.is_dir())
            if (
                self._links.is_symlink()
                or not self._links.is_dir()
                or not all(path.is_symlink() for path in files)
                or self.found.images.resolve().is_relative_to(self._links.resolve())
            ):
                raise FileExistsError(
                    f'{self._links} exists and holds other files: choose another NAME'
                )
            existing.append(self._links)
        if existing and not force:
            raise FileExistsError(
                f'{existing[0]} exists: choose another NAME, or overwrite it with --force'
            )

    def write(self) -> NewConfig:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for file, content in self._files().items():
            with write_whole(file) as stream:
                stream.write(content.encode())
        if self._has_links:
            self._link_images()
        with write_whole(self.path) as stream:
            stream.write(self.text().encode())
        return NewConfig(self.path, self.notes, Config.fromfile(self.path))

    def _file(self, use: str) -> Path:
        suffix = 'json' if isinstance(self.found, Boxes) else 'txt'
        return _absolute(str(self.path.with_name(f'{self.path.stem}_{use}.{suffix}')))

    def _files(self) -> dict[Path, str]:
        if isinstance(self.found, Masks):
            lists = {'train': self.found.train, 'val': self.found.val}
            return {self._file(use): '\n'.join(names) + '\n' for use, names in lists.items()}
        if isinstance(self.found, Boxes):
            return {
                self._file(use): json.dumps(content) for use, content in self.found.contents.items()
            }
        return {}

    def _coco(self, use: str) -> Mapping[str, Any]:
        return self.found.contents[use] if isinstance(self.found, Boxes) else {'images': ()}

    def text(self) -> str:
        """Return the config as text."""
        names = _NANO_BASES if self.arch == 'nano' else _BASES
        base = find_config(names[self.head].format(self.arch.replace('-', '_')))
        size = 'nano' if self.arch == 'nano' else self.arch.title()
        start = (
            f'"""{_TITLES[self.head]} with GFNet-{size}, written by `gfnet new`."""\n\n'
            f'_base_ = {str(base)!r}\n\n'
        )
        if isinstance(self.found, Masks):
            return start + self._text_of_masks(self.found)
        if isinstance(self.found, Boxes):
            return start + self._text_of_boxes(self.found)
        return start + self._text_of_folders(self.found)

    def _text_of_masks(self, found: Masks) -> str:
        load = "dict(type='LoadAnnotations')"
        if not found.are_indices:
            load = f"dict(type='LoadCodedAnnotations', values={_listed(found.values)})"
        auxiliary = ''
        if self.head == 'upernet':
            auxiliary = f'    auxiliary_head=dict(num_classes={len(found.classes)}),\n'
        warmup = max(1, min(1500, self.iterations // 10))
        interval = max(1, self.iterations // 10)
        return f"""\
classes = {_listed(found.classes)}
palette = {_listed(found.palette)}
# A pixel of each class in a mask; any other pixel is not trained.
load_labels = {load}
crop_size = ({self.crop}, {self.crop})
scale = ({4 * self.crop}, {self.crop})  # the longest and the shorter side of an image

train_pipeline = [
    dict(type='LoadImageFromFile'),
    load_labels,
    dict(type='RandomResize', scale=scale, ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=scale, keep_ratio=True),
    load_labels,
    dict(type='PackSegInputs'),
]
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [
                dict(type='Resize', scale=(int(scale[0] * r), int(scale[1] * r)), keep_ratio=True)
                for r in (0.75, 1.0, 1.25)
            ],
            [dict(type='RandomFlip', prob=p, direction='horizontal') for p in (0.0, 1.0)],
            [load_labels],
            [dict(type='PackSegInputs')],
        ],
    ),
]

data = dict(
    type='BaseSegDataset',
    metainfo=dict(classes=classes, palette=palette),
    data_prefix=dict(img_path={str(found.images)!r}, seg_map_path={str(found.masks)!r}),
    img_suffix={found.suffix!r},
    seg_map_suffix={found.mask_suffix!r},
)
train_dataloader = dict(
    batch_size={self.batch},
    num_workers={self.workers},
    drop_last=True,  # norms of maps of one cell need two images
    dataset=dict(
        _delete_=True, **data, ann_file={str(self._file('train'))!r}, pipeline=train_pipeline
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers={self.workers},
    dataset=dict(
        _delete_=True, **data, ann_file={str(self._file('val'))!r}, pipeline=test_pipeline
    ),
)
test_dataloader = val_dataloader

model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(img_size={self.crop}, init_cfg={self.init_cfg}),
    decode_head=dict(num_classes={len(found.classes)}),
{auxiliary})

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end={warmup}),
    dict(
        type='PolyLR', eta_min=0.0, power=1.0, by_epoch=False, begin={warmup}, end={self.iterations}
    ),
]
train_cfg = dict(max_iters={self.iterations}, val_interval={interval})
default_hooks = dict(
    logger=dict(interval={min(50, interval)}), checkpoint=dict(interval={interval})
)
auto_scale_lr = dict(enable=True)  # the learning rate is made for base_batch_size
"""

    def _text_of_boxes(self, found: Boxes) -> str:
        count, masks = len(found.classes), self.head == 'mask-rcnn'
        load = f"dict(type='LoadAnnotations', with_bbox=True{', with_mask=True' * masks})"
        heads = f'    bbox_head=dict(num_classes={count}),'
        if masks:
            heads = (
                f'    roi_head=dict(\n        bbox_head=dict(num_classes={count}),\n'
                f'        mask_head=dict(num_classes={count}),\n    ),'
            )
        warmup = max(1, min(500, self.iterations // 10))
        steps = [math.ceil(self.epochs * 8 / 12), math.ceil(self.epochs * 11 / 12)]
        train, val = (str(self._file(use)) for use in ('train', 'val'))
        return f"""\
metainfo = dict(
    classes={_listed(found.classes)},
    palette={_listed([class_colour(i) for i in range(count)])},
)
# The longest and the shorter side of an image.
scale = ({round(self.crop * 1333 / 800)}, {self.crop})

train_pipeline = [
    dict(type='LoadImageFromFile'),
    {load},
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=scale, keep_ratio=True),
    {load},
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]

data = dict(metainfo=metainfo, data_prefix=dict(img=''))
train_dataloader = dict(
    batch_size={self.batch},
    num_workers={self.workers},
    dataset=dict(
        **data, data_root={str(found.images)!r}, ann_file={train!r}, pipeline=train_pipeline
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers={self.workers},
    dataset=dict(
        **data, data_root={str(found.val_images)!r}, ann_file={val!r}, pipeline=test_pipeline
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file={val!r})
test_evaluator = val_evaluator

model = dict(
    backbone=dict(init_cfg={self.init_cfg}),
{heads}
)

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end={warmup}),
    dict(
        type='MultiStepLR', by_epoch=True, begin=0, end={self.epochs}, milestones={steps}, gamma=0.1
    ),
]
train_cfg = dict(max_epochs={self.epochs}, val_interval={max(1, self.epochs // 10)})
auto_scale_lr = dict(enable=True)  # the learning rate is made for base_batch_size
"""

    def _text_of_folders(self, found: Folders) -> str:
        root, count = found.images, len(found.classes)
        train, val = found.names or ('train', 'val')
        if self._has_links:
            root = self._links
        warmup = min(5, self.epochs // 10)
        backbone = f'num_classes={count}, init_cfg={self.init_cfg}'
        optimizer = ''
        if self.init_cfg:
            # As the authors finetune: gfnet_xs_transfer.py.
            backbone += ', drop_path_rate=0.0'
            optimizer = (
                'optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=1e-4))\n'
                'auto_scale_lr = dict(enable=False)\n'
            )
        return f"""\
# Classes are the folders: {textwrap.shorten(', '.join(found.classes), 70)}
data = dict(data_root={str(root)!r}, num_classes={count}, transform=dict(input_size={self.crop}))
train_dataloader = dict(
    batch_size={self.batch}, num_workers={self.workers}, dataset=dict(**data, split={train!r})
)
val_dataloader = dict(
    batch_size={self.batch}, num_workers={self.workers}, dataset=dict(**data, split={val!r})
)
test_dataloader = val_dataloader

model = dict(backbone=dict({backbone}, img_size={self.crop}))

{optimizer}param_scheduler = [
    dict(
        type='WarmupCosineLR',
        t_initial={self.epochs},
        lr_min=1e-6,
        warmup_t={warmup},
        warmup_lr_init=1e-6,
    ),
]
train_cfg = dict(max_epochs={self.epochs}, val_interval={max(1, self.epochs // 10)})
default_hooks = dict(
    logger=dict(interval=10), checkpoint=dict(interval={max(1, self.epochs // 10)})
)
"""

    @property
    def workers(self) -> int:
        return min(4, os.cpu_count() or 1)

    @property
    def _links(self) -> Path:
        return _absolute(str(self.path.with_name(f'{self.path.stem}_data')))

    @property
    def _has_links(self) -> bool:
        return isinstance(self.found, Folders) and self.found.names is None

    def _link_images(self) -> None:
        """Divide images by links: the data set takes folders for its splits."""
        if self._links.exists():  # the links of an earlier run: check_outputs allows no other files
            shutil.rmtree(self._links)
        for use, names in (('train', self.found.train), ('val', self.found.val)):
            for name in names:
                link = self._links / use / name
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(self.found.images / name)


def _listed(values: Sequence[Any]) -> str:
    """Return a list as Python, in lines of at most 100 characters."""
    whole = ', '.join(map(repr, values))
    if len(whole) < 70:
        return f'[{whole}]'
    lines, line = [], ''
    for value in map(repr, values):
        if line and len(line) + len(value) > 92:
            lines.append(line)
            line = ''
        line += f'{value}, '
    return '[\n' + ''.join(f'    {part.rstrip()}\n' for part in [*lines, line]) + ']'
