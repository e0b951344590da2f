"""Several MODELs over the levels of one run, each with its own cfg: teacher head and student tail, noise pairs.

One sampling loop, so the sampler keeps its state, its noise and the mask. A model is loaded when its turn comes, and
the one before may then be pushed out of memory: two 14B halves of a pair need room for one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
import comfy.patcher_extension
import comfy.sampler_helpers
import comfy.samplers
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io, ui
from torch import Tensor

from ..dmd_core.stages import boundaries, steps_above, turn, with_head
from .comfy_denoiser import latent_shapes, schedule_of
from .evidence import graph_of
from .few_step import AUTO, denoise_input, plan, profile_input, steps_input
from .negative_guidance import KEY
from .sampler import RestartSampler, guider_of

HEAD, SHARE = "extra steps before the student", "part of the same steps"
CFG = {"min": 1.0, "max": 30.0, "step": 0.1, "round": 0.01}


@dataclass(frozen=True)
class Stage:
    model: Any
    cfg: float


class LateGuider(comfy.samplers.CFGGuider):
    """A guider that joins a run already under way: prepared as CFGGuider.sample prepares itself, without a loop."""

    def open(self, run: dict[str, Any], sigmas: Tensor) -> None:
        self.conds = {k: [c.copy() for c in v] for k, v in self.original_conds.items()}
        comfy.samplers.preprocess_conds_hooks(self.conds)
        self.model_options = comfy.model_patcher.create_model_options_clone(self.model_patcher.model_options)
        comfy.sampler_helpers.prepare_model_patcher(self.model_patcher, self.conds, self.model_options)
        comfy.samplers.filter_registered_hooks_on_conds(self.conds, self.model_options)
        self.inner_model, self.conds, self.loaded_models = comfy.sampler_helpers.prepare_sampling(
            self.model_patcher, run["noise"].shape, self.conds, self.model_options
        )
        dtype = self.model_patcher.model_dtype()
        comfy.samplers.cast_to_load_options(self.model_options, device=run["device"], dtype=dtype)
        self.model_patcher.pre_run()
        latent = run["latent_image"]
        if latent is not None and latent.any():
            latent = self.inner_model.process_latent_in(latent)
        self.inner_model.latent_shapes = run["latent_shapes"] or [run["noise"].shape]
        self.conds = comfy.samplers.process_conds(
            self.inner_model, run["noise"], self.conds, run["device"], latent, run["denoise_mask"], run["seed"],
            **latent_shapes(run["noise"]),
        )  # fmt: skip
        self.model_options["transformer_options"]["sample_sigmas"] = sigmas
        # what guidance prepares around a run has to happen here for a model that joins later
        around = (WrappersMP.SAMPLER_SAMPLE, KEY, self.model_options, True)
        for wrapper in comfy.patcher_extension.get_wrappers_with_key(*around):
            extra = {"model_options": self.model_options, "seed": run["seed"]}
            wrapper(lambda *_: None, self, sigmas, extra, None, run["noise"], latent, run["denoise_mask"], True)

    def close(self) -> None:
        device = self.model_patcher.offload_device
        comfy.samplers.cast_to_load_options(self.model_options, device=device)
        self.model_patcher.cleanup()
        comfy.sampler_helpers.cleanup_models(self.conds, self.loaded_models)
        self.model_patcher.restore_hook_patches()
        del self.inner_model, self.loaded_models


class SwitchGuider(comfy.samplers.CFGGuider):
    """The first model's guider, which asks the later ones from their levels on."""

    def __init__(self, stages: Sequence[Stage], handovers: Sequence[float], positive: Any, negative: Any):
        super().__init__(stages[0].model)
        self.set_conds(positive, negative)
        self.set_cfg(stages[0].cfg)
        self.handovers = list(handovers)
        self.later = [LateGuider(s.model) for s in stages[1:]]
        for guider, stage in zip(self.later, stages[1:], strict=True):
            guider.set_conds(positive, negative)
            guider.set_cfg(stage.cfg)

    def inner_sample(
        self, noise, latent_image, device, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, **shapes
    ):
        self.run = {
            "noise": noise, "latent_image": latent_image, "device": device, "denoise_mask": denoise_mask,
            "seed": seed, "latent_shapes": shapes.get("latent_shapes"),
        }  # fmt: skip
        self.active = 0
        try:
            return super().inner_sample(
                noise, latent_image, device, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, **shapes
            )
        finally:
            if self.active:
                self.later[self.active - 1].close()
            del self.run

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: Any = None, seed: int | None = None) -> Tensor:
        options = model_options or {}
        wanted = max(self.active, turn(float(timestep.max()), self.handovers))
        if wanted != self.active:
            if self.active:
                self.later[self.active - 1].close()
            self.later[wanted - 1].open(self.run, options["transformer_options"]["sample_sigmas"])
            self.active = wanted
        if wanted == 0:
            return super().predict_noise(x, timestep, options, seed)
        guider = self.later[wanted - 1]
        return guider(x, timestep, guider.model_options, seed)


def refuse_different(models: Sequence[Any]) -> None:
    """Models that hand over a half-done image must mean the same by it."""
    first, *others = models
    for other in others:
        a, b = (m.get_model_object("model_sampling") for m in (first, other))
        kinds = [type(schedule_of(s)).__name__ for s in (a, b)]
        channels = [m.get_model_object("latent_format").latent_channels for m in (first, other)]
        if kinds[0] != kinds[1] or channels[0] != channels[1]:
            names = [type(m.model).__name__ for m in (first, other)]
            raise ValueError(
                f"{names[0]} and {names[1]} cannot hand over to each other: their noise levels or latents differ "
                f"({kinds[0]}, {channels[0]} channels and {kinds[1]}, {channels[1]}); use models of one family"
            )


class SwitchModels(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DMD_SwitchModels",
            display_name="Switch Models",
            category="DMD/sample",
            description="Two or three models in one run, each over its part of the noise levels and with its own cfg. "
            "A teacher's head gives a student's tail back its variety and composition; Wan 2.2's high and low noise "
            "halves run as one. For SamplerCustomAdvanced.",
            search_aliases=["teacher head", "high noise low noise", "wan 2.2", "refiner", "guider", "dmd"],
            inputs=[
                io.Model.Input("first", tooltip="Does the noisy steps: a teacher, or the high-noise half of a pair."),
                io.Model.Input("last", tooltip="Does the rest: the student, or the low-noise half of a pair."),
                io.Conditioning.Input("positive", tooltip="What the image should show, for all models."),
                io.Conditioning.Input("negative", tooltip="What it should not show; counts where a cfg is above 1."),
                io.Int.Input(
                    "first_steps",
                    default=2,
                    min=0,
                    max=50,
                    tooltip="Steps of the first model. 0 leaves everything to the others, as if it were not there.",
                ),
                io.Float.Input(
                    "first_cfg", default=5.0, **CFG, tooltip="cfg of the first model; teachers want 4 to 7."
                ),
                io.Float.Input(
                    "last_cfg", default=1.0, **CFG, tooltip="cfg of the last model; few-step models want 1."
                ),
                io.Combo.Input(
                    "how",
                    options=[HEAD, SHARE],
                    default=HEAD,
                    tooltip="Extra: the first model's steps take the place of the student's first one. Part: the steps "
                    "are shared out, as the halves of a pair do it.",
                ),
                steps_input(),
                denoise_input(),
                profile_input(),
                io.Model.Input("middle", optional=True, tooltip="A third model between the two."),
                io.Int.Input(
                    "middle_steps",
                    default=0,
                    min=0,
                    max=50,
                    tooltip="Steps of the middle model, taken from the last one's.",
                    advanced=True,
                ),
                io.Float.Input("middle_cfg", default=1.0, **CFG, tooltip="cfg of the middle model.", advanced=True),
                io.Latent.Input("latent", optional=True, tooltip="The LATENT that will be sampled, for its size."),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="Noise levels of your own to be shared out; then nothing is recognised and the sampler "
                    "adds no noise between steps.",
                ),
                io.Float.Input(
                    "first_until",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.005,
                    round=0.0001,
                    tooltip="Noise level (sigma) down to which the first model works; 0 is off. It then decides how "
                    "many steps are its part, or how many of the student's its extra steps replace. Wan 2.2: 0.875 "
                    "from text, 0.9 from an image.",
                    optional=True,
                    advanced=True,
                ),
            ],
            outputs=[
                io.Guider.Output(tooltip="The models as one, for SamplerCustomAdvanced."),
                io.Sampler.Output(tooltip="For SamplerCustomAdvanced."),
                io.Sigmas.Output(tooltip="The noise levels that are shared out."),
                io.String.Output("why", display_name="why", tooltip="Who does which levels, and why."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        first: Any,
        last: Any,
        positive: Any,
        negative: Any,
        first_steps: int = 2,
        first_cfg: float = 5.0,
        last_cfg: float = 1.0,
        how: str = HEAD,
        steps: int = 0,
        denoise: float = 1.0,
        profile: str = AUTO,
        middle: Any = None,
        middle_steps: int = 0,
        middle_cfg: float = 1.0,
        latent: Mapping[str, Any] | None = None,
        sigmas: Tensor | None = None,
        first_until: float = 0.0,
    ) -> io.NodeOutput:
        extra = how == HEAD and sigmas is None
        if sigmas is None:
            graph, node = graph_of(cls.hidden)
            found = plan(
                last, latent, steps=steps, denoise=denoise, profile=profile, graph=graph, node=node, name="last",
                cfg=last_cfg,
            )  # fmt: skip
            last, sampler, sigmas, why = found.model, found.sampler, found.sigmas, found.why
        else:
            sampler, why = RestartSampler(sigmas[:-1].tolist(), [0.0] * (len(sigmas) - 1)), "Noise levels as wired."
        above = steps_above(sigmas, first_until) if first_until else 1
        if first_until and above >= len(sigmas) - 1:
            raise ValueError(
                f"first_until is {first_until:g}, the last step begins at {float(sigmas[-2]):g}: nothing is left for "
                "the last model; give a higher noise level, or 0"
            )
        if first_until and (not extra or not above):
            first_steps = above
        if extra and first_steps:
            sigmas, sampler = headed(first, sampler, sigmas, first_steps, above)
        if first_until:
            why += f"\nThe first model works down to the noise level {first_until:g}: {first_steps} steps."
        given = [(first, first_cfg, first_steps), (middle, middle_cfg, middle_steps if middle is not None else 0)]
        earlier = [(Stage(model, cfg), n) for model, cfg, n in given if n]
        stages = [*(s for s, _ in earlier), Stage(last, last_cfg)]
        handovers = boundaries(sigmas, [n for _, n in earlier])
        refuse_different([s.model for s in stages])
        why = "\n".join([why, *shares(stages, handovers, sigmas)])
        if len(stages) == 1:
            return io.NodeOutput(
                guider_of(last, positive, negative, last_cfg), sampler, sigmas, why, ui=ui.PreviewText(why)
            )
        guider = SwitchGuider(stages, handovers, positive, negative)
        return io.NodeOutput(guider, sampler, sigmas, why, ui=ui.PreviewText(why))


def headed(
    first: Any, sampler: RestartSampler, sigmas: Tensor, steps: int, replaced: int
) -> tuple[Tensor, RestartSampler]:
    """The student's levels and noise with a teacher's deterministic steps in place of its first ones."""
    longer = with_head(schedule_of(first.get_model_object("model_sampling")), sigmas, steps, replaced)
    gammas = [0.0] * steps + sampler.gammas[replaced:]
    return longer, RestartSampler(longer[:-1].tolist(), gammas, sampler.keep, sampler.top)


def shares(stages: Sequence[Stage], handovers: Sequence[float], sigmas: Tensor) -> list[str]:
    turns = [turn(s, handovers) for s in sigmas[:-1].tolist()]
    lines = []
    for i, stage in enumerate(stages):
        levels = ", ".join(f"{s:.4g}" for s, who in zip(sigmas.tolist(), turns, strict=False) if who == i)
        name = f"model {i + 1}" if len(stages) > 1 else "one model"
        lines.append(f"{name} ({type(stage.model.model).__name__}, cfg {stage.cfg:g}): sigmas {levels}")
    return lines
