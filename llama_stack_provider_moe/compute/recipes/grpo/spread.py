"""Watch whether anything is learnt: not where rewards are equal in every group, nor where no answer counts."""

from llama_stack_provider_moe.compute.runtime.context import AnySession
from llama_stack_provider_moe.ground.counting import number_of


class Spread:
    """Counts generations in a row from which nothing is learnt.

    Args:
        session: says what it finds.
        most: such generations in a row before the job ends.
    """

    def __init__(self, session: AnySession, most: int) -> None:
        self._session, self._most, self._count = session, most, 0

    def is_over(self, nothing: bool, step: int) -> bool:
        """Note a generation, and return whether the job is to end.

        Args:
            nothing: whether nothing is learnt from it.
            step: that would learn from it.
        """
        self._count = self._count + 1 if nothing else 0
        passed = number_of(self._count, "generation")
        told = (f"step {step}: for {passed} all rewards were equal within each group, or every answer was left out as "
                "too long")  # fmt: skip
        if self._count == max(1, self._most // 2) < self._most:
            self._session.say(f"{told}, so that nothing was learnt; the job stops after {self._most} "
                              "(rl.no_spread_generations)", "warning")  # fmt: skip
        if self._count >= self._most:
            self._session.say(f"{told}; stopping (rl.no_spread_generations)", "warning")
            return True
        return False
