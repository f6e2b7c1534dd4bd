"""The one place that chooses a backend for a kernel, and that can explain the choice.

A kernel ("op") is a public function with several backends: `reference` (the recurrence, token by token), `xla`
(chunked, runs everywhere), and hand-written kernels for particular devices. A backend is a module that holds a
function named after the op and, when it cannot take every argument, a function `why_not_<op>` with the same signature
that returns the reason in one line.

Who runs is decided while tracing:

* `implementation=None`: the first of `PREFERENCE[platform]` that can be imported, runs on the default device, and
  takes the arguments.
* a name: that backend or an error. It does not ask which devices are present, so it also lowers with `jax.export`
  elsewhere.
* a tuple of names: the first that takes the arguments.

`explain` returns the decision with the reason for every backend that was not chosen. Inside `use_mesh` all of this
happens on every device, for its part of the arguments (`pallas_kernels.sharded`).
"""

import contextlib
import contextvars
import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType

import jax

from pallas_kernels import sharded

IMPLEMENTATIONS = ("reference", "xla", "pallas_gpu", "pallas_tpu", "triton")

# Fastest first. A kernel stands before `xla` only where it was measured to win; `reference` is an oracle, never chosen.
PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("xla",),
    "gpu": ("pallas_gpu", "xla"),
    "tpu": ("xla",),
}

SPLIT_BY_XLA = ("reference", "xla")

Implementation = str | Sequence[str] | None

_override: contextvars.ContextVar[Implementation] = contextvars.ContextVar("implementation", default=None)


@contextlib.contextmanager
def use_implementation(implementation: Implementation) -> Iterator[None]:
    """Make `implementation` the default of every kernel called inside the block.

    The choice is made while tracing: a function that `jax.jit` compiled before keeps what it was compiled with.
    """
    if implementation is not None:
        _as_names(implementation)
    token = _override.set(implementation)
    try:
        yield
    finally:
        _override.reset(token)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which backend an op would run, and for each other one the reason why not."""

    op: str
    platform: str
    chosen: str | None
    reasons: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op} on {self.platform}: {self.chosen or 'no backend takes these arguments'}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Op:
    """A kernel with several backends: `package` holds one module for each name in `backends`.

    How it is split over a mesh follows from `axes` and `outputs`, the axis letters of its array arguments, in their
    order, and of its results; see `pallas_kernels.sharded`. Where `can_split(split, arguments)` is false it is left to
    XLA, and only backends that XLA can split are taken. A `sequential` op, whose tokens see earlier ones, has a further
    module `sequence` for a split sequence.
    """

    name: str
    package: str
    backends: tuple[str, ...]
    axes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    outputs: sharded.Outputs = lambda arguments, forms: ()
    can_split: Callable[[sharded.Split, Mapping], bool] = lambda split, arguments: True
    sequential: bool = False

    def __call__(self, implementation: Implementation, *args, **kwargs):
        """Run the chosen backend on `args` and `kwargs`; inside `use_mesh`, on every device's part of them."""
        split, arguments = self._split(args, kwargs)
        run = functools.partial(self._run, implementation)
        if split is None:
            return run(*args, **kwargs)
        if self.sequential and split.sequence:
            run = functools.partial(getattr(self._module("sequence"), self.name), run, split.sequence)
        return split.run(run, arguments, self.axes, self.outputs)

    def _run(self, implementation: Implementation, *args, **kwargs):
        return getattr(self._module(self.choose(implementation, *args, **kwargs)), self.name)(*args, **kwargs)

    def _split(self, args: tuple, kwargs: dict) -> tuple[sharded.Split | None, dict]:
        """How the arguments are to be split, if at all, and the arguments by name."""
        split, arguments = sharded.current(), dict(zip(self.axes, args, strict=False)) | kwargs
        return (split if split and arguments and self.can_split(split, arguments) else None), arguments

    def _is_left_to_xla(self, args: tuple, kwargs: dict) -> bool:
        split, arguments = self._split(args, kwargs)
        return split is None and sharded.current() is not None and bool(arguments)

    def choose(self, implementation: Implementation, *args, **kwargs) -> str:
        """The name of the backend that `implementation` (see the module's docstring) stands for.

        Raises ValueError for an unknown name, and an ExceptionGroup with every reason when no candidate will do.
        """
        chosen, reasons = self._decide(implementation, args, kwargs)
        if chosen is None:
            raise ExceptionGroup(
                f"{self.name}: no backend takes these arguments; pass implementation=None to let the library choose",
                [NotImplementedError(f"{name}: {reason}") for name, reason in reasons.items()],
            )
        return chosen

    def explain(self, *args, implementation: Implementation = None, **kwargs) -> Explanation:
        """What `choose` would do, as a value. Without arguments only the device and the imports are judged."""
        split, arguments = self._split(args, kwargs)
        if split is not None:
            return self._explain_part(split, implementation, arguments)
        chosen, reasons = self._decide(implementation, args, kwargs)
        automatic = _asked_for(implementation) is None
        for name in IMPLEMENTATIONS:
            if name != chosen and name not in reasons:
                reason = self._why_not(name, args, kwargs, automatic=True)
                reasons[name] = reason or _why_passed_over(name, chosen, automatic)
        return Explanation(self.name, jax.default_backend(), chosen, reasons)

    def _explain_part(self, split: sharded.Split, implementation: Implementation, arguments: dict) -> Explanation:
        arrays = {name: a for name, a in arguments.items() if name in self.axes}
        constants = {name: a for name, a in arguments.items() if name not in arrays}
        found = []

        def part(**arguments):
            found.append(self.explain(implementation=implementation, **arguments))
            return ()

        jax.eval_shape(lambda arrays: split.run(part, arrays | constants, self.axes, lambda *_: ()), arrays)
        return found[0]

    def _decide(self, implementation: Implementation, args: tuple, kwargs: dict) -> tuple[str | None, dict[str, str]]:
        asked_for = _asked_for(implementation)
        automatic = asked_for is None
        candidates = _preferred(jax.default_backend()) if automatic else _as_names(asked_for)
        reasons = {}
        for name in candidates:
            reason = self._why_not(name, args, kwargs, automatic)
            if reason is None:
                return name, reasons
            reasons[name] = reason
        return None, reasons

    def _why_not(self, name: str, args: tuple, kwargs: dict, automatic: bool) -> str | None:
        if name not in self.backends:
            return f"{self.name} has no {name} backend"
        if name not in SPLIT_BY_XLA and self._is_left_to_xla(args, kwargs):
            return "the mesh cuts what the kernel takes in one piece; XLA would gather it on every device"
        try:
            module = self._module(name)
        except ImportError as error:
            return f"cannot be imported: {error}"
        if automatic and (reason := _call_if_present(module, "why_not_here")):
            return reason
        if not args and not kwargs:
            return None
        return _call_if_present(module, f"why_not_{self.name}", *args, **kwargs)

    def _module(self, name: str) -> ModuleType:
        return importlib.import_module(f"{self.package}.{name}")


def _call_if_present(module: ModuleType, function: str, *args, **kwargs) -> str | None:
    found: Callable[..., str | None] | None = getattr(module, function, None)
    return found(*args, **kwargs) if found else None


def _why_passed_over(name: str, chosen: str | None, automatic: bool) -> str:
    if not automatic:
        return "it would run, but was not asked for"
    if name == "reference":
        return "it is the oracle of the tests, never chosen automatically"
    platform = jax.default_backend()
    if name not in _preferred(platform):
        return f"it would run, but nobody has measured it to beat {chosen} on a {platform}; name it to use it"
    return f"it would run, but {chosen} is preferred on {platform}"


def _preferred(platform: str) -> tuple[str, ...]:
    return PREFERENCE.get(platform, ("xla",))


def _asked_for(implementation: Implementation) -> Implementation:
    return _override.get() if implementation is None else implementation


def _as_names(implementation: str | Sequence[str]) -> tuple[str, ...]:
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    for name in names or ("",):
        if name not in IMPLEMENTATIONS:
            raise ValueError(f"implementation: got {name!r}, expected one of {', '.join(IMPLEMENTATIONS)}")
    return names
