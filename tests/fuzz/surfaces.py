"""Every file and message that we read, as something that can be fuzzed.

A surface has well-formed inputs and a way to read a folder of files. Reading must give a result or
an error of ours; anything else is a finding. So is a changed file: readers leave what they read.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
Files = dict[str, bytes]


@dataclass(frozen=True)
class Surface:
    """seeds: folders of well-formed files; read: what a user's command does with one; accepts:
    errors that are as they should be; writes: files that reading may write."""

    name: str
    seeds: Sequence[Files]
    read: Callable[[Path], object]
    accepts: tuple[type[Exception], ...]
    writes: tuple[str, ...] = ()
    prepare: Callable[[Files], Files] = field(default=lambda files: files)


def surfaces(scratch: Path) -> list[Surface]:
    """All of them; `scratch` is a folder to make well-formed files in."""
    from texforce_ray.errors import TexForceError

    ours = (TexForceError,)
    run = _run_files(scratch / "run")
    checkpoint = _checkpoint_files(scratch / "checkpoint")
    return [
        Surface("config file", _configs(), _read_config, ours),
        Surface("config override", [{"override": o.encode()} for o in _OVERRIDES], _override, ours),
        Surface("prompt file", _prompt_files(scratch), _read_prompts, ours),
        Surface("adapter", _adapters(scratch / "adapter"), _read_adapter, ours),
        Surface("checkpoint, damaged", [checkpoint], _read_checkpoint, ours),
        # With markers that match: a checkpoint's content is wrong, not how it is stored.
        Surface("checkpoint, forged", [checkpoint], _read_checkpoint, ours, prepare=_marked),
        Surface("run directory: resume", [run], _resume, ours, ("metrics.jsonl", "tensorboard")),
        Surface("run directory: report", [run], _report, ours, ("report.html",)),
        Surface("run directory: capacity", [run], _capacity, ours),
        Surface("run directory: status", [_watched(run)], _status, ours),
        Surface("samples file", [{"s.parquet": run[_SAMPLES]}], _read_samples, ours),
        Surface("reward request", _requests(), _ask, (*ours, ValueError, TypeError)),
    ]


# ---- configs -------------------------------------------------------------------------------

_OVERRIDES = (
    "iterations=3",
    "rollout.num_workers=2",
    "rewards=[{name: shapes}, {name: jpeg_compressibility, weight: 0.1}]",
    "rewards.0.weight=2",
    "prompts.train.path=prompts.txt",
    "model.denoiser_adapters=[a, b]",
    "optimizer.betas=[0.9, 0.99]",
    "run_dir=/data/exp #3/${oc.env:HOME}",
    "rewards.0.kwargs.rubric=Score: 'a' to {b}",
)


def _configs() -> list[Files]:
    return [{"c.yaml": path.read_bytes()} for path in sorted((ROOT / "configs").rglob("*.yaml"))]


def _read_config(folder: Path) -> object:
    from texforce_ray.config.io import load_config, to_yaml

    return to_yaml(load_config(folder / "c.yaml"))


def _override(folder: Path) -> object:
    from texforce_ray.config.io import load_config

    text = (folder / "override").read_text(encoding="utf-8", errors="surrogateescape")
    return load_config(ROOT / "configs" / "smoke.yaml", [text])


# ---- prompts -------------------------------------------------------------------------------


def _prompt_files(scratch: Path) -> list[Files]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = ["a red circle", "zwei grüne Dreiecke", "three, blue; squares", "日本 🎨"]
    rows = [{"prompt": text, "tag": i} for i, text in enumerate(texts)]
    scratch.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), scratch / "p.parquet")
    csv = "prompt,tag\n" + "".join(f'"{row["prompt"]}",{row["tag"]}\n' for row in rows)
    return [
        {"p.txt": "\n".join(texts).encode()},
        {"p.json": json.dumps(rows).encode()},
        {"p.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()},
        {"p.csv": csv.encode()},
        {"p.tsv": csv.replace(",", "\t").encode("utf-16")},
        {"p.csv.gz": gzip.compress(csv.encode())},
        {"p.json": json.dumps({"prompt": dict(enumerate(texts))}).encode()},
        {"p.json": json.dumps({"data": rows, "version": 1}).encode()},
        {"p.json": json.dumps({str(i): row for i, row in enumerate(rows)}).encode()},
        {"p.parquet": (scratch / "p.parquet").read_bytes()},
    ]


def _read_prompts(folder: Path) -> object:
    from texforce_ray.config import PromptSource
    from texforce_ray.prompts import load_prompts

    (file,) = folder.iterdir()
    return load_prompts(PromptSource(path=str(file), set=None, part="train"))


# ---- adapters ------------------------------------------------------------------------------


def _adapters(folder: Path) -> list[Files]:
    from texforce_ray.artifacts.snapshot import LoraShape, PolicySnapshot
    from texforce_ray.model.adapter_files import export_adapter

    layer = "text_model.encoder.layers.0.self_attn.q_proj"
    tensors = {
        f"{layer}.lora_A.weight": np.ones((2, 8), np.float32),
        f"{layer}.lora_B.weight": np.ones((8, 2), np.float32),
    }
    shapes = {"text_encoder": LoraShape(2, 2.0, ("q_proj",))}
    export_adapter(PolicySnapshot(1, shapes, {"text_encoder": tensors}), folder, "base")
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    peft = {name: data for name, data in files.items() if name.startswith("adapter_")}
    other = {name: data for name, data in files.items() if name.startswith("pytorch_")}
    kohya = {name: data for name, data in files.items() if name.startswith("kohya")}
    return [peft, other, kohya]


def _read_adapter(folder: Path) -> object:
    from texforce_ray.model.adapter_files import read_adapter

    return read_adapter(folder)


# ---- checkpoints ---------------------------------------------------------------------------


def _checkpoint_files(run_dir: Path) -> Files:
    from tests.chaos.torture import checkpoint
    from texforce_ray.records.checkpoint import save_checkpoint

    path = save_checkpoint(run_dir, checkpoint(3))
    return {file.name: file.read_bytes() for file in path.iterdir()}


def _marked(files: Files) -> Files:
    names = [name for name in files if name != "COMPLETE.json"]
    digests = {name: hashlib.sha256(files[name]).hexdigest() for name in names}
    return files | {"COMPLETE.json": json.dumps(digests).encode()}


def _read_checkpoint(folder: Path) -> object:
    from texforce_ray.records.checkpoint import load_checkpoint

    return load_checkpoint(folder)


# ---- run directories -----------------------------------------------------------------------

_SAMPLES = "samples/iteration-00000.parquet"


def _run_files(run_dir: Path) -> Files:
    """A finished run of two iterations, without images."""
    from tests.chaos.torture import checkpoint
    from texforce_ray.config.io import load_config
    from texforce_ray.files import atomic_write_text, to_json
    from texforce_ray.records.checkpoint import mark_best, save_checkpoint
    from texforce_ray.records.run_directory import RunDirectory
    from texforce_ray.records.samples import write_samples

    config = load_config(ROOT / "configs" / "smoke.yaml", [f"run_dir={run_dir}"])
    directory = RunDirectory.create(config, "digest")
    for iteration in range(2):
        columns = {"prompt": ["a"] * 4, "seed": np.arange(4), "masked": np.zeros(4, bool)}
        columns |= {"reward_shapes": np.ones(4), "total": np.ones(4), "advantage": np.ones(4)}
        write_samples(directory.path, iteration, columns)
        metrics = {"reward/total_mean": 0.5, "eval/total": 0.4, "eval/drift": 0.1}
        metrics |= {"work/rollout": 1.0, "work/learner": 2.0, "seconds/total": 3.0}
        directory.metrics.append(iteration, metrics)
        save_checkpoint(run_dir, checkpoint(iteration + 1))
    mark_best(run_dir, 1, 0.5)
    scores = {"base": 0.1, "tuned": 0.2, "difference": 0.1, "low": 0.0, "high": 0.2, "images": 4}
    atomic_write_text(run_dir / "evaluation" / "summary.json", to_json({"rewards": {"s": scores}}))
    directory.close()
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    kept = [path for path in files if path.name != ".lock" and "tensorboard" not in path.parts]
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in kept}


def _resume(folder: Path) -> object:
    from texforce_ray.records.checkpoint import newest_checkpoint, read_best
    from texforce_ray.records.metrics import MetricsLog
    from texforce_ray.records.run_directory import check_resumable, read_config

    config = read_config(folder)
    check_resumable(config, "digest")
    found = newest_checkpoint(folder)
    read_best(folder)
    MetricsLog(folder, resume_from=found.iteration if found else 0).close()
    return found


def _report(folder: Path) -> object:
    from texforce_ray.records.report import write_report

    return write_report(folder)


def _capacity(folder: Path) -> object:
    from texforce_ray.cluster.capacity import measured

    return measured(folder)


def _watched(run: Files) -> Files:
    """What `texforce_ray.status` reads of a run in progress."""
    busy = {"role": "rollout", "node": "10.0.0.1", "name": "rollout-0", "state": "busy"}
    busy |= {"process": "cpu, pid 7 on 10.0.0.1", "doing": "sampling", "seconds": 1.5}
    status = {"time": 1.8e9, "started": 1.7e9, "pid": 7, "host": "a", "state": "running"}
    status |= {"version": 1, "iterations": 2, "reward": 0.5, "samples_per_second": 3.0}
    status |= {"restarts": 1, "actors": [busy], "queues": {"rollout": 1, "unscored": 2}}
    status |= {"start_iteration": 0, "unscored_limit": 4, "run_dir": "/runs/a"}
    status |= {"errors": [{"time": 1.8e9, "text": "reward-0 failed"}]}
    return {
        "status.json": json.dumps(status).encode(),
        "metrics.jsonl": run["metrics.jsonl"],
    }


def _status(folder: Path) -> object:
    from rich.console import Console

    from texforce_ray.observability.status_view import run_view
    from texforce_ray.records.status import read_status

    console = Console(width=80, file=io.StringIO())
    console.print(run_view(folder, read_status(folder)))
    return console


def _read_samples(folder: Path) -> object:
    from texforce_ray.records.samples import read_samples

    return read_samples(folder / "s.parquet")


# ---- messages ------------------------------------------------------------------------------


def _requests() -> list[Files]:
    from texforce_ray.rewards.images import to_png

    picture = np.zeros((8, 8, 3), np.uint8)
    given = to_png(picture)
    image = given if isinstance(given, str) else base64.b64encode(given).decode()
    body = {"images": [image, image], "prompts": ["a", "b"], "metadata": [{}, {"x": 1}]}
    return [
        {"body": json.dumps(body).encode()},
        {"body": json.dumps({**body, "metadata": None}).encode()},
    ]


class _Mean:
    def score(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> list[float]:
        return images.reshape(len(images), -1).mean(axis=1).tolist()


def _ask(folder: Path) -> object:
    from texforce_ray.files import from_json
    from texforce_ray.rewards.serve import RewardService

    service = RewardService(("127.0.0.1", 0), "mean", _Mean())
    try:
        return service.scores(from_json((folder / "body").read_bytes()))
    finally:
        service.server_close()
