import pickle
import random

import numpy as np
import pytest
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.runner import Runner
from torch.utils.data import DataLoader, Dataset

from gfnet_dense.data import errors
from gfnet_dense.durable import resumable
from gfnet_dense.durable.data_checks import CheckedDataset
from gfnet_dense.durable.resumable import ResumableBatchSampler, Sample, SeededDataset


class Noise(Dataset):
    """Numbers from every generator that augmentations use."""

    pipeline = None

    def __len__(self):
        return 20

    def __getitem__(self, index):
        if index == 13 and self.pipeline == 'broken':
            raise OSError('truncated')
        return torch.tensor([index, random.random(), np.random.rand(), torch.rand(()).item()])

    def get_data_info(self, index):
        return dict(img_path=f'images/{index}.jpg')


def infinite(monkeypatch, batch_size, rank=0, world_size=1):
    for module in ('mmengine.dataset.sampler', resumable.__name__):
        monkeypatch.setattr(f'{module}.get_dist_info', lambda: (rank, world_size))
    return ResumableBatchSampler(InfiniteSampler(Noise(), seed=4), batch_size)


def take(number, batches):
    return [batch for batch, _ in zip(batches, range(number), strict=False)]


def test_a_place_survives_the_way_into_another_process():
    sample = pickle.loads(pickle.dumps(Sample(3, (1, 42))))
    assert sample == 3 and sample.place == (1, 42)


@pytest.mark.parametrize('workers', [0, 2])
def test_noise_does_not_depend_on_who_draws_it(monkeypatch, workers):
    def draw(workers):
        batches = infinite(monkeypatch, 4)
        loader = DataLoader(SeededDataset(Noise(), 7), batch_sampler=batches, num_workers=workers)
        return torch.cat(take(10, loader))

    torch.manual_seed(0)
    expected = draw(0)
    assert torch.equal(draw(workers), expected)
    # Every pass over the data sees other noise, on each generator.
    assert expected[:, 0].unique().numel() == 20 < len(expected)
    for column in (1, 2, 3):
        assert expected[:, column].unique().numel() == len(expected)


def test_the_models_random_numbers_are_left_alone():
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    SeededDataset(Noise(), 7)[Sample(1, (0, 1))]
    assert states[0] == random.getstate()
    assert states[1] == np.random.get_state()[1].tolist()
    assert states[2] == torch.get_rng_state().tolist()


def test_processes_share_the_samples_of_one(monkeypatch):
    def samples(*args):
        return [[(int(s), s.place) for s in batch] for batch in take(6, infinite(*args))]

    one = samples(monkeypatch, 4)
    two = [samples(monkeypatch, 2, rank, 2) for rank in range(2)]
    for step in range(6):
        assert sorted(two[0][step] + two[1][step]) == sorted(one[step])
    assert one[0][0][1] == (0, 0) and one[5][3][1] == (0, 23)


def test_skipping_is_for_the_next_iteration_alone():
    batches = ResumableBatchSampler(range(10), batch_size=4)
    batches.skip = 1
    assert [[*batch] for batch in batches] == [[4, 5, 6, 7], [8, 9]]
    assert [[*batch] for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert next(iter(batches))[1].place == (0, 1)
    assert [*ResumableBatchSampler(range(10), batch_size=4, drop_last=True)][-1] == [4, 5, 6, 7]


def test_a_dataset_keeps_its_attributes():
    dataset = pickle.loads(pickle.dumps(SeededDataset(Noise(), 7)))
    dataset.pipeline = 'other'
    assert dataset.pipeline == dataset.dataset.pipeline == 'other'
    with pytest.raises(AttributeError, match='no_such'):
        _ = dataset.no_such


@pytest.mark.parametrize('workers', [0, 1])
def test_a_sample_that_cannot_be_loaded_is_named(workers):
    noise = Noise()
    noise.pipeline = 'broken'
    batches = ResumableBatchSampler(range(20), batch_size=4)
    dataset = CheckedDataset(SeededDataset(noise, 7))
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=workers)
    with pytest.raises(errors.DataError, match=r'images/13\.jpg cannot be loaded: OSError: trunc'):
        list(loader)


def test_batches_may_be_formed_by_another_sampler():
    mmdet = pytest.importorskip('mmdet.datasets')
    import mmcv.ops  # noqa: F401  what mmdet needs is there

    class Shapes(Noise):
        def get_data_info(self, index):
            return dict(width=2 if index % 3 else 1, height=1 if index % 3 else 2)

    config = dict(
        batch_size=4,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=True),
        dataset=Shapes(),
        batch_sampler=dict(type=mmdet.samplers.AspectRatioBatchSampler),
    )
    loader = Runner.build_dataloader(resumable.resumable(config, 7), seed=7)
    whole = [batch[0] for batch in loader.batch_sampler]
    batches = [[int(s) for s in batch] for batch in loader.batch_sampler]
    assert all(len({i % 3 == 0 for i in batch}) == 1 for batch in batches[:-1])
    loader.batch_sampler.skip = 2
    assert [batch[0] for batch in loader.batch_sampler] == whole[2:]
