"""Data checks of a run, and errors that name the file of a sample that cannot be loaded."""

import time
from collections.abc import Mapping
from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import DATASETS, HOOKS
from mmengine.runner import Runner
from torch.utils.data import DataLoader, Dataset

from gfnet_dense.data.build import build_dataset
from gfnet_dense.data.checks import check_folders
from gfnet_dense.data.errors import DataError, raise_first
from gfnet_dense.data.evaluation import wanted_numbers
from gfnet_dense.data.report import evaluator_files, inspect, single_process

from .ranks import on_main_process
from .summary import unwrapped
from .wrapper import DatasetWrapper


@HOOKS.register_module()
class CheckDataHook(Hook):
    """Check the data before the first iteration, and log what they hold."""

    def before_train(self, runner: Runner) -> None:
        """Check training and validation data."""
        self._check(runner, 'train', runner.train_dataloader)
        if runner.val_loop is not None:
            self._check(runner, 'val', runner.val_dataloader)

    def before_test(self, runner: Runner) -> None:
        """Check test data."""
        self._check(runner, 'test', runner.test_dataloader)

    def _check(self, runner: Runner, use: str, loader: DataLoader[Any]) -> None:
        # Asking for a loop builds it.
        loop = None if use == 'train' else getattr(runner, f'{use}_loop')

        wanted = wanted_numbers(runner.hooks, runner.param_schedulers) if use == 'val' else ()

        def check() -> None:
            try:
                report = inspect(
                    use,
                    loader,
                    model=unwrapped(runner.model),
                    metrics=loop.evaluator.metrics if loop is not None else (),
                    wanted=wanted,
                    ann_files=evaluator_files(runner.cfg.get(f'{use}_evaluator')),
                    training=runner.train_dataloader.dataset if use == 'val' else None,
                )
            except DataError:
                raise
            except Exception:  # a data set that the checks were not made for can still be right
                runner.logger.warning(f'{use} data could not be checked', exc_info=True)
                return
            if report.contents or report.findings:
                runner.logger.info(str(report))
            raise_first(report.findings)

        on_main_process(check)


def checked(dataloader: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a dataloader over a :class:`CheckedDataset`.

    Raises:
        DataError: In all processes, if the first one does not find the folders.
    """
    dataset = dataloader['dataset']
    if isinstance(dataset, Mapping):
        on_main_process(lambda: check_folders(dataset))
    checked_dataset = dict(type='CheckedDataset', dataset=dataset)
    return dict(single_process(dataloader), dataset=checked_dataset)


@DATASETS.register_module()
class CheckedDataset(DatasetWrapper):
    """A data set with at least one sample, whose errors name the file they are about.

    `dataset` is a data set or its config.

    Raises:
        DataError: If the data set cannot be built from its annotation file or is empty, or later if
            a sample cannot be loaded.
    """

    def __init__(self, dataset: Dataset[Any] | Mapping[str, Any]) -> None:
        super().__init__(build_dataset(dataset))

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
