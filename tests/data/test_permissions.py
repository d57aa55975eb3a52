"""Files and folders that the user of a run may not read."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from faults import images, make_config, maps, scans, write_data

from gfnet_dense.data import DataError, check_data
from gfnet_dense.data.guess import look_at_folders, look_at_masks
from gfnet_dense.inference import InputError, predict_files, read_image
from gfnet_dense.inference.inputs import Inputs
from gfnet_dense.serialization import load_file

pytestmark = pytest.mark.slow
_NOBODY = 65534


@contextmanager
def as_nobody() -> Iterator[None]:
    """Run the block without the rights of root, who may read everything."""
    if os.geteuid():
        yield
        return
    os.seteuid(_NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    data = write_data(tmp_path_factory.mktemp('data'))
    for task in ('segmentation', 'detection', 'classification'):
        # It imports what another user may not.
        assert not any(report.faults for report in check_data(make_config(task, data)))
    return data


@pytest.fixture
def root(data) -> Iterator[Path]:
    # Folders of pytest itself may be read by their owner alone.
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    root = shutil.copytree(data, folder / 'data')
    root.chmod(0o755)
    yield root
    shutil.rmtree(folder, onerror=permit)


def permit(function, path, _):
    """Let the owner remove what a test has forbidden."""
    Path(path).chmod(0o755)
    Path(path).parent.chmod(0o755)
    function(path)


ANNOTATIONS = 'digits/annotations/instances_training.json'


@pytest.mark.parametrize(
    ('task', 'find', 'mode'),
    [
        ('segmentation', lambda root: images(root)[3], 0),
        ('segmentation', lambda root: maps(root)[3], 0),
        ('segmentation', lambda root: root / 'digits/images/training', 0),
        ('segmentation', lambda root: root / 'digits/images/training', 0o444),  # lists alone
        ('segmentation', lambda root: root / 'digits', 0o444),
        ('segmentation', lambda root: root / 'digits', 0),
        ('detection', lambda root: root / ANNOTATIONS, 0),
        ('detection', lambda root: images(root)[3], 0),
        ('classification', lambda root: scans(root)[3], 0),
        ('classification', lambda root: scans(root)[3].parent, 0),
        ('classification', lambda root: root / 'scans/train', 0),
    ],
)
def test_what_may_not_be_read_is_named(root, task, find, mode):
    cfg, path = make_config(task, root), find(root)
    path.chmod(mode)
    with as_nobody():
        (report, *_) = check_data(cfg)
    (fault,) = report.faults
    assert f'{path}' in fault and 'may not be read by this user' in fault and 'chmod' in fault


def test_a_subfolder_that_may_not_be_read(root):
    folder = images(root)[0].parent / 'city'
    folder.mkdir()
    images(root)[0].rename(folder / '0.jpg')
    folder.chmod(0)
    with as_nobody():
        (report, *_) = check_data(make_config('segmentation', root))
    (fault,) = report.faults
    assert f'{folder} may not be read by this user' in fault


@pytest.mark.parametrize(
    'place', ['digits/images/training', 'digits/annotations/training', 'digits']
)
def test_a_new_config_names_a_folder_that_may_not_be_read(root, place):
    folder = root / place
    folder.chmod(0)
    with as_nobody(), pytest.raises(DataError, match=f'{folder} may not be read by this user'):
        look_at_masks(root / 'digits/images', root / 'digits/annotations', [], [])


def test_a_new_config_names_a_class_folder_that_may_not_be_read(root):
    folder = scans(root)[3].parent
    folder.chmod(0)
    with as_nobody(), pytest.raises(DataError, match=f'{folder} may not be read by this user'):
        look_at_folders(root / 'scans')


def test_files_of_a_list_need_not_be_listed_by_their_folder(root):
    cfg = make_config('segmentation', root)
    folder = images(root)[0].parent
    (root / 'digits/train.txt').write_text('\n'.join(path.stem for path in images(root)))
    folder.chmod(0o111)
    with as_nobody():
        (report, *_) = check_data(cfg)
    assert any(f'{folder} may not be read by this user' in fault for fault in report.faults)
    cfg.train_dataloader.dataset.ann_file = 'train.txt'
    with as_nobody():
        (report, *_) = check_data(cfg)
    assert report.faults == [] and report.contents


def test_prediction_names_a_folder_that_may_not_be_listed(root):
    count = len(images(root))
    folder = images(root)[0].parent / 'city'
    folder.mkdir(mode=0)
    inputs = Inputs([str(folder.parent)], root / 'out')
    with as_nobody():
        assert inputs.count() == count
    assert list(inputs.failures) == [str(folder)]
    assert f'{folder} may not be read by this user' in inputs.failures[str(folder)]
    with as_nobody(), pytest.raises(ValueError, match=r'city; .* may not be read by this user'):
        predict_files(None, [str(folder)], root / 'out')


def test_prediction_names_an_image_and_a_checkpoint_that_may_not_be_read(root):
    path = images(root)[0]
    path.chmod(0)
    with as_nobody():
        with pytest.raises(InputError, match=f'{path} cannot be read: Permission denied'):
            read_image(path)
        with pytest.raises(PermissionError, match=str(path)):
            load_file(path)
