"""What is to be reached on an H200, and whether a run reached it."""

from __future__ import annotations

from typing import Any

# (race, what, aim). Ratios are baseline time / our time in the same mode. "of copy" and "of matmul" are shares of what
# the same process measured; "us" is graph-replayed. Bandwidth counts where more than 36 MB move.
GATES: list[tuple[str, str, float]] = [
    ("select T=32", "launches", 1),
    ("select T=32", "synchronisations", 0),
    ("select T=32", "us", 10),
    ("select T=32", "vectorised torch", 30),
    ("select T=32", "torch.compile of it", 8),
    ("combinations T=32", "launches", 1),
    ("combinations T=32", "synchronisations", 0),
    ("combinations T=32", "vectorised torch", 20),
    *((f"gather T={t} {percent}%", "of copy", 0.85) for t, percent in
      [(64, 25), (128, 25), (512, 10), (512, 25), (768, 10), (768, 25)]),
    *((f"gather T={t} {percent}%", "index_select(out=)", 1) for t in (32, 64, 128, 512, 768) for percent in (10, 25)),
    ("repack 10%", "launches", 1),
    ("repack 10%", "synchronisations", 0),
    ("repack 10%", "of copy", 0.64),
    ("repack 10%", "index_select", 12),
    ("head", "torch.compile of the published", 1.2),
    ("head", "of matmul", 0.73),
]  # fmt: skip
AT_MOST = ("launches", "synchronisations", "us")


def _row(rows: list[dict[str, Any]], key: str, contestant: str) -> dict[str, Any]:
    return next((row for row in rows if row.get("key") == key and row["contestant"] == contestant), {})


def _ours(row: dict[str, Any]) -> str:
    """Graph-replayed, over inputs out of the cache where they rotate, else over those in it."""
    return "graph_cold" if row.get("cold_by") == "rotation" else "graph_warm"


def measured(rows: list[dict[str, Any]], key: str, what: str) -> dict[str, float | None]:
    """The figure by which a gate is judged, and beside it those of other modes."""
    ours = _row(rows, key, "ours")
    if "us" not in ours:
        return {"judged": None}
    mode, limits = _ours(ours), next(row for row in rows if row.get("family") == "ceilings")
    time = ours["us"][mode] or ours["us"][mode.replace("graph", "eager")]
    if what in ("launches", "synchronisations"):
        return {"judged": ours[what]}
    if what == "us":
        return {"judged": time, "cold": ours["us"]["graph_cold"], "eager": ours["us"]["eager_warm"]}
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
    lines = [f"{'aim':58} {'needed':>8} {'measured':>9}  verdict       other modes"]
    verdicts = []
    for key, what, aim in GATES:
        found = measured(rows, key, what)
        value, at_most = found.pop("judged"), what in AT_MOST
        reached = value is not None and (value <= aim if at_most else value >= aim)
        verdict = "not measured" if value is None else "dry run" if dry else "reached" if reached else "MISSED"
        name = f"{key}: {what}" + ("" if at_most or what.startswith("of ") else " / ours")
        shown = "-" if value is None else f"{value:.2f}"
        others = ", ".join(f"{mode} {x:.2f}" for mode, x in found.items() if x is not None)
        lines.append(f"{name:58} {'<=' if at_most else '>='}{aim:>6g} {shown:>9}  {verdict:13} {others}")
        verdicts.append({"family": "gate", "key": key, "what": what, "aim": aim, "measured": value, "verdict": verdict})
    return "\n".join(lines), verdicts
