"""The profile table against independent code, and recognition over every row and over decoys."""

import dataclasses
import hashlib
import json
import math
import re
from itertools import pairwise
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import dmd_core.weights.profiles as module
from dmd_core.families import FAMILIES
from dmd_core.schedule import Discrete, Flow, shift_time
from dmd_core.weights.header import content_hash
from dmd_core.weights.pairings import Setup, wrong_pairings
from dmd_core.weights.profiles import DATA, GRIDS, SURE, Evidence, bare_name, profiles, recognise, recognise_file
from dmd_core.weights.recipe import RECIPE_KEY, Recipe
from dmd_core.weights.structure import identify

ROWS = profiles()
VP = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
STATUS = {"computed", "read", "third-party", "memory"}


def sdxl():
    return Discrete.from_betas("scaled_linear", 0.00085, 0.012, 1000)


# --- the numbers ----------------------------------------------------------------------------------------------------


def trailing(p):
    scheduler = diffusers.DDIMScheduler(**VP, timestep_spacing="trailing")
    scheduler.set_timesteps(p.steps)
    return scheduler.timesteps


def turbo(p):
    scheduler = diffusers.DDIMScheduler(**VP, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    return scheduler.timesteps[: p.steps]


def lcm(p):
    scheduler = diffusers.LCMScheduler(**VP)
    scheduler.set_timesteps(p.steps)
    return scheduler.timesteps


def tcd(p):
    scheduler = diffusers.TCDScheduler(**VP)
    scheduler.set_timesteps(p.steps)
    return scheduler.timesteps


def plain(n):
    return np.linspace(1.0, 1 / n, n)


def flow_shift(p):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=p.shift)
    scheduler.set_timesteps(sigmas=plain(p.steps))
    return scheduler.sigmas[:-1]


def with_mu(n, mu, sigmas=None):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=None)
    scheduler.set_timesteps(sigmas=plain(n) if sigmas is None else sigmas, mu=mu)
    return scheduler.sigmas[:-1]


def flow_mu(p):
    return with_mu(p.steps, {"qwen-lightning-lora": math.log(3), "krea2-turbo": 1.15}[p.id])


def flux(p):
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    return with_mu(p.steps, calculate_shift(4096, 256, 4096, 0.5, 1.15))


def flux2(p):
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    return with_mu(p.steps, compute_empirical_mu(4096, p.steps))


def fal_flux2(p):
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    given = np.array([1.0, 0.6509, 0.4374, 0.2932, 0.1893, 0.1108, 0.0495, 0.00031])
    return with_mu(8, compute_empirical_mu(4096, 8), given)


def ltx2(p):
    from diffusers.pipelines.ltx2 import utils

    return {8: utils.DISTILLED_SIGMA_VALUES, 3: utils.STAGE_2_DISTILLED_SIGMA_VALUES}[p.steps]


def scm(p):
    scheduler = diffusers.SCMScheduler()
    scheduler.set_timesteps(num_inference_steps=2, max_timesteps=1.57080, intermediate_timesteps=1.3)
    t = scheduler.timesteps[:-1].double()
    return t.sin() / (t.sin() + t.cos())


def trig(p):
    noise = torch.tensor([math.atan(80), 1.5, 1.4, 1.0], dtype=torch.float64).tan()  # EDM sigma
    return (noise / (1 + noise))[: p.steps]


def piflow(p):
    scheduler = diffusers.PiflowScheduler(shift=3.2, final_step_size_scale=0.5)
    scheduler.set_timesteps(p.steps)
    return scheduler.sigmas[:-1]


def lcm_flow(p):
    """PCM's own schedulers for SD3: LCM's timesteps as shares of the time, shifted."""
    times = (np.asarray(lcm(p), dtype=np.float64) + 1) / 1000
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=p.shift)
    scheduler.set_timesteps(sigmas=times)
    return scheduler.sigmas[:-1]


INDEPENDENT = {
    "trailing": trailing,
    "turbo": turbo,
    "lcm": lcm,
    "lcm-flow": lcm_flow,
    "tcd": tcd,
    "flow-shift": flow_shift,
    "flow-mu": flow_mu,
    "flux": flux,
    "flux2": flux2,
    "fal-flux2": fal_flux2,
    "ltx2": ltx2,
    "scm": scm,
    "trig": trig,
    "piflow": piflow,
}


@pytest.mark.parametrize("profile", [p for p in ROWS.values() if p.recompute in INDEPENDENT], ids=lambda p: p.id)
def test_levels_are_what_independent_code_gives(profile):
    checked = 0
    for steps in profile.allowed:
        # TCD's scheduler takes at most its 50 original steps; a few are enough. pi-Flow's list is for 4 steps
        if steps > 16 or (profile.levels and steps not in profile.levels):
            continue
        at = profile.at(steps)
        theirs = torch.as_tensor(np.asarray(INDEPENDENT[profile.recompute](at), dtype=np.float64))
        ours = torch.tensor([float(v) for v in at.trained()], dtype=torch.float64)
        tolerance = 0 if profile.space == "vp" else 6e-4 if profile.levels else 1e-6
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)
        checked += 1
    assert checked


def test_the_recomputation_would_notice_a_wrong_number():
    turbo_as_trailing = ROWS["sdxl-turbo"].at(4)
    assert turbo_as_trailing.trained() != trailing(turbo_as_trailing).tolist()
    assert abs(ROWS["z-image-turbo"].trained()[1] - plain(8)[1]) > 0.05


def test_the_published_lists_of_sigmas():
    """The numbers in the notes, typed in by hand."""
    known = {
        ("flux-schnell", 4): [1, 0.75, 0.5, 0.25],
        ("sd35-large-turbo", 4): [1, 0.9, 0.75, 0.5],
        ("pcm-sd3-lora", 4): [1, 0.9048, 0.75, 0.5132],  # .76 / (1/3 + .76 * 2/3) ...
        ("pcm-sd3-stochastic-lora", 2): [1, 0.75],
        ("flux2-klein", 4): [1, 0.9674, 0.9081, 0.7672],
        ("z-image-turbo", 8): [1, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3],
        ("qwen-2step-lora", 2): [1, 0.75],
        ("wan21-lightx2v-lora", 4): [1, 0.9375, 0.8333, 0.625],
        ("dmd2-sdxl-4step", 4): [999, 749, 499, 249],
        ("dmd2-sdxl-1step", 1): [399],
        ("lcm-lora-sdxl", 4): [999, 759, 499, 259],
        ("lcm-lora-sdxl", 8): [999, 879, 759, 639, 499, 379, 259, 139],
        ("sdxl-lightning", 8): [999, 874, 749, 624, 499, 374, 249, 124],
        ("sdxl-turbo", 4): [999, 899, 799, 699],
        ("hyper-sdxl-1step-unet", 1): [800],
    }
    for (name, steps), levels in known.items():
        assert ROWS[name].at(steps).trained() == pytest.approx(levels, abs=6e-5), name


def test_the_shift_of_flux_follows_the_resolution():
    small, large = ROWS["flux2-klein"].trained(512, 512), ROWS["flux2-klein"].trained(2048, 2048)
    assert small[1] < ROWS["flux2-klein"].trained()[1] < large[1]
    assert ROWS["flux-schnell"].trained(512, 512) == ROWS["flux-schnell"].trained(2048, 2048)


@pytest.mark.parametrize("profile", ROWS.values(), ids=lambda p: p.id)
def test_every_row_is_complete_and_says_where_its_numbers_come_from(profile):
    needed = {"levels", "gamma", "cfg"} | ({"lora_scale"} if profile.kinds == ("lora",) else set())
    if profile.grid in ("shift", "flux", "flux2"):
        needed |= {"shift"}
    if profile.sha256:
        needed |= {"sha256"}
    assert needed <= set(profile.sources), needed - set(profile.sources)
    assert all(status in STATUS and where for status, where in profile.sources.values())
    assert profile.grid in GRIDS
    assert profile.keep in ("time", "tcd", "ancestral")
    assert profile.steps in profile.allowed
    assert profile.cfg[1] <= profile.cfg[0] <= profile.cfg[2]
    assert profile.lora_scale[1] <= profile.lora_scale[0] <= profile.lora_scale[2]
    assert profile.negative in ("yes", "weak", "no")
    assert (profile.negative == "yes") == (profile.cfg[0] > 1.2)
    assert profile.files or profile.hints
    assert profile.recompute in {"", "comfy", *INDEPENDENT}  # comfy: tests/test_comfy_samplers.py
    assert set(profile.sha256.values()) <= set(profile.allowed)
    levels = profile.trained()
    assert len(levels) == profile.steps
    assert all(a > b for a, b in pairwise(levels))
    assert max(levels) <= (999 if profile.space == "vp" else 1)


def test_unverified_rows_say_so_and_computed_is_not_claimed_without_a_recomputation():
    unverified = [p for p in ROWS.values() if not p.verified]
    assert unverified
    for p in unverified:
        assert any("unverified" in c for c in p.caveats()), p.id
        assert p.sources["levels"][0] != "computed", p.id
    assert not any("unverified" in c for p in ROWS.values() if p.verified for c in p.caveats())
    assert any("cannot be sampled here" in c for c in ROWS["piflow-flux"].caveats())


def test_the_data_is_one_json_without_repeated_ids():
    rows = json.loads(DATA.read_text())["profiles"]
    assert len({r["id"] for r in rows}) == len(rows) == len(ROWS)
    hashes = [h for p in ROWS.values() for h in p.sha256]
    assert len(set(hashes)) == len(hashes)
    assert all(re.fullmatch("[0-9a-f]{64}", h) for h in hashes)
    assert all(set(p.bytes) <= set(p.sha256) for p in ROWS.values())


# --- denoise --------------------------------------------------------------------------------------------------------


DENOISE = (0.05, 0.3, 0.5, 0.75, 0.9, 1.0)


@pytest.mark.parametrize("profile", ROWS.values(), ids=lambda p: p.id)
def test_denoise_stays_on_the_trained_levels(profile):
    schedule = sdxl() if profile.space == "vp" else Flow(profile.shift_at())
    for denoise in DENOISE:
        trained = set(profile.trained())
        if profile.grid == "lcm" and not profile.levels:
            trained = {20 * k - 1 for k in range(1, 51)}
            if profile.space == "flow":
                trained = {s.item() for s in shift_time((torch.tensor(sorted(trained)).double() + 1) / 1000, 3.0)}
            if int(50 * denoise) < profile.steps:
                with pytest.raises(ValueError, match="fewer steps or a higher strength"):
                    profile.kept(denoise)
                continue
        kept = profile.kept(denoise)
        assert kept
        assert set(kept) <= trained
        assert kept == profile.trained() or denoise < 1
        sigmas = profile.sigmas(schedule, denoise)
        assert len(sigmas) == len(kept) + 1
        assert sigmas[-1] == 0
        if profile.space == "vp":
            assert schedule.timestep(sigmas[:-1]).tolist() == kept


def test_denoise_takes_the_share_of_time_not_of_steps():
    assert ROWS["dmd2-sdxl-4step"].kept(0.5) == [499, 249]
    assert ROWS["dmd2-sdxl-4step"].kept(0.9) == [749, 499, 249], "pure noise would drop the given image"
    assert ROWS["sdxl-turbo"].at(4).kept(0.5) == [699], "Turbo knows no lighter level"
    assert ROWS["z-image-turbo"].kept(0.5) == pytest.approx([0.75, 0.6429, 0.5, 0.3], abs=1e-4)
    assert ROWS["lcm-lora-sdxl"].kept(0.5) == [499, 379, 259, 139]
    # control: the stock way, int(steps / denoise) steps and their tail, leaves the grid
    stock = [999 - int(x * 1000 / 5) for x in range(5)][-4:]
    assert not set(stock) <= set(ROWS["dmd2-sdxl-4step"].trained())


# --- recognition ----------------------------------------------------------------------------------------------------

CROSS = {"sd15": 768, "sd2": 1024, "sdxl": 2048}


def unet(family, lcm=False):
    found = {
        "conv_in.weight": (320, 4, 3, 3),
        "time_embedding.linear_1.weight": (1280, 320),
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": (640, CROSS[family]),
        "down_blocks.1.resnets.0.conv1.weight": (640, 320, 3, 3),
    }
    return found | ({"time_embedding.cond_proj.weight": (320, 256)} if lcm else {})


def unet_lora(family, fast=True):
    stem = "lora_unet_down_blocks_1_"
    block = stem + "attentions_0_transformer_blocks_0_attn2_to_k"
    found = {
        f"{block}.lora_down.weight": (64, CROSS[family]),
        f"{block}.lora_up.weight": (640, 64),
        f"{block}.alpha": (),
    }
    if fast:
        for layer, inside in (("resnets_0_conv1", (64, 640, 3, 3)), ("resnets_0_time_emb_proj", (64, 1280))):
            found |= {f"{stem}{layer}.lora_down.weight": inside, f"{stem}{layer}.lora_up.weight": (640, 64)}
    return found


def lora(layers):
    return {f"{n}.lora_{h}.weight": s for n, (i, o) in layers.items() for h, s in (("A", (64, i)), ("B", (o, 64)))}


MODELS = {
    "flux": {
        "img_in.weight": (3072, 64),
        "double_blocks.0.img_attn.qkv.weight": (9216, 3072),
        "double_blocks.0.img_mlp.0.weight": (12288, 3072),
        "single_blocks.0.linear1.weight": (21504, 3072),
        "double_blocks.0.img_mod.lin.weight": (18432, 3072),
    },
    "flux2": {
        "double_stream_modulation_img.lin.weight": (18432, 3072),
        "double_blocks.0.img_attn.qkv.weight": (9216, 3072),
        "single_blocks.0.linear1.weight": (27648, 3072),
    },
    "sd3": {
        "joint_blocks.0.x_block.attn.qkv.weight": (7296, 2432),
        "joint_blocks.0.x_block.mlp.fc1.weight": (9728, 2432),
    },
    "z_image": {
        "layers.0.attention.qkv.weight": (11520, 3840),
        "noise_refiner.0.feed_forward.w1.weight": (10240, 3840),
        "layers.0.adaLN_modulation.0.weight": (15360, 256),
    },
    "qwen_image": {
        "transformer_blocks.0.img_mlp.net.0.proj.weight": (12288, 3072),
        "transformer_blocks.0.img_mod.1.weight": (18432, 3072),
    },
    "wan": {"blocks.0.self_attn.q.weight": (5120, 5120), "blocks.0.cross_attn.k.weight": (5120, 5120)},
}
LORAS = {
    "flux": lora({f"transformer.single_transformer_blocks.{i}.proj_mlp": (3072, 12288) for i in range(38)}),
    "flux2": lora({"diffusion_model.double_stream_modulation_img.lin": (3072, 18432)}),
    "sd3": lora(
        {
            "transformer.transformer_blocks.0.attn.add_q_proj": (1536, 1536),
            "transformer.transformer_blocks.0.attn.to_q": (1536, 1536),
        }
    ),
    "z_image": lora({"diffusion_model.layers.0.attention.to_q": (3840, 3840)}),
    "qwen_image": lora({"transformer_blocks.0.img_mlp.net.0.proj": (3072, 12288)}),
    "wan": lora(
        {"diffusion_model.blocks.0.self_attn.q": (5120, 5120), "diffusion_model.blocks.0.cross_attn.k": (5120, 5120)}
    ),
    "pixart": lora({"transformer.transformer_blocks.0.attn1.to_q": (1152, 1152)}),
}
OTHER_MODEL = {"strange_blocks.0.mixer.weight": (64, 64), "strange_blocks.1.mixer.weight": (64, 64)}
OTHER_LORA = lora({"strange_blocks.0.mixer": (64, 64)})


def shapes_for(profile, kind=None):
    kind = kind or profile.kinds[0]
    if profile.base in CROSS:
        return unet_lora(profile.base) if kind == "lora" else unet(profile.base, profile.embedding)
    if kind == "lora":
        return LORAS.get(profile.base, OTHER_LORA)
    return MODELS.get(profile.base, OTHER_MODEL)


def spell(pattern):
    """One name that a pattern of published names accepts."""
    name = re.sub(r"\(\?P<\w+>([^)]*)\)", lambda m: "(" + m[1] + ")", pattern)
    while "(" in name:  # innermost groups: the first alternative, or none where the group is optional
        name = re.sub(r"\(([^()]*)\)(\?)?", lambda m: "" if m[2] else m[1].split("|")[0], name)
    name = re.sub(r"\[([^\]])[^\]]*\]\??", r"\1", name)
    return name.replace(r"\d+", "64").replace(r"\d", "1").replace("\\", "").replace("-?", "")


PUBLISHED = [(p, f) for p in ROWS.values() for f in p.files]


@pytest.mark.parametrize(("profile", "pattern"), PUBLISHED, ids=[f"{p.id}:{f[:40]}" for p, f in PUBLISHED])
def test_every_published_file_is_recognised_and_nothing_else_is(profile, pattern):
    name = spell(pattern)
    assert re.fullmatch(pattern, name), name
    match = recognise_file(Evidence(name=name.upper() + "_fp16.safetensors", shapes=shapes_for(profile)))
    assert match.profile is not None, match.reason
    assert match.profile.id == profile.id
    assert match.sure == "likely"
    assert name in match.reason
    # the same name on a file of another family or kind is mislabelled, and said to be
    wrong = unet_lora("sd15") if profile.base != "sd15" else unet_lora("sdxl")
    liar = recognise_file(Evidence(name=name, shapes=wrong))
    if profile.base in FAMILIES:
        assert liar.profile is None
        assert "mislabelled" in liar.reason
    # the right shapes under a name that says nothing are never this profile, unless they prove it
    silent = recognise_file(Evidence(name="my model v3.safetensors", shapes=shapes_for(profile)))
    assert silent.profile is None or (profile.embedding and silent.profile.id == profile.id)


def test_every_file_that_its_authors_name_has_its_profile():
    text = (Path(__file__).parent / "golden" / "published_files.txt").read_text(encoding="utf-8")
    rows = [line.split() for line in text.splitlines() if not line.startswith("#")]
    assert len(rows) > 100
    for profile, name in rows:
        match = recognise_file(Evidence(name=name))
        assert (match.profile.id if match.profile else match.reason) == profile, name
    # families that have published no file of a name of their own
    assert set(ROWS) - {profile for profile, _ in rows} == {
        "dmd2-sd15-1step",
        "senseflow-sdxl",
        "self-forcing-wan",
        "fastgen-wan",
        "anyflow",
        *(f"pcm-{a}-lora" for a in ("sd15-normalcfg", "sd15-lcmlike", "sdxl-smallcfg")),
    }


def test_names_belong_to_one_row_only():
    for profile, pattern in PUBLISHED:
        name = spell(pattern)
        owners = [p.id for p in ROWS.values() if any(re.fullmatch(f, bare_name(name)) for f in p.files)]
        assert owners == [profile.id], name


@pytest.mark.parametrize("profile", [p for p in ROWS.values() if p.sha256], ids=lambda p: p.id)
def test_a_known_hash_names_a_file_that_was_renamed(profile):
    for digest, steps in profile.sha256.items():
        match = recognise_file(
            Evidence(name="pytorch_lora_weights.safetensors", sha256=digest.upper(), shapes=shapes_for(profile))
        )
        assert match.profile == profile.at(steps)
        assert match.sure == "likely"
    assert recognise_file(Evidence(name="pytorch_lora_weights.safetensors", shapes=shapes_for(profile))).profile is None


def test_the_size_rejects_before_the_hash(tmp_path, monkeypatch):
    profile = ROWS["hyper-sdxl-cfg-lora"]
    digest, size = next(iter(profile.bytes.items()))
    lora = Evidence(name="x.safetensors", sha256=digest, shapes=unet_lora("sdxl"))
    assert recognise_file(dataclasses.replace(lora, bytes=size)).profile == profile.at(8)
    assert recognise_file(lora).profile == profile.at(8), "a size that nobody knows rejects nothing"
    assert recognise_file(dataclasses.replace(lora, bytes=size + 1)).profile is None

    hashed = []
    monkeypatch.setattr(module, "content_hash", lambda path: hashed.append(path.name) or content_hash(path))
    files = {"sdxl": unet_lora("sdxl"), "qwen": LORAS["qwen_image"]}
    paths = {name: tmp_path / f"{name}.safetensors" for name in files}
    for name, shapes in files.items():
        save_file({k: torch.zeros(s, dtype=torch.float16) for k, s in shapes.items()}, paths[name])
    for path in paths.values():
        Evidence.look(path)
    assert hashed == ["sdxl.safetensors"], "no hash of a Qwen LoRA is known; of SDXL some have no known size"
    for row in ROWS.values():
        if row.sha256 and row.base == "sdxl":
            sized = dict.fromkeys(row.sha256, 7)
            monkeypatch.setitem(profiles(), row.id, dataclasses.replace(row, bytes=sized))
    Evidence.look(paths["sdxl"])
    assert hashed == ["sdxl.safetensors"], "all known files have another size"


def test_only_a_lora_that_tells_nothing_is_hashed_and_then_recognised(tmp_path, monkeypatch):
    """The files are small ones of the same shapes, so the list is given their hash."""
    hashed = []
    monkeypatch.setattr(module, "content_hash", lambda path: hashed.append(path.name) or content_hash(path))

    def write(name, shapes, metadata=None):
        path = tmp_path / f"{name}.safetensors"
        save_file({k: torch.zeros(s, dtype=torch.float16) for k, s in shapes.items()}, path, metadata)
        return path

    nameless = write("pytorch_lora_weights", unet_lora("sdxl"))
    digest = hashlib.sha256(nameless.read_bytes()).hexdigest()
    assert recognise_file(Evidence.look(nameless)).profile is None
    known = dataclasses.replace(ROWS["tcd-sdxl-lora"], sha256={digest: 4})
    monkeypatch.setitem(profiles(), "tcd-sdxl-lora", known)
    assert recognise_file(Evidence.look(nameless)).profile == known
    hashed.clear()
    Evidence.look(write("lcm-lora-sdxl", unet_lora("sdxl")))
    Evidence.look(write("style", unet_lora("sdxl", fast=False), {"ss_output_name": "style"}))
    Evidence.look(write("model", unet("sdxl")))
    assert hashed == []
    nameless.write_bytes(nameless.read_bytes() + b"\0")  # another file under the same name is looked at again
    assert content_hash(nameless) != digest


# a name that its authors use for what they have not published under a name of its own
HINTED = {
    "dmd2-sd15-1step": "DMD2-SDv1.5",
    "senseflow-sdxl": "SenseFlow-SDXL",
    "fastgen-wan": "FastGen_DMD2_Wan2.1-T2V",
    "anyflow": "AnyFlow-Wan2.1-T2V-1.3B",
}


def test_every_row_is_known_by_a_published_name_or_by_a_hint():
    assert set(HINTED) == {p.id for p in ROWS.values() if not p.files}


@pytest.mark.parametrize("profile", HINTED)
def test_a_row_without_a_published_name_is_guessed_by_its_hint(profile):
    match = recognise_file(Evidence(name=f"{HINTED[profile]}.safetensors", shapes=shapes_for(ROWS[profile])))
    assert (match.profile and match.profile.id, match.sure) == (profile, "guess"), match.reason
    other = unet("sdxl") if ROWS[profile].base != "sdxl" else unet("sd15")
    control = recognise_file(Evidence(name=f"{HINTED[profile]}.safetensors", shapes=other)).profile
    assert control is None or control.id != profile


@pytest.mark.parametrize("variant", ["deterministic", "stochastic"])
@pytest.mark.parametrize("shift", [1, 3])
def test_pcm_for_sd3_takes_variant_and_shift_from_the_name(variant, shift):
    file = Evidence(name=f"pcm_{variant}_4step_shift{shift}.safetensors", shapes=LORAS["sd3"])
    profile = recognise_file(file).profile
    assert (profile.shift, profile.gamma) == (shift, 1.0 if variant == "stochastic" else 0.0)
    plain = [1.0, 0.76, 0.5, 0.26]  # authors' 50 levels, every 12.5th rounded down
    assert profile.trained() == pytest.approx([shift * t / (1 + (shift - 1) * t) for t in plain])
    nameless = Evidence(name=f"pcm_{variant}_4step.safetensors", shapes=LORAS["sd3"])
    assert recognise_file(nameless).profile is None, "a shift that the name does not tell is not assumed"


def test_steps_and_the_half_of_a_pair_are_read_from_the_name():
    def named(name, profile):
        return recognise_file(Evidence(name=name, shapes=shapes_for(ROWS[profile]))).profile

    assert named("sdxl_lightning_8step_lora.safetensors", "sdxl-lightning-lora").steps == 8
    assert named("Hyper-SD15-12steps-CFG-lora.safetensors", "hyper-sd15-cfg-lora").steps == 12
    assert named("wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors", "wan22-lightning-lora").part == "high"
    assert named("wan2.2_i2v_lightx2v_4steps_lora_v1_low_noise.safetensors", "wan22-lightning-lora").part == "low"
    assert named("Qwen-Image-Edit-2511-Lightning-4steps-V1.0-bf16.safetensors", "qwen-lightning-lora").steps == 4


MERGE = unet("sdxl") | {"first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3)}
DECOYS = {
    "a style made on a turbo model": ("pixel_art_style_z_image_turbo.safetensors", LORAS["z_image"]),
    "another one": ("zimage_turbo_anime_style.safetensors", LORAS["z_image"]),
    "hyper in another word": ("hyperrealism_v2.safetensors", unet_lora("sdxl", fast=False)),
    "hyper in another word, many layers": ("hyperrealism_v2.safetensors", unet_lora("sdxl")),
    "training steps are not sampling steps": ("mylora_3000steps.safetensors", unet_lora("sdxl")),
    "training steps beside a hint": ("dmd2_3000steps.safetensors", unet_lora("sdxl")),
    "a style for DMD2": ("film_look_for_dmd2.safetensors", unet_lora("sdxl", fast=False)),
    "lightning as a subject": ("lightning_bolts_style.safetensors", unet_lora("sdxl", fast=False)),
    "turbo merges want other settings": ("dreamshaperXL_v21TurboDPMSDE.safetensors", MERGE),
    "turbo as a subject": ("turbo_engine_car.safetensors", unet_lora("sdxl", fast=False)),
    "the base of klein is not distilled": ("flux-2-klein-base-4b.safetensors", MODELS["flux2"]),
    "the base of Z-Image is not distilled": ("z_image_bf16.safetensors", MODELS["z_image"]),
    "undistilled on purpose": ("z_image_de-turbo_v1.safetensors", MODELS["z_image"]),
    "an adapter against turbo": ("zimage_turbo_training_adapter_v2.safetensors", MODELS["z_image"]),
    "music": ("ace_step_1.5_turbo_aio.safetensors", OTHER_MODEL),
    "3D": ("hunyuan3d-dit-v2-mv-turbo_fp16.safetensors", OTHER_MODEL),
    "plain Flux dev": ("flux1-dev.safetensors", MODELS["flux"] | {"guidance_in.in_layer.weight": (3072, 256)}),
    "schnell that takes a guidance scale": (
        "flux1-schnell.safetensors",
        MODELS["flux"] | {"guidance_in.in_layer.weight": (3072, 256)},
    ),
    "a plain SDXL checkpoint": ("sd_xl_base_1.0.safetensors", MERGE),
    "an accelerator without a name": ("pytorch_lora_weights.safetensors", unet_lora("sdxl")),
    "a VAE under a famous name": ("sdxl_lightning_4step.safetensors", {"decoder.conv_in.weight": (512, 4, 3, 3)}),
    "no tensors at all under a famous name": ("dmd2_sdxl_4step_lora.safetensors", {}),
    "a Qwen LoRA that lost its name": ("speed.safetensors", LORAS["qwen_image"]),
    "an SD1.5 file called SDXL": ("sdxl_lightning_4step_unet.safetensors", unet("sd15")),
}


@pytest.mark.parametrize("decoy", DECOYS)
def test_decoys_are_left_unsure(decoy):
    name, shapes = DECOYS[decoy]
    match = recognise_file(Evidence(name=name, shapes=shapes))
    assert match.profile is None, f"{decoy}: taken for {match.profile and match.profile.id}"
    assert match.sure == "unsure"
    assert len(match.reason) > 20


def test_a_merge_with_a_hint_is_a_guess_that_says_so():
    match = recognise_file(Evidence(name="myMergeXL_v9_DMD2.safetensors", shapes=MERGE))
    assert (match.profile.id, match.sure) == ("dmd2-sdxl-4step", "guess")
    assert "guess" in match.reason
    renamed = recognise_file(Evidence(name="hyper-sdxl 8steps renamed.safetensors", shapes=unet_lora("sdxl")))
    assert (renamed.profile.id, renamed.profile.steps, renamed.sure) == ("hyper-sdxl-lora", 8, "guess")


def test_a_full_lcm_unet_is_proven_by_its_shapes():
    match = recognise_file(Evidence(name="unet.safetensors", shapes=unet("sdxl", lcm=True)))
    assert (match.profile.id, match.sure) == ("lcm-sdxl", "likely")
    assert recognise_file(Evidence(name="unet.safetensors", shapes=unet("sdxl"))).profile is None


def test_a_name_alone_is_not_looked_into_and_says_so():
    published = recognise_file(Evidence(name="dmd2_sdxl_4step_lora_fp16.safetensors"))
    assert published.profile.id == "dmd2-sdxl-4step-lora"
    assert "not looked into" in published.reason
    hinted = recognise_file(Evidence(name="my_dmd2_thing.safetensors"))
    assert hinted.profile is None
    assert {p.id for p in hinted.candidates} >= {"dmd2-sdxl-4step", "dmd2-sdxl-4step-lora"}


def test_metadata_names_a_renamed_file():
    named = Evidence(name="x.safetensors", metadata={"ss_output_name": "lcm-lora-sdxl"}, shapes=unet_lora("sdxl"))
    assert recognise_file(named).profile.id == "lcm-lora-sdxl"


def own(**changes):
    values = {"family": "sdxl", "objective": "dmd2", "steps": 4, "timesteps": (999, 749, 499, 249), "prediction": "eps"}
    return {RECIPE_KEY: json.dumps({**values, **changes})}


def test_our_own_recipe_wins_and_is_certain():
    recipe = Recipe(family="sdxl", objective="dmd2", steps=2, timesteps=(999, 499), prediction="eps", cfg=1.0)
    file = Evidence(
        name="sdxl_lightning_4step_lora.safetensors", metadata={RECIPE_KEY: recipe.to_json()}, shapes=unet_lora("sdxl")
    )
    match = recognise_file(file)
    assert match.sure == "certain"
    assert match.profile.trained() == [999, 499]
    assert match.profile.sigmas(sdxl()).tolist() == pytest.approx([14.6146, 1.6129, 0.0], abs=1e-3)
    flow = recognise_file(
        Evidence(metadata=own(family="wan", timesteps=(), sigmas=(1.0, 0.9, 0.75, 0.5, 0.0), gamma=0.0))
    )
    assert flow.profile.space == "flow"
    assert flow.profile.gammas(4) == [0.0] * 4
    vp = recognise_file(Evidence(metadata=own(timesteps=(), sigmas=(14.6, 4.08, 1.6, 0.69, 0.0))))
    assert vp.profile.space == "sigma"
    assert vp.profile.kept(0.5) == [1.6, 0.69]


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 10**9, "timesteps": (999,)},
        {"timesteps": (249, 499, 749, 999)},
        {"timesteps": (99999, 749, 499, 249)},
        {"gamma": 7.0},
        {"cfg": float("nan")},
        {"cfg": -1.0},
        {"shift": 0.0, "timesteps": (), "sigmas": (1.0, 0.75, 0.5, 0.25, 0.0)},
        {"gamma": "__import__('os')"},
        {"timesteps": ("a", "b", "c", "d")},
        {"steps": None},
    ],
)
def test_a_hostile_recipe_is_refused_in_a_sentence(changes):
    match = recognise_file(Evidence(name="x.safetensors", metadata=own(**changes)))
    assert match.profile is None
    assert "recipe" in match.reason
    broken = recognise_file(Evidence(name="x.safetensors", metadata={RECIPE_KEY: "{" * 50}))
    assert broken.profile is None


def test_a_slider_of_ours_is_no_few_step_model():
    match = recognise_file(
        Evidence(name="age.safetensors", metadata=own(objective="text_slider", steps=0, timesteps=()))
    )
    assert match.profile is None
    assert "no few-step model" in match.reason


def test_all_loras_count_and_two_distillations_are_no_answer():
    base = Evidence(name="sd_xl_base_1.0.safetensors", shapes=MERGE)
    lightning = Evidence(name="sdxl_lightning_4step_lora.safetensors", shapes=unet_lora("sdxl"))
    style = Evidence(name="film_look.safetensors", shapes=unet_lora("sdxl", fast=False))
    lcm_lora = Evidence(name="lcm-lora-sdxl.safetensors", shapes=unet_lora("sdxl"), strength=0.8)
    assert recognise(base, [lightning, style]).profile.id == "sdxl-lightning-lora"
    assert recognise(base, [style, lcm_lora]).strength == 0.8
    both = recognise(base, [lightning, lcm_lora])
    assert both.profile is None
    assert "two distillations" in both.reason
    off = Evidence(name=lcm_lora.name, shapes=lcm_lora.shapes, strength=0.0)
    assert recognise(base, [lightning, off]).profile.id == "sdxl-lightning-lora"
    assert recognise(base, [style]).profile is None
    assert recognise(None).profile is None


def test_a_lora_of_another_family_is_said():
    base = Evidence(name="v1-5-pruned.safetensors", shapes=unet("sd15"))
    match = recognise(base, [Evidence(name="lcm-lora-sdxl.safetensors", shapes=unet_lora("sdxl"))])
    assert match.profile is None
    assert "Stable Diffusion 1.5" in match.reason


def test_structure_of_the_synthetic_files():
    assert identify(unet_lora("sdxl")).accelerator
    assert not identify(unet_lora("sdxl", fast=False)).accelerator
    assert identify(MERGE).kind == "checkpoint"
    assert identify(unet("sd15")).family == "sd15"
    assert identify({f"module.{k}": v for k, v in unet("sdxl").items()}).prefix == "module."
    for family, shapes in MODELS.items():
        assert (identify(shapes).kind, identify(shapes).family) == ("model", family)
    for family, shapes in LORAS.items():
        assert (identify(shapes).kind, identify(shapes).family) == ("lora", family)
    assert identify({}).kind == "unknown"
    assert set(SURE) >= {"certain", "likely", "guess", "unsure"}


# --- wrong pairings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("profile", "setup", "word"),
    [
        ("dmd2-sdxl-4step", {"cfg": 7.0}, "burns"),
        ("dmd2-sdxl-4step", {"cfg": 0.0}, "loses the prompt"),
        ("hyper-sdxl-cfg-lora", {"cfg": 0.5}, "loses the prompt"),
        ("pcm-sdxl-normalcfg-lora", {"cfg": 1.5}, "too weak"),
        ("sdxl-lightning", {"cfg": 1.0, "negative": True}, "ignored"),
        ("lcm-lora-sdxl", {"cfg": 1.5, "negative": True}, "little effect"),
        ("dmd2-sdxl-4step", {"patch": "lcm"}, "grid of 50"),
        ("sdxl-lightning-1step", {"patch": None, "cfg": 1.0}, "add ModelSamplingDiscrete with x0"),
        ("dmd2-sdxl-4step", {"patch": "x0"}, "remove it"),
        ("dmd2-sdxl-4step", {"scheduler": "karras"}, "999, 687, 146, 0"),
        ("dmd2-sdxl-4step", {"scheduler": "normal"}, "wrong scheduler"),
        ("z-image-turbo", {"scheduler": "karras"}, "leaves the noise levels"),
        ("dmd2-sdxl-4step", {"sampler": "euler"}, "fresh"),
        ("sdxl-lightning", {"sampler": "lcm"}, "adds noise"),
        ("tcd-sdxl-lora", {"sampler": "euler"}, "not TCD"),
        ("dmd2-sdxl-4step-lora", {"fp8_base": True, "has_lora": True}, "fp8"),
        ("hyper-flux-lora", {"strength": 1.0}, "0.125"),
        ("qwen-lightning-lora", {"shift": 1.0}, "Shift"),
        ("dmd2-sdxl-4step", {"steps": 20}, "do not fit"),
        ("sdxl-lightning", {"width": 2048, "height": 2048}, "repeats"),
        ("sdxl-lightning", {"controlnet_end": 0.8}, "drops whole steps"),
    ],
)
def test_wrong_pairings_are_said_in_a_sentence(profile, setup, word):
    said = wrong_pairings(ROWS[profile], Setup(**setup))
    assert any(word in s for s in said), said
    assert all(s.endswith(".") and "  " not in s for s in said)


@pytest.mark.parametrize("profile", ROWS.values(), ids=lambda p: p.id)
def test_the_profiles_own_settings_are_never_complained_about(profile):
    right = Setup(
        cfg=profile.cfg[0],
        steps=profile.steps,
        sampler=profile.stock.get("sampler") or None,
        scheduler=profile.stock.get("scheduler") or None,
        patch=profile.stock.get("patch") or None,
        strength=profile.lora_scale[0],
        shift=profile.shift_at() if profile.space == "flow" else None,
        width=profile.size,
        height=profile.size,
        controlnet_end=1.0,
    )
    assert wrong_pairings(profile, right) == []
