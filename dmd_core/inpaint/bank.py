"""Keys and values of context tokens, kept per noise level and conditioning branch, so that only the hole is computed.

    bank.write(key, slot, k, v, tokens)    rows of these tokens, from a context pass
    bank.read(key, slot, tokens)           (k, v) of these tokens

A key is (branch, sigma); a slot is an attention call (block, number). Rows are [b heads n d] or [b n d], the token axis
is the one before the last. Edits write to a draft: accept() moves it into the bank, undo() brings the rows before back.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

GIB = 1024**3


class BankFull(RuntimeError):
    """The bank would need more memory than it may take."""


@dataclass
class Level:
    have: Tensor  # bool [n]: tokens whose rows are known
    rows: dict[Hashable, tuple[Tensor, Tensor]] = field(default_factory=dict)  # slot -> k, v of all n tokens


@dataclass
class Past:
    """What undo needs: the rows that an accept replaced, what was known then, and what was computed anew since."""

    rows: "Draft"
    known: dict[Hashable, Tensor]
    fresh: Tensor  # bool [n]


@dataclass
class Draft:
    """What the last edit computed for its hole."""

    tokens: Tensor  # indices
    rows: dict[Hashable, dict[Hashable, tuple[Tensor, Tensor]]] = field(default_factory=dict)  # key -> slot -> k, v


class Neighbours(Protocol):
    """Other banks within the same limits."""

    def used(self) -> tuple[int, int]:
        """Bytes that they take, as Bank.nbytes."""

    def drop(self) -> bool:
        """Frees the one that was not used for longest. False where there is none."""


class Alone:
    def used(self) -> tuple[int, int]:
        return 0, 0

    def drop(self) -> bool:
        return False


class Bank:
    """fast_gib is taken on the device of the rows, then slow_gib in main memory; beyond that BankFull is raised.

    Neighbours share these limits, and are dropped before that.
    """

    def __init__(
        self,
        tokens: int,
        fast_gib: float = 4.0,
        slow_gib: float = 16.0,
        undo: int = 4,
        neighbours: Neighbours | None = None,
    ):
        self.tokens = tokens
        self.limits = (fast_gib, slow_gib)
        self.neighbours = neighbours or Alone()
        self.levels: dict[Hashable, Level] = {}
        self.draft: Draft | None = None
        self.depth = undo
        self._history: list[Past] = []
        self._used = (0, 0)  # counting every tensor at every write would take longer than the write

    def have(self, keys: list[Hashable]) -> Tensor:
        """Tokens whose rows are known at all these keys. bool [n]"""
        found = [self.levels[k].have for k in keys if k in self.levels]
        if len(found) < len(keys):
            return torch.zeros(self.tokens, dtype=torch.bool)
        return torch.stack(found).all(0)

    @torch.inference_mode()  # rows come from inference, which nothing else may change in place
    def write(self, key: Hashable, slot: Hashable, k: Tensor, v: Tensor, tokens: Tensor) -> None:
        level = self.levels.setdefault(key, Level(torch.zeros(self.tokens, dtype=torch.bool)))
        if slot not in level.rows:
            level.rows[slot] = (self._room(k), self._room(v))
        for kept, new in zip(level.rows[slot], (k, v), strict=True):
            kept.index_copy_(-2, tokens.to(kept.device), new.to(kept))

    @torch.inference_mode()
    def wrote(self, key: Hashable, tokens: Tensor) -> None:
        """All slots of these tokens are written: only now do they count as known (a pass can be interrupted)."""
        self.levels[key].have[tokens.cpu()] = True
        for past in self._history:
            past.fresh[tokens.cpu()] = True

    def read(self, key: Hashable, slot: Hashable, tokens: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        k, v = (rows.index_select(-2, tokens.to(rows.device)) for rows in self.levels[key].rows[slot])
        return k.to(device), v.to(device)

    @torch.inference_mode()
    def fill(self, key: Hashable, slot: Hashable, k: Tensor, v: Tensor) -> None:
        """Copies all rows to where they are needed: one pass over memory, where read() and joining are three."""
        for place, rows in zip((k, v), self.levels[key].rows[slot], strict=True):
            place.copy_(rows)

    @torch.inference_mode()
    def forget(self, tokens: Tensor) -> None:
        """These tokens' rows are stale (bool [n]); they are computed again when they are needed."""
        for level in self.levels.values():
            level.have &= ~tokens

    def clear(self) -> None:
        self.levels.clear()
        self._history.clear()
        self.draft = None
        self._used = (0, 0)

    # --- edits ---

    def begin(self, tokens: Tensor) -> None:
        """A new edit of these tokens (indices); an edit before it that was not accepted is dropped."""
        self.draft = Draft(tokens.cpu())
        self._used = self.nbytes

    def sketch(self, key: Hashable, slot: Hashable, k: Tensor, v: Tensor) -> None:
        """The edit's own rows, in the order of its tokens."""
        assert self.draft is not None
        self.draft.rows.setdefault(key, {})[slot] = (self._kept(k), self._kept(v))

    @torch.inference_mode()
    def accept(self) -> bool:
        """The last edit becomes part of the context. False where there is none."""
        if self.draft is None or not self.draft.rows:
            return False
        before = Draft(self.draft.tokens)
        known = {key: level.have.clone() for key, level in self.levels.items()}
        tokens = self.draft.tokens
        for key, level in self.levels.items():
            if key not in self.draft.rows:
                level.have[tokens] = False  # this noise level saw nothing of the edit
                continue
            before.rows[key] = {}
            for slot, (k, v) in self.draft.rows[key].items():
                rows = level.rows[slot]
                before.rows[key][slot] = (
                    rows[0].index_select(-2, tokens.to(rows[0].device)),
                    rows[1].index_select(-2, tokens.to(rows[1].device)),
                )
                self.write(key, slot, k, v, tokens)
            level.have[tokens] = True
        self._history = [*self._history, Past(before, known, torch.zeros(self.tokens, dtype=torch.bool))][-self.depth :]
        self.draft = None
        return True

    @torch.inference_mode()
    def undo(self) -> bool:
        """The bank as it was before the last accept, to the bit. False where there is nothing to undo."""
        if not self._history:
            return False
        past = self._history.pop()
        for key, slots in past.rows.rows.items():
            for slot, (k, v) in slots.items():
                self.write(key, slot, k, v, past.rows.tokens)
        for key, level in self.levels.items():
            # a level that came later, or a row computed since, belongs to the picture after the edit
            level.have = past.known[key] & ~past.fresh if key in past.known else torch.zeros_like(level.have)
        self.draft = None
        return True

    # --- memory ---

    @property
    def taken(self) -> tuple[int, int]:
        """nbytes, counted as it grew: cheap, and a little above after an undo."""
        return self._used

    @property
    def nbytes(self) -> tuple[int, int]:
        """(on the rows' device, in main memory); on a machine without another device all is the former."""
        tensors = [t for level in self.levels.values() for pair in level.rows.values() for t in pair]
        drafts = [past.rows for past in self._history] + ([self.draft] if self.draft else [])
        tensors += [t for d in drafts for slots in d.rows.values() for pair in slots.values() for t in pair]
        fast = sum(t.nbytes for t in tensors if t.device.type != "cpu")
        total = sum(t.nbytes for t in tensors)
        return (fast, total - fast) if fast else (total, 0)

    def _place(self, nbytes: int, device: torch.device) -> torch.device:
        """The rows' device while there is room, then main memory, then that of neighbours, then an error."""
        fast, slow = (int(limit * GIB) for limit in self.limits)
        if device.type == "cpu":
            fast, slow = fast + slow, 0
        while True:
            others = self.neighbours.used()
            used = (self._used[0] + others[0], self._used[1] + others[1])
            if device.type == "cpu":
                used = (sum(used), 0)
            if used[0] + nbytes <= fast:
                self._used = (self._used[0] + nbytes, self._used[1])
                return device
            if used[1] + nbytes <= slow:
                self._used = (self._used[0], self._used[1] + nbytes)
                return torch.device("cpu")
            if not self.neighbours.drop():
                break
        raise BankFull(
            f"the context bank holds {sum(used) / GIB:.2f} GiB and needs {nbytes / GIB:.3f} GiB more, but may take "
            f"{sum(self.limits):g} GiB; raise its memory, use fewer steps, or use mode 'refresh', which keeps one level"
        )

    def _room(self, like: Tensor) -> Tensor:
        shape = list(like.shape)
        shape[-2] = self.tokens
        nbytes = like.element_size() * like[..., :1, :].numel() * self.tokens
        return torch.zeros(shape, dtype=like.dtype, device=self._place(nbytes, like.device))

    def _kept(self, rows: Tensor) -> Tensor:
        return rows.detach().to(self._place(rows.nbytes, rows.device), copy=True)
