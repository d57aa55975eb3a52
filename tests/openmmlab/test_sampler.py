from collections import Counter

import pytest
from mmengine.registry import DATA_SAMPLERS

from gfnet_dense.openmmlab import sampler as module


def order(size=300, seed=0, epoch=0, **kwargs) -> list[int]:
    cfg = dict(type='RepeatAugSampler', **kwargs)
    sampler = DATA_SAMPLERS.build(cfg, default_args=dict(dataset=range(size), seed=seed))
    sampler.set_epoch(epoch)
    indices = list(sampler)
    assert len(indices) == len(sampler)
    return indices


def test_images_repeat_and_an_epoch_keeps_its_length():
    # timm rounds to a multiple of 256.
    assert len(order()) == 256
    assert Counter(Counter(order()).values()) == {3: 85, 1: 1}
    assert len(order(num_repeats=2, selected_round=0)) == 300


def test_order_follows_seed_and_epoch():
    assert order() == order()
    assert order() != order(epoch=1)
    assert order() != order(seed=1)
    assert order(shuffle=False)[:4] == [0, 0, 0, 1]


@pytest.mark.parametrize('world_size', [2, 3])
def test_repetitions_go_to_different_processes(monkeypatch, world_size):
    shares = []
    for rank in range(world_size):
        monkeypatch.setattr(module, 'get_dist_info', lambda rank=rank: (rank, world_size))
        shares.append(order(selected_round=0, num_repeats=world_size))
    assert [len(share) for share in shares] == [300 // world_size] * world_size
    assert all(share == shares[0] for share in shares)
    assert set(Counter(shares[0]).values()) == {1}


def test_the_epoch_is_the_one_that_was_set():
    """Who resumes a run reads it and sets it again."""
    cfg = dict(type='RepeatAugSampler', dataset=range(300), seed=5)
    sampler = DATA_SAMPLERS.build(cfg)
    sampler.set_epoch(2)
    first = list(sampler)
    sampler.set_epoch(sampler.epoch)
    assert sampler.epoch == 2 and list(sampler) == first


def test_without_a_seed_there_is_one():
    assert len(order(seed=None)) == 256
