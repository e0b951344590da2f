"""What lazy inpainting keeps between runs: canvases, each with the bank of its context.

    session = SESSIONS.take("portrait")   # made when it is new
    session.accept()                      # the last edit is part of the canvas now; undo() takes it back

The sessions share one limit of memory: the one used longest ago is dropped first.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..dmd_core.inpaint import Bank


@dataclass
class Session:
    """A canvas and the bank of its context, kept between runs."""

    bank: Bank | None = None
    canvas: Tensor | None = None  # latent [b c t h w], model space
    signature: Any = None  # model, patches, shape: another one starts anew
    pending: tuple[Tensor, Tensor] | None = None  # hole [t h w] of the last edit, its latent
    past: list[Tensor] = field(default_factory=list)  # canvases before the accepted edits
    accepted: int = 0
    news: str = ""  # of the last change of that count, until a report has said it
    prompts: dict[Hashable, Hashable] = field(default_factory=dict)  # branch -> the text that its context was read with

    def accept(self) -> str:
        if self.bank is None or self.pending is None or self.canvas is None or not self.bank.accept():
            return "nothing to accept: run an edit first"
        hole, latent = self.pending
        self.past = [*self.past, self.canvas][-self.bank.depth :]
        self.canvas = torch.where(hole, latent, self.canvas)
        self.pending = None
        self.accepted += 1
        return "the last edit is now part of the canvas"

    def undo(self) -> str:
        if self.bank is None or not self.past or not self.bank.undo():
            return "nothing to undo: no edit was accepted"
        self.canvas = self.past.pop()
        self.pending = None
        self.accepted -= 1
        return "the canvas is as it was before the last accepted edit"

    def keep(self, accepted: int) -> str:
        """Accepts or undoes until so many edits are part of the canvas; asked twice, it does nothing more."""
        if self.bank is None:
            self.accepted = accepted  # after a restart the canvas that is given already holds them
        said = ""
        while self.accepted != accepted:
            before = self.accepted
            said = self.accept() if accepted > before else self.undo()
            if self.accepted == before:
                self.accepted = accepted
        self.news = said or self.news
        return said

    def reset(self) -> str:
        self.bank = self.canvas = self.signature = self.pending = None
        self.past, self.prompts, self.news = [], {}, ""
        return "the session is empty"


class Sessions(dict[str, Session]):
    """By name, the one used last at the end. Their banks share one limit: the first ones are dropped for the last."""

    def take(self, name: str) -> Session:
        return self.setdefault(name, Session())

    def beside(self, session: Session) -> "Beside":
        return Beside(self, session)


@dataclass
class Beside:
    """The sessions next to one, as its bank sees them."""

    all: Sessions
    own: Session
    dropped: list[str] = field(default_factory=list)

    def use(self) -> None:
        """Now it is the one used last."""
        self.dropped = []
        for name in [n for n, s in self.all.items() if s is self.own]:
            self.all[name] = self.all.pop(name)

    def banks(self) -> dict[str, Bank]:
        return {n: s.bank for n, s in self.all.items() if s is not self.own and s.bank is not None}

    def used(self) -> tuple[int, int]:
        found = [bank.taken for bank in self.banks().values()]
        return sum(f for f, _ in found), sum(s for _, s in found)

    def drop(self) -> bool:
        name = next(iter(self.banks()), None)
        if name is None:
            return False
        self.all[name].reset()
        self.dropped.append(name)
        return True
