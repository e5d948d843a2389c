"""What task=probe found in a run, for its report: heat maps, tables, principal components."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

from tasks.probe_rows import Row, read_rows
from tasks.report_data import RunFolder


def probe_of(run: RunFolder) -> dict[str, Any] | None:
    """Values of the section on ``probe/``; None when the run was not probed."""
    folder = run.path / "probe"
    rows = read_rows(folder / "probe.csv")
    if not rows:
        return None
    told = _told(run)
    measures = sorted({row.measure for row in rows})
    by_measure = {measure: [row for row in rows if row.measure == measure] for measure in measures}
    pictures = [(time_of(path.name), path) for path in folder.glob("components_t*.png")]
    columns = ["picture", *(f"encoder {name}" for name in told.get("encoders") or {})]
    columns += dict.fromkeys(row.tap for row in rows)
    return {
        "pictures": told.get("pictures"),
        "best": [(measure, _best(own)) for measure, own in by_measure.items()],
        "maps": [
            {"measure": measure, "source": _png(path)}
            for measure in measures
            if (path := folder / f"{measure.replace('/', '_')}.png").is_file()
        ],
        "tables": [_table(measure, own) for measure, own in by_measure.items()],
        "components": [{"source": _png(path), "caption": f"t = {t:g}"} for t, path in sorted(pictures)],
        "columns": ", ".join(columns),
    }


def time_of(name: str) -> float:
    """The time in the name of a picture of components."""
    found = re.search(r"_t([\d.e+-]+)\.png$", name)
    return float(found[1]) if found else 0.0


def _told(run: RunFolder) -> dict[str, Any]:
    try:
        told = json.loads((run.path / "probe" / "probe.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        run.missing.append("probe/probe.json: cannot be read; the number of pictures and the encoders are not shown")
        return {}
    return told if isinstance(told, dict) else {}


def _best(rows: list[Row]) -> dict[str, str]:
    best = max(rows, key=lambda row: row.value)
    return {"value": f"{best.value:.3f}", "tap": best.tap, "t": f"{best.t:g}"}


def _table(measure: str, rows: list[Row]) -> dict[str, Any]:
    """Hidden states by times."""
    values = {(row.tap, row.t): row.value for row in rows}
    times = list(dict.fromkeys(t for _, t in values))
    taps = dict.fromkeys(tap for tap, _ in values)
    cells = [(tap, [f"{values[tap, t]:.3f}" if (tap, t) in values else "-" for t in times]) for tap in taps]
    return {"measure": measure, "times": [f"t = {t:g}" for t in times], "rows": cells}


def _png(path: Any) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
