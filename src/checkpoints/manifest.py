"""Manifests, which say whether a checkpoint on a disk or in an object store is whole.

Composer writes the files of a checkpoint: `ep0-ba400-rank0.pt`, or the folder `ep0-ba400`. The kit then writes the
manifest `ep0-ba400.json`, which lists every file with its size. A checkpoint without a manifest, or with a file of
another size, is incomplete: no run resumes from it, and the next save of that batch replaces it.
"""

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Optional

from composer.core import Time, Timestamp

from src.common.errors import UserError, first_line
from src.common.storage import Folder

log = logging.getLogger('src')

STEP = re.compile(r'ep\d+-ba(\d+)')
UNFINISHED = '.unfinished'  # ep0-ba400.unfinished marks a save until its manifest is written


class RunInfo(NamedTuple):
    """Facts about a run that its weights do not contain."""

    model: dict[str, Any]  # section `model` of the config
    tokenizer_name: str
    tokenizer_hash: str
    settings: dict[str, Any]  # from `run_settings` in src/checkpoints/resume.py


@dataclass(frozen=True)
class Manifest:
    """The content of a manifest: the files of a checkpoint, its place in training, and facts about its run."""

    name: str  # ep0-ba400
    sharded: bool
    epoch: int
    batch: int
    sample: int
    token: int
    world_size: int
    files: dict[str, int]  # path relative to the folder → bytes
    # The fields of RunInfo; manifests of an earlier version of the kit lack them
    model: dict[str, Any] = field(default_factory=dict)
    tokenizer_name: str = ''
    tokenizer_hash: str = ''  # empty also where the tokenizer has no hash
    settings: dict[str, Any] = field(default_factory=dict)
    sample_in_epoch: int = 0

    @property
    def path(self) -> str:
        """The path that Composer loads: the file of a full checkpoint, the folder of a sharded one."""
        return self.name if self.sharded else next(iter(self.files))

    def is_whole(self, folder: Folder) -> bool:
        return all(folder.size(name) == size for name, size in self.files.items())

    def reaches(self, max_duration: str) -> bool:
        """Returns whether a run of this length is finished at the checkpoint."""
        end = Time.from_timestring(max_duration)
        now = Timestamp(epoch=self.epoch, batch=self.batch, sample=self.sample, token=self.token)
        return now.get(end.unit) >= end


def read_manifest(folder: Folder, name: str) -> Optional[Manifest]:
    """Reads the manifest of the checkpoint `name`; None where the kit has written none."""
    if folder.size(f'{name}.json') < 0:
        return None
    try:
        manifest = Manifest(**json.loads(folder.read(f'{name}.json')))
        own_file = rf'{name}(-rank0\.pt|/[\w.]+)'  # `delete_old_checkpoints` deletes listed files: allow no others
        is_own = manifest.name == name and all(re.fullmatch(own_file, file) for file in manifest.files)
        return manifest if is_own else None
    except (ValueError, TypeError):  # the file of another program, or of a save that has begun again
        return None


def list_manifests(folder: Folder, after: int = -1) -> Iterator[Manifest]:
    """Reads the manifests of batches above `after` in a folder, also those of damaged checkpoints, newest first."""
    names = [name[:-5] for name in folder.names()
             if (step := re.fullmatch(rf'{STEP.pattern}\.json', name)) and int(step[1]) > after]
    for name in sorted(names, key=lambda name: [int(n) for n in re.findall(r'\d+', name)][::-1], reverse=True):
        if manifest := read_manifest(folder, name):
            yield manifest


def delete_old_checkpoints(folder: Folder, keep: int) -> None:
    """Deletes all checkpoints that are older than the newest `keep` whole ones."""
    whole = 0
    try:
        for saved in list(list_manifests(folder)):
            if whole >= keep:  # the manifest first, so that an interrupted deletion leaves nothing that looks whole
                folder.delete([f'{saved.name}.json'])
                folder.delete(saved.files)
            elif saved.is_whole(folder):
                whole += 1
    except OSError as e:
        raise UserError(f'save_folder: older checkpoints in {folder} cannot be deleted: {first_line(e)}; delete them '
                        'yourself, or set save_num_checkpoints_to_keep=-1') from e


def list_saves(folder: Folder) -> tuple[list[str], list[str]]:
    """Lists the names of the checkpoints in a folder, damaged ones too, and the names of interrupted saves."""
    files = folder.names()
    marked = {file[:-len(UNFINISHED)] for file in files if file.endswith(UNFINISHED)}
    interrupted = marked - {file[:-5] for file in files}  # without a manifest
    return sorted({match[0] for file in files if (match := STEP.match(file))} - interrupted), sorted(interrupted)


def find_newest_whole(folder: Folder, setting: str) -> Optional[Manifest]:
    """Finds the newest whole checkpoint in a folder. Warns of newer checkpoints that are not whole."""
    whole = next((manifest for manifest in list_manifests(folder) if manifest.is_whole(folder)), None)
    if whole:
        damaged = [name for name in list_saves(folder)[0] if int(name.rpartition('-ba')[2]) > whole.batch]
        if damaged:
            log.warning('%s: %s in %s is not whole: the manifest is missing, or a file has another size than it lists; '
                        'taking the newest whole checkpoint, %s', setting, ', '.join(damaged), folder, whole.name)
    return whole
