"""Seed Variety and Compare Grid in the real ComfyUI, on tiny models."""

from pathlib import Path

import comfy_host
import pytest
import torch

pytestmark = pytest.mark.comfy

if not comfy_host.in_comfy():

    @pytest.mark.skipif(comfy_host.missing() is not None, reason=str(comfy_host.missing()))
    def test_variety_and_grid_inside_comfyui():
        comfy_host.run_tests_in_comfy(Path(__file__))

else:
    comfy_host.start_comfy()

    import comfy_tiny

    variety = comfy_host.pack_module("nodes.variety")
    grid = comfy_host.pack_module("nodes.grid")
    few_step = comfy_host.pack_module("nodes.few_step")
    load_shapes = comfy_host.pack_module("nodes.load_shapes").LoadShapes
    metrics = comfy_host.pack_module("dmd_core.metrics")
    NAMES = [("sd15_eps", "dmd2-sdxl-4step"), ("flux", "flux-schnell")]

    def sample(model, name, profile, seed, batch=1, steps=0):
        channels, *rest = comfy_tiny.FAMILIES[name].shape
        start = {"samples": torch.zeros(batch, channels, *rest[:-2], 8, 8)}
        out = few_step.FewStepSampler.execute(
            model, comfy_tiny.conditioning(name, 1), start, seed, steps, 1.0, 0.0, profile
        )
        return out[0]["samples"]

    @torch.inference_mode()
    @pytest.mark.parametrize(("name", "profile"), NAMES)
    @pytest.mark.parametrize("how", [variety.PROMPT, variety.IMAGE])
    def test_variety_is_off_at_zero_repeats_itself_and_leaves_nothing(name, profile, how):
        model = comfy_tiny.patcher(name)
        plain = sample(model, name, profile, 3)
        assert torch.equal(sample(variety.Variety.execute(model, how, 0.0)[0], name, profile, 3), plain)
        varied = variety.Variety.execute(model, how, 0.5)[0]
        image = sample(varied, name, profile, 3)
        assert (image - plain).abs().max() > 1e-3
        assert torch.equal(sample(varied, name, profile, 3), image)
        assert torch.equal(sample(model, name, profile, 3), plain)

    @torch.inference_mode()
    def test_a_single_step_is_not_spoilt_by_light_and_colour():
        model = comfy_tiny.patcher("sd15_eps")
        varied = variety.Variety.execute(model, variety.IMAGE, 0.5)[0]
        images = [sample(m, "sd15_eps", "dmd2-sdxl-1step", 3) for m in (model, varied)]
        assert torch.equal(*images)

    class FakeVAE:
        """Three of the channels as a picture."""

        def decode(self, samples):
            return samples[:, :3].movedim(1, -1).sigmoid()

    def test_a_row_of_the_grid_is_called_after_the_file_of_its_model():
        teacher, student = ((load_shapes.execute(k).result)[0] for k in ("teacher", "student, 4 steps"))
        rows = grid.titles({"model": teacher, "model_2": student, "model_3": comfy_tiny.patcher("sd15_eps")}, {}, "")
        assert rows == {"model": "shapes teacher", "model_2": "shapes student", "model_3": "model 3"}
        same = grid.titles({"model": teacher, "model_2": teacher}, {}, "")
        assert same == {"model": "model, shapes teacher", "model_2": "model 2, shapes teacher"}

    @torch.inference_mode()
    def test_the_grid_shows_each_image_as_it_is_sampled_alone_and_says_what_was_left_out():
        model, other = comfy_tiny.patcher("sd15_eps"), comfy_tiny.patcher("sd15_eps", 1)
        # the tiny model is recognised as nothing, so both rows of steps are Euler's
        start = {"samples": torch.zeros(1, 4, 8, 8)}
        cond = comfy_tiny.conditioning("sd15_eps", 1)
        out = grid.Grid.execute(
            model, cond, cond, FakeVAE(), start, "2, 3, 0", "1, 2, 3", 1.0, grid.NONE, "0", 64, model_2=other
        )
        assert out[0].ndim == 4
        assert out[0].shape[-1] == 3
        lines = out[1].splitlines()
        assert sum("seeds differ by" in line for line in lines) == 4
        assert sum("left out" in line for line in lines) == 2  # nobody knows their own number of steps
        assert "model 2, 3 steps" in out[1]  # nobody knows a file of either
        chosen = grid.settings(model, start, 2, 1.0, {}, "", "model")
        images, seconds = grid.picture_row(chosen, (cond, cond), start, FakeVAE(), [2])
        again, _ = grid.picture_row(chosen, (cond, cond), start, FakeVAE(), [1, 2])
        assert seconds > 0
        assert torch.equal(images[0], again[1])
        assert not torch.equal(again[0], again[1])
        for given, message in [({"seeds": "a"}, "commas"), ({"seeds": ",".join(map(str, range(200)))}, "accepted")]:
            with pytest.raises(ValueError, match=message):
                grid.Grid.execute(model, cond, cond, FakeVAE(), start, "2, 3, 4", **given)

    @pytest.mark.parametrize("node", [variety.Variety, grid.Grid])
    def test_schemas_are_whole(node):
        schema = node.GET_SCHEMA()
        assert schema.node_id.startswith("DMD_")
        assert schema.description
        assert all(i.tooltip for i in schema.inputs)
        assert node.GET_NODE_INFO_V1()["display_name"] == schema.display_name
