"""ComfyUI's native MODEL as a differentiable Denoiser with switchable LoRA sets: every family that ComfyUI loads.

    with ComfyDenoiser(model, targets=family.lora_targets) as denoiser:
        student = denoiser.bank.new("student", 64)
        x0 = Adapted(denoiser, denoiser.bank, {"student": 1.0})(x, sigma, cond)

x is a latent in the network's own space (see latent_in), sigma is ComfyUI's, cond a Cond made by conds_from. Outside of
the `with` the MODEL is as it was, to the bit.
"""

import inspect
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import comfy.model_sampling
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.patcher_extension import PatcherInjection
from torch import Tensor, nn

from ..dmd_core.adapters import AdapterBank, Targets, linear_layers
from ..dmd_core.conditioning import Cond
from ..dmd_core.schedule import EDM, Discrete, Flow, Schedule
from .comfy_autograd import (
    KeepInputs,
    blocks,
    checkpointed,
    input_savers,
    own_weights,
    register_kitchen_backward,
    training_mode,
)
from .comfy_conds import cond_from, conditioning_from, groups
from .lazy_blocks import OVERRIDE, Pass, sites_of

INJECTION = "dmd_adapters"
CACHED_CONDS = 16  # prepared prompts kept, newest last

FOREIGN = {
    "nunchaku": "Nunchaku's kernels have no backward pass",
    "gguf": "GGUF weights are unpacked by another pack's loader, without a backward pass",
    "tensorrt": "a TensorRT engine has no backward pass",
    "trtunet": "a TensorRT engine has no backward pass",
    "bitsandbytes": "bitsandbytes weights are unpacked by another pack's loader",
    "onediff": "OneDiff's compiled graph has no backward pass",
}


class ComfyDenoiser:
    def __init__(self, patcher: Any, targets: Targets = linear_layers, checkpoint_blocks: bool = False):
        refuse_untrainable(patcher)
        # weights that ComfyUI streams in and out (dynamic VRAM) would be gone at backward
        with torch.inference_mode(False):
            self.patcher = patcher.clone(disable_dynamic=True) if is_dynamic(patcher) else patcher.clone()
        self.patcher.set_model_optimized_attention(attention_pytorch)  # the faster ones have no backward
        self.model = self.patcher.model
        self.schedule = schedule_of(self.patcher.get_model_object("model_sampling"))
        self.device = torch.device(self.patcher.load_device)
        self.bank = HostBank(self.net, targets, self.device)
        # ComfyUI itself takes the adapters off whenever it unloads this clone, since all clones share the network
        attach = PatcherInjection(inject=lambda _: self.bank.attach(), eject=lambda _: self.bank.detach())
        self.patcher.set_injections(INJECTION, [attach])
        self.checkpoint_blocks = checkpoint_blocks
        self.memory = 0.0  # bytes that the weights leave free for what trains
        self._conds: dict[tuple[Any, ...], tuple[Any, list[tuple[list[int], Any]]]] = {}
        self._open: ExitStack | None = None
        self._step: Pass | None = None

    @property
    def net(self) -> nn.Module:
        """The bare network: feature layers and adapter targets are named in here."""
        return self.model.diffusion_model

    def __enter__(self) -> "ComfyDenoiser":
        register_kitchen_backward()
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(training_mode())
            stack.callback(self._unload)
            self.load()
            if self.checkpoint_blocks:
                stack.enter_context(
                    checkpointed(blocks(self.net), self._recompute_contexts, lambda: self.checkpoint_blocks)
                )
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        stack, self._open = self._open, None
        self._conds.clear()
        if stack is not None:
            stack.close()

    def load(self) -> None:
        """Onto the device; again after another model (a preview's VAE) pushed it out."""
        mm.load_models_gpu([self.patcher], memory_required=self.memory)
        self.patcher.pre_run()
        own_weights(self.model, self.device)
        self.net.requires_grad_(False)

    def _unload(self) -> None:
        self.patcher.cleanup()
        self.patcher.detach()
        self.bank.detach()

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        return self.each(x, sigma, cond, lambda x, sigma, prepared, _index: self.x0(x, sigma, prepared))

    def each(self, x: Tensor, sigma: Tensor, cond: Any, ask: Callable[..., Tensor]) -> Tensor:
        """ask(x, sigma, prompts, index) -> x0, for every group of samples that one call of the network can serve."""
        if self._open is None:
            raise RuntimeError("this denoiser is closed; call it inside `with ComfyDenoiser(...) as denoiser:`")
        if self.model.current_patcher is not self.patcher:
            self.load()
        device, x = x.device, x.to(self.device, torch.promote_types(x.dtype, torch.float32))
        sigma = sigma.to(x).expand(len(x))
        parts = self._prepared(cond, x)
        if len(parts) == 1:
            return ask(x, sigma, parts[0][1], parts[0][0]).to(device)
        x0 = torch.empty_like(x)
        for index, prepared in parts:
            x0[index] = ask(x[index], sigma[index], prepared, index)
        return x0.to(device)

    def apart(self, cond: Any, n: int) -> list[list[int]]:
        """The samples of each of those groups."""
        return [index for index, _part in groups(cond if isinstance(cond, Cond) else single(cond), n)]

    def x0(self, x: Tensor, sigma: Tensor, prepared: Any, step: Pass | None = None) -> Tensor:
        """step: what of the picture is computed, where that is not all of it."""
        options = comfy.model_patcher.create_model_options_clone(self.patcher.model_options)
        transformer = options["transformer_options"]
        transformer["sample_sigmas"] = sigma
        with ExitStack() as stack:
            if torch.is_grad_enabled():
                stack.enter_context(KeepInputs(input_savers(self.net)))
            if step is not None:
                transformer[OVERRIDE] = step.attention(transformer.get(OVERRIDE))
                stack.enter_context(step.hooked(sites_of(self.net)))
                stack.callback(setattr, self, "_step", self._step)
                self._step = step
            return comfy.samplers.calc_cond_batch(self.model, [prepared], x, sigma, options)[0]

    def _prepared(self, cond: Any, x: Tensor) -> list[tuple[list[int], Any]]:
        """Prompts as the network takes them, one part per group of samples; kept, as all players ask for the same."""
        key = (id(cond), x.shape)
        if key not in self._conds:
            parts = groups(cond if isinstance(cond, Cond) else single(cond), len(x))
            # the Cond is kept too, or its id could be given to another
            self._conds[key] = (cond, [(index, self._prepare(part, x[index])) for index, part in parts])
            if len(self._conds) > CACHED_CONDS:
                del self._conds[next(iter(self._conds))]
        return self._conds[key][1]

    def _prepare(self, cond: Cond, x: Tensor) -> Any:
        """What the family makes of a prompt (pooled vectors, sizes, masks), without adapters."""
        converted = {"positive": comfy.sampler_helpers.convert_cond(conditioning_from(cond))}
        blank = torch.zeros_like(x)
        with torch.no_grad(), self.bank.use():
            return comfy.samplers.process_conds(
                self.model, blank, converted, x.device, latent_image=blank, seed=0, **latent_shapes(x)
            )["positive"]

    def _recompute_contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Backward runs outside of the call, so a recompute sets up again what the call had set up."""
        forward, mix = self.bank.checkpoint_contexts()
        again = nullcontext if self._step is None else partial(self._step.again, self._step.place)
        return forward, Recompute(mix, input_savers(self.net), again)

    def latent_in(self, samples: Tensor) -> Tensor:
        """LATENT samples (what a VAE gives) -> the network's space; a frame axis is added where the family has one."""
        samples = samples.clone() if samples.is_inference() else samples
        if getattr(self.model.latent_format, "latent_dimensions", 2) == 3 and samples.ndim == 4:
            samples = samples.unsqueeze(2)
        return self.model.process_latent_in(samples.float())

    def latent_out(self, x0: Tensor) -> Tensor:
        """The network's space -> LATENT samples."""
        return self.model.process_latent_out(x0)

    def latent_shape(self, width: int, height: int, frames: int = 1) -> tuple[int, ...]:
        """[c (t) h w] of one sample, from pixels."""
        latent = self.model.latent_format
        ratio = getattr(latent, "spacial_downscale_ratio", 8)
        size = (height // ratio, width // ratio)
        if getattr(latent, "latent_dimensions", 2) == 2:
            return (latent.latent_channels, *size)
        step = getattr(latent, "temporal_downscale_ratio", 4)
        return (latent.latent_channels, (frames - 1) // step + 1, *size)


class HostBank(AdapterBank):
    """Attached while ComfyUI has the model loaded; sets live where it computes, even if a weight waits elsewhere."""

    def __init__(self, net: nn.Module, targets: Targets, device: torch.device):
        super().__init__(net, targets)
        self.detach()
        self.device = device

    def new(self, *args: Any, **kwargs: Any) -> nn.ModuleList:
        with torch.inference_mode(False):
            return super().new(*args, **kwargs).to(self.device)

    def load(self, *args: Any, **kwargs: Any) -> nn.ModuleList:
        with torch.inference_mode(False):
            return super().load(*args, **kwargs).to(self.device)


def single(conditioning: Any) -> Cond:
    if not isinstance(conditioning, list) or len(conditioning) != 1:
        given = f"a list of {len(conditioning)}" if isinstance(conditioning, list) else type(conditioning).__name__
        raise ValueError(
            f"got {given} as conditioning; give one entry with a batch axis (ComfyUI averages the entries of a list), "
            "or make one Cond of several with conds_from and conditioning.cat"
        )
    return cond_from(conditioning[0])


class Recompute(AbstractContextManager[None]):
    """The forward's adapter mix, kept inputs and part; entered once per backward, which retain_graph allows again."""

    def __init__(self, mix: AbstractContextManager[Any], savers: tuple[Any, ...], again: Callable[[], Any]):
        self.mix, self.savers, self.again = mix, savers, again
        self.stacks: list[ExitStack] = []

    def __enter__(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(self.mix)
            stack.enter_context(KeepInputs(self.savers))
            stack.enter_context(self.again())
            self.stacks.append(stack.pop_all())

    def __exit__(self, *error: Any) -> None:
        self.stacks.pop().close()


def latent_shapes(x: Tensor) -> dict[str, Any]:
    """Newer versions of process_conds ask for it."""
    known = inspect.signature(comfy.samplers.process_conds).parameters
    return {"latent_shapes": [x.shape]} if "latent_shapes" in known else {}


def is_dynamic(patcher: Any) -> bool:
    return bool(getattr(patcher, "is_dynamic", lambda: False)())


def refuse_untrainable(patcher: Any) -> None:
    """One sentence for a MODEL that has no backward pass, before anything is loaded."""
    if not isinstance(patcher, comfy.model_patcher.ModelPatcher) or not hasattr(patcher.model, "diffusion_model"):
        raise ValueError(
            f"this MODEL is a {type(patcher).__name__} without a diffusion network; "
            "connect one from Load Checkpoint or Load Diffusion Model"
        )
    types = {type(patcher), type(patcher.model), *map(type, patcher.model.modules())}
    types |= {type(p) for p in patcher.model.parameters()}
    for cls in sorted(types, key=str):
        for mark, why in FOREIGN.items():
            if mark in f"{cls.__module__}.{cls.__qualname__}".lower():
                raise ValueError(
                    f"this MODEL cannot be trained: {why} ({cls.__name__}); load the fp16, bf16 or fp8 file of the "
                    "same model with Load Checkpoint or Load Diffusion Model and connect that"
                )
    if is_dynamic(patcher) and getattr(patcher, "cached_patcher_init", None) is None:
        raise ValueError(
            "this MODEL cannot be trained: its loader streams weights and keeps no way to load them whole; "
            "load the file with Load Checkpoint or Load Diffusion Model, or start ComfyUI with --disable-dynamic-vram"
        )


def schedule_of(sampling: Any) -> Schedule:
    """The engine's own schedule where ComfyUI's is one of them; else ComfyUI's object behind the same interface."""
    cs = comfy.model_sampling
    kind = type(sampling)
    flow = kind.noise_scaling is cs.CONST.noise_scaling and getattr(sampling, "noise_scale", 1.0) == 1.0
    exploding = kind.noise_scaling is cs.EPS.noise_scaling
    if flow and kind.sigma is cs.ModelSamplingDiscreteFlow.sigma:
        return Flow(shift=sampling.shift)
    if flow and kind.sigma is cs.ModelSamplingFlux.sigma:
        return Flow(shift=math.exp(sampling.shift))
    if exploding and kind.timestep is cs.ModelSamplingDiscrete.timestep:
        sigmas = sampling.sigmas.detach().float().cpu().clone()
        schedule = Discrete(1 / (sigmas.double() ** 2 + 1))
        schedule.sigmas, schedule.log_sigmas = sigmas, sigmas.log()  # ComfyUI's own bits
        return schedule
    if exploding and kind.timestep is cs.ModelSamplingContinuousEDM.timestep:
        return EDM(sigma_min=float(sampling.sigma_min), sigma_max=float(sampling.sigma_max))
    return HostSchedule(sampling)


class HostSchedule:
    """Any other model_sampling; its coefficients are read off noise_scaling, which is linear in noise and latent."""

    def __init__(self, sampling: Any):
        self.sampling = sampling
        if not self.coeffs(torch.tensor([self.sigma_max]))[1].abs().max() > 0:
            raise ValueError(
                f"this MODEL does not start from noise ({type(sampling).__mro__[1].__name__}); "
                "distillation needs a diffusion or flow model"
            )

    @property
    def sigma_max(self) -> float:
        return float(self.sampling.sigma_max)

    def coeffs(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        levels = sigma.reshape(-1)
        zero, one = torch.zeros(len(levels), 1, device=sigma.device), torch.ones(len(levels), 1, device=sigma.device)
        a, b = self.sampling.noise_scaling(levels, zero, one), self.sampling.noise_scaling(levels, one, zero.clone())
        return a.reshape(sigma.shape), b.reshape(sigma.shape)

    def timestep(self, sigma: Tensor) -> Tensor:
        return self.sampling.timestep(sigma)

    def sigma(self, timestep: Tensor) -> Tensor:
        levels = [torch.as_tensor(self.sampling.sigma(t)) for t in timestep.reshape(-1)]
        return torch.stack(levels).reshape(timestep.shape)

    def sample(self, n: int, rng: torch.Generator, low: float = 0.02, high: float = 0.98) -> Tensor:
        u = low + (high - low) * torch.rand(n, generator=rng, device=rng.device)
        return torch.tensor([self.sampling.percent_to_sigma(1 - v) for v in u.tolist()], device=rng.device)
