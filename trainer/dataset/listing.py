"""The result of reading a dataset: its samples and its faults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trainer.core.errors import DataError

if TYPE_CHECKING:
    from trainer.dataset.image_facts import ImageFacts
    from trainer.dataset.sample import Sample
    from trainer.dataset.source import Source

MAX_FAULTS_SHOWN = 20
"""Number of faults that a message shows; stage=check shows all."""


@dataclass(slots=True)
class Listing:
    """Samples without faults, and everything else that was found.

    `faults` and `notes` (on what is ignored on purpose) have one line each. `found` is the number of samples that were
    examined, with and without faults. `facts` has an entry for each image that was decoded. `unused` names the files
    of the dataset that neither a sample nor a fault refers to.
    """

    samples: list[Sample]
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    found: int = 0
    facts: dict[Source, ImageFacts] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    regularization: list[Sample] = field(default_factory=list)
    """Samples of `dataset.regularization`. Their faults and notes are among the others."""

    def raise_on_faults(self, dataset_name: str, max_shown: int | None = MAX_FAULTS_SHOWN) -> None:
        """Raises one errors.DataError that counts all faults and shows the first, if there are any."""
        if self.faults:
            raise DataError(
                f"{self.count_faults(dataset_name)}. Fix or remove these, "
                "or type dataset.on_fault=skip to go on without:\n"
                f"{self.format_faults(max_shown)}"
            )

    def count_faults(self, dataset_name: str) -> str:
        """Returns `dataset.path=shoes: 2 faults in 30 samples`."""
        return f"{dataset_name}: {plural(len(self.faults), 'fault')} in {plural(self.found, 'sample')}"

    def format_faults(self, max_shown: int | None = None) -> str:
        """Returns the first `max_shown` faults (None: all), one per line."""
        lines = [f"  {fault}" for fault in self.faults[:max_shown]]
        if len(lines) < len(self.faults):
            lines.append(f"  ... and {len(self.faults) - len(lines)} more (stage=check lists all)")
        return "\n".join(lines)


def plural(count: int, noun: str) -> str:
    """Returns `1 fault`, `2 faults`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
