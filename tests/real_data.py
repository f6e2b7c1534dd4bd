"""Real photos and the real GPT-NeoX tokenizer. Some come with packages, the others are skipped where they do not lie beside
the repository."""

from pathlib import Path

import matplotlib
import pytest
import sklearn.datasets

BESIDE = Path(__file__).parents[2] / "shared" / "data"
_SKLEARN = Path(sklearn.datasets.__file__).parent / "images"
_MATPLOTLIB = Path(matplotlib.get_data_path()) / "sample_data"

CHINA = _SKLEARN / "china.jpg"
"""640 x 427, RGB."""
LOGO = _MATPLOTLIB / "logo2.png"
PACKAGED = [CHINA, _SKLEARN / "flower.jpg", _MATPLOTLIB / "grace_hopper.jpg", LOGO]
TOKENIZER_FILE = BESIDE / "gpt_neox_tokenizer.json"


def _where_present(path: Path):
    return pytest.param(path, id=path.name, marks=pytest.mark.skipif(not path.exists(), reason=f"{path} is not there"))


IMAGES = [_where_present(path) for path in [*PACKAGED, *(BESIDE / "images" / f"test{i}.png" for i in range(7))]]

needs_gpt_neox = pytest.mark.skipif(not TOKENIZER_FILE.exists(), reason=f"{TOKENIZER_FILE} is not there")
