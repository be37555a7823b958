"""Which prompts are sampled, and how often."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from texforce_ray.config.fields import Section


class PromptSource(Section):
    """Where prompts come from: a built-in set, a file or folder, or a Hugging Face data set."""

    set: str | None = Field(None, description="name of a built-in prompt set")
    path: str | None = Field(
        None,
        description="file: .txt, .json, .jsonl, .csv, .tsv (each also as .gz) or .parquet; or a "
        "folder of .parquet files",
    )
    dataset: str | None = Field(
        None,
        description="Hugging Face data set: a hub id, or a folder. Needs: pip install "
        "'texforce-ray[datasets]'",
    )
    subset: str | None = Field(None, description="the data set's configuration, if it has several")
    split: str | None = Field(
        None, description="split of a data set or folder, e.g. 'train'; needed if it has several"
    )
    revision: str | None = Field(None, description="hub revision of the data set to pin")
    column: str = Field("prompt", description="field or column that holds the prompt's text")
    min_words: int = Field(1, ge=1, description="leave out shorter prompts")
    max_words: int | None = Field(None, ge=1, description="leave out longer prompts")
    part: Literal["all", "train", "test"] = Field(
        "all", description="'train' and 'test' share no prompt: a text's digest decides its part"
    )
    test_share: float = Field(0.1, gt=0, lt=1, description="share of distinct texts in 'test'")
    limit: int | None = Field(
        None, ge=1, description="use at most this many of the remaining prompts, in order"
    )

    @model_validator(mode="after")
    def _one_source(self) -> PromptSource:
        given = [name for name in ("set", "path", "dataset") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "give exactly one of 'set' (a built-in set), 'path' (a file) and 'dataset' (of "
                f"Hugging Face), not {' and '.join(given) or 'none'}"
            )
        for name in ("subset", "revision"):
            if getattr(self, name) is not None and self.dataset is None:
                raise ValueError(f"{name}: has no effect without 'dataset'")
        if self.split is not None and self.set is not None:
            raise ValueError("split: a built-in set has no splits")
        return self


class PromptsConfig(Section):
    """What is sampled in each iteration: prompts x samples."""

    train: PromptSource = Field(
        PromptSource(set="shapes", path=None), description="prompts to train on"
    )
    per_iteration: int = Field(16, ge=1, description="prompts drawn for each iteration")
    samples_per_prompt: int = Field(8, ge=1, description="images of each prompt, K")
