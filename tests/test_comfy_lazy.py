"""The lazy patch on ComfyUI's native transformers, tiny and random: equal to the whole pass where it must be."""

import functools
import importlib
import re
from pathlib import Path

import comfy_host
import pytest
import torch

pytestmark = pytest.mark.comfy

if not comfy_host.in_comfy():

    @pytest.mark.skipif(comfy_host.missing() is not None, reason=str(comfy_host.missing()))
    def test_the_lazy_patch_holds_inside_comfyui():
        comfy_host.run_tests_in_comfy(Path(__file__))

else:
    comfy_host.start_comfy("--use-pytorch-cross-attention")

    import comfy.controlnet
    import comfy.model_base
    import comfy.model_management
    import comfy.model_patcher
    import comfy.sample
    import comfy.samplers
    import comfy.sd
    import comfy.supported_models
    import comfy.utils
    import comfy_tiny

    lazy = comfy_host.pack_module("nodes.lazy_inpaint")
    sessions = comfy_host.pack_module("nodes.lazy_session")

    def sd35_medium():
        """With a second attention over the image alone in the first block."""
        embedder = {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 128}}
        config = {
            "in_channels": 16,
            "out_channels": 16,
            "pos_embed_scaling_factor": None,
            "depth": 2,
            "patch_size": 2,
            "input_size": None,
            "adm_in_channels": 32,
            "context_embedder_config": embedder,
            "num_patches": 96 * 96,
            "pos_embed_max_size": 96,
            "qk_norm": "rms",
            "x_block_self_attn_layers": [0],
            "dtype": torch.float32,
        }
        return comfy.model_base.SD3(comfy.supported_models.SD3(config), device="cpu")

    def z_image():
        """With two layers: keys of the first know nothing of the text yet."""
        config = {
            "image_model": "lumina2",
            "patch_size": 2,
            "in_channels": 16,
            "dim": 256,
            "cap_feat_dim": 64,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "qk_norm": True,
            "n_heads": 2,
            "n_kv_heads": 2,
            "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512],
            "rope_theta": 256.0,
            "ffn_dim_multiplier": 8 / 3,
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 32,
            "dtype": torch.float32,
        }
        return comfy.model_base.Lumina2(comfy.supported_models.ZImage(config), device="cpu")

    def chroma():
        config = {
            "image_model": "chroma",
            "in_channels": 64,
            "out_channels": 64,
            "context_in_dim": 64,
            "hidden_size": 128,
            "mlp_ratio": 4.0,
            "num_heads": 1,
            "depth": 2,
            "depth_single_blocks": 2,
            "axes_dim": [16, 56, 56],
            "theta": 10000,
            "qkv_bias": True,
            "patch_size": 2,
            "in_dim": 64,
            "out_dim": 128,
            "hidden_dim": 64,
            "n_layers": 2,
            "txt_ids_dims": [],
            "vec_in_dim": 0,
            "dtype": torch.float32,
        }
        return comfy.model_base.Chroma(comfy.supported_models.Chroma(config), device="cpu")

    comfy_tiny.FAMILIES.setdefault("chroma", comfy_tiny.Tiny(build=chroma, context=64, shape=(16, 16, 16)))
    VIDEO = comfy_tiny.Tiny(build=comfy_tiny.wan, context=64, shape=(16, 3, 16, 16))
    comfy_tiny.FAMILIES.setdefault("wan_wide", VIDEO)
    Z_IMAGE = comfy_tiny.Tiny(build=z_image, context=64, shape=(16, 16, 16))
    comfy_tiny.FAMILIES.setdefault("z_image_deep", Z_IMAGE)
    SD35 = comfy_tiny.Tiny(build=sd35_medium, context=64, shape=(16, 16, 16), pooled=32)
    comfy_tiny.FAMILIES.setdefault("sd35_medium", SD35)
    FAMILIES = ("flux", "flux2", "sd3", "sd35_medium", "qwen_image", "z_image_deep", "chroma", "wan_wide")

    def shape_of(family, size=None):
        shape = list(comfy_tiny.FAMILIES[family].shape)
        return (1, *shape) if size is None else (1, *shape[:-2], *size)

    def draw(shape, seed):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def hole(shape, rows=slice(4, 8), columns=slice(5, 9)):
        """[b 1 h w] as SetLatentNoiseMask makes it"""
        mask = torch.zeros(1, 1, *shape[-2:])
        mask[..., rows, columns] = 1
        return mask

    class Probe(comfy.samplers.Sampler):
        """Asks the model for x0 at these (x, sigma), one after the other."""

        turn = 0

        def __init__(self, asked):
            self.asked, self.x0 = asked, []

        def sample(
            self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, _=False
        ):
            for Probe.turn, (x, sigma) in enumerate(self.asked):
                options = extra_args["model_options"]
                self.x0.append(model_wrap(x, torch.tensor([sigma] * len(x)), model_options=options, seed=0).clone())
            return noise

    @torch.inference_mode()
    def ask(model, family, asked, mask, cfg=1.0, tokens=(20, 20), latent=None, extra=None):
        guider = comfy.samplers.CFGGuider(model)
        positive, negative = (comfy_tiny.conditioning(family, s, t) for s, t in zip((1, 2), tokens, strict=True))
        for cond in (positive, negative):
            cond[0][1].update(extra or {})
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        probe = Probe(asked)
        latent = draw(asked[0][0].shape, 5) if latent is None else latent
        sigmas = torch.tensor([1.0, 0.7, 0.4, 0.0])
        guider.sample(torch.zeros_like(latent), latent, probe, sigmas, denoise_mask=mask, seed=0, disable_pbar=True)
        return probe.x0

    def patched(model, order=None, **config):
        """order: which of the probe's questions are computed whole, instead of the schedule's choice."""
        patch = lazy.Lazy(lazy.LazyConfig(**{"multiple": 1, "mode": "refresh", **config}))
        if order is not None:
            patch.is_dense = lambda _sigma: order[Probe.turn]
        return patch, patch.patch(model)

    def inside(patch_run, x0):
        return ~patch_run.outside.expand_as(x0)

    def spy(patch):
        """Keeps the run of the last sampling."""
        runs, begin = [], patch._begin

        def kept(*args):
            runs.append(begin(*args))
            return runs[-1]

        patch._begin = kept
        return runs

    @pytest.fixture(scope="module", params=FAMILIES)
    def family(request):
        return request.param

    @pytest.fixture(scope="module")
    def model(family):
        return comfy_tiny.patcher(family)

    def test_at_the_same_step_lazy_equals_whole_inside_the_hole(family, model):
        x = draw(shape_of(family), 3)
        latent = draw(x.shape, 5)
        asked = [(x, 0.7), (x, 0.7)]
        bare = ask(model, family, asked[:1], None, latent=latent)[0]
        patch, clone = patched(model, order=[True, False])
        runs = spy(patch)
        whole, part = ask(clone, family, asked, hole(x.shape), latent=latent)
        run = runs[0]
        assert torch.equal(whole, bare)  # recording changes nothing
        assert not run.why
        assert 4 <= int(run.tokens.computed.sum()) < len(run.tokens.computed) / 2
        where = inside(run, part)
        assert (part - whole)[where].abs().max() < 1e-5
        filled = part[~where] - clone.model.process_latent_in(latent)[~where]
        assert filled.abs().max() == 0
        assert (whole - part)[~where].abs().max() > 0.1  # the fill is not what the network says there
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())

    def test_control_a_stale_or_missing_context_is_seen(family, model):
        x, other = draw(shape_of(family), 3), draw(shape_of(family), 4)
        patch, clone = patched(model, order=[True, False])
        runs = spy(patch)
        mask = hole(x.shape)
        _, stale = ask(clone, family, [(other, 0.7), (x, 0.7)], mask)
        (whole,) = ask(model, family, [(x, 0.7)], None)
        assert (stale - whole)[inside(runs[0], whole)].abs().max() > 1e-2
        patch, clone = patched(model, order=[True, False])
        runs = spy(patch)
        keep = lazy.Bank.fill
        try:
            lazy.Bank.fill = lambda self, key, slot, k, v: (k.zero_(), v.zero_())
            _, blind = ask(clone, family, [(x, 0.7), (x, 0.7)], mask)
        finally:
            lazy.Bank.fill = keep
        assert (blind - whole)[inside(runs[0], whole)].abs().max() > 1e-2

    @pytest.mark.parametrize("tokens", [(20, 20), (20, 27)], ids=["one call", "two calls"])
    def test_branches_never_mix(family, model, tokens):
        x = draw(shape_of(family), 3)
        asked = [(x, 0.7), (x, 0.7)]
        patch, clone = patched(model, order=[True, False])
        runs = spy(patch)
        whole, part = ask(clone, family, asked, hole(x.shape), 4.0, tokens)
        scale = whole.abs().max()
        assert not runs[0].why
        assert (part - whole)[inside(runs[0], whole)].abs().max() < 1e-5 * scale
        # control: with one key for all, the prompts' contexts are mixed
        patch, clone = patched(model, order=[True, False])
        begin = patch._begin

        def one_key(*args):
            run = begin(*args)
            run.branches = dict.fromkeys(run.branches, ("all", 0))
            return run

        patch._begin = one_key
        _, mixed = ask(clone, family, asked, hole(x.shape), 4.0, tokens)
        assert (mixed - whole)[inside(runs[0], whole)].abs().max() > 1e-3 * scale

    @torch.inference_mode()
    def sampled(model, family, mask, latent, seed=3, steps=3, cfg=4.0, sampler="euler", size=None):
        noise = draw(shape_of(family, size), seed)
        positive, negative = (comfy_tiny.conditioning(family, s) for s in (1, 2))
        return comfy.sample.sample(
            model,
            noise,
            steps,
            cfg,
            sampler,
            "simple",
            positive,
            negative,
            latent,
            noise_mask=mask,
            disable_pbar=True,
            seed=seed,
        ).clone()

    @pytest.mark.parametrize(
        ("mode", "rows", "said"),
        [("auto", slice(4, 8), True), ("auto", slice(0, 16, 15), False), ("refresh", slice(4, 8), False)],
        ids=["a small hole", "two ends of the picture", "mode chosen by hand"],
    )
    def test_auto_says_when_a_crop_is_the_faster_choice(mode, rows, said):
        latent = draw(shape_of("flux"), 5)
        patch, clone = patched(comfy_tiny.patcher("flux"), mode=mode)
        sampled(clone, "flux", hole(latent.shape, rows=rows, columns=rows), latent, steps=12)
        assert "computed 0." in patch.report()
        assert ("a crop with 1.5x context costs" in patch.report()) == said

    def test_mode_dense_and_a_full_mask_are_the_bare_model_to_the_bit(family, model):
        shape = shape_of(family)
        latent, everything = draw(shape, 5), torch.ones(1, 1, *shape[-2:])
        bare = sampled(model, family, everything, latent)
        patch, clone = patched(model, mode="refresh")
        assert torch.equal(sampled(clone, family, everything, latent), bare)
        assert "whole pass is as fast" in patch.text
        some = sampled(model, family, hole(shape), latent)
        _, dense = patched(model, mode="dense")
        assert torch.equal(sampled(dense, family, hole(shape), latent), some)
        patch, clone = patched(model)
        assert torch.equal(sampled(clone, family, None, latent), sampled(model, family, None, latent))
        assert "no noise mask" in patch.text

    def test_refresh_with_every_step_whole_is_the_bare_model_and_with_fewer_it_is_near(family, model):
        shape = shape_of(family)
        latent, mask = draw(shape, 5), hole(shape)
        bare = sampled(model, family, mask, latent, steps=4)
        _, always = patched(model, warm=4)
        assert torch.equal(sampled(always, family, mask, latent, steps=4), bare)
        patch, some = patched(model, warm=1, every=2)
        out = sampled(some, family, mask, latent, steps=4)
        assert torch.equal(sampled(some, family, mask, latent, steps=4), out)  # queued twice
        assert torch.isfinite(out).all()
        assert not torch.equal(out, bare)
        assert "bank:" in patch.text

    def test_an_empty_mask_returns_the_latent_without_asking_the_model(family, model):
        shape = shape_of(family)
        latent = draw(shape, 5)
        patch, clone = patched(model)
        calls = []
        handle = clone.model.diffusion_model.register_forward_hook(lambda *a: calls.append(1))
        out = sampled(clone, family, torch.zeros(1, 1, *shape[-2:]), latent)
        handle.remove()
        assert not calls
        assert torch.allclose(out, latent, atol=1e-5)
        assert "empty" in patch.text

    def test_session_edit_accept_undo_returns_to_the_bit(family, model):
        shape = shape_of(family)
        canvas, first, second = draw(shape, 5), hole(shape), hole(shape, slice(0, 3), slice(0, 3))
        patch, clone = patched(model, mode="session")
        runs = spy(patch)
        edited = sampled(clone, family, first, canvas)
        assert runs[-1].work > 0.9 * runs[-1].whole  # the first run pays for the context
        again = sampled(clone, family, first, canvas)
        assert torch.equal(again, edited)
        assert not runs[-1].why
        law = lazy.step_cost(runs[-1].tokens.share, runs[-1].seen, runs[-1].text)
        assert runs[-1].work / runs[-1].whole == pytest.approx(law)
        assert "accept" not in patch.session.accept() or patch.session.past
        with_edit = sampled(clone, family, second, edited)
        law = lazy.step_cost(runs[-1].tokens.share, runs[-1].seen, runs[-1].text)
        assert runs[-1].work / runs[-1].whole == pytest.approx(law)  # accepting was free
        assert "before" in patch.session.undo()
        assert torch.equal(sampled(clone, family, first, canvas), edited)
        without_edit = sampled(clone, family, second, canvas)
        assert not torch.equal(with_edit, without_edit)  # control: the accepted edit was context
        assert "nothing" in patch.session.undo()

    def test_a_rejected_edit_and_a_changed_canvas_are_computed_again():
        model = comfy_tiny.patcher("flux")
        shape = shape_of("flux")
        canvas, first, second = draw(shape, 5), hole(shape), hole(shape, slice(0, 3), slice(0, 3))
        patch, clone = patched(model, mode="session")
        runs = spy(patch)
        sampled(clone, "flux", first, canvas)
        sampled(clone, "flux", second, canvas)
        rejected = runs[-1].work / runs[-1].whole
        assert 0.3 < rejected < 1  # the rows of the first hole were never the canvas's
        sampled(clone, "flux", second, canvas)
        assert runs[-1].work / runs[-1].whole < rejected
        moved = canvas.clone()
        moved[..., 12:16, 12:16] += 3
        sampled(clone, "flux", second, moved)
        assert runs[-1].work / runs[-1].whole > lazy.step_cost(runs[-1].tokens.share, 64, 20) + 0.05
        said = []
        patch.tell = said.append
        sampled(clone, "flux", second, draw(shape, 77))
        assert any("another canvas" in text for text in said)

    def test_z_image_with_padding_tokens_and_odd_sizes():
        for name, size in (("z_image", (14, 14)), ("flux", (13, 15)), ("sd3", (10, 18))):
            model = comfy_tiny.patcher(name)
            x = draw(shape_of(name, size), 3)
            patch, clone = patched(model, order=[True, False])
            runs = spy(patch)
            whole, part = ask(clone, name, [(x, 0.7)] * 2, hole(x.shape))
            assert not runs[0].why
            assert (part - whole)[inside(runs[0], whole)].abs().max() < 1e-5, name

    def test_a_batch_shares_the_union_of_its_masks():
        model = comfy_tiny.patcher("flux")
        x = draw((2, 16, 16, 16), 3)
        mask = torch.cat([hole(x.shape), hole(x.shape, slice(10, 12), slice(2, 4))])
        patch, clone = patched(model, order=[True, False], ring=0)
        runs = spy(patch)
        whole, part = ask(clone, "flux", [(x, 0.7)] * 2, mask, 4.0)
        assert int(runs[0].tokens.hole.sum()) == 6 + 1
        assert (part - whole)[inside(runs[0], whole)].abs().max() < 1e-5 * whole.abs().max()

    REFERENCES = [("flux", "offset"), ("flux", "index"), ("flux2", "index"), ("flux2", "index_timestep_zero")]
    REFERENCES += [("qwen_image", method) for method in ("offset", "index", "index_timestep_zero")]

    @pytest.mark.parametrize(("name", "method"), REFERENCES)
    def test_reference_latents_are_context(name, method):
        model = comfy_tiny.patcher(name)
        x = draw(shape_of(name), 3)
        extra = {"reference_latents": [draw(shape_of(name, (12, 8)), 9)], "reference_latents_method": method}
        patch, clone = patched(model, order=[True, False])
        runs = spy(patch)
        whole, part = ask(clone, name, [(x, 0.7)] * 2, hole(x.shape), extra=extra)
        assert not runs[0].why
        assert runs[0].seen > 64
        assert (part - whole)[inside(runs[0], whole)].abs().max() < 1e-5
        patch, clone = patched(model, mode="session")
        runs = spy(patch)
        _, again = ask(clone, name, [(x, 0.7)] * 2, hole(x.shape), extra=extra)
        assert not runs[0].why
        assert torch.isfinite(again).all()

    class Control(comfy.controlnet.ControlBase):
        """Adds to every token behind every block, the last one included, as stretched ControlNets do."""

        def __init__(self, name, width=128, tokens=64):
            super().__init__()
            parts = [draw((1, tokens, width), seed) for seed in (21, 22)]
            kinds = {"flux": ("input", "output"), "sd3": ("output",), "qwen_image": ("input",)}[name]
            self.added = {kind: parts if kind in kinds else [] for kind in ("input", "middle", "output")}

        def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
            return {k: [p.repeat(batched_number, 1, 1) for p in parts] for k, parts in self.added.items()}

        def inference_memory_requirements(self, dtype):
            return 0

    @pytest.mark.parametrize("name", ["flux", "sd3", "qwen_image"])
    def test_a_controlnet_is_gathered_too(name):
        model = comfy_tiny.patcher(name)
        x, control = draw(shape_of(name), 3), Control(name)
        asked, extra = [(x, 0.7)] * 2, {"control": control, "control_apply_to_uncond": True}
        patch, clone = patched(model, order=[True, False])
        runs = spy(patch)
        whole, part = ask(clone, name, asked, hole(x.shape), extra=extra)
        scale = whole.abs().max()
        assert not runs[0].why
        assert (part - whole)[inside(runs[0], whole)].abs().max() < 1e-5 * scale
        without = ask(model, name, asked[:1], None)[0]
        assert (without - whole).abs().max() > 0.1  # control: it does add something
        patch, clone = patched(model, mode="session")
        runs = spy(patch)
        again, _ = ask(clone, name, asked, hole(x.shape), extra=extra)
        assert torch.equal(again, ask(model, name, asked[:1], None, extra=extra)[0])
        assert any("ControlNet" in reason for reason in runs[0].why)
        blocks, rows = comfy_host.pack_module("nodes.lazy_blocks"), torch.arange(3)
        with pytest.raises(blocks.NotLazy, match="other tokens"):
            blocks.at_rows(Control(name, tokens=80).added, rows, 64, model.model.diffusion_model)

    def test_frames_have_masks_of_their_own():
        model = comfy_tiny.patcher("wan_wide")
        x = draw(shape_of("wan_wide"), 3)
        mask = torch.zeros(1, 1, 3, 16, 16)
        mask[:, :, 0, 4:6, 4:6] = mask[:, :, 2, 10:14, 10:12] = 1
        patch, clone = patched(model, order=[True, False], ring=0)
        runs = spy(patch)
        whole, part = ask(clone, "wan_wide", [(x, 0.7)] * 2, mask)
        assert runs[0].tokens.hole.reshape(3, 64).sum(1).tolist() == [1, 0, 2]
        assert (part - whole)[inside(runs[0], whole)].abs().max() < 1e-5 * whole.abs().max()

    def test_families_whose_hooks_do_not_reach_say_so():
        blocks = comfy_host.pack_module("nodes.lazy_blocks")
        for module, name, says in (
            ("comfy.ldm.pixart.pixartms", "PixArtMS", "takes no override"),
            ("comfy.ldm.chroma_radiance.model", "ChromaRadiance", "network of its own"),
            ("comfy.ldm.wan.model", "VaceWanModel", "between its blocks"),
        ):
            kind = getattr(importlib.import_module(module), name)
            with pytest.raises(blocks.NotLazy, match=says):
                blocks.sites_of(kind.__new__(kind))

    def test_what_would_see_only_a_part_makes_the_call_whole_and_says_why():
        model = comfy_tiny.patcher("flux")
        shape = shape_of("flux")
        latent, mask = draw(shape, 5), hole(shape)

        def twice_v(q, k, v, **_options):
            return {"v": 1.5 * v}

        touched = model.clone()
        touched.set_model_attn1_patch(twice_v)
        bare = sampled(touched, "flux", mask, latent)
        patch, clone = patched(touched, warm=1)
        assert torch.equal(sampled(clone, "flux", mask, latent), bare)
        assert "attn1_patch" in patch.text
        unet, size = comfy_tiny.patcher("sd15_eps"), shape_of("sd15_eps")
        patch, clone = patched(unet)
        latent = draw(size, 5)
        assert torch.equal(
            sampled(clone, "sd15_eps", hole(size), latent), sampled(unet, "sd15_eps", hole(size), latent)
        )
        assert "UNetModel is not among" in patch.text

    def test_another_attention_override_is_still_called_and_masks_make_the_call_whole():
        model = comfy_tiny.patcher("flux").clone()
        calls = []

        def counting(function, *args, **options):
            calls.append(1)
            return function(*args, **options)

        model.model_options["transformer_options"]["optimized_attention_override"] = counting
        x = draw(shape_of("flux"), 3)
        patch, clone = patched(model, order=[True, False])
        runs = spy(patch)
        whole, part = ask(clone, "flux", [(x, 0.7)] * 2, hole(x.shape))
        assert len(calls) == 2 * 4
        assert (part - whole)[inside(runs[0], whole)].abs().max() < 1e-5

    def test_the_bank_is_bounded_and_the_number_is_named():
        model = comfy_tiny.patcher("sd3")
        shape = shape_of("sd3")
        latent, mask = draw(shape, 5), hole(shape)
        patch, clone = patched(model, mode="session", fast_gib=1e-5, slow_gib=1e-5)
        bare = sampled(model, "sd3", mask, latent)
        assert torch.equal(sampled(clone, "sd3", mask, latent), bare)
        assert "may take 2e-05 GiB" in patch.text

    def test_sessions_share_one_limit_and_the_one_used_longest_ago_makes_room():
        model, shelf, latent, mask = comfy_tiny.patcher("sd3"), sessions.Sessions(), draw(shape_of("sd3"), 5), None
        mask = hole(latent.shape)

        def edit(name, gib=1.0, seed=5):
            config = lazy.LazyConfig(mode="session", multiple=1, fast_gib=gib, slow_gib=0.0)
            patch = lazy.Lazy(config, shelf.take(name), sessions=shelf)
            sampled(patch.patch(model), "sd3", mask, draw(latent.shape, seed))
            return patch

        def kept():
            return [n for n, s in shelf.items() if s.bank is not None]

        assert "other session" not in edit("a").text
        one = sum(shelf["a"].bank.nbytes)
        said = edit("b").text
        assert f"{2 * one / 2**30:.3f} GiB with 1 other session(s)" in said
        edit("a")  # the least recently used is b now, whose session is older
        assert kept() == ["b", "a"]
        patch = edit("c", 2.5 * one / 2**30)
        assert kept() == ["a", "c"]
        assert "dropped to make room, used longest ago: b" in patch.text
        assert sum(sum(s.bank.nbytes) for s in shelf.values() if s.bank) <= 2.5 * one
        edit("b", 2.5 * one / 2**30)  # goes on, anew
        assert kept() == ["c", "b"]
        # control: what does not fit by itself is refused after all others are gone
        assert "may take" in edit("d", 0.5 * one / 2**30).text
        assert [n for n in kept() if n != "d"] == []

    def test_another_prompt_reuses_the_context_and_it_is_said():
        """Cheap, and not the same: the context keeps what it took from the earlier prompt until it is forgotten."""
        model, shape = comfy_tiny.patcher("sd3"), shape_of("sd3")
        canvas, mask = draw(shape, 5), hole(shape)

        @torch.inference_mode()
        def edit(patch, seed):
            positive, negative = (comfy_tiny.conditioning("sd3", s) for s in (seed, 2))
            start = (draw(shape, 3), 3, 4.0, "euler", "simple", positive, negative, canvas)
            return comfy.sample.sample(patch.patch(model), *start, noise_mask=mask, disable_pbar=True, seed=3).clone()

        patch, fresh = (patched(model, mode="session")[0] for _ in range(2))
        runs = spy(patch)
        first = edit(patch, 1)
        assert "another prompt" not in patch.text
        other = edit(patch, 7)
        law = lazy.step_cost(runs[-1].tokens.share, runs[-1].seen, runs[-1].text)
        assert runs[-1].work / runs[-1].whole == pytest.approx(law)  # only the hole was paid for
        assert "read with another prompt" in patch.text
        anew = edit(fresh, 7)
        where = inside(runs[-1], first)
        assert (other - first)[where].abs().max() > 1e-2  # the hole follows the new prompt
        apart = (other - anew)[where].abs().max()
        assert 1e-4 < apart < 0.5 * (other - first)[where].abs().max()
        assert torch.equal(edit(patch, 1), first)
        assert "another prompt" not in patch.text
        patch.session.reset()
        assert torch.equal(edit(patch, 7), anew)
        assert "another prompt" not in patch.text

    def test_an_interrupt_leaves_the_model_clean():
        model = comfy_tiny.patcher("qwen_image")
        shape = shape_of("qwen_image")
        latent, mask = draw(shape, 5), hole(shape)
        before = sampled(model, "qwen_image", mask, latent)
        patch, clone = patched(model)
        last = clone.model.diffusion_model.transformer_blocks[-1]

        def stop(*_args):
            raise comfy.model_management.InterruptProcessingException

        handle = last.register_forward_pre_hook(stop)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            sampled(clone, "qwen_image", mask, latent)
        handle.remove()
        assert patch.run is None
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())
        assert torch.equal(sampled(model, "qwen_image", mask, latent), before)

    # --- the nodes ---

    nodes = comfy_host.pack_module("nodes.inpaint")
    way = comfy_host.pack_module("nodes.inpaint_way")

    class FakeVAE:
        """Eight pixels to a cell, and a tone that shifts, as real ones do."""

        channels = 16

        def spacial_compression_encode(self):
            return 8

        def encode(self, pixels):
            cells = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)
            return cells.repeat(1, -(-self.channels // 3), 1, 1)[:, : self.channels]

        def decode(self, latent):
            pixels = torch.nn.functional.interpolate(latent[:, :3], scale_factor=8)
            return (0.9 * pixels + 0.03).movedim(1, -1)

    def prepared(image, mask, model=None, **options):
        defaults = {
            i.id: i.default
            for i in nodes.PrepareInpaint.define_schema().inputs
            if getattr(i, "default", None) is not None
        }
        vae = FakeVAE()
        if model is not None:
            vae.channels = model.model.latent_format.latent_channels
        values = {**defaults, "image": image, "mask": mask, "vae": vae, "model": model} | options
        return nodes.PrepareInpaint.execute(**values).args

    def photo(b=1, h=128, w=160):
        y, x = torch.linspace(0, 1, h)[:, None], torch.linspace(0, 1, w)[None]
        base = torch.stack([0.2 + 0.5 * x * y, 0.3 + 0.4 * y.expand(h, w), 0.7 - 0.4 * x.expand(h, w)], -1)
        return base.expand(b, -1, -1, -1) + 0.02 * draw((b, h, w, 3), 1)

    def spot(b=1, h=128, w=160, top=40, left=60, size=24):
        mask = torch.zeros(b, h, w)
        mask[:, top : top + size, left : left + size] = 1
        return mask

    @pytest.mark.parametrize("area", ["canvas", "crop", "crop per island"])
    @pytest.mark.parametrize("size", [(128, 160), (117, 151)])
    @pytest.mark.parametrize("b", [1, 2])
    def test_outside_the_mask_the_picture_comes_back_to_the_bit(area, size, b):
        image, mask = photo(b, *size), spot(b, *size)
        mask[:, 5:9, 140:149] = 0.5  # a second island, soft
        latent, region, parts, holes, info = prepared(image, mask, area=area)
        assert parts.shape[:3] == holes.shape
        assert latent["samples"].shape[-2:] == latent["noise_mask"].shape[-2:]
        made = {"samples": latent["samples"] + 0.2 * latent["noise_mask"]}
        for local in (True, False):
            for feather in (0.0, 6.0):
                (out,) = nodes.CompositeInpaint.execute(region, made, FakeVAE(), feather, True, local).args
                assert out.shape == image.shape
                outside = region.mask[:, : size[0], : size[1]] == 0
                assert outside.float().mean() > 0.5
                assert (out - image)[outside].abs().max() == 0
                assert (out - image)[mask == 1].abs().mean() > 0.02
        assert "not seen" in info if area != "canvas" else "canvas" in info

    def test_a_canvas_for_the_lazy_families_and_crops_for_unets():
        flux, unet = comfy_tiny.patcher("flux"), comfy_tiny.patcher("sd15_eps")
        _, region, *_, info = prepared(photo(), spot(), flux)
        assert region.boxes is None
        assert "a lazy step costs" in info
        image, mask = photo(1, 560, 1300), spot(1, 560, 1300)
        mask[:, 500:510, 1200:1210] = 1
        _, region, parts, *_, info = prepared(image, mask, unet, grow=0, soften=0)
        assert len(region.boxes) == len(parts) == 2
        assert parts.shape[1:3] == (512, 512)  # what SD1.5 draws
        assert "enlarged" not in info
        said = nodes.LazyInpaint.execute(unet, "auto", 1, 3, 5, "t", 0, False, 1.0, 1.0).args[1]
        assert "not lazy" in said
        lazily = re.search(r"For (.*?)\.\s", nodes.LazyInpaint.define_schema().description)[1]
        assert all(name in said for name in re.split(", | and ", lazily))
        assert "all is computed" in said  # whatever the area: a canvas is not cropped

    def test_the_predicted_cost_is_the_one_of_the_report_on_the_embedded_model():
        model, clip, vae = comfy_host.pack_module("nodes.load_shapes").LoadShapes.execute("teacher").args
        conds = [clip.encode_from_tokens_scheduled(clip.tokenize(prompt)) for prompt in ("a red circle", "")]
        how = (1, 2, 1.0, "euler", "simple", 1.0, "session", "push-pull", 0, 0)
        with torch.inference_mode():
            info = nodes.Inpaint.execute(photo(1, 64, 64), spot(1, 64, 64, 8, 8, 8), model, vae, *conds, *how).args[1]
        told = re.search(r"and 12 of text: a lazy step costs (\S+)", info)
        law = re.search(r"the law for a lazy step is (\S+)", info)
        assert told[1] == law[1]

    @pytest.mark.parametrize(("share", "off"), [(0.8, True), (0.6, False)])
    def test_the_prediction_and_the_report_agree_on_whether_a_large_hole_is_lazy(share, off):
        model, mask = comfy_tiny.patcher("sd3"), torch.zeros(1, 160, 160)
        mask[:, : int(160 * share) - 16] = 1  # and the ring
        conds = [comfy_tiny.conditioning("sd3", s) for s in (1, 2)]
        how = (1, 2, 1.0, "euler", "simple", 1.0, "session", "push-pull", 0, 0)
        with torch.inference_mode():
            info = nodes.Inpaint.execute(photo(1, 160, 160), mask, model, vae_of("sd3"), *conds, *how).args[1]
        assert info.count("lazy inpainting is off") == (2 if off else 0)
        assert ("a lazy step costs" in info) == (not off)

    def test_the_usual_text_is_as_long_as_comfyui_makes_it():
        families = comfy_host.pack_module("dmd_core.families")
        flux, sd3 = (importlib.import_module(f"comfy.text_encoders.{n}") for n in ("flux", "sd3_clip"))
        for family, tokenizer, parts in (
            (families.FLUX, flux.FluxTokenizer, ("t5xxl",)),
            (families.by_name("flux2"), flux.KleinTokenizer, ("qwen3_4b",)),
            (families.by_name("sd3"), sd3.SD3Tokenizer, ("l", "t5xxl")),
        ):
            found = tokenizer().tokenize_with_weights("a cat")
            assert sum(len(found[part][0]) for part in parts) == family.text_tokens, family.title

    def test_crops_are_sampled_at_what_the_model_draws_and_come_back_at_their_own_size():
        """A picture that has less than that is enlarged; outside the mask it stays to the bit."""
        image, mask = photo(), spot()
        for family, usual, factor in (("sd15_eps", 512, 3.6), ("sdxl", 1024, 7.2), ("flux", 1024, 7.2)):
            model = comfy_tiny.patcher(family)
            latent, region, parts, holes, info = prepared(image, mask, model, area="crop")
            assert [(b.height, b.width) for b in region.boxes] == [(128, 160)]
            assert parts.shape[1:3] == holes.shape[1:] == region.sampled
            assert abs(holes[0].numel() / usual**2 - 1) < 0.05
            assert f"sampled {factor:.1f}" in info
            # each pixel of the hole is in the enlarged one
            back = torch.nn.functional.adaptive_max_pool2d(holes[:, None], (128, 160))[:, 0]
            assert (back > 0)[region.mask > 0].all()
            made = {"samples": latent["samples"] + 0.2 * latent["noise_mask"]}
            (out,) = nodes.CompositeInpaint.execute(region, made, FakeVAE(), 0.0, True, True).args
            assert (out - image)[region.mask == 0].abs().max() == 0
            assert (out - image)[mask == 1].abs().mean() > 0.02
            # undone, what was sampled is the picture that was cut
            given = {"samples": latent["samples"]}
            (same,) = nodes.CompositeInpaint.execute(region, given, FakeVAE(), 0.0, True, True).args
            filled = nodes.crop.cut(nodes.inpaint.prefill(region.original, region.mask, "push-pull"), region.boxes)
            assert (same - nodes.as_image(filled)).abs().mean() < 0.01
        assert prepared(image, mask, area="crop")[1].sampled is None  # no model, no size

    def test_an_empty_mask_returns_the_picture_with_a_notice():
        image = photo()
        latent, region, *_, info = prepared(image, torch.zeros(1, 128, 160))
        assert "empty" in info
        (out,) = nodes.CompositeInpaint.execute(region, latent, FakeVAE(), 0.0, True, True).args
        assert torch.equal(out, image)

    def test_outpainting_adds_borders_that_are_masked_and_keeps_the_rest():
        image = photo()
        latent, region, *_ = prepared(image, torch.zeros(1, 128, 160), left=32, bottom=16)
        assert region.size == (144, 192)
        made = {"samples": torch.zeros_like(latent["samples"])}
        (out,) = nodes.CompositeInpaint.execute(region, made, FakeVAE(), 0.0, False, True).args
        assert out.shape == (1, 144, 192, 3)
        kept = (region.mask[:, :144, :192] == 0)[:, :128, 32:]
        assert (out[:, :128, 32:] - image)[kept].abs().max() == 0
        assert out[:, 140:, :10].max() < 0.1

    def test_the_tone_is_matched_and_without_it_the_seam_shows():
        image, mask = torch.full((1, 128, 160, 3), 0.6) + 0.01 * draw((1, 128, 160, 3), 2), spot()
        latent, region, *_ = prepared(image, mask, soften=0)
        inside = mask == 1
        errors = []
        for match in (True, False):
            (out,) = nodes.CompositeInpaint.execute(region, latent, FakeVAE(), 0.0, match, True).args
            errors.append((out - 0.6)[inside].mean().abs().item())
        assert errors[0] < 0.005 < 0.02 < errors[1]

    @pytest.mark.parametrize(
        ("image", "mask", "says"),
        [
            (photo(), spot(h=64), "same size"),
            (photo(3), spot(2), "3 images and 2 masks"),
            (photo() * torch.nan, spot(), "NaN"),
        ],
    )
    def test_bad_pictures_and_masks_are_named(image, mask, says):
        with pytest.raises(ValueError, match=says):
            prepared(image, mask)

    def test_the_report_of_the_next_run_says_that_an_edit_was_accepted_or_undone():
        model, shape = comfy_tiny.patcher("sd3"), shape_of("sd3")
        nodes.SESSIONS["told"] = sessions.Session()

        def edit(accepted):
            shown = []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(nodes, "shower", lambda _id: shown.append)
                clone = nodes.LazyInpaint.execute(model, "session", 1, 3, 5, "told", accepted, False, 1.0, 1.0).args[0]
                sampled(clone, "sd3", hole(shape), draw(shape, 5))
            return shown[-1]

        assert "accepted" not in edit(0)
        assert "the last edit is now part of the canvas; edits accepted: 1" in edit(1)
        assert "the last edit" not in edit(1)  # said once
        assert "as it was before the last accepted edit; edits accepted: 0" in edit(0)
        assert "accepted" not in edit(0)
        edit(1)
        assert "nothing to undo" not in edit(1)
        nodes.SESSIONS["told"].past = []
        assert "nothing to undo: no edit was accepted" in edit(0)

    @pytest.mark.parametrize(("family", "wanted"), [("sd15_eps", 4), ("flux2", 128), ("qwen_image", 16)])
    def test_the_vae_of_another_model_is_named_by_its_channels(family, wanted):
        model, image, mask = comfy_tiny.patcher(family), photo(1, 160, 224), spot(1, 160, 224)
        vae = FakeVAE()
        vae.channels = 8
        with pytest.raises(ValueError, match=rf"latents of 8 channels and the model takes {wanted}; connect the VAE"):
            prepared(image, mask, model, vae=vae)
        conds = [comfy_tiny.conditioning(family, s) for s in (1, 2)]
        how = (1, 2, 1.0, "euler", "simple", 1.0, "auto", "push-pull", 0, 0)
        with pytest.raises(ValueError, match="connect the VAE"):
            nodes.Inpaint.execute(image, mask, model, vae, *conds, *how)
        assert prepared(image, mask, model, vae=vae_of(family))[0]["samples"].shape[1] == wanted
        assert prepared(image, mask, vae=vae)[0]["samples"].shape[1] == 8  # without a model any will do

    def test_a_mask_of_another_size_is_told_which_node_resizes_it():
        stock = importlib.import_module("comfy_extras.nodes_post_processing")
        node = stock.ResizeImageMaskNode.GET_SCHEMA().display_name
        with pytest.raises(ValueError, match=f"{node}, {stock.ResizeType.MATCH_SIZE.value}"):
            prepared(photo(), spot(h=64))
        resized = stock.ResizeImageMaskNode.execute(
            spot(h=64), "area", {"resize_type": stock.ResizeType.MATCH_SIZE, "match": photo(), "crop": "disabled"}
        ).args[0]
        assert prepared(photo(), resized)[3].any()

    def test_a_latent_from_elsewhere_is_refused():
        latent, region, *_ = prepared(photo(), spot(), area="crop")
        with pytest.raises(ValueError, match="returned 2 pictures"):
            nodes.CompositeInpaint.execute(
                region, {"samples": latent["samples"].repeat(2, 1, 1, 1)}, FakeVAE(), 0.0, True, True
            )

    def test_the_count_of_accepted_edits_is_a_state_not_a_command():
        model = comfy_tiny.patcher("sd3")
        shape = shape_of("sd3")
        canvas, mask = draw(shape, 5), hole(shape)
        kept = nodes.SESSIONS["count"] = sessions.Session()
        patch = lazy.Lazy(lazy.LazyConfig(mode="session", multiple=1), kept)
        clone = patch.patch(model)
        nodes.LazyInpaint.execute(model, "session", 1, 3, 5, "count", 7, False, 1.0, 1.0)
        assert kept.accepted == 7  # after a restart: the picture holds them already
        edited = sampled(clone, "sd3", mask, canvas)
        assert kept.keep(8).startswith("the last edit is now")
        assert kept.keep(8) == ""
        assert "before the last" in kept.keep(7)
        assert torch.equal(sampled(clone, "sd3", mask, canvas), edited)
        assert "nothing to undo" in kept.keep(6)
        said = nodes.LazyInpaint.execute(model, "session", 1, 3, 5, "count", 6, False, 1.0, 1.0).args[1]
        assert "GiB" in said
        nodes.LazyInpaint.execute(model, "session", 1, 3, 5, "count", 6, True, 1.0, 1.0)
        assert kept.bank is None

    @pytest.mark.parametrize("family", ["flux", "sd15_eps"])
    def test_one_node_does_it_all(family):
        model = comfy_tiny.patcher(family)
        vae = vae_of(family)
        conds = [comfy_tiny.conditioning(family, s) for s in (1, 2)]
        image, mask = photo(), spot()
        common = (model, vae, *conds, 1, 2, 2.0, "euler", "simple", 1.0, "session", "push-pull", 0, 0)
        with torch.inference_mode():
            out, info = nodes.Inpaint.execute(image, mask, *common).args
            same, notice = nodes.Inpaint.execute(image, 0 * mask, *common).args
        assert (out - image)[mask == 0].abs().max() == 0
        assert (out - image)[mask == 1].abs().mean() > 0.02
        assert torch.isfinite(out).all()
        assert ("tokens are computed" in info) == (family == "flux")
        assert torch.equal(same, image)
        assert "empty" in notice

    def one_node(model, family, seed=1, steps=0, cfg=0.0, sampler="automatic", mode="auto", denoise=1.0):
        conds = [comfy_tiny.conditioning(family, s) for s in (1, 2)]
        how = (seed, steps, cfg, sampler, "simple", denoise, mode, "push-pull", 0, 0)
        with torch.inference_mode():
            return nodes.Inpaint.execute(
                photo(1, 160, 224), spot(1, 160, 224), model, vae_of(family), *conds, *how
            ).args

    def student(model, layer="double_blocks.0.img_attn.proj", **facts):
        """With a LoRA that says how it was distilled and changes nothing."""
        lora, recipes = (comfy_host.pack_module(f"dmd_core.weights.{n}") for n in ("lora", "recipe"))
        family = comfy_host.pack_module("dmd_core.families").detect(model.model.diffusion_model)
        recipe = recipes.Recipe(family=family.name, objective="dmd2", **facts)
        net = [n for n, _ in model.model.diffusion_model.named_modules() if n]
        rows, columns = model.model.diffusion_model.get_submodule(layer).weight.shape
        state = {f"{layer}.down": torch.ones(1, columns), f"{layer}.up": torch.zeros(rows, 1)}
        metadata = recipes.header_metadata("student", family, recipe, "lora")
        tensors = lora.lora_tensors(state, family, net)
        return comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0.0, lora_metadata=metadata)[0]

    def test_a_dense_run_does_not_say_that_lazy_inpainting_has_not_run_yet():
        how = {"steps": 2, "cfg": 1.0, "sampler": "euler"}
        dense, lazy = (
            one_node(comfy_tiny.patcher("flux"), "flux", **how, mode=mode)[1] for mode in ("dense", "session")
        )
        assert "has not run" not in dense + lazy
        assert "tokens are computed" not in dense
        assert "tokens are computed" in lazy

    def test_automatic_samples_few_step_models_as_they_were_trained_and_others_in_twenty_steps():
        model, seen = comfy_tiny.patcher("flux"), []
        few = student(model, steps=3, sigmas=(1.0, 0.8, 0.4, 0.0), prediction="flow")
        begin = lazy.Lazy._begin

        def spied(self, guider, sigmas, *rest):
            seen.append((sigmas.tolist(), guider.cfg))
            return begin(self, guider, sigmas, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lazy.Lazy, "_begin", spied)
            _, info = one_node(few, "flux", mode="session")
            _, slow = one_node(model, "flux")
            one_node(few, "flux", steps=5, cfg=2.0, sampler="euler")
        assert seen[0][0] == pytest.approx([1.0, 0.8, 0.4, 0.0])
        assert [len(levels) - 1 for levels, _ in seen] == [3, 20, 5]
        assert [cfg for _, cfg in seen] == [1.0, 1.0, 2.0]
        assert "sigmas 1, 0.8, 0.4, 0" in info
        assert "not recognised as a few-step model: 20 steps of euler at cfg 1" in slow
        assert way.way_of(
            comfy_tiny.patcher("sd3"), (64, 64), FakeVAE(), 0, 0.0, "automatic", "simple", 1.0, ({}, "")
        ).cfg == pytest.approx(4.5)
        with pytest.raises(ValueError, match="0 is only for the sampler 'automatic'"):
            one_node(few, "flux", sampler="euler")
        astray = student(model, steps=3, sigmas=(9.0, 3.0, 1.0, 0.0), prediction="eps")
        with pytest.raises(ValueError, match="choose another profile or the model that belongs to it"):
            one_node(astray, "flux")  # recognised and wrong here: not to be sampled as if it were no student

    def test_mode_trained_without_any_lora_is_told_about():
        model = comfy_tiny.patcher("flux")
        loaded, says = student(model, steps=4, sigmas=(1.0, 0.8, 0.6, 0.4, 0.0), prediction="flow"), "no LoRA is on"

        def info(model, mode):
            node = nodes.LazyInpaint.execute(model, mode, 1, 3, 5, "bare", 0, False, 1.0, 1.0).args[1]
            return says in node, says in one_node(model, "flux", steps=2, cfg=1.0, sampler="euler", mode=mode)[1]

        assert info(model, "trained") == (True, True)
        assert info(loaded, "trained") == (False, False)
        assert info(model, "session") == (False, False)

    @pytest.mark.parametrize(("first", "sees"), [(999, True), (399, False)])
    def test_automatic_lets_the_first_step_of_a_few_step_unet_see_the_prefill(first, sees):
        """From the top level on as a training state does; a model that begins lower was taught pure noise there."""
        model = comfy_tiny.patcher("sd15_eps")
        layer = next(n for n, _ in model.model.diffusion_model.named_modules() if n.endswith("attn1.to_q"))
        top = float(model.get_model_object("model_sampling").sigma(torch.tensor(float(first))))
        few = student(model, layer, steps=2, sigmas=(top, top / 2, 0.0), prediction="eps")
        found, noise = (
            way.way_of(few, (64, 64), FakeVAE(), 0, 0.0, "automatic", "simple", 1.0, ({}, "")),
            draw((1, 4, 8, 8), 1),
        )
        schedule = comfy_host.pack_module("nodes.comfy_denoiser").schedule_of(few.get_model_object("model_sampling"))
        starts = [
            found.sampler.first_state(schedule, found.sigmas[0], noise, v * torch.ones_like(noise)) for v in (1, 2)
        ]
        assert ((starts[1] - starts[0]).abs().max() > 0.5) == sees
        assert found.sigmas[0] == pytest.approx(top, rel=1e-3)

    def test_a_sampler_that_is_chosen_is_the_stock_one():
        model = comfy_tiny.patcher("sd3")
        latent, region, *_ = prepared(photo(1, 160, 224), spot(1, 160, 224), model, vae=vae_of("sd3"), grow=0, soften=0)
        positive, negative = (comfy_tiny.conditioning("sd3", s) for s in (1, 2))
        start = latent["samples"]
        with torch.inference_mode():
            noise, how = comfy.sample.prepare_noise(start, 1), (3, 2.0, "dpmpp_2m", "karras", positive, negative, start)
            made = comfy.sample.sample(model, noise, *how, denoise=0.7, noise_mask=latent["noise_mask"], seed=1)
            out = nodes.CompositeInpaint.execute(region, {"samples": made}, vae_of("sd3"), 0.0, True, True).args[0]
            how = (1, 3, 2.0, "dpmpp_2m", "karras", 0.7, "dense", "push-pull", 0, 0)
            given = (photo(1, 160, 224), spot(1, 160, 224), model, vae_of("sd3"), positive, negative)
            assert torch.equal(nodes.Inpaint.execute(*given, *how).args[0], out)

    # --- thresholds per step, of ComfyUI's own Differential Diffusion ------------------------------------------------

    def graded(shape):
        """Four bands of the hole: what may change from the first, second, third of three steps on, and never."""
        mask = torch.zeros(1, 1, *shape[-2:])
        for i, value in enumerate((1.0, 0.7, 0.4, 0.1)):
            mask[..., 4:8, 2 * i + 4 : 2 * i + 6] = value
        return mask

    def differential(model):
        extra = importlib.import_module("comfy_extras.nodes_differential_diffusion")
        return extra.DifferentialDiffusion.execute(model)[0]

    @pytest.mark.parametrize("mode", [None, "refresh", "session"])
    def test_differential_diffusion_thresholds_the_mask_at_the_few_steps_of_the_sampler_and_lazily(mode):
        """A cell that the mask lets go late is the given one until then: at each step its x0 is the latent."""
        sampler = comfy_host.pack_module("nodes.sampler")
        model, shape = differential(comfy_tiny.patcher("sd3")), shape_of("sd3")
        latent, mask, seen = draw(shape, 5), graded(shape), []
        levels = torch.tensor([1.0, 0.6, 0.3, 0.0])
        if mode is not None:
            patch, model = patched(model, mode=mode, warm=1, every=2)
        positive, negative = (comfy_tiny.conditioning("sd3", s) for s in (1, 2))

        def made(model):
            seen.clear()
            restart = sampler.RestartSampler(levels[:-1].tolist(), [1.0] * 3, "time", top=1.0)
            given = {"samples": latent, "noise_mask": mask}
            with torch.inference_mode(), pytest.MonkeyPatch.context() as spying:
                callback = lambda *_args: lambda step, x0, x, total: seen.append(x0.clone())  # noqa: E731
                spying.setattr(sampler.latent_preview, "prepare_callback", callback)
                guider = sampler.guider_of(model, positive, negative, 2.0)
                return sampler.sample_latent(model, guider, restart, levels, given, 3)["samples"].clone()

        out = made(model)
        bands = [(mask == torch.tensor(v)).expand(shape) for v in (1.0, 0.7, 0.4, 0.1)]
        inner = model.model.process_latent_in(latent)
        changed = [[bool((x0 - inner)[b].abs().max() > 1e-4) for b in bands] for x0 in seen]
        assert changed == [[True, False, False, False], [True, True, False, False], [True, True, True, False]]
        assert torch.allclose(out[mask.expand(shape) < 0.3], latent[mask.expand(shape) < 0.3], atol=1e-5)
        if mode is not None:
            assert "computed whole" not in patch.text
        # the control: without it all of the hole changes at once, the lowest band too
        plain = comfy_tiny.patcher("sd3")
        made(plain if mode is None else patched(plain, mode=mode, warm=1, every=2)[1])
        assert all((seen[0] - inner)[b].abs().max() > 1e-3 for b in bands)

    def inpainting_model(family):
        """As SD1.5 inpainting (9 channels) and Flux Fill (6 times the channels) are."""

        def fill():
            return comfy.model_base.Flux(
                comfy.supported_models.Flux(comfy_tiny.flux_config(in_channels=96)), device="cpu"
            )

        def nine():
            config = comfy.supported_models.SD15(comfy_tiny.unet(in_channels=9))
            config.unet_config.update(num_heads=4)
            model = comfy.model_base.BaseModel(config, device="cpu")
            model.set_inpaint()
            return model

        build = {"sd15_eps": nine, "flux": fill}[family]
        return comfy_tiny.Tiny(**{**vars(comfy_tiny.FAMILIES[family]), "build": build})

    @pytest.mark.parametrize("family", ["sd15_eps", "flux"])
    def test_an_inpainting_model_is_shown_the_picture_with_a_grey_hole(family):
        name = f"{family}_inpaint"
        comfy_tiny.FAMILIES[name] = inpainting_model(family)
        model = comfy_tiny.patcher(name)
        vae, given = vae_of(family), []
        conds = [comfy_tiny.conditioning(name, s) for s in (1, 2)]
        image, mask = photo(1, 512, 512), spot(1, 512, 512)  # not enlarged, so that it can be compared
        common = (model, vae, *conds, 1, 1, 1.0, "euler", "simple", 1.0, "session", "push-pull", 0, 0)
        inner = model.model._apply_model

        def spied(x, t, c_concat=None, *args, **kwargs):
            given.append(c_concat)
            return inner(x, t, c_concat, *args, **kwargs)

        model.model._apply_model = spied
        with torch.inference_mode():
            out, info = nodes.Inpaint.execute(image, mask, *common).args
        assert "grey hole" in info
        assert (out - image)[mask == 0].abs().max() == 0
        _, _, parts, holes, _ = prepared(image, mask, model, grow=0, soften=0)
        grey = parts.clone()
        grey[holes == 1] = 0.5
        wanted, prefilled = (model.model.process_latent_in(vae.encode(p)) for p in (grey, parts))
        first = int(family == "sd15_eps")  # whose mask comes before
        shown = given[0][:, first : first + wanted.shape[1]]
        assert torch.allclose(shown, wanted, atol=1e-5)
        assert (shown - prefilled).abs().max() > 0.01  # control: the prefill is something else
        assert "grey hole" not in prepared(image, mask, comfy_tiny.patcher(family))[-1]

    class VideoVAE(FakeVAE):
        """Four pictures to a frame, after a first one."""

        latent_dim = 3

        def temporal_compression_decode(self):
            return 4

        def encode(self, pixels):
            cells = super().encode(pixels)
            frames = [cells[:1], *(part.mean(0, keepdim=True) for part in cells[1:].split(4) if len(part))]
            return torch.cat(frames).movedim(0, 1)[None]

        def decode(self, latent):
            frames = latent[0].movedim(0, 1)
            return super().decode(torch.cat([frames[:1], frames[1:].repeat_interleave(4, 0)]))[None]

    @pytest.mark.parametrize("area", ["canvas", "crop"])
    def test_every_picture_of_a_video_has_its_own_mask(area):
        image, mask = photo(9), torch.zeros(9, 128, 160)
        mask[2, 40:60, 60:80] = mask[7, 60:80, 90:110] = 1
        options = {"area": area, "vae": VideoVAE(), "grow": 0, "soften": 0, "context": 1.0}
        latent, region, *_, info = prepared(image, mask, **options)
        touched = latent["noise_mask"]
        assert touched.shape == (1, 1, 3, *latent["samples"].shape[-2:])
        assert touched[0, 0].amax((1, 2)).tolist() == [0, 1, 1]
        if area == "crop":
            assert len({(b.top, b.left) for b in region.boxes}) == 1
        else:
            assert "tokens" in info
        made = {"samples": latent["samples"] + 0.2 * touched}
        (out,) = nodes.CompositeInpaint.execute(region, made, VideoVAE(), 0.0, True, True).args
        assert (out - image)[mask == 0].abs().max() == 0
        assert (out - image)[mask == 1].abs().mean() > 0.02
        with pytest.raises(ValueError, match="give 5 or 9"):
            prepared(image[:8], mask[:8], **options)

    def vae_of(family):
        """With the family's channels, and frames where its latents have them."""
        vae = VideoVAE() if family in ("wan_wide", "qwen_image") else FakeVAE()
        vae.channels = comfy_tiny.FAMILIES[family].shape[0]
        return vae

    EVERY = [(f, m) for f in FAMILIES for m in lazy.MODES] + [(f, "auto") for f in ("sd15_eps", "sdxl")]

    @pytest.mark.parametrize(("family", "mode"), EVERY, ids=[f"{f}-{m}" for f, m in EVERY])
    def test_outside_is_the_given_picture_in_every_mode_of_every_family(family, mode, monkeypatch, request):
        monkeypatch.setattr(nodes, "usual_of", lambda _model: 0)  # tiny pictures for UNets too
        model = request.getfixturevalue("kept_models")(family)
        b = 5 if family == "wan_wide" else 1
        image, mask = photo(b, 160, 224), spot(b, 160, 224, 30, 40)
        mask[:, 110:118, 150:158] = 0.5  # a second island, soft all over
        conds = [comfy_tiny.conditioning(family, s) for s in (1, 2)]
        common = (model, vae_of(family), *conds, 1, 2, 1.0, "euler", "simple", 1.0, mode, "push-pull", 4, 6)
        with torch.inference_mode():
            (out, info) = nodes.Inpaint.execute(image, mask, *common).args
        untouched = nodes.masks.soften(nodes.masks.dilate(mask, 4), 6) == 0
        assert 0.5 < untouched.float().mean() < 0.95
        assert (out - image)[untouched].abs().max() == 0
        assert torch.isfinite(out).all()
        assert (out - image)[mask == 1].abs().mean() > 0.02
        assert ("tokens are computed" in info) == (mode != "dense" and family in FAMILIES)

    @pytest.fixture(scope="module")
    def kept_models():
        return functools.cache(comfy_tiny.patcher)

    def seam(image, mask):
        """Mean step across the border of the mask over the mean step between its neighbours outside."""
        hole = mask[0] > 0
        steps = (image[0, :, 1:] - image[0, :, :-1]).abs().mean(-1)
        near = (nodes.masks.dilate(mask, 4)[0] > 0) & ~hole
        return (steps[hole[:, 1:] ^ hole[:, :-1]].mean() / steps[near[:, 1:] & near[:, :-1]].mean()).item()

    @pytest.mark.parametrize("local", [True, False])
    def test_no_seam_on_a_smooth_picture_through_a_real_autoencoder(local):
        """The shapes world's never saw such pictures: it is off by 0.15 on average, and a hard edge shows that."""
        shapes = comfy_host.pack_module("dmd_core.shapes")
        vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(shapes.AUTOENCODER), safe_load=True))
        y, x = torch.linspace(0, 6, 192)[:, None], torch.linspace(0, 6, 256)[None]
        tones = [0.5 + 0.3 * (x + y).sin(), 0.5 + 0.3 * (x - 0.5 * y).cos(), 0.5 + 0.2 * (0.7 * x).sin() + 0 * y]
        image, mask, found = torch.stack(tones, -1)[None], spot(1, 192, 256, 80, 110, 40), {}
        for soften in (8, 0):  # the default, and the control
            with torch.inference_mode():
                latent, region, *_ = prepared(image, mask, vae=vae, soften=soften)
                (out,) = nodes.CompositeInpaint.execute(region, latent, vae, 0.0, True, local).args
            assert (out - image)[region.mask == 0].abs().max() == 0
            assert (out - image)[region.mask == 1].abs().mean() > 0.03
            found[soften] = seam(out, region.mask) / seam(image, region.mask)
        assert found[8] == pytest.approx(1, abs=0.1)
        assert found[0] > 1.5

    def test_an_offloaded_model_is_told_about():
        model, said = comfy_tiny.patcher("sd3"), []
        shape = shape_of("sd3")
        patch, clone = patched(model)
        patch.tell, begin = said.append, patch._begin

        def offloaded(guider, *args):
            guider.model_patcher.model.model_lowvram = True
            return begin(guider, *args)

        sampled(clone, "sd3", hole(shape), draw(shape, 5))
        assert not any("gains little" in text for text in said)
        patch._begin = offloaded
        sampled(clone, "sd3", hole(shape), draw(shape, 5))
        assert any("gains little" in text for text in said)

    def test_only_what_changed_is_encoded_and_the_rest_of_the_latent_stays_to_the_bit():
        class Counting(FakeVAE):
            seen = ()

            def encode(self, pixels):
                self.seen = (*self.seen, pixels[..., 0].numel())
                return super().encode(pixels)

        image, first, second = photo(1, 512, 512), spot(1, 512, 512), spot(1, 512, 512, 300, 400)
        vae = Counting()
        options = {"grow": 0, "soften": 0, "area": "canvas", "vae": vae, "local": True}
        before = prepared(image, first, **options)[0]["samples"]
        latent, *_, info = prepared(image, second, **options)
        after = latent["samples"]
        assert vae.seen[0] == 512 * 512
        assert sum(vae.seen[1:]) < 0.6 * vae.seen[0]
        assert "of the canvas was encoded" in info
        assert torch.equal(after[..., 45:, :20], before[..., 45:, :20])
        whole = prepared(image, second, **{**options, "local": False})[0]["samples"]
        assert (after - whole).abs().max() < 0.05
        assert vae.seen[-1] == 512 * 512

    @pytest.mark.parametrize("node", ["PrepareInpaint", "LazyInpaint", "CompositeInpaint", "Inpaint"])
    def test_schemas_hold_and_every_choice_is_explained(node):
        schema = getattr(nodes, node).GET_SCHEMA()
        assert schema.node_id == f"DMD_{node}"
        assert schema.search_aliases
        for given in schema.inputs:
            assert given.tooltip or given.id in ("model", "vae"), given.id
