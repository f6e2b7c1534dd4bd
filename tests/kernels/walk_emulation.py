"""What the Mosaic GPU kernel of `ssd` computes, in plain JAX: takes the place of `pallas_gpu.forward.walk` where there is no GPU.

It reads what the kernel reads (the prepared exponents, the integers of packed sequences, the parts of a split sequence)
and rounds where the kernel rounds, so all that surrounds the kernel can be tested on a CPU.
"""

import jax.numpy as jnp

from pallas_kernels.ssd.pallas_gpu.exponents import start_of_sequence
from pallas_kernels.ssd.pallas_gpu.tiles import CHUNK


def walk(*, plan, parts, x, B, factors, C=None, D=None, z=None, state=None, first_visible=None, keep_states=False):
    batch, length, slices, _ = x.shape
    groups, n = B.shape[2:]
    dtype = x.dtype
    tokens = plan.chunks * CHUNK

    def chunked(a, repeats):
        """[b l k w] -> [chunk b slices 64 w] in float32, zeros behind the end, as the copies of the kernel fill it."""
        a = jnp.pad(a, ((0, 0), (0, tokens - a.shape[1]), (0, 0), (0, 0)))
        a = jnp.repeat(a.astype(jnp.float32), repeats, axis=2).reshape(batch, plan.chunks, CHUNK, slices, -1)
        return jnp.transpose(a, (1, 0, 3, 2, 4))

    def rounded(a):
        return a.astype(dtype).astype(jnp.float32)

    def repeated(a):
        """To slices, and the filling up to a multiple of 8 tokens cut off again."""
        return chunked(a[:, :tokens], slices // groups)

    x_chunks, z_chunks, B = chunked(x, 1), None if z is None else chunked(z, 1), repeated(B)
    factors = jnp.moveaxis(jnp.repeat(factors, slices // factors.shape[1], axis=1), 2, 0)  # [chunk b slices 1|2 64]
    if C is None:
        written = rounded(x_chunks * jnp.exp2(factors[:, :, :, 0])[..., None])
        added = jnp.einsum("cbsjp,cbsjn->cbspn", written, B)
        added = added.reshape(plan.parts, plan.chunks_per_part, *added.shape[1:]).sum(axis=1)
        return jnp.moveaxis(added[:parts], 0, 1)

    C, ys = repeated(C), []
    for part in range(parts):
        carried = jnp.zeros((batch, slices, CHUNK, n), jnp.float32) if state is None else state[:, part]
        for chunk in range(part * plan.chunks_per_part, (part + 1) * plan.chunks_per_part):
            x_c, B_c, s, u = x_chunks[chunk], B[chunk], factors[chunk, :, :, 0], factors[chunk, :, :, 1]
            position = jnp.arange(CHUNK)
            visible = position[:, None] >= position[None, :]
            visible, enters, real = visible[None, None], jnp.array(True), jnp.array(True)
            kept, to_end = jnp.exp2(s[..., -1]), jnp.exp2(s[..., -1:] - u)
            if first_visible is not None:
                first = first_visible[:, chunk]
                start = start_of_sequence(first[:, -1])
                to_end = jnp.where((position[None] >= start[:, None])[:, None], to_end, 0)
                kept = jnp.where((start < 0)[:, None], kept, 0)
                visible = visible & (position[None, None] >= first[..., None])[:, None]
                enters, real = (first < 0)[:, None, :, None], (first < CHUNK)[:, None, :, None]
            scores = jnp.einsum("bsin,bsjn->bsij", C[chunk], B_c)
            weights = jnp.where(visible, scores * jnp.exp2(s[..., :, None] - u[..., None, :]), 0)
            y = jnp.einsum("bsin,bspn->bsip", C[chunk], rounded(carried)) * jnp.exp2(s)[..., None]
            y = jnp.where(enters, y, 0)
            if D is not None:
                y += (D[None, :, None, None] if D.ndim == 1 else D[None, :, None]) * x_c
            y += jnp.einsum("bsij,bsjp->bsip", rounded(weights), x_c)
            if z is not None:
                y *= z_chunks[chunk] / (1 + jnp.exp(-z_chunks[chunk]))
            ys.append(jnp.where(real, y, 0).astype(dtype))
            written = rounded(x_c * to_end[..., None])
            carried = kept[..., None, None] * carried + jnp.einsum("bsjp,bsjn->bspn", written, B_c)
    y = jnp.transpose(jnp.stack(ys), (1, 0, 3, 2, 4)).reshape(batch, tokens, slices, CHUNK)[:, :length]
    return y, carried[:, None] if keep_states else None
