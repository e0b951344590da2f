"""Files as they come: sound ones are described, damaged and hostile ones are refused, and nothing in them ever runs."""

import json
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmd_core.shapes import WEIGHTS
from dmd_core.weights.doctor import coverage, describe, diagnose, repair
from dmd_core.weights.header import MAX_HEADER, Refused, called, read_header
from dmd_core.weights.recipe import RECIPE_KEY, Recipe


def raw(path: Path, header: bytes | dict, data: bytes = b"", length: int | None = None) -> Path:
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(body) if length is None else length) + body + data)
    return path


def entry(shape, size, start=0, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + size]}


BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"


def unet(prefix="", family_width=2048):
    return {
        f"{prefix}conv_in.weight": torch.randn(320, 4, 3, 3),
        f"{prefix}time_embedding.linear_1.weight": torch.randn(16, 320),
        f"{prefix}{BLOCK}.to_k.weight": torch.randn(8, family_width),
        f"{prefix}down_blocks.1.resnets.0.conv1.weight": torch.randn(8, 4, 3, 3),
    }


def peft_lora(rank=4):
    rng = torch.Generator().manual_seed(0)
    layers = {f"{BLOCK}.to_k": (2048, 8), f"{BLOCK}.to_q": (8, 8), "down_blocks.1.attentions.0.proj_in": (8, 8)}
    found = {}
    for n, (i, o) in layers.items():
        found[f"unet.{n}.lora_A.weight"] = torch.randn(rank, i, generator=rng)
        found[f"unet.{n}.lora_B.weight"] = torch.randn(o, rank, generator=rng)
    return found


# --- sound files ----------------------------------------------------------------------------------------------------


def test_our_header_reads_what_the_library_writes(tmp_path):
    path = tmp_path / "sound.safetensors"
    save_file({"b": torch.ones(2, 3).half(), "a": torch.ones(4), "e": torch.ones(0)}, path, {"k": "v"})
    header = read_header(path)
    assert header.shapes == {"b": (2, 3), "a": (4,), "e": (0,)}
    assert header.dtypes["b"] == "F16"
    assert header.metadata == {"k": "v"}
    save_file({"a": torch.ones(5)}, tmp_path / "other.safetensors")
    assert read_header(tmp_path / "other.safetensors").sha256 != header.sha256


def test_a_pickle_of_plain_tensors_is_read_without_running_it(tmp_path):
    path = tmp_path / "model.bin"
    torch.save({"generator": unet("module.")}, path)
    header = read_header(path)
    assert header.format == "pickle"
    assert header.wrapper == "generator"
    found = diagnose(path)
    assert found.structure.family == "sdxl"
    assert found.structure.prefix == "module."
    assert {f.fix for f in found.findings} >= {"prefix removed", "saved as .safetensors"}


# --- hostile and damaged files --------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (exec, (f"open({str(self.marker)!r}, 'w').write('ran')",))


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, protocol):
    marker, path = tmp_path / "ran.txt", tmp_path / "evil.ckpt"
    torch.save({"w": torch.ones(2), "x": Bomb(marker)}, path, pickle_protocol=protocol)
    with pytest.raises(Refused, match=r"would call .*exec.*nothing was executed"):
        read_header(path)
    assert not marker.exists()
    # control: the bomb is live
    torch.load(path, weights_only=False)
    assert marker.exists()


def test_a_bare_pickle_is_refused_and_does_not_run(tmp_path):
    marker, path = tmp_path / "ran.txt", tmp_path / "evil.safetensors"
    path.write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(Refused, match="nothing was executed"):
        describe(path)
    assert not marker.exists()


def test_calls_are_found_by_every_opcode():
    assert "builtins exec" in " ".join(called(pickle.dumps(Bomb("x"), protocol=4)))
    assert any("exec" in c for c in called(pickle.dumps(Bomb("x"), protocol=0)))
    assert called(pickle.dumps({"a": [1, 2.0, "text"]}, protocol=4)) == set()
    assert called(b"\x80\x02garbage") == {"a damaged instruction list"}


def archive(path, entries, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as f:
        for name, data in entries.items():
            f.writestr(name, data)
    return path


@pytest.mark.parametrize(
    ("entries", "compression", "word"),
    [
        ({"../../evil/data.pkl": b"\x80\x02}."}, zipfile.ZIP_STORED, "leaves its folder"),
        ({"/abs/data.pkl": b"\x80\x02}."}, zipfile.ZIP_STORED, "leaves its folder"),
        ({"a/..\\..\\b": b"", "a/data.pkl": b"\x80\x02}."}, zipfile.ZIP_STORED, "leaves its folder"),
        ({"a/data.pkl": b"\x80\x02}."}, zipfile.ZIP_DEFLATED, "compressed"),
        ({"readme.txt": b"hello"}, zipfile.ZIP_STORED, "without a torch index"),
        ({"a/data.pkl": b"\x80\x02}."}, zipfile.ZIP_STORED, "weights|table of tensors"),
    ],
)
def test_archives_with_tricks_are_refused(tmp_path, entries, compression, word):
    with pytest.raises(Refused, match=word):
        read_header(archive(tmp_path / "x.pt", entries, compression))


def hostile():
    good = entry((2,), 8)
    deep = b"[" * 200_000
    return {
        "empty": (b"", b"", 0, "too few"),
        "absurd header size": ({"a": good}, b"\0" * 8, 2**63, "announces a header"),
        "header above the limit": ({"a": good}, b"\0" * 8, MAX_HEADER + 1, "announces a header"),
        "header longer than the file": ({"a": good}, b"", 10_000, "announces a header"),
        "no JSON": (b"{not json at all}", b"", None, "broken safetensors header"),
        "deep JSON": (deep, b"", None, "broken safetensors header"),
        "a list": (b"[1, 2, 3, 4]", b"", None, "no table"),
        "a name twice": (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}', b"\0" * 4, None, "twice"),
        "cut off": ({"a": good}, b"\0" * 5, None, "cut off, 3 bytes are missing"),
        "too long": ({"a": good}, b"\0" * 9, None, "1 bytes too many"),
        "overlap": ({"a": good, "b": entry((2,), 8, 4)}, b"\0" * 12, None, "overlaps"),
        "gap": ({"a": good, "b": entry((2,), 8, 12)}, b"\0" * 20, None, "gap"),
        "shape lies": ({"a": entry((3,), 8)}, b"\0" * 8, None, "claims shape"),
        "huge shape": ({"a": entry((2**61, 2**61), 8)}, b"\0" * 8, None, "claims shape"),
        "negative shape": ({"a": entry((-2,), 8)}, b"\0" * 8, None, "entry of 'a' is broken"),
        "boolean shape": ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"\0" * 4, None, "broken"),
        "offsets backwards": ({"a": {"dtype": "F32", "shape": [0], "data_offsets": [4, 0]}}, b"\0" * 4, None, "claims"),
        "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, b"\0" * 4, None, "entry of 'a' is broken"),
        "unknown type": ({"a": entry((2,), 8, dtype="Q4_K")}, b"\0" * 8, None, "number format"),
        "path in a name": ({"../../etc/passwd": good}, b"\0" * 8, None, "looks like a path"),
        "absolute name": ({"/etc/passwd": good}, b"\0" * 8, None, "looks like a path"),
        "windows name": ({"C:\\x": good}, b"\0" * 8, None, "looks like a path"),
        "control letter": ({"a\u0000b": good}, b"\0" * 8, None, "looks like a path"),
        "metadata no text": ({"__metadata__": {"k": 1}, "a": good}, b"\0" * 8, None, "metadata"),
    }


@pytest.mark.parametrize("case", hostile())
def test_damaged_and_hostile_headers_are_refused_with_a_reason(tmp_path, case):
    header, data, length, word = hostile()[case]
    path = raw(tmp_path / "x.safetensors", header, data, length) if case != "empty" else tmp_path / "x.safetensors"
    if case == "empty":
        path.write_bytes(b"")
    with pytest.raises(Refused, match=word) as refusal:
        diagnose(path)
    assert "Traceback" not in str(refusal.value)
    assert len(str(refusal.value)) < 400


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"<!DOCTYPE html><html>not found</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "text file"),
        (b'{"error": "unauthorized"}', "text file"),
        (b"GGUF" + b"\0" * 40, "GGUF"),
        (b"PK\x03\x04 cut", "cut off or damaged"),
    ],
)
def test_files_that_are_something_else_are_named(tmp_path, content, word):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(Refused, match=word):
        read_header(path)


def test_a_truncated_download_of_any_length_is_refused(tmp_path):
    whole = tmp_path / "whole.safetensors"
    save_file({"a": torch.randn(16, 16), "b": torch.randn(8)}, whole)
    content = whole.read_bytes()
    for keep in (0, 1, 7, 8, 9, 40, len(content) // 2, len(content) - 1):
        part = tmp_path / "part.safetensors"
        part.write_bytes(content[:keep])
        with pytest.raises(Refused):
            read_header(part)
    assert read_header(whole)


# --- diagnosis and repair -------------------------------------------------------------------------------------------


def test_a_peft_unet_lora_is_a_problem_and_its_repair_has_none(tmp_path):
    path = tmp_path / "slider.safetensors"
    save_file(peft_lora(), path, {"author": "me"})
    found = diagnose(path)
    assert found.findings[0].level == "problem"
    assert "2 of 3 layers" in found.findings[0].text
    fixed = repair(path, tmp_path / "out", "slider")
    again = diagnose(fixed)
    assert again.structure.layout == "kohya"
    assert not any(f.level == "problem" for f in again.findings)
    assert again.header.metadata["author"] == "me"
    before, after = load_file(path), load_file(fixed)
    for n in (f"{BLOCK}.to_k", f"{BLOCK}.to_q"):
        key = "lora_unet_" + n.replace(".", "_")
        delta = before[f"unet.{n}.lora_B.weight"] @ before[f"unet.{n}.lora_A.weight"]
        ours = after[f"{key}.lora_up.weight"].float() @ after[f"{key}.lora_down.weight"].float()
        torch.testing.assert_close(ours, delta, atol=2e-2, rtol=2e-3)  # fp16 file
        assert after[f"{key}.alpha"] == 4


def test_alpha_is_kept_by_a_repair(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = peft_lora()
    kohya = {}
    for k, v in tensors.items():
        layer, half = k.removeprefix("unet.").removesuffix(".weight").rsplit(".", 1)
        kohya[f"lora_unet_{layer.replace('.', '_')}.{'lora_down' if half == 'lora_A' else 'lora_up'}.weight"] = v
        kohya[f"lora_unet_{layer.replace('.', '_')}.alpha"] = torch.tensor(0.5)
    save_file(kohya, path)
    assert any("act as 0.125" in f.text for f in diagnose(path).findings)
    fixed = load_file(repair(path, tmp_path, "b"))
    key = "lora_unet_" + f"{BLOCK}.to_q".replace(".", "_")
    expected = 0.125 * tensors[f"unet.{BLOCK}.to_q.lora_B.weight"] @ tensors[f"unet.{BLOCK}.to_q.lora_A.weight"]
    ours = fixed[f"{key}.lora_up.weight"].float() @ fixed[f"{key}.lora_down.weight"].float()
    torch.testing.assert_close(ours, expected, atol=5e-3, rtol=2e-3)


@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
def test_a_prefixed_model_is_copied_with_plain_names(tmp_path, kind):
    path = tmp_path / f"model.{'safetensors' if kind == 'safetensors' else 'bin'}"
    tensors = unet("module.")
    save_file(tensors, path) if kind == "safetensors" else torch.save({"ema": tensors}, path)
    assert diagnose(path).repairable
    fixed = repair(path, tmp_path / "out", "model")
    assert diagnose(fixed).structure.prefix == ""
    assert not diagnose(fixed).repairable
    own = {
        "input_blocks.0.0.weight": "conv_in.weight",
        "time_embed.0.weight": "time_embedding.linear_1.weight",
        f"input_blocks.3.1.{BLOCK.split('.', 4)[4]}.to_k.weight": f"{BLOCK}.to_k.weight",
        "input_blocks.3.0.in_layers.2.weight": "down_blocks.1.resnets.0.conv1.weight",
    }
    copy = load_file(fixed)
    assert set(copy) == set(own)
    assert all(torch.equal(v, tensors[f"module.{own[k]}"]) for k, v in copy.items())
    assert path.exists()


def test_a_full_lcm_unet_keeps_diffusers_names_because_its_guidance_has_no_other(tmp_path):
    path = tmp_path / "lcm.safetensors"
    tensors = {**unet("module."), "module.time_embedding.cond_proj.weight": torch.ones(320, 256)}
    save_file(tensors, path)
    copy = load_file(repair(path, tmp_path / "out", "lcm"))
    assert {f"module.{k}" for k in copy} == set(tensors)


def test_what_cannot_be_repaired_is_said(tmp_path):
    path = tmp_path / "vae.safetensors"
    save_file({"decoder.conv_in.weight": torch.ones(4, 4)}, path)
    with pytest.raises(ValueError, match="LoRAs and diffusion models can be repaired"):
        repair(path, tmp_path, "x")


def test_coverage_tells_which_layers_a_lora_reaches(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file(peft_lora(), path)
    names = [k.removesuffix(".weight") for k in unet()] + [f"{BLOCK}.to_q", "down_blocks.1.attentions.0.proj_in"]
    found = coverage(path, names)
    assert [n.rsplit(".", 1)[1] for n in found.reached] == ["proj_in"]
    assert len(found.dropped) == 2
    assert "PEFT" in found.reason
    fixed = coverage(repair(path, tmp_path, "fixed"), names)
    assert (len(fixed.reached), fixed.dropped, fixed.reason) == (3, (), "")
    fewer = coverage(repair(path, tmp_path, "fixed"), names[:3])
    assert "no such layers" in fewer.reason


def test_describe_says_what_it_is_how_to_sample_it_and_what_is_wrong(tmp_path):
    path = tmp_path / "dmd2_sdxl_4step_lora_fp16.safetensors"
    save_file(peft_lora(), path)
    text = describe(path)
    for word in (
        "LoRA for",
        "published name",
        "999, 749, 499, 249",
        "lcm + simple",
        "cfg 1",
        "Problem:",
        "ignored at cfg 1",
    ):
        assert word in text, f"{word}\n{text}"
    plain = tmp_path / "nothing.safetensors"
    save_file(unet(), plain)
    assert "nothing in it says how it is sampled" in describe(plain)


def test_a_whole_model_has_no_lora_strength(tmp_path):
    recipe = Recipe(family="sdxl", objective="dmd2", steps=1, timesteps=(999,), prediction="eps")
    for tensors, said in ((unet(), False), (peft_lora(), True)):  # the same recipe on a LoRA is the control
        path = tmp_path / f"{said}.safetensors"
        save_file(tensors, path, {RECIPE_KEY: recipe.to_json()})
        assert "timesteps 999" in describe(path)
        assert ("LoRA strength" in describe(path)) == said


def test_files_of_the_shapes_world_are_not_said_to_be_of_stable_diffusion(tmp_path):
    """They have its layout, and no model of it can use them."""
    for name, kind in (("student_4", "LoRA for Shapes (SD3 layout),"), ("teacher", "model, Shapes (SD3 layout),")):
        text = describe(WEIGHTS / f"shapes_{name}.safetensors")
        assert kind in text
        assert "Stable Diffusion" not in text
    wider = tmp_path / "control.safetensors"
    attention = "diffusion_model.joint_blocks.0.x_block.attn.qkv"
    sizes = {"A": (4, 1536), "B": (4608, 4)}
    save_file({f"{attention}.lora_{part}.weight": torch.zeros(size) for part, size in sizes.items()}, wider)
    assert "LoRA for Stable Diffusion 3," in describe(wider)
