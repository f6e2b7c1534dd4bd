"""Named real shapes: what the tests, the benchmarks and `python -m ml_mamba_jax.info` run the kernels at."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.mamba2_step.sizes import Sizes


@dataclasses.dataclass(frozen=True)
class SSDSpec:
    """One call of `ssd`: sizes by axis letter, and the dtype of x, B and C."""

    b: int
    l: int  # noqa: E741, the axis letter
    h: int = 80
    p: int = 64
    n: int = 128
    g: int = 1
    dtype: str = "bfloat16"

    @property
    def sizes(self) -> Sizes:
        """Of the mixer around it."""
        return Sizes(self.h, self.p, self.g, self.n)

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The array arguments of `ssd` as abstract values."""
        dtype, f32 = jnp.dtype(self.dtype), jnp.float32
        return {
            "x": jax.ShapeDtypeStruct((self.b, self.l, self.h, self.p), dtype),
            "dt": jax.ShapeDtypeStruct((self.b, self.l, self.h), dtype),
            "A": jax.ShapeDtypeStruct((self.h,), f32),
            "B": jax.ShapeDtypeStruct((self.b, self.l, self.g, self.n), dtype),
            "C": jax.ShapeDtypeStruct((self.b, self.l, self.g, self.n), dtype),
        }


# The scan of one Mamba-2 2.7B layer (80 heads of 64, state 128) at the lengths that matter.
SSD_SPECS = {
    "image": SSDSpec(b=8, l=729),
    "train": SSDSpec(b=8, l=2048),
    "long": SSDSpec(b=1, l=8192),
    "very-long": SSDSpec(b=1, l=131072),
}
