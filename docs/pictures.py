"""The README's pictures, results.svg and candidates.svg, from the committed numbers table.json and candidates.json.

    PYTHONPATH=. python docs/pictures.py
"""
from pathlib import Path

from machinery import charts
from machinery.files import read_json
from report import paper_figures, ranked, ranking_chart
from worlds.backend import Backend


def draw(folder):
    table, state = (read_json(folder / f"{name}.json", {}) for name in ("table", "candidates"))
    order, rows = paper_figures(Backend()), {}
    for method, found in table["methods"].items():
        rows[method] = found, order.get(method)
    chart = charts.intervals(table["title"], rows, table["ways"], "success, %", "paper (8B)")
    (folder / "results.svg").write_text(charts.standalone(chart), encoding="utf-8")
    rows, half = ranked(state, Backend())
    names = [row["text"] + f"  ×{row['count']}" * (row["count"] > 1) for row in rows]
    chart = ranking_chart(state["title"], rows, half, names, width=8)
    (folder / "candidates.svg").write_text(charts.standalone(chart), encoding="utf-8")


if __name__ == "__main__":
    draw(Path(__file__).resolve().parent)
