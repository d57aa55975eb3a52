import multiprocessing
import os

import numpy as np
import pytest
import torch
from mmengine.dataset import DefaultSampler
from mmengine.registry import METRICS

from gfnet_dense.openmmlab import Accuracy


def predictions(count: int, classes: int = 10) -> list[dict]:
    rng = np.random.default_rng(7)
    return [
        dict(
            pred_score=torch.tensor(rng.permutation(classes) / classes),
            gt_label=int(rng.integers(classes)),
        )
        for _ in range(count)
    ]


def expected(samples: list[dict], k: int) -> float:
    """Rank the classes with numpy."""
    hits = [s['gt_label'] in np.argsort(s['pred_score'].numpy())[::-1][:k] for s in samples]
    return 100 * float(np.mean(hits))


@pytest.mark.parametrize('batch', [1, 7, 31])
def test_images_count_alike_however_they_are_batched(batch):
    samples = predictions(31)
    metric = METRICS.build(dict(type='Accuracy', topk=(1, 3, 5)))
    for start in range(0, 31, batch):
        metric.process({}, samples[start : start + batch])
    found = metric.evaluate(31)
    assert found == pytest.approx({f'accuracy/top{k}': expected(samples, k) for k in (1, 3, 5)})
    assert 0 < found['accuracy/top1'] < found['accuracy/top5'] < 100


def test_fewer_classes_than_k():
    metric = Accuracy()
    metric.process({}, predictions(20, classes=3))
    assert metric.evaluate(20)['accuracy/top5'] == 100


def evaluate_in_process(rank: int, place: str, samples: list[dict]) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE='2', LOCAL_RANK=str(rank))
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{place}/rendezvous', rank=rank, world_size=2
    )
    metric = Accuracy(collect_dir=f'{place}/collected')
    indices = list(DefaultSampler(samples, shuffle=False))
    for start in range(0, len(indices), 4):
        metric.process({}, [samples[i] for i in indices[start : start + 4]])
    found = metric.evaluate(len(samples))
    with open(f'{place}/{rank}', 'w') as file:
        file.write(repr(found))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize('count', [30, 31])
def test_two_processes_give_the_number_of_one(tmp_path, count):
    samples = predictions(count)
    metric = Accuracy()
    metric.process({}, samples)
    alone = metric.evaluate(count)
    # Forked, so that they need not import anything.
    context = multiprocessing.get_context('fork')
    processes = [
        context.Process(target=evaluate_in_process, args=(rank, str(tmp_path), samples))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == [repr(alone)] * 2
