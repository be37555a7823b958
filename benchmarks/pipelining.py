"""How much does sampling ahead (k = 1) save, against the most that it could?

    python benchmarks/pipelining.py [--ratios 1:1 2:1 1:2] [--add]

The real driver with stand-ins that sleep (texforce_ray.testing.stand_ins): for each ratio of an
iteration's sampling time s to its learning time l, a run with k = 0, which takes s + l, and one
with k = 1, which takes max(s, l) at best. Writes benchmarks/results/pipelining.json and
pipelining.md; with --add, ratios that are not measured again stay.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import scaling

ROLLOUTS = 2


def measure(ratio: str, seconds: float, iterations: int) -> dict[str, Any]:
    """Both runs of one ratio; `seconds`: the shorter of s and l."""
    sampling, learning = (seconds * float(part) for part in ratio.split(":"))
    runs = [
        scaling.measure(
            ROLLOUTS,
            staleness=staleness,
            iterations=iterations,
            unit_seconds=sampling / scaling.UNITS,
            update_seconds=learning,
        )
        for staleness in (0, 1)
    ]
    before, after = (run["iteration_seconds"] for run in runs)
    ideal = max(sampling, learning) / (sampling + learning)
    return {
        "ratio": ratio,
        "sampling_seconds": sampling,
        "learning_seconds": learning,
        "k0_seconds": before,
        "k1_seconds": after,
        "measured": after / before,
        "ideal": ideal,
        "over_ideal": after / before / ideal - 1,
        "k1_over_longer": after / max(sampling, learning) - 1,
        "runs": runs,
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| s : l | s (s) | l (s) | iteration, k = 0 (s) | iteration, k = 1 (s) | k = 1 / k = 0 "
        "| ideal | off by | k = 1 over max(s, l) |",
        "| " + " | ".join(["---"] * 9) + " |",
    ]
    lines += [
        f"| {r['ratio']} | {r['sampling_seconds']:g} | {r['learning_seconds']:g} "
        f"| {r['k0_seconds']:.2f} | {r['k1_seconds']:.2f} | {r['measured']:.3f} "
        f"| {r['ideal']:.3f} | {r['over_ideal']:+.1%} | {r['k1_over_longer']:+.1%} |"
        for r in rows
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ratios", nargs="*", default=["1:1", "2:1", "1:2"])
    parser.add_argument("--seconds", type=float, default=4.0, help="the shorter of s and l")
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--add", action="store_true", help="to the results that are there")
    options = parser.parse_args()
    path = scaling.RESULTS / "pipelining.json"
    known = json.loads(path.read_text())["ratios"] if options.add and path.exists() else []
    rows = {row["ratio"]: row for row in known}
    scaling.RESULTS.mkdir(parents=True, exist_ok=True)
    with scaling.cluster(1, ROLLOUTS):
        for ratio in options.ratios:
            rows[ratio] = measure(ratio, options.seconds, options.iterations)
            lines = table(list(rows.values()))
            path.write_text(json.dumps({"ratios": list(rows.values())}, indent=2) + "\n")
            path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(table(list(rows.values()))))
    print(json.dumps({"ratios": list(rows.values())}))


if __name__ == "__main__":
    main()
