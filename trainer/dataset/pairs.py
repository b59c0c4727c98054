"""The layout pairs: control_images/NAME.jpg, the target training_images/NAME.png, and its instruction training_images/NAME.txt."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.dataset.picture import SUFFIXES, FileSource
from trainer.dataset.sample import Sample, caption, clashes, identify, inside, refuse
from trainer.errors import BadData
from trainer.files import Digests, storage

if TYPE_CHECKING:
    from trainer.dataset import Pairs

CONTROLS = "control_images"
TARGETS = "training_images"


def read(settings: Pairs, digests: Digests) -> list[Sample]:
    """One sample a name. Raises one errors.BadData that lists every fault by its file."""
    folder = settings.folder()
    missing = [f"{name}/" for name in (CONTROLS, TARGETS) if not (folder / name).is_dir()]
    if missing:
        raise BadData(
            f"dataset.path={settings.path}: there is no {' and no '.join(missing)} in it. Control pictures belong in {CONTROLS}/, "
            f"pictures of the same names and their .txt in {TARGETS}/."
        )
    faults: list[str] = []
    controls = _by_name(folder, CONTROLS, SUFFIXES, faults)
    targets = _by_name(folder, TARGETS, SUFFIXES, faults)
    captions = _by_name(folder, TARGETS, (".txt",), faults)

    samples, ids = [], sorted({*controls, *targets, *captions})
    for id in ids:
        before = len(faults)
        control = _only(controls[id], f"{CONTROLS}/{id}.*: there is no such control picture", digests, faults)
        target = _only(targets[id], f"{TARGETS}/{id}.*: there is no such target picture", digests, faults)
        text = _caption(captions[id], f"{TARGETS}/{id}.txt", faults)
        if len(faults) == before:
            samples.append(Sample(id, target, text, (control,)))
    for found in (controls, targets):
        faults += clashes((id, str(path.relative_to(folder))) for id in sorted(found) for path in found[id])
    refuse(faults, f"dataset.path={settings.path}", len(ids))
    return samples


def _by_name(folder: Path, part: str, suffixes: tuple[str, ...], faults: list[str]) -> defaultdict[str, list[Path]]:
    """The files with these endings that lie directly in a part of the data set, by the id they belong to."""
    found = defaultdict(list)
    with storage("read", folder / part):
        names = sorted(os.listdir(folder / part))
    for name in names:
        path = folder / part / name
        if name.startswith(".") or path.suffix.lower() not in suffixes:
            continue
        if not inside(folder, path):
            faults.append(f"{part}/{name}: is a link out of the data set's folder; put the file itself there")
        elif not os.path.isfile(path):
            faults.append(f"{part}/{name}: is not a file")
        else:
            found[identify(path.relative_to(folder / part))].append(path)
    return found


def _only(paths: list[Path], absent: str, digests: Digests, faults: list[str]) -> FileSource | None:
    if not paths:
        faults.append(absent)
        return None
    source = FileSource(paths[0], digests)
    try:
        source.size()
    except BadData as error:
        faults.append(str(error))
    return source


def _caption(paths: list[Path], name: str, faults: list[str]) -> str | None:
    try:
        if not paths:
            raise ValueError("there is no such instruction")
        with storage("read", paths[0]):
            return caption(paths[0].read_bytes().decode("utf-8-sig"))
    except ValueError as error:
        faults.append(f"{name}: {error}")
        return None
