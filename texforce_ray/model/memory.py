"""GPU memory that each role needs, from shapes alone: modules on torch's meta device, no weights.

The real backbone, adapter and passes run on meta tensors; bytes of tensors are counted as they come
and go. Attention is counted as a fused kernel, as on a GPU: it keeps its inputs, its output and one
float32 for each query and head. Not counted: what kernels need inside (cuDNN's workspace), the
allocator's fragments, CUDA's context (about 0.5 GiB), stored latents and, in half precision, the
learner's first check in float32, which is left out where it does not fit. Prompts are as long as
their encoder allows.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from texforce_ray.errors import ConfigError
from texforce_ray.model.adapter import Adapter
from texforce_ray.model.conditioning import Conditioning, Drawing, Prepared
from texforce_ray.model.published import META, Blueprint, adapter_shapes, build

_ADAM = 4  # an adapter, its gradient and AdamW's two moments, all float32
_OPTIONS = {
    "model.path": "--model",
    "diffusion.height": "--height",
    "diffusion.width": "--width",
    "diffusion.guidance_scale": "--guidance",
    "diffusion.max_sequence_length": "--max-sequence-length",
    "lora.": "--train: ",
}


@dataclass(frozen=True)
class Workload:
    """What the roles do at once; the options of the command.

    train: parts with an adapter, 'denoiser' for the denoiser; empty: all encoders of CLIP's kind,
    or the first encoder where there are none. rank: of all adapters; None: each one's default.
    height, width: pixels; None: the model's. batch_size: images that are sampled together.
    decode_batch_size: latents that are decoded together. microbatch_size: pairs in one pass of the
    learner. prompts: distinct ones that are encoded together. guidance: None: the blueprint's; of
    families that need two passes for it, rollout and learner make two, as PPO does.
    """

    dtype: str = "bfloat16"
    train: Sequence[str] = ()
    rank: int | None = None
    height: int | None = None
    width: int | None = None
    batch_size: int = 8
    decode_batch_size: int = 8
    microbatch_size: int = 8
    prompts: int = 8
    guidance: float | None = None
    max_sequence_length: int | None = None
    park_encoders: bool = False


@dataclass(frozen=True)
class Memory:
    """GPU memory of one role, in bytes.

    weights: frozen ones on the GPU, by part. adapter: with all that is kept for each of its
    numbers. activations: by kind. together: whether all of them exist at the same time; if not,
    only the largest counts.
    """

    role: str
    weights: Mapping[str, int]
    adapter: int
    activations: Mapping[str, int]
    together: bool

    @property
    def total(self) -> int:
        combine = sum if self.together else max
        return sum(self.weights.values()) + self.adapter + combine(self.activations.values())


# ---- counting -----------------------------------------------------------------------------------


class Ledger:
    """Bytes of storages while they live: each counts once, parameters and buffers do not.

    now, peak: their sum, and the largest that it has been.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.now = self.peak = 0
        self._known: dict[int, Any] = {
            tensor.untyped_storage()._cdata: None
            for module in modules
            for tensor in (*module.parameters(), *module.buffers())
        }

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known[key] = weakref.ref(storage, lambda _: self._remove(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _remove(self, key: int, size: int) -> None:
        del self._known[key]
        self.now -= size


class LiveBytes(TorchDispatchMode):
    """Enters all tensors that are made on a device, in this context, into a ledger.

    On meta, tensors have no values: of a boolean index all elements are taken, and a boolean that
    Python reads is false.
    """

    def __init__(self, ledger: Ledger, device: torch.device = META) -> None:
        super().__init__()
        self.ledger, self.device = ledger, device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        out = _run(func, args, kwargs or {})
        for tensor in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device.type:
                self.ledger.add(tensor)
        return out


class SavedBytes(saved_tensors_hooks):
    """Enters all tensors that autograd keeps for the backward pass of its context into a ledger.

    Under gradient checkpointing, only what the checkpoints keep.
    """

    def __init__(self, ledger: Ledger) -> None:
        def pack(tensor: Tensor) -> Tensor:
            ledger.add(tensor)
            return tensor

        super().__init__(pack, lambda tensor: tensor)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    aten = torch.ops.aten
    if func is aten._local_scalar_dense.default and args[0].is_meta:
        return False
    if func is aten.index.Tensor and args[0].is_meta:
        return func(args[0], [_all_of(index) for index in args[1]])
    return func(*args, **kwargs)


def _all_of(index: Tensor | None) -> Tensor | None:
    if index is None or index.dtype != torch.bool:
        return index
    return torch.empty(index.numel(), dtype=torch.long, device=index.device)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Temporarily, attention on meta is one kernel, as on a GPU; torch would spell it out there.

    The CPU's kernel has the tensors of CUDA's flash attention.
    """
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("scaled_dot_product_attention", _fused, "AutogradMeta")
        yield


def _fused(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    del enable_gqa
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]


# ---- the roles ----------------------------------------------------------------------------------


def measure(blueprint: Blueprint, load: Workload) -> list[Memory]:
    """Of a rollout actor, a learner, and a learner with gradient checkpointing.

    Raises:
        ConfigError: an option does not fit the model; names it.
    """
    try:
        with fused_attention():
            return _Meter(blueprint, load).roles()
    except ConfigError as error:
        text = str(error).replace("leave it null", "leave it out")
        for key, option in _OPTIONS.items():
            text = text.replace(key, option, 1) if text.startswith(key) else text
        raise ConfigError(text) from error


class _Meter:
    """Runs the roles' passes on meta. Their terms are those of `Memory`."""

    def __init__(self, blueprint: Blueprint, load: Workload) -> None:
        self.load, family = load, blueprint.family
        shapes = adapter_shapes(family, load.train, load.rank)
        drawing = Drawing(
            load.height,
            load.width,
            max_sequence_length=load.max_sequence_length,
            cached_prompts=0,
        )
        self.backbone = backbone = build(blueprint, load.dtype, drawing)
        self.guidance = blueprint.guidance if load.guidance is None else load.guidance
        self.passes = backbone.passes(self.guidance)
        weights = {name: _bytes_of(getattr(backbone.pipe, name)) for name in family.models}
        self.adapter = Adapter(backbone, shapes, seed=0)
        frozen = [name for name in family.encoders if name not in shapes]
        parked = {name: weights.pop(name) for name in frozen if load.park_encoders}
        self.weights, self.visit = weights, max(parked.values(), default=0)
        self.modules = [getattr(backbone.pipe, name) for name in family.models]

    def roles(self) -> list[Memory]:
        own = sum(parameter.nbytes for parameter in self.adapter.parameters())
        learners = zip(("learner", "learner, gradient checkpointing"), self._updates(), strict=True)
        return [
            Memory("rollout", self.weights, own, self._rollout(), together=False),
            *(Memory(role, self.weights, _ADAM * own, found, True) for role, found in learners),
        ]

    @torch.no_grad()
    def _rollout(self) -> dict[str, int]:
        """The largest sum of live tensors in each phase of sampling."""
        load, backbone = self.load, self.backbone
        encoding, denoising, decoding = (Ledger(self.modules) for _ in range(3))
        with LiveBytes(encoding):
            prepared = backbone.prepare(self._encode())
        with LiveBytes(denoising):
            self._predict(prepared.map(torch.clone), load.batch_size)
        with LiveBytes(decoding):
            latents = torch.zeros(load.decode_batch_size, *backbone.latent_shape, device=META)
            backbone.decode_pixels(latents).mul(255).round().to(torch.uint8)
        return {
            "encoding": encoding.peak + self.visit,
            "denoising": denoising.peak,
            "decoding": decoding.peak,
        }

    @torch.enable_grad()
    def _updates(self) -> list[dict[str, int]]:
        """What a microbatch's backward pass needs, and all else; without checkpointing, and with.

        As in `rl.through_encoder`: the encoders' graph waits while the denoiser's pass is made.
        """
        live, encoders = Ledger(self.modules), Ledger(self.modules)
        kept, peaks = [], []
        with LiveBytes(live):
            with SavedBytes(encoders):
                prepared = self.backbone.prepare(self._encode())
            graph, before = encoders.now, live.peak + self.visit
            for _ in range(2):
                live.peak = live.now
                leaf = prepared.map(lambda t: t.detach().float().requires_grad_(t.requires_grad))
                kept.append(self._pass(leaf))
                peaks.append(live.peak)
                self.backbone.denoiser.enable_gradient_checkpointing()
            live.peak = live.now
            self._through(prepared, leaf)
        return [
            {
                "encoders' graph": graph,
                "denoiser's graph": own,
                "rest at the peak": max(before, peak, live.peak) - graph - own,
            }
            for own, peak in zip(kept, peaks, strict=True)
        ]

    def _pass(self, leaf: Prepared) -> int:
        """A microbatch's pass forward and backward; returns the bytes that the former kept."""
        kept = Ledger(self.modules)
        with SavedBytes(kept):
            output = self._predict(leaf, self.load.microbatch_size)
        graph = kept.now
        output.float().sum().backward()
        for parameter in self.adapter.parameters():
            parameter.grad = None
        return graph

    def _through(self, prepared: Prepared, leaf: Prepared) -> None:
        """Carry the gradient of the embeddings into the encoders' adapters."""
        pairs = zip(prepared.tensors(), leaf.tensors(), strict=True)
        through = [(out, cut.grad.to(out.dtype)) for out, cut in pairs if cut.grad is not None]
        if through:
            outputs, gradients = zip(*through, strict=True)
            parameters = self.adapter.parameters()
            torch.autograd.grad(outputs, parameters, gradients, allow_unused=True)

    def _encode(self) -> Conditioning:
        """The distinct prompts, and the empty one for guidance."""
        backbone, lengths = self.backbone, self.backbone.family.lengths
        count = self.load.prompts + (self.passes > 1)
        ids = []
        for name, encoder in zip(backbone.family.encoders, backbone.text_encoders, strict=True):
            if name in lengths:
                length = self.load.max_sequence_length or lengths[name]
            else:
                length = encoder.config.max_position_embeddings
            ids.append(torch.zeros(count, length, dtype=torch.long, device=META))
        return backbone.with_guidance(backbone.encode(ids), self.guidance)

    def _predict(self, prepared: Prepared, count: int) -> Tensor:
        """The denoiser's output for `count` latents in turn of each prompt."""
        rows = np.arange(count) % self.load.prompts
        if self.passes > 1:
            rows = np.concatenate([np.zeros_like(rows), rows + 1])
        x = torch.zeros(len(rows), *self.backbone.latent_shape, device=META)
        timesteps = torch.zeros(len(rows), device=META)
        return self.backbone.predict_prepared(x, timesteps, prepared, rows)


def _bytes_of(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
