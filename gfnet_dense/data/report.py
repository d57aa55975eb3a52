"""What a person should know of the data before training: the report, and all checks in one place.

A run logs the report before its first iteration. :func:`check_data` makes it without a run.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from .build import build_dataset, explained_evaluator
from .checks import check_folders, find_batches, find_heads, ignored_labels
from .coco import check_objects, check_part, is_coco
from .contents import Contents, parts, read_contents, remember
from .errors import DataError, Fault, Findings, Note
from .evaluation import find_evaluation, find_training_images
from .image_folder import check_classes, is_image_folder
from .segmentation import check_files, check_labels, is_segmentation


class Kind(NamedTuple):
    """The checks of a kind of data set.

    Attributes:
        fits: Tells whether a data set is of this kind.
        of_lists: Checks which images and annotations there are.
        of_files: Checks what was read of them.
    """

    fits: Callable[[Any], bool]
    of_lists: Callable[..., Findings]
    of_files: Callable[..., Findings]


CHECKS = (
    Kind(is_segmentation, check_files, check_labels),
    Kind(is_coco, check_part, check_objects),
    Kind(is_image_folder, lambda part, use: (), check_classes),
)
USES = {'train': 'training', 'val': 'validation', 'test': 'test'}
_NAMED = 12  # classes that the report names; of more it names the most and the least frequent


@dataclass
class Report:
    """What was found about the data of one use.

    Attributes:
        use: `'train'`, `'val'` or `'test'`.
        contents: Each data set without wrappers, and what it holds.
        findings: Faults and notes.
        loader: The dataloader, if it could be built.
        model: The model that the data are for.
    """

    use: str
    contents: list[tuple[Any, Contents]] = field(default_factory=list)
    findings: list[Fault | Note] = field(default_factory=list)
    loader: DataLoader[Any] | None = None
    model: nn.Module | None = None

    @property
    def faults(self) -> list[Fault]:
        """The findings that stop a run."""
        return [finding for finding in self.findings if isinstance(finding, Fault)]

    @property
    def distinct(self) -> list[Fault | Note]:
        """The findings, faults first, without those of equal text."""
        faults_first = sorted(self.findings, key=lambda finding: not isinstance(finding, Fault))
        return list(dict.fromkeys(faults_first))

    def __str__(self) -> str:
        """Return the report as lines of text."""
        lines = []
        for part, contents in self.contents:
            place = getattr(part, 'data_root', None) or getattr(part, 'ann_file', None) or '?'
            read = f', {contents.read} of them read' if contents.read < contents.samples else ''
            lines.append(
                f'{USES[self.use].capitalize()} data: {contents.samples} images{read}, '
                f'{type(part).__name__} in {place}'
            )
            lines += [f'  {key:<10} {text}' for key, text in _describe(part, contents) if text]
        lines += [f'  {type(f).__name__.upper():<10} {f}' for f in self.distinct]
        return '\n'.join(lines)


def inspect(
    use: str,
    loader: DataLoader[Any],
    *,
    model: nn.Module | None = None,
    metrics: Sequence[Any] = (),
    wanted: Iterable[str] = (),
    ann_files: Sequence[str | None] = (),
    training: Any = None,
) -> Report:
    """Run all checks of the data of one use.

    Args:
        use: `'train'`, `'val'` or `'test'`.
        loader: The dataloader.
        model: The model that the data are for.
        metrics: The metrics of the evaluator.
        wanted: Names of numbers that hooks ask the metrics for.
        ann_files: The annotation files of the metrics in the config.
        training: The training data, in which images to evaluate are looked for.
    """
    report = Report(use, loader=loader, model=model)
    ignored = ignored_labels(model if use == 'train' else None, metrics)
    dataset = loader.dataset
    alone = len([*parts(dataset)]) == 1
    with _copied_pipelines(dataset):
        for part in parts(dataset):
            if hasattr(part, 'get_data_info'):
                contents, findings = _inspect_part(part, use, ignored, alone)
                report.contents += [(part, contents)] if contents else []
                report.findings += findings
        if model is not None:
            report.findings += find_heads(model, dataset)
        if metrics:
            report.findings += find_evaluation(metrics, dataset, use, model, wanted, ann_files)
        if training is not None:
            report.findings += find_training_images(dataset, training)
        if not report.faults:  # or loading would only say the same again
            report.findings += find_batches(loader, model, use)
    return report


@contextmanager
def _copied_pipelines(dataset: Any) -> Iterator[None]:
    """Let checks use copies of transforms.

    Transforms may open files and fill caches. Processes that load data are forked later, and must
    not share what the checks have opened.
    """
    layers = [layer for layer in _layers(dataset) if 'pipeline' in _held(layer)]
    kept = [(layer, layer.pipeline) for layer in layers]
    try:
        for layer, pipeline in kept:
            try:
                layer.pipeline = copy.deepcopy(pipeline)
            except Exception:  # a transform that cannot be copied is used as it is
                continue
        yield
    finally:
        for layer, pipeline in kept:
            layer.pipeline = pipeline


def _layers(dataset: Any) -> Iterator[Any]:
    """Yield a data set, and those that it wraps."""
    yield dataset
    held = _held(dataset)
    for inner in (*(held.get('datasets') or ()), held.get('dataset')):
        if inner is not None:
            yield from _layers(inner)


def _held(layer: Any) -> Mapping[str, Any]:
    # Some wrappers pass on the attributes of what they wrap, so getattr does not tell.
    return getattr(layer, '__dict__', {})


def _inspect_part(
    part: Any, use: str, ignored: Sequence[int], alone: bool = True
) -> tuple[Contents | None, list[Fault | Note]]:
    """Check a data set without wrappers; the verdict is remembered while nothing changes."""

    def compute() -> tuple[dict[str, Any], bool]:
        kinds = [kind for kind in CHECKS if kind.fits(part)]
        contents = None
        findings: list[Fault | Note] = []
        for kind in kinds:
            findings += kind.of_lists(part, use=use)
        if not any(isinstance(finding, Fault) for finding in findings):
            contents = read_contents(part, use, ignored)
            findings += _of_files(contents)
            for kind in kinds:
                findings += kind.of_files(
                    part, contents=contents, ignored=ignored, use=use, alone=alone
                )
        named = [(type(finding).__name__, str(finding)) for finding in findings]
        kept = not any(isinstance(finding, Fault) for finding in findings)
        return dict(contents=contents and vars(contents), findings=named), kept

    result = remember(part, use, [list(ignored), alone], compute)
    types = {'Fault': Fault, 'Note': Note}
    contents = result['contents'] and Contents.from_json(result['contents'])
    return contents, [types[kind](text) for kind, text in result['findings']]


def _of_files(contents: Contents) -> Findings:
    for kind, texts in ((Fault, contents.faults), (Note, contents.notes)):
        for name, text in texts.items():
            count = contents.counts[name]
            yield kind(text + (f' ({count} files are like this)' if count > 1 else ''))


def _describe(part: Any, contents: Contents) -> Iterable[tuple[str, str]]:
    """Yield the lines of the report about one data set."""
    sizes = {tuple(map(int, size.split('x'))): n for size, n in contents.sizes.items()}
    if len(sizes) > 3:
        sides = [sorted(size[axis] for size in sizes) for axis in (0, 1)]
        low, high = ([side[i] for side in sides] for i in (0, -1))
        text = f'{len(sizes)} sizes, {low[0]} to {high[0]} wide and {low[1]} to {high[1]} high'
        (width, height), n = max(sizes.items(), key=lambda item: item[1])
        yield 'sizes', f'{text}, most often {width}x{height} ({n})'
    else:
        yield 'sizes', _counts(contents.sizes)
    yield 'modes', _counts(contents.modes)
    classes = (getattr(part, 'metainfo', None) or {}).get('classes') or ()
    if total := contents.pixels.total():
        shares = {str(name): contents.pixels[str(i)] / total for i, name in enumerate(classes)}
        rest = 1 - sum(shares.values())
        yield 'pixels', _shares(shares) + (f'; not labelled {_percent(rest)}' if rest > 0 else '')
    if total := contents.objects.total():
        shares = {str(name): contents.objects[str(i)] / total for i, name in enumerate(classes)}
        crowds = f', and {contents.crowds} crowds' if contents.crowds else ''
        yield 'objects', f'{total}{crowds}: {_shares(shares)}'
    if contents.images and not contents.pixels and not contents.objects:
        shares = {
            str(name): contents.images[str(i)] / contents.samples for i, name in enumerate(classes)
        }
        yield 'classes', _shares(shares)
    if contents.empty:
        yield 'empty', f'{contents.empty} images without objects or labels'


def _counts(counts: Mapping[str, int]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return ', '.join(f'{key} ({n})' for key, n in sorted(counts.items(), key=lambda i: -i[1]))


def _shares(shares: Mapping[str, float]) -> str:
    items = sorted(shares.items(), key=lambda item: -item[1])
    texts = [f'{name} {_percent(share)}' for name, share in items]
    if len(texts) > _NAMED:
        texts = [*texts[:5], f'... {len(texts) - 10} more ...', *texts[-5:]]
    return ', '.join(texts)


def _percent(share: float) -> str:
    digits = 1 if share == 0 or share >= 0.001 else 1 - math.floor(math.log10(100 * share))
    return f'{100 * share:.{digits}f}%'


def check_data(config: Config) -> list[Report]:
    """Run all checks of a config's data without training.

    Args:
        config: A config with dataloaders, evaluators and a model, as for
            :func:`gfnet_dense.openmmlab.train`.

    Returns:
        A report for training, validation and test data, where the config has them and they differ.

    Raises:
        DataError: If it has none.
    """
    cfg = copy.deepcopy(config)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    model = MODELS.build(cfg.model) if cfg.get('model') else None
    reports, seen, training = [], [], None
    if not any(cfg.get(f'{use}_dataloader') for use in USES):
        raise DataError(f'{cfg.filename or "the config"} has no dataloader of {", ".join(USES)}')
    for use in USES:
        loader_cfg, evaluator_cfg = cfg.get(f'{use}_dataloader'), cfg.get(f'{use}_evaluator')
        if loader_cfg is None or (loader_cfg, evaluator_cfg) in seen:
            continue
        seen.append((copy.deepcopy(loader_cfg), copy.deepcopy(evaluator_cfg)))
        try:
            check_folders(loader_cfg.dataset)
            dataset = build_dataset(loader_cfg.dataset)
            single = single_process({**loader_cfg, 'dataset': dataset, 'num_workers': 0})
            loader = Runner.build_dataloader(single, seed=0)
            training = dataset if use == 'train' else training
            metrics = []
            if evaluator_cfg is not None:
                with explained_evaluator(evaluator_cfg):
                    evaluator = Evaluator(evaluator_cfg)
                evaluator.dataset_meta = getattr(dataset, 'metainfo', {})
                metrics = evaluator.metrics
        except Exception as e:  # of any library
            text = str(e) if isinstance(e, DataError) else f'{type(e).__name__}: {e}'
            reports.append(Report(use, findings=[Fault(text)]))
            continue
        try:
            report = inspect(
                use,
                loader,
                model=model,
                metrics=metrics,
                wanted=_wanted(cfg) if use == 'val' else (),
                ann_files=evaluator_files(evaluator_cfg),
                training=None if use == 'train' else training,
            )
        except DataError as e:
            report = Report(use, findings=[Fault(str(e))])
        except Exception as e:  # as in a run: the data can still be right
            report = Report(use, findings=[Note(f'could not be checked: {type(e).__name__}: {e}')])
        report.findings = [_of_any_run(finding, model) for finding in report.findings]
        reports.append(report)
    return reports


def _of_any_run(finding: Fault | Note, model: nn.Module | None) -> Fault | Note:
    """Return a fault as a note if it is none in a run of several processes."""
    synchronised = model is not None and any(
        isinstance(m, nn.SyncBatchNorm) for m in model.modules()
    )
    if synchronised and finding.startswith('each batch has one image'):
        return Note(f'{finding}. SyncBN of several processes takes it')
    return finding


def _wanted(cfg: Mapping[str, Any]) -> list[str]:
    """Return the names of the numbers that hooks and schedulers of a config ask for."""
    names: list[Any] = []
    for hook in [*(cfg.get('default_hooks') or {}).values(), *(cfg.get('custom_hooks') or ())]:
        if isinstance(hook, Mapping):
            kind = getattr(hook.get('type'), '__name__', str(hook.get('type'))).rpartition('.')[2]
            best = hook.get('save_best') or ()
            names += [best] if isinstance(best, str) else best
            names += [hook.get('monitor')] if kind == 'EarlyStoppingHook' else []
    schedulers = cfg.get('param_scheduler') or ()
    for scheduler in [schedulers] if isinstance(schedulers, Mapping) else schedulers:
        if 'ReduceOnPlateau' in str(scheduler.get('type')) and scheduler.get('by_epoch', True):
            names.append(scheduler.get('monitor', 'loss'))
    return [name for name in names if name and name != 'auto']


def evaluator_files(evaluator: Any) -> list[str | None]:
    """Return the annotation file of each metric in the config of an evaluator."""
    metrics = evaluator if isinstance(evaluator, list | tuple) else [evaluator]
    return [metric.get('ann_file') if isinstance(metric, Mapping) else None for metric in metrics]


def single_process(dataloader: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a dataloader without what only data loading processes need.

    torch refuses `persistent_workers` and `prefetch_factor` without such processes.
    """
    if dataloader.get('num_workers'):
        return dict(dataloader)
    needs = 'persistent_workers', 'prefetch_factor', 'multiprocessing_context'
    return {key: value for key, value in dataloader.items() if key not in needs}
