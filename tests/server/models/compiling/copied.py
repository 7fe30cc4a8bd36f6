"""A compiler whose program of a block is a copy of the block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from server.models.compiling.program import BlockJob, FlatBlock

OnDone = Callable[[Callable[..., Sequence[Tensor]] | None, str], None]


@dataclass
class Copied:
    """Collects jobs, and makes programs of them when told to.

    Attributes:
        asked: jobs, their identities, and who is told of their results.
        wanted: whether the last job is still wanted.
        ran: number of calls of programs.
        fails: error that all programs raise.
    """

    asked: list[tuple[BlockJob, str, OnDone]] = field(default_factory=list)
    wanted: Callable[[], bool] = lambda: True
    ran: int = 0
    fails: Exception | None = None

    def ask(
        self, job: BlockJob, identity: str, on_done: OnDone, wanted: Callable[[], bool]
    ) -> None:
        self.asked.append((job, identity, on_done))
        self.wanted = wanted

    def work(self) -> None:
        for job, _, on_done in self.asked:
            on_done(self._program(job), "copied")

    def refuse(self, reason: str) -> None:
        for _, _, on_done in self.asked:
            on_done(None, reason)

    def _program(self, job: BlockJob) -> Callable[..., Sequence[Tensor]]:
        block = FlatBlock(job)

        def run(*tensors: Tensor) -> Sequence[Tensor]:
            self.ran += 1
            if self.fails is not None:
                raise self.fails
            return block(*tensors)

        return run
