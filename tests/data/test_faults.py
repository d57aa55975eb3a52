"""Every fault of tests/faults.py through the check, training and test."""

import gc
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import (
    ERROR,
    FAULTS,
    NAMES,
    NOTE,
    RIGHT,
    CountIterations,
    apply,
    make_config,
    table,
    write_data,
)
from mmengine.registry import MODELS, init_default_scope
from mmseg.utils import register_all_modules
from PIL import Image

from gfnet_dense.data import DataError, check_data, plot_reports
from gfnet_dense.data.errors import Fault, Note
from gfnet_dense.openmmlab import evaluate, train

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


@pytest.mark.parametrize(
    'name',
    [marked(name, FAULTS[name].task) for name in (
        'nothing_labelled', 'turned_by_180', 'truncated_image', 'bands_tiff', 'no_folder',
        'box_half_outside', 'evaluated_polygon_of_4_numbers', 'single_class',
    )],
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


def checkpoint(cfg, folder) -> Path:
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    path = folder / 'weights.pth'
    torch.save({'state_dict': MODELS.build(cfg.model).state_dict()}, path)
    return path


def test_each_outcome_occurs():
    assert {fault.outcome for fault in FAULTS.values()} == {ERROR, NOTE, RIGHT}


def test_the_table_in_the_docs_is_that_of_the_faults():
    assert table().strip() in (DOCS / 'faulty_data.md').read_text()
