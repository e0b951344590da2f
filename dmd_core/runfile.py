"""RUN.toml into frozen dataclasses: defaults are those of the classes, a mistake is named with what is accepted."""

import difflib
import json
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef,import-not-found,unused-ignore]

from .drive import DriveConfig
from .objectives.diffusion2gan import Diffusion2GANConfig
from .objectives.dmd import DMDConfig
from .objectives.dmd2 import DMD2Config
from .objectives.ladd import LADDConfig
from .objectives.lazy_inpaint import LazyInpaintConfig
from .objectives.lazy_ladd import LazyLADDConfig
from .objectives.rectified_flow import RectifiedFlowConfig
from .runs import check_name
from .train import TrainConfig

CONFIGS: dict[str, type] = {
    "dmd2": DMD2Config,
    "dmd": DMDConfig,
    "ladd": LADDConfig,
    "diffusion2gan": Diffusion2GANConfig,
    "reflow": RectifiedFlowConfig,
    "lazy_inpaint": LazyInpaintConfig,
    "lazy_ladd": LazyLADDConfig,
    "rectified_flow": RectifiedFlowConfig,
}
# one-step methods, and one that keeps the base's steps; the others are made for four
STEPS = {"dmd": 1, "diffusion2gan": 1, "rectified_flow": 20}
NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "'none'"}


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    name: str
    root: str = "runs"  # beside the run file, unless absolute
    resume: str = ""  # auto | new; empty: --resume decides, and a run that has begun is refused without it
    plan: bool = True  # measure two steps before the first start

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.resume not in ("", "auto", "new"):
            raise ValueError(f"resume is {self.resume!r}; use 'auto' or 'new', or leave it out")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    path: str  # "shapes", a diffusers folder, or a .safetensors file
    config: str = ""  # a diffusers folder of the family, for a single file
    dtype: str = "bf16"  # of the frozen weights; the shapes world is always fp32
    device: str = "auto"
    size: int = 0  # pixels, each side; 0: the model's own
    height: int = 0  # where it is not that of a square
    checkpointing: bool = True
    full: bool = False  # every player trains a whole copy of the network instead of a LoRA set
    probe: bool = True  # refuse what is no teacher

    def __post_init__(self) -> None:
        if self.size % 16 or self.height % 16:
            asked = f"{self.size} x {self.height or self.size}"
            raise ValueError(f"the picture size is {asked} pixels; give multiples of 16, or 0 for the model's own")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    prompts: str | tuple[str, ...] = ()  # a file, one per line, or a list
    pictures: str = ""  # a folder, the caption of fox.png in fox.txt; instead of prompts
    batch: int = 8  # of all processes together
    seed: int = 0
    pairs: int = 128  # batches of teacher pairs, for the methods that need them
    pair_steps: int = 20  # of Heun, two network calls each
    pair_guidance: float = 4.0  # for methods that have no guidance of their own

    def __post_init__(self) -> None:
        if min(self.batch, self.pairs, self.pair_steps) < 1:
            raise ValueError(
                f"batch, pairs and pair_steps are {self.batch}, {self.pairs}, {self.pair_steps}; give 1 or more"
            )


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    rank: int = 64
    critic_rank: int = 0  # 0: as the student's
    layers: str = "all"  # all | attention | self-attention | cross-attention | kv | no-cross-attention


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    prompts: tuple[str, ...] = ()  # for the snapshots; empty: the first of the data
    count: int = 16
    teacher_steps: int = 25
    seed: int = 1234


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    name: str = "dmd2"
    steps: int = 0  # of the student; 0: 1 for one-step methods, else 4
    features: int = 4  # layers that discriminators and perceptual losses read
    head_width: int = 128
    options: Mapping[str, Any] = field(default_factory=dict)  # of the method's own config


@dataclass(frozen=True, kw_only=True)
class RunFile:
    run: RunSettings
    model: ModelSettings
    data: DataSettings
    method: MethodSettings = field(default_factory=MethodSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    train: TrainConfig = field(default_factory=TrainConfig)
    drive: DriveConfig = field(default_factory=DriveConfig)
    samples: SampleSettings = field(default_factory=SampleSettings)
    where: str = "."  # the file's folder

    @property
    def model_path(self) -> Path:
        """Beside the run file where it is there, else as given."""
        given = Path(self.model.path).expanduser()
        beside = Path(self.where) / given
        return beside if beside.exists() else given

    @property
    def base_file(self) -> Path | None:
        """The model, where it is one file."""
        path = self.model_path
        return path if path.suffix == ".safetensors" and path.is_file() else None


def read_run_file(path: Path) -> RunFile:
    try:
        return parse_run_file(path.read_bytes().decode("utf-8-sig"), path.parent)
    except OSError as error:
        raise ValueError(f"the run file {path} cannot be read ({error}); give a TOML file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_run_file(text: str, where: Path = Path(".")) -> RunFile:
    try:
        given = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"this is not TOML: {error}") from None
    if isinstance(given.get("model"), str):
        given["model"] = {"path": given["model"]}
    tables = {f.name: f for f in fields(RunFile) if f.name != "where"}
    refuse_unknown(given, tables, "the file", "tables")
    types_ = get_type_hints(RunFile)
    found: dict[str, Any] = {"where": str(where)}
    for name in tables:
        table = given.get(name, {})
        if not isinstance(table, dict):
            raise ValueError(f"{name} is {table!r}; it is a table, write [{name}] and its settings below")
        read = read_method if name == "method" else read_table
        found[name] = read(types_[name], table, f"[{name}]")
    prompts, pictures = found["data"].prompts, found["data"].pictures
    if bool(prompts) == bool(pictures):
        raise ValueError(
            "[data] takes prompts (a file or a list) or pictures (a folder, their captions are the prompts); give "
            + ("one of the two" if prompts else "one of them")
        )
    return RunFile(**found)


def write_run_file(file: RunFile) -> str:
    """The same as TOML: read back it gives an equal RunFile. Settings at their defaults are written too."""
    tables = []
    for table in fields(RunFile):
        if table.name == "where":
            continue
        settings = getattr(file, table.name)
        values = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name != "options"}
        values |= dict(getattr(settings, "options", {}))
        lines = [f"{key} = {toml_value(value)}" for key, value in values.items()]
        tables.append("\n".join([f"[{table.name}]", *lines]))
    return "\n\n".join(tables) + "\n"


def toml_value(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's; only DEL has to be escaped besides
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple | list):
        return f"[{', '.join(toml_value(v) for v in value)}]"
    if isinstance(value, float):
        return repr(value) if value - value == 0 else {"inf": "inf", "-inf": "-inf"}.get(str(value), "nan")
    return str(value)


def read_method(_cls: type, table: Mapping[str, Any], where: str) -> MethodSettings:
    """Its own settings, and those of the config of the method it names."""
    own = {f.name for f in fields(MethodSettings)} - {"options"}
    name = table.get("name", MethodSettings.name)
    if not isinstance(name, str) or name not in CONFIGS:
        raise ValueError(f"{where} name is {name!r}; methods are {', '.join(CONFIGS)}")
    config = CONFIGS[name]
    options = {f.name for f in fields(config)}
    refuse_unknown(table, own | options, where, f"settings of {name}")
    hints = get_type_hints(config)
    chosen = {k: convert(v, hints[k], f"{where} {k}") for k, v in table.items() if k in options}
    mine = read_table(MethodSettings, {k: v for k, v in table.items() if k in own}, where)
    return MethodSettings(
        **{f: getattr(mine, f) for f in own - {"steps"}}, steps=mine.steps or STEPS.get(name, 4), options=chosen
    )


def read_table(cls: type, table: Mapping[str, Any], where: str) -> Any:
    refuse_unknown(table, {f.name for f in fields(cls)}, where, "settings")
    hints = get_type_hints(cls)
    values = {k: convert(v, hints[k], f"{where} {k}") for k, v in table.items()}
    try:
        return cls(**values)
    except TypeError as error:  # a setting without default
        lacking = [k for k in hints if k not in values and f"'{k}'" in str(error)]
        raise ValueError(f"{where} lacks {', '.join(lacking) or error}; every run needs it") from None
    except ValueError as error:
        raise ValueError(f"{where} {error}") from None


def refuse_unknown(given: Mapping[str, Any], accepted: Any, where: str, what: str) -> None:
    for key in given:
        if key not in accepted:
            near = difflib.get_close_matches(key, accepted, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"{where} has no {key!r}; {hint}{what}: {', '.join(sorted(accepted))}")


def convert(value: Any, kind: Any, where: str) -> Any:
    """A TOML value as the annotation wants it; 'none' is Python's None."""
    options = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    for option in options:
        fits, found = as_type(value, option)
        if fits:
            return found
    wanted = " or ".join(describe(o) for o in options)
    raise ValueError(f"{where} is {value!r} ({describe(type(value))}); {wanted} is accepted")


def as_type(value: Any, kind: Any) -> tuple[bool, Any]:
    if kind is type(None):
        return value == "none", None
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        if not isinstance(value, list) or (inner[-1] is not Ellipsis and len(value) != len(inner)):
            return False, None
        items = [as_type(v, inner[0]) for v in value]
        return all(ok for ok, _ in items), tuple(v for _, v in items)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return True, float(value)
    return type(value) is kind, value


def describe(kind: Any) -> str:
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        each = {float: "numbers", str: "texts", int: "whole numbers"}.get(inner[0], "values")
        return f"a list of {each}" if inner[-1] is Ellipsis else f"a list of {len(inner)} {each}"
    return NAMES.get(
        kind, "a list" if kind is list else "a table" if kind is dict else str(getattr(kind, "__name__", kind))
    )
