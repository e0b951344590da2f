"""What one training batch holds, for every objective that generates."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Prompts alone suffice; latents and noise are there for objectives that ask for them.

    shape: [b c h w] of the latents to generate; cond: what the denoisers take, b prompts long;
    latents: clean ones that fit the prompts; noise: the noise that the teacher made those latents from.
    """

    cond: Any
    shape: tuple[int, ...]
    latents: Tensor | None = None
    noise: Tensor | None = None

    def clean(self, purpose: str) -> Tensor:
        """The latents, or an error that says who needs them."""
        if self.latents is None:
            raise ValueError(f"{purpose} needs latents, and the data holds prompts alone; give latents or turn it off")
        return self.latents

    def pair(self, purpose: str) -> tuple[Tensor, Tensor]:
        """(noise, latents) of the teacher."""
        if self.noise is None or self.latents is None:
            raise ValueError(
                f"{purpose} needs the teacher's noise-latent pairs, and the data holds none; generate pairs first"
            )
        return self.noise, self.latents
