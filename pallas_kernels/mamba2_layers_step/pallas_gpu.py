"""A token through all layers on Hopper in one launch whose stream of weights never stops (Pallas, Mosaic GPU).

Decoding a few rows is reading the weights. One thread block runs on each processor. One of its warpgroups does nothing
but copy: it fills a ring of weight tiles in shared memory, layer after layer, as fast as tiles are used up. The others
compute. They walk through the layers in four phases, and all blocks meet after each:

    1. in_proj:  u = rms_norm(residual), then sums of zxbcdt, in parts (see `split`)
    2. scan:     convolution, state and gate, one head and some of its channels at a time
    3. out_proj: rms_norm(y * silu(z)), then sums of the output, in parts
    4. add:      the output is added to the residual

While they wait for each other, the ring goes on filling: weights depend on no activation. It holds as much as the
memory delivers in several microseconds, so it hides the meetings and the two phases that need no weights.

Products are taken as y^T = W^T x^T by wgmma: the columns of a weight tile are its 64 rows, the rows of the batch, filled
up to a multiple of 8, its columns. Weights in int8 become bfloat16 in shared memory, and their scales multiply the sums.
The sums of the parts are added up in a fixed order by whoever reads them.

The blocks meet at a counter in device memory. They must all run at once: one for each processor, never more.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gradients import with_gradient_of
from pallas_kernels.hopper import PROCESSORS, load, load32, silu, why_not_here  # noqa: F401, part of a backend
from pallas_kernels.mamba2_layers_step import xla
from pallas_kernels.mamba2_layers_step.by_layers import by_layers
from pallas_kernels.mamba2_layers_step.split import COLUMNS, ROWS, Split
from pallas_kernels.mamba2_step import pallas_gpu as one_layer
from pallas_kernels.mamba2_step.sizes import Sizes, split_sizes
from pallas_kernels.ssd.pallas_gpu import step
from pallas_kernels.ssd.pallas_gpu.tiles import SHARED_MEMORY, operand, square

COMPUTING = 2  # warpgroups of a block that compute
BOXES = COLUMNS // 64  # a tile of weights is so many squares of 64 x 64 next to each other
AT_ONCE = 2 * 64 * COLUMNS * 2  # bytes of weights on their way: enough for the memory; others wait behind them
ADDED = 128  # channels of the residual that a warpgroup adds up at a time
MOST_ROWS = 16  # of the batch in one launch
PRODUCTS = {"in_proj": "zxbcdt", "out_proj": "output"}
OPTIONS = ("dt_limit", "norm_eps", "norm_before_gate", "in_norm_eps")

OPERAND = plgpu.Layout.TILED(plgpu.Tiling(((8, 64), (2, 64), (4,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
"""[8k 64]: half a warp reads 64 neighbouring numbers of a row."""
CONVERTED = plgpu.Layout.TILED(
    plgpu.Tiling(((16, 64), (4, 64), (8,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
"""[64 64]: 16 bytes of each thread at a time, when they are bfloat16."""


def why_not_mamba2_layers_step(
    residual, conv_state, ssm_state, in_norm_weight, in_proj, conv_weight, A, out_proj, **arguments
) -> str | None:
    """One layer's kernel must take it: beyond what one launch does, that one runs in a loop over layers."""
    sizes = split_sizes(ssm_state, _first(conv_weight))
    zxbcdt = jax.ShapeDtypeStruct((residual.shape[0], sizes.projected), conv_state.dtype)
    per_layer = {
        name: _first(arguments[name])
        for name in ("conv_bias", "D", "dt_bias", "norm_weight")
        if arguments.get(name) is not None
    }
    return one_layer.why_not_mamba2_step(
        _first(conv_state), _first(ssm_state), zxbcdt, _first(conv_weight), _first(A), **per_layer
    )


def why_not_one_launch(
    residual,
    conv_state,
    ssm_state,
    in_norm_weight,
    in_proj,
    conv_weight,
    A,
    out_proj,
    *,
    norm_weight=None,
    norm_before_gate=False,
    in_proj_scale=None,
    out_proj_scale=None,
    **_,
) -> str | None:
    """Why a loop over layers runs instead."""
    sizes = split_sizes(ssm_state, _first(conv_weight))
    batch, width = residual.shape
    if batch > MOST_ROWS:
        return f"{batch} rows; one launch takes up to {MOST_ROWS}, beyond them the states outweigh the weights"
    if conv_state.dtype != jnp.bfloat16:
        return f"the convolution state is {conv_state.dtype}; one launch takes bfloat16"
    for name, a, scale in (("in_proj", in_proj, in_proj_scale), ("out_proj", out_proj, out_proj_scale)):
        if a.dtype not in (jnp.bfloat16, jnp.int8) or a.dtype != in_proj.dtype:
            return f"{name} is {a.dtype}; one launch takes both projections in bfloat16, or both in int8"
        if (scale is not None) != (a.dtype == jnp.int8):
            has = "without" if scale is None else "with"
            return f"{name} is {a.dtype} {has} a scale; one launch takes int8 with one, bfloat16 without"
    if norm_weight is None or norm_before_gate:
        return "one launch takes a norm after the gate"
    if sizes.state not in (64, 128):
        return f"the state size is {sizes.state}; one launch takes 64 and 128"
    for name, size in {"the residual": width, "the inner width": sizes.inner}.items():
        if size % ADDED:
            return f"{name} is {size}; one launch takes multiples of {ADDED}"
    if sizes.inner // sizes.groups % ROWS:
        return f"a group has {sizes.inner // sizes.groups} channels; one launch takes multiples of {ROWS}"
    aligned = 16 // in_proj.dtype.itemsize  # rows of copies begin at multiples of 16 bytes
    if sizes.projected % aligned:
        return f"the input projection is {sizes.projected} wide; one launch takes multiples of {aligned}"
    plan = make_plan(residual, ssm_state, conv_weight, in_proj)
    if plan.stages <= plan.at_once:
        return (
            f"shared memory holds {max(plan.stages, 0)} tiles of weights; one launch needs {plan.at_once + 1} or more"
        )
    device = jax.devices()[0]
    if device.platform == "gpu" and device.core_count < PROCESSORS:
        return f"the device has {device.core_count} processors; one launch needs {PROCESSORS}"
    return None


def mamba2_layers_step(*args, **arguments):
    names = ("residual", "conv_state", "ssm_state", "in_norm_weight", "in_proj", "conv_weight", "A", "out_proj")
    arrays = dict(zip(names, args, strict=False)) | arguments
    options = {name: arrays.pop(name) for name in OPTIONS if name in arrays}
    arrays = {name: a for name, a in arrays.items() if a is not None}
    if why_not_one_launch(**arrays, **options):
        return by_layers(one_layer.mamba2_step)(**arrays, **options)
    run = with_gradient_of(
        lambda arrays: xla.mamba2_layers_step(**arrays, **options), lambda arrays: _one_launch(**arrays, **options)
    )
    return run(arrays)


class Place(NamedTuple):
    """Of a piece of the state: its row of the batch, head and group, and its first channel, in the head and in all."""

    row: Array
    head: Array
    group: Array
    within: Array
    channel: Array


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of the launch, and who does what."""

    layers: int
    batch: int
    filled: int
    """Rows of the batch, filled up to a multiple of 8."""
    width: int
    sizes: Sizes
    dtype: jnp.dtype
    """Of the projections."""
    blocks: int = PROCESSORS

    @property
    def quantized(self) -> bool:
        return self.dtype == jnp.int8

    @property
    def bytes_of_tile(self) -> int:
        return ROWS * COLUMNS * self.dtype.itemsize

    @property
    def at_once(self) -> int:
        """Tiles of weights on their way."""
        return AT_ONCE // self.bytes_of_tile

    @property
    def in_proj(self) -> Split:
        return Split.of(self.width, self.sizes.projected, self.blocks)

    @property
    def out_proj(self) -> Split:
        return Split.of(self.sizes.inner, self.width, self.blocks)

    @property
    def products(self) -> dict[str, Split]:
        return {"in_proj": self.in_proj, "out_proj": self.out_proj}

    @property
    def stride(self) -> int:
        """Of the shares of `out_proj` over the blocks: one with a tile more of one product has no more of both."""
        counts = [np.resize([*split.counts, *[0] * self.blocks], self.blocks) for split in self.products.values()]
        strides = [stride for stride in range(1, self.blocks + 1) if math.gcd(stride, self.blocks) == 1]
        shares = np.arange(self.blocks)
        return min(strides, key=lambda stride: (counts[0] + counts[1][shares * stride % self.blocks]).max())

    def shares(self) -> dict:
        """This block's of both products."""
        block = lax.axis_index("block")
        return {"in_proj": block, "out_proj": lax.rem(block * self.stride, self.blocks)}

    @property
    def tile(self) -> step.Tile:
        """What a warpgroup holds of the state of a head."""
        heads, head_dim, _, n = self.sizes
        tallest = step.choose_tile(10**6, heads, head_dim, n)
        workers = self.blocks * COMPUTING
        rows = tallest.rows
        while rows % 32 == 0 and self.batch * heads * (head_dim // rows) * 2 <= workers:
            rows //= 2
        return step.Tile(rows, n)

    @property
    def pieces(self) -> int:
        """Tiles of the state of a head."""
        return self.sizes.head_dim // self.tile.rows

    @property
    def all_pieces(self) -> int:
        return self.batch * self.sizes.heads * self.pieces

    def pieces_of_worker(self):
        """The first piece of the state that this warpgroup holds, and the first one that it does not any more."""
        workers, worker = self.blocks * COMPUTING, _worker(self)
        return lax.div(worker * self.all_pieces, workers), lax.div((worker + 1) * self.all_pieces, workers)

    def place(self, piece) -> "Place":
        sizes = self.sizes
        row, head = lax.div(piece, sizes.heads * self.pieces), lax.rem(lax.div(piece, self.pieces), sizes.heads)
        within = lax.rem(piece, self.pieces) * self.tile.rows
        return Place(row, head, lax.div(head, sizes.heads // sizes.groups), within, head * sizes.head_dim + within)

    def channels_of_B_C(self, group) -> list:
        """The first of B and of C in [x | B | C]."""
        return [self.sizes.inner + (i * self.sizes.groups + group) * self.sizes.state for i in range(2)]

    @property
    def squares(self) -> tuple[int, int]:
        """Sums of squares of a row of the residual, and of a group of a row of y; up to a multiple of 64."""
        sizes = self.sizes
        return tuple(-(-n // 64) * 64 for n in (self.width // ADDED, sizes.heads // sizes.groups * self.pieces))

    @property
    def operand_tiles(self) -> int:
        return max(self.in_proj.most_rows, self.out_proj.most_rows)

    @property
    def stages(self) -> int:
        """Tiles of weights that fit into shared memory."""
        vectors = COMPUTING * 3 * 128 * 4
        taken = self.operand_tiles * self.filled * ROWS * 2 + vectors + 6 * 1024
        taken += 2 * ROWS * COLUMNS * 2 if self.quantized else 0  # two of them in bfloat16
        return min(10, (SHARED_MEMORY - taken) // self.bytes_of_tile)


def make_plan(residual, ssm_state, conv_weight, in_proj) -> Plan:
    batch, width = residual.shape
    sizes = split_sizes(ssm_state, _first(conv_weight))
    return Plan(ssm_state.shape[0], batch, -(-batch // 8) * 8, width, sizes, jnp.dtype(in_proj.dtype))


def _one_launch(
    residual,
    conv_state,
    ssm_state,
    in_norm_weight,
    in_proj,
    conv_weight,
    A,
    out_proj,
    conv_bias=None,
    D=None,
    dt_bias=None,
    norm_weight=None,
    in_proj_scale=None,
    out_proj_scale=None,
    active=None,
    dt_limit=(0.0, float("inf")),
    norm_eps=1e-5,
    norm_before_gate=False,
    in_norm_eps=1e-5,
):
    plan = make_plan(residual, ssm_state, conv_weight, in_proj)
    sizes, filled = plan.sizes, plan.filled
    inputs = {
        "in_norm_weight": in_norm_weight,
        "in_proj": in_proj,
        "conv_weight": conv_weight,
        "conv_bias": conv_bias,
        "A": A,
        "D": D,
        "dt_bias": dt_bias,
        "norm_weight": norm_weight,
        "out_proj": out_proj,
        "in_proj_scale": in_proj_scale,
        "out_proj_scale": out_proj_scale,
        "active": None if active is None else active.astype(jnp.int32),
    }
    inputs = {name: a for name, a in inputs.items() if a is not None}
    state = {
        "residual": jnp.pad(residual, ((0, filled - plan.batch), (0, 0))),
        "conv_state": conv_state,
        "ssm_state": ssm_state,
        # What lies behind the last of the sums stays zero.
        "residual_squares": jnp.zeros((1, filled, plan.squares[0]), jnp.float32),
        "y_squares": jnp.zeros((sizes.groups, filled, plan.squares[1]), jnp.float32),
    }
    passed_on = {
        "zxbcdt": (plan.in_proj.wide, plan.in_proj.most_parts, filled, COLUMNS),
        "y": (filled, sizes.inner),
        "output": (plan.out_proj.wide, plan.out_proj.most_parts, filled, COLUMNS),
    }
    passed_on = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in passed_on.items()}
    eps = {"residual": in_norm_eps, "y": norm_eps}
    shared = {
        "weights": _ring(plan),
        "x": operand(jnp.bfloat16, plan.operand_tiles, filled, ROWS),
        "vectors": plgpu.SMEM((COMPUTING, 3, 128), jnp.float32),
        "filled": plgpu.Barrier(num_arrivals=1 if plan.quantized else BOXES, num_barriers=plan.stages),
        "consumed": plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=plan.stages),
        "here": plgpu.Barrier(num_arrivals=COMPUTING),
        "there": plgpu.Barrier(),
        "ready": plgpu.Barrier(num_arrivals=COMPUTING),
    }
    if plan.quantized:
        shared["converted"] = operand(jnp.bfloat16, 2, BOXES, ROWS, 64)
    body = functools.partial(_body, plan, [*inputs, *state, *passed_on], dt_limit, eps)
    state = _launch(plan, body, inputs, state, passed_on, shared)
    return state["residual"][: plan.batch], state["conv_state"], state["ssm_state"]


def _ring(plan):
    """Tiles of weights: in bfloat16 as wgmma reads them, and as copies write them."""
    if plan.quantized:
        return plgpu.SMEM((plan.stages, ROWS, COLUMNS), jnp.int8)
    return square(jnp.bfloat16, plan.stages, BOXES)


def _launch(plan, body, inputs: dict, state: dict, passed_on: dict, shared: dict) -> dict:
    """`state` as `body` leaves it, which every warpgroup runs; `passed_on` is memory for what blocks tell each other."""
    state = {name: jax.new_ref(a) for name, a in state.items()}
    pl.kernel(
        lambda *refs: pl.run_scoped(functools.partial(body, *refs), collective_axes="warpgroup", **shared),
        out_type=list(passed_on.values()),
        mesh=plgpu.Mesh(
            grid=(plan.blocks,),
            grid_names=("block",),
            num_threads=COMPUTING + 1,
            thread_name="warpgroup",
            kernel_name="mamba2_layers_step",
        ),
        compiler_params=plgpu.CompilerParams(
            # What one thread writes another reads only behind an explicit barrier.
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        name="mamba2_layers_step",
    )(*inputs.values(), *state.values())
    return {name: jax.freeze(ref) for name, ref in state.items()}


def _body(plan, names, dt_limit, eps, *refs, **buffers):
    refs = dict(zip(names, refs, strict=True))
    if not plan.quantized:
        buffers["weights"], buffers["weights flat"] = buffers["weights"]
    arrived = pl.get_global(plgpu.SemaphoreType.REGULAR)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == COMPUTING)
    def _():
        _copy(plan, refs, buffers)

    @pl.when(warpgroup < COMPUTING)
    def _():
        _compute(plan, refs, buffers, arrived, dt_limit, eps)


def _copy(plan, refs, buffers):
    """Keeps the ring filled, in the order in which the products use it up."""
    shares = plan.shares()
    counts = {name: split.first(shares[name] + 1) - split.first(shares[name]) for name, split in plan.products.items()}
    one_layer = counts["in_proj"] + counts["out_proj"]
    total = plan.layers * one_layer

    def copy(name, layer, within, slot):
        split = plan.products[name]
        tile = split.first(shares[name]) + within
        row, column = lax.rem(tile, split.tall), lax.div(tile, split.tall)

        def part(first, width, target):
            columns = pl.ds(column * COLUMNS + first, width)
            source = refs[name].at[layer, pl.ds(row * ROWS, ROWS), columns]
            plgpu.copy_gmem_to_smem(source, target, buffers["filled"].at[slot])

        if plan.quantized:
            part(0, COLUMNS, buffers["weights"].at[slot])
        else:
            for box in range(BOXES):
                part(box * 64, 64, buffers["weights flat"].at[slot, box])

    @pl.loop(0, total)
    def _(number):
        slot = lax.rem(number, plan.stages)
        plgpu.barrier_wait(buffers["consumed"].at[slot])

        @pl.when(number >= plan.at_once)
        def _():
            plgpu.barrier_wait(buffers["filled"].at[lax.rem(number - plan.at_once, plan.stages)])

        layer, within = lax.div(number, one_layer), lax.rem(number, one_layer)

        @pl.when(within < counts["in_proj"])
        def _():
            copy("in_proj", layer, within, slot)

        @pl.when(within >= counts["in_proj"])
        def _():
            copy("out_proj", layer, within - counts["in_proj"], slot)


def _compute(plan, refs, buffers, arrived, dt_limit, eps):
    warpgroup = lax.axis_index("warpgroup")

    @pl.loop(0, plan.stages)
    def _(slot):
        plgpu.barrier_arrive(buffers["consumed"].at[slot])

    @jax.named_scope("meet")
    def meet(meetings):
        """All blocks, and everything that any of them wrote is seen by all."""
        _warps_meet()
        plgpu.barrier_arrive(buffers["here"])

        @pl.when(warpgroup == 0)
        def _():
            plgpu.barrier_wait(buffers["here"])
            plgpu.semaphore_signal(arrived, memory_scope="gpu")
            # Only here: where a second warpgroup looked at the counter as well, blocks were seen to wait for ever.
            plgpu.semaphore_wait(arrived, plan.blocks * (meetings + 1), decrement=False, memory_scope="gpu")
            plgpu.barrier_arrive(buffers["there"])

        plgpu.barrier_wait(buffers["there"])
        return meetings + 1

    def one_layer(layer, carry):
        """What no other block writes is asked for before all meet, and arrives meanwhile."""
        number, meetings, weights = carry
        prepare = functools.partial(_prepare, plan, refs, buffers)
        multiply = functools.partial(_multiply, plan, refs, buffers)
        prepare("residual", "in_proj", weights, 1, eps["residual"])
        number = multiply("in_proj", number)
        asked = _ask_first(plan, refs, layer)
        meetings = meet(meetings)
        _scan(plan, refs, buffers, layer, asked, dt_limit)
        weights = _ask_weights(plan, refs, layer, "norm_weight", "out_proj")
        meetings = meet(meetings)
        prepare("y", "out_proj", weights, plan.sizes.groups, eps["y"])
        number = multiply("out_proj", number)
        meetings = meet(meetings)
        _add(plan, refs, buffers, layer)
        weights = _ask_weights(plan, refs, jnp.minimum(layer + 1, plan.layers - 1), "in_norm_weight", "in_proj")
        return number, meet(meetings), weights

    _add(plan, refs, buffers, None)
    weights = _ask_weights(plan, refs, 0, "in_norm_weight", "in_proj")
    lax.fori_loop(0, plan.layers, one_layer, (0, meet(0), weights))


# The phases, by one of the warpgroups that compute. Their names are those of a profile (`plgpu.CompilerParams.profile_dir`).


@jax.named_scope("prepare")
def _prepare(plan, refs, buffers, name, product, weights, groups, eps):
    """The rows of tiles of x that the block's products read: normalised, in the dtype of the projection."""
    source, squares = refs[name], refs[f"{name}_squares"]
    size = plan.products[product].tall * ROWS // groups  # channels that a norm runs over

    def scale(group):
        sums = jnp.sum(load(squares.at[group], OPERAND, device_memory=True), axis=1)
        return _spread(lax.rsqrt(sums * (1.0 / size) + eps), plan.filled, 0)

    tiles = list(_tiles_to_prepare(plan, product))
    only = None
    at_a_time = 64 // plan.filled  # loads under way: as many numbers as registers hold
    for start in range(0, len(tiles), at_a_time):
        now = slice(start, start + at_a_time)
        loaded = [load(source.at[:, pl.ds(row, ROWS)], OPERAND, device_memory=True) for _, row in tiles[now]]
        if groups == 1 and only is None:
            only = scale(0)
        for (slot, row), x, weight in zip(tiles[now], loaded, weights[now], strict=True):
            scales = scale(lax.div(row, size)) if only is None else only
            x = x.astype(jnp.float32) * (scales * _spread(weight.astype(jnp.float32), plan.filled, 1))
            buffers["x"].at[slot][...] = x.astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.barrier_arrive(buffers["ready"])
    plgpu.barrier_wait(buffers["ready"])


@jax.named_scope("multiply")
def _multiply(plan, refs, buffers, product, number):
    """Sums over the block's tiles. `number`: of tiles that came through the ring so far."""
    warpgroup, split, share = lax.axis_index("warpgroup"), plan.products[product], plan.shares()[product]
    first, end = split.first(share), split.first(share + 1)
    boxes = [warpgroup * (BOXES // COMPUTING) + i for i in range(BOXES // COMPUTING)]

    def one_column(column, number):
        start = jnp.maximum(first, column * split.tall)
        stop = jnp.minimum(end, (column + 1) * split.tall)

        def products(*sums):
            """While the products of a tile run, the next one is waited for, and converted."""

            @pl.loop(start, stop)
            def _(tile):
                at = number + tile - start
                slot = lax.rem(at, plan.stages)
                plgpu.barrier_wait(buffers["filled"].at[slot])
                weights = _convert(buffers, slot, boxes, at) if plan.quantized else buffers["weights"].at[slot]
                x = buffers["x"].at[lax.rem(tile - first, split.tall)].transpose((1, 0))
                for box, accumulator in zip(boxes, sums, strict=True):
                    plgpu.wgmma(accumulator, weights.at[box].transpose((1, 0)), x)
                plgpu.wgmma_wait(len(boxes))  # those of the tile before are done
                if not plan.quantized:
                    pl.when(tile > start)(lambda: used_up(at - 1))

            plgpu.wgmma_wait(0)
            if not plan.quantized:
                used_up(number + stop - 1 - start)
            return [accumulator[...] for accumulator in sums]

        sums = pl.run_scoped(products, *(plgpu.ACC((64, plan.filled), jnp.float32) for _ in boxes))
        part = share - split.parts(column)[0]
        for box, a in zip(boxes, sums, strict=True):
            place = refs[PRODUCTS[product]].at[column, part, :, pl.ds(box * 64, 64)].transpose((1, 0))
            place[...] = plgpu.layout_cast(a, plgpu.Layout.WGMMA_TRANSPOSED)
        return number + stop - start

    def used_up(number):
        _warps_meet()
        plgpu.barrier_arrive(buffers["consumed"].at[lax.rem(number, plan.stages)])

    columns_end = jnp.where(end > first, lax.div(end - 1, split.tall) + 1, lax.div(first, split.tall))
    return lax.fori_loop(lax.div(first, split.tall), columns_end, one_column, number)


def _convert(buffers, slot, boxes, number):
    """The warpgroup's boxes of a tile in int8 to bfloat16, exactly, which uses the tile up; in two places by turns."""
    tile, converted = buffers["weights"].at[slot], buffers["converted"].at[lax.rem(number, 2)]
    loaded = [load(tile.at[:, pl.ds(box * 64, 64)], CONVERTED, device_memory=True) for box in boxes]
    _warps_meet()  # all have read this tile, and are done with the products of the one before the last
    plgpu.barrier_arrive(buffers["consumed"].at[slot])
    for box, a in zip(boxes, loaded, strict=True):
        converted.at[box][...] = a.astype(jnp.bfloat16)
    plgpu.commit_smem()
    return converted


@jax.named_scope("scan")
def _scan(plan, refs, buffers, layer, asked, dt_limit):
    """What lies between the projections, all but the norm: y * silu(z). The states of x move on by a token.

    Neighbouring pieces of the state, one after the other; what the next one needs is asked for before this one is
    computed, and of the first one what the last phase could not change before that has ended: `asked`.
    """
    sizes, tile = plan.sizes, plan.tile
    vectors = buffers["vectors"].at[lax.axis_index("warpgroup")]
    first, end = plan.pieces_of_worker()

    def ask_sums(piece):
        at = plan.place(piece)
        sums = functools.partial(_sums, plan, refs, layer, "in_proj", at.row)
        return {
            "newest": sums(sizes.inner + at.channel, tile.rows, tile.over_rows),
            "z": sums(at.channel, tile.rows, tile.over_rows),
            "dt": sums(sizes.inner + sizes.channels + at.head, None, None),
        }

    def convolve_B_C(at, asked):
        for i, channel in enumerate(plan.channels_of_B_C(at.group)):
            layout = one_layer._one_each(sizes.state)
            newest = _sums(plan, refs, layer, "in_proj", at.row, sizes.inner + channel, sizes.state, layout)
            vectors.at[i, pl.ds(0, sizes.state)][...] = _convolve(*asked[i], newest)

    def one(piece, asked):
        at = plan.place(piece)
        next_piece = jnp.minimum(piece + 1, end - 1)
        following = _ask(plan, refs, layer, next_piece) | ask_sums(next_piece)

        @pl.when((piece > first) & (lax.rem(piece, sizes.heads // sizes.groups * plan.pieces) == 0))
        def _():
            convolve_B_C(at, _ask_B_C(plan, refs, layer, at))

        before, window = asked["state"], asked["x"][0]
        x = _convolve(*asked["x"], asked["newest"])
        _move_on(refs, layer, at.row, at.channel, window, asked["newest"], asked["active"])
        dt = step.step_size(asked["dt"], asked["dt_bias"], True, dt_limit)
        _warps_meet()
        B, C = (load(vectors.at[i, pl.ds(0, sizes.state)], tile.over_columns, device_memory=True) for i in range(2))
        after, y = step.advance(tile, before, x, dt, asked["A"], B, C, asked["D"])
        after = after.astype(before.dtype)
        state = refs["ssm_state"].at[layer, at.row, at.head, pl.ds(at.within, tile.rows)]
        state[...] = after if asked["active"] is None else jnp.where(asked["active"] > 0, after, before)
        y = y * silu(asked["z"])
        refs["y"].at[at.row, pl.ds(at.channel, tile.rows)][...] = y
        in_group = lax.rem(piece, sizes.heads // sizes.groups * plan.pieces)
        refs["y_squares"][at.group, at.row, in_group] = _sum_of_squares(y, tile.rows, vectors.at[2])
        return following

    asked, asked_B_C = asked
    piece = jnp.minimum(first, plan.all_pieces - 1)
    asked = asked | ask_sums(piece)
    convolve_B_C(plan.place(piece), asked_B_C)
    lax.fori_loop(first, end, one, asked)


@jax.named_scope("add")
def _add(plan, refs, buffers, layer):
    """Adds the output to the residual; B and C of the convolution state move on by a token. With None only squares."""
    sizes = plan.sizes
    warpgroup = lax.axis_index("warpgroup")
    vector = buffers["vectors"].at[warpgroup, 2]
    layout = one_layer._one_each(ADDED)
    residual = refs["residual"]

    def add(task):
        row, piece = lax.div(task, plan.width // ADDED), lax.rem(task, plan.width // ADDED)
        place = residual.at[row, pl.ds(piece * ADDED, ADDED)]
        total = load32(place, layout)
        if layer is not None:
            output = _sums(plan, refs, layer, "out_proj", row, piece * ADDED, ADDED, layout)
            rounded = (total + output).astype(residual.dtype)
            place[...] = rounded
            total = rounded.astype(jnp.float32)
        refs["residual_squares"][0, row, piece] = _sum_of_squares(total, ADDED, vector)

    def move_on(task):
        row, place = lax.div(task, 2 * sizes.groups), lax.rem(task, 2 * sizes.groups)
        channel = sizes.inner + place * sizes.state
        layout = one_layer._one_each(sizes.state)
        window, *_ = _ask_window(refs, layer, row, channel, sizes.state, layout)
        newest = _sums(plan, refs, layer, "in_proj", row, sizes.inner + channel, sizes.state, layout)
        _move_on(refs, layer, row, channel, window, newest, refs["active"][row] if "active" in refs else None)

    _share_out(plan, plan.batch * (plan.width // ADDED), add)
    if layer is not None:
        _share_out(plan, plan.batch * 2 * sizes.groups, move_on, backwards=True)


# Pieces of the phases.


def _first(a):
    """The same without the axis of layers."""
    return jax.ShapeDtypeStruct(a.shape[1:], a.dtype)


def _worker(plan):
    """The number of a warpgroup that computes: those of one block are far apart."""
    return lax.axis_index("warpgroup") * plan.blocks + lax.axis_index("block")


def _share_out(plan, tasks: int, run, backwards: bool = False) -> None:
    """`run(task)` for every task, one warpgroup each; the last ones first busy where it goes `backwards`."""
    workers, worker = plan.blocks * COMPUTING, _worker(plan)
    if backwards:
        worker = workers - 1 - worker

    @pl.loop(0, lax.div(tasks - worker + workers - 1, workers))
    def _(turn):
        run(turn * workers + worker)


def _sums(plan, refs, layer, product, row, first, width, layout):
    """`width` columns of a product from `first` on, or one, in float32: the sums of its parts in their order."""
    split, parts, scale = plan.products[product], refs[PRODUCTS[product]], refs.get(f"{product}_scale")
    column = lax.div(first, COLUMNS)
    within = lax.rem(first, COLUMNS)
    count = split.parts(column)[1]

    def part(i):
        if width is None:
            return parts[column, i, row, within]
        return load(parts.at[column, i, row, pl.ds(within, width)], layout, device_memory=True)

    terms = [part(i) for i in range(split.most_parts)]
    if scale is not None:
        scale = scale[layer, first] if width is None else load32(scale.at[layer, pl.ds(first, width)], layout)
    total = terms[0]
    for i, term in enumerate(terms[1:], 1):
        total = total + jnp.where(i < count, term, 0.0)
    return total if scale is None else total * scale


def _tiles_to_prepare(plan, product):
    """(place in shared memory, first row) of the tiles of x that this warpgroup prepares."""
    split, share = plan.products[product], plan.shares()[product]
    first = split.first(share)
    count = jnp.minimum(split.first(share + 1) - first, split.tall)
    for turn in range(-(-split.most_rows // COMPUTING)):
        slot = turn * COMPUTING + lax.axis_index("warpgroup")
        slot = jnp.maximum(jnp.minimum(slot, count - 1), 0)  # some again, if need be
        yield slot, lax.rem(first + slot, split.tall) * ROWS


def _ask_weights(plan, refs, layer, name, product):
    """Of the norm before a projection."""
    layout = OPERAND.reduce(0)
    rows = [row for _, row in _tiles_to_prepare(plan, product)]
    return [load(refs[name].at[layer, pl.ds(row, ROWS)], layout, device_memory=True) for row in rows]


def _ask_first(plan, refs, layer):
    """What a warpgroup needs for the first piece of the state that it holds."""
    piece = jnp.minimum(plan.pieces_of_worker()[0], plan.all_pieces - 1)
    return _ask(plan, refs, layer, piece), _ask_B_C(plan, refs, layer, plan.place(piece))


def _ask(plan, refs, layer, piece):
    """What a piece of the state needs and no other block writes."""
    at, tile = plan.place(piece), plan.tile
    rows = pl.ds(at.within, tile.rows)
    return {
        "state": load(refs["ssm_state"].at[layer, at.row, at.head, rows], tile.layout, device_memory=True),
        "x": _ask_window(refs, layer, at.row, at.channel, tile.rows, tile.over_rows),
        "A": refs["A"][layer, at.head],
        "dt_bias": refs["dt_bias"][layer, at.head] if "dt_bias" in refs else None,
        "D": step.skip(refs["D"].at[layer] if "D" in refs else None, at.head, rows, tile),
        "active": refs["active"][at.row] if "active" in refs else None,
    }


def _ask_B_C(plan, refs, layer, at):
    layout = one_layer._one_each(plan.sizes.state)
    channels = plan.channels_of_B_C(at.group)
    return [_ask_window(refs, layer, at.row, channel, plan.sizes.state, layout) for channel in channels]


def _ask_window(refs, layer, row, channel, width, layout):
    """Of some channels of [x | B | C]: earlier inputs of the convolution, its weights and its bias."""
    channels = pl.ds(channel, width)

    def ask(ref):
        return load(ref, layout, device_memory=True)

    taps = refs["conv_weight"].shape[2]
    window = [ask(refs["conv_state"].at[layer, row, tap, channels]) for tap in range(taps - 1)]
    weights = [ask(refs["conv_weight"].at[layer, channels, tap]) for tap in range(taps)]
    return window, weights, ask(refs["conv_bias"].at[layer, channels]) if "conv_bias" in refs else None


def _convolve(window, weights, bias, newest):
    """In float32; the rounding of the newest input is that of the next state only."""
    total = None if bias is None else bias.astype(jnp.float32)
    for a, weight in zip([*window, newest], weights, strict=True):
        term = a.astype(jnp.float32) * weight.astype(jnp.float32)
        total = term if total is None else total + term
    return silu(total)


def _move_on(refs, layer, row, channel, window, newest, active):
    """Writes the newest inputs of the convolution back as its next state."""
    dtype = window[0].dtype
    for tap, (before, after) in enumerate(zip(window, [*window[1:], newest.astype(dtype)], strict=True)):
        place = refs["conv_state"].at[layer, row, tap, pl.ds(channel, before.shape[0])]
        place[...] = after if active is None else jnp.where(active > 0, after, before)


def _sum_of_squares(vector, width, buffer):
    """Of a vector spread over a warpgroup, by way of `buffer` in shared memory."""
    buffer = buffer.at[pl.ds(0, width)]
    buffer[...] = vector * vector
    _warps_meet()
    lanes = min(32, width // 4)
    held = (plgpu.Replicated(32 // lanes), -2) if lanes < 32 else (-2,)
    layout = plgpu.Layout.TILED(
        plgpu.Tiling(((width,), (width // lanes,))), warp_dims=(plgpu.Replicated(4),), lane_dims=held, vector_dim=-1
    )
    total = jnp.sum(load(buffer, layout, device_memory=True), axis=0)
    _warps_meet()
    return total


def _spread(vector, rows, axis):
    """A vector along `axis` of an operand, repeated along the other."""
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, (rows, ROWS), [axis]), OPERAND)


def _warps_meet():
    """The four of this warpgroup."""
    plgpu.commit_smem()
