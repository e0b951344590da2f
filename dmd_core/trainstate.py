"""Everything a run needs to go on: parameters, optimisers, EMA, step and data cursor; saved whole or not at all."""

import hashlib
import importlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .shards import collected, fill, gathered, is_shard, own, part_of

if TYPE_CHECKING:
    from .train import Objective, Player, TrainConfig

CHECKSUM = "dmd_state_sha256"  # of the header's text: a wrong step or cursor would resume a little wrong
EMA_WARMUP = 10  # the average follows (1 + n) / (10 + n) until that exceeds its decay


class TrainState:
    def __init__(self, objective: "Objective", config: "TrainConfig"):
        self.step = 0
        self.cursor = 0  # batches drawn
        self.counters = dict.fromkeys(objective.players, 0)  # updates done
        self.config_hash = config_hash(config, getattr(objective, "config", None))
        self.seed = config.seed
        self.params = {k: dict(p.params) for k, p in objective.players.items()}
        # each process holds a part: all of them have to take part in whatever uses the parameters
        self.sharded = any(is_shard(p) for params in self.params.values() for p in params.values())
        self.optimizers = {k: optimizer(p, config) for k, p in objective.players.items()}
        self.ema = {
            k: {n: v.detach().clone() for n, v in p.params.items()}
            for k, p in objective.players.items()
            if p.ema is not None
        }

    def apply(self, name: str, player: "Player", lr: float) -> None:
        """One optimiser step from the gradients that the parameters hold; frees them."""
        opt = self.optimizers[name]
        for group in opt.param_groups:
            if isinstance(group["lr"], Tensor):  # torchao's, which are compiled
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        opt.step()
        opt.zero_grad(set_to_none=True)
        self.counters[name] += 1
        if player.ema is not None:
            n = self.counters[name]
            decay = min(player.ema, (1 + n) / (EMA_WARMUP + n))
            with torch.no_grad():
                for key, average in self.ema[name].items():
                    average.lerp_(player.params[key].detach(), 1 - decay)

    @torch.no_grad()
    def broken(self) -> list[str]:
        """Players with a parameter that holds NaN or infinities."""
        # one device sync for all of them; a sum is finite only if all that went in is
        sums = [
            torch.stack([gathered(p.float().abs().sum()) for p in ps.values()]).sum() for ps in self.params.values()
        ]
        return [k for k, s in zip(self.params, sums, strict=True) if not s.isfinite()]

    @contextmanager
    def averaged(self, name: str) -> Iterator[None]:
        """Inside, the player's parameters are its EMA (or themselves where none is kept).

        They wait in main memory: one more copy of a whole network may not fit on the device.
        """
        average = self.ema.get(name, {})
        live = {k: own(self.params[name][k].detach()).to("cpu", copy=True) for k in average}
        try:
            self._copy(name, average)
            yield
        finally:
            for key, value in live.items():
                own(self.params[name][key].detach()).copy_(value)

    @torch.no_grad()
    def _copy(self, name: str, values: Mapping[str, Tensor]) -> None:
        for key, value in values.items():
            fill(self.params[name][key], value)

    def save(self, path: Path, meta: Mapping[str, Any] | None = None) -> None:
        """Written aside, flushed, then renamed: a crash leaves the old file or the new one, never half of one."""
        tensors, scalars = self._tensors()
        tensors = collected(tensors)
        header = {
            "step": self.step,
            "cursor": self.cursor,
            "counters": self.counters,
            "seed": self.seed,
            "config_hash": self.config_hash,
            "scalars": scalars,
            "optimizers": self._kinds(),
            "digest": digest(tensors),
            **(meta or {}),
        }
        text = json.dumps(header)
        save_atomic(tensors, path, {"dmd_state": text, CHECKSUM: checksum(text)})

    def join(self) -> None:
        """What the other processes do while the first one saves shards."""
        collected(self._tensors()[0], keep=False)

    def load(self, path: Path, allow_other_config: bool = False) -> dict[str, Any]:
        """Returns the header. Nothing changes unless the whole file is sound and fits this objective."""
        tensors, header = read_state(path)
        if header["config_hash"] != self.config_hash and not allow_other_config:
            raise ValueError(
                f"{path} was made with other settings (hash {header['config_hash']}, now {self.config_hash}); "
                "go on with the settings of that run, or start a new run folder"
            )
        wanted = {f"param/{k}/{n}": p.shape for k, ps in self.params.items() for n, p in ps.items()}
        wanted |= {f"ema/{k}/{n}": v.shape for k, average in self.ema.items() for n, v in average.items()}
        wrong = [k for k, shape in wanted.items() if k not in tensors or tensors[k].shape != shape]
        if wrong:
            raise ValueError(
                f"{path} lacks {len(wrong)} tensors of this run, such as {wrong[0]}; it belongs to another model"
            )
        if header.get("optimizers", self._kinds()) != self._kinds():
            made, now = (sorted(set(kinds.values())) for kinds in (header["optimizers"], self._kinds()))
            raise ValueError(
                f"{path} was made with the optimizer of {', '.join(made)}, here it is that of {', '.join(now)}; "
                "install the same package, or start a new run"
            )
        counters = {k: int(header["counters"][k]) for k in self.params}
        for name in self.params:
            self._copy(name, {n: tensors[f"param/{name}/{n}"] for n in self.params[name]})
            self._load_optimizer(name, tensors, header["scalars"])
        for name, average in self.ema.items():
            for n, v in average.items():
                fill(v, tensors[f"ema/{name}/{n}"])
        self.step, self.cursor = header["step"], header["cursor"]
        self.counters = counters
        return header

    def _tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        scalars: dict[str, Any] = {}
        for name, params in self.params.items():
            tensors |= {f"param/{name}/{n}": p.detach() for n, p in params.items()}
            tensors |= {f"ema/{name}/{n}": v for n, v in self.ema.get(name, {}).items()}
            state = self.optimizers[name].state
            for n, p in params.items():
                for key, value in state.get(p, {}).items():
                    if isinstance(value, Tensor):
                        tensors |= {f"optimizer/{name}/{key}{inner}/{n}": v for inner, v in whole(value).items()}
                    else:
                        scalars[f"optimizer/{name}/{key}/{n}"] = value
        return tensors, scalars

    def _load_optimizer(self, name: str, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        opt = self.optimizers[name]
        prefix = f"optimizer/{name}/"
        saved = {k.removeprefix(prefix): v for k, v in (*tensors.items(), *scalars.items()) if k.startswith(prefix)}
        opt.state.clear()
        for n, p in self.params[name].items():
            entries = {k.partition("/")[0]: v for k, v in saved.items() if k.partition("/")[2] == n}
            if entries:
                opt.state[p] = {k: _like(v, p, k) for k, v in entries.items() if "." not in k}
                for key in dict.fromkeys(k.partition(".")[0] for k in entries if "." in k):
                    opt.state[p][key] = buffer = opt._new_buffer(p, key == "exp_avg")  # type: ignore[attr-defined]
                    for inner, value in whole(buffer).items():
                        value.copy_(entries[key + inner])

    def _kinds(self) -> dict[str, str]:
        """The package of every player's optimiser: their states are not alike."""
        return {k: type(opt).__module__.partition(".")[0] for k, opt in self.optimizers.items()}


def _like(value: Any, param: Tensor, key: str) -> Any:
    if not isinstance(value, Tensor):
        return value
    if key == "step":  # AdamW keeps its step counter on the CPU
        return value.clone()
    return part_of(value, param) if is_shard(param) else value.to(param.device).clone()


def whole(value: Tensor) -> dict[str, Tensor]:
    """A plain tensor under "", or the parts that a quantised one (torchao's) holds, by ".name"."""
    if is_shard(value) or not hasattr(value, "__tensor_flatten__"):
        return {"": value}
    names, _ = value.__tensor_flatten__()
    return {f".{name}": getattr(value, name) for name in names}


def optimizer(player: "Player", config: "TrainConfig") -> torch.optim.Optimizer:
    cls = low_bit_adamw() if config.optimizer == "adamw8bit" else torch.optim.AdamW
    return cls(list(player.params.values()), lr=player.lr, betas=player.betas, weight_decay=player.weight_decay)


def low_bit_adamw() -> Any:
    for package in ("bitsandbytes", "torchao"):
        try:
            return importlib.import_module(f"{package}.optim").AdamW8bit
        except (ImportError, AttributeError):
            continue
    raise ValueError(
        "optimizer 'adamw8bit' needs the package bitsandbytes or torchao; install one of them or choose 'adamw'"
    )


def config_hash(*configs: Any) -> str:
    """Of all settings but the number of steps, which a resumed run may raise."""
    settings = [asdict(c) if is_dataclass(c) and not isinstance(c, type) else repr(c) for c in configs]
    for s in settings:
        if isinstance(s, dict):
            s.pop("steps", None)
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def digest(tensors: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for key in sorted(tensors):
        sha.update(key.encode())
        sha.update(tensors[key].reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def header_of(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The state's own header from a file's; the first states had no checksum of it."""
    text = metadata["dmd_state"]
    if metadata.get(CHECKSUM, checksum(text)) != checksum(text):
        raise ValueError("the checksum of its header does not match")
    header = json.loads(text)
    if not isinstance(header, dict):
        raise ValueError(f"its header is a {type(header).__name__}")
    return header


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a state file; a damaged or foreign file is a ValueError."""
    try:
        with safe_open(path, "pt") as file:
            header = header_of(file.metadata() or {})
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        raise ValueError(f"no training state at {path}; start a new run or name another folder") from None
    except (SafetensorError, KeyError, ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path} is not a sound training state ({error}); use an earlier one of the run") from error
    if digest(tensors) != header["digest"]:
        raise ValueError(f"{path} is damaged (its checksum does not match); use an earlier state of the run")
    return tensors, header


def save_atomic(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """safetensors, written aside and renamed; on any failure nothing is left behind."""
    # a folder of one name: safetensors writes a file of its own beside the given one, and a killed process leaves it
    aside = path.with_name(f".{path.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        save_file(dict(tensors), aside / "part", dict(metadata))
        with open(aside / "part", "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside / "part", path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
