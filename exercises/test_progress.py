from importlib import import_module
from pathlib import Path

import pytest


@pytest.mark.parametrize("exercise", sorted(path.stem for path in Path(__file__).parent.glob("e?_*.py")))
@pytest.mark.xfail(raises=NotImplementedError, reason="not begun")
def test_progress(exercise):
    if mistake := import_module(exercise).check():
        pytest.fail(mistake, pytrace=False)
