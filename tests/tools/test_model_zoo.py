"""The model zoo says what the configs say."""

import runpy

import pytest
import yaml
from processes import ROOT


def test_the_model_zoo_is_up_to_date(monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['model_zoo.py', '--check'])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / 'tools/model_zoo.py'), run_name='__main__')
    assert end.value.code == 0, capsys.readouterr().out


def test_every_config_is_on_the_page():
    page = (ROOT / 'configs/README.md').read_text()
    missing = [path.stem for path in ROOT.glob('configs/*.py') if f'({path.name})' not in page]
    assert not missing


def test_every_config_has_an_entry_with_metrics_and_their_source():
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']
    files = [yaml.safe_load((ROOT / path).read_text()) for path in index]
    entries = [entry for file in files for entry in file['Models']]
    assert {entry['Config'] for entry in entries} == {
        f'configs/{path.name}' for path in ROOT.glob('configs/*.py')
    }
    for entry in entries:
        (result,) = entry['Results']
        known = [value for value in result['Metrics'].values() if value is not None]
        measured = 'not measured here' not in result['Source']
        assert measured == ('nano' in entry['Name'])
        assert bool(known) == (measured or 'reported in' in result['Source'])
        assert entry['Metadata']['Parameters'] > 0 and entry['Metadata']['FLOPs'] > 0
    for file in files:
        (collection,) = file['Collections']
        architecture = collection['Metadata']['Architecture']
        assert len(architecture) == len(set(architecture))
