"""Every fault of tests/faults.py through the check, training, test and prediction."""

import gc
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import (
    CHECKPOINTS,
    ERROR,
    FAULTS,
    NAMES,
    NOTE,
    RIGHT,
    CountIterations,
    apply,
    checkpoint_table,
    make_config,
    table,
    write_data,
)
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import MODELS, init_default_scope
from mmseg.utils import register_all_modules
from PIL import Image, ImageOps
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn

from gfnet_dense import load
from gfnet_dense.data import DataError, check_data, plot_reports
from gfnet_dense.data.errors import Fault, Note
from gfnet_dense.data.image_folder import _read
from gfnet_dense.durable.runner import DurableRunner
from gfnet_dense.inference import InputError, Prediction, Predictor
from gfnet_dense.inference.inputs import Inputs
from gfnet_dense.openmmlab import evaluate, train
from gfnet_dense.serialization import CheckpointError

DOCS = Path(__file__).parents[2] / 'docs'


def marked(name: str, task: str) -> object:
    """Return a parameter; the fast lane does without mmcv's operators, which mmdet needs."""
    return pytest.param(name, marks=pytest.mark.slow if task in ('detection', 'masks') else ())


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    register_all_modules()  # imports what runs would import
    gc.freeze()  # mmengine collects garbage for every data set
    return write_data(tmp_path_factory.mktemp('data'))


@pytest.fixture
def root(data, tmp_path) -> Path:
    return shutil.copytree(data, tmp_path / 'data')


@pytest.mark.parametrize('task', [*map(marked, NAMES, NAMES)])
def test_sound_data_pass_without_a_fault(root, task):
    for report in check_data(make_config(task, root)):
        assert report.faults == []
        assert report.contents


@pytest.mark.slow
@pytest.mark.parametrize(
    'name',
    [
        'nothing_labelled', 'turned_by_180', 'truncated_image', 'bands_tiff', 'no_folder',
        'box_half_outside', 'evaluated_polygon_of_4_numbers', 'single_class',
    ],
)  # fmt: skip
def test_a_picture_is_drawn_of_faulty_data_too(name, root, tmp_path):
    fault = FAULTS[name]
    reports = check_data(apply(make_config(fault.task, root), fault.make(root)))
    path = plot_reports(reports, tmp_path / 'folder' / 'data.png')
    with Image.open(path) as picture:
        assert min(picture.size) > 100
        assert np.asarray(picture.convert('L')).std() > 5


@pytest.mark.parametrize('name', [marked(name, fault.task) for name, fault in FAULTS.items()])
def test_a_fault_is_found(name, root):
    fault = FAULTS[name]
    reports = check_data(apply(make_config(fault.task, root), fault.make(root)))
    found = [finding for report in reports for finding in report.findings]
    faults = [text for text in found if isinstance(text, Fault)]
    for report in reports:
        assert all(f'FAULT      {text}' in str(report) for text in report.faults)
    if fault.outcome == ERROR:
        assert any(fault.says in text for text in faults), found
    else:
        assert faults == []
        assert fault.outcome == RIGHT or any(
            fault.says in text for text in found if isinstance(text, Note)
        ), found


@pytest.mark.slow
@pytest.mark.parametrize('name', FAULTS)
def test_a_fault_is_said_before_the_first_iteration(name, root, tmp_path):
    fault = FAULTS[name]
    cfg = apply(make_config(fault.task, root), fault.make(root))
    CountIterations.count = 0
    if fault.use != 'test':
        run(fault, lambda: train(cfg, work_dir=str(tmp_path / 'train')))
        assert CountIterations.count == (fault.outcome != ERROR)
    if fault.use != 'train' or fault.outcome != ERROR:
        run(
            fault, lambda: evaluate(cfg, checkpoint(cfg, tmp_path), work_dir=str(tmp_path / 'test'))
        )


def run(fault, action):
    """Run something that has to end with the error of the fault, or well."""
    if fault.outcome != ERROR:
        action()
        return
    with pytest.raises(DataError) as error:
        action()
    text = str(error.value)
    assert fault.says in text or 'tools/check_data.py lists' in text
    assert len(text.splitlines()) <= 2


@pytest.fixture(scope='module')
def weights(tmp_path_factory) -> Callable[[Config], Path]:
    """Write a checkpoint for a config; configs of one model share it."""
    found: dict[str, Path] = {}

    def write(cfg: Config) -> Path:
        key = repr(cfg.model)
        if key not in found:
            found[key] = checkpoint(cfg, tmp_path_factory.mktemp('weights'))
        return found[key]

    return write


@pytest.mark.slow
@pytest.mark.parametrize('name', FAULTS)
def test_prediction_names_the_image_or_sees_it_as_a_test_does(name, root, tmp_path, weights):
    fault = FAULTS[name]
    cfg = apply(make_config(fault.task, root), fault.make(root))
    predictor = load(cfg, weights(cfg), batch_size=1)
    folder = root / ('scans' if fault.task == 'classification' else 'digits/images')
    paths = [source.path for source in Inputs([str(folder)], tmp_path / 'out')]
    paths = paths or [path for path in sorted(folder.rglob('*')) if path.is_file()]
    if fault.task == 'masks':  # slow, and their faults are all of annotations
        paths = paths[:2]
    seen: list[Tensor] = []
    predictor.model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(*inputs))
    load_as_a_test_does = loading(cfg, predictor.model)
    refused = []
    for path, result in predictor.stream(paths):
        if isinstance(result, Prediction):
            assert len(result.classes) == len(result.palette) > 0
            assert min(map(len, result.classes)) > 1, 'letters of a text are no classes'
            std = getattr(predictor.model.data_preprocessor, 'std', torch.tensor(1.0))
            error = (seen.pop(0) - load_as_a_test_does(path)).abs() * std
            # OpenCV and Pillow convert CMYK with other roundings.
            assert error.max() <= 2 * ('cmyk' in name), path
        else:
            assert isinstance(result, InputError | RuntimeError)
            assert fault.predicts in str(result) and str(path) in str(result)
            refused.append(path)
            seen.clear()  # the network may have failed on it
    assert bool(refused) == bool(fault.predicts)
    assert seen == []


def loading(cfg: Config, model: nn.Module) -> Callable[[Path], Tensor]:
    """Return what makes the input of the network of an image, by the steps of a test."""
    dataset = cfg.test_dataloader.dataset
    if 'transform' in dataset:
        transform = create_transform(**dataset.transform, normalize=False)

        def load_image(path: Path) -> dict:
            # Of a test it is not turned, which is the note of `turned_scan`.
            image = ImageOps.exif_transpose(_read(str(path)))
            return dict(inputs=[transform(image)], data_samples=None)

    else:
        steps = Compose([step for step in dataset.pipeline if 'Annotations' not in step['type']])

        def load_image(path: Path) -> dict:
            return pseudo_collate([steps(dict(img_path=str(path), img_id=0))])

    return lambda path: model.data_preprocessor(load_image(path), False)['inputs']


def checkpoint(cfg, folder) -> Path:
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    path = folder / 'weights.pth'
    torch.save({'state_dict': MODELS.build(cfg.model).state_dict()}, path)
    return path


@pytest.fixture(scope='module')
def runner(tmp_path_factory, data) -> DurableRunner:
    work_dir = str(tmp_path_factory.mktemp('runner'))
    return DurableRunner.from_cfg(
        Config(dict(make_config('segmentation', data), work_dir=work_dir))
    )


@pytest.mark.slow
@pytest.mark.parametrize('name', CHECKPOINTS)
def test_a_checkpoint_is_loaded_whole_or_refused(name, runner, data, tmp_path):
    fault, cfg, path = CHECKPOINTS[name], make_config('segmentation', data), tmp_path / 'some.pth'
    expected = {key: value.clone() for key, value in runner.model.state_dict().items()}
    fault.make(path, {key: value.clone() for key, value in expected.items()})
    for says, action in (
        (fault.start, lambda: runner.load_checkpoint(str(path))),
        (fault.use, lambda: runner.load_checkpoint(str(path), strict=True)),
        (fault.use, lambda: load(cfg, path)),
    ):
        if says:
            with pytest.raises((CheckpointError, RuntimeError)) as error:
                action()
            assert says in str(error.value)
            continue
        for value in runner.model.parameters():
            value.data.fill_(7)
        found = action()
        model = found.model if isinstance(found, Predictor) else runner.model
        state, atol = model.state_dict(), 1e-3 if name == 'half_precision' else 0
        for key in expected if not fault.use else (k for k in expected if 'backbone' in k):
            torch.testing.assert_close(state[key], expected[key], rtol=atol, atol=atol)
    runner.model.load_state_dict(expected)


def test_each_outcome_occurs():
    assert {fault.outcome for fault in FAULTS.values()} == {ERROR, NOTE, RIGHT}


def test_the_table_in_the_docs_is_that_of_the_faults():
    text = (DOCS / 'faulty_data.md').read_text()
    assert table().strip() in text
    assert checkpoint_table() in text
