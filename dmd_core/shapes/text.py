"""Tokenizer and text encoder of the shapes world: prompts -> tokens [b 12 64] and a pooled vector [b 64]."""

import logging
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import captions
from .captions import FACTORS, FREE, SIDES, WORDS

PAD, UNKNOWN = "<pad>", "<unk>"
VOCABULARY = (PAD, UNKNOWN, *WORDS)
LENGTH = 12  # tokens per prompt; longer prompts are cut
WIDTH = 64

log = logging.getLogger(__name__)


def tokenize(prompts: Sequence[str]) -> Tensor:
    """Word indices [b 12], padded; words outside the vocabulary become the unknown token."""
    table = {word: i for i, word in enumerate(VOCABULARY)}
    rows, strange = [], set()
    for prompt in prompts:
        text = captions.words(prompt)
        strange |= set(text) - table.keys()
        row = [table.get(word, table[UNKNOWN]) for word in text[:LENGTH]]
        rows.append(row + [table[PAD]] * (LENGTH - len(row)))
    if strange:
        log.info("the shapes world does not know the words %s; it knows %s", sorted(strange), " ".join(WORDS))
    return torch.tensor(rows, dtype=torch.long).reshape(len(prompts), LENGTH)


class Layer(nn.Module):
    def __init__(self, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class TextEncoder(nn.Module):
    """Two small transformer layers. Flux gives text tokens no positions, so position and binding are put in here."""

    def __init__(self) -> None:
        super().__init__()
        self.word = nn.Embedding(len(VOCABULARY), WIDTH)
        self.position = nn.Parameter(0.5 * torch.randn(LENGTH, WIDTH))
        self.layers = nn.Sequential(Layer(), Layer())
        self.norm = nn.LayerNorm(WIDTH)
        self.pool = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Word indices [b 12] -> tokens [b 12 64], pooled [b 64]"""
        tokens = self.norm(self.layers(self.word(ids) + self.position))
        return tokens, torch.tanh(self.pool(tokens.mean(1)))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """tokens [b 12 64], pooled [b 64]; the empty prompt is the unconditional one."""
        return self(tokenize(prompts).to(self.position.device))


class Probe(nn.Module):
    """Reads factors out of the encoder's outputs while it is trained; thrown away afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.pooled = nn.ModuleDict({k: nn.Linear(WIDTH, len(v) + 1) for k, v in FACTORS.items()})
        self.word = nn.Linear(WIDTH, len(VOCABULARY))
        self.slot = nn.Linear(WIDTH, 3)

    def loss(self, encoder: TextEncoder, prompts: Sequence[str]) -> Tensor:
        ids = tokenize(prompts)
        tokens, pooled = encoder(ids)
        wanted = captions.named(prompts)
        # the class past the last means "left open"
        factors = [
            F.cross_entropy(head(pooled), torch.where(wanted[k] == FREE, len(FACTORS[k]), wanted[k]))
            for k, head in self.pooled.items()
        ]
        slots = torch.tensor([object_of_words(prompt) for prompt in prompts])
        slot = F.cross_entropy(self.slot(tokens).flatten(0, 1), slots.flatten())
        word = F.cross_entropy(self.word(tokens).flatten(0, 1), ids.flatten())
        return torch.stack(factors).sum() + 4 * slot + 4 * word


def object_of_words(prompt: str) -> list[int]:
    """Which object each token speaks of: 0 none, 1 the only or left one, 2 the right one. [12]"""
    text = captions.words(prompt)[:LENGTH]
    relation = next((i for i in range(len(text) - 1) if text[i] in SIDES and text[i + 1] == "of"), None)
    end = text.index("on") if "on" in text else len(text)
    first, second = (2, 1) if relation is not None and text[relation] == "right" else (1, 2)
    slots = [0] * LENGTH
    for i in range(end):
        slots[i] = first if relation is None or i < relation else second if i > relation + 1 else 0
    return slots


def from_state(state: Mapping[str, Tensor]) -> TextEncoder:
    model = TextEncoder()
    model.load_state_dict({k: v.float() for k, v in state.items()})
    return model.eval().requires_grad_(False)
