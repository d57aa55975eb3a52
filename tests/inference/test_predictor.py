"""Predictions beside those of OpenMMLab and timm, and what a prediction shows and saves."""

import io
import itertools
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config
from mmengine.registry import MODELS
from PIL import Image
from random_models import (
    CLASSIFIER,
    DETECTOR,
    INSTANCE_SEGMENTOR,
    SEGMENTOR,
    SIZES,
    random_checkpoint,
)
from timm.data import create_transform

import gfnet_dense
from gfnet_dense.demo import CLASSES, PALETTE
from gfnet_dense.inference import InputError, Prediction, Predictor, find_task, predictor
from gfnet_dense.inference.drawing import draw_labels
from gfnet_dense.openmmlab import find_config
from gfnet_dense.serialization import CheckpointError


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory) -> Path:
    return random_checkpoint(SEGMENTOR, tmp_path_factory.mktemp('weights'))


@pytest.fixture(scope='module')
def segmentor(checkpoint) -> Predictor:
    return gfnet_dense.load(SEGMENTOR, checkpoint, 'cpu', batch_size=2)


# Segmentation


def test_labels_are_those_of_mmseg(segmentor, checkpoint, images):
    from mmseg.apis import inference_model, init_model

    model = init_model(str(find_config(SEGMENTOR)), str(checkpoint), device='cpu')
    predictions = segmentor.predict(images)
    labels = set()
    for image, prediction in zip(images, predictions, strict=True):
        bgr = np.ascontiguousarray(image[:, :, ::-1])
        expected = inference_model(model, bgr).pred_sem_seg.data[0].numpy()
        assert prediction.labels.dtype == np.uint8
        # Batches of two round otherwise, where two classes are equally probable.
        assert (prediction.labels != expected).mean() < 0.001
        np.testing.assert_array_equal(prediction.image, image)
        labels |= set(np.unique(expected))
    assert len(labels) > 2


def test_one_image_in_any_form(segmentor, images, tmp_path):
    expected = segmentor.predict(images[1]).labels
    Image.fromarray(images[1]).save(tmp_path / 'a.png')
    tensor = torch.from_numpy(images[1].copy()).movedim(-1, 0)
    file = io.BytesIO((tmp_path / 'a.png').read_bytes())
    for source in (
        tmp_path / 'a.png', str(tmp_path / 'a.png'), file, Image.fromarray(images[1]), tensor,
    ):  # fmt: skip
        prediction = segmentor.predict(source)
        assert isinstance(prediction, Prediction)
        np.testing.assert_array_equal(prediction.labels, expected)


@pytest.mark.parametrize('source', [b'png', bytearray(), {}, set()])
def test_containers_that_are_no_images_are_refused(segmentor, source):
    with pytest.raises(TypeError, match='is no image: give a path, a binary file, an array'):
        segmentor.predict(source)


def test_iterators_are_read_no_further_than_needed(segmentor, images):
    read = []

    def endless():
        for i in itertools.count():
            read.append(i)
            yield images[i % len(images)]

    found = segmentor.predict(endless())
    for i in range(3):
        assert next(found).image.shape == images[i].shape
    assert len(read) < 40
    found.close()


def test_a_broken_image_costs_no_other_one(segmentor, images, tmp_path):
    (tmp_path / 'broken.jpg').write_text('text')
    sources = [images[0], tmp_path / 'broken.jpg', np.zeros((3, 3, 9)), images[2]]
    results = [result for _, result in segmentor.stream(sources)]
    assert [type(result) for result in results] == [Prediction, InputError, InputError, Prediction]
    assert str(tmp_path / 'broken.jpg') in str(results[1])
    with pytest.raises(InputError, match=r'broken\.jpg cannot be read: it is no image'):
        segmentor.predict(sources)


def test_an_image_on_which_the_network_fails_costs_no_other_one(segmentor, images, monkeypatch):
    test_step = segmentor._network.test_step

    def fail_on_black(data):
        if any(not inputs.any() for inputs in data['inputs']):
            raise RuntimeError('black\nat some length')
        return test_step(data)

    monkeypatch.setattr(segmentor._network, 'test_step', fail_on_black)
    black = np.zeros_like(images[0])
    results = [result for _, result in segmentor.stream([images[0], black, images[2]])]
    assert [type(result) for result in results] == [Prediction, RuntimeError, Prediction]
    assert str(results[1]) == 'an image (ndarray): the network fails: RuntimeError: black'


def test_scores_are_the_probabilities_of_the_labels(segmentor, checkpoint, images, monkeypatch):
    from mmseg.apis import inference_model, init_model

    model = init_model(str(find_config(SEGMENTOR)), str(checkpoint), device='cpu')
    for i in (0, 1):
        prediction = segmentor.predict(images[i])
        bgr = np.ascontiguousarray(images[i][:, :, ::-1])
        expected = inference_model(model, bgr).seg_logits.data.softmax(dim=0).max(dim=0).values
        assert prediction.scores.dtype == np.float32
        np.testing.assert_allclose(prediction.scores, expected, atol=1e-4)
    chosen = gfnet_dense.load(SEGMENTOR, checkpoint, 'cpu', classes=[CLASSES[0]])
    prediction = chosen.predict(images[0])
    np.testing.assert_array_equal(prediction.scores == 0, prediction.labels == 255)

    # A window by itself, within a larger image
    tiled = gfnet_dense.load(SEGMENTOR, checkpoint, 'cpu', tile=64)
    found = tiled.predict(np.tile(images[0], (2, 2, 1))).scores[:32, :32]
    np.testing.assert_allclose(found, segmentor.predict(images[0]).scores[:32, :32], atol=1e-4)

    # One channel, beside a threshold of 0.3
    head = segmentor.model.decode_head
    monkeypatch.setattr(head, 'out_channels', 1)
    monkeypatch.setattr(head, 'threshold', 0.3)
    labels, scores = segmentor._resized(torch.tensor([[[0.2, 0.35, 0.9]]]), (1, 3))
    assert labels.tolist() == [[0, 1, 1]]
    torch.testing.assert_close(scores, torch.tensor([[0.8, 0.35, 0.9]]))


def test_a_cascade_decides_by_its_last_head(images, tmp_path):
    cfg = Config.fromfile(find_config(SEGMENTOR))
    last = dict(in_channels=cfg.model.decode_head.in_channels[-1], in_index=-1, channels=8)
    common = dict(last, num_classes=len(CLASSES), norm_cfg=dict(type='BN'))
    cfg.model.type, cfg.model.num_stages = 'CascadeEncoderDecoder', 2
    cfg.model.decode_head = [
        dict(common, type='FCNHead', num_convs=1, concat_input=False),
        dict(common, type='OCRHead', ocr_channels=4),
    ]
    with MODELS.switch_scope_and_registry('mmseg') as registry:
        model = registry.build(cfg.model)
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'cascade.pth')
    result = gfnet_dense.load(cfg, tmp_path / 'cascade.pth', 'cpu').predict(images[0])
    assert result.labels.shape == images[0].shape[:2]


@pytest.mark.slow
def test_nan_reaches_no_result(images, tmp_path):
    for name in (SEGMENTOR, DETECTOR, CLASSIFIER):
        path = random_checkpoint(name, tmp_path)
        model = gfnet_dense.load(name, path, 'cpu', batch_size=2)
        network, test_step = model._network, model._network.test_step

        def broken(data, test_step=test_step):
            """As after an overflow: the second image of the batch is black."""
            outputs = test_step(data)
            for inputs, output in zip(data['inputs'], outputs, strict=True):
                if not inputs.any():
                    if 'seg_logits' in output:
                        values = output.seg_logits.data
                    elif 'pred_instances' in output:
                        values = output.pred_instances.bboxes
                    else:
                        values = output.pred_score
                    values[:] = float('nan')
            return outputs

        network.test_step = broken
        black = np.zeros_like(images[0])
        results = [result for _, result in model.stream([images[0], black, images[2]])]
        assert [type(result) for result in results] == [Prediction, RuntimeError, Prediction]
        assert 'NaN or infinite' in str(results[1])


def test_windows_keep_the_resolution_of_the_image(checkpoint):
    cfg = Config.fromfile(find_config(SEGMENTOR))
    steps = cfg.test_dataloader.dataset.pipeline
    steps.insert(2, dict(type='ResizeToMultiple', size_divisor=32))
    tiled = gfnet_dense.load(cfg, checkpoint, 'cpu', tile=48)
    shapes = []
    tiled._test_step = lambda data: shapes.extend(d['inputs'].shape for d in data) or [][0]
    with pytest.raises(IndexError):
        next(tiled._window_scores(np.zeros((48, 96, 3), np.uint8), 0, [0], 48, 48))
    assert shapes == [(3, 48, 48)]


def test_large_maps_are_resized_piece_by_piece(segmentor, images, monkeypatch):
    large = np.asarray(Image.fromarray(images[3]).resize((300, 211)))
    whole = segmentor.predict(large).labels
    monkeypatch.setattr(predictor, '_NUMBERS', 11 * 300 * 10)
    assert (segmentor.predict(large).labels != whole).mean() < 1e-4


def test_rows_of_a_resized_map():
    scores = torch.randn(3, 7, 5)
    for shape, corners in itertools.product([(20, 9), (4, 3), (7, 5)], [True, False]):
        expected = torch.nn.functional.interpolate(
            scores[None], shape, mode='bilinear', align_corners=corners
        )[0]
        rows = [
            predictor._resize_rows(scores, i, min(i + 3, shape[0]), shape, corners)
            for i in range(0, shape[0], 3)
        ]
        torch.testing.assert_close(torch.cat(rows, dim=1), expected)


class Tiles:
    """Stands for the network: the classes of a window are its channels, or its number's."""

    def __init__(self, segmentor: Predictor, monkeypatch, by_number: bool) -> None:
        self.number = 0
        self.by_number = by_number
        monkeypatch.setattr(segmentor, '_test_step', self)
        monkeypatch.setattr(segmentor, 'tile', 64)

    def __call__(self, data):
        return [self.output(each['inputs']) for each in data]

    def output(self, inputs):
        scores = inputs.float().flip(0)  # as RGB
        if self.by_number:
            scores = torch.zeros_like(scores)
            scores[self.number % 3] = 4
            self.number += 1
        sample = type('Sample', (), {})()
        sample.seg_logits = type('Data', (), {'data': scores})()
        return sample


@pytest.mark.parametrize('shape', [(64, 65), (64, 300), (300, 65), (211, 187), (129, 50)])
def test_tiles_cover_every_pixel_once(segmentor, monkeypatch, shape):
    Tiles(segmentor, monkeypatch, by_number=False)
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    # All three channels differ, so that the highest one is clear.
    image = (image // 3 * 3 + np.array([0, 1, 2])).clip(0, 255).astype(np.uint8)
    np.testing.assert_array_equal(segmentor.predict(image).labels, image.argmax(axis=2))


def test_tiles_are_blended_in_the_middle_of_their_overlap(segmentor, monkeypatch):
    Tiles(segmentor, monkeypatch, by_number=True)
    labels = segmentor.predict(np.zeros((64, 112, 3), np.uint8)).labels
    # Windows of columns 0 to 63 and 48 to 111.
    assert (labels[:, :56] == 0).all() and (labels[:, 56:] == 1).all()


def test_tiles_of_the_network(checkpoint, images):
    tiled = gfnet_dense.load(SEGMENTOR, checkpoint, 'cpu', tile='auto')
    assert tiled.tile == 64
    large = np.tile(images[0], (2, 2, 1))
    labels = tiled.predict(large).labels
    assert labels.shape == (128, 128)
    # Far from other windows, a window is what the network makes of it alone.
    assert (labels[:40, :40] == tiled.predict(images[0]).labels[:40, :40]).mean() > 0.99


def test_test_time_augmentation_averages_the_views(checkpoint, segmentor, images):
    image = images[0]
    averaged = gfnet_dense.load(SEGMENTOR, checkpoint, 'cpu', tta=True).predict(image)
    total = 0
    for side in (48, 64, 80):
        import mmcv

        view = mmcv.imresize(image[:, :, ::-1], (side, side))
        data = segmentor.model.data_preprocessor(
            dict(inputs=[torch.from_numpy(view.transpose(2, 0, 1).copy())])
        )
        with torch.no_grad():
            scores = segmentor.model.encode_decode(data['inputs'], [dict(img_shape=(side, side))])
        scores = torch.nn.functional.interpolate(scores, (64, 64), mode='bilinear')
        total = total + scores.softmax(dim=1)
    expected = total.argmax(dim=1)[0].numpy()
    assert (averaged.labels != expected).mean() < 0.01


def test_classes_that_are_not_asked_for_are_left_out(segmentor, checkpoint, images):
    everything = segmentor.predict(images[0]).labels
    kept = int(np.unique(everything)[1])
    chosen = gfnet_dense.load(SEGMENTOR, checkpoint, 'cpu', classes=[CLASSES[kept]])
    labels = chosen.predict(images[0]).labels
    np.testing.assert_array_equal(labels, np.where(everything == kept, kept, 255))


def test_one_name_is_no_list_of_classes(checkpoint):
    with pytest.raises(TypeError, match=r"must be a list of names, but got 'one': take \['one'\]"):
        gfnet_dense.load(SEGMENTOR, checkpoint, 'cpu', classes='one')


# Other loaders, other tasks


def test_a_loader_of_the_config_reads_what_pillow_cannot(checkpoint, images, tmp_path):
    import tifffile

    cfg = Config.fromfile(find_config(SEGMENTOR))
    loader = dict(type='LoadImageFromFile', color_type='unchanged', imdecode_backend='tifffile')
    cfg.test_dataloader.dataset.pipeline[0] = loader
    own = gfnet_dense.load(cfg, checkpoint, 'cpu')
    # As BGR in numbers beyond 8 bits, which Pillow does not read.
    tifffile.imwrite(tmp_path / 'a.tif', images[0][:, :, ::-1].astype(np.float64))
    found = own.predict(tmp_path / 'a.tif')
    assert (found.labels != own.predict(images[0]).labels).mean() < 0.001
    assert np.corrcoef(found.image.ravel(), images[0].ravel())[0, 1] > 0.999
    with pytest.raises(InputError, match=r'nothing\.tif cannot be read: FileNotFoundError'):
        own.predict(tmp_path / 'nothing.tif')
    with pytest.raises(ValueError, match='tiles are for images that Pillow reads'):
        gfnet_dense.load(cfg, checkpoint, 'cpu', tile=64)


def test_transforms_may_be_given_as_classes(segmentor, checkpoint, images):
    cfg = Config.fromfile(find_config(SEGMENTOR))
    cfg.test_dataloader.dataset.pipeline[0] = dict(type=LoadImageFromFile)
    found = gfnet_dense.load(cfg, checkpoint, 'cpu').predict(images[0])
    np.testing.assert_array_equal(found.labels, segmentor.predict(images[0]).labels)


def test_classes_of_an_image_are_those_of_the_network(images, tmp_path):
    path = random_checkpoint(CLASSIFIER, tmp_path)
    classifier = gfnet_dense.load(CLASSIFIER, path, 'cpu')
    prediction = classifier.predict(images[1])
    # timm's own mean and standard deviation are those of ImageNet.
    transform = create_transform(input_size=64, crop_pct=1.0, interpolation='bicubic')
    with torch.no_grad():
        logits = classifier.model.backbone(transform(Image.fromarray(images[1]))[None])
    expected, order = logits.softmax(dim=1)[0].sort(descending=True)
    np.testing.assert_allclose(prediction.scores, expected, rtol=1e-4)
    np.testing.assert_array_equal(prediction.labels, order)
    assert prediction.draw().width >= 224
    with pytest.raises(ValueError, match='tiles are for segmentation'):
        gfnet_dense.load(CLASSIFIER, path, 'cpu', tile=64)
    with pytest.raises(ValueError, match='no tta_model and no tta_pipeline'):
        gfnet_dense.load(CLASSIFIER, path, 'cpu', tta=True)


# What a prediction shows and saves


def test_pictures_of_labels(images):
    labels = np.zeros(SIZES[0], np.uint8)
    labels[:, 32:], labels[:8] = 3, 255
    prediction = Prediction('segmentation', images[0], CLASSES, PALETTE, labels)
    np.testing.assert_array_equal(prediction.draw(opacity=0), images[0])
    colours = np.asarray(prediction.draw(opacity=1))
    np.testing.assert_array_equal(colours[:8], images[0][:8])
    assert (colours[8:, :32] == PALETTE[0]).all() and (colours[8:, 32:] == PALETTE[3]).all()
    assert repr(prediction) == '<segmentation of 64 x 64 pixels: background 43.8 %, two 43.8 %>'


def test_classes_are_named_in_pictures_that_are_large_enough():
    image, labels = np.zeros((200, 300, 3), np.uint8), np.zeros((200, 300), np.uint8)
    labels[50:150, 50:150] = 1
    picture = np.asarray(draw_labels(image, labels, ['', 'middle'], [(0, 0, 0)] * 2, 0.5))
    rows, columns = np.nonzero(picture.any(axis=2))
    assert 50 < columns.min() < columns.max() < 150
    assert abs(rows.mean() - 100) < 5 and abs(columns.mean() - 100) < 5


def test_a_notebook_shows_the_picture_and_a_table(images):
    names = ('a <b>', *CLASSES[1:])
    labels = np.zeros(SIZES[0], np.uint8)
    prediction = Prediction('segmentation', images[0], names, PALETTE, labels)
    text = prediction._repr_html_()
    assert 'a &lt;b&gt;' in text and '100.0 %' in text and 'data:image/png;base64,' in text
    assert prediction._repr_png_().startswith(b'\x89PNG')


def test_labels_are_saved_as_indices(segmentor, images, tmp_path):
    prediction = segmentor.predict(images[3])
    prediction.save(tmp_path / 'new' / 'a.png')
    saved = Image.open(tmp_path / 'new' / 'a.png')
    assert saved.mode == 'L'
    np.testing.assert_array_equal(saved, prediction.labels)
    assert os.listdir(tmp_path / 'new') == ['a.png']


# Loading


@pytest.mark.parametrize(
    ('name', 'task'),
    [
        (SEGMENTOR, 'segmentation'),
        ('fpn_gfnet_h_s_ade20k', 'segmentation'),
        ('retinanet_gfnet_nano_digits', 'detection'),
        (INSTANCE_SEGMENTOR, 'instance segmentation'),
        ('gfnet_h_s_imagenet', 'classification'),
    ],
)
def test_the_task_follows_from_the_config(name, task):
    assert find_task(Config.fromfile(find_config(name))) == task


def test_other_models_have_no_task():
    with pytest.raises(ValueError, match='its model is Foo with type, neck'):
        find_task(Config(dict(model=dict(type='Foo', neck={}))))


def test_class_names_come_from_the_checkpoint_before_the_config(checkpoint, tmp_path):
    content = torch.load(checkpoint)
    assert gfnet_dense.load(SEGMENTOR, checkpoint, 'cpu').classes == CLASSES
    names = [f'name {i}' for i in range(11)]
    content['meta'] = {
        'dataset_meta': {'classes': names, 'palette': [[i, 0, 0] for i in range(11)]}
    }
    content['state_dict'] = {f'module.{k}': v for k, v in content['state_dict'].items()}
    torch.save(content, tmp_path / 'named.pth')
    named = gfnet_dense.load(SEGMENTOR, tmp_path / 'named.pth', 'cpu')
    assert named.classes == tuple(names)
    assert named.palette[10] == (10, 0, 0)
    assert not named.model.training


class Evil:
    def __reduce__(self):
        return os.mkdir, ('executed',)


def test_files_that_are_no_weights_of_the_model(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r'no checkpoint at nothing\.pth'):
        gfnet_dense.load(SEGMENTOR, 'nothing.pth')
    content = torch.load(checkpoint)
    content['state_dict'].pop('backbone.pos_embed')
    torch.save(content, 'short.pth')
    with pytest.raises(
        CheckpointError, match=r'short\.pth does not fit.* lacks backbone\.pos_embed'
    ):
        gfnet_dense.load(SEGMENTOR, 'short.pth')
    content = torch.load(checkpoint)
    content['state_dict']['backbone.pos_embed'][0, 0] = float('nan')
    torch.save(content, 'diverged.pth')
    with pytest.raises(CheckpointError, match=r'not finite, backbone\.pos_embed'):
        gfnet_dense.load(SEGMENTOR, 'diverged.pth')
    Path('evil.pth').write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r'not safe|not a checkpoint'):
        gfnet_dense.load(SEGMENTOR, 'evil.pth')
    assert not Path('executed').exists()
