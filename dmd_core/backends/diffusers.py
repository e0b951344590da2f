"""diffusers models as denoisers. The only file that imports diffusers and transformers, and only inside functions.

Nothing here touches the network: what is not on disk is refused, with the name of what to give.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..denoiser import NetDenoiser
from .bundle import Bundle
from .flux_keys import bare, flux_config, flux_state, is_native_flux
from .nets import FLUX, PIPELINES, SD, SD3, SDXL, Kind, latent_channels, native_size, schedule_of
from .sd3_config import is_native_sd3, sd3_config

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
SD3_PARTS = ("vae", *(f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")))
NO_SCREENING = ("safety_checker", "feature_extractor", "image_encoder")


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    config: str | Path | None = None,
    original_config: str | Path | None = None,
    variant: str | None = None,
    size: int | None = None,
) -> Bundle:
    """A model from a diffusers folder or a single .safetensors file; never from the network.

    config: a diffusers folder of the same family, for a single file (its JSON files and tokenizers; weights are used
    where the file has none). original_config: the .yaml of an original SD or SDXL checkpoint instead. variant: as in
    file names (fp16); found by itself where only one kind is there. size: pixels, for shifts that depend on it.
    """
    path = Path(path)
    need_libraries()
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; use one of {', '.join(str(d) for d in DTYPES)}")
    if path.is_dir():
        pipe, kind = load_folder(path, dtype, variant)
    elif path.is_file():
        pipe, kind = load_file(path, dtype, config, original_config)
    else:
        raise ValueError(
            f"{path} does not exist; give a diffusers folder (with model_index.json) or a .safetensors file on disk. "
            "Nothing is downloaded here: fetch a Hub repository first with `hf download REPO --local-dir FOLDER`"
        )
    return bundle(pipe, kind, torch.device(device), dtype, size)


def need_libraries() -> None:
    try:
        import diffusers  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:  # their pins often clash with other packs'
        raise ValueError(
            f"diffusers and transformers are needed here and cannot be imported ({error}); "
            "run `pip install -U diffusers transformers`. Nodes inside ComfyUI work without them"
        ) from error


def bundle(pipe: Any, kind: Kind, device: torch.device, dtype: torch.dtype, size: int | None) -> Bundle:
    net = getattr(pipe, kind.net).requires_grad_(False).eval().to(device)
    refuse_other_networks(net, kind)
    for module in (pipe.vae, *(getattr(pipe, n, None) for n in kind.in_file)):
        if module is not None:
            module.requires_grad_(False).eval()
    if pipe.vae is not None:
        pipe.vae.float()  # SDXL's overflows in fp16, and none is large
    schedule, prediction = schedule_of(pipe.scheduler, kind, size or native_size(net, pipe.vae_scale_factor))
    family = "sd2" if kind is SD and net.config.cross_attention_dim == 1024 else kind.family
    denoiser = NetDenoiser(partial(kind.call, net), schedule, prediction, dtype)
    return Bundle(family=family, net=net, denoiser=denoiser, kind=kind, pipeline=pipe, device=device)


def refuse_other_networks(net: Any, kind: Kind) -> None:
    vae = 16 if kind.flow else 4
    channels = latent_channels(net, kind)
    if channels != vae:
        raise ValueError(
            f"this {kind.family} network takes {channels} latent channels, not {vae}: an inpainting, editing or "
            "control variant; use the text-to-image model of the family"
        )
    if getattr(net.config, "time_cond_proj_dim", None) is not None:
        raise ValueError(
            "this UNet embeds its guidance (a distilled LCM); use the model that it was distilled from as the base"
        )


def load_folder(folder: Path, dtype: torch.dtype, variant: str | None) -> tuple[Any, Kind]:
    import diffusers
    import transformers

    index, kind = read_index(folder)
    parts: dict[str, Any] = {n: None for n in NO_SCREENING if n in index}
    if "safety_checker" in index:
        parts["requires_safety_checker"] = False
    with offline(), explained(folder):
        for name in (kind.net, "vae"):
            parts[name] = load_part(diffusers, folder, index, name, dtype, variant)
        for name in kind.in_file:
            if name in index:
                parts[name] = load_part(transformers, folder, index, name, dtype, variant)
        return pipeline_class(index).from_pretrained(str(folder), local_files_only=True, **parts), kind


def load_part(library: Any, folder: Path, index: Mapping[str, Any], name: str, dtype: torch.dtype, variant: Any) -> Any:
    """One component, whole: a weight that the files lack would otherwise be left random with a warning."""
    class_name = (index.get(name) or [None, None])[1]
    if class_name is None:
        return None
    if not has_weights(folder / name):
        pickles = sorted(p.name for p in (folder / name).glob("*") if p.suffix in PICKLES)
        found = f"only pickles ({', '.join(pickles)}), which can run code" if pickles else "no weights"
        raise ValueError(
            f"{folder / name} has {found}; .safetensors is accepted. Fetch the safetensors version of the model, "
            "or convert it once with save_pretrained(..., safe_serialization=True)"
        )
    model, report = getattr(library, class_name).from_pretrained(
        str(folder / name),
        local_files_only=True,
        use_safetensors=True,
        torch_dtype=dtype,
        variant=variant or find_variant(folder / name),
        output_loading_info=True,
    )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"{folder / name} lacks {len(missing)} weights, such as {missing[0]!r}; fetch the whole model")
    return model


def read_index(folder: Path) -> tuple[dict[str, Any], Kind]:
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} has no readable model_index.json ({type(error).__name__}); give the top folder of a diffusers "
            "model (the one that holds unet/ or transformer/, vae/ and scheduler/)"
        ) from error
    name = index.get("_class_name")
    if name not in PIPELINES:
        raise ValueError(f"{folder} is a {name}; accepted are {', '.join(PIPELINES)}. Use the text-to-image pipeline")
    return index, PIPELINES[name]


def pipeline_class(index: Mapping[str, Any]) -> Any:
    import diffusers

    return getattr(diffusers, index["_class_name"])


def has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def find_variant(folder: Path) -> str | None:
    """The variant in the file names (fp16), if there are no files without one."""
    stem = r"(?:diffusion_pytorch_model|model)"
    names = [p.name for p in folder.glob("*.safetensors")]
    if any(re.fullmatch(stem + r"(-\d+-of-\d+)?\.safetensors", n) for n in names):
        return None
    found = [re.fullmatch(stem + r"\.(\w+?)(-\d+-of-\d+)?\.safetensors", n) for n in names]
    return next((m.group(1) for m in found if m), None)


def load_file(path: Path, dtype: torch.dtype, config: Any, original_config: Any) -> tuple[Any, Kind]:
    if path.suffix != ".safetensors":
        kind = "a pickle, which can run code" if path.suffix in PICKLES else f"a {path.suffix or 'nameless'} file"
        raise ValueError(f"{path} is {kind}; a .safetensors file or a diffusers folder is accepted. Convert it first")
    shapes = read_header(path)
    if config is None and is_native_flux(shapes):
        return load_native_flux(path, dtype)
    if config is None and is_native_sd3(shapes):
        return load_native_sd3(path, dtype)
    if original_config is not None:
        return load_ldm(path, dtype, Path(original_config), shapes)
    return load_with_config(path, dtype, Path(config) if config else cached_config(path, shapes), shapes)


def read_header(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file as a meta tensor; reads no weights."""
    from safetensors import safe_open

    with explained(path), safe_open(path, "pt") as file:
        return {k: torch.empty(file.get_slice(k).get_shape(), device="meta") for k in file.keys()}  # noqa: SIM118


def read_state(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file as read

    with explained(path):
        return read(path)


def cached_config(path: Path, shapes: Mapping[str, Tensor]) -> Path:
    """The config folder that diffusers would download for this file, if the Hub's cache on disk has it."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config
    from huggingface_hub import snapshot_download

    repository = fetch_diffusers_config(dict(shapes))["pretrained_model_name_or_path"]
    try:
        return Path(snapshot_download(repository, local_files_only=True))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} holds weights only and its configuration is not on this disk; give config=FOLDER, a diffusers "
            f"folder of the same family such as a download of {repository} (its JSON and tokenizer files are enough), "
            "or original_config=FILE.yaml for an SD or SDXL checkpoint"
        ) from error


def load_with_config(path: Path, dtype: torch.dtype, folder: Path, shapes: Mapping[str, Tensor]) -> tuple[Any, Kind]:
    import diffusers
    import transformers

    index, kind = read_index(folder)
    options = {"config": str(folder), "local_files_only": True, "torch_dtype": dtype}
    parts: dict[str, Any] = {n: None for n in NO_SCREENING if n in index}
    net = getattr(diffusers, index[kind.net][1])
    if not hasattr(net, "from_single_file"):
        raise ValueError(f"{path}: diffusers reads no single files of {kind.family}; give its diffusers folder instead")
    with offline(), explained(path):
        if kind is FLUX and is_native_flux(shapes):
            parts[kind.net] = flux_net(read_state(path), dtype)
        else:
            parts[kind.net] = net.from_single_file(str(path), subfolder=kind.net, **options)
        if not any(k.startswith(("first_stage_model.", "vae.")) for k in shapes):
            at = folder / "vae"
            parts["vae"] = load_part(diffusers, folder, index, "vae", dtype, None) if has_weights(at) else None
        for name, prefix in kind.in_file.items():
            if any(k.startswith(prefix) for k in shapes):
                continue
            at = folder / name
            parts[name] = load_part(transformers, folder, index, name, dtype, None) if has_weights(at) else None
            if parts[name] is None:
                parts[name.replace("text_encoder", "tokenizer")] = None
        pipe = pipeline_class(index).from_single_file(str(path), **options, **parts)
    return pipe, kind


def load_ldm(path: Path, dtype: torch.dtype, yaml: Path, shapes: Mapping[str, Tensor]) -> tuple[Any, Kind]:
    """Network and VAE of an original SD or SDXL checkpoint; text encoders need tokenizers, hence config."""
    import diffusers
    from diffusers.loaders.single_file_utils import fetch_original_config

    if not yaml.is_file():
        raise ValueError(f"original_config {yaml} is no file; give the .yaml that came with the checkpoint")
    options = {"original_config": str(yaml), "local_files_only": True, "torch_dtype": dtype}
    with offline(), explained(path):
        net = diffusers.UNet2DConditionModel.from_single_file(str(path), **options)
        has_vae = any(k.startswith("first_stage_model.") for k in shapes)
        vae = diffusers.AutoencoderKL.from_single_file(str(path), **options) if has_vae else None
        params = fetch_original_config(str(yaml), local_files_only=True)["model"]["params"]
    is_v = params.get("parameterization") == "v" or "VScaling" in json.dumps(params.get("denoiser_config", {}))
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=params.get("timesteps", params.get("num_timesteps", 1000)),
        beta_start=params.get("linear_start", 0.00085),
        beta_end=params.get("linear_end", 0.012),
        beta_schedule="scaled_linear",
        prediction_type="v_prediction" if is_v else "epsilon",
        clip_sample=False,
        steps_offset=1,
    )
    if net.config.addition_embed_type == "text_time":
        return diffusers.StableDiffusionXLPipeline(vae, None, None, None, None, net, scheduler), SDXL
    return diffusers.StableDiffusionPipeline(vae, None, None, net, scheduler, None, None, None, False), SD


def load_native_flux(path: Path, dtype: torch.dtype) -> tuple[Any, Kind]:
    """A bare Flux transformer as released: its configuration is in its shapes."""
    import diffusers

    state = read_state(path)
    with explained(path):
        net = flux_net(state, dtype)
    dev = net.config.guidance_embeds
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0 if dev else 1.0, use_dynamic_shifting=dev)
    return diffusers.FluxPipeline(scheduler, None, None, None, None, None, net), FLUX


def flux_net(state: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Any:
    """diffusers' network from a state dict in the original Flux layout, of any width and depth."""
    import diffusers

    with torch.device("meta"):  # no memory and no random numbers for what the file replaces
        net: Any = diffusers.FluxTransformer2DModel(**flux_config(state))
    net.load_state_dict({k: v.to(dtype) for k, v in flux_state(state).items()}, assign=True)
    return net.to(dtype).eval().requires_grad_(False)


def load_native_sd3(path: Path, dtype: torch.dtype) -> tuple[Any, Kind]:
    """A bare SD3 transformer as released, of any width and depth."""
    import diffusers
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    state = bare(read_state(path))
    with explained(path):
        net: Any = diffusers.SD3Transformer2DModel(**sd3_config(state))
        net.load_state_dict(convert_sd3_transformer_checkpoint_to_diffusers(state))
        if state:  # the converter takes out what it knows
            raise ValueError(
                f"tensor {next(iter(state))!r} is not part of an SD3 transformer; "
                "files in fp32, bf16 or fp16 are accepted"
            )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = dict.fromkeys(SD3_PARTS)
    return diffusers.StableDiffusion3Pipeline(
        transformer=net.to(dtype).eval().requires_grad_(False), scheduler=scheduler, **parts
    ), SD3


@contextmanager
def offline() -> Iterator[None]:
    """diffusers falls back to downloading even where it was told not to; this makes that an error instead."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Whatever the libraries throw at a bad file becomes one ValueError that names it."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise  # one of ours, already complete
        if isinstance(error, ImportError):
            raise ValueError(f"{path} needs a package that is not installed: {error}") from error
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{path} could not be loaded ({type(error).__name__}: {reason}); whole .safetensors files and their JSON "
            "configuration are accepted. Fetch the model again if a file is cut short"
        ) from error
