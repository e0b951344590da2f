"""The trained lazy student on ComfyUI's transformers: gradients, one function in training and use, a whole run."""

from pathlib import Path

import comfy_host
import pytest
import torch

pytestmark = pytest.mark.comfy

if not comfy_host.in_comfy():

    @pytest.mark.skipif(comfy_host.missing() is not None, reason=str(comfy_host.missing()))
    def test_the_lazy_student_trains_inside_comfyui():
        comfy_host.run_tests_in_comfy(Path(__file__))

else:
    comfy_host.start_comfy("--use-pytorch-cross-attention")

    import comfy_tiny
    import contract
    import test_comfy_lazy as host
    from test_comfy_distill import Distill, draw, inputs, method, place, save  # noqa: F401 - place is a fixture

    import nodes

    sources = comfy_host.pack_module("nodes.comfy_source")
    conds = comfy_host.pack_module("nodes.comfy_conds")
    partials = comfy_host.pack_module("nodes.comfy_partial")
    lazy_nodes = comfy_host.pack_module("nodes.inpaint")
    cat = comfy_host.pack_module("dmd_core.conditioning").cat
    engine = comfy_host.pack_module("dmd_core.inpaint")
    adapters = comfy_host.pack_module("dmd_core.adapters")
    families = comfy_host.pack_module("dmd_core.families")
    discriminators = comfy_host.pack_module("dmd_core.discriminators")
    lazy_ladd = comfy_host.pack_module("dmd_core.objectives.lazy_ladd")
    FAMILIES = ("flux", "flux2", "sd3", "sd35_medium", "qwen_image", "z_image_deep")

    class Fresh:
        """OnCanvas keeps its context, and the contract changes adapters between its calls."""

        def __init__(self, denoiser, canvas, hole):
            self.net, self.canvas, self.hole = partials.NativePartial(denoiser), canvas, hole

        @property
        def schedule(self):
            return self.net.schedule

        def __call__(self, x, sigma, cond):
            return engine.OnCanvas(self.net, self.canvas, self.hole)(x, sigma, cond)

    def holes(shape, patch):
        """Two of one size at different places, bool [2 n]."""
        chosen = torch.zeros(2, shape[-2] // patch, shape[-1] // patch, dtype=torch.bool)
        chosen[0, 0:2, 1:3] = chosen[1, 1:3, 0:2] = True
        return chosen.flatten(1)

    def case_of(family, denoiser):
        shape = host.shape_of(family)[1:]
        singles = tuple(conds.conds_from(comfy_tiny.conditioning(family, s))[0] for s in (1, 2))
        patch = partials.NativePartial(denoiser).patch
        student = Fresh(denoiser, host.draw((2, *shape), 5), holes(shape, patch))
        return contract.Case(
            name=family,
            denoiser=student,
            bank=denoiser.bank,
            shape=(2, *shape),
            sigmas=(0.9, 0.3),
            conds=singles,
            both=cat(singles),
            host=lambda *_: None,
        )

    @pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_gradients_of_a_part_are_finite_differences(family, checkpointing):
        with sources.NativeTeacher(comfy_tiny.patcher(family), checkpoint_blocks=checkpointing) as denoiser:
            case = case_of(family, denoiser)
            contract.gradients_reach_only_the_active_set(case)
            contract.gradient_is_the_finite_difference(case)
            contract.gradient_survives_another_set_at_backward(case)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_training_and_the_lazy_node_compute_one_function(family):
        model = comfy_tiny.patcher(family)
        x, latent = host.draw(host.shape_of(family), 3), host.draw(host.shape_of(family), 5)
        mask = host.hole(x.shape)
        patch, clone = host.patched(model, mode="trained")
        runs = host.spy(patch)
        asked = [(x, 0.7), (x, 0.3)]
        used = host.ask(clone, family, asked, mask, latent=latent)
        run = runs[0]
        assert not run.why
        assert torch.equal(run.tokens.computed, run.tokens.hole)
        canvas = clone.model.process_latent_in(latent)
        with sources.NativeTeacher(model) as denoiser, torch.no_grad():
            cond = conds.conds_from(comfy_tiny.conditioning(family, 1, 20))[0]
            student = engine.OnCanvas(partials.NativePartial(denoiser), canvas, run.tokens.hole[None])
            for (state, sigma), other in zip(asked, used, strict=True):
                trained = student(state, torch.tensor([sigma]), cond)
                assert (trained - other).abs().max() < 1e-5
                whole = denoiser(state, torch.tensor([sigma]), cond)
                assert (whole - other)[host.inside(run, other)].abs().max() > 1e-3  # control

    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_heads_of_lazy_ladd_hear_the_tokens_of_the_hole_alone(family):
        """24 tokens of most families' pictures: Z-Image pads them to 32, behind 20 of text and 12 of their padding."""
        with sources.NativeTeacher(comfy_tiny.patcher(family)) as denoiser:
            net, part = denoiser.net, partials.NativePartial(denoiser)
            layers = families.detect(net).feature_layers([n for n, _ in net.named_modules() if n])
            x = host.draw((2, *host.shape_of(family)[1:-2], 8, 12), 3)
            cond = cat([conds.conds_from(comfy_tiny.conditioning(family, s))[0] for s in (1, 2)])
            reader = discriminators.FeatureReader(denoiser, net, layers)
            heads = torch.nn.ModuleList()
            judge = lazy_ladd.InHole(reader, heads, part.multiple)
            contract.only_the_hole_is_heard(judge, x, cond, holes(x.shape, part.patch), part.patch)
            if family == "z_image_deep":
                judge = lazy_ladd.InHole(reader, heads)
                with pytest.raises(AssertionError, match="around the hole is heard"):  # control: its padding forgotten
                    contract.only_the_hole_is_heard(judge, x, cond, holes(x.shape, part.patch), part.patch)

    @pytest.mark.parametrize("family", FAMILIES)
    @torch.no_grad()
    def test_heads_hear_every_sample_where_prompts_have_different_lengths(family):
        """One call of the network takes one length."""
        with sources.NativeTeacher(comfy_tiny.patcher(family)) as denoiser:
            net, part = denoiser.net, partials.NativePartial(denoiser)
            layers = families.detect(net).feature_layers([n for n, _ in net.named_modules() if n])
            singles = [conds.conds_from(comfy_tiny.conditioning(family, s, 20 - 8 * (s == 1)))[0] for s in range(3)]
            x, sigma = host.draw((3, *host.shape_of(family)[1:]), 3), torch.tensor([0.9, 0.5, 0.3])
            view = adapters.Adapted(denoiser, denoiser.bank, {})
            reader = discriminators.FeatureReader(view, net, layers)
            judge = lazy_ladd.InHole(reader, torch.nn.ModuleList(), part.multiple)
            hole = holes(x.shape, part.patch)
            judge.hole = torch.cat([hole, hole[:1]])
            found, heard = reader(x, sigma, cat(singles)), judge.heard(x, sigma, cat(singles))
            for i, cond in enumerate(singles):
                row = slice(i, i + 1)
                judge.hole = torch.cat([hole, hole[:1]])[row]
                for whole, alone in zip(found, reader(x[row], sigma[row], cond), strict=True):
                    torch.testing.assert_close(whole[row], alone[:, -whole.shape[1] :], atol=1e-4, rtol=1e-4)
                for together, alone in zip(heard, judge.heard(x[row], sigma[row], cond), strict=True):
                    torch.testing.assert_close(together[row], alone, atol=1e-4, rtol=1e-4)
                    assert (together[i] - together[i - 1]).abs().max() > 1e-2  # control: samples differ

    def test_the_context_is_read_once_and_without_the_hole():
        model = comfy_tiny.patcher("flux")
        x, latent = host.draw(host.shape_of("flux"), 3), host.draw(host.shape_of("flux"), 5)
        mask = host.hole(x.shape)
        painted = torch.where(mask > 0, 9.0, latent)
        around = torch.where(mask > 0, latent, 9.0)
        out = []
        for canvas in (latent, painted, around):
            patch, clone = host.patched(model, mode="trained")
            runs = host.spy(patch)
            out.append(host.ask(clone, "flux", [(x, 1.0)] * 3, mask, latent=canvas)[-1])
        tokens, text = len(runs[0].tokens.computed), runs[0].text
        hole = int(runs[0].tokens.hole.sum())
        assert runs[0].work == 3 * (hole + text) + (tokens - hole) + text
        where = host.inside(runs[0], out[0])
        assert torch.equal(out[0][where], out[1][where])
        assert (out[0] - out[2])[where].abs().max() > 1e-2  # control

    def test_all_hole_is_the_plain_network_and_most_of_it_is_still_lazy():
        model = comfy_tiny.patcher("flux")
        x = host.draw(host.shape_of("flux"), 3)
        bare = host.ask(model, "flux", [(x, 0.7)], None)[0]
        patch, clone = host.patched(model, mode="trained")
        assert torch.equal(host.ask(clone, "flux", [(x, 0.7)], torch.ones(1, 1, 16, 16))[0], bare)
        patch, clone = host.patched(model, mode="trained")
        most = torch.ones(1, 1, 16, 16)
        most[..., :2] = 0
        assert not torch.equal(host.ask(clone, "flux", [(x, 0.7)], most)[0], bare)
        assert "off" not in patch.text

    @pytest.mark.parametrize(
        ("family", "by", "rate"),
        [
            ("flux", "Lazy inpainting", "critic_lr"),
            ("sd3", "Lazy inpainting", "critic_lr"),
            ("flux", "Lazy inpainting with LADD", "discriminator_lr"),
        ],
    )
    def test_a_run_makes_a_lora_that_mode_trained_uses(family, by, rate):
        given = inputs(
            family,
            method=method(by, adapt=2, **{rate: 1e-2}),
            updates=5,
            snapshot_every=5,
            checkpointing=True,
        )
        before = draw(family, given["model"])
        *_, sheet, report, run = Distill.execute(**given).result
        assert torch.equal(draw(family, given["model"]), before), "the MODEL that went in has changed"
        assert "finished" in report
        assert sheet.ndim == 4
        path, *_ = save.execute(run=run).result
        with torch.inference_mode():
            (loaded,) = nodes.LoraLoaderModelOnly().load_lora_model_only(given["model"], Path(path).name, 1.0)
        shape = host.shape_of(family)
        latent, mask = host.draw(shape, 5), host.hole(shape)
        made = {}
        for name, model in (("bare", given["model"]), ("lora", loaded)):
            patched, _said = lazy_nodes.LazyInpaint.execute(
                model, "trained", 1, 3, 5, "canvas", 0, False, 4.0, 16.0
            ).args
            made[name] = host.sampled(patched, family, mask, latent, steps=2, cfg=1.0)
        known = (mask == 0).expand_as(latent)
        assert (made["lora"] - latent)[known].abs().max() < 1e-5
        assert (made["lora"] - made["bare"])[~known].abs().max() > 1e-3

    def test_a_unet_is_refused_in_a_sentence():
        with pytest.raises(ValueError, match="UNets are cropped instead"):
            Distill.execute(**inputs("sd15_eps", method=method("Lazy inpainting")))
