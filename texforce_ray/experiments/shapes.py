"""The paper's experiments in the shapes world: what is trained, what is compared with what."""

from __future__ import annotations

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

# How much of the text encoder's adapter helps beside a U-Net's?
_FUSION = {
    f"{label} + {weight:g} text": [(name, 1.0), ("text", weight)]
    for label, name in (("U-Net", "unet"), ("ReFL", "refl"))
    for weight in (0.25, 0.5)
}

EXPERIMENTS: dict[str, tuple[Stage, ...]] = {
    # Fig. 5 and Tables 1 and 3: apart, fused, jointly; seen and unseen prompts.
    "headline": (
        *(
            Train(name, f"{_CONFIGS}/{name}.yaml", reward="shapes")
            for name in ("text", "unet", "refl", "joint")
        ),
        Evaluate("headline", f"{_CONFIGS}/text.yaml", _HEADLINE, _PHRASES),
    ),
    # Table 3's fusion once more, with less of the one that was trained for the base U-Net.
    "fusion": (Evaluate("fusion", f"{_CONFIGS}/text.yaml", _FUSION, _PHRASES),),
    # Fig. 5's other comparison: the U-Net held to the base model by a KL penalty (DPOK).
    "dpok": (
        Train("dpok", f"{_CONFIGS}/dpok.yaml"),
        Evaluate(
            "dpok-evaluation",
            f"{_CONFIGS}/dpok.yaml",
            {"DPOK": [("dpok", 1.0)], "text + DPOK": [("text", 1.0), ("dpok", 1.0)]},
            _PHRASES,
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
