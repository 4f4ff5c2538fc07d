"""What CI checks beside the behaviour: style, ways of installing, sanitizers. Minutes long, so only with CI=1."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("CI"), reason="takes minutes; set CI=1 to run it"),
]


@pytest.mark.parametrize(
    "command", [["make", "lint"], ["scripts/check_packaging.sh"], ["scripts/check_sanitizers.sh"]], ids=" ".join
)
def test_check(command):
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert run.returncode == 0, run.stdout + run.stderr
