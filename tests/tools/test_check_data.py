import re
import runpy
import subprocess
import sys

from faults import write_data
from processes import ROOT, run_tool


def test_the_report_the_picture_and_the_exit_status(tmp_path, monkeypatch, gfnet):
    root = write_data(tmp_path) / 'digits'
    options = [f'{use}_dataloader.dataset.data_root={root}' for use in ('train', 'val', 'test')]
    command = 'upernet_gfnet_nano_digits', '--plot', 'data.png', '--cfg-options', *options
    done = run_tool('check_data.py', *command, cwd=tmp_path, stderr=subprocess.PIPE)
    assert f'Training data: 8 images, BaseSegDataset in {root}' in done.stdout
    assert done.stdout.endswith('pictures: data.png\n0 faults\n')
    assert (tmp_path / 'data.png').exists()
    monkeypatch.chdir(tmp_path)
    status, out, _ = gfnet('check-data', *command, 'model.decode_head.num_classes=7')
    assert status == 1
    # In training and in validation data, whose test data are the same.
    assert out.count('FAULT      decode_head of the model has num_classes=7') == 2
    assert out.endswith('2 faults\n')


def test_a_config_without_data(tmp_path, gfnet):
    (tmp_path / 'empty.py').write_text('model = None\n')
    status, _, error = gfnet('check-data', str(tmp_path / 'empty.py'))
    assert status == 1 and 'empty.py has no dataloader of train, val, test' in error


def test_the_benchmark_makes_data_without_a_fault(monkeypatch, capsys):
    monkeypatch.setenv('XDG_CACHE_HOME', 'put back after this test')
    for name, text in (('ade20k', '20 images, ADE20KDataset'), ('coco', 'objects    50: ')):
        options = ['--images', '20', '--boxes', '50']
        monkeypatch.setattr(sys, 'argv', ['benchmark_checks.py', name, *options])
        runpy.run_path(str(ROOT / 'tools/benchmark_checks.py'), run_name='__main__')
        out = capsys.readouterr().out
        assert text in out and 'FAULT' not in out
        assert len(re.findall(r'building.* s, .* s of processors, peak ', out)) == 3
