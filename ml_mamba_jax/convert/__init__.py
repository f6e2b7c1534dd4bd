"""PyTorch weights to ours and back: `import_torch` and `export_torch`, which `convert_torch.py` calls."""

from ml_mamba_jax.convert.conversion import Conversion, export_torch, import_torch

__all__ = ["Conversion", "export_torch", "import_torch"]
