"""Classifiers through the whole engine: data, loop, metric, switches, checkpoints."""

import argparse
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

from gfnet_dense.data import DataError
from gfnet_dense.openmmlab import evaluate, find_config, train

CLASSES = ('cat', 'dog', 'owl')
MIXUP = dict(mixup_alpha=0.8, cutmix_alpha=1.0, switch_prob=0.5)


@pytest.fixture(scope='module')
def images(tmp_path_factory) -> Path:
    """Noise of three brightnesses: 8 and 5 images of each class."""
    root = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for split, count in (('train', 8), ('val', 5)):
        for level, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(80, size=(20, 24, 3)) + 80 * level
                path = root / split / name / f'{i}.JPEG'
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    return root


@pytest.fixture
def config(images, tmp_path) -> Config:
    """The config of the digits, smaller, for these images."""
    cfg = Config.fromfile(find_config('gfnet_nano_digits'))
    cfg.work_dir = str(tmp_path / 'run')
    # mmengine gives two runs of one name and one second the log file of the first.
    cfg.experiment_name = tmp_path.name
    cfg.model.backbone = dict(
        type='GFNetPyramid',
        arch=dict(embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1)),
        img_size=32,
        num_classes=3,
    )
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(num_workers=0, persistent_workers=False, batch_size=4)
        loader.dataset.update(data_root=str(images), num_classes=3)
        loader.dataset.transform.input_size = 32
    cfg.train_cfg.max_epochs = 2
    cfg.param_scheduler[0].update(t_initial=2)
    cfg.auto_scale_lr.base_batch_size = 4
    cfg.default_hooks.logger.interval = 1
    return cfg


def log(cfg: Config) -> str:
    return max(Path(cfg.work_dir).glob('*/*.log')).read_text()


def accuracy(text: str) -> float:
    return float(re.findall(r'accuracy/top1: (\d+\.\d+)', text)[-1])


def test_a_run_learns_and_its_checkpoint_evaluates_alike(config, tmp_path):
    config.train_cfg.max_epochs = config.param_scheduler[0].t_initial = 4
    config.optim_wrapper.optimizer.lr = 1e-2
    train(config, seed=1)
    text = log(config)
    assert accuracy(text) > 60
    path = Path(config.work_dir, 'epoch_4.pth')
    out = tmp_path / 'all.pkl'
    found = evaluate(config, path, work_dir=str(tmp_path / 'test'), out=str(out))
    assert found['accuracy/top1'] == pytest.approx(accuracy(text), abs=1e-4)
    assert found['accuracy/top5'] == 100  # of three classes
    dumped = pickle.loads(out.read_bytes())
    right = [sample['pred_label'] == sample['gt_label'] for sample in dumped]
    assert 100 * np.mean(right) == pytest.approx(found['accuracy/top1'])
    assert {Path(sample['img_path']).parent.name for sample in dumped} == set(CLASSES)
    assert torch.load(path, weights_only=False)['meta']['dataset_meta']['classes'] == CLASSES


def test_every_switch_can_be_turned_on(config, tmp_path):
    """Mixing, random erasing, repeated augmentation and a moving average of the weights."""
    config.model.data_preprocessor.mixup = MIXUP
    config.model.data_preprocessor.random_erasing = dict(probability=0.25, mode='pixel')
    config.train_dataloader.sampler = dict(type='RepeatAugSampler')
    config.custom_hooks = [dict(type='EMAHook', momentum=0.1)]
    runner = train(config, seed=0)
    assert runner.iter == 12
    path = Path(config.work_dir, 'epoch_2.pth')
    checkpoint = torch.load(path, weights_only=False)
    key = 'backbone.head.weight'
    average, last = checkpoint['state_dict'][key], runner.model.state_dict()[key]
    assert not torch.equal(average, last)
    assert torch.equal(checkpoint['ema_state_dict'][f'module.{key}'], last)
    # What training evaluated, and what is evaluated of the checkpoint, is the average.
    trained = accuracy(log(config))
    config.custom_hooks = []
    found = evaluate(config, path, work_dir=str(tmp_path / 'test'))
    assert found['accuracy/top1'] == pytest.approx(trained, abs=1e-4)
    # With the hook, too, and of files of weights alone.
    config.custom_hooks = [dict(type='EMAHook', momentum=0.1)]
    weights = {k.removeprefix('backbone.'): v for k, v in checkpoint['state_dict'].items()}
    for content in (weights, dict(model=weights, args=argparse.Namespace(lr=1e-3))):
        torch.save(content, tmp_path / 'weights.pth')
        found = evaluate(config, tmp_path / 'weights.pth', work_dir=str(tmp_path / 'test'))
        assert found['accuracy/top1'] == pytest.approx(trained, abs=1e-4)


def test_a_resumed_run_goes_on_in_schedule_data_and_weights(config, tmp_path):
    config.model.data_preprocessor.mixup = MIXUP
    whole = train(config, seed=0).model.state_dict()
    config.work_dir = str(tmp_path / 'again')
    first = tmp_path / 'run' / 'epoch_1.pth'
    resumed = train(config, resume=str(first)).model.state_dict()
    for key, value in whole.items():
        assert torch.equal(resumed[key], value), key


def test_learning_rate_scales_with_the_total_batch_visibly(config):
    config.train_cfg.max_epochs = 1
    config.auto_scale_lr.base_batch_size = 32
    config.optim_wrapper.accumulative_counts = 2
    runner = train(config, seed=0)
    assert runner.optim_wrapper.param_groups[0]['initial_lr'] == pytest.approx(2e-3 * 8 / 32)
    text = log(config)
    assert re.search(r'total batch +8 \(4 in each of 1 processes, 2 accumulated\)', text)
    assert re.search(r'learning rate +0\.0005, scaled to the total batch from that for 32', text)
    # The warm-up starts from what the config says, scaled or not.
    assert re.search(r'Epoch\(train\) +\[1\]\[1/6\] +base_lr: 5\.0000e-04', text)


def test_a_learning_rate_below_the_floor_of_its_schedule_is_named(config):
    config.train_cfg.max_epochs = 1
    train(config, seed=0)
    assert 'of the schedule' not in log(config)
    config.work_dir += '2'
    config.experiment_name += '2'
    config.auto_scale_lr.base_batch_size = 4 * 400
    train(config, seed=0)
    line = re.search(r'learning rate +5e-06, scaled .*', log(config))[0]
    assert 'below the lr_min 1e-05 of the schedule' in line
    assert 'below the warmup_lr_init 0.0005 of the schedule' in line


def test_too_few_images_for_a_batch_are_an_error(config):
    config.train_dataloader.batch_size = 26
    with pytest.raises(DataError, match=r'24 images do not fill a batch.*drop_last=False'):
        train(config, seed=0)


def test_a_broken_image_ends_the_run_with_its_name(config, images, tmp_path):
    broken = tmp_path / 'broken'
    for path in images.rglob('*.JPEG'):
        copy = broken / path.relative_to(images)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    bad = broken / 'train' / 'owl' / '7.JPEG'
    bad.write_bytes(bad.read_bytes()[:100])
    config.train_dataloader.dataset.data_root = str(broken)
    with pytest.raises(DataError, match=str(bad)):
        train(config, seed=0)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(out='labels'), r'\.pkl file'),
        (dict(show_dir='pictures'), 'no visualization hook'),
        (dict(tta=True), 'no tta_model'),
    ],
)
def test_what_has_no_meaning_for_classifiers_is_refused(config, tmp_path, options, message):
    (tmp_path / 'a.pth').write_bytes(b'')
    with pytest.raises(ValueError, match=message):
        evaluate(config, tmp_path / 'a.pth', **options)
