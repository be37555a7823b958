"""Whether a pipeline can draw as configured: sizes, prompt lengths, skipped layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from texforce_ray.errors import ConfigError

if TYPE_CHECKING:
    from texforce_ray.model.backbone import Backbone


def check_drawing(backbone: Backbone) -> None:
    """Refuse what a pipeline cannot draw.

    Raises:
        ConfigError: names the option, its value and what would be right.
    """
    d, scale = backbone.drawing, backbone.pipe.vae_scale_factor * backbone.latent_multiple
    for name in ("height", "width"):
        if (value := getattr(d, name)) is not None and value % scale:
            raise ConfigError(
                f"diffusion.{name}: {value} is not a multiple of {scale}, the size of a "
                f"{'latent' if backbone.latent_multiple == 1 else 'patch of the denoiser'}"
            )
    if d.max_sequence_length is not None and d.max_sequence_length > backbone.longest:
        raise ConfigError(
            f"diffusion.max_sequence_length: {d.max_sequence_length}; a {backbone.family.pipeline} "
            f"takes at most {backbone.longest}"
        )
    if d.park_encoders and not backbone.parks:
        raise ConfigError(
            f"model.park_encoders: a {backbone.family.pipeline} has text encoders too small to be "
            "worth it; leave it false"
        )
    if d.max_sequence_length is not None and not backbone.family.lengths:
        raise ConfigError(
            f"diffusion.max_sequence_length: {d.max_sequence_length}, but the text encoders of "
            f"a {backbone.family.pipeline} have a length of their own; leave it null"
        )
    for name in set(backbone.ignored) & {k for k, v in vars(d).items() if v is not None}:
        raise ConfigError(
            f"diffusion.{name}: has no effect on a {backbone.family.pipeline}; leave it null"
        )
    named = zip(backbone.family.encoders.values(), backbone.text_encoders, strict=True)
    clip = [e.config.num_hidden_layers for kind, e in named if kind.startswith("CLIP")]
    if d.clip_skip is None or not clip:
        return
    layers = min(clip)
    most = layers - 1 - (len(backbone.text_encoders) > 1)  # SDXL skips one anyway
    if d.clip_skip > most:
        raise ConfigError(
            f"diffusion.clip_skip: {d.clip_skip} leaves no layer of a text encoder that "
            f"has {layers}; use at most {most}"
        )
