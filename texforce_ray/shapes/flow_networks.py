"""The embedded flow pipeline's architecture: small networks of Stable Diffusion 3's classes.

Three text encoders as there: two of CLIP's kind, of which the first has the weights of the DDIM
pipeline's encoder, and one of T5's.
"""

from __future__ import annotations

import string
from typing import TYPE_CHECKING

from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from texforce_ray.shapes import scene
from texforce_ray.shapes.tokenizer import MAX_LENGTH

if TYPE_CHECKING:
    from transformers import CLIPTokenizer, T5Tokenizer

T5_LENGTH = 20  # tokens: the longest caption has 17 words
_FIRST, _SECOND = 96, 64  # widths of the two CLIP encoders


def build_clip(tokenizer: CLIPTokenizer, *, second: bool) -> CLIPTextModelWithProjection:
    """The first CLIP text encoder, three layers like the DDIM pipeline's, or the second, two."""
    width = _SECOND if second else _FIRST
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=2 if second else 3,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """A two-layer, 160-wide T5 encoder: as wide as the two CLIP encoders together."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=_FIRST + _SECOND,
            d_kv=32,
            d_ff=320,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


def build_t5_tokenizer(words: list[str]) -> T5Tokenizer:
    """A T5 tokenizer in which each of `words` is one piece; other ASCII text is single letters."""
    from transformers import T5Tokenizer

    letters = [*string.ascii_letters, *string.digits, *string.punctuation]
    pieces = {f"▁{word}": -1.0 for word in sorted(set(words))}
    rare = {piece: -10.0 for piece in ("▁", *letters) if piece not in pieces}
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    return T5Tokenizer(
        vocab=[*special, *pieces.items(), *rare.items()],
        extra_ids=0,
        model_max_length=T5_LENGTH,
    )


def build_transformer() -> SD3Transformer2DModel:
    """A 3.5 M parameter MM-DiT with query and key normalisation, as in Stable Diffusion 3.5."""
    side = scene.IMAGE_SIZE // 8
    return SD3Transformer2DModel(
        sample_size=side,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        num_attention_heads=2,
        attention_head_dim=64,
        joint_attention_dim=_FIRST + _SECOND,
        caption_projection_dim=128,
        pooled_projection_dim=_FIRST + _SECOND,
        pos_embed_max_size=side // 2,
        qk_norm="rms_norm",
    )


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Half as much shift towards noise as Stable Diffusion 3.5, whose images are larger."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.5)
