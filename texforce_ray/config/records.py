"""What is evaluated, kept and reported."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from texforce_ray.config.fields import Section, free
from texforce_ray.config.prompts import PromptSource


class EvalConfig(Section):
    """Evaluation on prompts and seeds that are never trained on."""

    every: int = Field(5, ge=0, description="iterations between evaluations; 0: none during a run")
    prompts: PromptSource | None = Field(
        None, description="prompts to evaluate on; default: the training prompts, other seeds"
    )
    unseen: PromptSource | None = Field(
        None, description="prompts that are never trained on, for the final comparison too"
    )
    images: int = Field(64, ge=1, description="images of one evaluation during the run")
    final_images: int = Field(
        0, ge=0, description="images of the final comparison, base against tuned; 0: skip it"
    )
    guidance_scale: float | None = Field(
        None, ge=0, description="guidance of evaluations; null: diffusion.guidance_scale"
    )
    eta: float | None = Field(
        None,
        ge=0,
        le=1,
        description="eta of evaluations, in all steps; 0: as in stock pipelines; null: "
        "diffusion.eta",
    )
    steps: int | None = Field(
        None, ge=1, le=500, description="denoising steps of evaluations; null: diffusion.steps"
    )
    guidance_curve: list[Annotated[float, Field(ge=0)]] = Field(
        default_factory=list,
        description="guidance scales at which the final comparison runs too, e.g. [1, 2, 3, 5]",
    )
    curve_images: int = Field(64, ge=1, description="images of each point of that curve")
    grid: int = Field(16, ge=1, description="images in the grid, always the same prompts and seeds")
    seed: int = Field(1_000_003, ge=0, description="seed of the evaluation's noise")


class CheckpointConfig(Section):
    """What is kept in the run directory."""

    every: int = free(1, "iterations between checkpoints", ge=1)
    keep_last: int = free(2, "newest checkpoints to keep; the best one is kept too", ge=1)


class WandbConfig(Section):
    """A run at Weights & Biases. Its key comes from WANDB_API_KEY or `wandb login`."""

    project: str = free("texforce", "project in which the run appears", min_length=1)
    name: str | None = free(None, "name of the run; default: the run directory's")
    entity: str | None = free(None, "user or team; default: the key's own")
    mode: Literal["online", "offline"] = free(
        "online", "'offline': only write to RUN_DIR/wandb, for a later `wandb sync`"
    )


class MlflowConfig(Section):
    """A run of an MLflow experiment. Keys come from the environment (MLFLOW_TRACKING_TOKEN)."""

    uri: str | None = free(
        None, "tracking server, e.g. http://mlflow:5000; null: files in RUN_DIR/mlflow"
    )
    experiment: str = free("texforce", "experiment; created if missing", min_length=1)


class TrackConfig(Section):
    """Where metrics and grids go besides the run directory and its TensorBoard files."""

    wandb: WandbConfig | None = free(
        None, "Weights & Biases; {}: defaults. Needs: pip install 'texforce-ray[wandb]'"
    )
    mlflow: MlflowConfig | None = free(
        None, "MLflow; {}: defaults. Needs: pip install 'texforce-ray[mlflow]'"
    )
