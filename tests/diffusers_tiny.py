"""Tiny random models in the folder layout of diffusers, made from nothing: networks, text encoders, tokenizers, VAE."""

import json
from pathlib import Path

import torch

FAMILIES = ("sd15", "sd15_v", "sdxl", "sd3", "flux_dev", "flux_schnell", "pixart_sigma", "pixart_alpha")
PROMPTS = ("a red circle", "two green stars, left and right")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def clip_tokenizer(folder: Path):
    """Byte-pair encoding over single letters with one merge."""
    import transformers

    folder.mkdir(parents=True)
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    words = [*letters, *(f"{c}</w>" for c in letters), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>"})
    )
    return transformers.CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)


def clip(tokenizer, projection: bool):
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config).eval()


def t5_tokenizer(length: int):
    """Unigrams over single letters."""
    import transformers

    letters = [(chr(c), -3.0) for c in range(ord("a"), ord("z") + 1)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters, (",", -3.0)]
    return transformers.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=length)


def t5(tokenizer, width: int):
    import transformers

    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5EncoderModel(config).eval()


def vae(channels: int, scaling: float, shift: float | None):
    import diffusers

    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=channels,
        scaling_factor=scaling,
        shift_factor=shift,
        use_quant_conv=shift is None,
        use_post_quant_conv=shift is None,
    ).eval()


def unet(**config):
    import diffusers

    defaults = {
        "sample_size": 16,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "norm_num_groups": 8,
        "attention_head_dim": 4,
        "cross_attention_dim": 32,
    }
    return diffusers.UNet2DConditionModel(**{**defaults, **config}).eval()


def sd15(where: Path, prediction: str = "epsilon"):
    import diffusers

    tokenizer = clip_tokenizer(where / "tokens")
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if prediction == "v_prediction" else {}
    scheduler = diffusers.DDIMScheduler(**BETAS, prediction_type=prediction, clip_sample=False, steps_offset=1, **zero)
    return diffusers.StableDiffusionPipeline(
        vae(4, 0.18215, None), clip(tokenizer, False), tokenizer, unet(), scheduler, None, None, None, False
    )


def sdxl(where: Path):
    import diffusers

    tokenizers = [clip_tokenizer(where / f"tokens{i}") for i in (1, 2)]
    net = unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=64,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae(4, 0.13025, None),
        clip(tokenizers[0], False),
        clip(tokenizers[1], True),
        *tokenizers,
        net,
        diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )


def sd3(where: Path):
    import diffusers

    tokenizers = [clip_tokenizer(where / f"tokens{i}") for i in (1, 2)]
    third = t5_tokenizer(512)
    net = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    return diffusers.StableDiffusion3Pipeline(
        net.eval(),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae(16, 1.5305, 0.0609),
        clip(tokenizers[0], True),
        tokenizers[0],
        clip(tokenizers[1], True),
        tokenizers[1],
        t5(third, 64),
        third,
    )


def flux(where: Path, guidance: bool):
    import diffusers

    tokenizer, second = clip_tokenizer(where / "tokens"), t5_tokenizer(512)
    net = diffusers.FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    )
    shift = {"shift": 3.0, "use_dynamic_shifting": True} if guidance else {"shift": 1.0}
    return diffusers.FluxPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(**shift),
        vae(16, 0.3611, 0.1159),
        clip(tokenizer, False),
        tokenizer,
        t5(second, 32),
        second,
        net.eval(),
    )


def pixart(where: Path, alpha: bool):
    import diffusers

    tokenizer = t5_tokenizer(120 if alpha else 300)
    net = diffusers.PixArtTransformer2DModel(
        sample_size=128 if alpha else 16,  # at 128 the pipeline adds the picture's size to the conditions
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        in_channels=4,
        out_channels=8,
        caption_channels=32,
        cross_attention_dim=24,
        use_additional_conditions=alpha,
        norm_eps=1e-6,
        attention_bias=True,
    )
    make = diffusers.PixArtAlphaPipeline if alpha else diffusers.PixArtSigmaPipeline
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    return make(tokenizer, t5(tokenizer, 32), vae(4, 0.13025, None), net.eval(), scheduler)


def pipeline(family: str, where: Path):
    """Tokenizers are read from files: theirs go below `where`."""
    torch.manual_seed(FAMILIES.index(family))
    make = {
        "sd15": sd15,
        "sd15_v": lambda at: sd15(at, "v_prediction"),
        "sdxl": sdxl,
        "sd3": sd3,
        "flux_dev": lambda at: flux(at, True),
        "flux_schnell": lambda at: flux(at, False),
        "pixart_sigma": lambda at: pixart(at, False),
        "pixart_alpha": lambda at: pixart(at, True),
    }[family]
    return make(where)


def save(family: str, where: Path, **options) -> Path:
    """The family's folder below `where`, written once."""
    folder = where / "-".join([family, *(f"{k}={v}" for k, v in options.items())])
    if not folder.exists():
        pipeline(family, where / f"{folder.name}.parts").save_pretrained(
            str(folder), safe_serialization=True, **options
        )
    return folder
