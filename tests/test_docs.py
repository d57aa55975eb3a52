"""The documentation: its Python runs, its links lead somewhere, its commands exist."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md')]
PAGES += sorted((ROOT / 'docs').glob('*.md'))
# Blocks marked `python` run as they stand. Those marked `py` need network, files or packages that
# the tests do not have.
BLOCK = re.compile(r'^```python\n(.*?)^```$', re.MULTILINE | re.DOTALL)
LINK = re.compile(r'\]\(([^)\s]+)\)')


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path) -> list[str]:
    return BLOCK.findall(path.read_text())


def headings(path: Path) -> set[str]:
    """Return the anchors of a page, as GitHub makes them."""
    titles = re.findall(r'^#+ (.*)$', path.read_text(), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in titles}


def run_blocks(path: Path) -> dict[str, object]:
    """Run the Python of a page, one block after the other; return the variables."""
    scope = {}
    for block in blocks(path):
        code = block.replace('pretrained=True', 'pretrained=False')
        exec(compile(code, str(path), 'exec'), scope)
    return scope


@pytest.mark.slow
@pytest.mark.parametrize('path', [path for path in PAGES[1:] if blocks(path)], ids=page_id)
def test_python_blocks_of_a_page_run_one_after_the_other(path):
    run_blocks(path)


def test_the_readme_shows_maps_of_four_strides():
    (block,) = blocks(ROOT / 'README.md')
    assert 'pretrained=True' in block
    sizes = [tuple(m.shape) for m in run_blocks(ROOT / 'README.md')['maps']]
    assert sizes == [(1, 96 << i, 480 // (4 << i), 640 // (4 << i)) for i in range(4)]


@pytest.mark.slow
def test_configs_in_the_docs_build():
    from mmengine.registry import MODELS, init_default_scope

    import gfnet_dense  # noqa: F401

    init_default_scope('mmseg')
    import mmseg.models  # noqa: F401

    found = [block for block in blocks(ROOT / 'docs/models.md') if 'model = dict(' in block]
    assert len(found) == 2
    for block in found:
        scope = {}
        exec(block, scope)
        model = scope['model']
        model['backbone'].pop('init_cfg', None)
        backbone, neck = (MODELS.build(model[part]) for part in ('backbone', 'neck'))
        maps = neck(backbone(torch.zeros(1, 3, 64, 64)))
        assert [m.shape[-1] for m in maps] == [16, 8, 4, 2]


@pytest.mark.parametrize('path', PAGES, ids=page_id)
def test_relative_links_lead_to_files_and_headings(path):
    for link in LINK.findall(path.read_text()):
        if link.startswith('http'):
            continue
        name, _, anchor = link.partition('#')
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


@pytest.mark.parametrize('path', PAGES, ids=page_id)
def test_a_page_says_nothing_twice(path):
    lines = re.findall(r'^(?:## .*|[A-Z].{60,})$', path.read_text(), re.MULTILINE)
    assert len({*lines}) == len(lines)


@pytest.mark.parametrize('path', PAGES, ids=page_id)
def test_commands_name_scripts_configs_and_targets_that_exist(path):
    text = path.read_text()
    for script in set(re.findall(r'\btools/\w+\.(?:py|sh)', text)):
        assert (ROOT / script).is_file(), script
    for config in set(re.findall(r'\b(?:\w+_)?gfnet_\w+_(?:ade20k|coco|imagenet|digits)\b', text)):
        assert (ROOT / 'configs' / f'{config}.py').is_file(), config
    targets = set(re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE))
    commands = re.findall(r'(?:^|`)make ((?:[a-z-]+))', text, re.MULTILINE)
    assert {*commands} <= targets


def test_the_readme_is_short_and_every_page_is_in_its_table():
    text = (ROOT / 'README.md').read_text()
    assert len(text.splitlines()) <= 120
    for page in sorted((ROOT / 'docs').glob('*.md')):
        assert f'](docs/{page.name})' in text, page.name
