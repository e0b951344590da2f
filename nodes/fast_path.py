"""The fast path of few-step runs: weights laid out for convolutions, a compiled network, a tiny VAE.

At one to four steps the network is no longer all of the time: launching its kernels and decoding weigh as much. What is
done here is off by default and undone after each run; cond and uncond go through the network as one batch already.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor, nn

from .evidence import Graph, is_link

KEY = "dmd_fast_path"
OFF, LAYOUT, COMPILE = "off", "channels last", "compile"
BACKEND = "inductor"


def fast_input() -> io.Combo.Input:
    return io.Combo.Input(
        "fast",
        options=[OFF, LAYOUT, COMPILE],
        default=OFF,
        optional=True,  # saved API prompts lack it
        tooltip="Channels last lays the weights of a UNet out as its convolutions read them. Compile makes kernels for "
        "this very model: the first run at each image size takes a minute or more, so it pays for many images.",
        advanced=True,
    )


def tiny_vae_output() -> io.Vae.Output:
    return io.Vae.Output(
        "tiny_vae",
        display_name="tiny VAE",
        tooltip="The tiny VAE (TAESD) of this family for VAE Decode, where its files are in models/vae_approx: a "
        "fraction of the time, a little less detail.",
    )


def faster(model: Any, how: str) -> tuple[Any, list[str]]:
    """A clone of the MODEL that takes the fast path, and what to know of it."""
    if how == OFF:
        return model, []
    if how not in (LAYOUT, COMPILE):
        raise ValueError(f"fast is {how!r}; use one of {OFF!r}, {LAYOUT!r}, {COMPILE!r}")
    unet = any(isinstance(m, BasicTransformerBlock) for m in model.model.diffusion_model.modules())
    if how == LAYOUT:
        return (
            (laid_out(model), []) if unet else (model, ["Channels last is for UNets; this network has no use of it."])
        )
    against = obstacle(model)
    if against:
        return model, [f"Not compiled: {against}."]
    said = "Compiled: the first run at each image size takes a minute or more, the following ones are faster."
    return compiled(laid_out(model) if unet else model, unet), [said]


# --- layout -----------------------------------------------------------------------------------------------------------


def laid_out(model: Any) -> Any:
    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, with_layout)
    return model


def with_layout(executor: Callable[..., Tensor], guider: Any, *args: Any) -> Tensor:
    with channels_last(guider.inner_model.diffusion_model, guider.model_patcher.load_device):
        return executor(guider, *args)


@contextmanager
def channels_last(net: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, convolutions on the device have their weights in the order that they read them; the same numbers."""
    kernels = [m.weight for m in net.modules() if isinstance(m, nn.Conv2d) and turns(m.weight, device)]
    try:
        for kernel in kernels:
            kernel.data = kernel.data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for kernel in kernels:
            kernel.data = kernel.data.contiguous()


def turns(kernel: Tensor, device: torch.device) -> bool:
    """Weights that wait elsewhere or are quantised stay as they are."""
    return type(kernel.data) is Tensor and kernel.device == device and kernel.data.is_contiguous()


# --- compiling --------------------------------------------------------------------------------------------------------


def obstacle(model: Any) -> str:
    """Why this MODEL should not be compiled, "" if it may be."""
    options = model.model_options.get("transformer_options", {})
    if any(options.get(k) for k in ("optimized_attention_override", "patches", "patches_replace")):
        return "another node works inside its layers (Negative Guidance, Lazy Inpaint, an IP-Adapter or the like)"
    if model.load_device.type == "cuda":
        from torch.utils._triton import has_triton

        return "" if has_triton() else "Triton is not installed, which torch.compile needs on a GPU"
    return ""


def compiled(model: Any, unet: bool) -> Any:
    """A UNet as a whole; of a transformer its blocks, which are alike, so that one compilation serves them all."""
    model = model.clone(disable_dynamic=True) if model.is_dynamic() else model.clone()
    keys = ["diffusion_model"] if unet else blocks(model.model.diffusion_model)
    set_torch_compile_wrapper(model=model, backend=BACKEND, keys=keys, options={"guard_filter_fn": without_options})
    return model


def blocks(net: nn.Module) -> list[str]:
    found = [f"{n}.{i}" for n, m in net.named_children() if isinstance(m, nn.ModuleList) for i in range(len(m))]
    return [f"diffusion_model.{n}" for n in found] or ["diffusion_model"]


def without_options(guards: Any) -> list[bool]:
    """transformer_options change with every run without changing what is computed; as the stock node has it."""
    return ["transformer_options" not in guard.name for guard in guards]


# --- decoding ---------------------------------------------------------------------------------------------------------


def tiny_vae(model: Any, graph: Graph, node: str, slot: int) -> Any:
    """The stock loader's tiny VAE for this MODEL, loaded where the output is used; else what is missing."""
    links = [v for n in graph.values() for v in n.get("inputs", {}).values() if is_link(v)]
    if not any((str(link[0]), link[1]) == (node, slot) for link in links):
        return None
    from nodes import VAELoader  # ComfyUI's own

    decoder = getattr(model.get_model_object("latent_format"), "taesd_decoder_name", None)
    if decoder is None:
        return ExecutionBlocker("no tiny VAE is known for this model; use the VAE that belongs to it")
    name = decoder.removesuffix("_decoder")
    there = [v for v in VAELoader.vae_list(VAELoader) if v == name or v.startswith(f"{name}.")]
    if not there:
        return ExecutionBlocker(
            f"the tiny VAE {name} is not in models/vae_approx; put its encoder and decoder there, or use another VAE"
        )
    return VAELoader().load_vae(there[0])[0]
