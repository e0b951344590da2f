"""The lazy patch: on ComfyUI's native transformers only the hole's tokens are computed.

    lazy = Lazy(LazyConfig(mode="refresh"))
    model = lazy.patch(model)            # a clone; two wrappers, nothing of ComfyUI is replaced
    ... any sampler ...
    lazy.report()                        # what was computed, what it cost, what was not lazy and why

Outside of the computed tokens the model's x0 is the given latent, which is what the sampler puts there anyway, so
guidance rescalers see the right statistics.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import comfy.utils
import torch
import torch.nn.functional as F
from comfy.patcher_extension import WrappersMP, get_all_wrappers
from einops import rearrange
from torch import Tensor

from ..dmd_core.inpaint import Bank, BankFull, Tokens, box_of, dense_steps, run_cost, select, step_cost, token_mask
from .lazy_blocks import OVERRIDE, NotLazy, Pass, Site, at_rows, patch_of, sites_of
from .lazy_session import Session, Sessions

KEY = "dmd_lazy"
Mode = Literal["auto", "refresh", "session", "trained", "dense"]
MODES: tuple[str, ...] = get_args(Mode)
MANY_STEPS = 12  # from here on a run has steps enough to refresh in
LITTLE_GAIN = 0.75  # share of computed tokens above which a whole pass is the better one


@dataclass(frozen=True, kw_only=True)
class LazyConfig:
    mode: Mode = "auto"
    ring: int = 1  # rings of known tokens computed with the hole
    multiple: int = 64  # the count of computed tokens is rounded up to this
    warm: int = 3  # refresh: whole steps at the start
    every: int = 5  # refresh: then every so many
    fast_gib: float = 4.0
    slow_gib: float = 16.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"lazy mode {self.mode!r} is not known; choose one of {', '.join(MODES)}")
        dense_steps(1, self.warm, self.every)  # refuses what makes no sense


@dataclass
class Run:
    """One sampling."""

    mode: Mode
    tokens: Tokens
    latent: Tensor
    sites: list[Site]
    patch: tuple[int, int, int]
    bank: Bank | None
    outside: Tensor  # bool, broadcasts against the latent: cells of tokens that are not computed
    branches: dict[Any, Hashable]  # uuid -> (positive or negative, number)
    dense: frozenset[int]
    levels: list[float]
    steps: int
    seen: int = 0  # length of the image stream in this run, references included
    work: float = 0.0  # rows computed, text included
    whole: float = 0.0  # rows that dense calls would have computed
    text: int = 0
    why: Counter[str] = field(default_factory=Counter)
    full: str = ""  # the bank has no room: there is no point in trying again
    bare: bool = False  # no LoRA on the model
    other_prompt: bool = False  # than the one that the session's context was read with


class Lazy:
    def __init__(
        self,
        config: LazyConfig | None = None,
        session: Session | None = None,
        tell: Any = None,
        sessions: Sessions | None = None,
    ):
        self.config = config or LazyConfig()
        self.session = session or Session()
        self.beside = (Sessions() if sessions is None else sessions).beside(self.session)
        self.tell: Callable[[str], None] = tell or logging.getLogger(__name__).info
        self.run: Run | None = None
        self.text = "" if self.config.mode == "dense" else "lazy inpainting has not run yet"

    def patch(self, model: Any) -> Any:
        clone = model.clone()
        for kind in (WrappersMP.SAMPLER_SAMPLE, WrappersMP.APPLY_MODEL):
            clone.remove_wrappers_with_key(kind, KEY)
        if self.config.mode != "dense":
            clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, self.sample)
            clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, self.apply_model)
        return clone

    # --- one sampling ---

    def sample(self, executor: Any, guider: Any, sigmas: Tensor, extra_args: Any, callback: Any, noise: Tensor, *rest):
        """Wraps Sampler.sample: here the mask, the latent and the noise levels are known."""
        latent, mask = rest[0], rest[1]
        try:
            self.run = self._begin(guider, sigmas, extra_args, noise, latent, mask)
        except NotLazy as reason:
            self.text = f"lazy inpainting is off, all is computed: {reason}"
            self.tell(self.text)
            return executor(guider, sigmas, extra_args, callback, noise, *rest)
        run = self.run
        try:
            samples = executor(guider, sigmas, extra_args, callback, noise, *rest)
            if run.mode == "session":
                self.session.pending = (token_cells(run.tokens.hole, run), _five(samples).clone())
            return samples
        finally:
            self.text, self.run = self.report(), None
            if run.mode == "session":
                self.session.bank = run.bank
            self.tell(self.text)

    def _begin(self, guider: Any, sigmas: Tensor, extra_args: Any, noise: Tensor, latent: Tensor, mask: Any) -> Run:
        self.beside.use()
        if mask is None:
            raise NotLazy("the latent has no noise mask; connect Prepare Inpaint or Set Latent Noise Mask")
        if "multigpu_clones" in extra_args["model_options"]:
            raise NotLazy("several GPUs share the run")
        if latent is None or latent.ndim not in (4, 5) or latent.shape != noise.shape:
            raise NotLazy("the latent is not a plain picture or video")
        net = guider.inner_model.diffusion_model
        sites, patch = sites_of(net), patch_of(net)
        cells = _five(mask).amax(1)
        trained = self.config.mode == "trained"
        # the trained student was taught exactly the hole: known tokens around it are clean context
        around = (0, 1) if trained else (self.config.ring, self.config.multiple)
        tokens = select(token_mask(cells, patch).cpu(), *around)
        if getattr(guider.model_patcher.model, "model_lowvram", False):
            self.tell(
                "the model is partly offloaded: moving its weights takes the time, so lazy inpainting gains little"
            )
        levels = sigmas.tolist()
        steps = len(levels) - 1
        mode = self._mode(tokens, steps)
        run = Run(
            mode=mode,
            tokens=tokens,
            latent=latent,
            sites=sites,
            patch=patch,
            bank=None,
            outside=torch.empty(0),
            branches={c["uuid"]: (k, i) for k, conds in guider.conds.items() for i, c in enumerate(conds)},
            dense=dense_steps(steps, self.config.warm, self.config.every),
            levels=levels,
            steps=steps,
            bare=without_lora(guider.model_patcher),
        )
        outside = ~token_cells(tokens.computed, run)
        run.outside = outside if latent.ndim == 5 else outside[:, :, 0]
        if mode == "session":
            self._resume(run, guider)
        return run

    def _mode(self, tokens: Tokens, steps: int) -> Mode:
        if tokens.share >= LITTLE_GAIN and self.config.mode != "trained":
            raise NotLazy(f"the hole takes {tokens.share:.0%} of the tokens, a whole pass is as fast")
        if self.config.mode != "auto":
            return self.config.mode
        return "refresh" if steps >= MANY_STEPS else "session"

    def _resume(self, run: Run, guider: Any) -> None:
        """The session's bank, without the rows of whatever changed on the canvas since."""
        session, patcher = self.session, guider.model_patcher
        canvas = _five(run.latent)
        signature = (id(patcher.model), patcher.patches_uuid, canvas.shape, self.config.fast_gib, self.config.slow_gib)
        if session.canvas is None or session.signature != signature:
            if session.canvas is not None:
                self.tell("another model, LoRA or size: the session starts anew")
            session.reset()
            session.signature, session.canvas = signature, canvas.clone()
        run.bank, session.pending = session.bank, None
        if run.bank is not None:
            run.bank.draft = None
            run.bank.neighbours = self.beside  # which reports to this run what it drops
        hole = token_cells(run.tokens.hole, run)
        changed = changed_tokens(session.canvas, canvas, run.patch) & ~run.tokens.hole
        if changed.float().mean() > 0.5:
            self.tell("another canvas: the session starts anew")
            session.reset()
            session.signature, run.bank = signature, None
            session.canvas = canvas.clone()
        elif run.bank is not None and changed.any():
            run.bank.forget(F.pad(changed, (0, run.bank.tokens - len(changed))))
        session.canvas = torch.where(hole, session.canvas, canvas)
        texts = {(k, i): text_of(c) for k, conds in guider.conds.items() for i, c in enumerate(conds)}
        if run.bank is None:
            session.prompts = {}
        run.other_prompt = any(session.prompts.setdefault(key, text) != text for key, text in texts.items())

    # --- one call of the model ---

    def apply_model(self, executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
        """Wraps BaseModel.apply_model, which returns x0."""
        run = self.run

        def whole(options: Any = transformer_options, rows: Tensor | None = None) -> Tensor:
            added = control
            if rows is not None and control is not None:
                added = at_rows(control, rows, len(run.tokens.computed), executor.class_obj.diffusion_model)
            return executor(x, t, c_concat, c_crossattn, added, options, **kwargs)

        if run is None:
            return whole()
        if not run.tokens.computed.any():
            return _repeated(run.latent, x)
        try:
            if run.full:
                raise NotLazy(run.full)
            refuse(x, t, control, transformer_options, kwargs, run)
            keys = [run.branches[u] for u in transformer_options["uuids"]]
            sigma = t.flatten()[0].item()
            if run.mode == "refresh":
                return self._refresh(run, x, keys, sigma, whole, transformer_options)
            if run.mode == "trained":

                def clean(options: Any) -> Tensor:
                    latent = _repeated(run.latent, x)
                    return executor(latent, torch.zeros_like(t), c_concat, c_crossattn, control, options, **kwargs)

                return self._trained(run, x, keys, whole, clean, transformer_options)
            at_zero = reference_at_zero(executor.class_obj.diffusion_model, kwargs)
            return self._session(run, x, keys, sigma, whole, transformer_options, at_zero)
        except (NotLazy, BankFull) as reason:
            run.full = str(reason) if isinstance(reason, BankFull) else run.full
            run.why[str(reason)] += 1
            run.work, run.whole = run.work + 1.0 * _rows(run), run.whole + _rows(run)
            return whole()

    def _refresh(self, run: Run, x: Tensor, keys: list[Hashable], sigma: float, whole: Any, options: Any) -> Tensor:
        if self.is_dense(sigma) or run.bank is None or not self._has_context(run, keys):
            return self._pass(run, keys, None, whole, options, write=True)
        part = partial(whole, rows=run.tokens.computed.nonzero().flatten())
        out = self._pass(run, keys, "computed", part, options)
        return torch.where(run.outside, _repeated(run.latent, x).to(out), out)

    def _trained(self, run: Run, x: Tensor, keys: list[Hashable], whole: Any, clean: Any, options: Any) -> Tensor:
        """The context is read once, at noise level 0 and blind to the hole, as the student was taught."""
        if run.tokens.computed.all():
            run.work, run.whole = run.work + _rows(run), run.whole + _rows(run)
            return whole()
        if not self._has_context(run, keys):
            self._pass(run, keys, "missing", clean, options, write=True)
        out = self._pass(run, keys, "computed", whole, options)
        return torch.where(run.outside, _repeated(run.latent, x).to(out), out)

    def _session(self, run, x, keys, sigma, whole, options, at_zero: bool) -> Tensor:
        levels: list[Hashable] = [(key, round(sigma, 6)) for key in keys]
        if not self._has_context(run, levels):
            if at_zero:
                # the network tells references from the picture by their place, so nothing may be left out before them
                return self._pass(run, levels, None, whole, options, write=True, sketch=True)
            self._pass(run, levels, "missing", whole, options, write=True)
        out = self._pass(run, levels, "computed", whole, options, sketch=True)
        return torch.where(run.outside, _repeated(run.latent, x).to(out), out)

    def is_dense(self, sigma: float) -> bool:
        """Is this noise level's step computed whole? What lies between two levels belongs to the step before."""
        step = sum(level >= sigma * (1 - 1e-6) for level in self.run.levels[:-1]) - 1 if self.run else 0
        return self.run is None or step in self.run.dense or step < 0

    def _has_context(self, run: Run, keys: list[Hashable]) -> bool:
        return run.bank is not None and bool((run.bank.have(keys) | computed(run, run.bank.tokens)).all())

    def _pass(
        self, run: Run, keys, what: str | None, whole, options, write: bool = False, sketch: bool = False
    ) -> Tensor:
        """One forward. what: 'computed' (the hole), 'missing' (context without rows, blind to the hole), None: all."""
        context: Tensor | None = None
        mine: Tensor | None = None  # the rows to write, as places in the stream

        def plan(total: int, device: torch.device) -> Tensor | None:
            nonlocal context, mine
            self._stream(run, total)
            hole, have = computed(run, total), run.bank.have(keys)
            if what == "computed" and not (hole | have).all():
                raise NotLazy("the reference pictures changed")
            rows = None if what is None else hole if what == "computed" else ~hole & ~have
            context = None if rows is None else (~hole & have & ~rows).nonzero().flatten().to(device)
            mine = (~hole if run.mode == "refresh" else ~hole & ~have).nonzero().flatten().to(device)
            if sketch and run.bank.draft is None:
                run.bank.begin(hole.nonzero().flatten())
            return None if rows is None else rows.nonzero().flatten().to(device)

        def read(slot: Any) -> tuple[Tensor, Tensor] | None:
            if context is None or not len(context):
                return None
            found = [run.bank.read(key, slot, context, context.device) for key in keys]
            return torch.cat([k for k, _ in found]), torch.cat([v for _, v in found])

        def fill(slot: Any, k: Tensor, v: Tensor) -> None:
            for key, ks, vs in zip(keys, k.chunk(len(keys)), v.chunk(len(keys)), strict=True):
                run.bank.fill(key, slot, ks, vs)

        def of(rows: Tensor, places: Tensor) -> Tensor:
            return rows.index_select(-2, places.to(rows.device)) if what is None else rows

        def keep(slot: Any, k: Tensor, v: Tensor) -> None:
            for key, ks, vs in zip(keys, k.chunk(len(keys)), v.chunk(len(keys)), strict=True):
                if write:
                    run.bank.write(key, slot, of(ks, mine), of(vs, mine), mine)
                if sketch:
                    hole = run.bank.draft.tokens
                    run.bank.sketch(key, slot, of(ks, hole), of(vs, hole))

        step = Pass(plan, read, keep, fill if what == "computed" else None)
        override = step.attention(options.get(OVERRIDE))
        with step.hooked(run.sites):
            out = whole({**options, OVERRIDE: override})
        if write:
            for key in keys:
                run.bank.wrote(key, mine)
        run.text = max(run.text, step.text)
        run.work += len(keys) * (step.count + step.text)
        # a context pass comes on top of the hole's, which stands for the dense one
        run.whole += 0 if what == "missing" else len(keys) * (step.total + step.text)
        return out

    def _stream(self, run: Run, total: int) -> None:
        """The bank fits the length of the image stream."""
        if run.bank is not None and run.bank.tokens != total and run.seen:
            raise NotLazy("the prompts differ in their reference images")
        if total < len(run.tokens.computed):
            raise NotLazy("the network has fewer tokens than the latent")
        if run.bank is None or run.bank.tokens != total:
            run.bank = Bank(total, self.config.fast_gib, self.config.slow_gib, neighbours=self.beside)
        run.seen = total

    def report(self) -> str:
        run = self.run
        if run is None:
            return self.text
        chosen, total = int(run.tokens.computed.sum()), len(run.tokens.computed)
        if not chosen:
            return "the mask is empty: the latent is returned as it came"
        lines = [
            f"{run.mode}: {chosen} of {total} tokens are computed ({run.tokens.share:.1%}; the hole itself "
            f"{int(run.tokens.hole.sum())})"
        ]
        if run.whole:
            lines.append(
                f"computed {run.work / run.whole:.2f} of a dense run's tokens, text included; the law for a lazy step "
                f"is {step_cost(run.tokens.share, run.seen or total, run.text):.2f}"
            )
            if self.config.mode == "auto":
                lines += faster_crop(run.tokens, grid_of(run), run.text, run.work / run.whole)
        if run.bank is not None:
            lines.append(memory(run.bank, self.beside.banks()))
        if self.beside.dropped:
            lines.append(f"dropped to make room, used longest ago: {', '.join(self.beside.dropped)}")
        if run.mode == "session" and (self.session.news or self.session.past):
            lines.append("; ".join(filter(None, [self.session.news, f"edits accepted: {self.session.accepted}"])))
            self.session.news = ""
        lines += untaught(run.mode, run.bare)
        if run.other_prompt:
            lines.append("the context was read with another prompt; the hole follows the new one. Forget reads it anew")
        lines += [f"computed whole {count} times: {reason}" for reason, count in run.why.items()]
        return "\n".join(lines)


def without_lora(model: Any) -> bool:
    return not model.patches and not model.injections  # the latter are ComfyUI's bypass loaders


def untaught(mode: str, bare: bool) -> list[str]:
    said = (
        "mode trained, but no LoRA is on the model: unless its checkpoint was taught to read clean context, take auto"
    )
    return [said] * (bare and mode == "trained")


def refuse(x: Tensor, t: Tensor, control: Any, options: dict[str, Any], kwargs: dict[str, Any], run: Run) -> None:
    """What would see a part of the picture and does not know it."""
    if control is not None and run.mode != "refresh":
        raise NotLazy("a ControlNet changes the context with its own picture; mode refresh is lazy with it")
    if any(kwargs.get(name) is not None for name in ("reference_latent", "context_latents", "time_dim_concat")):
        raise NotLazy("Wan with reference pictures orders its tokens differently")
    if any(options.get("patches_replace", {}).values()):
        raise NotLazy("another patch replaces blocks or attention")
    if patches := sorted(name for name, found in options.get("patches", {}).items() if found):
        raise NotLazy(f"another patch reads tokens ({', '.join(patches)})")
    if get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options):
        raise NotLazy("another node wraps the network (step caches do)")
    if "torch.compile" in options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {}):
        raise NotLazy("the model is compiled")
    if kwargs.get("attention_mask") is not None:
        raise NotLazy("the text has an attention mask")
    if len(kwargs.get("ref_latents") or ()) and any(hasattr(s.block, "attention") for s in run.sites):
        raise NotLazy("Z-Image with reference pictures orders its tokens differently")
    if not options.get("uuids") or any(u not in run.branches for u in options["uuids"]):
        raise NotLazy("a conditioning came from another node in the middle of the run")
    if x.shape[2:] != run.latent.shape[2:] or len(x) != len(options["uuids"]) * len(run.latent):
        raise NotLazy("the prompt is regional, or the picture is cut into windows")
    if (t != t.flatten()[0]).any():
        raise NotLazy("the samples of a batch have different noise levels")


def reference_at_zero(net: Any, kwargs: dict[str, Any]) -> bool:
    """Are reference pictures told a noise level of their own?"""
    if not len(kwargs.get("ref_latents") or ()):
        return False
    default = getattr(getattr(net, "params", net), "default_ref_method", "")
    return kwargs.get("ref_latents_method", default) == "index_timestep_zero"


def computed(run: Run, total: int) -> Tensor:
    """The computed tokens within the whole stream: references and padding are context. bool [total]"""
    mask = run.tokens.computed.cpu()
    return F.pad(mask, (0, total - len(mask)))


def token_cells(chosen: Tensor, run: Run) -> Tensor:
    """Token mask [n] -> latent cells, bool [1 1 t h w]."""
    size, (rows, columns) = _five(run.latent).shape[2:], grid_of(run)
    cells = rearrange(chosen.to(run.latent.device), "(t h w) -> 1 1 t h w", h=rows, w=columns)
    for axis, p in enumerate(run.patch):
        cells = cells.repeat_interleave(p, axis + 2)
    return cells[:, :, : size[0], : size[1], : size[2]]


def grid_of(run: Run) -> tuple[int, int]:
    """Rows and columns of tokens."""
    height, width = run.latent.shape[-2:]
    return -(-height // run.patch[1]), -(-width // run.patch[2])


def memory(bank: Bank, others: Mapping[str, Bank] | None = None) -> str:
    fast, slow = bank.nbytes
    said = f"bank: {(fast + slow) / 2**30:.3f} GiB" + (f", {slow / 2**30:.3f} of it in main memory" if slow else "")
    if others:
        total = fast + slow + sum(sum(b.nbytes) for b in others.values())
        said += f"; {total / 2**30:.3f} GiB with {len(others)} other session(s)"
    return said


def text_of(cond: Mapping[str, Any]) -> Hashable:
    """Tells prompts apart without keeping them."""
    found = [cond.get("cross_attn"), cond.get("pooled_output")]
    return tuple(
        (tuple(v.shape), float(v.double().sum()), float(v.double().abs().sum())) for v in found if v is not None
    )


def changed_tokens(before: Tensor, after: Tensor, patch: tuple[int, int, int], tolerance: float = 0.1) -> Tensor:
    """Tokens whose latent [b c t h w] moved by more than a share of its spread; a VAE's round trip moves less."""
    moved = (before - after.to(before)).abs().mean(1) > tolerance * before.std().clamp_min(1e-6)
    return token_mask(moved.float(), patch).flatten().cpu()


def _rows(run: Run) -> int:
    return (run.seen or len(run.tokens.computed)) + run.text


def _five(latent: Tensor) -> Tensor:
    return latent if latent.ndim == 5 else latent[:, :, None]


def _repeated(latent: Tensor, x: Tensor) -> Tensor:
    return comfy.utils.repeat_to_batch_size(latent, len(x)).to(x)


def predicted(tokens: Tokens, grid: tuple[int, int], text: int, steps: int, config: LazyConfig) -> str:
    """Before any run: what the modes will cost, and whether a crop is the faster honest choice. grid: rows, columns."""
    total, share = len(tokens.computed), tokens.share
    if not tokens.computed.any():
        return "the mask is empty: the latent is returned as it came"
    if share >= LITTLE_GAIN:
        said = f"the hole takes {share:.0%} of {total} tokens: lazy inpainting is off, but in mode trained"
        return "\n".join([said, *faster_crop(tokens, grid, text, 1.0)])
    dense = len(dense_steps(steps, config.warm, config.every))
    lines = [
        f"{int(tokens.computed.sum())} of {total} tokens ({share:.1%}) and {text} of text: "
        f"a lazy step costs {step_cost(share, total, text):.2f} of a dense one",
        f"refresh, {steps} steps: {run_cost(share, total, text, steps, dense):.2f} of a dense run",
        f"session: the first edit about a dense run, later ones {step_cost(share, total, text):.2f}",
    ]
    return "\n".join([*lines, *faster_crop(tokens, grid, text, run_cost(share, total, text, steps, dense))])


def faster_crop(tokens: Tokens, grid: tuple[int, int], text: int, cost: float) -> list[str]:
    """A line where a crop would cost less than `cost` of a dense run."""
    box = box_of(rearrange(tokens.hole, "(t h w) -> t h w", h=grid[0], w=grid[1]).any(0))
    if box is None:
        return []
    crop = step_cost(min(1.0, 2.25 * box.area / math.prod(grid)), len(tokens.computed), text)
    return [f"a crop with 1.5x context costs {crop:.2f}: faster, but blind to the rest of the picture"] * (crop < cost)
