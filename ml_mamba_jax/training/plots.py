"""Pictures of a run, as PNG: its loss curve, and held-out images with question, answer and prediction."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ml_mamba_jax.image import read_image
from ml_mamba_jax.training.evals import Answer, by_kind

_INK, _RIGHT, _WRONG = "#222222", "#1a7f37", "#c62828"


def loss_curve(lines: Sequence[dict], path: Path) -> None:
    """Loss and learning rate over steps, from the lines of `metrics.jsonl`, without steps that were left out."""
    lines = [line for line in lines if "left_out" not in line]
    figure, axis = _figure(8.0, 4.5)
    steps, losses = (np.asarray([line[key] for line in lines]) for key in ("step", "loss"))
    axis.plot(steps, losses, color="#9db8d9", linewidth=0.8, label="loss of a step")
    axis.plot(steps, _smooth(losses), color="#1f4e8c", linewidth=1.8, label="running mean")
    axis.set(xlabel="step", ylabel="loss (nats per target token)", yscale="log", xlim=(0, steps[-1]))
    axis.grid(alpha=0.25, which="both")
    rate = axis.twinx()
    rate.plot(steps, [line["learning_rate"] for line in lines], color="#c98b2b", linewidth=1, label="learning rate")
    rate.set_ylabel("learning rate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    handles = axis.get_lines() + rate.get_lines()
    axis.legend(handles, [line.get_label() for line in handles], frameon=False, loc="upper right")
    _save(figure, path)


def answer_grid(answers: Sequence[Answer], path: Path, columns: int = 6, rows: int = 4) -> None:
    """Images with question, prediction and, where that is wrong, the expected answer.

    Every kind of question gets its share, wrong answers first, so that the picture shows what the model cannot do.
    """
    shown = _choose(answers, columns * rows)
    figure, axes = _figure(2.1 * columns, 2.75 * -(-len(shown) // columns), -(-len(shown) // columns), columns)
    for axis in np.ravel(axes):
        axis.axis("off")
    for axis, item in zip(np.ravel(axes), shown, strict=False):
        if item.record.image is not None:
            axis.imshow(read_image(item.record.image, item.record.id), interpolation="nearest")
        axis.set_title(item.question, fontsize=8, color=_INK, wrap=True)
        verdict = item.prediction if item.is_right else f"{item.prediction or '(nothing)'}   (expected {item.expected})"
        axis.text(
            0.5, -0.04, verdict, transform=axis.transAxes, ha="center", va="top", fontsize=10, fontweight="bold",
            color=_RIGHT if item.is_right else _WRONG,
        )  # fmt: skip
    _save(figure, path)


def _choose(answers: Sequence[Answer], n: int) -> list[Answer]:
    kinds = by_kind(answers)
    share = max(1, n // len(kinds))
    chosen = []
    for items in kinds.values():
        wrong = [item for item in items if not item.is_right][: share // 2]
        right = [item for item in items if item.is_right]
        spread = [right[i] for i in np.linspace(0, len(right) - 1, share - len(wrong)).astype(int)] if right else []
        chosen += wrong + spread
    return chosen[:n]


def _smooth(values: np.ndarray) -> np.ndarray:
    """Exponential running mean, corrected for its start."""
    means, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = 0.95 * mean + 0.05 * value, 0.95 * weight + 0.05
        means.append(mean / weight)
    return np.asarray(means)


def _figure(width: float, height: float, rows: int = 1, columns: int = 1):
    """A figure without pyplot, so that no window system and no global state is touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)


def _save(figure, path: Path) -> None:
    aside = path.with_name(f".{path.stem}.partial.png")
    figure.savefig(aside, dpi=120)
    aside.replace(path)
