"""Inpainting nodes: prepare (crop or canvas), the lazy patch, composite."""

import logging
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import comfy.model_base
import comfy.samplers
import node_helpers
import torch
import torch.nn.functional as F
from comfy_api.latest import io
from einops import rearrange
from torch import Tensor

from ..dmd_core import inpaint
from ..dmd_core.families import FLUX, GENERIC, detect
from ..dmd_core.inpaint import Box, crop, masks
from .comfy_source import usual_size
from .evidence import graph_of
from .few_step import AUTO
from .inpaint_way import way_of
from .lazy_blocks import NotLazy, patch_of, sites_of
from .lazy_inpaint import MODES, Lazy, LazyConfig, memory, predicted, untaught, without_lora
from .lazy_session import Session, Sessions
from .sampler import guider_of, sample_latent

DEFAULTS = LazyConfig()
PAD = 16  # latent cells around the hole that a local decode sees
UNPAINTED = (64, 64)  # of the mask that Load Image gives where nothing was painted, whatever the picture's size
SESSIONS = Sessions()
CANVASES: WeakKeyDictionary[Any, inpaint.Canvas] = WeakKeyDictionary()  # by the VAE

RegionType = io.Custom("DMD_REGION")


@dataclass(frozen=True)
class Region:
    """What Composite Inpaint needs to put the result back."""

    original: Tensor  # [b c h w], padded by outpainting and to whole tokens
    mask: Tensor  # [b h w]
    boxes: list[Box] | None  # None: the whole canvas was sampled
    size: tuple[int, int]  # rows, columns of the picture that is returned
    sampled: tuple[int, int] | None = None  # rows, columns of each crop, where it was enlarged for sampling

    def cut(self, value: Tensor) -> Tensor:
        """[b ... h w] as it is sampled."""
        if self.boxes is None:
            return value
        parts = crop.cut(value, self.boxes)
        return parts if self.sampled is None else crop.resized(parts, self.sampled)

    def cut_mask(self) -> Tensor:
        if self.boxes is None or self.sampled is None:
            return self.cut(self.mask)
        # each pixel of the hole stays in it
        return F.interpolate(crop.cut(self.mask, self.boxes)[:, None], self.sampled, mode="bilinear")[:, 0]


def picture(image: Tensor) -> Tensor:
    """IMAGE -> [b c h w]"""
    if image.ndim != 4:
        raise ValueError(f"the image has shape {list(image.shape)}; connect an IMAGE [b h w c]")
    return rearrange(image[..., :3], "b h w c -> b c h w").float()


def as_image(value: Tensor) -> Tensor:
    return rearrange(value, "b c h w -> b h w c").contiguous()


class PrepareInpaint(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DMD_PrepareInpaint",
            display_name="Prepare Inpaint",
            category="DMD/inpaint",
            description="Repairs the mask, fills the hole, extends the picture if asked, chooses between the whole "
            "canvas and crops with context, and says what the run will cost.",
            search_aliases=["inpaint", "outpaint", "crop and stitch", "mask", "prefill", "lazy", "dmd"],
            inputs=[
                io.Image.Input("image", tooltip="The picture, or a batch or video with one mask each."),
                io.Mask.Input("mask", tooltip="1 is made anew, 0 stays as it is to the bit. One, or one per picture."),
                io.Vae.Input("vae", tooltip="Encodes the prepared picture."),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Decides between canvas and crop, and the predicted cost. UNets (SD1.5, SDXL) are cropped.",
                ),
                io.Combo.Input(
                    "area",
                    options=["auto", "canvas", "crop", "crop per island"],
                    default="auto",
                    tooltip="canvas: all of the picture is context (for the lazy patch). crop: only a box around the "
                    "hole, faster but blind to the rest. auto: canvas where the model can be lazy, else a crop "
                    "per island.",
                ),
                io.Float.Input(
                    "context",
                    default=1.5,
                    min=1.0,
                    max=8.0,
                    step=0.1,
                    tooltip="Crops: size of the box over the hole's. 1.5 to 3 are usual.",
                ),
                io.Int.Input("grow", default=8, min=-128, max=256, tooltip="Pixels by which the mask grows."),
                io.Int.Input(
                    "soften", default=8, min=0, max=128, tooltip="Pixels over which its edge fades, outwards."
                ),
                io.Boolean.Input(
                    "fill_holes", default=True, tooltip="A drawn outline becomes a filled shape.", advanced=True
                ),
                io.Combo.Input(
                    "prefill",
                    options=["none", *inpaint.PREFILLS],
                    default="push-pull",
                    tooltip="What stands in the hole before sampling. It matters below denoise 1, and to few-step "
                    "models, which take colour and structure from it.",
                ),
                io.Int.Input("left", default=0, min=0, max=4096, step=8, tooltip="Outpainting: pixels added left."),
                io.Int.Input("top", default=0, min=0, max=4096, step=8, tooltip="Outpainting: pixels added on top."),
                io.Int.Input("right", default=0, min=0, max=4096, step=8, tooltip="Outpainting: pixels added right."),
                io.Int.Input("bottom", default=0, min=0, max=4096, step=8, tooltip="Outpainting: pixels added below."),
                io.Int.Input(
                    "steps", default=20, min=1, max=200, tooltip="Only for the predicted cost.", advanced=True
                ),
                io.Boolean.Input(
                    "local",
                    default=False,
                    optional=True,
                    tooltip="canvas: encode only what changed since the last picture with this VAE. Faster for many "
                    "edits on one canvas; near a change the latent then depends a little on what came before.",
                    advanced=True,
                ),
            ],
            outputs=[
                io.Latent.Output(tooltip="Encoded, with its noise mask."),
                RegionType.Output(display_name="region", tooltip="For Composite Inpaint."),
                io.Image.Output(tooltip="The prepared picture or crops."),
                io.Mask.Output(tooltip="The repaired mask, of the same size."),
                io.String.Output(display_name="info", tooltip="Tokens, predicted cost, notices."),
            ],
        )

    @classmethod
    def execute(
        cls, image, mask, vae, area, context, grow, soften, fill_holes, prefill, left, top, right, bottom, steps,
        model=None, local=False,
    ) -> io.NodeOutput:  # fmt: skip
        original, mask = extended(picture(image), mask.float(), (left, right, top, bottom))
        size = (original.shape[-2], original.shape[-1])
        mask = repaired(mask, grow, soften, fill_holes)
        ratio = vae.spacial_compression_encode()
        multiple = ratio * (patch_of_model(model) or 2)
        # the added rim is known, so a cut patch is never sampled
        rim = (0, -size[1] % multiple, 0, -size[0] % multiple)
        original, mask = F.pad(original, rim, mode="replicate"), F.pad(mask, rim)
        packed = pictures_per_frame(vae) if len(original) > 1 else 1
        usual = usual_of(model)
        boxes = boxes_of(mask, area, model, context, multiple, usual, video=packed > 1)
        filled = original if prefill == "none" else inpaint.prefill(original, mask, prefill)
        region = Region(original, mask, boxes, size, crop.enlarged(boxes[0], usual, multiple) if boxes else None)
        parts, holes = region.cut(filled), region.cut_mask()
        cells = F.max_pool2d(holes[:, None], ratio)
        if packed > 1:
            cells = in_latent_frames(cells, packed)
        info = told(region, cells, model, steps, multiple // ratio)
        if local and boxes is None:
            canvas = CANVASES.setdefault(vae, inpaint.Canvas())
            samples = canvas.encode(parts, ratio, lambda value: vae.encode(as_image(value)))
            info += f"\n{canvas.share:.0%} of the canvas was encoded"
        else:
            samples = vae.encode(as_image(parts))
        check_channels(samples, model)
        latent = {"samples": samples, "noise_mask": cells}
        return io.NodeOutput(latent, region, as_image(parts), holes, info)


def check_channels(samples: Tensor, model: Any) -> None:
    """Is the VAE one of this MODEL's?"""
    if model is None:
        return
    space, made = model.get_model_object("latent_format"), samples.shape[1]
    fits = made == space.latent_channels
    with suppress(RuntimeError):  # some fold cells into channels
        seen = space.process_in(samples)
        fits = fits or (seen.ndim == samples.ndim and seen.shape[1] == space.latent_channels)
    if not fits:
        raise ValueError(
            f"the VAE makes latents of {made} channels and the model takes {space.latent_channels}; connect the VAE "
            "that belongs to this model"
        )


def extended(image: Tensor, mask: Tensor, sides: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    """Image and mask with new borders (left, right, top, bottom), which are to be painted."""
    if mask.shape[-2:] == UNPAINTED and not mask.any():
        mask = mask.new_zeros((len(mask), *image.shape[-2:]))
    mask = inpaint.check(image, mask)
    if not any(sides):
        return image, mask
    return F.pad(image, sides, mode="replicate"), F.pad(mask, sides, value=1.0)


def repaired(mask: Tensor, grow: int, soften: int, fill_holes: bool) -> Tensor:
    mask = masks.stabilise(mask)
    if fill_holes:
        mask = masks.fill_holes(mask)
    return masks.soften(masks.dilate(mask, grow), soften)


def patch_of_model(model: Any) -> int | None:
    """Latent cells per token; None for UNets and without a MODEL."""
    if model is None:
        return None
    net = model.model.diffusion_model
    try:
        sites_of(net)
    except NotLazy:
        return None
    return patch_of(net)[-1]


def reads_masked(model: Any) -> bool:
    """Is this an inpainting model, which is given mask and masked picture in channels of its own?"""
    if model is None:
        return False
    base = model.model
    net = base.diffusion_model
    # Flux Fill; twice the channels are a control LoRA
    fill = isinstance(base, comfy.model_base.Flux) and net.in_channels > 2 * net.out_channels
    return fill or "masked_image" in base.concat_keys


def masked_picture(region: "Region", vae: Any, latent: dict[str, Tensor]) -> dict[str, Tensor]:
    """What such a model is told: the picture with a grey hole, whatever the prefill is, and where the hole is."""
    grey = inpaint.prefill(region.cut(region.original), region.cut_mask(), "neutral")
    return {"concat_latent_image": vae.encode(as_image(grey)), "concat_mask": latent["noise_mask"]}


def pictures_per_frame(vae: Any) -> int:
    """How many pictures of a batch a frame of the latent holds; 1 for autoencoders of single pictures."""
    if getattr(vae, "latent_dim", 2) != 3 or getattr(vae, "not_video", False):
        return 1
    return vae.temporal_compression_decode() or 1


def in_latent_frames(cells: Tensor, packed: int) -> Tensor:
    """[f 1 h w] -> [1 1 t h w]: the first picture has a frame of its own, the others share; any of them touches it."""
    if (len(cells) - 1) % packed:
        kept = 1 + (len(cells) - 1) // packed * packed
        raise ValueError(
            f"got {len(cells)} pictures; this video autoencoder takes one and then {packed} at a time, so give {kept} "
            f"or {kept + packed}"
        )
    rest = rearrange(cells[1:], "(t p) 1 h w -> t p h w", p=packed).amax(1)
    return torch.cat([cells[0], rest])[None, None]


def usual_of(model: Any) -> int:
    """Pixels, each side, of what the model usually draws; 0 where that is not known."""
    if model is None:
        return 0
    family = detect(model.model.diffusion_model)
    return 0 if family is GENERIC else usual_size(model, family)


def boxes_of(
    mask: Tensor, area: str, model: Any, context: float, multiple: int, usual: int = 0, video: bool = False
) -> list[Box] | None:
    if area == "auto":
        area = "crop per island" if model is not None and patch_of_model(model) is None else "canvas"
    if area == "canvas" or not mask.any():
        return None
    if video:  # one box for all frames: a moving one would shake
        (box,) = inpaint.crops(mask.amax(0, keepdim=True), context, multiple, False, usual)
        return [replace(box, index=i) for i in range(len(mask))]
    return inpaint.crops(mask, context, multiple, area == "crop per island", usual)


def told(region: Region, cells: Tensor, model: Any, steps: int, patch: int) -> str:
    if not region.mask.any():
        return "the mask is empty: the picture is returned as it came"
    said = cost(region, cells, model, steps, patch)
    if reads_masked(model):
        said += (
            "\nan inpainting model, which reads the picture with a grey hole. Inpaint shows it one; otherwise "
            "take prefill neutral, or connect image and mask to Inpaint Model Conditioning"
        )
    return said


def cost(region: Region, cells: Tensor, model: Any, steps: int, patch: int) -> str:
    if (boxes := region.boxes) is not None:
        share = sum(b.area for b in boxes) / region.mask.numel()
        height, width = boxes[0].height, boxes[0].width
        said = f"{len(boxes)} crop(s) of {width} x {height}: {share:.1%} of the pixels; the rest is not seen"
        if region.sampled is not None:
            rows, columns = region.sampled
            said += (
                f"\nsampled {columns / width:.2f} times enlarged, at {columns} x {rows}: what this model is made for"
            )
        return said
    frames = cells[:, 0] if cells.ndim == 5 else cells
    tokens = inpaint.select(inpaint.token_mask(frames, (1, patch, patch)), DEFAULTS.ring, DEFAULTS.multiple)
    grid = (-(-cells.shape[-2] // patch), -(-cells.shape[-1] // patch))
    # assumed; the report after a run has the real number
    text_tokens = (FLUX if model is None else detect(model.model.diffusion_model)).text_tokens
    text = predicted(tokens, grid, text_tokens, steps, DEFAULTS)
    if model is None:
        return f"canvas, for a transformer with patches of {patch}:\n{text}"
    if patch_of_model(model) is None:
        return "canvas; this model computes all of it at every step. A crop would be faster"
    return f"canvas:\n{text}"


class LazyInpaint(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DMD_LazyInpaint",
            display_name="Lazy Inpaint",
            category="DMD/inpaint",
            description="Only the tokens of the hole are computed; the context's keys and values come from a bank. "
            "For Flux, Flux.2, Chroma, SD3, Qwen-Image, Z-Image and Wan. With m the computed share of N image tokens "
            "and T text tokens, a lazy step costs (mN+T)/(N+T) of a dense one.",
            search_aliases=["lazy", "inpaint", "faster inpaint", "lazydiffusion", "kv cache", "dmd"],
            inputs=[
                io.Model.Input("model", tooltip="A transformer; other models pass through, and info says why."),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default=DEFAULTS.mode,
                    tooltip="refresh: some steps are computed whole (12 steps and more). session: the context is "
                    "computed once per noise level and kept between runs, so later edits pay only for the hole. "
                    "trained: for a LoRA of Distill's lazy inpainting; the context is read once, clean and without the "
                    "hole. auto: by the number of steps. dense: no patch.",
                ),
                io.Int.Input(
                    "ring",
                    default=DEFAULTS.ring,
                    min=0,
                    max=8,
                    tooltip="Rings of tokens around the hole.",
                    advanced=True,
                ),
                io.Int.Input(
                    "warm", default=DEFAULTS.warm, min=1, max=100, tooltip="refresh: whole steps first.", advanced=True
                ),
                io.Int.Input(
                    "every",
                    default=DEFAULTS.every,
                    min=1,
                    max=100,
                    tooltip="refresh: then every so many.",
                    advanced=True,
                ),
                io.String.Input("session", default="canvas", tooltip="Name of what is kept between runs."),
                io.Int.Input(
                    "accepted",
                    default=0,
                    min=0,
                    max=999,
                    tooltip="session: how many edits are part of the canvas. One more accepts the last edit, one "
                    "less undoes it. Give the accepted picture as the next image.",
                ),
                io.Boolean.Input("forget", default=False, tooltip="session: start anew and free its memory."),
                io.Float.Input(
                    "memory",
                    default=DEFAULTS.fast_gib,
                    min=0.0,
                    max=1024.0,
                    step=0.5,
                    tooltip="GiB of kept context on the device.",
                    advanced=True,
                ),
                io.Float.Input(
                    "spill",
                    default=DEFAULTS.slow_gib,
                    min=0.0,
                    max=1024.0,
                    step=0.5,
                    tooltip="GiB of it in main memory, once the device has no room left.",
                    advanced=True,
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The patched model, for any sampler."),
                io.String.Output(display_name="info", tooltip="What will happen. The node shows what did happen."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, mode, ring, warm, every, session, accepted, forget, memory, spill) -> io.NodeOutput:
        config = LazyConfig(mode=mode, ring=ring, warm=warm, every=every, fast_gib=memory, slow_gib=spill)
        kept = SESSIONS.take(session)
        said = [kept.reset() if forget else kept.keep(accepted)]
        try:
            sites_of(model.model.diffusion_model)
        except NotLazy as reason:
            said.append(f"not lazy, all is computed: {reason}. In Prepare Inpaint area crop is faster")
            return io.NodeOutput(model, "\n".join(filter(None, said)))
        patch = Lazy(config, kept, shower(cls.hidden.unique_id if cls.hidden else None), SESSIONS)
        return io.NodeOutput(
            patch.patch(model),
            "\n".join(filter(None, [*said, *state(mode, kept), *untaught(mode, without_lora(model))])),
        )


def state(mode: str, session: Session) -> list[str]:
    lines = [f"mode {mode}"]
    if session.bank is not None:
        said = memory(session.bank, SESSIONS.beside(session).banks())
        lines.append(f"{said}, edits accepted: {session.accepted}")
    return lines


def shower(node_id: Any) -> Any:
    """Shows text on the node while a server runs, and logs it."""

    def show(text: str) -> None:
        logging.getLogger(__name__).info(text)
        server = getattr(sys.modules.get("server"), "PromptServer", None)
        if node_id is not None and getattr(server, "instance", None) is not None:
            server.instance.send_progress_text(text, node_id)

    return show


class CompositeInpaint(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DMD_CompositeInpaint",
            display_name="Composite Inpaint",
            category="DMD/inpaint",
            description="Decodes what was sampled (only around the hole), matches its colours on the ring around the "
            "hole, and puts it back. Where the mask is 0 the picture is the given one, to the bit.",
            search_aliases=["inpaint", "stitch", "composite", "blend", "colour match", "color match", "dmd"],
            inputs=[
                RegionType.Input("region", tooltip="From Prepare Inpaint."),
                io.Latent.Input("samples", tooltip="From the sampler."),
                io.Vae.Input("vae", tooltip="The one that Prepare Inpaint encoded with."),
                io.Float.Input(
                    "feather",
                    default=0.0,
                    min=0.0,
                    max=256.0,
                    step=1.0,
                    tooltip="Pixels over which the result fades in, inside the mask. The mask's own soft edge comes "
                    "on top.",
                ),
                io.Boolean.Input(
                    "match_colours", default=True, tooltip="Undoes the shift of the autoencoder and the model."
                ),
                io.Boolean.Input(
                    "local", default=True, tooltip="Decode only the hole and some context, where that saves work."
                ),
            ],
            outputs=[io.Image.Output(tooltip="The whole picture, the given one outside of the mask.")],
        )

    @classmethod
    def execute(cls, region, samples, vae, feather, match_colours, local) -> io.NodeOutput:
        out = region.original
        if region.mask.any():
            boxes, parts = decoded(region, samples["samples"], vae, local)
            parts = parts.to(out)
            if match_colours:
                parts = inpaint.match_ring(parts, crop.cut(out, boxes), crop.cut(region.mask, boxes))
            out = inpaint.composite(out, inpaint.paste(out, parts, boxes), region.mask, feather)
        rows, columns = region.size
        return io.NodeOutput(as_image(out[..., :rows, :columns]))


def decoded(region: Region, latent: Tensor, vae: Any, local: bool) -> tuple[list[Box], Tensor]:
    """The pictures and where they belong."""
    batch, (height, width) = len(region.original), region.original.shape[-2:]
    if region.boxes is not None:
        parts = checked(vae_picture(vae, latent), len(region.boxes))
        return region.boxes, crop.resized(parts, (region.boxes[0].height, region.boxes[0].width))
    boxes = [Box(i, 0, 0, height, width) for i in range(batch)]
    ratio = height // latent.shape[-2]
    box = inpaint.box_of((region.mask > 0).any(0))
    assert box is not None
    top, left = (max(0, start // ratio - PAD) for start in (box.top, box.left))
    bottom = min(latent.shape[-2], -(-(box.top + box.height) // ratio) + PAD)
    right = min(latent.shape[-1], -(-(box.left + box.width) // ratio) + PAD)
    if local and (bottom - top) * (right - left) < 0.6 * latent.shape[-2] * latent.shape[-1]:
        latent = latent[..., top:bottom, left:right]
        size = ((bottom - top) * ratio, (right - left) * ratio)
        boxes = [Box(i, top * ratio, left * ratio, *size) for i in range(batch)]
    return boxes, checked(vae_picture(vae, latent), batch)


def vae_picture(vae: Any, latent: Tensor) -> Tensor:
    image = vae.decode(latent)
    return picture(image.reshape(-1, *image.shape[-3:]) if image.ndim == 5 else image).clamp(0, 1)


def checked(parts: Tensor, count: int) -> Tensor:
    if len(parts) != count:
        raise ValueError(
            f"the sampler returned {len(parts)} pictures and Prepare Inpaint made {count}; "
            "connect the latent that came from this Prepare Inpaint"
        )
    if not torch.isfinite(parts).all():
        raise ValueError("the decoded picture holds NaN; the model or the VAE overflowed, try fp32 for the VAE")
    return parts


class Inpaint(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DMD_Inpaint",
            display_name="Inpaint",
            category="DMD/inpaint",
            description="Prepare, lazy patch, sampler and composite in one node. Outside the mask the picture stays as "
            "it is, to the bit.",
            search_aliases=["inpaint", "outpaint", "lazy", "fill", "remove object", "dmd"],
            inputs=[
                io.Image.Input("image", tooltip="The picture, or a batch with one mask each."),
                io.Mask.Input("mask", tooltip="1 is made anew, 0 stays as it is to the bit."),
                io.Model.Input("model", tooltip="Transformers are computed lazily, UNets on crops with context."),
                io.Vae.Input("vae", tooltip="Encodes the picture and decodes the hole."),
                io.Conditioning.Input("positive", tooltip="What shall stand in the hole."),
                io.Conditioning.Input("negative", tooltip="Has no effect at cfg 1."),
                io.Int.Input("seed", default=0, min=0, max=2**64 - 1, control_after_generate=True, tooltip="Noise."),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="0, with the sampler automatic: what the model was made for, else 20.",
                ),
                io.Float.Input(
                    "cfg",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="0, with the sampler automatic: what the model was made for, else what its family usually "
                    "is given. 1 is none.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=[AUTO, *comfy.samplers.KSampler.SAMPLERS],
                    default=AUTO,
                    tooltip="automatic recognises few-step models and samples them as they were trained, any other "
                    "model by euler. The others are as in KSampler.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.KSampler.SCHEDULERS,
                    tooltip="As in KSampler; has no effect while the sampler is automatic.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Below 1 the prefill shines through; few-step models should stay on their trained grid.",
                ),
                io.Combo.Input("mode", options=list(MODES), default=DEFAULTS.mode, tooltip="As in Lazy Inpaint."),
                io.Combo.Input(
                    "prefill",
                    options=["none", *inpaint.PREFILLS],
                    default="push-pull",
                    tooltip="What stands in the hole before sampling.",
                ),
                io.Int.Input("grow", default=8, min=-128, max=256, tooltip="Pixels by which the mask grows."),
                io.Int.Input("soften", default=8, min=0, max=128, tooltip="Pixels over which its edge fades."),
            ],
            outputs=[
                io.Image.Output(tooltip="The whole picture, the given one outside of the mask."),
                io.String.Output(display_name="info", tooltip="Tokens, cost, notices."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, image, mask, model, vae, positive, negative, seed, steps, cfg, sampler_name, scheduler, denoise, mode,
        prefill, grow, soften,
    ) -> io.NodeOutput:  # fmt: skip
        size = image.shape[1], image.shape[2]
        way = way_of(model, size, vae, steps, cfg, sampler_name, scheduler, denoise, graph_of(cls.hidden))
        latent, region, _, _, info = PrepareInpaint.execute(
            image, mask, vae, "auto", 1.5, grow, soften, True, prefill, 0, 0, 0, 0, way.steps, model, mode == "session"
        ).args
        info = "\n".join(filter(None, [info, way.why]))
        if not region.mask.any():
            return io.NodeOutput(image, info)
        if reads_masked(model):
            told_too = masked_picture(region, vae, latent)
            positive, negative = (node_helpers.conditioning_set_values(c, told_too) for c in (positive, negative))
        node_id = cls.hidden.unique_id if cls.hidden else None
        lazy = Lazy(LazyConfig(mode=mode), SESSIONS.take(f"node {node_id}"), shower(node_id), SESSIONS)
        patched = lazy.patch(way.model) if region.boxes is None else way.model
        guider = guider_of(patched, positive, negative, way.cfg)
        samples = sample_latent(patched, guider, way.sampler, way.sigmas, latent, seed)["samples"]
        out = CompositeInpaint.execute(region, {"samples": samples}, vae, 0.0, True, True).args[0]
        return io.NodeOutput(out, "\n".join(filter(None, [info, lazy.text if region.boxes is None else ""])))
