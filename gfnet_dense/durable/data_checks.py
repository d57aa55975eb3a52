"""Data checks of a run, and errors that name the file of a sample that cannot be loaded."""

import time
from collections.abc import Mapping
from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import DATASETS, HOOKS
from mmengine.runner import Runner
from torch.utils.data import DataLoader, Dataset

from gfnet_dense.data.checks import check_folders, check_heads, check_segmentation
from gfnet_dense.data.coco import check_coco, check_coco_file
from gfnet_dense.data.errors import DataError

from .ranks import on_main_process
from .wrapper import DatasetWrapper


@HOOKS.register_module()
class CheckDataHook(Hook):
    """Check the data, and that the model has their classes, before the first iteration."""

    def before_train(self, runner: Runner) -> None:
        """Check training and validation data."""
        self._check(runner, runner.train_dataloader)
        if runner.val_loop is not None:
            self._check(runner, runner.val_dataloader)

    def before_test(self, runner: Runner) -> None:
        """Check test data."""
        self._check(runner, runner.test_dataloader)

    def _check(self, runner: Runner, loader: DataLoader[Any]) -> None:
        def check() -> None:
            check_segmentation(loader.dataset)
            check_coco(loader.dataset)
            check_heads(runner.model, loader.dataset)

        on_main_process(check)


def checked(dataloader: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a dataloader over a :class:`CheckedDataset`.

    Raises:
        DataError: In all processes, if the first one does not find the folders.
    """
    dataset = dataloader['dataset']
    if isinstance(dataset, Mapping):
        on_main_process(lambda: check_folders(dataset))
    return dict(dataloader, dataset=dict(type='CheckedDataset', dataset=dataset))


@DATASETS.register_module()
class CheckedDataset(DatasetWrapper):
    """A data set with at least one sample, whose errors name the file they are about.

    Args:
        dataset: A data set or its config.

    Raises:
        DataError: If the data set cannot be built from its annotation file or is empty, or later if
            a sample cannot be loaded.
    """

    def __init__(self, dataset: Dataset[Any] | Mapping[str, Any]) -> None:
        super().__init__(_loaded(dataset))

    def __getitem__(self, index: int) -> Any:
        """Return a sample as the wrapped data set does."""
        try:
            return self.dataset[index]
        except DataError:
            raise
        except Exception as e:
            raise DataError(f'{self._file(index)} cannot be loaded: {type(e).__name__}: {e}') from e

    def _file(self, index: int) -> str:
        try:
            return str(self.dataset.get_data_info(int(index))['img_path'])
        except (AttributeError, KeyError):
            return f'sample {int(index)} of {type(self.dataset).__name__}'


def _loaded(dataset: Any) -> Any:
    """Return the data set with its list of samples, which is not empty."""
    cfg, contents = dataset, ''
    if not isinstance(cfg, Mapping):
        cfg = dict(type=type(dataset).__name__, data_root=getattr(dataset, 'data_root', None))
    while isinstance(cfg.get('dataset'), Mapping):
        cfg = cfg['dataset']
    try:
        if isinstance(dataset, Mapping):
            dataset = DATASETS.build(dict(dataset))
        if hasattr(dataset, 'full_init'):
            dataset.full_init()
        if len(dataset) > 0:
            return dataset
    except DataError:
        raise
    except (KeyError, ValueError) as e:
        contents = check_coco_file(cfg)
        if 'need at least one array' not in str(e):  # numpy says this of an empty list of samples
            raise
    raise DataError(
        f'no images are left for {cfg["type"]} in {cfg.get("data_root")}{contents}: see its '
        'data_prefix, img_suffix, ann_file and filter_cfg'
    )


def explain_error(error: Exception) -> Exception:
    """Return an error that says what to do, where torch's own about data loading does not."""
    if isinstance(error, ConnectionError | EOFError):
        # A data loading process has died. Torch raises its own error about that a moment later.
        try:
            time.sleep(1.0)
        except RuntimeError as e:
            error = e
    lines = str(error).rstrip().splitlines()
    if isinstance(error, DataError) and len(lines) > 1:  # with the traceback of another process
        return DataError(lines[-1].partition('DataError: ')[2])
    if str(error).startswith('DataLoader worker'):
        return DataError(
            f'{error}: a data loading process was killed, probably because memory ran out: lower '
            'num_workers of the dataloader'
        )
    return error
