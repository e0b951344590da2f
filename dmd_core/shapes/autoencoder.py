"""A 16-channel autoencoder in the tiny-VAE layout that ComfyUI reads, computed at the cost of a smaller one."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

CHANNELS = 16
FACTOR = 8  # pixels per latent pixel
FULL = 64  # channels of every layer in the layout

# ComfyUI's SD3 latent format maps a latent to (latent - shift) * scale before the model. Dividing by the same scale
# and adding the same shift here makes what the model sees exactly the encoder's output: about mean 0, std 1.
VAE_SCALE, VAE_SHIFT = 1.5305, 0.0609

# The layout fixes 64 channels and twenty residual blocks. Flat shapes need fewer: channels beyond these widths are zero
# in the file, blocks not named here have zero weights, and a zero block computes relu(x + 0). So we run the small net.
ENCODER_WIDTHS = {0: 16, 2: 32, 6: 64, 10: 64}  # layer index -> channels that it writes
DECODER_WIDTHS = {1: 64, 7: 64, 12: 32, 17: 16}
ENCODER_BLOCKS = (7, 8, 11, 12)
DECODER_BLOCKS = (3, 4, 8, 13, 14)


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class Block(nn.Module):
    """relu(x + conv(x)), three convolutions deep."""

    def __init__(self, width: int):
        super().__init__()
        layers: list[nn.Module] = []
        for last in (False, False, True):
            layers += [nn.Conv2d(width, width, 3, padding=1)] + ([] if last else [nn.ReLU()])
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.conv(x))


def encoder(full: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    before = 3
    for index, blocks in ((0, 1), (2, 3), (6, 3), (10, 3)):
        width = FULL if full else ENCODER_WIDTHS[index]
        layers.append(nn.Conv2d(before, width, 3, padding=1, stride=2 if index else 1, bias=index == 0))
        for _ in range(blocks):
            layers.append(Block(width) if full or len(layers) in ENCODER_BLOCKS else nn.ReLU())
        before = width
    return nn.Sequential(*layers, nn.Conv2d(before, CHANNELS, 3, padding=1))


def decoder(full: bool) -> nn.Sequential:
    width = FULL if full else DECODER_WIDTHS[1]
    layers: list[nn.Module] = [Clamp(), nn.Conv2d(CHANNELS, width, 3, padding=1), nn.ReLU()]
    for index, blocks in ((1, 3), (7, 3), (12, 3), (17, 1)):
        if index > 1:
            before, width = width, FULL if full else DECODER_WIDTHS[index]
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(before, width, 3, padding=1, bias=False)]
        for _ in range(blocks):
            layers.append(Block(width) if full or len(layers) in DECODER_BLOCKS else nn.ReLU())
    return nn.Sequential(*layers, nn.Conv2d(width, 3, 3, padding=1))


class Autoencoder(nn.Module):
    """Pictures [b 3 h w] in -1..1 <-> latents [b 16 h/8 w/8] as the model sees them: about mean 0, std 1.

    full: compute the whole layout, zeros included (for checking; the result is the same).
    """

    def __init__(self, full: bool = False):
        super().__init__()
        self.taesd_encoder = encoder(full)
        self.taesd_decoder = decoder(full)
        # twice as fast on CPUs
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def encode(self, images: Tensor) -> Tensor:
        return self.taesd_encoder(_last(images * 0.5 + 0.5)).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        return self.taesd_decoder(_last(latents)).contiguous() * 2 - 1


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def full_state(compact: Autoencoder) -> dict[str, Tensor]:
    """The state dict of the whole layout, with zeros where the small network has nothing, as ComfyUI reads it."""
    small = compact.state_dict()
    state = {k: torch.zeros_like(v) for k, v in Autoencoder(full=True).state_dict().items()}
    for key, value in small.items():
        state[key][tuple(slice(n) for n in value.shape)] = value
    state = {k: v.contiguous() for k, v in state.items()}
    return state | {"vae_scale": torch.tensor(VAE_SCALE), "vae_shift": torch.tensor(VAE_SHIFT)}


def from_state(state: Mapping[str, Tensor]) -> Autoencoder:
    """The small network if the rest of the layout is zero, else the whole of it."""
    weights = {k: v.float() for k, v in state.items() if not k.startswith("vae_")}
    small = Autoencoder()
    kept = {k: weights[k][tuple(slice(n) for n in v.shape)] for k, v in small.state_dict().items()}
    whole = sum(int(v.count_nonzero()) for v in weights.values())
    model = small if whole == sum(int(v.count_nonzero()) for v in kept.values()) else Autoencoder(full=True)
    model.load_state_dict(kept if model is small else weights)
    return model.eval().requires_grad_(False)
