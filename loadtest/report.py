"""Results as one self-contained HTML page, and as one PNG: reads the JSON that the other commands wrote.

Invariants: the page loads nothing from anywhere; every figure in it comes from a result file named in it; a plot whose
data nobody measured is left out by name, not drawn empty.
"""

from __future__ import annotations

import html
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from loadtest import compare, run
from loadtest.promises import check

__all__ = ["NoPlots", "build", "read"]

COLOURS = {
    "canal": "#d1495b", "nginx": "#3b7a57", "envoy": "#5b5ea6", "caddy": "#2e9cca", "haproxy": "#8d6a9f",
    "smg": "#b7791f", "litellm": "#777777", "direct": "#bbbbbb",
}  # fmt: skip
SHOWN: dict[str, Callable[[dict[str, Any]], str]] = {
    "compare": compare.shown,
    "promises": check.shown,
    "run": run.shown,
}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
pre { background: #f6f6f4; padding: 1rem; overflow-x: auto; font-size: 13px; line-height: 1.35; }
figure { margin: 1.5rem 0; } figcaption { color: #555; } svg { max-width: 100%; height: auto; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(30rem, 1fr)); gap: 1rem; }
@media (prefers-color-scheme: dark) { body { background: #fff; } }
"""


class NoPlots(Exception):
    """matplotlib is not installed; the text says how to get it."""


def read(paths: Sequence[Path]) -> list[tuple[str, dict[str, Any]]]:
    """The results in these files, named; raises `ValueError` for what is none of ours."""
    results = []
    for path in paths:
        try:
            result = json.loads(path.read_text())
        except (OSError, ValueError) as exc:
            raise ValueError(f"{path}: {exc}") from None
        if not isinstance(result, dict) or result.get("kind") not in SHOWN:
            raise ValueError(f"{path}: not a result of `python -m loadtest compare|promises|run --json`")
        results.append((path.name, result))
    return results


def build(results: Sequence[tuple[str, dict[str, Any]]], page: Path, png: Path | None) -> list[str]:
    """Write the page and the picture; the names of the plots that had no data."""
    figures, absent = [], []
    compared = [result for _name, result in results if result["kind"] == "compare"]
    promised = [result for _name, result in results if result["kind"] == "promises"]
    plots: dict[str, tuple[Callable[[Any, dict[str, Any]], bool], list[dict[str, Any]]]] = {
        "CPU per streamed event": (_cpu, compared),
        "Latency of an event, 250 streams × 40/s": (_latency, compared),
        "Memory over idle streams": (_memory, compared),
        "Cancel latency, by phase": (_cancel, promised),
    }
    drawn: list[tuple[str, Callable[[Any, dict[str, Any]], bool], dict[str, Any]]] = []
    for title, (draw, sources) in plots.items():
        figure, axes = _figure(1)
        if sources and draw(axes[0], sources[-1]):
            axes[0].set_title(title)
            figures.append((title, _svg(figure)))
            drawn.append((title, draw, sources[-1]))
        else:
            absent.append(title)
    if png is not None and drawn:
        figure, axes = _figure(len(drawn))
        for place, (title, draw, source) in zip(axes, drawn, strict=True):
            draw(place, source)
            place.set_title(title, fontsize=11)
        figure.savefig(png, dpi=110)
    page.write_text(_page(results, figures, absent))
    return absent


def _page(results: Sequence[tuple[str, dict[str, Any]]], figures: list[tuple[str, str]], absent: list[str]) -> str:
    parts = ["<!doctype html><html lang=en><meta charset=utf-8><title>canal-trio: load tests</title>"]
    parts.append(f"<style>{STYLE}</style><h1>Load tests</h1>")
    parts.append(
        "<p>Figures of one machine at one time. On a shared machine only the ratios count; how each figure is taken "
        "stands in docs/measuring.md.</p><div class=plots>"
    )
    parts += [f"<figure>{svg}<figcaption>{html.escape(title)}</figcaption></figure>" for title, svg in figures]
    parts.append("</div>")
    if absent:
        parts.append(f"<p>Not measured: {html.escape(', '.join(absent))}.</p>")
    for name, result in results:
        when = f", {result['at']}" if "at" in result else ""
        parts.append(f"<h2>{html.escape(result['kind'])} <small>({html.escape(name)}{when})</small></h2>")
        parts.append(f"<pre>{html.escape(SHOWN[result['kind']](result))}</pre>")
    return "\n".join(parts) + "\n"


def _figure(count: int) -> tuple[Any, list[Any]]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise NoPlots("no matplotlib: pip install '.[bench]'") from exc
    rows = (count + 1) // 2
    figure = Figure(figsize=(6.4, 4.2) if count == 1 else (12.8, 4.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(1 if count == 1 else rows, min(count, 2), at + 1) for at in range(count)]


def _svg(figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _cpu(axes: Any, result: dict[str, Any]) -> bool:
    steady, burst = (result["medians"].get(measure, {}) for measure in ("steady", "burst"))
    names = [name for name in result["peers"] if "cpu_us_per_event" in steady.get(name, {})]
    if not names:
        return False
    names.sort(key=lambda name: steady[name]["cpu_us_per_event"])
    for row, (source, label, alpha) in enumerate(((steady, "40/s per stream", 1.0), (burst, "burst", 0.45))):
        values = [source.get(name, {}).get("cpu_us_per_event", 0) for name in names]
        places = [at + 0.36 * row for at in range(len(names))]
        colours = [COLOURS.get(name, "#444444") for name in names]
        bars = axes.barh(places, values, height=0.34, color=colours, alpha=alpha, label=label)
        axes.bar_label(bars, [f" {value:.1f} ({label})" for value in values], fontsize=8)
    axes.set_yticks([at + 0.18 for at in range(len(names))], names)
    axes.invert_yaxis()
    axes.margins(x=0.45)
    axes.set_xlabel("µs of CPU, user + system, whole process tree")
    return True


def _latency(axes: Any, result: dict[str, Any]) -> bool:
    drawn = False
    for name, curves in result["curves"].get("steady", {}).items():
        if curve := curves.get("event"):
            points = [(100 / max(100 - point, 0.01), value) for point, value in curve if point < 100]
            axes.plot(*zip(*points, strict=True), label=name, color=COLOURS.get(name), marker=".", linewidth=1.4)
            drawn = True
    if drawn:
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks([1, 2, 10, 100, 1000, 10_000], ["0", "50", "90", "99", "99.9", "99.99"])
        axes.set_xlabel("percentile")
        axes.set_ylabel("ms from the upstream's send to our receive")
        axes.legend(fontsize=8)
    return drawn


def _memory(axes: Any, result: dict[str, Any]) -> bool:
    drawn = False
    for name, curves in result["curves"].get("idle", {}).items():
        if curve := curves.get("memory"):
            axes.plot([point[0] for point in curve], [point[1] / (1 << 20) for point in curve], label=name,
                      color=COLOURS.get(name), marker=".")  # fmt: skip
            drawn = True
    if drawn:
        axes.set_xlabel("streams")
        axes.set_ylabel("MiB more than with none (RSS)")
        axes.legend(fontsize=8)
    return drawn


def _cancel(axes: Any, result: dict[str, Any]) -> bool:
    rows = [
        (verdict["what"].partition(" → ")[0], verdict["details"])
        for verdict in result["verdicts"]
        if verdict["promise"] == "cancelled at once" and verdict["details"].get("count")
    ]
    if not rows:
        return False
    places = range(len(rows))
    axes.barh(places, [details["p50"] for _name, details in rows], height=0.5, color=COLOURS["canal"], label="p50")
    axes.plot([details["max"] for _name, details in rows], places, "k|", markersize=9, label="worst")
    axes.set_yticks(places, [name for name, _details in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("ms from the client's FIN or RST to the upstream's seeing the close")
    axes.legend(fontsize=8)
    return True
