"""The model zoo says what the configs say."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_model_zoo_is_up_to_date():
    result = subprocess.run(
        [sys.executable, ROOT / 'tools/model_zoo.py', '--check'], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]


def test_every_config_is_on_the_page():
    page = (ROOT / 'configs/README.md').read_text()
    missing = [path.stem for path in ROOT.glob('configs/*.py') if f'({path.name})' not in page]
    assert not missing
