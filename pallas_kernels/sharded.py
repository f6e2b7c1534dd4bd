"""Kernels on a mesh of devices: every device runs the kernel on its part of the batch, the heads and the sequence.

XLA splits what it compiles itself, but not a hand-written kernel: its arguments would be gathered on every device. So
inside `use_mesh` every kernel runs in `jax.shard_map`. How its arguments are split follows from their axis letters:

* b over the mesh axes `batch`, h and c over `heads`, l over `sequence`; all others stay whole;
* g over `heads` as well, but a single group serves the heads of all devices;
* what is not split is replicated, and its gradient is summed over the devices.

The kernel sees one device's shapes and no mesh, and who runs is chosen there, so every backend will do.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MeshAxes = str | Sequence[str] | None
Outputs = Callable[[Mapping, Mapping[str, str]], str | tuple[str, ...]]

SPLIT_BY = {"b": "batch", "l": "sequence", "h": "heads", "g": "heads", "c": "heads"}
NAMES = {"b": "rows", "l": "tokens", "h": "heads", "g": "groups", "c": "channels"}


@dataclasses.dataclass(frozen=True)
class Split:
    """Which axes of `mesh` split the batch, the heads and the sequence; none where a tuple is empty."""

    mesh: Mesh
    batch: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    sequence: tuple[str, ...] = ()

    def over(self, letter: str) -> tuple[str, ...]:
        """The mesh axes that split the axis `letter`."""
        return getattr(self, SPLIT_BY[letter]) if letter in SPLIT_BY else ()

    def parts(self, letter: str) -> int:
        """Into how many parts the axis `letter` is split."""
        return math.prod(self.mesh.shape[name] for name in self.over(letter))

    def spec(self, form: str, whole: str = "") -> P:
        """How an array whose axes are `form` is split; the axes in `whole` are not."""
        return P(*(None if axis[0] in whole else self.over(axis[0]) or None for axis in form.split()))

    def run(self, function: Callable, arguments: Mapping, axes: Mapping[str, str], outputs: Outputs):
        """`function(**arguments)` on every device's part of the arguments.

        Args:
            axes: of each array among the arguments, the letters of its axes: "b l h p"; "h|h p" if there are several
                forms, told apart by their number of axes. An axis "hp+gn+gn" holds h*p, g*n and g*n channels one
                after the other, each of them split by its first letter.
            outputs: the letters of what `function` returns, from the arguments and the forms of the arrays among them.

        Raises:
            ValueError: an axis that cannot be split into equal parts.
        """
        arrays = {name: a for name, a in arguments.items() if name in axes and a is not None}
        constants = {name: a for name, a in arguments.items() if name not in arrays}
        forms = {name: _form(axes[name], name, a) for name, a in arrays.items()}
        sizes = {
            letter: size
            for name, a in arrays.items()
            for letter, size in zip(forms[name].split(), a.shape, strict=True)
            if len(letter) == 1
        }
        self._check(sizes)
        spec = functools.partial(self.spec, whole="g" if sizes.get("g") == 1 else "")

        # Arrays without numbers, on which the XLA of JAX 0.11 breaks down, are made where they are needed.
        empty = {name: a for name, a in arrays.items() if not a.size}

        def body(parts: dict):
            whole = {name: _join(forms[name], part) for name, part in parts.items()}
            for name, a in empty.items():
                shape = NamedSharding(self.mesh, spec(forms[name])).shard_shape(a.shape)
                whole[name] = jnp.zeros(shape, a.dtype)
            return function(**constants, **whole)

        full = [name for name in arrays if name not in empty]
        specs = {name: [spec(section) for section in _sections(forms[name])] for name in full}
        parts = {name: _cut(forms[name], arrays[name], sizes) for name in full}
        results = jax.tree.map(spec, outputs(arguments, forms))
        # Without check_vma, which kernels cannot state, JAX sums the gradient of every replicated argument.
        part = jax.shard_map(body, mesh=self.mesh, in_specs=(specs,), out_specs=results, check_vma=False)
        return jax.jit(part)(parts)  # as one program, where the caller compiles nothing

    def _check(self, sizes: Mapping[str, int]) -> None:
        for letter, size in sizes.items():
            parts = self.parts(letter)
            if size % parts and not (letter == "g" and size == 1):
                raise ValueError(
                    f"use_mesh: got {size} {NAMES[letter]}, expected {'1 or ' if letter == 'g' else ''}a multiple of "
                    f"{parts}, the size of {SPLIT_BY[letter]}={self.over(letter)}; choose another mesh"
                )


_split: contextvars.ContextVar[Split | None] = contextvars.ContextVar("split", default=None)


@contextlib.contextmanager
def use_mesh(
    mesh: Mesh | None, *, batch: MeshAxes = None, heads: MeshAxes = None, sequence: MeshAxes = None
) -> Iterator[None]:
    """Split every kernel called inside the block over `mesh`. None leaves them to XLA again.

    The mesh axes named by `batch`, `heads` and `sequence` split those axes of all arguments and results; over the other
    axes of the mesh everything is replicated. With `sequence` each device holds a contiguous piece of the tokens of
    `ssd`, `causal_conv1d` and `gated_rms_norm`; `visual_scan` keeps its grid whole. Results are those of one device up
    to rounding, and so are gradients.

    Decided while tracing, as `use_implementation` is. Inside a `jax.shard_map` the block has no effect.

    Raises:
        ValueError: a name that is no axis of the mesh, or one that is used twice; mesh axes whose type is not Auto. By
            the kernels: a batch, heads, groups, channels or tokens that the mesh does not divide.
    """
    split = None
    if mesh is not None:
        split = Split(mesh, _as_tuple(batch), _as_tuple(heads), _as_tuple(sequence))
        names = split.batch + split.heads + split.sequence
        if not set(names) <= set(mesh.axis_names) or len(set(names)) < len(names):
            raise ValueError(
                f"use_mesh: got batch={split.batch}, heads={split.heads}, sequence={split.sequence}, "
                f"expected different ones of the mesh axes {mesh.axis_names}"
            )
        if any(kind != AxisType.Auto for kind in mesh.axis_types):
            raise ValueError(
                f"use_mesh: got mesh axes of types {mesh.axis_types}, expected AxisType.Auto; "
                "give them to jax.make_mesh as axis_types"
            )
    token = _split.set(split)
    try:
        yield
    finally:
        _split.reset(token)


@contextlib.contextmanager
def whole_sequences() -> Iterator[None]:
    """Keep the tokens of every kernel called inside the block on one device, for sequences that `use_mesh` is not to split."""
    split = _split.get()
    token = _split.set(split and dataclasses.replace(split, sequence=()))
    try:
        yield
    finally:
        _split.reset(token)


def keep_split(a: jax.Array, axes: str) -> jax.Array:
    """`a`, whose axis letters are `axes`, which XLA is to keep split as the kernels inside `use_mesh` are.

    For what lies between kernels, as the residual of a model: left to itself, XLA may split its channels as it finds
    them in the weights, and gather it at the next kernel. Outside of `use_mesh` this is `a`.
    """
    split = current()
    return a if split is None else jax.lax.with_sharding_constraint(a, NamedSharding(split.mesh, split.spec(axes)))


def current() -> Split | None:
    """How kernels called here are to be split: None outside of `use_mesh`, and on what is one device's part already."""
    return None if on_one_device() else _split.get()


def on_one_device() -> bool:
    """Whether what is being traced runs on one device's part of the data: inside a `shard_map` over a whole mesh."""
    types = jax.sharding.get_abstract_mesh().axis_types
    return bool(types) and all(kind == AxisType.Manual for kind in types)


def _as_tuple(axes: MeshAxes) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def _form(forms: str, name: str, a) -> str:
    """The one of several forms of an argument that has as many axes as `a`."""
    for form in forms.split("|"):
        if len(form.split()) == a.ndim:
            return form
    raise ValueError(f"use_mesh: got {name} of shape {tuple(a.shape)}, expected [{forms.replace('|', '] or [')}]")


def _joined(form: str) -> tuple[int, list[str]]:
    """Which axis holds several sections one after the other, and these: "k hp+gn w" -> 1, ["hp", "gn"]."""
    return next(((i, axis.split("+")) for i, axis in enumerate(form.split()) if "+" in axis), (0, []))


def _sections(form: str) -> list[str]:
    """The form of each section: "k hp+gn w" -> ["k hp w", "k gn w"]."""
    _, sections = _joined(form)
    return [form.replace("+".join(sections), section) for section in sections] or [form]


def _cut(form: str, a, sizes: Mapping[str, int]) -> list:
    axis, sections = _joined(form)
    widths = [math.prod(sizes[letter] for letter in section) for section in sections]
    return jnp.split(a, np.cumsum(widths)[:-1], axis=axis) if sections else [a]


def _join(form: str, sections: list):
    axis, _ = _joined(form)
    return sections[0] if len(sections) == 1 else jnp.concatenate(sections, axis=axis)
