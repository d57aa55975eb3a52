import subprocess

from faults import write_data
from processes import run_tool


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
