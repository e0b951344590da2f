"""Players that train a whole copy of the network instead of a LoRA set; many processes share each copy out."""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from .adapters import AdapterBank
from .denoiser import NetDenoiser
from .processes import Processes
from .shards import shard
from .weights.checkpoint import network_keys, rewritable
from .weights.files import read_weights_header

if TYPE_CHECKING:
    from .runfile import RunFile
    from .sources import Source

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
FLOAT_NAMES = ("BF16", "F16", "F32", "F64")


def copied(
    source: "Source", bank: AdapterBank, checkpointing: bool, processes: Processes
) -> tuple[NetDenoiser, Mapping[str, nn.Parameter], nn.Module]:
    """In fp32 or better, as optimisers need it; [train] precision 'bf16' computes in bf16 all the same."""
    assert source.view is not None
    bank.detach()  # its hooks belong to the frozen network
    try:
        net = copy.deepcopy(source.net)
    finally:  # there may be no memory for a copy, and a host keeps the network
        bank.attach()
    net.to(torch.promote_types(next(net.parameters()).dtype, torch.float32)).requires_grad_(True)
    if processes.count > 1:
        shard(net, source.family.block_names(n for n, _ in net.named_modules()), processes.count)
    return source.view(net, checkpointing), dict(net.named_parameters()), net


def refuse_copies(file: "RunFile", source: "Source", processes: Processes) -> None:
    """What cannot be trained as whole copies, before anything is copied."""
    method, options = file.method.name, file.method.options
    lora = "or leave [model] full out: LoRA sets are trained then"
    if source.view is None:
        raise ValueError(f"whole copies of a ComfyUI MODEL are not trained; export the run file and train it, {lora}")
    if method in ("lazy_inpaint", "lazy_ladd"):
        raise ValueError(f"Lazy Inpaint uses its student as a LoRA on the model, not as a model of its own; {lora}")
    if odd := quantised(file, source):
        raise ValueError(f"the model holds {odd} weights; whole copies learn from bf16, fp16 or fp32 ones, {lora}")
    if file.base_file is not None:
        rewritable(file.base_file)  # the result goes into a copy of it, hours later
    if processes.count == 1:
        return
    # reading features leaves a network in the middle of its pass, from which FSDP does not recover
    if method == "diffusion2gan" or (options.get("gan_weight") and options.get("gan_features") == "critic"):
        raise ValueError(
            f"{method}'s discriminator reads a network that learns, which several processes cannot share out; "
            f"use gan_features 'teacher', one process, {lora}"
        )
    if file.train.optimizer != "adamw":
        raise ValueError(
            f"optimizer {file.train.optimizer!r} cannot share its moments out over {processes.count} processes; use "
            f"'adamw', {lora}"
        )


def quantised(file: "RunFile", source: "Source") -> str:
    """The first type of weights that is none to learn from; a file's own count, since loading may widen them."""
    odd = next((p.dtype for p in source.net.parameters() if p.dtype not in FLOATS), None)
    if odd is None and file.base_file is not None:
        header = read_weights_header(file.base_file)
        weights = (k for k in network_keys(header.shapes) if k.endswith("weight") and len(header.shapes[k]) >= 2)
        return next((header.dtypes[k] for k in weights if header.dtypes[k] not in FLOAT_NAMES), "")
    return str(odd).removeprefix("torch.") if odd else ""
