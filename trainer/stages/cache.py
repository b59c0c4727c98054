"""`stage=cache`: fills the cache without training, and prints its size."""

from __future__ import annotations

from trainer.config.schema import Run
from trainer.core.console import format_bytes, print_line
from trainer.training.data import prepare, required_samples
from trainer.training.encoding import encode_missing


def execute(run: Run) -> None:
    """Creates the cache entries that the run needs. With `cache.drop_unused`, deletes those that no run uses."""
    data = prepare(run)
    cache, samples = data.cache, required_samples(run, data)
    made = encode_missing(run, data, samples)
    print_line(f"cache {cache.root}: " + ", ".join(f"{count} {name} made" for name, count in made.items()))
    if run.cache.drop_unused:
        count, freed = cache.drop_unused(samples)
        print_line(f"dropped {count} entries that no run uses: {format_bytes(freed)}")
    sizes = cache.sizes()
    for name, (count, space) in sizes.items():
        print_line(f"{name:12}{count} entries, {format_bytes(space)}")
    total_count = sum(count for count, _ in sizes.values())
    total_space = sum(space for _, space in sizes.values())
    print_line(f"{'total':12}{total_count} entries, {format_bytes(total_space)}")
