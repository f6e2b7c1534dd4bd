"""Every Python block of the documentation runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ml_mamba_jax.convert import keys

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
NEEDS_RUN = "runs/digits-vqa"  # those are run by tests/training/test_train.py, beside a run
BLOCKS = {
    f"{path.name}-{i}": block
    for path in sorted((ROOT / "docs").glob("*.md"))
    for i, block in enumerate(BLOCK.findall(path.read_text(encoding="utf-8")))
    if NEEDS_RUN not in block
}


def test_there_are_blocks():
    assert len(BLOCKS) > 5


@pytest.mark.parametrize("name", BLOCKS)
def test_block(name, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCKS[name]], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr


def test_the_page_of_keys_is_what_the_code_writes():
    page = (ROOT / "docs" / "keys.md").read_text(encoding="utf-8")
    assert page == keys.page(), "renew it: python -m ml_mamba_jax.convert.keys > docs/keys.md"
