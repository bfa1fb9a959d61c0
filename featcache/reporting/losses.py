"""The losses of a head by epoch, or of all heads of an ensemble, as a figure of the page."""

from __future__ import annotations

from collections.abc import Sequence

from featcache.evaluation.history import History
from featcache.formatting import count
from featcache.reporting.charts import Chart, few_places
from featcache.reporting.svg import Axis, Line, Mark, draw, legend_key

_MOST_HEADS = 30  # whose losses are drawn


def loss_chart(histories: Sequence[History]) -> Chart | None:
    """Return the losses by epoch of a head, or of all heads of an ensemble; None without any."""
    shown = histories[:_MOST_HEADS]
    names = [
        n for n in ("train_loss", "valid_loss") if shown and all(n in h.columns for h in shown)
    ]
    if not names or any(history.step != "epoch" for history in shown):
        return None
    num_epochs = max(len(history.steps) for history in shown)
    values = [value for h in shown for n in names for value in h.columns[n] if value > 0]
    if num_epochs < 2 or not values or any(h.steps != sorted({*h.steps}) for h in shown):
        return None
    low, high = min(values), max(values)
    is_log = high / low > 5
    y = (
        Axis("loss", low / 1.15, high * 1.15, is_log=True)
        if is_log
        else Axis("loss", 0, high * 1.08)
    )
    lines = [
        Line(list(zip(history.steps, history.columns[name], strict=True)), number)
        for number, name in enumerate(names) for history in shown
    ]  # fmt: skip
    legend = [(legend_key(i, is_line=True), name.replace("_", " ")) for i, name in enumerate(names)]
    kept = [
        (history.steps[history.best], history.columns["valid_loss"][history.best])
        for history in shown if history.best is not None and "valid_loss" in names
    ]  # fmt: skip
    heads = "" if len(histories) == 1 else f" of each of {len(histories):,} heads"
    if len(shown) < len(histories):
        heads += f", the first {len(shown)} drawn"
    summary = f"Loss of {count(num_epochs, 'epoch')}{heads}{', logarithmic' if is_log else ''}."
    if len(histories) > 1:
        summary += " Kept of each head is its epoch with the lowest loss on the rows held out for "
        summary += "it (diamonds)." if kept else "it."
    elif kept:
        epoch, loss = kept[0]
        summary += f" Kept is epoch {epoch:g} (diamond), with the lowest loss on valid: {loss:.4g}."
    marks = [Mark(at, f"kept-{number}") for number, at in enumerate(kept)]
    last = max(history.steps[-1] for history in shown)
    first = min(history.steps[0] for history in shown)
    svg = draw(Axis("epoch", first, last), y, lines, marks=marks, name="loss", summary=summary)
    table = _losses_of_heads if len(histories) > 1 else _losses_of_epochs
    return Chart("loss", "Loss by epoch", summary, svg, *table(shown, names), legend)


def _losses_of_epochs(
    histories: Sequence[History], names: list[str]
) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of a table with a row for an epoch of the only head."""
    (history,) = histories
    shown = [*names, *(["valid_accuracy"] if "valid_accuracy" in history.columns else [])]
    rows = [
        [f"{history.steps[i]:.0f}", *(f"{history.columns[name][i]:.4f}" for name in shown)]
        for i in few_places(len(history.steps))
    ]
    return ["epoch", *(name.replace("_", " ") for name in shown)], rows


def _losses_of_heads(
    histories: Sequence[History], names: list[str]
) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of a table with a row for each head: what is kept of it."""
    rows = []
    for number, history in enumerate(histories, 1):
        member = ", ".join(f"{key} {value}" for key, value in history.member.items())
        at = len(history.steps) - 1 if history.best is None else history.best
        losses = [f"{history.columns[name][at]:.4f}" for name in names]
        rows.append([
            member or f"head {number}", f"{len(history.steps):,}", f"{history.steps[at]:.0f}",
            *losses,
        ])  # fmt: skip
    return ["head", "epochs", "kept epoch", *(name.replace("_", " ") for name in names)], rows
