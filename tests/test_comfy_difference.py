"""The LoRA of a difference, made by Save Student in the real ComfyUI and loaded by its stock loader."""

from pathlib import Path

import comfy_host
import pytest
import torch

pytestmark = pytest.mark.comfy

if not comfy_host.in_comfy():

    @pytest.mark.skipif(comfy_host.missing() is not None, reason=str(comfy_host.missing()))
    def test_the_lora_of_a_difference_inside_comfyui():
        comfy_host.run_tests_in_comfy(Path(__file__))

else:
    comfy_host.start_comfy()

    import comfy.sd
    import comfy.utils
    import comfy_tiny
    import folder_paths

    save = comfy_host.pack_module("nodes.save")
    difference = comfy_host.pack_module("nodes.difference")
    profiles = comfy_host.pack_module("dmd_core.weights.profiles")
    header = comfy_host.pack_module("dmd_core.weights.header")
    RANK = 3
    NORM = {"sd15_eps": "out.0.weight", "flux": "double_blocks.0.img_attn.norm.query_norm.weight"}

    @pytest.fixture
    def shelf(tmp_path):
        known = folder_paths.folder_names_and_paths["loras"]
        folder_paths.folder_names_and_paths["loras"] = ([str(tmp_path)], known[1])
        yield tmp_path
        folder_paths.folder_names_and_paths["loras"] = known

    def pair(name):
        """Base, and the same with a known low rank more in every matrix and every kernel, and in one norm."""
        base, other = (comfy_tiny.patcher(name) for _ in range(2))
        rng = torch.Generator().manual_seed(7)
        for path, p in other.model.diffusion_model.named_parameters():
            if p.ndim in (2, 4) and path.endswith("weight"):
                flat = p.data.flatten(1)
                low = torch.randn(len(flat), RANK, generator=rng) @ torch.randn(RANK, flat.shape[1], generator=rng)
                p.data = p.data + (0.05 * low / flat.shape[1] ** 0.5).reshape(p.shape)
        norms(other)[NORM[name]].data += 0.1
        return base, other

    def norms(model):
        named = model.model.diffusion_model.named_parameters()
        return {n: p for n, p in named if p.ndim == 1 and n.endswith("weight")}

    def matrices(model):
        named = model.model.diffusion_model.named_parameters()
        return {n: p for n, p in named if p.ndim in (2, 4) and n.endswith("weight")}

    def execute(base, distilled, **options):
        return save.Save.execute(
            "", name="delta", what=save.DIFFERENCE, dtype="fp32", model=base, distilled=distilled, **options
        )

    @torch.inference_mode()
    @pytest.mark.parametrize("name", ["sd15_eps", "flux"])
    def test_the_stock_loader_makes_the_distilled_model_of_the_base(name, shelf, caplog):
        base, other = pair(name)
        before = {n: p.clone() for n, p in matrices(base).items()}
        path, text, _ = execute(base, other, rank=RANK + 1)
        assert Path(path).parent == shelf
        assert "100.0% on average" in text
        assert "1 norms and biases changed too, which a LoRA cannot hold" in text
        tensors = comfy.utils.load_torch_file(path, safe_load=True)
        student = comfy.sd.load_lora_for_models(base, None, tensors, 1.0, 0.0)[0]
        assert not any("not loaded" in r.getMessage() for r in caplog.records)
        student.patch_model()
        wanted, given = matrices(other), matrices(student)
        for n, weight in wanted.items():
            torch.testing.assert_close(given[n], weight, atol=1e-4, rtol=0, msg=n)
        assert max((given[n] - before[n]).abs().max() for n in wanted) > 1e-2, "the control: there was a difference"
        left = norms(student)[NORM[name]]
        assert torch.equal(left, norms(base)[NORM[name]])
        assert not torch.equal(left, norms(other)[NORM[name]]), "what a LoRA cannot hold stays the base's"
        student.unpatch_model()
        assert all(torch.equal(p, before[n]) for n, p in matrices(base).items())

    @torch.inference_mode()
    def test_rank_and_energy_are_told(shelf):
        base, other = pair("sd15_eps")
        _, text, _ = execute(base, other, rank=1)
        assert "rank 1 to 1" in text
        assert "100.0% on average" not in text
        _, text, _ = execute(base, other, rank=8, energy=0.5)
        assert f"rank 1 to {RANK}" in text or "rank 1 to 2" in text

    @torch.inference_mode()
    def test_what_cannot_be_taken_apart_is_refused(shelf):
        base, other = pair("sd15_eps")
        with pytest.raises(ValueError, match="needs two models"):
            execute(base, None)
        with pytest.raises(ValueError, match="do not differ"):
            execute(base, base)
        with pytest.raises(ValueError, match="do not match"):
            execute(base, comfy_tiny.patcher("flux"))
        other.add_patches(
            {"diffusion_model.out.2.weight": (torch.zeros_like(other.model.diffusion_model.out[2].weight),)}
        )
        with pytest.raises(ValueError, match="straight from its loader"):
            execute(base, other)
        assert list(shelf.iterdir()) == []

    def test_a_known_model_gives_its_lora_the_recipe(shelf):
        for name in ("dmd2-sdxl-4step", "flux-schnell", "sdxl-lightning"):
            profile = profiles.profiles()[name]
            recipe = difference.recipe_of(profiles.Match(profile=profile, sure="likely", source="x"), "sdxl", 8)
            again = profiles.recognise_file(
                profiles.Evidence(name="delta.safetensors", metadata={"dmd.recipe": recipe.to_json()})
            ).profile
            assert again.trained() == pytest.approx(profile.trained())
            assert again.gammas(profile.steps) == [profile.gamma] * profile.steps
        # what a recipe cannot say is left to the user
        tcd = profiles.profiles()["sdxl-turbo"]
        assert difference.recipe_of(profiles.Match(profile=tcd, sure="likely"), "sdxl", 8) is None
        assert difference.recipe_of(profiles.Match(), "sdxl", 8) is None
