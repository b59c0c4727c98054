"""What to type if memory is insufficient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from trainer.config.rules import memory_remedies
from trainer.config.schema import Run
from trainer.core.errors import OutOfMemoryError, is_out_of_memory


@contextmanager
def out_of_memory_errors(run: Run) -> Iterator[None]:
    """Turns errors about insufficient memory, of any kind, into errors.OutOfMemoryError, which says what to type."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = " ".join((str(error) or type(error).__name__).split())[:300]
        raise OutOfMemoryError(
            f"There is not enough memory, not even for one sample at a time ({reason}). Remedies, the cheapest first: "
            f"{'; '.join(memory_remedies(run))}. A setting that changes the result starts another run."
        ) from error
