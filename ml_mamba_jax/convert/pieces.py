"""Where each number of a PyTorch tensor stands in our parameters: the unit of every table of keys, in both directions."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

Index = tuple[int | slice, ...]


class Layout(NamedTuple):
    """How an array is turned from PyTorch's axes to ours and back. Both functions return views."""

    name: str
    to_jax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


def _same(a: np.ndarray) -> np.ndarray:
    return a


def _patches_to_torch(a: np.ndarray) -> np.ndarray:
    side = math.isqrt(a.shape[0] // 3)
    return a.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


SAME = Layout("same", _same, _same)
TRANSPOSED = Layout("transposed", np.transpose, np.transpose)
"""A linear layer: [out in] -> [in out]."""
DEPTHWISE = Layout("depthwise", lambda a: a[:, 0], lambda a: a[:, None])
"""A causal convolution: [c 1 w] -> [c w]."""
DEPTHWISE_2D = Layout("depthwise 2d", lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))
"""A depthwise convolution over the grid: [c 1 y x] -> [y x 1 c]."""
PATCHES = Layout("patches", lambda a: a.transpose(2, 3, 1, 0).reshape(-1, a.shape[0]), _patches_to_torch)
"""A patch convolution: [d 3 y x] -> [y*x*3 d], the order in which `vit.ViT` flattens a patch."""


class Piece(NamedTuple):
    """`parameter[index] = layout(tensor[source])`, for one tensor by its key and one parameter by its path."""

    key: str
    path: str
    """Names joined by "/": `language/blocks/mixer/in_proj/kernel`."""
    layout: Layout = SAME
    index: Index = ()
    """The layer, the direction, rows or columns; () for all of the parameter."""
    source: Index = ()
    """The part of the tensor; () for all of it."""
    added: bool = False
    """Added to what another piece has put there. Such a piece has no way back."""
    resampled: bool = False
    """Positions of a square grid, which may have another size in the source (`vit.resample_positions`)."""
    tied: bool = False
    """The tensor may be absent; where it is present it must equal the parameter, which another tensor fills."""

    def region(self, parameter: np.ndarray) -> np.ndarray:
        """The view of the parameter that this piece fills."""
        return parameter[self.index]

    @property
    def how(self) -> str:
        """The transform in words, for reports."""
        words = [self.layout.name] if self.layout is not SAME else []
        words += ["added"] * self.added + ["resampled"] * self.resampled + ["tied"] * self.tied
        words += [f"of {_show(self.source)}"] if self.source else []
        return ", ".join(words) or "same"

    @property
    def where(self) -> str:
        """Path and index, for reports."""
        return self.path + (_show(self.index) if self.index else "")


def torch_shape(pieces: Sequence[Piece], shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape that the tensor of these pieces, all of one key, must have for parameters of `shapes` by path.

    Parts of a tensor are rows one after the other behind leading axes of size one.
    """
    parts = [piece.layout.to_torch(piece.region(_phantom(shapes[piece.path]))).shape for piece in pieces]
    sources = [piece.source for piece in pieces]
    if sources == [()]:
        return parts[0]
    n_leading = sum(isinstance(i, int) for i in sources[0])
    if not any(isinstance(i, slice) for i in sources[0]):
        return (1,) * n_leading + parts[0]
    return (1,) * n_leading + (sum(part[0] for part in parts), *parts[0][1:])


def by_key(pieces: Iterable[Piece]) -> dict[str, list[Piece]]:
    """The pieces of each tensor, in the order of the table."""
    grouped: dict[str, list[Piece]] = {}
    for piece in pieces:
        grouped.setdefault(piece.key, []).append(piece)
    return grouped


def _phantom(shape: tuple[int, ...]) -> np.ndarray:
    """An array of that shape that takes no memory."""
    return np.broadcast_to(np.zeros((), np.int8), shape)


def _show(index: Index) -> str:
    texts = []
    for i in index:
        if isinstance(i, slice):
            texts.append(f"{'' if i.start is None else i.start}:{'' if i.stop is None else i.stop}")
        else:
            texts.append(str(i))
    return f"[{', '.join(texts)}]"
