"""How long a slider trains and on what; what it learns stands in the objectives' own configs."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SliderSettings:
    steps: int = 500
    batch: int = 2
    pool: int = 96  # samples of the frozen model, to train on and to measure its own spread with
    rank: int = 4  # 1 to 4: less rank drags fewer other things along
    layers: str = "all"
    seed: int = 0
    sample_steps: int = 0  # of every picture; 0: a few-step model's own number, else SLOW_STEPS
    cfg: float = 0.0  # of every picture, as in KSampler; 0: a few-step model's own, else the family's usual
    seeds: int = 16  # to find the unit with, and as many others to measure on
    at_once: int = 4  # pictures in one call of the network
    preview_every: int = 50

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "pool", "rank", "seeds", "at_once"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 or more")
        if self.seeds < 4:
            raise ValueError(f"seeds is {self.seeds}; a slider cannot be measured on fewer than 4")
        if self.pool < 8:
            raise ValueError(f"pool is {self.pool}; the model's own variety cannot be told from fewer than 8 pictures")


@dataclass(frozen=True, kw_only=True)
class DiscoverySettings(SliderSettings):
    sliders: int = 8
    steps: int = 100  # of each slider
    batch: int = 4
    pool: int = 1024  # the more, the surer its directions are found again
    rank: int = 1
    seeds: int = 12  # for each slider
    prompts: int = 1  # variations of the prompt that the pool is drawn from

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.sliders <= 32 or self.prompts < 1:
            raise ValueError(
                f"{self.sliders} sliders from {self.prompts} prompts are asked for; 1 to 32 from 1 or more are accepted"
            )


SLOW_STEPS = 20
