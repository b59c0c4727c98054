"""The result of a comparison, as `evaluation.json` keeps it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from trainer.core import documents, files
from trainer.core.errors import DataError
from trainer.evaluation.intervals import FEW_PROMPTS, Estimate

FILE_NAME = "evaluation.json"


@dataclass(frozen=True, slots=True)
class Measurement:
    """A metric of all networks."""

    metric: str
    title: str
    unit: str
    better: str | None
    """"higher", "lower", or None if neither is better."""
    model: str | None
    """Folder or hub id of the model that it uses."""
    estimates: dict[str, Estimate]
    """Name of each network -> value with its 95 % interval."""
    differences: dict[str, Estimate]
    """Name of each network but the first -> value of the first - value of that network, over the same prompts and
    seeds."""
    notes: dict[str, list[str]] = field(default_factory=dict)
    """Name of a network -> a text about each of its pictures."""

    def verdict(self, first: str, other: str, prompts: int) -> str:
        """Returns in words whether the first network differs from another one by more than chance."""
        difference = self.differences[other]
        unit = f" {self.unit}" if self.unit else ""
        if difference.low is None or difference.high is None or prompts < FEW_PROMPTS:
            return (
                f"{first} - {other} = {difference.value:.4g}{unit}; {prompts} prompt(s) are too few to tell this from "
                f"chance, {FEW_PROMPTS} are needed"
            )
        interval = f"95 % interval {difference.low:.4g} to {difference.high:.4g}"
        if not difference.excludes_zero:
            return (
                f"{first} and {other} do not differ by more than chance "
                f"(difference {difference.value:.4g}{unit}, {interval})"
            )
        word = "higher" if difference.value > 0 else "lower"
        if difference.value < 0:
            interval = f"95 % interval {-difference.high:.4g} to {-difference.low:.4g}"
        if self.better:
            word = "better" if word == self.better else "worse"
        return f"{first} is {word} than {other} by {abs(difference.value):.4g}{unit}, more than chance ({interval})"


@dataclass(frozen=True, slots=True)
class Network:
    """A network of a comparison."""

    name: str
    folder: str
    """Folder of its run, relative to that of the comparison."""
    step: int
    """Step of its weights; 0 before training."""
    metrics: dict[str, float]
    """Its held-out losses, and others of `training.evaluator`."""


@dataclass(frozen=True, slots=True)
class Picture:
    """What the networks generated for one prompt and seed. Paths are relative to the folder of the comparison."""

    caption: str
    seed: int
    prompt: int
    images: dict[str, str]
    """Name of each network -> its image."""
    references: dict[str, str]
    """Control images and target by their titles; empty for pictures that the report does not show."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Several networks and what was measured of their images."""

    command: str
    """The command that made it."""
    networks: list[Network]
    pictures: list[Picture]
    measurements: list[Measurement]
    left_out: dict[str, str]
    """Metric -> why it was not measured, and what to install or type."""

    def verdicts(self) -> list[str]:
        """Returns a sentence for each metric and each network that the first one is compared with."""
        first, *others = (network.name for network in self.networks)
        return [
            f"{measurement.title}: {measurement.verdict(first, other, self.prompts)}"
            for measurement in self.measurements
            for other in others
        ]

    @property
    def prompts(self) -> int:
        """Number of different prompts or samples."""
        return len({picture.prompt for picture in self.pictures})

    def warnings(self) -> list[str]:
        """Returns why its intervals should not be trusted."""
        if self.prompts >= FEW_PROMPTS:
            return []
        return [
            f"intervals over {self.prompts} prompts are too narrow; type evaluation.images=32, or another number of "
            f"held-out samples from {FEW_PROMPTS} on"
        ]

    def write(self, folder: Path, extra: dict[str, Any]) -> None:
        """Writes evaluation.json, with further entries. Raises errors.StorageError."""
        files.write_json(folder / FILE_NAME, {**extra, "comparison": asdict(self) | {"measurements": self._plain()}})

    def _plain(self) -> list[dict[str, Any]]:
        def plain(estimates: dict[str, Estimate]) -> dict[str, dict[str, float | None]]:
            return {name: estimate._asdict() for name, estimate in estimates.items()}

        return [
            asdict(m) | {"estimates": plain(m.estimates), "differences": plain(m.differences)}
            for m in self.measurements
        ]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Reads evaluation.json. Raises errors.StorageError if there is none and errors.DataError if it is damaged."""
        where = str(folder / FILE_NAME)
        content = documents.expect(documents.read_json(folder / FILE_NAME), dict, where)
        values = documents.entry(content, "comparison", dict, where)
        comparison = cls(
            command=documents.entry(values, "command", str, where),
            networks=[_network(item, where) for item in documents.entry(values, "networks", list, where)],
            pictures=[_picture(item, where) for item in documents.entry(values, "pictures", list, where)],
            measurements=[_measurement(item, where) for item in documents.entry(values, "measurements", list, where)],
            left_out=documents.entry(values, "left_out", dict[str, str], where),
        )
        comparison._check(where)
        return comparison

    def _check(self, where: str) -> None:
        """Raises errors.DataError if a part of the file speaks of networks that another part does not have."""
        names = [network.name for network in self.networks]
        parts = [list(picture.images) for picture in self.pictures]
        parts += [list(measurement.estimates) for measurement in self.measurements]
        parts += [names[:1] + list(measurement.differences) for measurement in self.measurements]
        if not names or len(set(names)) < len(names) or any(part != names for part in parts):
            raise DataError(f"{where}: its entries are not about the same networks. Restore the file.")
        for measurement in self.measurements:
            if any(len(notes) != len(self.pictures) for notes in measurement.notes.values()):
                raise DataError(f"{where}: {measurement.metric} has not one note for each picture. Restore the file.")


def _network(value: Any, where: str) -> Network:
    item = documents.expect(value, dict, f"{where}: network")
    name, folder = (documents.entry(item, key, str, where) for key in ("name", "folder"))
    step = documents.entry(item, "step", int, where)
    return Network(name, folder, step, documents.entry(item, "metrics", dict[str, float], where))


def _picture(value: Any, where: str) -> Picture:
    item = documents.expect(value, dict, f"{where}: picture")
    seed, prompt = (documents.entry(item, key, int, where) for key in ("seed", "prompt"))
    images, references = (documents.entry(item, key, dict[str, str], where) for key in ("images", "references"))
    return Picture(documents.entry(item, "caption", str, where), seed, prompt, images, references)


def _measurement(value: Any, where: str) -> Measurement:
    item = documents.expect(value, dict, f"{where}: measurement")
    estimates, differences = (
        {name: _estimate(entry, where) for name, entry in documents.entry(item, key, dict, where).items()}
        for key in ("estimates", "differences")
    )
    metric, title, unit = (documents.entry(item, key, str, where) for key in ("metric", "title", "unit"))
    better, model = (documents.expect(item.get(key), str | None, f"{where}: {key}") for key in ("better", "model"))
    notes = documents.entry(item, "notes", dict[str, list[str]], where)
    return Measurement(metric, title, unit, better, model, estimates, differences, notes)


def _estimate(value: Any, where: str) -> Estimate:
    item = documents.expect(value, dict, f"{where}: estimate")
    low, high = (documents.expect(item.get(key), float | None, f"{where}: {key}") for key in ("low", "high"))
    return Estimate(documents.entry(item, "value", float, where), low, high)
