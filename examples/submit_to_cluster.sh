#!/usr/bin/env bash
# A run as a job on a Ray cluster; works from any machine that reaches the cluster's dashboard.
#
#   RAY_API_SERVER_ADDRESS=http://HEAD:8265 \
#       bash examples/submit_to_cluster.sh /shared/runs/first configs/shapes.yaml rollout.num_workers=16
#
# The first argument is the run directory: an absolute path (or a mount) that the head node can
# write. Every node needs the package's dependencies (cluster/Dockerfile); the package itself
# travels in the working directory.
set -euo pipefail
cd "$(dirname "$0")/.."

run_dir=${1:?usage: submit_to_cluster.sh RUN_DIR CONFIG [key.sub=value ...]}
config=${2:?usage: submit_to_cluster.sh RUN_DIR CONFIG [key.sub=value ...]}
shift 2

# Clusters of Ray 2.59 and newer ask for a token; `ray` finds it in ~/.ray/auth_token or RAY_AUTH_TOKEN.
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
# Without an address `ray job submit` would look for a cluster on this machine.
export RAY_API_SERVER_ADDRESS=${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}

# Excluded: what the nodes do not need. Uploads are limited to 100 MiB.
# STOP_WAIT: how long `ray job stop` lets the driver write a checkpoint (Ray's default is 3 s).
environment='{
  "excludes": [".git", ".venv", ".tools", "runs", "build", "docs"],
  "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}
}'

# This follows the job's log; Ctrl-C leaves the job running. `ray job stop ID` ends it with a checkpoint.
# --resume auto: submitted again (or retried by an operator), the run resumes where it stopped.
exec ray job submit --submission-id "${SUBMISSION_ID:-$(basename "$run_dir")-$(date +%s)}" \
    --working-dir . --runtime-env-json "$environment" -- \
    python -m texforce_ray.run --config "$config" --resume auto "run_dir=$run_dir" "$@"
