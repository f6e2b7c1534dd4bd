"""What the Triton kernels compute, in plain JAX: for where there is no GPU.

`launch` stands in for `pallas_kernels.ssd.triton.launch.launch`, so all that surrounds the kernels can be tested.
"""

import jax.numpy as jnp

from pallas_kernels.ssd.triton.plan import Plan
from pallas_kernels.ssd.visibility import start_of_sequence


def launch(kernel, plan: Plan, grid, inputs, outputs, **constants):
    assert grid[1:] == (plan.heads, plan.batch) or grid == (plan.chunks, plan.heads // plan.block_heads, plan.batch)
    results = {
        "ssd_states": _states,
        "ssd_outputs": _outputs,
        "ssd_gradients_through_states": _gradients_through_states,
        "ssd_gradients": _gradients,
    }[kernel](_Emulated(plan, inputs), **constants)
    for name, like in outputs.items():
        assert results[name].shape == like.shape, name
    return {name: results[name].astype(like.dtype) for name, like in outputs.items()}


class _Emulated:
    """The inputs in float32 with tokens in chunks, [b chunks h Q ..], and how much passes through a chunk."""

    def __init__(self, plan, inputs):
        self.plan, self.given = plan, inputs
        visible = inputs["first_visible"]
        if visible is None:
            visible = jnp.full((plan.batch, plan.chunks, plan.chunk), -1)
        self.s, self.d = self.of_token("s"), self.of_token("d")
        s_end, q = self.s[..., -1:], jnp.arange(plan.chunk)
        start = start_of_sequence(visible[..., -1:])
        self.real = (visible < plan.chunk)[:, :, None]
        self.from_state = jnp.where((visible < 0)[:, :, None], jnp.exp(self.s), 0)
        self.to_end = jnp.where((q[None, None] >= start)[:, :, None], jnp.exp(s_end - self.s), 0)
        self.kept = jnp.where(start < 0, jnp.exp(self.s[..., -1]), 0)[..., None, None]
        sees = (q[:, None] >= q[None])[None, None] & (q[None, None, None] >= visible[..., None])
        difference = jnp.minimum(self.s[..., :, None] - self.s[..., None, :], 0)
        self.decays = jnp.exp(jnp.where(sees[:, :, None], difference, -jnp.inf))

    def of_token(self, name):
        return jnp.swapaxes(self.given[name], 1, 2)

    def __getitem__(self, name):
        """x, y, z or B, C: [b l k w] -> [b chunks h Q w], groups repeated to heads"""
        a, plan = self.given[name].astype(jnp.float32), self.plan
        a = jnp.pad(a, ((0, 0), (0, plan.chunks * plan.chunk - plan.length), (0, 0), (0, 0)))
        a = jnp.swapaxes(a.reshape(plan.batch, plan.chunks, plan.chunk, *a.shape[2:]), 2, 3)
        return jnp.repeat(a, plan.heads // a.shape[2], axis=2)

    def by_block(self, a):
        """[b chunks h Q n] -> [blocks b g chunks Q n]"""
        plan = self.plan
        a = a.reshape(plan.batch, plan.chunks, plan.groups, -1, plan.block_heads, *a.shape[3:]).sum(axis=4)
        return jnp.transpose(a, (3, 0, 2, 1, 4, 5))

    def by_row(self, a):
        """[b chunks h Q p] -> [b l h p]"""
        a = jnp.swapaxes(a, 2, 3)
        return a.reshape(a.shape[0], -1, *a.shape[3:])[:, : self.plan.length]


def _states(e, *, REVERSE, HAS_ENDS, **_):
    assert (e.given["ends"] is not None) == HAS_ENDS
    factor = e.from_state if REVERSE else e.to_end * e.d
    added = jnp.einsum("bchqp,bchqn->bchpn", e["values"] * factor[..., None], e["keys"])
    state, seen = e.given["ends"] if HAS_ENDS else jnp.zeros_like(added[:, 0]), []
    for chunk in range(e.plan.chunks)[:: -1 if REVERSE else 1]:
        seen.append(state)
        state = e.kept[:, chunk] * state + added[:, chunk]
    return {"states": jnp.stack(seen[:: -1 if REVERSE else 1], axis=1), "last": state}


def _outputs(e, *, HAS_D, HAS_Z, **_):
    assert (e.given["D"] is not None, e.given["z"] is not None) == (HAS_D, HAS_Z)
    scores = jnp.einsum("bchin,bchjn->bchij", e["C"], e["B"])
    y = jnp.einsum("bchij,bchjp->bchip", e.decays * scores * e.d[..., None, :], e["x"])
    y += jnp.einsum("bchin,bchpn->bchip", e["C"], e.given["states"].astype(jnp.float32)) * e.from_state[..., None]
    if HAS_D:
        y += e["x"] * e.given["D"][None, None, :, None]
    if HAS_Z:
        y *= e["z"] / (1 + jnp.exp(-e["z"]))
    return {"y": e.by_row(jnp.where(e.real[..., None], y, 0))}


def _gradients_through_states(e, *, READING, **_):
    states, dstates = (e.given[name].astype(jnp.float32) for name in ("states", "dstates"))
    factor = e.from_state if READING else e.to_end * e.d
    dkeys = jnp.einsum("bchqp,bchpn->bchqn", e["values"], states) * factor[..., None]
    return {
        "dkeys": e.by_block(dkeys),
        "through": jnp.swapaxes((dkeys * e["keys"]).sum(-1), 1, 2),
        "at_end": jnp.swapaxes((e.kept * states * dstates).sum((-1, -2)), 1, 2),
    }


def _gradients(e, *, HAS_D, **_):
    x, dy, B, C, d = e["x"], e["dy"], e["B"], e["C"], e.d
    scores, moments = jnp.einsum("bchin,bchjn->bchij", C, B), jnp.einsum("bchip,bchjp->bchij", dy, x)
    dscores = moments * e.decays * d[..., None, :]
    r = jnp.einsum("bchjn,bchpn->bchjp", B, e.given["dstates"].astype(jnp.float32)) * e.to_end[..., None]
    r += jnp.einsum("bchij,bchip->bchjp", e.decays * scores, dy)
    dx = r * d[..., None]
    if HAS_D:
        dx += dy * e.given["D"][None, None, :, None]
    through = dscores * scores
    read, written = e.of_token("read"), e.of_token("written")
    ds = through.sum(-1) - through.sum(-2) + read - written
    da = jnp.cumsum(ds[..., ::-1], axis=-1)[..., ::-1] + written.sum(-1, keepdims=True)
    return {
        "dx": e.by_row(dx),
        "dB": e.by_block(jnp.einsum("bchij,bchin->bchjn", dscores, C)),
        "dC": e.by_block(jnp.einsum("bchij,bchjn->bchin", dscores, B)),
        "dd": jnp.swapaxes((x * r).sum(-1), 1, 2),
        "da": jnp.swapaxes(da, 1, 2) + e.given["at_end"][..., None],
        "dD": (x * dy).sum(3),
    }
