"""A conversion from files to parameters, as `convert_torch.py` does it, and the measure of what it changed."""

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from torch import Tensor

from ml_mamba_jax.config import MLMambaConfig
from ml_mamba_jax.convert.plan import Finding, make_plan
from ml_mamba_jax.convert.source import open_source
from ml_mamba_jax.convert.to_jax import assemble
from ml_mamba_jax.model import MLMamba

jit_small = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)
"""`jax.jit` for small models, which take longer to compile than to run."""


class Converted(NamedTuple):
    config: MLMambaConfig
    params: dict
    findings: list[Finding]

    @property
    def model(self) -> MLMamba:
        return MLMamba(self.config)


def convert(path: Path, **options) -> Converted:
    """`options` as of `open_source`."""
    with open_source(path, **options) as source:
        plan = make_plan(source)
        return Converted(source.config, unflatten_dict(assemble(source, plan), sep="/"), plan.findings)


def relative_error(got, expected) -> float:
    """The largest difference, as a part of the largest value."""
    got, expected = (np.asarray(a.detach() if isinstance(a, Tensor) else a, np.float64) for a in (got, expected))
    assert got.shape == expected.shape, (got.shape, expected.shape)
    return float(np.abs(got - expected).max() / np.abs(expected).max())
