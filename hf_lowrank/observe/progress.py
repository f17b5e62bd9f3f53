"""The first bases of a large model may take minutes: a line that says how far they are."""

from __future__ import annotations

from collections.abc import Callable
from threading import Timer
from time import perf_counter
from typing import ClassVar

from hf_lowrank.engine.schedule import refresh_cost
from hf_lowrank.optimizer import LowRankOptimizer


class FirstRefresh:
    """Says after 5 s of the first step how many matrices have their first basis, and how long the others will take.

    It looks at the counters of the state from a thread of its own, again after 10, 20, 40 ... s. It falls silent when
    the step ends, and by itself when nothing has moved between two looks, as after an error.

    Args:
        optimizer: the optimizer.
        say: is given the line.
    """

    AFTER: ClassVar[float] = 5.0
    """Seconds until the first line."""

    LOOKS: ClassVar[int] = 12
    """Most looks: the last one comes after some three hours."""

    def __init__(self, optimizer: LowRankOptimizer, say: Callable[[str], None]) -> None:
        self.optimizer, self.say = optimizer, say
        self.matrices = [one.weight for one in optimizer.kept() if one.config.low_rank]
        self.began = perf_counter()
        self.updating = False
        self.stopped = False
        self.timer: Timer | None = None

    def start(self, *, updating: bool) -> None:
        """Start waiting, unless there is nothing to wait for.

        Args:
            updating: whether the optimizer's step begins; else the forward pass does, with hooks that refresh in the
                backward pass.
        """
        done, cost, total = self._progress()
        self.updating = self.updating or updating
        if self.timer is None and total and not done:
            self.began = perf_counter()
            self._wait(self.AFTER, looks=0, before=0.0)

    def stop(self) -> None:
        """Fall silent."""
        self.stopped = True
        if self.timer is not None:
            self.timer.cancel()

    def _wait(self, seconds: float, *, looks: int, before: float) -> None:
        self.timer = Timer(seconds, self._look, (looks, before))
        self.timer.daemon = True
        self.timer.start()

    def _look(self, looks: int, before: float) -> None:
        elapsed = perf_counter() - self.began
        done, cost, total = self._progress()
        share = cost / total
        begun = bool(done) or self.updating
        if self.stopped or share == 1 or looks == self.LOOKS or (begun and looks and share == before):
            return
        if begun:
            rest = f", about {elapsed * (1 - share) / share:.0f} s to go" if share else ""
            self.say(f"first subspaces: {done} of {len(self._costs())} matrices after {elapsed:.0f} s{rest}")
        self._wait(elapsed, looks=looks + 1, before=share)

    def _costs(self) -> list[tuple[bool, float]]:
        """Return of every matrix whether it has its first basis, and the work of one."""
        some = [p for p in self.matrices if p.requires_grad]
        states = [self.optimizer.state.get(p, {}) for p in some]
        return [(bool(s.get("refreshes", 0) > 0), refresh_cost(p)) for p, s in zip(some, states, strict=True)]

    def _progress(self) -> tuple[int, float, float]:
        """Return how many matrices are done, their work, and all work."""
        costs = self._costs()
        return sum(done for done, _ in costs), sum(cost for done, cost in costs if done), sum(c for _, c in costs)
