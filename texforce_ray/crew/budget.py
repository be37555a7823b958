"""How many failures a run tolerates."""

from __future__ import annotations

from dataclasses import dataclass

from texforce_ray.errors import BudgetSpentError


@dataclass
class Budget:
    """How many actor failures a run tolerates, over all pools."""

    most: int
    spent: int = 0

    def spend(self, what: str) -> None:
        """Count one failure.

        Raises:
            BudgetSpentError: it was one too many.
        """
        self.spent += 1
        if self.spent > self.most:
            raise BudgetSpentError(
                f"actors failed {self.spent} times in this run (ray.max_run_restarts allows "
                f"{self.most}); the last one: {what}"
            )
