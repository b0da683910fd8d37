"""Public models of diffusers and transformers, unmodified, at small configurations with random weights.

`MODELS` has them all by name: each is a function that returns (model, args, kwargs). Sizes are odd where a model
allows it, so that shards are uneven, and sequences are long beside the hidden sizes, as in practice. Dropout is off.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn, randn, tensor

Factory = Callable[..., tuple[nn.Module, tuple, dict[str, Any]]]
MODELS: dict[str, Factory] = {}


def public(factory: Factory) -> Factory:
    """Enters a factory into `MODELS`; weights and inputs come from its `seed`."""

    @functools.wraps(factory)
    def build(*args: Any, seed: int = 0, **kwargs: Any) -> tuple:
        torch.manual_seed(seed)
        return factory(*args, **kwargs)

    MODELS[factory.__name__] = build
    return build


def diffusers_model(name: str, **config: Any) -> nn.Module:
    return getattr(importlib.import_module("diffusers"), name)(**config)


def transformers_model(name: str, **config: Any) -> nn.Module:
    """`name`: a class of transformers, or of one of its modules (`models.clip.modeling_clip.CLIPModel`)."""
    path, _, name = name.rpartition(".")
    cls = getattr(importlib.import_module(f"transformers.{path}".rstrip(".")), name)
    made = cls.config_class(**config)
    _no_randomness(made)
    return cls(made)


def _no_randomness(config: Any) -> None:
    for name, value in vars(config).items():
        if hasattr(value, "to_diff_dict"):  # the config of a part
            _no_randomness(value)
        elif isinstance(value, float) and ("drop" in name or name.startswith("mask_")):
            setattr(config, name, 0.0)
    config.use_cache = False


def ids(batch: int, length: int, vocabulary: int = 40) -> torch.Tensor:
    return torch.randint(0, vocabulary, (batch, length))


def places(height: int, width: int) -> torch.Tensor:
    """[height * width, 3]: 0, row and column of every image token."""
    return torch.cartesian_prod(torch.zeros(1), torch.arange(float(height)), torch.arange(float(width)))


PLAIN = {"return_dict": False}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


# diffusers: video, image and audio transformers


@public
def latte(batch: int = 1, frames: int = 4, size: int = 8, layers: int = 1):
    """`diffusers.LatteTransformer3DModel`: spatial and temporal blocks in turn, adaLN, cross-attention to text."""
    model = diffusers_model(
        "LatteTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        cross_attention_dim=16,
        sample_size=size,
        patch_size=2,
        caption_channels=12,
        video_length=frames,
        norm_type="ada_norm_single",
        num_embeds_ada_norm=1000,
        norm_elementwise_affine=False,
        attention_bias=True,
        activation_fn="gelu-approximate",
    )
    video = torch.randn(batch, 4, frames, size, size)
    text = torch.randn(batch, 7, 12)
    timestep = torch.arange(batch) + 3
    return model, (video,), {"timestep": timestep, "encoder_hidden_states": text, "return_dict": False}


MODELS["latte"] = functools.partial(latte, frames=5, size=20)  # longer than its tests need


@public
def cogvideox():
    model = diffusers_model(
        "CogVideoXTransformer3DModel", num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4,
        time_embed_dim=8, text_embed_dim=12, num_layers=2, sample_width=14, sample_height=10, sample_frames=17,
        patch_size=2, max_text_seq_length=6,
    )
    return model, (randn(1, 5, 4, 10, 14), randn(1, 6, 12), tensor([3])), PLAIN


@public
def cogvideox_rope():
    model = diffusers_model(
        "CogVideoXTransformer3DModel", num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4,
        time_embed_dim=8, text_embed_dim=12, num_layers=2, sample_width=14, sample_height=10, sample_frames=17,
        patch_size=2, max_text_seq_length=6, use_rotary_positional_embeddings=True,
    )
    kwargs = {"image_rotary_emb": (randn(175, 8), randn(175, 8)), **PLAIN}
    return model, (randn(1, 5, 4, 10, 14), randn(1, 6, 12), tensor([3])), kwargs


@public
def ltx_video():
    model = diffusers_model(
        "LTXVideoTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16,
        cross_attention_dim=32, num_layers=2, caption_channels=12,
    )
    kwargs = {"encoder_attention_mask": torch.ones(1, 6), "num_frames": 5, "height": 7, "width": 9, **PLAIN}
    return model, (randn(1, 5 * 7 * 9, 4), randn(1, 6, 12), tensor([3.0])), kwargs


@public
def wan():
    model = diffusers_model(
        "WanTransformer3DModel", patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4,
        out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )
    return model, (randn(1, 4, 5, 10, 14), tensor([3]), randn(1, 6, 16)), PLAIN


@public
def mochi():
    model = diffusers_model(
        "MochiTransformer3DModel", patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        pooled_projection_dim=16, in_channels=4, text_embed_dim=16, time_embed_dim=4, activation_fn="swiglu",
        max_sequence_length=16,
    )
    return model, (randn(1, 4, 5, 10, 14), randn(1, 6, 16), tensor([3]), torch.ones(1, 6).bool()), PLAIN


@public
def hunyuan_video():
    model = diffusers_model(
        "HunyuanVideoTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10,
        num_layers=1, num_single_layers=1, num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=True,
        text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    )
    kwargs = {"guidance": tensor([4.0]), **PLAIN}
    return model, (randn(1, 4, 5, 10, 14), tensor([3]), randn(1, 6, 16), torch.ones(1, 6), randn(1, 8)), kwargs


@public
def allegro():
    model = diffusers_model(
        "AllegroTransformer3DModel", num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        num_layers=2, cross_attention_dim=24, sample_width=14, sample_height=10, sample_frames=5, caption_channels=12,
    )
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    *freqs, t, h, w = get_3d_rotary_pos_embed_allegro(
        embed_dim=12, crops_coords=((0, 0), (5, 7)), grid_size=(5, 7), temporal_size=5,
    )
    grid = torch.cartesian_prod(*(torch.as_tensor(p, dtype=torch.long) for p in (t, h, w))).T
    rope = (tuple(freqs), tuple(p[None] for p in grid))
    kwargs = {
        "attention_mask": torch.ones(1, 5, 10, 14), "encoder_attention_mask": torch.ones(1, 6),
        "image_rotary_emb": rope, **PLAIN,
    }
    return model, (randn(1, 4, 5, 10, 14), randn(1, 6, 12), tensor([3])), kwargs


@public
def consisid():
    model = diffusers_model(
        "ConsisIDTransformer3DModel", num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4,
        time_embed_dim=8, text_embed_dim=8, num_layers=2, sample_width=14, sample_height=10, sample_frames=17,
        patch_size=2, max_text_seq_length=6, cross_attn_interval=1, is_kps=False, is_train_face=True,
        cross_attn_dim_head=1, cross_attn_num_heads=1, LFE_id_dim=2, LFE_vit_dim=2, LFE_depth=5, LFE_dim_head=8,
        LFE_num_heads=2, LFE_num_id_token=1, LFE_num_querie=1, LFE_output_dim=10, LFE_ff_mult=1, LFE_num_scale=1,
    )
    kwargs = {"id_vit_hidden": [torch.ones(1, 2, 2)], "id_cond": torch.ones(1, 2), **PLAIN}
    return model, (randn(1, 5, 4, 10, 14), randn(1, 6, 8), tensor([3])), kwargs


@public
def skyreels_v2():
    model = diffusers_model(
        "SkyReelsV2Transformer3DModel", patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12,
        in_channels=4, out_channels=4, text_dim=16, freq_dim=256, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )
    return model, (randn(1, 4, 5, 10, 14), tensor([3]), randn(1, 6, 16)), PLAIN


@public
def cosmos():
    model = diffusers_model(
        "CosmosTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12,
        num_layers=2, mlp_ratio=2, text_embed_dim=32, adaln_lora_dim=4, max_size=(8, 32, 32), patch_size=(1, 2, 2),
        rope_scale=(2.0, 1.0, 1.0), concat_padding_mask=False, extra_pos_embed_type="learnable",
    )
    kwargs = {"attention_mask": torch.ones(1, 6), "fps": 16, **PLAIN}
    return model, (randn(1, 4, 5, 10, 14), tensor([3]), randn(1, 6, 32)), kwargs


@public
def easyanimate():
    model = diffusers_model(
        "EasyAnimateTransformer3DModel", attention_head_dim=16, num_attention_heads=2, in_channels=4, mmdit_layers=2,
        num_layers=2, norm_elementwise_affine=True, out_channels=4, patch_size=2, sample_height=14, sample_width=10,
        text_embed_dim=16, time_embed_dim=8, time_position_encoding_type="3d_rope", timestep_activation_fn="silu",
    )
    return model, (randn(1, 4, 5, 10, 14), tensor([3])), {"encoder_hidden_states": randn(1, 6, 16), **PLAIN}


@public
def sana():
    model = diffusers_model(
        "SanaTransformer2DModel", patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
        caption_channels=8, sample_size=32,
    )
    return model, (randn(1, 4, 15, 13), randn(1, 6, 8), tensor([3])), PLAIN


@public
def sana_video():
    model = diffusers_model(
        "SanaVideoTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12,
        num_layers=2, num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24,
        caption_channels=16, mlp_ratio=2.5, sample_size=8, patch_size=(1, 2, 2), rope_max_seq_len=32,
    )
    return model, (randn(1, 4, 5, 10, 14), randn(1, 6, 16), tensor([3])), PLAIN


@public
def cogview3_plus():
    model = diffusers_model(
        "CogView3PlusTransformer2DModel", patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, out_channels=4, text_embed_dim=8, time_embed_dim=8, condition_dim=2,
        pos_embed_max_size=16, sample_size=16,
    )
    kwargs = {
        "original_size": tensor([[20, 20]]), "target_size": tensor([[20, 20]]), "crop_coords": tensor([[0, 0]]),
        **PLAIN,
    }
    return model, (randn(1, 4, 22, 18), randn(1, 6, 8), tensor([3])), kwargs


@public
def cogview4():
    model = diffusers_model(
        "CogView4Transformer2DModel", patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, out_channels=4, text_embed_dim=8, time_embed_dim=8, condition_dim=4,
    )
    kwargs = {
        "original_size": tensor([[20., 20]]), "target_size": tensor([[20., 20]]), "crop_coords": tensor([[0., 0]]),
        **PLAIN,
    }
    return model, (randn(1, 4, 22, 18), randn(1, 6, 8), tensor([3])), kwargs


@public
def dit():
    model = diffusers_model(
        "DiTTransformer2DModel", in_channels=4, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2,
        out_channels=8, attention_bias=True, sample_size=22, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero", norm_elementwise_affine=False,
    )
    return model, (randn(1, 4, 22, 22),), {"timestep": tensor([3]), "class_labels": tensor([1]), **PLAIN}


@public
def pixart():
    model = diffusers_model(
        "PixArtTransformer2DModel", sample_size=22, num_layers=2, patch_size=2, attention_head_dim=8,
        num_attention_heads=2, in_channels=4, cross_attention_dim=16, out_channels=8, attention_bias=True,
        use_additional_conditions=False, caption_channels=8,
    )
    kwargs = {
        "timestep": tensor([3]), "encoder_hidden_states": randn(1, 6, 8),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}, **PLAIN,
    }
    return model, (randn(1, 4, 22, 22),), kwargs


@public
def sd3():
    model = diffusers_model(
        "SD3Transformer2DModel", sample_size=32, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8,
        num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=16, pooled_projection_dim=24,
        out_channels=4, qk_norm="rms_norm", dual_attention_layers=(0,), pos_embed_max_size=24,
    )
    kwargs = {
        "encoder_hidden_states": randn(1, 7, 16), "pooled_projections": randn(1, 24), "timestep": tensor([3]), **PLAIN,
    }
    return model, (randn(1, 4, 22, 18),), kwargs


@public
def flux():
    model = diffusers_model(
        "FluxTransformer2DModel", patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=[4, 4, 8],
    )
    kwargs = {
        "encoder_hidden_states": randn(1, 7, 16), "pooled_projections": randn(1, 16), "timestep": tensor([1.0]),
        "img_ids": places(11, 9), "txt_ids": torch.zeros(7, 3), **PLAIN,
    }
    return model, (randn(1, 99, 4),), kwargs


@public
def chroma():
    model = diffusers_model(
        "ChromaTransformer2DModel", patch_size=1, in_channels=4, num_layers=1, num_single_layers=1,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=[4, 4, 8],
        approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1,
    )
    kwargs = {
        "encoder_hidden_states": randn(1, 7, 16), "timestep": tensor([1.0]), "img_ids": places(11, 9),
        "txt_ids": torch.zeros(7, 3), **PLAIN,
    }
    return model, (randn(1, 99, 4),), kwargs


@public
def hunyuan_dit():
    model = diffusers_model(
        "HunyuanDiT2DModel", sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3,
        in_channels=4, cross_attention_dim=8, cross_attention_dim_t5=8, pooled_projection_dim=4, hidden_size=24,
        text_len=4, text_len_t5=4, activation_fn="gelu-approximate",
    )
    kwargs = {
        "encoder_hidden_states": randn(1, 4, 8), "text_embedding_mask": torch.ones(1, 4).bool(),
        "encoder_hidden_states_t5": randn(1, 4, 8), "text_embedding_mask_t5": torch.ones(1, 4).bool(),
        "image_meta_size": randn(1, 6), "style": tensor([0]), "image_rotary_emb": [randn(64, 8), randn(64, 8)], **PLAIN,
    }
    return model, (randn(1, 4, 16, 16), tensor([3.0])), kwargs


@public
def lumina_next():
    model = diffusers_model(
        "LuminaNextDiT2DModel", sample_size=16, patch_size=2, in_channels=4, hidden_size=24, num_layers=2,
        num_attention_heads=3, num_kv_heads=1, multiple_of=16, cross_attention_dim=32,
    )
    nn.init.normal_(model.pad_token)  # which it leaves as it finds the memory
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    kwargs = {"cross_attention_kwargs": {}, **PLAIN}
    args = (
        randn(1, 4, 22, 18), tensor([3.0]), randn(1, 6, 32), torch.ones(1, 6).bool(),
        get_2d_rotary_pos_embed_lumina(8, 384, 384),
    )
    return model, args, kwargs


@public
def lumina2():
    model = diffusers_model(
        "Lumina2Transformer2DModel", sample_size=16, patch_size=2, in_channels=4, hidden_size=24, num_layers=2,
        num_refiner_layers=1, num_attention_heads=3, num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2),
        axes_lens=(128, 128, 128), cap_feat_dim=32,
    )
    return model, (randn(1, 4, 22, 18), tensor([3.0]), randn(1, 6, 32), torch.ones(1, 6).bool()), PLAIN


@public
def auraflow():
    model = diffusers_model(
        "AuraFlowTransformer2DModel", sample_size=32, patch_size=2, in_channels=4, num_mmdit_layers=1,
        num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16,
        joint_attention_dim=16, out_channels=4, pos_embed_max_size=256,
    )
    return model, (randn(1, 4, 22, 18),), {"encoder_hidden_states": randn(1, 6, 16), "timestep": tensor([0.5]), **PLAIN}


@public
def hidream():
    model = diffusers_model(
        "HiDreamImageTransformer2DModel", patch_size=2, in_channels=4, out_channels=4, num_layers=1,
        num_single_layers=1, attention_head_dim=8, num_attention_heads=4, caption_channels=[8, 4], text_emb_dim=8,
        num_routed_experts=4, num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(32, 32),
        llama_layers=(0, 1), force_inference_output=True,
    )
    kwargs = {
        "timesteps": tensor([3]), "encoder_hidden_states_t5": randn(1, 6, 8),
        "encoder_hidden_states_llama3": randn(2, 1, 6, 4), "pooled_embeds": randn(1, 8), **PLAIN,
    }
    return model, (randn(1, 4, 22, 22),), kwargs


@public
def omnigen():
    model = diffusers_model(
        "OmniGenTransformer2DModel", hidden_size=16, num_attention_heads=4, num_key_value_heads=4, intermediate_size=32,
        num_layers=2, in_channels=4, time_step_dim=4,
        rope_scaling={"long_factor": list(range(1, 3)), "short_factor": list(range(1, 3))},
    )
    n = 7 + 1 + 99
    args = (
        randn(1, 4, 22, 18), tensor([0.5]), torch.randint(0, 10, (1, 7)), [], {}, torch.ones(1, n, n),
        torch.arange(n)[None],
    )
    return model, args, PLAIN


@public
def qwen_image():
    model = diffusers_model(
        "QwenImageTransformer2DModel", patch_size=2, in_channels=16, out_channels=4, num_layers=2,
        attention_head_dim=16, num_attention_heads=3, joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )
    kwargs = {
        "encoder_hidden_states": randn(1, 7, 16), "encoder_hidden_states_mask": torch.ones(1, 7).long(),
        "timestep": tensor([1.0]), "img_shapes": [[(1, 31, 29)]], **PLAIN,
    }
    return model, (randn(1, 31 * 29, 16),), kwargs


@public
def stable_audio():
    model = diffusers_model(
        "StableAudioDiTModel", sample_size=33, in_channels=4, num_layers=2, attention_head_dim=8,
        num_key_value_attention_heads=2, num_attention_heads=4, out_channels=4, cross_attention_dim=16, time_proj_dim=8,
        global_states_input_dim=8, cross_attention_input_dim=8,
    )
    rope = (randn(66, 4), randn(66, 4))
    kwargs = {
        "timestep": tensor([3]), "encoder_hidden_states": randn(1, 7, 8), "global_hidden_states": randn(1, 1, 8),
        "rotary_embedding": rope, **PLAIN,
    }
    return model, (randn(1, 4, 65),), kwargs


@public
def kandinsky5():
    model = diffusers_model(
        "Kandinsky5Transformer3DModel", in_visual_dim=4, in_text_dim=12, in_text_dim2=8, time_dim=16, out_visual_dim=4,
        patch_size=(1, 2, 2), model_dim=16, ff_dim=32, num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 2, 2),
    )
    args = (
        randn(1, 5, 10, 14, 4), randn(1, 6, 12), tensor([3.0]), randn(1, 8),
        (torch.arange(5), torch.arange(5), torch.arange(7)), torch.arange(6),
    )
    return model, args, PLAIN


@public
def bria():
    model = diffusers_model(
        "BriaTransformer2DModel", patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=[4, 2, 2],
    )
    kwargs = {
        "encoder_hidden_states": randn(1, 7, 16), "timestep": tensor([1.0]), "img_ids": places(11, 9),
        "txt_ids": torch.zeros(7, 3), **PLAIN,
    }
    return model, (randn(1, 99, 4),), kwargs


@public
def prior_transformer():
    model = diffusers_model(
        "PriorTransformer", num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=16,
        num_embeddings=77, additional_embeddings=4,
    )
    return model, (randn(2, 16), tensor([3]), randn(2, 16), randn(2, 77, 16)), PLAIN


@public
def transformer_temporal():
    model = diffusers_model(
        "TransformerTemporalModel", num_attention_heads=2, attention_head_dim=8, in_channels=16, num_layers=1,
        norm_num_groups=4,
    )
    return model, (randn(5, 16, 9, 7),), {"num_frames": 5, **PLAIN}


# diffusers: autoencoders


@public
def vae_kl():
    model = diffusers_model(
        "AutoencoderKL", block_out_channels=[8, 16], down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4, norm_num_groups=4,
    )
    return model, (randn(1, 3, 22, 18),), PLAIN


@public
def vae_cogvideox():
    model = diffusers_model(
        "AutoencoderKLCogVideoX", in_channels=3, out_channels=3, down_block_types=("CogVideoXDownBlock3D",) * 2,
        up_block_types=("CogVideoXUpBlock3D",) * 2, block_out_channels=(8, 8), latent_channels=4, layers_per_block=1,
        norm_num_groups=2, temporal_compression_ratio=2,
    )
    return model, (randn(1, 3, 5, 20, 12),), PLAIN


@public
def vae_ltx():
    model = diffusers_model(
        "AutoencoderKLLTXVideo", in_channels=3, out_channels=3, latent_channels=8, block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8), layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1), spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False), patch_size=1, patch_size_t=1,
    )
    return model, (randn(1, 3, 9, 20, 12),), PLAIN


@public
def vae_wan():
    model = diffusers_model(
        "AutoencoderKLWan", base_dim=4, z_dim=16, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True],
    )
    return model, (randn(1, 3, 5, 20, 12),), PLAIN


@public
def vae_hunyuan_video():
    model = diffusers_model(
        "AutoencoderKLHunyuanVideo", in_channels=3, out_channels=3, latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4, up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, spatial_compression_ratio=8,
        temporal_compression_ratio=4,
    )
    return model, (randn(1, 3, 9, 24, 16),), PLAIN


@public
def vae_mochi():
    model = diffusers_model(
        "AutoencoderKLMochi", in_channels=15, out_channels=3, encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32), latent_channels=4, layers_per_block=(1, 1, 1, 1, 1),
        latents_mean=None, latents_std=None,
    )
    return model, (randn(1, 3, 7, 16, 24),), PLAIN


@public
def vae_allegro():
    model = diffusers_model(
        "AutoencoderKLAllegro", in_channels=3, out_channels=3, down_block_types=("AllegroDownBlock3D",) * 4,
        up_block_types=("AllegroUpBlock3D",) * 4, block_out_channels=(8, 8, 8, 8), latent_channels=4,
        layers_per_block=1, norm_num_groups=2,
    )
    return model.decoder, (randn(1, 4, 3, 6, 4),), {}  # the whole is only implemented in tiles


@public
def vae_temporal_decoder():
    model = diffusers_model(
        "AutoencoderKLTemporalDecoder", block_out_channels=[32, 64], in_channels=3, out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * 2, latent_channels=4, layers_per_block=1,
    )
    return model, (randn(5, 3, 20, 12),), {"num_frames": 5, **PLAIN}


@public
def vae_cosmos():
    model = diffusers_model(
        "AutoencoderKLCosmos", in_channels=3, out_channels=3, latent_channels=4,
        encoder_block_out_channels=(8, 8, 8, 8), decode_block_out_channels=(8, 8, 8, 8), attention_resolutions=(8,),
        resolution=64, num_layers=1, patch_size=4, patch_type="haar", spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )
    return model, (randn(1, 3, 9, 32, 24),), PLAIN


@public
def vae_magvit():
    model = diffusers_model(
        "AutoencoderKLMagvit", in_channels=3, block_out_channels=(8, 8, 8, 8),
        down_block_types=["SpatialDownBlock3D"] + ["SpatialTemporalDownBlock3D"] * 3, latent_channels=4,
        layers_per_block=1, norm_num_groups=2, out_channels=3, spatial_group_norm=False,
        up_block_types=["SpatialUpBlock3D"] + ["SpatialTemporalUpBlock3D"] * 3,
    )
    return model, (randn(1, 3, 9, 24, 16),), PLAIN


@public
def vae_dc():
    model = diffusers_model(
        "AutoencoderDC", in_channels=3, latent_channels=4, attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"), decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        downsample_block_type="conv", upsample_block_type="interpolate", decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )
    return model, (randn(1, 3, 22, 18),), PLAIN


@public
def vae_oobleck():
    model = diffusers_model(
        "AutoencoderOobleck", encoder_hidden_size=4, decoder_channels=4, decoder_input_channels=2, audio_channels=2,
        downsampling_ratios=[2, 4], channel_multiples=[1, 2],
    )
    return model, (randn(1, 2, 136),), PLAIN


@public
def vae_tiny():
    model = diffusers_model(
        "AutoencoderTiny", in_channels=3, out_channels=3, encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), num_encoder_blocks=[1, 2], num_decoder_blocks=[2, 1],
    )
    return model, (randn(1, 3, 22, 18),), PLAIN


@public
def vq_model():
    model = diffusers_model(
        "VQModel", block_out_channels=[8, 16], in_channels=3, out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=3,
        norm_num_groups=4, num_vq_embeddings=32,
    )
    return model, (randn(1, 3, 22, 18),), PLAIN


# diffusers: U-Nets


@public
def unet_2d_condition():
    model = diffusers_model(
        "UNet2DConditionModel", sample_size=24, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12, attention_head_dim=4, in_channels=4, out_channels=4, layers_per_block=1,
    )
    return model, (randn(1, 4, 22, 18), tensor([3]), randn(1, 6, 12)), PLAIN


@public
def unet_2d():
    model = diffusers_model(
        "UNet2DModel", sample_size=24, block_out_channels=(8, 16), norm_num_groups=4, in_channels=3, out_channels=3,
        layers_per_block=1, attention_head_dim=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return model, (randn(1, 3, 22, 18), tensor([3])), PLAIN


@public
def unet_3d_condition():
    model = diffusers_model(
        "UNet3DConditionModel", block_out_channels=(4, 8), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=8, out_channels=4, in_channels=4, layers_per_block=1, attention_head_dim=2, sample_size=32,
    )
    return model, (randn(1, 4, 5, 14, 10), tensor([3]), randn(1, 6, 8)), PLAIN


@public
def unet_spatio_temporal():
    model = diffusers_model(
        "UNetSpatioTemporalConditionModel", block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=32,
        num_attention_heads=8, out_channels=4, in_channels=4, layers_per_block=1, sample_size=32,
        projection_class_embeddings_input_dim=32 * 3, addition_time_embed_dim=32,
    )
    return model, (randn(1, 5, 4, 14, 10), tensor([3]), randn(1, 1, 32), tensor([[6., 127., 0.02]])), PLAIN


@public
def unet_motion():
    model = diffusers_model(
        "UNetMotionModel", block_out_channels=(16, 32), norm_num_groups=16,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), cross_attention_dim=16, num_attention_heads=2,
        out_channels=4, in_channels=4, layers_per_block=1, sample_size=16, motion_num_attention_heads=2,
    )
    return model, (randn(1, 4, 5, 14, 10), tensor([3]), randn(5, 6, 16)), PLAIN


@public
def i2vgen_xl():
    model = diffusers_model(
        "I2VGenXLUNet", block_out_channels=(4, 8), norm_num_groups=2,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=4, attention_head_dim=4, num_attention_heads=None, out_channels=2, in_channels=4,
        layers_per_block=2, sample_size=32,
    )
    kwargs = {"image_embeddings": randn(1, 4), "encoder_hidden_states": randn(1, 6, 4), **PLAIN}
    return model, (randn(1, 4, 5, 14, 10), tensor([3]), tensor([7]), randn(1, 4, 5, 14, 10)), kwargs


@public
def unet_1d():
    model = diffusers_model(
        "UNet1DModel", block_out_channels=(8, 8, 16, 16), in_channels=14, out_channels=14,
        time_embedding_type="positional", use_timestep_embedding=True, flip_sin_to_cos=False, freq_shift=1.0,
        out_block_type="OutConv1DBlock", mid_block_type="MidResTemporalBlock1D",
        down_block_types=("DownResnetBlock1D",) * 4, up_block_types=("UpResnetBlock1D",) * 3, act_fn="swish",
    )
    return model, (randn(2, 14, 48), tensor([3])), PLAIN


@public
def controlnet():
    model = diffusers_model(
        "ControlNetModel", block_out_channels=(8, 16), layers_per_block=1, in_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=12,
        conditioning_embedding_out_channels=(4, 8), norm_num_groups=4, attention_head_dim=4,
    )
    return model, (randn(1, 4, 20, 12), tensor([3]), randn(1, 6, 12), randn(1, 3, 40, 24)), PLAIN


# transformers


@public
def timesformer(batch: int = 1, frames: int = 4, size: int = 16, layers: int = 2):
    """`transformers.TimesformerModel`: divided space-time attention with a class token, matmul + softmax."""
    model = transformers_model(
        "TimesformerModel",
        image_size=size,
        patch_size=4,
        num_frames=frames,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
    )
    return model, (torch.randn(batch, frames, 3, size, size),), {}


MODELS["timesformer"] = functools.partial(timesformer, frames=5, size=28)  # longer than its tests need


@public
def vivit():
    model = transformers_model("VivitModel", image_size=20, num_frames=10, tubelet_size=[2, 4, 4], **SMALL)
    return model, (randn(1, 10, 3, 20, 20),), {}


@public
def videomae():
    model = transformers_model("VideoMAEModel", image_size=20, num_frames=10, patch_size=4, tubelet_size=2, **SMALL)
    return model, (randn(1, 10, 3, 20, 20),), {}


@public
def vjepa2():
    model = transformers_model(
        "VJEPA2Model", crop_size=20, patch_size=4, frames_per_clip=10, tubelet_size=2, hidden_size=24,
        num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, pred_hidden_size=24, pred_num_attention_heads=2,
        pred_num_hidden_layers=2, pred_num_mask_tokens=2,
    )
    return model, (randn(1, 10, 3, 20, 20),), {"skip_predictor": True}


@public
def vit():
    return transformers_model("ViTModel", image_size=44, patch_size=4, **SMALL), (randn(2, 3, 44, 44),), {}


@public
def dinov2():
    return transformers_model("Dinov2Model", image_size=44, patch_size=4, **SMALL), (randn(2, 3, 44, 44),), {}


@public
def swin():
    model = transformers_model(
        "SwinModel", image_size=28, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=7,
    )
    return model, (randn(1, 3, 28, 28),), {}


@public
def swinv2():
    model = transformers_model(
        "Swinv2Model", image_size=28, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=7,
    )
    return model, (randn(1, 3, 28, 28),), {}


@public
def detr():
    from transformers import ResNetConfig

    b = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], out_features=["stage4"])
    model = transformers_model(
        "DetrModel", backbone_config=b, use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        num_queries=7, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
    )
    return model, (randn(1, 3, 224, 160),), {"pixel_mask": torch.ones(1, 224, 160).long()}


@public
def segformer():
    model = transformers_model(
        "SegformerModel", num_encoder_blocks=3, depths=[1, 1, 1], sr_ratios=[4, 2, 1], hidden_sizes=[8, 16, 16],
        patch_sizes=[7, 3, 3], strides=[4, 2, 2], num_attention_heads=[1, 2, 2], mlp_ratios=[2, 2, 2],
        decoder_hidden_size=16,
    )
    return model, (randn(1, 3, 72, 56),), {}


@public
def dpt():
    model = transformers_model(
        "DPTForDepthEstimation", image_size=36, patch_size=4, hidden_size=16, num_hidden_layers=4,
        num_attention_heads=2, intermediate_size=32, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8, is_hybrid=False,
    )
    return model, (randn(1, 3, 36, 36),), {}


@public
def convnext():
    model = transformers_model("ConvNextModel", hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1])
    return model, (randn(1, 3, 96, 64),), {}


@public
def patchtst():
    model = transformers_model(
        "PatchTSTModel", num_input_channels=7, context_length=52, patch_length=4, patch_stride=4, d_model=16,
        num_hidden_layers=2, num_attention_heads=2, ffn_dim=32, channel_attention=True,
    )
    return model, (randn(2, 52, 7),), {}


@public
def patchtsmixer():
    model = transformers_model(
        "PatchTSMixerModel", context_length=52, patch_length=4, patch_stride=4, num_input_channels=7, d_model=8,
        num_layers=2, mode="mix_channel",
    )
    return model, (randn(2, 52, 7),), {}


def _series(name, **sizes):
    model = transformers_model(
        name, prediction_length=8, context_length=24, lags_sequence=[1, 2], num_time_features=2, d_model=16,
        encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
        decoder_ffn_dim=32, **sizes,
    )
    kwargs = {
        "past_values": randn(2, 26), "past_time_features": randn(2, 26, 2), "past_observed_mask": torch.ones(2, 26),
        "future_values": randn(2, 8), "future_time_features": randn(2, 8, 2),
    }
    return model, (), kwargs


@public
def time_series_transformer():
    return _series("TimeSeriesTransformerModel")


@public
def autoformer():
    return _series("AutoformerModel", label_length=8)


@public
def informer():
    return _series("InformerModel", attention_type="prob", sampling_factor=3)


@public
def wav2vec2():
    model = transformers_model(
        "Wav2Vec2Model", conv_dim=(16, 16), conv_stride=(4, 2), conv_kernel=(8, 3), num_feat_extract_layers=2,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, apply_spec_augment=False, feat_extract_norm="layer",
        do_stable_layer_norm=True, **SMALL,
    )
    return model, (randn(2, 630),), {}


@public
def whisper():
    model = transformers_model(
        "WhisperModel", vocab_size=40, num_mel_bins=8, d_model=16, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        max_source_positions=51, max_target_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )
    return model, (randn(1, 8, 102),), {"decoder_input_ids": ids(1, 9)}


@public
def clap_audio():
    model = transformers_model(
        "ClapAudioModel", spec_size=32, window_size=4, num_mel_bins=16, patch_size=4, patch_stride=[4, 4],
        patch_embeds_hidden_size=8, hidden_size=16, depths=[2, 2], num_attention_heads=[2, 2], num_hidden_layers=2,
        projection_dim=8, enable_fusion=False,
    )
    return model, (randn(1, 1, 60, 16),), {}


@public
def audio_spectrogram_transformer():
    model = transformers_model(
        "ASTModel", patch_size=4, max_length=60, num_mel_bins=20, frequency_stride=4, time_stride=4, **SMALL,
    )
    return model, (randn(1, 60, 20),), {}


@public
def mamba():
    model = transformers_model(
        "MambaModel", vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=2, pad_token_id=0,
    )
    return model, (ids(1, 15),), {}


@public
def mamba2():
    model = transformers_model(
        "Mamba2Model", vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=2, num_heads=4, head_dim=8,
        n_groups=2, chunk_size=4, pad_token_id=0,
    )
    return model, (ids(1, 15),), {}


@public
def falcon_mamba():
    model = transformers_model(
        "FalconMambaModel", vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=2, pad_token_id=0,
    )
    return model, (ids(1, 15),), {}


@public
def rwkv():
    model = transformers_model("RwkvModel", vocab_size=40, hidden_size=16, num_hidden_layers=2, context_length=32)
    return model, (ids(1, 11),), {}


GQA = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}


@public
def llama():
    return transformers_model("LlamaForCausalLM", **GQA), (ids(2, 33),), {}


@public
def qwen3():
    return transformers_model("Qwen3Model", head_dim=8, **GQA), (ids(2, 33),), {}


@public
def mistral():
    return transformers_model("MistralModel", sliding_window=8, **GQA), (ids(2, 33),), {}


@public
def gemma2():
    return transformers_model("Gemma2Model", head_dim=8, sliding_window=8, **GQA), (ids(2, 33),), {}


@public
def mixtral():
    return transformers_model("MixtralModel", num_local_experts=4, num_experts_per_tok=2, **GQA), (ids(2, 33),), {}


@public
def falcon():
    model = transformers_model(
        "FalconModel", vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, multi_query=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )
    return model, (ids(2, 33),), {}


@public
def gpt2():
    model = transformers_model(
        "GPT2Model", vocab_size=40, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2,
    )
    return model, (ids(2, 33),), {}


@public
def bert():
    return transformers_model("BertModel", vocab_size=40, max_position_embeddings=64, **SMALL), (ids(2, 33),), {}


@public
def t5():
    model = transformers_model(
        "T5Model", vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0,
    )
    return model, (ids(2, 33),), {"decoder_input_ids": ids(2, 9)}


@public
def bart():
    model = transformers_model(
        "BartModel", vocab_size=40, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64,
    )
    return model, (ids(2, 33),), {"decoder_input_ids": ids(2, 9)}


@public
def deberta_v2():
    model = transformers_model(
        "DebertaV2Model", vocab_size=40, relative_attention=True, pos_att_type=["p2c", "c2p"],
        max_position_embeddings=64, **SMALL,
    )
    return model, (ids(2, 33),), {}


@public
def longformer():
    model = transformers_model(
        "LongformerModel", vocab_size=40, attention_window=8, max_position_embeddings=80, pad_token_id=1, **SMALL,
    )
    return model, (ids(1, 32),), {}


@public
def fnet():
    model = transformers_model(
        "FNetModel", vocab_size=40, hidden_size=16, num_hidden_layers=2, intermediate_size=32,
        max_position_embeddings=64,
    )
    return model, (ids(2, 33),), {}


@public
def perceiver():
    model = transformers_model(
        "PerceiverModel", num_latents=9, d_latents=16, d_model=12, num_blocks=1, num_self_attends_per_block=2,
        num_self_attention_heads=2, num_cross_attention_heads=2,
    )
    return model, (randn(1, 55, 12),), {}


@public
def qwen2_vl_vision():
    model = transformers_model(
        "models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel", depth=2, embed_dim=16,
        hidden_size=16, mlp_ratio=2, num_heads=2, in_channels=3, patch_size=4, spatial_merge_size=2,
        temporal_patch_size=2,
    )
    return model, (randn(3 * 6 * 4, 3 * 2 * 4 * 4),), {"grid_thw": tensor([[3, 6, 4]])}


@public
def sam_vision():
    model = transformers_model(
        "SamVisionModel", hidden_size=16, output_channels=8, num_hidden_layers=2, num_attention_heads=2, image_size=44,
        patch_size=4, window_size=4, global_attn_indexes=[1], mlp_dim=32,
    )
    return model, (randn(1, 3, 44, 44),), {}


@public
def maskformer_swin():
    model = transformers_model(
        "MaskFormerSwinModel", image_size=28, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=7,
    )
    return model, (randn(1, 3, 28, 28),), {}


@public
def mask2former():
    from transformers import SwinConfig

    b = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    model = transformers_model(
        "Mask2FormerModel", backbone_config=b, feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=32, encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=32,
        num_queries=7,
    )
    return model, (randn(1, 3, 64, 64),), {}


FOLDING = {
    "fp16_esm": False,
    "trunk": {
        "num_blocks": 1, "sequence_state_dim": 16, "pairwise_state_dim": 16, "sequence_head_width": 8,
        "pairwise_head_width": 8, "max_recycles": 1,
        "structure_module": {"num_blocks": 1, "sequence_dim": 16, "pairwise_dim": 16},
    },
}


@public
def esmfold():
    model = transformers_model(
        "EsmForProteinFolding", vocab_size=33, pad_token_id=1, is_folding_model=True, esmfold_config=FOLDING, **SMALL,
    )
    return model, (ids(1, 13, 20),), {}


@public
def esmfold_block():
    """One block of the folding trunk: triangular attention and multiplication over pairs."""
    return esmfold()[0].trunk.blocks[0], (randn(1, 13, 16), randn(1, 13, 13, 16)), {}


@public
def pvt_v2():
    model = transformers_model(
        "PvtV2Model", image_size=64, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2],
        sr_ratios=[8, 4, 2, 1], mlp_ratios=[2, 2, 2, 2],
    )
    return model, (randn(1, 3, 96, 64),), {}


@public
def hiera():
    model = transformers_model(
        "HieraModel", embed_dim=8, image_size=[32, 32], patch_size=[3, 3], patch_stride=[2, 2], patch_padding=[1, 1],
        query_stride=[2, 2], masked_unit_size=[4, 4], depths=[1, 1], num_heads=[1, 2], num_query_pool=1,
        masked_unit_attention=[True, False], embed_dim_multiplier=2, mlp_ratio=2., decoder_hidden_size=8,
        decoder_depth=1, decoder_num_heads=1,
    )
    return model, (randn(1, 3, 32, 32),), {}


@public
def deit():
    return transformers_model("DeiTModel", image_size=44, patch_size=4, **SMALL), (randn(1, 3, 44, 44),), {}


@public
def clip():
    t = dict(vocab_size=40, max_position_embeddings=20, bos_token_id=1, eos_token_id=2, pad_token_id=0, **SMALL)
    v = dict(image_size=44, patch_size=4, **SMALL)
    model = transformers_model("CLIPModel", text_config=t, vision_config=v, projection_dim=8)
    kwargs = {"input_ids": ids(2, 11), "pixel_values": randn(2, 3, 44, 44), "attention_mask": torch.ones(2, 11).long()}
    return model, (), kwargs


@public
def siglip_vision():
    return transformers_model("SiglipVisionModel", image_size=44, patch_size=4, **SMALL), (randn(2, 3, 44, 44),), {}


@public
def xclip_vision():
    model = transformers_model(
        "XCLIPVisionModel", image_size=20, patch_size=4, num_frames=5, mit_hidden_size=16, mit_intermediate_size=32,
        mit_num_hidden_layers=1, mit_num_attention_heads=2, **SMALL,
    )
    return model, (randn(5, 3, 20, 20),), {}


@public
def encodec():
    model = transformers_model(
        "EncodecModel", target_bandwidths=[8.0], num_filters=4, hidden_size=8, upsampling_ratios=[4, 2],
        codebook_size=16, codebook_dim=8, num_lstm_layers=1, sampling_rate=8000,
    )
    return model, (randn(1, 1, 200),), {}


@public
def conformer():
    model = transformers_model(
        "Wav2Vec2ConformerModel", conv_dim=(16, 16), conv_stride=(4, 2), conv_kernel=(8, 3), num_feat_extract_layers=2,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, apply_spec_augment=False, feat_extract_norm="layer",
        position_embeddings_type="relative", conv_depthwise_kernel_size=5, **SMALL,
    )
    return model, (randn(2, 630),), {}


@public
def depth_anything():
    from transformers import Dinov2Config

    b = Dinov2Config(
        image_size=36, patch_size=4, out_features=["stage1", "stage2"], reshape_hidden_states=False,
        apply_layernorm=False, **SMALL,
    )
    model = transformers_model(
        "DepthAnythingForDepthEstimation", backbone_config=b, reassemble_hidden_size=16, neck_hidden_sizes=[8, 8],
        fusion_hidden_size=8, reassemble_factors=[2, 1], patch_size=4, head_hidden_size=8,
    )
    return model, (randn(1, 3, 36, 36),), {}


@public
def vitdet():
    model = transformers_model(
        "VitDetModel", hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=44, patch_size=4,
        pretrain_image_size=44, window_size=4, window_block_indices=[0], use_relative_position_embeddings=True,
    )
    return model, (randn(1, 3, 44, 44),), {}


@public
def timesfm():
    model = transformers_model(
        "TimesFmModel", patch_length=4, context_length=64, horizon_length=8, freq_size=3, num_hidden_layers=2,
        hidden_size=16, intermediate_size=32, head_dim=8, num_attention_heads=2,
    )
    return model, (randn(2, 64),), {"past_values_padding": torch.zeros(2, 64).long(), "freq": torch.zeros(2, 1).long()}


@public
def univnet():
    model = transformers_model(
        "UnivNetModel", model_in_channels=8, model_hidden_channels=8, num_mel_bins=8, resblock_kernel_sizes=[3],
        resblock_stride_sizes=[4], resblock_dilation_sizes=[[1, 3]], kernel_predictor_num_blocks=1,
        kernel_predictor_hidden_channels=8, kernel_predictor_conv_size=3,
    )
    return model, (randn(1, 15, 8),), {"noise_sequence": randn(1, 15, 8)}
