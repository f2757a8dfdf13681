"""What is to be reached on an H200, and whether a run reached it."""

from __future__ import annotations

from typing import Any

# (race, what, aim). Ratios are baseline time / our time in the same mode. "of copy" and "of matmul" are shares of what
# the same process measured; "us" is graph-replayed. Bandwidth counts where more than 36 MB move. "x RACE" is our time
# over our own in another race.
Gates = list[tuple[str, str, float]]
BANDWIDTH = [(64, 25), (128, 25), (512, 10), (512, 25), (768, 10), (768, 25)]
TRITON: Gates = [
    ("select T=32", "launches", 1),
    ("select T=32", "synchronisations", 0),
    ("select T=32", "us", 10),
    ("select T=32", "vectorised torch", 30),
    ("select T=32", "torch.compile of it", 8),
    ("combinations T=32", "launches", 1),
    ("combinations T=32", "synchronisations", 0),
    ("combinations T=32", "vectorised torch", 20),
    *((f"gather T={t} {percent}%", "of copy", 0.85) for t, percent in BANDWIDTH),
    *((f"gather T={t} {percent}%", "index_select(out=)", 1) for t in (32, 64, 128, 512, 768) for percent in (10, 25)),
    ("repack 10%", "launches", 1),
    ("repack 10%", "synchronisations", 0),
    ("repack 10%", "of copy", 0.64),
    ("repack 10%", "index_select", 12),
    ("head", "torch.compile of the published", 1.2),
    ("head", "of matmul", 0.73),
]  # fmt: skip
CUDA: Gates = [
    *((race, what, aim)
      for race in ("select T=32", "select T=768", "combinations T=32", "gather T=32 10%", "repack 10%", "paged 10%")
      for what, aim in (("launches", 1), ("synchronisations", 0))),
    ("select T=32", "us", 6),
    ("select T=32", "FlashInfer top_k alone", 1 / 1.5),
    ("select T=768", "us", 9),
    ("select T=768", "FlashInfer top_k alone", 1 / 1.5),
    ("combinations T=32", "us", 8),
    ("gather T=32 10%", "us", 5),
    *((f"gather T={t} {percent}%", "of copy", 0.90) for t, percent in BANDWIDTH),
    ("repack 10%", "us", 26),
    ("paged 10%", "x repack 10% in place", 1.1),
]  # fmt: skip
GATES: dict[str, Gates] = {"cuda": CUDA, "triton": TRITON}
AT_MOST = ("launches", "synchronisations", "us")


def _row(rows: list[dict[str, Any]], key: str, contestant: str) -> dict[str, Any]:
    return next((row for row in rows if row.get("key") == key and row["contestant"] == contestant), {})


def _mode(row: dict[str, Any]) -> str:
    """Graph-replayed, over inputs out of the cache where they rotate, else over those in it."""
    return "graph_cold" if row.get("cold_by") == "rotation" else "graph_warm"


def _time(row: dict[str, Any]) -> float:
    mode = _mode(row)
    return row["us"][mode] or row["us"][mode.replace("graph", "eager")]


def measured(rows: list[dict[str, Any]], backend: str, key: str, what: str) -> dict[str, float | None]:
    """The figure by which a gate is judged, and beside it those of other modes."""
    ours = _row(rows, key, f"ours, {backend}")
    if "us" not in ours:
        return {"judged": None}
    mode, limits = _mode(ours), next(row for row in rows if row.get("family") == "ceilings")
    time = _time(ours)
    if what in ("launches", "synchronisations"):
        return {"judged": ours[what]}
    if what == "us":
        others = {"warm": ours["us"]["graph_warm"], "cold": ours["us"]["graph_cold"], "eager": ours["us"]["eager_warm"]}
        return {"judged": time, "bound": ours["bound_us"], **others}
    if what.startswith("x "):
        other = _row(rows, what[2:], f"ours, {backend}")
        return {"judged": time / _time(other) if "us" in other else None}
    if what == "of copy":
        return {"judged": ours["bytes"] / time / (limits["copy_GBps"] * 1e3)}
    if what == "of matmul":
        return {"judged": ours["operations"] / time / (limits["matmul_TFLOPs"] * 1e6)}
    theirs = _row(rows, key, what)
    if "us" not in theirs:
        return {"judged": None}
    eager = mode.replace("graph", "eager")
    ratio = {m: theirs["us"][m] / ours["us"][m] if theirs["us"][m] and ours["us"][m] else None for m in (mode, eager)}
    mixed = theirs["us"][eager] / time
    return {"judged": ratio[mode] or ratio[eager], "eager": ratio[eager], "eager/graph": mixed}


def table(rows: list[dict[str, Any]], dry: bool) -> tuple[str, list[dict[str, Any]]]:
    """A line per gate, and the same as rows for the results."""
    lines = [f"{'aim':58} {'needed':>8} {'measured':>9}  verdict       bound and other modes"]
    verdicts = []
    for backend, key, what, aim in [(backend, *gate) for backend, gates in GATES.items() for gate in gates]:
        found = measured(rows, backend, key, what)
        value, at_most = found.pop("judged"), what in AT_MOST or what.startswith("x ")
        reached = value is not None and (value <= aim if at_most else value >= aim)
        verdict = "not measured" if value is None else "dry run" if dry else "reached" if reached else "MISSED"
        name = f"{backend}, {key}: {what}" + ("" if at_most or what.startswith("of ") else " / ours")
        shown = "-" if value is None else f"{value:.2f}"
        others = ", ".join(f"{mode} {x:.2f}" for mode, x in found.items() if x is not None)
        lines.append(f"{name:58} {'<=' if at_most else '>='}{aim:>6.3g} {shown:>9}  {verdict:13} {others}")
        gate = {"backend": backend, "key": key, "what": what, "aim": aim, "bound_us": found.get("bound")}
        verdicts.append({"family": "gate", **gate, "measured": value, "verdict": verdict})
    return "\n".join(lines), verdicts
