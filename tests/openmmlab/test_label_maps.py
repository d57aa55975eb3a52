import numpy as np
import pytest
import torch
from PIL import Image

from gfnet_dense.data import DataError
from gfnet_dense.openmmlab import LabelMaps


def sample(path, label=3, **options):
    return dict(img_path=str(path), pred_sem_seg=dict(data=torch.full((1, 4, 6), label)), **options)


def test_folders_of_images_are_kept(tmp_path):
    """Two images of each city, with equal names, as in Cityscapes."""
    metric = LabelMaps(tmp_path / 'out', tmp_path / 'images')
    names = [f'{city}/{i}' for city in ('a', 'b', 'c', 'd') for i in (0, 1)]
    samples = [sample(tmp_path / 'images' / f'{n}.jpg', i) for i, n in enumerate(names)]
    metric.process({}, samples)
    metric.process({}, samples[:1])  # several processes see an image twice
    for i, name in enumerate(names):
        labels = np.asarray(Image.open(tmp_path / 'out' / f'{name}.png'))
        assert labels.shape == (4, 6) and (labels == i).all()
    assert len(list((tmp_path / 'out').rglob('*.png'))) == 8
    assert metric.evaluate(9) == {}


def test_labels_are_those_of_the_files(tmp_path):
    metric = LabelMaps(tmp_path)
    metric.process({}, [sample('a.jpg', 3, reduce_zero_label=True), sample('b.jpg', 300)])
    assert np.asarray(Image.open(tmp_path / 'a.png')).max() == 4
    assert np.asarray(Image.open(tmp_path / 'b.png')).max() == 300


def test_two_images_never_share_a_file(tmp_path):
    metric = LabelMaps(tmp_path, 'root')
    with pytest.raises(DataError, match=r'x/a\.jpg and y/a\.jpg would both be written to .*a\.png'):
        metric.process({}, [sample('x/a.jpg'), sample('y/a.jpg')])
