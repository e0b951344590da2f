"""Settings that do not go with a distilled model, said in plain sentences."""

from dataclasses import dataclass

from .profiles import Profile, stock_grids

FIX = "use the Few-Step node's sigmas"
SAFE_SCHEDULERS = ("simple", "sgm_uniform")
DETERMINISTIC = ("euler", "ddim", "heun", "dpm_2", "dpmpp_2m", "uni_pc", "res_multistep", "ipndm", "deis", "lms")
NOISY = ("lcm", "euler_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "ddpm")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What the user has wired; None is not known or not wired."""

    cfg: float | None = None
    negative: bool = False  # a negative prompt with text in it
    nag: bool = False  # negative guidance that works at cfg 1
    steps: int | None = None
    sampler: str | None = None
    scheduler: str | None = None
    patch: str | None = None  # ModelSamplingDiscrete's choice: eps, v_prediction, lcm, x0
    strength: float | None = None  # of the distillation LoRA
    fp8_base: bool = False
    has_lora: bool = False
    shift: float | None = None
    denoise: float = 1.0
    width: int = 0
    height: int = 0
    controlnet_end: float | None = None


def wrong_pairings(profile: Profile, setup: Setup) -> list[str]:
    """Everything about the setup that will hurt with this model, one sentence each."""
    checks = (_guidance, _negative, _sampler, _scheduler, _patch, _lora, _shift, _steps, _size, _control)
    return [sentence for check in checks for sentence in check(profile, setup)]


def _guidance(profile: Profile, setup: Setup) -> list[str]:
    default, low, high = profile.cfg
    if setup.cfg is None or low <= setup.cfg <= high:
        return []
    if setup.cfg < 1:
        return [
            f"cfg {setup.cfg:g} moves towards the negative prompt and loses the prompt; use {default:g} "
            "(the guidance_scale 0 of model cards means no guidance, which is cfg 1 here)."
        ]
    wanted = f"{default:g}" if low == high else f"{low:g} to {high:g}"
    verb = "burns the image" if setup.cfg > high else "is too weak"
    return [f"cfg {setup.cfg:g} {verb} with {profile.title}; use {wanted}."]


def _negative(profile: Profile, setup: Setup) -> list[str]:
    if not setup.negative or setup.nag or profile.negative == "yes":
        return []
    if setup.cfg is not None and setup.cfg > 1 and profile.negative == "weak":
        return [f"The negative prompt has little effect with {profile.title} at cfg {setup.cfg:g}."]
    if setup.cfg is None or setup.cfg == 1 or profile.negative == "no":
        return [
            f"The negative prompt is ignored: {profile.title} runs at cfg 1; the Negative Guidance node makes it count."
        ]
    return []


def _sampler(profile: Profile, setup: Setup) -> list[str]:
    name, wanted = setup.sampler, profile.stock.get("sampler", "")
    if name is None or name == wanted:
        return []
    instead = f"use {wanted}" if wanted else "no stock sampler does it right, use the Few-Step sampler"
    if profile.gamma == 1 and name in DETERMINISTIC and profile.steps > 1:
        return [f"{name} keeps the noise, {profile.title} wants it fresh at each step; images turn blurry, {instead}."]
    if profile.gamma == 0 and name in NOISY and profile.steps > 1:
        return [f"{name} adds noise at each step, {profile.title} was trained without; {instead}."]
    if profile.keep == "tcd" and profile.gamma != 0:
        return [f"{name} is not TCD, which {profile.title} was trained with; {instead}."]
    return []


def _scheduler(profile: Profile, setup: Setup) -> list[str]:
    name = setup.scheduler
    if name is None or name == profile.stock.get("scheduler"):
        return []
    if profile.space != "vp":
        wasteful = name in ("normal", "karras", "exponential", "kl_optimal", "beta", "ddim_uniform")
        hint = f"use simple, or {FIX.removeprefix('use ')}"
        return [f"{name} leaves the noise levels that {profile.title} was trained on; {hint}."] if wasteful else []
    if name in SAFE_SCHEDULERS and profile.grid in ("trailing", "lcm"):
        return []
    reached = stock_grids().get(name)
    trained = ", ".join(f"{v:g}" for v in profile.trained())
    detail = f" (at 4 steps it gives the timesteps {', '.join(map(str, reached))})" if reached else ""
    return [f"{name} is the wrong scheduler{detail}: {profile.title} was trained on {trained}; {FIX}."]


def _patch(profile: Profile, setup: Setup) -> list[str]:
    wanted = profile.stock.get("patch", "")
    if setup.patch == "lcm" and wanted != "lcm":
        return [
            f"ModelSamplingDiscrete (lcm) moves the timesteps to LCM's grid of 50 (749 becomes 739 or 759): right for "
            f"LCM models only, wrong for {profile.title}; remove it."
        ]
    if wanted == "x0" and setup.patch != "x0":
        return [f"{profile.title} predicts the clean image: add ModelSamplingDiscrete with x0."]
    if setup.patch == "x0" and wanted != "x0":
        return [f"ModelSamplingDiscrete (x0) is wrong for {profile.title}: it predicts no clean image; remove it."]
    return []


def _lora(profile: Profile, setup: Setup) -> list[str]:
    said = []
    default, low, high = profile.lora_scale
    if setup.strength is not None and "lora" in profile.kinds and not low <= setup.strength <= high:
        wanted = f"{default:g}" if low == high else f"{default:g} ({low:g} to {high:g})"
        said.append(f"LoRA strength {setup.strength:g} is out of range for {profile.title}; use {wanted}.")
    if setup.fp8_base and setup.has_lora:
        said.append(
            "A LoRA merged into an fp8 base loses small changes and can show a grid; load it with bypass, or use a "
            "bf16 base."
        )
    return said


def _shift(profile: Profile, setup: Setup) -> list[str]:
    if setup.shift is None or profile.space != "flow":
        return []
    wanted = profile.shift_at(setup.width or 1024, setup.height or 1024)
    if (profile.shift is None and profile.grid == "list") or abs(setup.shift - wanted) <= 0.05 * wanted:
        return []
    return [f"Shift {setup.shift:g} is set, {profile.title} was trained with {wanted:.3g}; {FIX}."]


def _steps(profile: Profile, setup: Setup) -> list[str]:
    if setup.steps is None or setup.steps in profile.allowed:
        return []
    return [f"{setup.steps} steps do not fit {profile.title}; use {', '.join(map(str, profile.allowed[:8]))}."]


def _size(profile: Profile, setup: Setup) -> list[str]:
    if not profile.size or not setup.width or not setup.height:
        return []
    ratio = (setup.width * setup.height) ** 0.5 / profile.size
    if 0.6 <= ratio <= 1.5:
        return []
    trouble = "repeats things" if ratio > 1 else "loses detail"
    return [f"{setup.width} x {setup.height} is far from {profile.title}'s {profile.size} pixels; it {trouble} there."]


def _control(profile: Profile, setup: Setup) -> list[str]:
    if setup.controlnet_end is None or setup.controlnet_end >= 1 or profile.steps > 8:
        return []
    return [
        f"ControlNet ends at {setup.controlnet_end:.0%}: with {profile.steps} steps that drops whole steps "
        f"({1 / profile.steps:.0%} of the control each); use end_percent 1."
    ]
