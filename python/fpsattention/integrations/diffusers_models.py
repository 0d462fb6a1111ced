"""Attention processors for the video transformers of diffusers: one class per model holds all that is special to it.

A processor takes the place of the host's in self-attention layers. It projects, normalises and rotates Q, K and V as
the host's does and hands them to `fpsattention.attention`; steps that are to stay dense go to the host's own processor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    MochiTransformer3DModel,
    WanTransformer3DModel,
)
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0, MochiAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers import transformer_ltx
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..core.api import attention
from ..core.checks import Triple
from ..core.config import AttentionConfig
from ..core.prologue import norm_rope_quantize
from ..parallel import ulysses_attention
from .fp8_linear import apply_all, has_hooks
from .hosts import host_class
from .scope import Scope
from .windowed import attention_in_windows, in_windows

TRAIN_TIMESTEPS = 1000  # num_train_timesteps of all these models' schedulers


@dataclass(frozen=True)
class Forward:
    """What the self-attention layers run in one forward of a transformer.

    Attributes:
        extent: an empty tensor [T, H, W, 0], the token grid by its shape: torch.compile takes the sizes of a tensor for
            symbols, and numbers for constants.
        parts: the configs to run, each with the samples it is for (int64; None: all). None: the host's own attention.
        order: int64 [B], where each sample is in the parts put one after the other; None with a single part.
        windows: of a `WindowTable`, those of all layers, int64 [layers, H, 3] on the CPU; else None.
        text_valid: int32 [B], real text tokens of each sample, in a model that takes padded text; else None.
        group: the processes that hold a share of the tokens each (`fpsattention.parallel.ulysses_attention`); None:
            this one holds all.
    """

    extent: Tensor
    parts: tuple[tuple[AttentionConfig, Tensor | None], ...] | None
    order: Tensor | None = None
    windows: Tensor | None = None
    text_valid: Tensor | None = None
    group: ProcessGroup | None = None

    @property
    def grid(self) -> Triple:
        """Tokens (T, H, W)."""
        return tuple(self.extent.shape[:3])


class Processor:
    """Base of the processors. A subclass says for its model:

    stock: the host's processor class whose place it takes.
    layers: the self-attention modules of a transformer, in the order they run in.
    grid: tokens (T, H, W), from the transformer's configuration and the arguments of its forward.
    symbolic_dims: the dimensions of the forward's hidden_states that the grid depends on; none where the host makes
        constants of them, so that torch.compile has a graph for each size.
    text_valid: see `Forward`, from the same arguments.
    sigma: the noise level, 1 at pure noise, of a timestep that the transformer's forward gets.
    unknown: arguments of `__call__` that the model's self-attention layers are never given.
    self_attention: what a layer returns, from the arguments of `__call__`.
    context_parallel: whether the host can split the tokens of its self-attention among processes.
    """

    stock: type
    symbolic_dims: tuple[int, ...] = (2, 3, 4)  # [B, C, T, H, W]
    unknown: tuple[str, ...] = ()
    context_parallel = False

    def __init__(self, replaced, scope: Scope, layer: int, backend: str):
        self.replaced = replaced
        self.scope = scope
        self.layer = torch.tensor(layer, device="cpu")  # a number would be a constant to torch.compile
        self.backend = backend

    # The host passes on by keyword only what the signature names.
    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
    ) -> Tensor | tuple[Tensor, Tensor]:
        if self.scope.current().parts is None:
            return self.replaced(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        given = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": attention_mask}
        for name in self.unknown:
            if given[name] is not None:
                raise ValueError(
                    f"{name}: was given to a self-attention layer, where FPSAttention has no place for it"
                )
        return self.self_attention(attn, hidden_states, encoder_hidden_states, image_rotary_emb)

    @property
    def _attention_backend(self):
        """The host's choice of attention kernel (`set_attention_backend`) holds for the dense steps."""
        return self.replaced._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, value):
        self.replaced._attention_backend = value

    @property
    def _parallel_config(self):
        """The host's splitting of tokens among processes (`enable_parallelism`) holds for the dense steps too."""
        return self.replaced._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, value):
        self.replaced._parallel_config = value

    @staticmethod
    def text_valid(inputs: dict) -> Tensor | None:
        return None

    @staticmethod
    def sigma(timestep: Tensor) -> Tensor:
        return timestep / TRAIN_TIMESTEPS

    def fuses(self, norms: Sequence[nn.Module], *qkv: Tensor) -> bool:
        """Whether `attend` can take projections that are not normalised and turned yet, with a prologue in place of the
        norms.
        """
        forward = self.scope.current()
        if forward.group is not None or qkv[0].shape[1] != math.prod(forward.grid):
            return False
        if forward.windows is not None and torch.compiler.is_compiling():
            return False
        if torch.is_autocast_enabled(qkv[0].device.type):
            return False
        weights = [norm.weight for norm in norms]
        if torch.is_grad_enabled() and any(x.requires_grad for x in (*qkv, *weights)):
            return False
        if any(map(has_hooks, norms)):
            return False
        return all(config.quant == "fp8" and not config.smooth_k for config, _ in forward.parts)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        prefix_len: int = 0,
        suffix_len: int = 0,
        prologue: dict | None = None,
    ) -> Tensor:
        """q, k, v: [B, L, H, D], text before or after the video's tokens, or this process's share of them all. Returns
        [B, L, H * D].

        prologue: norm and rotary embedding still to be applied, as `norm_rope_quantize` takes them.
        """
        forward = self.scope.current()
        alone = forward.group is None
        if alone and q.shape[1] != prefix_len + math.prod(forward.grid) + suffix_len:
            raise RuntimeError(
                f"the transformer's input has the token grid {forward.grid}, but a layer got {q.shape[1]} tokens, of "
                f"which {prefix_len + suffix_len} are text; FPSAttention cannot tell where the others are in the video"
            )
        kwargs = {"grid": forward.grid, "backend": self.backend}
        if not alone:
            kwargs["group"] = forward.group
        if prefix_len or suffix_len:
            kwargs |= {"prefix_len": prefix_len, "suffix_len": suffix_len}
        outs = []
        for config, rows in forward.parts:
            # The host may move its inputs to another device after the hook has seen them.
            rows = None if rows is None else rows.to(q.device)
            part = (q, k, v) if rows is None else [x[rows] for x in (q, k, v)]
            if forward.text_valid is not None:
                valid = forward.text_valid.to(q.device)
                kwargs["suffix_valid"] = valid if rows is None else valid[rows]
            run = attention if alone else ulysses_attention
            if forward.windows is not None and torch.compiler.is_compiling():
                if not alone:
                    raise RuntimeError(
                        "a WindowTable under both torch.compile and context parallelism: switch one of the two off, or "
                        "give a StepSchedule"
                    )
                run = partial(attention_in_windows, windows=forward.windows, layer=self.layer)
            elif forward.windows is not None:
                config = in_windows(config, forward.windows, self.layer)
            if prologue is not None:
                part = (norm_rope_quantize(*part, config=config, **kwargs, **prologue),)
            outs.append(run(*part, config=config, **kwargs))
        out = outs[0] if len(outs) == 1 else torch.cat(outs)[forward.order.to(q.device)]
        return out.flatten(2)


class Wan(Processor):
    """Wan2.1 and 2.2, text or image to video; text is attended elsewhere."""

    stock = WanAttnProcessor
    unknown = ("encoder_hidden_states", "attention_mask")
    context_parallel = True

    @staticmethod
    def layers(transformer: WanTransformer3DModel) -> list[nn.Module]:
        return [block.attn1 for block in transformer.blocks]

    @staticmethod
    def grid(config, inputs: dict) -> Triple:
        return _patches(inputs["hidden_states"].shape[2:], config.patch_size)

    def self_attention(self, attn, hidden_states, encoder_hidden_states, image_rotary_emb) -> Tensor:
        if attn.fused_projections:
            q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            q, k, v = apply_all(hidden_states, attn.to_q, attn.to_k, attn.to_v)
        # The host stores each angle's cosine and sine twice, for both channels of a pair.
        cos, sin = image_rotary_emb[0][..., 0::2], image_rotary_emb[1][..., 1::2]
        if self.fuses((attn.norm_q, attn.norm_k), q, k, v):
            norms = {"q_weight": attn.norm_q.weight, "k_weight": attn.norm_k.weight, "eps": attn.norm_q.eps}
            rope = _axis_tables(cos, sin, self.scope.current().grid)
            out = self.attend(*_split_heads(attn, q, k, v), prologue={**norms, "rope": rope})
        else:
            q, k, v = _split_heads(attn, attn.norm_q(q), attn.norm_k(k), v)
            out = self.attend(_rotate(q, cos, sin), _rotate(k, cos, sin), v)
        return _project_out(attn, out)


class LTXVideo(Processor):
    """LTX-Video, text or image to video; text is attended elsewhere. Its forward gets the tokens already packed."""

    stock = transformer_ltx.LTXVideoAttnProcessor
    symbolic_dims = ()  # the grid comes as numbers
    unknown = ("encoder_hidden_states", "attention_mask")
    context_parallel = True

    @staticmethod
    def layers(transformer: LTXVideoTransformer3DModel) -> list[nn.Module]:
        return [block.attn1 for block in transformer.transformer_blocks]

    @staticmethod
    def grid(config, inputs: dict) -> Triple:
        grid = tuple(inputs.get(name) for name in ("num_frames", "height", "width"))
        if None in grid:
            raise ValueError(
                f"num_frames, height, width: {grid} must all be given to LTXVideoTransformer3DModel; without them its "
                f"packed tokens have no grid (LTXConditionPipeline gives coordinates instead and is not supported)"
            )
        return grid

    def self_attention(self, attn, hidden_states, encoder_hidden_states, image_rotary_emb) -> Tensor:
        q, k, v = apply_all(hidden_states, attn.to_q, attn.to_k, attn.to_v)
        q = transformer_ltx.apply_rotary_emb(attn.norm_q(q), image_rotary_emb)
        k = transformer_ltx.apply_rotary_emb(attn.norm_k(k), image_rotary_emb)
        return _project_out(attn, self.attend(*_split_heads(attn, q, k, v)))


class CogVideoX(Processor):
    """CogVideoX 1.0 and 1.5, text or image to video: text first, none of it padding to the host."""

    stock = CogVideoXAttnProcessor2_0
    symbolic_dims = (1, 3, 4)  # [B, T, C, H, W]
    unknown = ("attention_mask",)

    @staticmethod
    def layers(transformer: CogVideoXTransformer3DModel) -> list[nn.Module]:
        return [block.attn1 for block in transformer.transformer_blocks]

    @staticmethod
    def grid(config, inputs: dict) -> Triple:
        frames, _, height, width = inputs["hidden_states"].shape[1:]
        p = config.patch_size
        return _patches((frames, height, width), (config.patch_size_t or 1, p, p))

    def self_attention(
        self, attn, hidden_states, encoder_hidden_states, image_rotary_emb
    ) -> tuple[Tensor, Tensor]:
        n_text = encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        q, k, v = _video_qkv(attn, x)
        if image_rotary_emb is not None:  # the 2B model has learnt positions instead
            rotate = partial(apply_rotary_emb, freqs_cis=image_rotary_emb, sequence_dim=1)
            q, k = (torch.cat([x[:, :n_text], rotate(x[:, n_text:])], dim=1) for x in (q, k))
        out = _project_out(attn, self.attend(q, k, v, prefix_len=n_text))
        return out[:, n_text:], out[:, :n_text]


class HunyuanVideo(Processor):
    """HunyuanVideo, text or image to video: text last, padded. Dual-stream blocks come before single-stream ones."""

    stock = HunyuanVideoAttnProcessor2_0

    @staticmethod
    def layers(transformer: HunyuanVideoTransformer3DModel) -> list[nn.Module]:
        return [x.attn for x in (*transformer.transformer_blocks, *transformer.single_transformer_blocks)]

    @staticmethod
    def grid(config, inputs: dict) -> Triple:
        p = config.patch_size
        return _patches(inputs["hidden_states"].shape[2:], (config.patch_size_t, p, p))

    @staticmethod
    def text_valid(inputs: dict) -> Tensor:
        # As the host reads its mask: so many tokens from the start, wherever the ones are.
        return inputs["encoder_attention_mask"].sum(1, dtype=torch.int32)

    def self_attention(
        self, attn, hidden_states, encoder_hidden_states, image_rotary_emb
    ) -> tuple[Tensor, Tensor]:
        n_video, n_text = hidden_states.shape[1], encoder_hidden_states.shape[1]
        rotate = partial(apply_rotary_emb, freqs_cis=image_rotary_emb, sequence_dim=1)
        if attn.add_q_proj is None:  # a single-stream block
            x = torch.cat([hidden_states, encoder_hidden_states], dim=1)
            q, k, v = _video_qkv(attn, x)
            q, k = (torch.cat([rotate(x[:, :n_video]), x[:, n_video:]], dim=1) for x in (q, k))
        else:
            x = hidden_states
            q, k, v = _video_qkv(attn, x)
            text = _text_qkv(attn, encoder_hidden_states)
            q, k, v = (torch.cat(pair, dim=1) for pair in zip((rotate(q), rotate(k), v), text, strict=True))
        out = self.attend(q, k, v, suffix_len=n_text)
        video, text = out[:, :n_video], out[:, n_video:]
        if attn.to_out is not None:
            video = _project_out(attn, video)
        if attn.to_add_out is not None:
            text = attn.to_add_out(text)
        return video, text


class Mochi(Processor):
    """Mochi 1: text last, padded. Its time runs from 0 (noise) to 1000 (clean)."""

    stock = MochiAttnProcessor2_0
    symbolic_dims = ()  # its positions come from torch.linspace

    @staticmethod
    def layers(transformer: MochiTransformer3DModel) -> list[nn.Module]:
        return [block.attn1 for block in transformer.transformer_blocks]

    @staticmethod
    def grid(config, inputs: dict) -> Triple:
        return _patches(inputs["hidden_states"].shape[2:], (1, config.patch_size, config.patch_size))

    @staticmethod
    def text_valid(inputs: dict) -> Tensor:
        mask = inputs["encoder_attention_mask"].bool()
        if (mask[:, 1:] & ~mask[:, :-1]).any():
            raise ValueError(
                "encoder_attention_mask: has a real token after padding; real tokens must come first, as tokenizers "
                "put them with padding_side='right'"
            )
        return mask.sum(1, dtype=torch.int32)

    @staticmethod
    def sigma(timestep: Tensor) -> Tensor:
        return 1 - timestep / TRAIN_TIMESTEPS

    def self_attention(
        self, attn, hidden_states, encoder_hidden_states, image_rotary_emb
    ) -> tuple[Tensor, Tensor]:
        x, n_video = hidden_states, hidden_states.shape[1]
        q, k, v = _video_qkv(attn, x)
        q, k = _rotate(q, *image_rotary_emb), _rotate(k, *image_rotary_emb)
        text = _text_qkv(attn, encoder_hidden_states)
        q, k, v = (torch.cat(pair, dim=1) for pair in zip((q, k, v), text, strict=True))
        out = self.attend(q, k, v, suffix_len=encoder_hidden_states.shape[1])
        video, text = _project_out(attn, out[:, :n_video]), out[:, n_video:]
        if not attn.context_pre_only:
            text = attn.to_add_out(text)
        return video, text


MODELS: dict[type, type[Processor]] = {
    CogVideoXTransformer3DModel: CogVideoX,
    HunyuanVideoTransformer3DModel: HunyuanVideo,
    LTXVideoTransformer3DModel: LTXVideo,
    MochiTransformer3DModel: Mochi,
    WanTransformer3DModel: Wan,
}


def model_of(transformer: nn.Module) -> type[Processor] | None:
    """The processor of a transformer; None: it is of none of the models."""
    return MODELS.get(host_class(transformer))


def _patches(size: Sequence[int], patch: Sequence[int]) -> Triple:
    """Tokens (T, H, W) of a latent (T, H, W) cut in patches; a rest is cut off, as the hosts' convolutions do."""
    return tuple(n // p for n, p in zip(size, patch, strict=True))


def _split_heads(attn, *xs: Tensor) -> list[Tensor]:
    return [x.unflatten(2, (attn.heads, -1)) for x in xs]


def _video_qkv(attn, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K, V of the video's tokens, and of text that shares their weights, normalised, [B, L, H, D]."""
    q, k, v = _split_heads(attn, *apply_all(x, attn.to_q, attn.to_k, attn.to_v))
    return q if attn.norm_q is None else attn.norm_q(q), k if attn.norm_k is None else attn.norm_k(k), v


def _text_qkv(attn, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K, V of text tokens that have weights of their own, [B, L, H, D]."""
    q, k, v = _split_heads(attn, *apply_all(x, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
    q = q if attn.norm_added_q is None else attn.norm_added_q(q)
    return q, k if attn.norm_added_k is None else attn.norm_added_k(k), v


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel pairs (2i, 2i + 1) of x [B, L, H, D]; cos and sin broadcast to [B, L, H, D / 2]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


def _axis_tables(cos: Tensor, sin: Tensor, grid: Triple) -> list[Tensor]:
    """Wan's angles, [1, L, 1, D / 2] each, by axis as `norm_rope_quantize` takes them: of D channels, 2 * (D // 6) are
    turned by h, as many by w, the others by t.
    """
    pairs = cos.shape[3]
    of_hw = 2 * pairs // 6

    def by_axis(x: Tensor) -> list[Tensor]:
        t, h, w = x.view(*grid, pairs).split([pairs - 2 * of_hw, of_hw, of_hw], dim=3)
        return [t[:, 0, 0], h[0, :, 0], w[0, 0]]

    return [torch.stack(pair, dim=-1) for pair in zip(by_axis(cos), by_axis(sin), strict=True)]


def _project_out(attn, x: Tensor) -> Tensor:
    linear, dropout = attn.to_out
    return dropout(linear(x))
