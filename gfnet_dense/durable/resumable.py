"""Training data whose order and random numbers follow from the seed and the place in the run alone.

The random numbers of augmentation otherwise come from the history of a process: a resumed run,
which starts its data loading processes anew, or one with another number of them, would see other
crops of the same images.
"""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_dist_info
from mmengine.registry import DATA_SAMPLERS, DATASETS
from torch.utils.data import BatchSampler, Dataset, Sampler

from gfnet_dense.data.coco import check_coco_file
from gfnet_dense.data.errors import DataError


class Sample(int):
    """Index of a sample in its dataset, which also knows its place in the run.

    Attributes:
        place: Epoch, and number within the epoch, counted over all processes.
    """

    place: tuple[int, int]

    def __new__(cls, index: int, place: tuple[int, int]) -> 'Sample':
        """Make the index."""
        sample = super().__new__(cls, index)
        sample.place = place
        return sample

    def __getnewargs__(self) -> tuple[int, tuple[int, int]]:
        """Take the place along into data loading processes."""
        return int(self), self.place


@DATA_SAMPLERS.register_module()
class ResumableBatchSampler(Sampler):
    """Batches of another sampler as :class:`Sample`, from any of them on.

    Args:
        sampler: The sampler of this process.
        batch_size: Samples in a batch.
        drop_last: Leave out a last batch that is not full.
        batch_sampler: Config of what forms the batches, in place of plain batches.
    """

    def __init__(
        self,
        sampler: Sampler,
        batch_size: int,
        drop_last: bool = False,
        batch_sampler: Mapping | None = None,
    ) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.skip = 0  # batches left out of the next iteration, and of that alone
        if batch_sampler is None:
            self._batches = BatchSampler(sampler, batch_size, drop_last)
        else:
            self._batches = DATA_SAMPLERS.build(
                dict(batch_sampler), default_args=dict(sampler=sampler, batch_size=batch_size)
            )

    def __len__(self) -> int:
        """Return the number of batches of an epoch in this process."""
        return len(self._batches)

    def __iter__(self) -> Iterator[list[Sample]]:
        """Yield the batches of an epoch."""
        rank, world_size = get_dist_info()
        epoch = getattr(self.sampler, 'epoch', 0)
        skip, self.skip = self.skip, 0
        for number, batch in enumerate(self._batches):
            if number >= skip:
                first = number * self.batch_size
                yield [
                    Sample(index, (epoch, (first + i) * world_size + rank))
                    for i, index in enumerate(batch)
                ]


@DATASETS.register_module()
class SeededDataset(Dataset):
    """A dataset that draws the random numbers of a :class:`Sample` from its place.

    In all else it stands for the dataset it wraps, attributes included.

    Args:
        dataset: A dataset or its config.
        seed: Seed of the run.

    Raises:
        DataError: If the dataset is not there or empty, or when a sample cannot be loaded.
    """

    def __init__(self, dataset: Dataset | Mapping, seed: int) -> None:
        self.__dict__.update(dataset=_loaded(dataset), seed=seed)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the wrapped dataset."""
        # The dataset is not there yet while unpickled; special methods would go past this class.
        if name == 'dataset' or name.startswith('__'):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of the wrapped dataset, such as its pipeline."""
        setattr(self.dataset, name, value)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        """Return a sample as the wrapped dataset does."""
        seeded = isinstance(index, Sample)
        with _random_numbers_of(self.seed, *index.place) if seeded else nullcontext():
            try:
                return self.dataset[int(index)]
            except DataError:
                raise
            except Exception as e:
                raise DataError(
                    f'{self._file(index)} cannot be loaded: {type(e).__name__}: {e}'
                ) from e

    def _file(self, index: int) -> str:
        try:
            return self.dataset.get_data_info(int(index))['img_path']
        except (AttributeError, KeyError):
            return f'sample {int(index)} of {type(self.dataset).__name__}'


def _loaded(dataset: Dataset | Mapping) -> Dataset:
    """Return the dataset with its list of samples, at least one."""
    cfg, contents = dataset, ''
    if not isinstance(cfg, Mapping):
        cfg = dict(type=type(dataset).__name__, data_root=getattr(dataset, 'data_root', None))
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
        if 'need at least one array' not in str(e):  # numpy's, which joins the samples
            raise
    raise DataError(
        f'no images are left for {cfg["type"]} in {cfg.get("data_root")}{contents}: see its '
        'data_prefix, img_suffix, ann_file and filter_cfg'
    )


def resumable(dataloader: Mapping, seed: int) -> dict:
    """Return the config of a dataloader with :class:`ResumableBatchSampler` over a seeded dataset.

    Args:
        dataloader: Config of a dataloader for training.
        seed: Seed of the run.
    """
    cfg = dict(dataloader)
    cfg['dataset'] = dict(type='SeededDataset', dataset=cfg['dataset'], seed=seed)
    cfg['batch_sampler'] = dict(
        type='ResumableBatchSampler',
        drop_last=cfg.pop('drop_last', False),
        batch_sampler=cfg.get('batch_sampler'),
    )
    return cfg


def seed_random_numbers(*key: int) -> None:
    """Seed python, numpy and torch, on all devices, from a key of numbers that are not negative."""
    torch.manual_seed(_seed_python_and_numpy(key))


@contextmanager
def _random_numbers_of(*key: int) -> Iterator[None]:
    # Without data loading processes the numbers of the model come from the same generators.
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # Not torch.manual_seed: it asks for CUDA, which a forked process does not have.
    torch.default_generator.manual_seed(_seed_python_and_numpy(key))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _seed_python_and_numpy(key: tuple[int, ...]) -> int:
    # SeedSequence makes neighbouring keys into seeds that have nothing in common.
    words = np.random.SeedSequence(key).generate_state(3, np.uint32)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    return int(words[2])
