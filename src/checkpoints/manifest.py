"""Checkpoints that are whole or absent, on a disk or in an object store, and which of them a run starts from.

Composer writes the files. Each save ends with a manifest, `ep0-ba400.json` beside `ep0-ba400-rank0.pt` or the folder
`ep0-ba400`, that lists every file with its size: it is written last, so a checkpoint without one, or with a file of
another size, is half a save, which no run goes on from and the next save of that step replaces.
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
UNFINISHED = '.unfinished'  # ep0-ba400.unfinished lies there until the manifest does


class RunInfo(NamedTuple):
    """What the weights alone do not tell of their run."""

    model: dict[str, Any]  # section `model` of the config
    tokenizer_name: str
    tokenizer_hash: str
    settings: dict[str, Any]  # see src/checkpoints/resume.py


@dataclass(frozen=True)
class Manifest:
    """What a whole checkpoint consists of."""

    name: str  # ep0-ba400
    sharded: bool
    epoch: int
    batch: int
    sample: int
    token: int
    world_size: int
    files: dict[str, int]  # relative to the folder: bytes
    # The fields of RunInfo; an earlier version of the kit left them out
    model: dict[str, Any] = field(default_factory=dict)
    tokenizer_name: str = ''
    tokenizer_hash: str = ''  # empty too where the tokenizer has none
    settings: dict[str, Any] = field(default_factory=dict)
    sample_in_epoch: int = 0

    @property
    def path(self) -> str:
        """What Composer loads: the file of a full checkpoint, the folder of a sharded one."""
        return self.name if self.sharded else next(iter(self.files))

    def is_whole(self, folder: Folder) -> bool:
        return all(folder.size(name) == size for name, size in self.files.items())

    def reaches(self, max_duration: str) -> bool:
        """Whether a run of this length is over."""
        end = Time.from_timestring(max_duration)
        now = Timestamp(epoch=self.epoch, batch=self.batch, sample=self.sample, token=self.token)
        return now.get(end.unit) >= end


def read_manifest(folder: Folder, name: str) -> Optional[Manifest]:
    """That of the checkpoint `name`; None where there is none of this kit's."""
    if folder.size(f'{name}.json') < 0:
        return None
    try:
        manifest = Manifest(**json.loads(folder.read(f'{name}.json')))
        own = rf'{name}(-rank0\.pt|/[\w.]+)'  # retention deletes what a manifest lists: its own files, and no others
        return manifest if manifest.name == name and all(re.fullmatch(own, file) for file in manifest.files) else None
    except (ValueError, TypeError):  # another program's, or of a save that was begun again
        return None


def list_manifests(folder: Folder) -> Iterator[Manifest]:
    """Those of a folder, whole or not, newest first."""
    names = [name[:-5] for name in folder.names() if re.fullmatch(rf'{STEP.pattern}\.json', name)]
    for name in sorted(names, key=lambda name: [int(n) for n in re.findall(r'\d+', name)][::-1], reverse=True):
        if manifest := read_manifest(folder, name):
            yield manifest


def delete_old_checkpoints(folder: Folder, keep: int) -> None:
    """Keeps the newest whole checkpoints, and damaged ones among or above them; deletes everything older."""
    whole = 0
    try:
        for saved in list(list_manifests(folder)):
            if whole >= keep:  # the manifest first: half of what it lists is no checkpoint
                folder.delete([f'{saved.name}.json'])
                folder.delete(saved.files)
            elif saved.is_whole(folder):
                whole += 1
    except OSError as e:
        raise UserError(f'save_folder: {folder} has older checkpoints, which cannot be deleted: {first_line(e)}; '
                        'delete them yourself, or set save_num_checkpoints_to_keep=-1') from e


def saved_steps(folder: Folder) -> tuple[list[str], list[str]]:
    """The names of the checkpoints in a folder, also of those that lost a file, and of the saves that were cut off."""
    files = folder.names()
    half = {file[:-len(UNFINISHED)] for file in files if file.endswith(UNFINISHED)} - {file[:-5] for file in files}
    return sorted({match[0] for file in files if (match := STEP.match(file))} - half), sorted(half)


def find_newest_whole(folder: Folder, setting: str) -> Optional[Manifest]:
    """The newest whole checkpoint of a folder. A warning names the newer ones that are not whole."""
    whole = next((manifest for manifest in list_manifests(folder) if manifest.is_whole(folder)), None)
    if whole:
        damaged = [name for name in saved_steps(folder)[0] if int(name.rpartition('-ba')[2]) > whole.batch]
        if damaged:
            log.warning('%s: %s in %s is not whole: its manifest is missing, or a file that it lists. The newest whole '
                        'checkpoint is %s, and that is taken', setting, ', '.join(damaged), folder, whole.name)
    return whole
