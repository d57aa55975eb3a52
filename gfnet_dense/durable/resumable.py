"""Data, random numbers and validations of a resumed run, as if it had never been interrupted.

Augmentations draw random numbers from the generators of the process they run in. A resumed run
starts its data loading processes anew, and may start another number of them, so it would see other
crops of the same images. Here all random numbers follow from the seed and the place in the run.
"""

import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_dist_info
from mmengine.hooks import Hook
from mmengine.registry import DATA_SAMPLERS, DATASETS, HOOKS
from mmengine.runner import IterBasedTrainLoop, Runner
from torch.utils.data import BatchSampler, Dataset, Sampler

from gfnet_dense.data.contents import keep_random_state

from .interrupts import SAMPLES_OF_EPOCH
from .wrapper import DatasetWrapper


class Sample(int):
    """Index of a sample in its data set, which also knows its place in the run.

    The place is the epoch, and the number within the epoch, counted over all processes.
    """

    place: tuple[int, int]

    def __new__(cls, index: int, place: tuple[int, int]) -> 'Sample':
        """Make the index."""
        sample = super().__new__(cls, index)
        sample.place = place
        return sample

    def __getnewargs__(self) -> tuple[int, tuple[int, int]]:  # type: ignore[override]
        """Keep the place on the way into data loading processes."""
        return int(self), self.place


@DATA_SAMPLERS.register_module()
class ResumableBatchSampler(Sampler[list[Sample]]):
    """Batches of another sampler as :class:`Sample`, starting from any batch.

    Args:
        sampler: The sampler of this process.
        batch_size: Samples in a batch.
        drop_last: Leave out a last batch that is not full.
        batch_sampler: Config of a sampler that forms the batches, instead of plain batches.

    Attributes:
        drop_last: Whether a last batch that is not full is left out.
        epoch: How many epochs were complete before this process began; added to the sampler's own.
        skip: How many batches to skip in the next iteration over the sampler, and only there.
    """

    def __init__(
        self,
        sampler: Any,
        batch_size: int,
        drop_last: bool = False,
        batch_sampler: Mapping[str, Any] | None = None,
    ) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.epoch = 0
        self.skip = 0
        if batch_sampler is None:
            self._batches = BatchSampler(sampler, batch_size, drop_last)
        else:
            self._batches = DATA_SAMPLERS.build(
                dict(batch_sampler), default_args=dict(sampler=sampler, batch_size=batch_size)
            )
        self.drop_last: bool = getattr(self._batches, 'drop_last', False)

    def __len__(self) -> int:
        """Return the number of batches of an epoch in this process."""
        return len(self._batches)

    def __iter__(self) -> Iterator[list[Sample]]:
        """Yield the batches of an epoch."""
        rank, world_size = get_dist_info()
        epoch = self.epoch + getattr(self.sampler, 'epoch', 0)
        if self.epoch:
            self.sampler.set_epoch(epoch)
        skip, self.skip = self.skip, 0
        for number, batch in enumerate(self._batches):
            if number >= skip:
                first = number * self.batch_size
                yield [
                    Sample(index, (epoch, (first + i) * world_size + rank))
                    for i, index in enumerate(batch)
                ]


@DATASETS.register_module()
class SeededDataset(DatasetWrapper):
    """A data set that draws the random numbers of a :class:`Sample` from its place in the run.

    `dataset` is a data set or its config, `seed` the seed of the run.
    """

    seed: int

    def __init__(self, dataset: Dataset[Any] | Mapping[str, Any], seed: int) -> None:
        if isinstance(dataset, Mapping):
            dataset = DATASETS.build(dict(dataset))
        super().__init__(dataset)
        self.__dict__['seed'] = seed

    def __getitem__(self, index: int) -> Any:
        """Return a sample as the wrapped data set does."""
        if not isinstance(index, Sample):
            return self.dataset[index]
        # Without data loading processes, the model draws from the same generators.
        with keep_random_state():
            # Not torch.manual_seed: it initialises CUDA, which a forked process cannot do.
            seed = _seed_python_and_numpy((self.seed, *index.place))
            torch.default_generator.manual_seed(seed)
            return self.dataset[int(index)]


def resumable(dataloader: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return a training dataloader's config with seeded data and a resumable batch sampler."""
    cfg = dict(dataloader)
    cfg['dataset'] = dict(type='SeededDataset', dataset=cfg['dataset'], seed=seed)
    cfg['batch_sampler'] = dict(
        type='ResumableBatchSampler',
        drop_last=cfg.pop('drop_last', False),
        batch_sampler=cfg.get('batch_sampler'),
    )
    return cfg


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """Continue a resumed run at the same sample and with the same random numbers.

    mmengine restores weights, optimizer and schedules. This hook restores the place in the data,
    also within an epoch. Random numbers follow from seed, rank and iteration.
    """

    priority = 'LOW'  # after mmengine's hook that sets the epoch of the sampler

    def before_train_epoch(self, runner: Runner) -> None:
        """Skip the batches that the run has already trained on, without loading them."""
        loop = runner.train_loop
        batches = loop.dataloader.batch_sampler
        if not isinstance(batches, ResumableBatchSampler):  # a dataloader that was given built
            return
        if isinstance(loop, IterBasedTrainLoop):
            batches.skip = runner.iter
            if hasattr(batches.sampler, 'epoch'):  # not infinite
                batches.epoch, batches.skip = divmod(runner.iter, len(batches))
            # mmengine's own skipping would load the batches.
            loop.dataloader_iterator.skip_iter = lambda num_iters: None
        else:
            # Counted in samples: a resumed run may have another batch or number of processes.
            samples = runner.message_hub.get_info(SAMPLES_OF_EPOCH, 0)
            batches.skip = samples // (batches.batch_size * runner.world_size)
            runner.message_hub.update_info(SAMPLES_OF_EPOCH, 0)

    def before_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Seed the random numbers of the iteration."""
        torch.manual_seed(_seed_python_and_numpy((runner.seed, runner.rank, runner.iter)))


@HOOKS.register_module()
class ValidationOnResumeHook(Hook):
    """Validate first if the run was interrupted where a validation was due.

    A checkpoint is saved before the validation of the same iteration.
    """

    priority = 'LOWEST'
    _training = False

    def before_train(self, runner: Runner) -> None:
        """Validate if that was due and has not been done."""
        self._training = True
        if runner.val_loop is None or runner.iter == 0:
            return
        loop = runner.train_loop
        done, last = _progress(runner), loop.max_epochs
        if isinstance(loop, IterBasedTrainLoop):
            last = loop.max_iters
        elif runner.message_hub.get_info(SAMPLES_OF_EPOCH, 0):  # interrupted within an epoch
            return
        due = done >= loop.val_begin and (done % loop.val_interval == 0 or done == last)
        if due and runner.message_hub.get_info('validated', None) != done:
            runner.val_loop.run()

    def before_val_epoch(self, runner: Runner) -> None:
        """Note what is being validated; until that is done, no checkpoint is saved."""
        if self._training:
            runner.message_hub.update_info('validated', _progress(runner))


def _progress(runner: Runner) -> int:
    """Return the number of complete iterations or epochs, whichever the run counts."""
    by_iteration = isinstance(runner.train_loop, IterBasedTrainLoop)
    return int(runner.iter if by_iteration else runner.epoch)


def _seed_python_and_numpy(key: tuple[int, ...]) -> int:
    """Seed python and numpy from a key of non-negative numbers, and return a seed for torch."""
    # SeedSequence turns neighbouring keys into unrelated seeds.
    words = np.random.SeedSequence(key).generate_state(3, np.uint32)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    return int(words[2])
