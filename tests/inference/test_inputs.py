"""Which files are found, and what their results are called."""

import io
from pathlib import Path

import pytest

from gfnet_dense.inference.inputs import Inputs


@pytest.fixture(autouse=True)
def _files(tmp_path, monkeypatch) -> None:
    for name in (
        'photos/a.jpg', 'photos/a.PNG', 'photos/x/b.jpg', 'photos/y/b.jpg', 'photos/notes.txt',
        'photos/.hidden.jpg', 'photos/y/clip.mp4', 'photos/y/clip.jpg', 'more/b.jpg',
        'photos/out/old.jpg',
    ):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.chdir(tmp_path)


def found(*arguments: str, out: str = 'photos/out') -> dict[str, str]:
    inputs = Inputs(arguments, Path(out))
    items = list(inputs)
    assert inputs.count() in (None, len(items))
    names = {str(item.name): str(item.path) for item in items}
    assert len(names) == len(items)
    return names


def test_folders_are_searched_and_their_tree_is_kept():
    assert found('photos') == {
        'a.jpg': 'photos/a.jpg',
        'a.PNG': 'photos/a.PNG',
        'x/b': 'photos/x/b.jpg',
        'y/clip.jpg': 'photos/y/clip.jpg',
        'y/clip.mp4': 'photos/y/clip.mp4',
        'y/b': 'photos/y/b.jpg',
    }
    assert list(found('photos'))[-1] == 'y/clip.mp4'  # sorted


def test_other_files_are_counted():
    inputs = Inputs(['photos'], Path('photos/out'))
    inputs.count()
    assert (inputs.skipped, inputs.suffixes) == (1, {'.txt'})


def test_equal_names_below_several_arguments_do_not_collide():
    assert found('photos/x', 'more', 'photos/y/b.jpg') == {
        'photos/x/b': 'photos/x/b.jpg',
        'more/b': 'more/b.jpg',
        'photos/y/b': 'photos/y/b.jpg',
    }


def test_what_is_named_twice_is_found_once():
    once = found('photos')
    assert found('photos', 'photos', 'photos/x', 'photos/a.jpg', 'photos/*/b.jpg') == once


@pytest.mark.parametrize('pattern', ['photos/*/b.jpg', 'photos/**/b.jpg'])
def test_patterns(pattern):
    assert found(pattern) == {'x/b': 'photos/x/b.jpg', 'y/b': 'photos/y/b.jpg'}


def test_paths_on_standard_input(monkeypatch, tmp_path):
    text = f'photos/x/b.jpg\n\n{tmp_path}/more/b.jpg\n/somewhere/c.png\n'
    monkeypatch.setattr('sys.stdin', io.StringIO(text))
    assert found('-') == {
        'photos/x/b': 'photos/x/b.jpg',
        'more/b': f'{tmp_path}/more/b.jpg',
        'somewhere/c': '/somewhere/c.png',
    }


def test_files_that_are_not_there_are_passed_on_to_be_named():
    assert set(found('nothing.jpg', 'no/*.png').values()) == {'nothing.jpg', 'no/*.png'}


def test_results_of_an_earlier_run_are_no_inputs():
    for name in ('results/overlays/b.jpg', 'results/labels/b.png', 'results/c.jpg'):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    assert set(found('**/*.jpg', out='results').values()) == {
        'photos/a.jpg', 'photos/x/b.jpg', 'photos/y/b.jpg', 'photos/y/clip.jpg', 'more/b.jpg',
        'photos/out/old.jpg', 'results/c.jpg',
    }  # fmt: skip


def test_names_that_end_in_another_suffix_do_not_collide():
    Path('photos/a.jpg.png').touch()
    Path('photos/y/clip.mp4.jpg').touch()
    names = found('photos')
    assert names['a.jpg'] == 'photos/a.jpg'
    assert names['a.jpg.png'] == 'photos/a.jpg.png'
    assert names['y/clip.mp4.jpg'] == 'photos/y/clip.mp4.jpg'


def test_links_that_lead_back_are_followed_once():
    expected = found('photos')
    Path('photos/loop').symlink_to('.')
    assert found('photos') == expected


def test_a_path_that_is_named_twice_is_found_once(monkeypatch):
    assert list(found('photos/*/b.jpg', 'photos/x/*.jpg').values()) == [
        'photos/x/b.jpg',
        'photos/y/b.jpg',
    ]
    monkeypatch.setattr('sys.stdin', io.StringIO('more/b.jpg\n./more/b.jpg\n'))
    assert found('-') == {'more/b': 'more/b.jpg'}


def test_a_name_that_is_taken_is_changed(monkeypatch, tmp_path):
    outside = f'/{tmp_path.name}-of-nobody/b.jpg'
    inside = Path(outside[1:])
    inside.parent.mkdir()
    inside.touch()
    monkeypatch.setattr('sys.stdin', io.StringIO(f'{inside}\n{outside}\n'))
    name = f'{inside.parent}/b'
    assert found('-') == {name: str(inside), f'{name}.jpg': outside}
