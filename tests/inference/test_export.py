"""Exported files beside mmseg's, mmdet's and mmengine's own predictions, in runtimes of others."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS
from mmseg.structures import SegDataSample
from PIL import Image
from processes import ROOT, run, run_tool

from gfnet_dense.cli import main
from gfnet_dense.demo import CLASSES, PALETTE, write_digit_scans, write_digits
from gfnet_dense.inference import ExportError, export, export_model, load_model
from gfnet_dense.inference.export import formats, proof
from gfnet_dense.inference.export.networks import deploy

SEGMENTOR, DETECTOR, CLASSIFIER = (
    f'{head}gfnet_nano_digits' for head in ('upernet_', 'retinanet_', '')
)
# LayerScale of 0.5, so that the filters matter.
ARCH = dict(embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), layer_scale_init_value=0.5)
CHANNELS = {
    SEGMENTOR: {
        'decode_head.in_channels': [8, 16, 24, 32],
        'decode_head.channels': 16,
        'auxiliary_head.in_channels': 24,
    },
    DETECTOR: {'neck.in_channels': [16, 24, 32]},
    'mask_rcnn_gfnet_nano_digits': {'neck.in_channels': [8, 16, 24, 32]},
}


@pytest.fixture(scope='module', autouse=True)
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('data')
    with pytest.MonkeyPatch.context() as patch:
        digits = write_digits(root / 'digits', num_training=8, num_validation=5)
        patch.setenv('DIGITS_ROOT', str(digits))
        patch.setenv('DIGIT_SCANS_ROOT', str(write_digit_scans(root / 'scans')))
        yield digits


@pytest.fixture(scope='module')
def trained(data, tmp_path_factory):
    """Return a function from the name of a config to a small config and weights of it."""
    folder = tmp_path_factory.mktemp('weights')

    def make(name: str) -> tuple[Path, Path]:
        config, weights = folder / f'{name}.py', folder / f'{name}.pth'
        if not weights.exists():
            cfg = Config.fromfile(ROOT / 'configs' / f'{name}.py')
            values = {f'model.{key}': value for key, value in CHANNELS.get(name, {}).items()}
            cfg.merge_from_dict(values)
            cfg.model.backbone.arch = ARCH
            cfg.dump(config)
            torch.manual_seed(0)
            with MODELS.switch_scope_and_registry(cfg.default_scope) as registry:
                model = registry.build(cfg.model)
            torch.save(dict(state_dict=model.state_dict()), weights)
        return config, weights

    return make


def picture(shape: tuple[int, int], number: int = 0) -> np.ndarray:
    """Return a photograph in RGB."""
    height, width = shape
    with Image.open(sorted(data_images())[number]) as file:
        return np.array(file.convert('RGB').resize((width, height)))


def data_images() -> list[Path]:
    return [*Path(os.environ['DIGITS_ROOT'], 'images/validation').iterdir()]


def pixels(image: np.ndarray, bgr: bool = True) -> torch.Tensor:
    """Return an image as a pipeline of mmseg or mmdet, or of timm, hands it to a model."""
    return torch.from_numpy(image[..., :: -1 if bgr else 1].transpose(2, 0, 1).copy())


@pytest.mark.slow
def test_segmentor_in_onnx_runtime(trained, tmp_path):
    config, weights = trained(SEGMENTOR)
    out = tmp_path / 'new' / 'model.onnx'
    options = '--shape', 48, 80, '--batch', 'dynamic'
    text = run_tool('export.py', config, weights, out, *options).stdout
    assert 'ONNX Runtime' in text and 'labels equal' in text and 'mIoU' in text
    assert [path.name for path in out.parent.iterdir()] == ['model.onnx']

    model = onnx.load(out)
    operators = {node.op_type for node in model.graph.node}
    assert 'MatMul' in operators and not operators & {'DFT', 'STFT', 'Cos', 'Sin'}
    complex_types = {onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128}
    assert not complex_types & {tensor.data_type for tensor in model.graph.initializer}
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata['task'] == 'segmentation'
    assert tuple(json.loads(metadata['classes'])) == CLASSES
    assert [tuple(colour) for colour in json.loads(metadata['palette'])] == list(PALETTE)
    assert json.loads(metadata['input'])['size'] == [48, 80]

    session = onnxruntime.InferenceSession(out)
    network, _ = load_model(config, weights)
    images = [picture((48, 80), number) for number in range(3)]
    for batch in (images[:1], images):
        (logits,) = session.run(None, {'images': np.stack(batch)})
        # mmseg's own way from images to logits
        inputs = dict(inputs=[pixels(image) for image in batch])
        with torch.no_grad():
            results = network.test_step(inputs)
        expected = torch.stack([result.seg_logits.data for result in results])
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)

    # Its convolutions and linear layers in int8
    content = formats.quantized(out.read_bytes(), [np.stack(images)])
    quantized = onnx.load_from_string(content)
    assert onnx.TensorProto.INT8 in {tensor.data_type for tensor in quantized.graph.initializer}
    assert quantized.metadata_props == model.metadata_props
    # Filters stay in float32, four products with one Fourier matrix each in each of four blocks.
    sizes = {tensor.name: tensor.dims for tensor in quantized.graph.initializer}
    products = [node for node in quantized.graph.node if node.op_type == 'MatMul']
    matrices = [sizes[node.input[0]] for node in products if node.input[0] in sizes]
    assert [len(size) for size in matrices] == 16 * [2]
    runs, failures = formats.runs_of(content, '.onnx')
    assert not failures  # of OpenVINO, where it is installed
    (rounded,) = runs['ONNX Runtime'](np.stack(images))
    error = np.abs(rounded - logits).max() / np.abs(logits).max()
    assert 1e-4 < error < proof.BOUNDS['int8'].difference


@pytest.mark.slow
def test_classifier_in_half_precision_by_the_command_line(trained, tmp_path):
    config, weights = trained(CLASSIFIER)
    out = tmp_path / 'model.onnx'
    options = '--half', '--labels', '--num-images', 2
    text = run_tool('export.py', config, weights, out, '--shape', 64, 64, *options).stdout
    assert 'float16' in text and '2 images of the test data' in text and 'top-1' in text
    kinds = {tensor.data_type for tensor in onnx.load(out).graph.initializer}
    assert onnx.TensorProto.FLOAT16 in kinds
    network, _ = load_model(config, weights)
    image = picture((64, 64))
    (labels,) = onnxruntime.InferenceSession(out).run(None, {'images': image[None]})
    (result,) = network.test_step(dict(inputs=[pixels(image, bgr=False)], data_samples=None))
    assert labels.dtype == np.uint8 and labels.tolist() == [result.pred_label]


@pytest.mark.slow
def test_detector_as_a_program_that_needs_torch_alone(trained, tmp_path):
    config, weights = trained(DETECTOR)
    out = tmp_path / 'model.pt2'
    text = run_tool('export.py', config, weights, out, '--shape', 64, 64).stdout
    assert 'torch.export' in text and 'boxes' in text
    image = picture((64, 64))
    np.save(tmp_path / 'image.npy', image)
    code = (
        'import sys, torch, numpy\n'
        'for name in ("gfnet_dense", "timm", "mmengine", "mmcv", "mmdet"):\n'
        '    sys.modules[name] = None\n'
        'image = torch.from_numpy(numpy.load("image.npy"))\n'
        'extra = {"metadata.json": ""}\n'
        'program = torch.export.load("model.pt2", extra_files=extra)\n'
        'torch.save(program.module()(image[None]), "outputs.pth")\n'
        'print(extra["metadata.json"])\n'
    )
    command = sys.executable, '-W', 'ignore', '-c', code
    printed = run(*command, cwd=tmp_path, stderr=subprocess.PIPE)
    assert 'non-maximum suppression' in json.loads(printed.stdout)['outputs']
    (boxes,), (scores,) = torch.load(tmp_path / 'outputs.pth')

    # All anchors above a threshold, as mmdet has them before non-maximum suppression.
    network, _ = load_model(config, weights)
    threshold = float(scores.flatten().topk(200).values[-1])
    with torch.no_grad():
        x = network.data_preprocessor(dict(inputs=[pixels(image)], data_samples=None))['inputs']
        (expected,) = network.bbox_head.predict_by_feat(
            *network(x, mode='tensor'),
            batch_img_metas=[dict(img_shape=(64, 64))],
            cfg=Config(dict(score_thr=threshold, nms_pre=-1)),
            with_nms=False,
        )
    anchors, labels = (scores > threshold).nonzero(as_tuple=True)
    order = scores[anchors, labels].argsort(descending=True)[:100]
    expected = expected[expected.scores.argsort(descending=True)][:100]
    for actual, value in (
        (labels, expected.labels),
        (scores[anchors, labels], expected.scores),
        (boxes[anchors], expected.bboxes),
    ):
        torch.testing.assert_close(actual[order], value, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('padding', [dict(size_divisor=32), dict(size=(96, 80))], ids=str)
def test_a_segmentor_whose_tests_pad(trained, padding):
    network, _ = load_model(*trained(SEGMENTOR))
    network.data_preprocessor.test_cfg, network.data_preprocessor.pad_value = padding, 0.5
    network.data_preprocessor.pad_val = 0.5
    image = picture((50, 70))
    sample = SegDataSample(metainfo=dict(img_shape=(50, 70), ori_shape=(50, 70)))
    (result,) = network.test_step(dict(inputs=[pixels(image)], data_samples=[sample]))
    deployed = deploy(network, 'segmentation').fixed((50, 70))
    (logits,) = deployed(torch.from_numpy(image)[None])
    torch.testing.assert_close(logits[0], result.seg_logits.data, rtol=1e-4, atol=1e-4)
    (raw,) = deploy(network, 'segmentation', 'raw')(torch.from_numpy(image)[None])
    assert raw.shape[2:] == ((16, 24) if 'size_divisor' in padding else (24, 20))


def test_a_detector_whose_tests_pad(trained):
    network, _ = load_model(*trained(DETECTOR))
    network.data_preprocessor.pad_size_divisor = 32
    image, shape = picture((50, 70)), (50, 70)
    sample = DetDataSample(metainfo=dict(img_shape=shape, ori_shape=shape, scale_factor=(1, 1)))
    network.bbox_head.test_cfg = ConfigDict(nms_pre=-1, score_thr=0.0, min_bbox_size=-1)
    with torch.no_grad():
        data = network.data_preprocessor(dict(inputs=[pixels(image)], data_samples=[sample]))
        maps = network.bbox_head(network.extract_feat(data['inputs']))
        (expected,) = network.bbox_head.predict_by_feat(
            *maps, batch_img_metas=[data['data_samples'][0].metainfo], with_nms=False
        )
        (boxes,), (scores,) = deploy(network, 'detection').fixed(shape)(
            torch.from_numpy(image)[None]
        )
    assert data['inputs'].shape[2:] == (64, 96)
    best = scores.flatten().topk(50)
    torch.testing.assert_close(best.values, expected.scores.topk(50).values, rtol=1e-4, atol=1e-5)
    order = expected.scores.topk(50).indices
    chosen = boxes[best.indices // scores.shape[1]]
    torch.testing.assert_close(chosen, expected.bboxes[order], rtol=1e-4, atol=1e-3)


def test_other_outputs(trained):
    network, _ = load_model(*trained(SEGMENTOR))
    images = torch.from_numpy(picture((40, 72)))[None]
    maps = deploy(network, 'segmentation', 'features')
    assert maps.names == ('map0', 'map1', 'map2', 'map3')
    (raw,) = deploy(network, 'segmentation', 'raw')(images)
    assert raw.shape == (1, 11, 10, 18)
    logits = deploy(network, 'segmentation')
    (labels,) = deploy(network, 'segmentation', 'labels')(images)
    assert labels.dtype == torch.uint8 and torch.equal(labels, logits(images)[0].argmax(1))

    # For one size, the filters are stored in that size. Nothing else changes, rounding apart.
    fixed = logits.fixed((40, 72))
    assert fixed.network.backbone.grid == (10, 18) and network.backbone.grid == (16, 16)
    torch.testing.assert_close(fixed(images), logits(images), rtol=1e-4, atol=1e-4)
    half = logits.fixed((40, 72), half=True)
    assert {p.dtype for p in half.network.parameters()} == {torch.float16}
    (expected,), (rounded,) = logits(images), half(images)
    bound = proof.BOUNDS['float16'].difference
    assert 0 < (rounded - expected).abs().max() < bound * expected.max()


@pytest.mark.slow
def test_refused(trained, tmp_path):
    out = tmp_path / 'model.onnx'
    for shapes, arguments, message in (
        ([], {}, 'one size'),
        ([(64, 64)], dict(batch=0), '1 image or more'),
        ([(64, 64)], dict(precision='int4'), "unknown precision 'int4'"),
        ([(64, 64)], dict(output='masks'), "unknown output 'masks'"),
    ):
        with pytest.raises(ExportError, match=message):
            export_model(*trained(SEGMENTOR), out, shapes, **arguments)
    with pytest.raises(ExportError, match=r'1 pixel a side or more, but got \(0, 64\)'):
        export_model(*trained(SEGMENTOR), out, [(64, 64), (0, 64)])
    with pytest.raises(ExportError, match=r'must end in \.onnx or \.pt2'):
        export_model(*trained(SEGMENTOR), tmp_path / 'model.pth', [(64, 64)])
    with pytest.raises(ExportError, match='int8 is for ONNX'):
        export_model(*trained(SEGMENTOR), tmp_path / 'model.pt2', [(64, 64)], precision='int8')
    with pytest.raises(ExportError, match='RoIAlign'):
        export_model(*trained('mask_rcnn_gfnet_nano_digits'), out, [(64, 64)])
    with pytest.raises(ExportError, match='non-maximum suppression'):
        export_model(*trained(DETECTOR), out, [(64, 64)], output='labels')
    with pytest.raises(ExportError, match='no maps'):
        export_model(*trained(CLASSIFIER), out, [(64, 64)], output='features')
    assert not [*tmp_path.iterdir()]


def without_exporter(patch, factor: float) -> None:
    """Let files hold nothing, and runtimes compute PyTorch's outputs times a factor."""
    patch.setattr(formats, 'to_pt2', lambda deployed, *_: running.append(deployed) or b'file')
    running = []

    def run(images):
        outputs = running[-1](torch.from_numpy(images))
        return [y.detach().numpy() * np.float32(factor) for y in outputs]

    patch.setattr(formats, 'runs_of', lambda content, suffix: ({'runtime': run}, {}))


@pytest.mark.parametrize('factor', [1.001, float('nan')])
def test_a_file_that_computes_something_else_is_not_written(trained, tmp_path, monkeypatch, factor):
    without_exporter(monkeypatch, factor)
    out = tmp_path / 'model.pt2'
    out.write_bytes(b'before')
    with pytest.raises(ExportError, match=r'runtime differs from PyTorch: largest difference'):
        export_model(*trained(SEGMENTOR), out, [(64, 64)])
    assert out.read_bytes() == b'before' and [*tmp_path.iterdir()] == [out]


@pytest.mark.slow
def test_several_sizes_and_images_of_the_user(trained, tmp_path, monkeypatch):
    without_exporter(monkeypatch, 1.0)
    first, second = export_model(
        *trained(SEGMENTOR),
        tmp_path / 'model.pt2',
        [(64, 64), (32, 96)],
        batch=2,
        images=sorted(data_images())[:3],
    )
    names = 'model-32x96.pt2', 'model-64x64.pt2'
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names]
    assert (second.path.name, first.path.name) == names
    assert 'compared with PyTorch on 3 given images' in str(first)
    comparison = first.comparisons[1]
    assert comparison.difference('logits') < 1e-5 and comparison.equal_labels == 1
    assert comparison.labels == 4 * 64 * 64  # the first image fills the second batch
    assert comparison.accuracy('segmentation') is None


def test_steps_that_are_named_by_their_class(trained):
    from mmcv.transforms import LoadImageFromFile, Resize

    network, cfg = load_model(*trained(SEGMENTOR))
    cfg.test_dataloader.dataset.pipeline = [
        dict(type=LoadImageFromFile),
        dict(type=Resize, scale=(64, 48)),
    ]
    metadata = export._metadata(network, cfg, 'segmentation', ['logits'], (48, 64), 'float32')
    resized = json.loads(metadata['input'])['resized_by']
    assert resized == [dict(type='Resize', scale=[64, 48])]


@pytest.mark.slow
def test_killed_before_the_proof_it_leaves_no_file(trained, tmp_path):
    config, weights = trained(CLASSIFIER)
    out = tmp_path / 'model.pt2'
    code = (
        'import os, signal\n'
        'from gfnet_dense.inference.export import export_model, formats\n'
        'formats.to_pt2 = lambda *_: b"file"\n'
        'formats.runs_of = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n'
        f'export_model({str(config)!r}, {str(weights)!r}, {str(out)!r}, [(64, 64)])\n'
    )
    run(sys.executable, '-c', code, status=-signal.SIGKILL)
    assert not out.exists() and len([*tmp_path.iterdir()]) == 1  # what the next run overwrites


def test_a_job_that_is_ended_leaves_no_file(trained, tmp_path, monkeypatch):
    without_exporter(monkeypatch, 1.0)
    monkeypatch.setattr(formats, 'runs_of', lambda *_: signal.raise_signal(signal.SIGTERM))
    config, weights = trained(CLASSIFIER)
    out = tmp_path / 'model.pt2'
    arguments = ['gfnet', 'export', config, weights, out, '--shape', 64, 64]
    monkeypatch.setattr('sys.argv', [*map(str, arguments)])
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as end:
            main()
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert end.value.code == 128 + signal.SIGTERM
    assert not [*tmp_path.iterdir()]


def test_accuracy_is_that_of_mmseg():
    from mmseg.evaluation import IoUMetric

    generator = np.random.default_rng(0)
    truth = generator.integers(0, 4, (2, 20, 30)).astype(np.uint8)
    labels = np.where(generator.random(truth.shape) < 0.3, 2, truth)
    truth[:, :3] = 255
    comparison = proof.Comparison('runtime')
    areas = []
    for a, b in zip(truth, labels, strict=True):
        comparison.confusion = comparison.confusion + proof._confusion(a, b, 6, 255)
        areas.append(
            IoUMetric.intersect_and_union(torch.from_numpy(b), torch.from_numpy(a), 6, 255)
        )
    intersection, union = (sum(area[i] for area in areas) for i in range(2))
    expected = 100 * torch.nanmean(intersection / union).item()  # two classes do not appear
    assert comparison.accuracy('segmentation') == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('count', [1, 2, 3])
@pytest.mark.parametrize('batch', [1, 2, 5, None])
def test_images_that_fill_a_batch_do_not_count(batch, count):
    image = Image.new('RGB', (8, 8))
    samples = [proof.Sample(image, np.array(i)) for i in range(count)]
    batches = [*proof.batches_of(samples, batch)]
    assert batch or len({len(part) for part in batches}) == 2
    assert all(len(part) == batch for part in batches) or batch is None
    truths = [int(s.truth) for part in batches for s in part if s.truth is not None]
    assert truths == [*range(count)]
