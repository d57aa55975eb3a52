"""`gfnet predict` on the command line: segmentation, detection, classification, and killed runs."""

import argparse
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from processes import ROOT, run_tool
from pycocotools.coco import COCO
from random_models import CLASSIFIER, DETECTOR, SEGMENTOR, random_checkpoint

import gfnet_dense
from gfnet_dense.cli import VERBS, main
from gfnet_dense.demo import CLASSES, write_digits
from gfnet_dense.inference import InputError
from gfnet_dense.inference.video import read_video, write_video
from gfnet_dense.openmmlab import evaluate, find_config


@pytest.fixture(scope='module')
def digits(tmp_path_factory) -> Path:
    return write_digits(
        tmp_path_factory.mktemp('data') / 'digits', num_training=1, num_validation=4
    )


@pytest.fixture(scope='module')
def images(digits) -> list[Path]:
    return sorted((digits / 'images/validation').glob('*.jpg'))


@pytest.fixture(scope='module')
def segmentor(tmp_path_factory) -> Path:
    return random_checkpoint(SEGMENTOR, tmp_path_factory.mktemp('weights'))


@pytest.fixture
def photos(tmp_path, images) -> Path:
    """Return a folder with equal names in two folders, a broken file and another one."""
    for place in ('a', 'b'):
        (tmp_path / 'photos' / place).mkdir(parents=True)
        for image in images[:2]:
            (tmp_path / 'photos' / place / image.name).write_bytes(image.read_bytes())
    (tmp_path / 'photos' / 'broken.png').write_bytes(images[0].read_bytes()[:700])
    (tmp_path / 'photos' / 'notes.txt').touch()
    return tmp_path / 'photos'


@pytest.fixture
def call(tmp_path, digits, monkeypatch, gfnet):
    """Return a function that runs a verb in this process, in a folder of the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('DIGITS_ROOT', str(digits))
    return gfnet


def predict(*arguments: object, digits: Path, cwd: Path) -> subprocess.CompletedProcess:
    """Run the tool on inputs of which one is broken."""
    return run_tool(
        'predict.py', *arguments, '--out', 'out',
        status=1, stderr=subprocess.PIPE, cwd=cwd, DIGITS_ROOT=digits,
    )  # fmt: skip


def files(folder: Path) -> set[str]:
    paths = (path for path in folder.rglob('*') if path.is_file() and path.name[0] != '.')
    return {str(path.relative_to(folder)) for path in paths}


def labels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_segmentation(photos, segmentor, digits, images, tmp_path):
    result = predict(SEGMENTOR, segmentor, 'photos', digits=digits, cwd=tmp_path)
    lines = result.stdout.splitlines()
    assert re.match(r'4 images in [\d.]+ s \([\d.]+ images/s\)$', lines[-5])
    assert lines[-4:-1] == ['  out/labels', '  out/overlays', '1 inputs failed:']
    assert lines[-1].startswith('  photos/broken.png cannot be read: ')
    assert '1 files are left out that are no images by their names: .txt' in result.stdout
    assert 'images/s' in result.stderr
    assert 'Traceback' not in result.stderr

    names = [f'{place}/{image.stem}' for place in ('a', 'b') for image in images[:2]]
    expected = {f'labels/{n}.png' for n in names} | {f'overlays/{n}.jpg' for n in names}
    assert files(tmp_path / 'out') == expected
    model = gfnet_dense.load(SEGMENTOR, segmentor, 'cpu')
    for image in images[:2]:
        found = labels(tmp_path / 'out/labels/a' / f'{image.stem}.png')
        assert (found != model.predict(image).labels).mean() < 0.001
        overlay = np.asarray(Image.open(tmp_path / 'out/overlays/a' / f'{image.stem}.jpg'))
        blended = np.asarray(model.predict(image).draw())
        assert np.abs(overlay.astype(int) - blended).mean() < 8


def test_resuming_leaves_out_what_is_there(photos, segmentor, call, tmp_path):
    first = sorted((photos / 'a').iterdir())[0]
    call('predict', SEGMENTOR, segmentor, first, '--out', 'out', '--device', 'cpu')
    (photos / 'broken.png').unlink()
    kept = tmp_path / 'out/labels' / f'{first.stem}.png'
    before = kept.stat().st_mtime_ns
    arguments = ('predict', SEGMENTOR, segmentor, photos / 'a', '--out', 'out')
    status, out, _ = call(*arguments, '--resume')
    assert status == 0
    assert re.search(r'^1 images in .*, 1 were there$', out, re.MULTILINE)
    assert kept.stat().st_mtime_ns == before
    call(*arguments)
    assert kept.stat().st_mtime_ns > before


def test_resuming_never_mixes_results(photos, images, segmentor, call, tmp_path):
    other = tmp_path / 'other.pth'
    content = torch.load(segmentor)
    content['state_dict']['backbone.pos_embed'] += 1
    torch.save(content, other)
    first, second, *_ = images
    call('predict', SEGMENTOR, segmentor, first, second, '--out', 'out')
    for changed in ((other, first), (segmentor, first, '--as-annotations')):
        status, _, error = call('predict', SEGMENTOR, *changed, '--out', 'out', '--resume')
        assert status == 1 and len(error.strip().splitlines()) == 1
        assert re.search('out holds results of other (weights|as_annotations): choose an', error)
    # The second image's result is of the other weights now, and never counts as there.
    before = (tmp_path / f'out/labels/{second.stem}.png').stat().st_mtime_ns
    call('predict', SEGMENTOR, other, first, '--out', 'out')
    status, out, _ = call('predict', SEGMENTOR, other, first, second, '--out', 'out', '--resume')
    assert status == 0 and '1 images' in out and '1 were there' in out
    assert (tmp_path / f'out/labels/{second.stem}.png').stat().st_mtime_ns > before


def test_labels_in_the_coding_of_the_annotations(segmentor, digits, images, call, tmp_path):
    status, *_ = call('predict', SEGMENTOR, segmentor, *images, '--out', 'out', '--as-annotations')
    assert status == 0
    cfg = Config.fromfile(find_config(SEGMENTOR))
    cfg.test_dataloader.update(num_workers=0, persistent_workers=False, batch_size=8)
    evaluate(cfg, segmentor, work_dir='work', out='expected')  # as tools/test.py writes them
    for image in images:
        found = labels(tmp_path / 'out/labels' / f'{image.stem}.png')
        expected = labels(tmp_path / 'expected' / f'{image.stem}.png')
        assert (found != expected).mean() < 0.001
        assert found.min() >= 1

    chosen = CLASSES[int(np.bincount(found.ravel()).argmax()) - 1]
    call(
        'predict', SEGMENTOR, segmentor, images[0], '--out', 'chosen', '--as-annotations',
        '--classes', chosen,
    )  # fmt: skip
    values = set(np.unique(labels(tmp_path / 'chosen/labels' / f'{images[0].stem}.png')))
    assert values <= {0, CLASSES.index(chosen) + 1}


def test_detection(photos, digits, images, tmp_path):
    checkpoint = random_checkpoint(DETECTOR, tmp_path)
    inputs = ('photos', digits / 'images/validation')
    result = predict(DETECTOR, checkpoint, *inputs, digits=digits, cwd=tmp_path)
    assert 'photos/broken.png cannot be read' in result.stdout

    truth = json.loads((digits / 'annotations/instances_validation.json').read_text())
    coco = COCO(tmp_path / 'out/images.json')
    found = coco.loadRes(str(tmp_path / 'out/predictions.json'))
    assert len(coco.imgs) == 8
    assert {c['id']: c['name'] for c in coco.loadCats(coco.getCatIds())} == {
        c['id']: c['name'] for c in truth['categories']
    }
    # Images of the data set have their numbers, others have new ones.
    numbers = {item['file_name']: item['id'] for item in truth['images']}
    by_path = {item['file_name']: item['id'] for item in coco.imgs.values()}
    for image in images:
        assert by_path[str(image)] == numbers[image.name]
    assert len(set(by_path.values())) == 8

    model = gfnet_dense.load(DETECTOR, checkpoint, 'cpu')
    expected = model.predict(images[1])
    assert len(expected.scores) > 0
    results = found.loadAnns(found.getAnnIds(imgIds=[by_path[str(images[1])]]))
    np.testing.assert_allclose([r['score'] for r in results], expected.scores, rtol=1e-4)
    names = [coco.cats[r['category_id']]['name'] for r in results]
    assert names == [model.classes[label] for label in expected.labels]


def test_classification(photos, digits, tmp_path):
    checkpoint = random_checkpoint(CLASSIFIER, tmp_path)
    predict(CLASSIFIER, checkpoint, 'photos', digits=digits, cwd=tmp_path)
    rows = list(csv.DictReader((tmp_path / 'out/predictions.csv').open()))
    paths = sorted(str(path.relative_to(tmp_path)) for path in photos.glob('*/*.jpg'))
    assert [row['file'] for row in rows] == paths
    model = gfnet_dense.load(CLASSIFIER, checkpoint, 'cpu')
    for row in rows:
        expected = model.predict(tmp_path / row['file'])
        assert int(row['label']) == expected.labels[0]
        assert row['class_2'] == model.classes[expected.labels[1]]
        assert float(row['score_5']) == pytest.approx(float(expected.scores[4]), rel=1e-4)


def test_tables_are_resumed(photos, call, tmp_path):
    checkpoint = random_checkpoint(CLASSIFIER, tmp_path)
    arguments = ('predict', CLASSIFIER, checkpoint)
    call(*arguments, photos, '--out', 'whole')
    call(*arguments, photos / 'b', photos / 'a', '--out', 'out')
    expected = read_table(tmp_path / 'whole/predictions.csv')
    # As if it was killed while it wrote the last line, and before it wrote the table.
    records = tmp_path / 'out/.records.jsonl'
    lines = records.read_text().splitlines(keepends=True)
    records.write_text(''.join(lines[:2]) + lines[2][:50])
    (tmp_path / 'out/predictions.csv').unlink()
    status, out, _ = call(*arguments, photos / 'b', photos / 'a', '--out', 'out', '--resume')
    assert status == 0 and '2 images' in out and '2 were there' in out
    assert read_table(tmp_path / 'out/predictions.csv') == expected


def read_table(path: Path) -> list[tuple[str, ...]]:
    """Return files, classes and scores by file. The batch changes the last digits of scores."""
    rows = csv.DictReader(path.open())
    return sorted((row['file'], row['class'], row['class_2'], f'{row["score"]:.6}') for row in rows)


@pytest.mark.slow
def test_killed_in_the_middle(segmentor, digits, images, call, tmp_path):
    folder = tmp_path / 'many'
    folder.mkdir()
    picture = Image.open(images[0]).resize((160, 160))
    for i in range(60):
        picture.save(folder / f'{i:03}.jpg')
    out = tmp_path / 'out'
    arguments = (SEGMENTOR, segmentor, folder, '--out', out, '--batch', '1')

    def count_records() -> int:
        file = out / '.records.jsonl'
        return file.read_text().count('\n') if file.exists() else 0

    def start(*more: str) -> subprocess.Popen:
        before = count_records()
        process = subprocess.Popen(
            [sys.executable, ROOT / 'tools/predict.py', *map(str, arguments), *more],
            env={**os.environ, 'DIGITS_ROOT': str(digits)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while count_records() < before + 5 and process.poll() is None:
            time.sleep(0.01)
        return process

    process = start()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert not list(out.rglob('*.partial'))
    process = start('--resume')
    process.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL
    there = [path for path in out.rglob('*') if path.suffix in ('.png', '.jpg')]
    for path in there:
        with Image.open(path) as file:
            file.load()
            assert file.size == (160, 160)
    done = count_records()
    assert 10 <= done < 60

    status, printed, _ = call('predict', *arguments, '--resume')
    assert status == 0
    assert f'{60 - done} images' in printed and f'{done} were there' in printed
    assert len(list((out / 'labels').glob('*.png'))) == 60
    assert not list(out.rglob('*.partial'))


def test_videos(segmentor, digits, call, tmp_path):
    av = pytest.importorskip('av')
    with av.open('clip.mp4', 'w') as file:
        stream = file.add_stream('libx264', rate=8)
        stream.width, stream.height, stream.pix_fmt = 66, 64, 'yuv420p'
        for i in range(5):
            array = np.full((64, 66, 3), 50 * i, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(array, format='rgb24')))
        file.mux(stream.encode())
    Path('broken.mp4').write_bytes(b'no video')
    arguments = ('predict', SEGMENTOR, segmentor, 'clip.mp4', 'broken.mp4', '--out', 'out')
    status, out, _ = call(*arguments)
    assert status == 1
    assert '5 images' in out and 'broken.mp4 cannot be read as a video' in out
    names = {f'labels/clip.mp4/{i:06}.png' for i in range(1, 6)}
    assert files(tmp_path / 'out') == {'overlays/clip.mp4', *names}
    with av.open('out/overlays/clip.mp4') as file:
        assert file.streams.video[0].average_rate == 8
        frames = [frame.to_ndarray(format='rgb24') for frame in file.decode(video=0)]
    assert [frame.shape for frame in frames] == [(64, 66, 3)] * 5
    # Half of each frame is its picture, which becomes brighter.
    assert 80 < frames[4].astype(int).mean() - frames[0].mean() < 120
    status, out, _ = call(*arguments, '--resume')
    assert '1 were there' in out


def test_videos_with_faults(segmentor, call, tmp_path):
    av = pytest.importorskip('av')

    def write(name: str, count: int, height: int, width: int) -> Path:
        options = dict(movflags='faststart') if name.endswith('.mp4') else {}  # its header first
        with av.open(name, 'w', options=options) as file:
            stream = file.add_stream('libx264', rate=8)
            stream.width, stream.height, stream.pix_fmt = width, height, 'yuv444p'
            for i in range(count):
                array = np.random.default_rng(i).integers(0, 255, (height, width, 3), np.uint8)
                file.mux(stream.encode(av.VideoFrame.from_ndarray(array, format='rgb24')))
            file.mux(stream.encode())
        return Path(name)

    write('odd.mkv', 3, 45, 63)
    for suffix in ('mkv', 'mp4'):
        content = write(f'whole.{suffix}', 32, 64, 64).read_bytes()
        Path(f'cut.{suffix}').write_bytes(content[: len(content) // 3])
    Path('empty.mp4').touch()
    with av.open('none.avi', 'w') as file:  # a video without frames
        stream = file.add_stream('mjpeg', rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 64, 'yuvj444p'
        file.start_encoding()
    names = ('odd.mkv', 'cut.mkv', 'cut.mp4', 'empty.mp4', 'none.avi')
    status, out, _ = call('predict', SEGMENTOR, segmentor, *names, '--out', 'out')
    assert status == 1 and '4 inputs failed' in out, out
    for name in ('cut.mkv', 'cut.mp4'):
        assert re.search(
            rf'{name} (ends after 1\.\d of 4\.0 seconds: a part is|cannot be dec)', out
        )
    with av.open('out/overlays/odd.mkv.mp4') as file:
        assert [(f.height, f.width) for f in file.decode(video=0)] == 3 * [(46, 64)]
    assert labels(tmp_path / 'out/labels/odd.mkv/000003.png').shape == (45, 63)
    # No video stands for one that is not whole.
    assert {path.name for path in (tmp_path / 'out/overlays').iterdir()} == {'odd.mkv.mp4'}


def test_sound_alone_is_no_video(tmp_path):
    av = pytest.importorskip('av')
    path = tmp_path / 'sound.mkv'
    with av.open(str(path), 'w') as file:
        stream = file.add_stream('pcm_s16le', rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout='mono')
        frame.rate = 8000
        file.mux(stream.encode(frame))
    with pytest.raises(InputError, match='cannot be read as a video: it has no pictures'):
        read_video(path)


def test_frames_of_different_sizes(tmp_path):
    av = pytest.importorskip('av')
    with write_video(tmp_path / 'a.mp4', Fraction(8)) as add:
        for size in ((64, 48), (80, 32), (64, 48)):
            add(Image.new('RGB', size, 'red'))
    with av.open(str(tmp_path / 'a.mp4')) as file:
        frames = [frame.to_ndarray(format='rgb24') for frame in file.decode(video=0)]
    assert [frame.shape for frame in frames] == 3 * [(48, 64, 3)]
    # The wide frame is shrunk to 64 x 26, amid black.
    red = frames[1][..., 0] > 128
    assert red[12:36].all() and not red[:10].any() and not red[38:].any()


def test_videos_without_pyav_are_explained(segmentor, call, monkeypatch):
    monkeypatch.setitem(sys.modules, 'av', None)
    Path('clip.mp4').touch()
    status, out, _ = call('predict', SEGMENTOR, segmentor, 'clip.mp4', '--out', 'out')
    assert status == 1
    assert 'clip.mp4: videos need PyAV: pip install av' in out


# The command line itself


@pytest.mark.parametrize('verb', VERBS)
def test_help_fits_a_screen_and_shows_an_example(verb, monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['gfnet', verb, '--help'])
    monkeypatch.setenv('COLUMNS', '80')
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 40
    assert f'  gfnet {verb} ' in text


def test_the_verbs_are_listed(monkeypatch, capsys):
    for arguments in (['--help'], []):
        monkeypatch.setattr('sys.argv', ['gfnet', *arguments])
        with pytest.raises(SystemExit):
            main()
    printed = capsys.readouterr()
    assert all(re.search(rf'^  {verb} +[A-Z]', printed.out, re.MULTILINE) for verb in VERBS)
    assert printed.err.startswith('usage: gfnet VERB')


@pytest.mark.parametrize(
    ('arguments', 'error'),
    [
        (['nothing', 'a.pth', 'x.jpg'], 'FileNotFoundError: no config nothing; by name there are'),
        ([SEGMENTOR, 'a.pth', 'x.jpg'], 'FileNotFoundError: no checkpoint at a.pth'),
        ([SEGMENTOR, None, 'empty'], 'ValueError: no images and no videos in empty'),
        ([SEGMENTOR, None, 'x.jpg', '--classes', 'cat'], 'ValueError: unknown classes cat: the'),
        ([SEGMENTOR, None, 'x.jpg', '--classes', ''], 'ValueError: classes is empty'),
        ([SEGMENTOR, None, 'x.jpg', '--opacity', '2'], 'ValueError: opacity must be from 0 to 1'),
        ([SEGMENTOR, None, 'x.jpg', '--batch', '0'], 'ValueError: batch_size must be at least 1'),
        ([SEGMENTOR, None, 'x.jpg', '--tile', '9'], 'ValueError: tiles must have a side of 32'),
    ],
)
def test_errors_are_a_line(segmentor, call, tmp_path, arguments, error):
    (tmp_path / 'empty').mkdir()
    arguments = [segmentor if argument is None else argument for argument in arguments]
    status, _, err = call('predict', *arguments, '--out', 'out', '--device', 'cpu')
    assert status == 1
    assert err.splitlines()[-1].startswith(error)
    assert 'Traceback' not in err
    assert not (tmp_path / 'out').exists()


def test_names_of_classes_with_commas_come_from_a_file(tmp_path):
    (tmp_path / 'names.txt').write_text('tench, Tinca tinca\n\nbed \n')
    parser = argparse.ArgumentParser()
    VERBS['predict'](parser)
    rest = ['c', 'k', 'x.jpg', '--out', 'out', '--classes']
    names = parser.parse_args([*rest, str(tmp_path / 'names.txt')]).classes
    assert names == ['tench, Tinca tinca', 'bed']
    assert parser.parse_args([*rest, 'bed, wall']).classes == ['bed', 'wall']


def test_ctrl_c_and_missing_packages_end_without_a_traceback(call, monkeypatch):
    monkeypatch.setattr('gfnet_dense.openmmlab.measure_complexity', interrupt)
    assert call('flops', 'gfnet_h_s')[0] == 130
    monkeypatch.setitem(sys.modules, 'mmengine.config', None)
    status, _, err = call('train', SEGMENTOR)
    assert status == 1 and 'mmengine' in err and 'Traceback' not in err


def interrupt(**kwargs: object) -> None:
    raise KeyboardInterrupt


def test_a_traceback_is_asked_for(call):
    with pytest.raises(FileNotFoundError):
        call('predict', 'nothing', 'a.pth', 'x.jpg', '--out', 'out', '--debug')


def test_surprising_errors_say_how_to_see_more(call, monkeypatch):
    def fail(**kwargs: object) -> None:
        raise KeyError('x' * 5000)

    monkeypatch.setattr('gfnet_dense.openmmlab.train', fail)
    status, _, err = call('train', SEGMENTOR)
    lines = err.splitlines()
    assert status == 1 and len(lines) == 2
    assert lines[0].startswith('KeyError: ') and len(lines[0]) < 1100
    assert lines[1] == '--debug prints the traceback.'
