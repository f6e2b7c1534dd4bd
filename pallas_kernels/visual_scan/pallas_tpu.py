"""Visual scan on TPUs: one walk of the scan's kernel for all directions; XLA orders the patches and convolves."""

from pallas_kernels.causal_conv1d.xla import causal_conv1d
from pallas_kernels.ssd.pallas_tpu import ssd, why_not_here, why_not_ssd  # noqa: F401, parts of a backend
from pallas_kernels.visual_scan.parts import by_parts

visual_scan = by_parts(causal_conv1d, ssd)


def why_not_visual_scan(x, dt, A, B, C, *, chunk_size=None, precision=None, **_) -> str | None:
    return why_not_ssd(x, dt, A, B, C, chunk_size=chunk_size, precision=precision)  # groups are as large as in one scan
