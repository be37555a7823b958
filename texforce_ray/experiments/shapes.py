"""The paper's experiments in the shapes world: what is trained, what is compared with what."""

from __future__ import annotations

from collections.abc import Iterator

from texforce_ray.experiments.stages import Evaluate, Stage, Sweep, Train

_CONFIGS = "configs/shapes"
_PHRASES = ("shapes-phrases", "shapes-phrases-unseen")

# In the order of a table's rows.
_HEADLINE = {
    "U-Net": [("unet", 1.0)],
    "ReFL": [("refl", 1.0)],
    "text encoder": [("text", 1.0)],
    "text + U-Net": [("text", 1.0), ("unet", 1.0)],
    "text + ReFL": [("text", 1.0), ("refl", 1.0)],
    "joint": [("joint", 1.0)],
}

# At full weight and less guidance: two adapters that were trained without it sharpen as it does.
_ONCE_MORE = {label: terms for label, terms in _HEADLINE.items() if label != "joint"}

# How much of the text encoder's adapter helps beside a U-Net's?
_FUSION = {
    f"{label} + {weight:g} text": [(name, 1.0), ("text", weight)]
    for label, name in (("U-Net", "unet"), ("ReFL", "refl"))
    for weight in (0.25, 0.5)
}

# Each method has a learning rate of its own, the best of four after ten iterations.
_RATES = {
    "text": (1.5e-3, 3e-3, 6e-3, 1.2e-2),
    "unet": (1e-3, 2e-3, 4e-3, 8e-3),
    "refl": (1.25e-3, 2.5e-3, 5e-3, 1e-2),
    "joint": (1.5e-3, 3e-3, 6e-3, 1.2e-2),
}


def _rates() -> Iterator[Stage]:
    policies = {}
    for name, rates in _RATES.items():
        for rate in rates:
            overrides = [f"optimizer.lr={rate:g}", "iterations=10", "eval.every=0"]
            if name == "joint":  # its two rates keep their ratio
                overrides.append(f"lora.denoiser.lr={rate * 2 / 3:g}")
            stage = f"{name}-{rate:g}"
            yield Train(stage, f"{_CONFIGS}/{name}.yaml", tuple(overrides), reward="shapes")
            policies[f"{name}, {rate:g}"] = [(stage, 1.0)]
    yield Evaluate("rates", f"{_CONFIGS}/text.yaml", policies, _PHRASES[:1])


_MANY = (
    "prompts.train.set=shapes", "prompts.per_iteration=32", "prompts.samples_per_prompt=8",
    "iterations=24",
)  # fmt: skip

# Not in the paper: run only on request (`--only rates`).
EXTRA = ("rates",)

EXPERIMENTS: dict[str, tuple[Stage, ...]] = {
    "rates": tuple(_rates()),
    # Fig. 5 and Tables 1 and 3: trained apart, fused, trained jointly; seen and unseen prompts.
    "headline": (
        *(
            Train(name, f"{_CONFIGS}/{name}.yaml", reward="shapes")
            for name in ("text", "unet", "refl", "joint")
        ),
        Evaluate(
            "headline", f"{_CONFIGS}/text.yaml", _HEADLINE, _PHRASES, note="at guidance 5"
        ),
        Evaluate(
            "unguided", f"{_CONFIGS}/text.yaml", _HEADLINE, _PHRASES,
            overrides=("eval.guidance_scale=1",), note="without guidance",
        ),
    ),
    # Table 3's fusion once more: with less guidance, and with less of the text encoder's adapter.
    "fusion": (
        Evaluate(
            "guided", f"{_CONFIGS}/text.yaml", _ONCE_MORE, _PHRASES,
            overrides=("eval.guidance_scale=2",), note="at guidance 2",
        ),
        Evaluate("fusion", f"{_CONFIGS}/text.yaml", _FUSION, _PHRASES, note="at guidance 5"),
    ),
    # All training prompts of the world, few samples of each, and prompts with pairs never seen.
    "many": (
        Train("text-many", f"{_CONFIGS}/text.yaml", _MANY, reward="shapes"),
        Train("unet-many", f"{_CONFIGS}/unet.yaml", _MANY, reward="shapes"),
        Evaluate(
            "many",
            f"{_CONFIGS}/text.yaml",
            {
                "U-Net": [("unet-many", 1.0)],
                "text encoder": [("text-many", 1.0)],
                "text + U-Net": [("text-many", 1.0), ("unet-many", 1.0)],
            },
            ("shapes", "shapes-unseen"),
        ),
    ),
    # The PPO runs above are penalized for leaving the base model, as in DPOK; these are not.
    "penalty": (
        Train("text-free", f"{_CONFIGS}/text.yaml", ("objective.kl_weight=0",), reward="shapes"),
        Train("unet-free", f"{_CONFIGS}/unet.yaml", ("objective.kl_weight=0",), reward="shapes"),
        Evaluate(
            "penalty",
            f"{_CONFIGS}/text.yaml",
            {
                "U-Net": [("unet-free", 1.0)],
                "text encoder": [("text-free", 1.0)],
                "text + U-Net": [("text-free", 1.0), ("unet-free", 1.0)],
            },
            _PHRASES,
            note="without the penalty",
        ),
    ),
    # Fig. 4: a reward that has nothing to do with the prompt.
    "incompression": (
        Train("incompression-text", f"{_CONFIGS}/incompression-text.yaml"),
        Train("incompression-unet", f"{_CONFIGS}/incompression-unet.yaml"),
        Evaluate(
            "incompression",
            f"{_CONFIGS}/incompression-text.yaml",
            {
                "U-Net": [("incompression-unet", 1.0)],
                "text encoder": [("incompression-text", 1.0)],
                "text + U-Net": [("incompression-text", 1.0), ("incompression-unet", 1.0)],
            },
            ("shapes-phrases",),
        ),
    ),
    # Fig. 11: detectors without a gradient, in an environment of their own.
    "people": (
        Train("hands", f"{_CONFIGS}/hands.yaml"),
        Train("faces", f"{_CONFIGS}/faces.yaml"),
        Evaluate("hands-evaluation", f"{_CONFIGS}/hands.yaml", {"hands": [("hands", 1.0)]},
                 ("hands",)),
        Evaluate("faces-evaluation", f"{_CONFIGS}/faces.yaml", {"faces": [("faces", 1.0)]},
                 ("faces",)),
    ),
    # Fig. 12: two tasks' text-encoder adapters, blended; what does each keep?
    "blend": (
        Evaluate(
            "blend-shapes",
            f"{_CONFIGS}/text.yaml",
            {
                "phrases": [("text", 1.0)],
                "hands": [("hands", 1.0)],
                "phrases + hands": [("text", 1.0), ("hands", 1.0)],
            },
            ("shapes-phrases",),
        ),
        Evaluate(
            "blend-hands",
            f"{_CONFIGS}/hands.yaml",
            {
                "phrases": [("text", 1.0)],
                "hands": [("hands", 1.0)],
                "phrases + hands": [("text", 1.0), ("hands", 1.0)],
            },
            ("hands",),
        ),
        Sweep("blend", ("text", "hands"), ("three red squares", "a hand")),
    ),
}  # fmt: skip
