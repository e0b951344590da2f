"""Files and words that nobody would write: refused in a sentence or taken as what they are, never anything else.

What may happen is a ValueError. Any other exception, a write outside of the folder, or a result that breaks its own
rules fails. The default tier draws few examples, the slow one many.
"""

import json
import math
import struct
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_doctor import peft_lora, unet
from test_runs import Tug

from dmd_core import inpaint
from dmd_core.conditioning import Cond
from dmd_core.pairs import read_pairs
from dmd_core.prompts import PromptCache, parse_prompts, read_prompts
from dmd_core.runfile import CONFIGS, RunFile, parse_run_file, write_run_file
from dmd_core.runs import Run, locate, peek
from dmd_core.snapshots import read_measures
from dmd_core.train import TrainConfig
from dmd_core.trainstate import TrainState
from dmd_core.weights.doctor import describe, diagnose, repair
from dmd_core.weights.files import free_path
from dmd_core.weights.header import BITS, Refused, read_header
from dmd_core.weights.lora import fit, read_lora
from dmd_core.weights.profiles import Evidence, recognise_file
from dmd_core.weights.recipe import RECIPE_KEY, Recipe

FEW, MANY = 60, 3000


def examples(**drawn: Any) -> Any:
    """The test on few examples, always the same; in the slow tier on many, always others."""
    checks = list(HealthCheck)

    def decorate(test: Any) -> Any:
        @pytest.mark.parametrize("tier", ["few", pytest.param("many", marks=[pytest.mark.slow, pytest.mark.endurance])])
        def run(tmp_path: Path, tier: str) -> None:
            few = tier == "few"
            chosen = settings(
                max_examples=FEW if few else MANY,
                derandomize=few,
                deadline=None,
                database=None,
                suppress_health_check=checks,
            )
            chosen(given(**drawn)(test))(tmp_path)

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate


def refused(call: Any, *args: Any) -> Any:
    """The result, or None where the input was refused in a sentence."""
    try:
        return call(*args)
    except ValueError as error:
        said = str(error)
    assert said.strip(), "refused without a word"
    return None


def inside(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*")}


# --- files of weights -------------------------------------------------------------------------------------------------

DTYPES = st.sampled_from([*BITS, "Q4_K", "", "f32"])
NUMBERS = st.integers(-2, 40) | st.sampled_from([2**31, 2**62, 2**64, 1.5, True, None, "3"])
NAMES = st.text(max_size=12) | st.sampled_from(
    [
        "a.weight",
        "../../x",
        "/etc/passwd",
        "C:\\x",
        "..",
        "__metadata__",
        "lora_unet_a.lora_down.weight",
        "\0",
        "a" * 600,
    ]
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": DTYPES,
        "shape": st.lists(NUMBERS, max_size=4) | NUMBERS,
        "data_offsets": st.lists(NUMBERS, max_size=3) | NUMBERS,
    },
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
HEADERS = st.dictionaries(NAMES, ENTRY | JSON, max_size=5).map(lambda d: json.dumps(d).encode()) | st.binary(
    max_size=80
)
READERS = (read_header, diagnose, describe, read_lora, read_pairs)


@examples(header=HEADERS, data=st.binary(max_size=64), length=st.none() | st.integers(0, 2**64 - 1))
def test_any_header_is_read_or_refused(tmp_path, header, data, length):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    before = path.read_bytes()
    for read in READERS:
        refused(read, path)
    found = refused(read_header, path)
    if found is not None:  # then it is what it says: the library agrees, or the bytes are of a type it lacks
        assert all(n >= 0 for shape in found.shapes.values() for n in shape)
        assert 8 * len(data) == sum(BITS[found.dtypes[k]] * math.prod(s) for k, s in found.shapes.items())
    assert path.read_bytes() == before
    assert inside(tmp_path) == {"x.safetensors"}


def sound_files(folder: Path) -> dict[str, bytes]:
    save_file(peft_lora(), folder / "lora.safetensors", {"k": "v"})
    save_file({k: v.half() for k, v in unet().items()}, folder / "model.safetensors")
    run = Run(folder / "run")
    run.save(TrainState(Tug(), TrainConfig()))
    cache = PromptCache(folder, "clip")
    cache.write("a cat", Cond(torch.randn(1, 4, 3)))
    found = {
        "lora": folder / "lora.safetensors",
        "model": folder / "model.safetensors",
        "state": run.states()[0],
        "prompt": cache.path("a cat"),
    }
    return {k: p.read_bytes() for k, p in found.items()}


@pytest.mark.parametrize("kind", ["lora", "model", "state", "prompt"])
@pytest.mark.parametrize("tier", ["few", pytest.param("many", marks=[pytest.mark.slow, pytest.mark.endurance])])
def test_bytes_that_were_changed_lost_or_added_do_no_more_harm_than_a_refusal(tmp_path, kind, tier):
    raw = sound_files(tmp_path)[kind]
    head = 8 + struct.unpack("<Q", raw[:8])[0]
    rng = torch.Generator().manual_seed(0)

    def number(high: int) -> int:
        return int(torch.randint(max(high, 1), (1,), generator=rng))

    sound, cache = peek(next(tmp_path.glob("run/states/*"))), PromptCache(tmp_path / "cache", "clip")
    cache.path("a cat").parent.mkdir(parents=True)
    accepted = 0
    for i in range(FEW if tier == "few" else MANY):
        harmed = bytearray(raw)
        for _ in range(1 + number(4)):
            harmed[number(head if i % 2 else len(raw))] = number(256)
        if i % 5 == 0:
            harmed = harmed[: number(len(raw))]
        if i % 7 == 0:
            harmed += bytes(number(40))
        # the name that a state of this run would have
        folder = tmp_path / "r" / "states"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "state_00000000.safetensors"
        path.write_bytes(harmed)
        for read in READERS:
            refused(read, path)
        if kind == "state" and bytes(harmed) != raw:
            state = TrainState(Tug(), TrainConfig())
            state.params["student"]["weight"].data.fill_(7.0)
            header = refused(state.load, path)
            if header is None:
                assert (state.params["student"]["weight"] == 7).all(), "a refused state has changed the model"
            else:  # the file's packing was hit (padding, an escape), not what it says
                assert header == sound
                assert (state.params["student"]["weight"] != 7).any()
        cache.path("a cat").write_bytes(harmed)
        row = cache.read("a cat")
        if kind == "prompt" and bytes(harmed) != raw:
            accepted += row is not None
        else:
            assert row is None or bytes(harmed) == raw
    # what the checksum does not cover is the header's padding and spelling, never a number
    assert accepted <= (FEW if tier == "few" else MANY) // 4


# --- LoRA keys --------------------------------------------------------------------------------------------------------

PREFIXES = st.sampled_from(
    ["lora_unet_", "lora_te1_", "unet.", "transformer.", "diffusion_model.", "", "base_model.model."]
)
LAYERS = st.sampled_from(
    [
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
        "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
        "input_blocks_4_1_transformer_blocks_0_attn2_to_v",
        "double_blocks.0.img_attn.qkv",
        "single_transformer_blocks.3.attn.to_q",
        "layers.2.attention.qkv",
        "conv_in",
    ]
)
PARTS_OF = st.sampled_from(
    [".lora_down.weight", ".lora_up.weight", ".alpha", ".lora_A.weight", ".lora_B.weight", ".lora.down.weight"]
    + [".dora_scale", ".hada_w1_a", ".lokr_w1", ".diff", ".lora_mid.weight", ".lora_A.default.weight", ".weight", ""]
)
KEYS = st.builds(lambda a, b, c: a + b + c, PREFIXES, LAYERS | st.text("abz_.0", min_size=1, max_size=9), PARTS_OF)
SHAPES = st.lists(st.integers(0, 5), max_size=4)
LORAS = st.dictionaries(KEYS, SHAPES, min_size=1, max_size=8)
# whole layers, so that not everything is refused at the first odd key
WHOLE = st.tuples(
    PREFIXES, st.lists(LAYERS, min_size=1, max_size=3, unique=True), st.integers(1, 4), st.booleans()
).map(
    lambda t: {
        f"{t[0]}{layer}.lora_{end}.weight": shape
        for layer in t[1]
        for end, shape in ((("down", [t[2], 6]), ("up", [6, t[2]])) if t[3] else (("A", [t[2], 6]), ("B", [6, t[2]])))
    }
)


@examples(shapes=LORAS | WHOLE, values=st.sampled_from(["normal", "nan", "huge", "zero"]))
def test_any_set_of_lora_keys_is_read_diagnosed_and_repaired_or_refused(tmp_path, shapes, values):
    fill = {"nan": math.nan, "huge": 1e30, "zero": 0.0}.get(values)
    rng = torch.Generator().manual_seed(0)
    tensors = {
        k: torch.randn(s, generator=rng) if fill is None else torch.full(tuple(s), fill) for k, s in shapes.items()
    }
    path, out = tmp_path / "x.safetensors", tmp_path / "out"
    save_file(tensors, path)
    refused(describe, path)
    file = refused(read_lora, path)
    if file is not None:
        for down, up in file.modules.values():
            assert down.shape[0] == up.shape[1]
        refused(fit, file, {"conv_in": (6, 6)}, ["conv_in"])
    mended = refused(lambda: repair(path, out, "mended"))
    if mended is not None:
        assert mended.resolve().is_relative_to(out.resolve())
    if mended is not None and diagnose(path).structure.kind == "lora":
        assert all(v.isfinite().all() for v in load_file(mended).values())
        assert refused(read_lora, mended) is not None, "a repaired LoRA cannot be read"
    assert inside(tmp_path) - {"x.safetensors", "out"} <= {f"out/{p.name}" for p in out.glob("mended_*.safetensors")}


def test_control_whole_loras_are_among_them(tmp_path):
    """Else all of the above would be refusals."""
    path = tmp_path / "x.safetensors"
    found = []

    @settings(max_examples=FEW, deadline=None, database=None, derandomize=True)
    @given(shapes=WHOLE)
    def count(shapes):
        save_file({k: torch.ones(s) for k, s in shapes.items()}, path)
        found.append(refused(read_lora, path) is not None)

    count()
    assert sum(found) > FEW // 4


# --- recipes: the profile that a file brings along --------------------------------------------------------------------

VALUES = st.integers(-5, 1200) | st.floats() | st.text(max_size=6) | st.none() | st.booleans()
OTHERS = [f.name for f in fields(Recipe) if f.name not in ("family", "objective", "steps", "sigmas", "timesteps")]
RECIPES = st.fixed_dictionaries(
    {"family": st.sampled_from(["sdxl", "flux", "sd15", "", "nobody's", 3]), "objective": st.text(max_size=6)},
    optional={
        "steps": st.integers(-1, 9) | VALUES,
        "sigmas": st.lists(st.floats(0, 20) | VALUES, max_size=6) | VALUES,
        "timesteps": st.lists(st.integers(0, 999) | VALUES, max_size=5) | VALUES,
        **{
            f.name: VALUES
            for f in fields(Recipe)
            if f.name not in ("family", "objective", "steps", "sigmas", "timesteps")
        },
        "later": JSON,
    },
)


@examples(recipe=RECIPES | JSON)
def test_any_recipe_is_a_sound_profile_or_no_profile(tmp_path, recipe):
    text = json.dumps(recipe)
    refused(Recipe.from_json, text)
    match = recognise_file(Evidence(name="x.safetensors", metadata={RECIPE_KEY: text}))
    if match.profile is None:
        assert match.reason
        return
    levels = match.profile.trained()
    assert levels
    assert all(math.isfinite(v) and v >= 0 for v in levels)
    assert levels == sorted(levels, reverse=True)
    assert all(0 <= g <= 1 for g in match.profile.gammas(len(levels)))
    assert all(math.isfinite(c) and c >= 0 for c in match.profile.cfg)


# --- run files and prompts --------------------------------------------------------------------------------------------

WORDS = sorted({f.name for f in fields(RunFile)} | {f.name for c in CONFIGS.values() for f in fields(c)})
TOML_VALUES = st.sampled_from(
    [
        "1",
        "-1",
        "0",
        "1e400",
        "nan",
        "inf",
        "true",
        '"none"',
        '"../../x"',
        "[]",
        "[1.0, 0.5]",
        '["a"]',
        "{}",
        "1979-05-27",
    ]
    + ['"dmd2"', '"ladd"', '"/etc"', "0x10", '"""a\nb"""', "9" * 60, '"\\u0000"']
)
LINES = st.builds(lambda k, v: f"{k} = {v}", st.sampled_from([*WORDS, "name", "path", "root", "prompts"]), TOML_VALUES)
TABLES = st.builds(
    lambda name, lines: "\n".join([f"[{name}]", *lines]),
    st.sampled_from([f.name for f in fields(RunFile)] + ["x.y", "[run]", "run.name"]),
    st.lists(LINES, max_size=4),
)
LEAST = 'model = "shapes"\n[run]\nname = "a"\n[data]\nprompts = ["a red circle"]\n'


@examples(tables=st.lists(TABLES, max_size=4), least=st.booleans())
def test_any_run_file_is_refused_or_says_the_same_when_written_back(tmp_path, tables, least):
    text = (LEAST if least else "") + "\n".join(tables)
    file = refused(parse_run_file, text)
    if file is not None:
        assert locate(tmp_path, file.run.name).parent == tmp_path
        again = parse_run_file(write_run_file(file))
        assert repr(again) == repr(file)  # a nan is not equal to itself
    assert inside(tmp_path) == set()


@examples(raw=st.binary(max_size=200) | st.text(max_size=120).map(lambda t: t.encode("utf-8", "surrogatepass")))
def test_any_prompts_file_gives_lines_or_a_refusal(tmp_path, raw):
    path = tmp_path / "prompts.txt"
    path.write_bytes(raw)
    found = refused(read_prompts, path)
    if found is not None:
        assert found
        assert len(set(found)) == len(found)
        for prompt in found:
            assert prompt == prompt.strip()
            assert not any(ord(c) < 32 and c != "\t" for c in prompt)
        assert parse_prompts("\n".join(found)) == found
        cache = PromptCache(tmp_path / "cache", "clip")
        cache.write(found[0], Cond(torch.ones(1, 2, 3)))
        assert cache.read(found[0]) is not None
        assert cache.path(found[0]).resolve().is_relative_to(tmp_path.resolve())
    assert {p.split("/")[0] for p in inside(tmp_path)} <= {"prompts.txt", "cache"}


@examples(raw=st.binary(max_size=120) | JSON.map(lambda v: json.dumps(v).encode()))
def test_any_small_file_of_a_run_is_read_as_what_it_is_or_as_nothing(tmp_path, raw):
    run = Run(tmp_path / "r")
    run.path.mkdir(exist_ok=True)
    for name in ("run.json", "curves.jsonl", "measures.json"):
        (run.path / name).write_bytes(raw)
    assert isinstance(run.settings(), dict)
    assert isinstance(run.identity(), str)
    assert all(isinstance(r, dict) for r in run.history())
    read_measures(run.path)
    assert run.cut(3) == [r for r in run.history() if r["step"] <= 3]


# --- names of folders and files ---------------------------------------------------------------------------------------

STEPS_OUT = st.sampled_from(
    ["..", "../..", "/etc", "a/../..", "a/b", "\\\\srv\\x", "C:\\x", "~", "con", ".", "", "a\0b"]
)


@examples(name=STEPS_OUT | st.text(max_size=20) | st.text("./\\ab:~ ", max_size=12))
def test_no_name_leads_out_of_its_folder(tmp_path, name):
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True, exist_ok=True)
    run = refused(locate, root, name)
    assert run is None or run.parent == root
    if run is not None:
        Run(run).write_text("report.txt", "x")
    path = refused(free_path, root, name)
    if path is not None:
        assert path.resolve().is_relative_to(root.resolve())
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    assert {p.name for p in tmp_path.iterdir()} == {"root"}


# --- masks ------------------------------------------------------------------------------------------------------------

CELLS = st.floats(0, 1, width=32) | st.sampled_from([0.0, 1.0, math.nan, math.inf, -math.inf, -0.1, 1.1, 1e-30])
MASKS = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 2)).flatmap(
    lambda size: st.lists(
        CELLS if size[2] == 1 else st.sampled_from([0.0, 1.0, 0.5]),
        min_size=size[0] * size[1],
        max_size=size[0] * size[1],
    ).map(lambda v: torch.tensor(v).reshape(1, size[0], size[1]))
)


@examples(mask=MASKS, pixels=st.integers(0, 4), feather=st.floats(0, 4), factor=st.floats(1, 3))
def test_any_mask_is_refused_or_keeps_the_outside_to_the_bit(tmp_path, mask, pixels, feather, factor):
    rng = torch.Generator().manual_seed(0)
    image, made = (torch.rand(1, 3, *mask.shape[1:], generator=rng) for _ in range(2))
    if refused(inpaint.check, image, mask) is None:
        assert not bool(((mask >= 0) & (mask <= 1)).all())
        return
    hole = inpaint.masks.dilate(mask, pixels)
    assert (hole >= mask).all()
    for grown in (hole, inpaint.masks.soften(mask, pixels), inpaint.masks.fill_holes(mask)):
        assert grown.isfinite().all()
        assert grown.min() >= 0
        assert grown.max() <= 1
        assert (grown[mask == 1] == 1).all()
    for kind in inpaint.PREFILLS:
        filled = inpaint.prefill(image, mask, kind)
        assert filled.isfinite().all()
        assert torch.equal(filled[:, :, mask[0] == 0], image[:, :, mask[0] == 0])
    boxes = inpaint.crops(mask, factor, 2)
    assert bool(boxes) == bool((mask > 0).any())
    covered = torch.zeros_like(mask)
    for box in boxes:
        box.of(covered).fill_(1)
    assert (covered[mask > 0] == 1).all()
    out = inpaint.composite(image, made, mask, feather)
    assert out.isfinite().all()
    assert torch.equal(out[:, :, mask[0] == 0], image[:, :, mask[0] == 0])
    tokens = inpaint.select(inpaint.token_mask(mask[:, None], (1, 2, 2)))
    assert (tokens.computed | ~tokens.hole).all()
    assert 0 <= tokens.share <= 1


# --- the controls: each of these would be noticed ---------------------------------------------------------------------


def test_control_another_exception_or_an_empty_refusal_fails(tmp_path):
    def broken(kind):
        raise kind

    assert refused(broken, ValueError("given, accepted, do")) is None
    assert refused(broken, Refused("given, accepted, do")) is None
    with pytest.raises(KeyError):
        refused(broken, KeyError("x"))
    with pytest.raises(AssertionError, match="without a word"):
        refused(broken, ValueError())
    (tmp_path / "stray").write_text("")
    assert inside(tmp_path) == {"stray"}
