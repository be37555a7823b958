"""Which objective to pick: all of them on the text encoder, the U-Net and both, in one world.

    python benchmarks/objectives.py             # what is missing, then the page
    python benchmarks/objectives.py --page      # only the page, from the kept results
    python benchmarks/objectives.py --seconds   # the costs, one after the other on a quiet machine

Every objective draws the same number of samples per iteration of the same prompts from the same
base model, and takes the same number of optimizer steps. Its learning rate and one other setting
are searched first, over the same small grid, at half the budget and a seed of their own. Each run
is one file in docs/results/objectives, so an interrupted benchmark resumes where it stopped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.one_process import OneProcess
    from texforce_ray.prompts import Prompt

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import objectives_plan as plan  # noqa: E402
from texforce_ray.files import atomic_write_text  # noqa: E402
from texforce_ray.records.looks import Looks  # noqa: E402

# ---- one run, in a process of its own ------------------------------------------------------------


def perform(run: plan.Run, base: Mapping[str, Looks], *, gpu: bool) -> None:
    """Train, evaluate, and keep the result."""
    import torch

    from benchmarks.one_process import OneProcess
    from texforce_ray.errors import NumericsError

    torch.set_num_threads(1)
    process, full = OneProcess(plan.config_of(run, gpu=gpu), gpu=gpu), run.seed != plan.SEARCH_SEED
    answer: dict[str, Any] = {"settings": run.overrides(), "failed": ""}
    points = []
    try:
        for metrics in process.iterations():
            point = {k: metrics[k] for k in ("samples", "flops", "reward", "bytes")}
            if full and metrics["iteration"] % 2 == 0:
                scored = process.evaluate(process.prompts, plan.CURVE_IMAGES)
                point |= {f"eval/{name}": _mean(v) for name, v in scored.rewards.items()}
            points.append(point)
    except NumericsError as error:
        answer["failed"] = str(error)
    sets = _sets(process) if full else {"seen": process.prompts}
    for name, prompts in sets.items():
        scored = process.evaluate(prompts, plan.IMAGES)
        before = base[name]
        answer[name] = {
            "reward": _mean(scored.rewards["shapes"]),
            "appearance": _mean(scored.rewards["appearance"]),
            "diversity": round(scored.looks.diversity(scored.prompts), 4),
            "drift": round(scored.looks.drift(before), 4),
            "style_drift": round(scored.looks.style_drift(before), 4),
        }
        if full:
            answer[name]["scores"] = _rounded(scored.rewards["shapes"])
    if full:
        answer["curve"] = points
    run.file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(run.file, json.dumps(answer) + "\n")


def evaluate_base(*, gpu: bool) -> dict[str, Looks]:
    """The base model's scores and looks on both prompt sets; its scores are kept too."""
    from benchmarks.one_process import OneProcess

    run = plan.Run(
        "ppo",
        "text",
        plan.RATES[0],
        plan.OBJECTIVES["ppo"].values[0],
        plan.SEARCH_SEED,
        plan.SEARCHED,
    )
    process = OneProcess(plan.config_of(run, gpu=gpu), gpu=gpu)
    kept, looks = {}, {}
    for name, prompts in _sets(process).items():
        scored = process.evaluate(prompts, plan.IMAGES)
        kept[name] = {
            "prompts": list(scored.prompts),
            "scores": _rounded(scored.rewards["shapes"]),
            "reward": _mean(scored.rewards["shapes"]),
            "appearance": _mean(scored.rewards["appearance"]),
            "diversity": round(scored.looks.diversity(scored.prompts), 4),
        }
        looks[name] = scored.looks
    plan.RESULTS.mkdir(parents=True, exist_ok=True)
    if not (plan.RESULTS / "base.json").is_file():
        atomic_write_text(plan.RESULTS / "base.json", json.dumps(kept) + "\n")
    return looks


def measure_seconds() -> None:
    """Medians of three small iterations of everything, in turn; the first is for caches."""
    import torch

    from benchmarks.one_process import OneProcess

    torch.set_num_threads(2)
    file = plan.RESULTS / "seconds.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    for name, part in product(plan.OBJECTIVES, plan.PARTS):
        if f"{name}/{part}" in found:
            continue
        run = plan.Run(
            name, part, plan.RATES[0], plan.OBJECTIVES[name].values[0], plan.SEARCH_SEED, 4
        )
        fewer = ["prompts.samples_per_prompt=24"]
        if name == "raft":  # the same share of them
            fewer.append(f"objective.best={plan.OBJECTIVES[name].values[0] // 4:g}")
        process = OneProcess(plan.config_of(run, more=fewer))
        _, *iterations = process.iterations()
        samples = iterations[0]["samples"] / 2
        sampling, update = (
            median(m[f"seconds/{phase}"] for m in iterations) / samples
            for phase in ("sampling", "update")
        )
        found[f"{name}/{part}"] = {
            "sampling": sampling,
            "update": update,
            "bytes": iterations[0]["bytes"],
            "flops": iterations[0]["flops"] / iterations[0]["samples"],
        }
        print(f"{name}, {part}: {1e3 * sampling:.1f} + {1e3 * update:.1f} ms a sample", flush=True)
        atomic_write_text(file, json.dumps(found, indent=1) + "\n")


def _sets(process: OneProcess) -> dict[str, list[Prompt]]:
    from texforce_ray.prompts import load_prompts

    assert process.config.eval.unseen is not None
    return {"seen": process.prompts, "unseen": load_prompts(process.config.eval.unseen)}


def _mean(values: Any) -> float:
    return round(float(values.mean()), 5)


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 4) for value in values]


# ---- all of them -----------------------------------------------------------------------


def perform_all(
    runs: Sequence[plan.Run], pool: Executor, base: Mapping[str, Looks], until: float, gpu: bool
) -> None:
    """Those without a result yet, several at once."""
    missing = [run for run in runs if not run.file.is_file()]
    began = time.monotonic()
    jobs = {pool.submit(_unless_late, run, base, until, gpu): run for run in missing}
    for done, job in enumerate(as_completed(jobs), 1):
        seconds, error = time.monotonic() - began, job.exception()
        state = "" if error is None else f": {error!r}"
        print(f"{done}/{len(missing)}  {seconds:5.0f} s  {jobs[job].name}{state}", flush=True)


def _unless_late(run: plan.Run, base: Mapping[str, Looks], until: float, gpu: bool) -> None:
    if time.time() < until:
        perform(run, base, gpu=gpu)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--gpu", action="store_true", help="on the GPU, which they share")
    parser.add_argument("--minutes", type=float, default=1e6, help="start none later")
    parser.add_argument("--page", action="store_true", help="write the page from kept results")
    parser.add_argument("--seconds", action="store_true", help="measure the costs")
    parser.add_argument("--only", default="", help="names that contain this")
    options = parser.parse_args(arguments)
    if options.seconds:
        measure_seconds()
    elif not options.page:
        until = time.time() + 60 * options.minutes
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.jobs, spawn) as pool:
            base = evaluate_base(gpu=options.gpu)
            for first, runs in product(
                (True, False), (plan.searched, plan.searched_beyond, plan.measured)
            ):
                chosen = [run for run in runs() if options.only in run.name]
                chosen = [run for run in chosen if (run.objective in plan.MAIN) == first]
                perform_all(chosen, pool, base, until, options.gpu)
    from benchmarks.objectives_page import write_page

    write_page()


if __name__ == "__main__":
    main()
