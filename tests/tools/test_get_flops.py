"""The table that the count of multiply-accumulates prints."""

import runpy
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / 'tools' / 'get_flops.py'


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments: str) -> list[str]:
        monkeypatch.setattr('sys.argv', [str(TOOL), *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(TOOL), run_name='__main__')
        printed = capsys.readouterr()
        if end.value.code != 0:
            raise ValueError(printed.err)
        return printed.out.splitlines()

    return call


def test_prints_the_parts_of_a_timm_model(run):
    heading, _, columns, stage, head, total, *_ = run('gfnet_ti')
    assert heading == 'gfnet_ti, an image of 224 x 224 pixels (H x W)'
    begins = [line.split()[0] for line in (columns, stage, head, total)]
    assert begins == ['GMACs', 'stage', 'head', 'total']
    assert total.split()[-2] == '1.283'
    assert total.split()[-1] == '7,511,784'


def test_prints_the_parts_of_a_config_for_a_shape(run):
    heading, *lines = run('upernet_gfnet_nano_digits', '--shape', '96', '160')
    assert heading == 'upernet_gfnet_nano_digits, an image of 96 x 160 pixels (H x W)'
    parts = [line.split('  ')[0] for line in lines[2:9]]
    assert parts == [
        *(f'stage {i}' for i in (1, 2, 3, 4)),
        'decode_head',
        'auxiliary_head',
        'total',
    ]


def test_names_what_it_knows(run):
    with pytest.raises(
        ValueError, match=r'FileNotFoundError: no config nothing; by name there are .*gfnet_h_s'
    ):
        run('nothing')
