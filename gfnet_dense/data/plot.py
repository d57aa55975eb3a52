"""A picture of the data: class frequencies, sizes, boxes, and samples as the model sees them."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .contents import Contents, keep_random_state, parts
from .errors import Fault
from .report import USES, Report

_SAMPLES = 24  # evenly spread over a data set
_COLUMNS = 6
_MOST_CLASSES = 30  # of more, those with the most and the fewest
_MOST_BOXES = 20_000  # of more, as many are drawn
_INCHES = 2.1  # of a sample


def plot_reports(reports: Sequence[Report], path: Path) -> Path:
    """Draw what :func:`gfnet_dense.data.check_data` found.

    For each use there are the frequencies of the classes, the sizes of images, the sizes of boxes,
    samples after the pipeline and the data preprocessor, with normalisation undone, and the
    findings.

    Args:
        reports: The reports.
        path: The picture to write, of the format of its suffix. Missing folders above it are
            created.

    Returns:
        `path`.

    Raises:
        OSError: If `path` cannot be written.
        ValueError: If matplotlib does not know the suffix.
    """
    # Imported here, because matplotlib is slow to import and training does not need it. A Figure
    # without pyplot needs no display and does not change the caller's figures.
    from matplotlib.figure import Figure

    heights = [0.4 + sum(_heights(report)) for report in reports]
    figure = Figure(figsize=(_INCHES * _COLUMNS, sum(heights)), dpi=110, layout='constrained')
    panels = figure.subfigures(len(reports), 1, height_ratios=heights, squeeze=False)[:, 0]
    for panel, report in zip(panels, reports, strict=True):
        _draw_report(panel, report)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format=path.suffix[1:] or 'png')
    return path


def _samples(report: Report) -> list[int]:
    """Return the samples to draw: those that findings name, and evenly spread ones."""
    if report.loader is None:
        return []
    dataset: Any = report.loader.dataset
    named = []
    if (text := '\n'.join(report.findings)) and hasattr(dataset, 'get_data_info'):
        for i in range(len(dataset)):
            info = dataset.get_data_info(i)
            if any(str(info.get(key)) in text for key in ('img_path', 'seg_map_path')):
                named.append(i)
    spread = np.linspace(0, len(dataset) - 1, min(len(dataset), _SAMPLES)).astype(int).tolist()
    return sorted(list(dict.fromkeys([*named[: _SAMPLES // 2], *spread]))[:_SAMPLES])


def _lines(report: Report) -> list[tuple[str, str]]:
    """Return the findings as lines of text with their colours."""
    return [
        (line, 'firebrick' if isinstance(finding, Fault) else 'black')
        for finding in report.distinct
        for line in textwrap.wrap(
            f'{type(finding).__name__.upper()}: {finding}', 170, subsequent_indent='    '
        )
    ]


def _heights(report: Report) -> tuple[float, float, float]:
    """Return the inches of charts, samples and findings."""
    rows = -(-len(_samples(report)) // _COLUMNS)
    pairs = any(contents.pixels for _, contents in report.contents)  # image and labels in a cell
    row = (_INCHES / 2 if pairs else _INCHES) + 0.3
    return 2.8 * bool(report.contents), row * rows, 0.18 * len(_lines(report)) + 0.05


def _draw_report(panel: Any, report: Report) -> None:
    lines, chosen = _lines(report), _samples(report)
    rows = -(-len(chosen) // _COLUMNS)
    ratios = [max(height, 0.01) for height in _heights(report)]
    charts, sheet, text = panel.subfigures(3, 1, height_ratios=ratios)
    count = 0 if report.loader is None else len(report.loader.dataset)  # type: ignore[arg-type]
    panel.suptitle(f'{USES[report.use].capitalize()} data: {count} images', weight='bold')
    if report.contents:
        _draw_charts(charts, report)
    if chosen:
        _draw_sheet(sheet, report, chosen, rows)
    for i, (line, colour) in enumerate(lines):
        y = 1 - (i + 0.5) / len(lines)
        text.text(0.01, y, line, fontsize=7, color=colour, va='center', family='monospace')


def _draw_charts(panel: Any, report: Report) -> None:
    left, middle, right = panel.subplots(1, 3, width_ratios=[2, 1, 1])
    part, contents = report.contents[0]
    classes = (getattr(part, 'metainfo', None) or {}).get('classes') or ()
    colours = _palette(getattr(part, 'metainfo', None) or {})
    _draw_classes(left, [contents for _, contents in report.contents], classes, colours)
    sizes: dict[tuple[int, int], int] = {}
    for _, contents in report.contents:
        for size, n in contents.sizes.items():
            width, _, height = size.partition('x')
            sizes[int(width), int(height)] = sizes.get((int(width), int(height)), 0) + n
    if sizes:
        points = np.array([*sizes])
        scale = np.sqrt([*sizes.values()])
        middle.scatter(*points.T, s=10 + 90 * scale / scale.max(), alpha=0.6)
        middle.set(xlim=(0, None), ylim=(0, None), xlabel='width', ylabel='height')
    middle.set_title(f'{len(sizes)} image sizes', fontsize=9)
    boxes = _boxes([part for part, _ in report.contents])
    if len(boxes):
        right.scatter(*boxes.T, s=3, alpha=0.3)
        right.set(xlim=(0, None), ylim=(0, None), xlabel='width', ylabel='height')
        right.set_title(f'{len(boxes)} box sizes', fontsize=9)
    else:
        right.set_axis_off()
    for axis in (left, middle, right):
        axis.tick_params(labelsize=7)


def _draw_classes(
    axis: Any, contents: Sequence[Contents], classes: Sequence[str], palette: np.ndarray[Any, Any]
) -> None:
    """Draw a bar for each class in its colour, on a logarithmic scale if they differ much.

    Names of classes that do not occur are red.
    """
    units = ('pixels', 'objects', 'images')
    unit = next((unit for unit in units if any(getattr(c, unit) for c in contents)), '')
    if not unit or not classes:
        axis.set_axis_off()
        return
    counts = np.array(
        [sum(getattr(c, unit)[str(i)] for c in contents) for i in range(len(classes))]
    )
    shown = np.argsort(-counts, kind='stable')
    if len(shown) > _MOST_CLASSES:
        shown = np.concatenate([shown[: _MOST_CLASSES // 2], shown[-_MOST_CLASSES // 2 :]])
    else:
        shown = np.sort(shown)
    found = counts[counts > 0]
    far_apart = len(found) > 0 and found.max() > 20 * found.min()
    colours = palette[shown] / 255
    axis.bar(range(len(shown)), counts[shown], log=far_apart, color=colours, edgecolor='grey')
    labels = axis.set_xticks(
        range(len(shown)), [str(classes[i]) for i in shown], rotation=60, ha='right'
    )
    for tick, i in zip(labels, shown, strict=True):
        if not counts[i]:
            tick.label1.set(color='firebrick', weight='bold')
    absent = int((counts == 0).sum())
    axis.set_title(f'{unit} of each class' + f' ({absent} do not occur)' * bool(absent), fontsize=9)


def _boxes(data: Sequence[Any]) -> np.ndarray[Any, Any]:
    boxes = [
        (instance['bbox'][2] - instance['bbox'][0], instance['bbox'][3] - instance['bbox'][1])
        for part in data
        for i in range(len(part))
        for instance in part.get_data_info(i).get('instances') or ()
    ]
    return np.array(boxes[:: 1 + len(boxes) // _MOST_BOXES]).reshape(-1, 2)


def _draw_sheet(panel: Any, report: Report, chosen: Sequence[int], rows: int) -> None:
    dataset = report.loader.dataset  # type: ignore[union-attr]
    metainfo = next((getattr(part, 'metainfo', None) for part in parts(dataset)), None) or {}
    classes = metainfo.get('classes') or ()
    palette = _palette(metainfo)
    axes = panel.subplots(rows, _COLUMNS, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    with keep_random_state():
        for axis, i in zip(axes.flat, chosen, strict=False):
            try:
                image, sample = _as_the_model_sees(report, i)
                _draw_sample(axis, image, sample, classes, palette)
            except Exception as e:  # of any library: the picture says so, where the sample would be
                text = textwrap.fill(f'{type(e).__name__}: {e}', 34)[:400]
                axis.text(0, 0.5, text, fontsize=5, color='firebrick', va='center')


def _as_the_model_sees(report: Report, i: int) -> tuple[np.ndarray[Any, Any], Any]:
    """Return an image, `(H, W, 3)` from 0 to 255, and its sample, as they enter the network."""
    loader = report.loader
    assert loader is not None
    data = loader.dataset[i]
    sample = data.get('data_samples') if isinstance(data, Mapping) else None
    inputs = data['inputs'] if isinstance(data, Mapping) else data[0]
    preprocessor: Any = getattr(report.model, 'data_preprocessor', None)
    if isinstance(preprocessor, nn.Module):
        # Classifiers mix the images of a batch, which no single one shows.
        training = report.use == 'train' and not hasattr(sample, 'gt_label')
        out = preprocessor(loader.collate_fn([data]), training)
        inputs = out['inputs'][0]
        sample = (out.get('data_samples') or [sample])[0]
        if getattr(preprocessor, '_enable_normalize', False):
            inputs = inputs * preprocessor.std + preprocessor.mean
    image = inputs.detach().cpu().float().numpy().transpose(1, 2, 0)
    if image.shape[2] == 2 or image.shape[2] == 1:
        image = image[..., :1].repeat(3, axis=2)
    image = image[..., :3]
    if image.max() > 256 or image.max() <= 1:  # not of 8 bits
        image = (image - image.min()) / max(np.ptp(image), 1e-12) * 255
    return image.clip(0, 255).astype(np.uint8), sample


def _draw_sample(
    axis: Any,
    image: np.ndarray[Any, Any],
    sample: Any,
    classes: Sequence[str],
    palette: np.ndarray[Any, Any],
) -> None:
    title = Path(getattr(sample, 'img_path', None) or '').name
    if hasattr(sample, 'gt_sem_seg'):
        labels = sample.gt_sem_seg.data[0].cpu().numpy().astype(int)
        inside = (labels >= 0) & (labels < len(classes))
        colours = np.where(inside[..., None], palette[labels * inside], _checkers(labels.shape))
        # Side by side: an overlay would hide small objects and edges that do not fit.
        height = max(len(image), len(colours))
        pictures = [_padded(p.astype(np.uint8), height) for p in (image, colours)]
        image = np.concatenate(pictures, axis=1)
        found = np.bincount(labels[inside].ravel(), minlength=len(classes)).argsort()[::-1]
        names = [str(classes[i]) for i in found[:4] if (labels == i).any()]
        if not inside.all():
            names.append(f'{100 * (1 - inside.mean()):.0f}% not labelled')
        title += '\n' + ', '.join(names)
    axis.imshow(image, interpolation='nearest')
    if hasattr(sample, 'gt_instances'):
        _draw_objects(axis, image, sample.gt_instances, classes, palette)
        title += f'\n{len(sample.gt_instances)} objects'
    if hasattr(sample, 'gt_label'):
        label = int(torch.as_tensor(sample.gt_label))
        title += f'\n{classes[label] if label < len(classes) else label}'
    axis.set_title(title, fontsize=6)


def _checkers(shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Return the pattern of pixels without a label, `(H, W, 3)`."""
    side = max(2, min(shape) // 32)
    y, x = np.indices(shape) // side
    return np.where((x + y) % 2, 255, 150)[..., None].repeat(3, axis=2)


def _padded(picture: np.ndarray[Any, Any], height: int) -> np.ndarray[Any, Any]:
    return np.pad(picture, ((0, height - len(picture)), (0, 0), (0, 0)))


def _draw_objects(
    axis: Any,
    image: np.ndarray[Any, Any],
    objects: Any,
    classes: Sequence[str],
    palette: np.ndarray[Any, Any],
) -> None:
    from matplotlib.patches import Rectangle

    boxes = getattr(objects.bboxes, 'tensor', objects.bboxes).cpu().numpy()
    for i, (left, top, right, bottom) in enumerate(boxes):
        label = int(objects.labels[i])
        colour = palette[label % max(len(palette), 1)] / 255
        axis.add_patch(
            Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour)
        )
        name = classes[label] if label < len(classes) else label
        ink = 'black' if colour.mean() > 0.5 else 'white'
        box = dict(facecolor=(*colour, 0.7), edgecolor='none', pad=1)
        axis.text(left, top, name, fontsize=5, color=ink, va='top', bbox=box)
        if 'masks' in objects:
            mask = objects.masks.to_ndarray()[i].astype(bool)
            overlay = np.zeros((*mask.shape, 4))
            overlay[mask] = (*colour, 0.45)
            axis.imshow(overlay, interpolation='nearest')
    # A box that leaves the image is seen to leave it.
    extent = [[-0.5, image.shape[1] - 0.5], [-0.5, image.shape[0] - 0.5]]
    if len(boxes):
        extent[0] += [boxes[:, 0].min(), boxes[:, 2].max()]
        extent[1] += [boxes[:, 1].min(), boxes[:, 3].max()]
    axis.set(xlim=(min(extent[0]), max(extent[0])), ylim=(max(extent[1]), min(extent[1])))


def _palette(metainfo: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """Return a colour for each class, `(N, 3)`, from 0 to 255."""
    count = max(len(metainfo.get('classes') or ()), 1)
    palette = metainfo.get('palette') or ()
    # A text, such as 'random', stands for no colours.
    colours: np.ndarray[Any, Any]
    colours = np.array(() if isinstance(palette, str) else palette, np.uint8).reshape(-1, 3)
    if len(colours) < count:
        colours = np.random.default_rng(0).integers(40, 230, (count, 3))
    return colours
