"""Which checkpoint a run starts from."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Optional

from composer.utils import dist, format_name_with_dist

from src.checkpoints.manifest import STEP, Manifest, find_newest_whole, read_manifest, saved_steps
from src.common.errors import UserError, first_line
from src.common.storage import Folder, LocalFolder, open_folder

log = logging.getLogger('src')


@dataclass(frozen=True)
class Start:
    """Where a run starts: the resolved plan."""

    kind: Literal['fresh', 'resume', 'weights']
    path: Optional[str] = None  # a file or folder, local or a URI
    sharded: bool = False
    manifest: Optional[Manifest] = None
    own: bool = False  # from this run's own save_folder
    setting: str = 'load_path'  # what names it

    @property
    def weights_of_a_file(self) -> bool:
        """Loaded by the kit itself: Composer would read the optimizer's state as well."""
        return self.kind == 'weights' and not self.sharded

    @property
    def read_by_composer(self) -> Optional[str]:
        """What Composer's Trainer takes as `load_path`."""
        return None if self.weights_of_a_file else self.path

    def __str__(self) -> str:
        if self.kind == 'fresh':
            return 'fresh'
        at = f' at batch {self.manifest.batch}, {self.manifest.token:,} tokens' if self.manifest else ''
        return f'resumed from {self.path}{at}' if self.kind == 'resume' else f'weights only, from {self.path}'


FRESH = Start('fresh')


@contextmanager
def explain_unreachable(setting: str, place: str) -> Iterator[None]:
    """Says in one message that a place on a disk or in an object store cannot be read."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:  # each object store has error classes of its own
        if '://' not in place and not isinstance(e, OSError):
            raise
        raise UserError(f'{setting}: {place} cannot be read: {type(e).__name__}: {first_line(e)}; check the address, '
                        'the network and the credentials') from None


def find_start(save_folder: Optional[str], name: Optional[str], autoresume: bool, load_path: Optional[str],
               weights_only: bool) -> Start:
    """Decides, on rank 0 for all ranks, what a run starts from.

    Raises UserError where `load_path` is not there or not whole, or where `save_folder` holds checkpoints that this run
    would mix with, or only halves of them.
    """
    answer: list[Any] = [None]
    if dist.get_global_rank() == 0:
        try:
            answer = [_find_start(save_folder, name, autoresume, load_path, weights_only)]
        except UserError as e:
            answer = [e]
    dist.broadcast_object_list(answer)
    if isinstance(answer[0], UserError):
        raise answer[0]
    return answer[0]


def _find_start(save_folder: Optional[str], name: Optional[str], autoresume: bool, load_path: Optional[str],
                weights_only: bool) -> Start:
    folder, there = None, []
    if save_folder and (name is not None or '{run_name}' not in save_folder):  # else the folder is a new one
        with explain_unreachable('save_folder', save_folder):
            folder = open_folder(format_name_with_dist(save_folder, name or ''))
            there, half = saved_steps(folder)
            if half and autoresume:
                log.info('autoresume: %s in %s is an interrupted save; it is ignored', ', '.join(half), folder)
            if there and autoresume:
                if manifest := find_newest_whole(folder, 'autoresume'):
                    path = folder.uri(manifest.path)
                    return Start('resume', path, manifest.sharded, manifest, own=True, setting='autoresume')
                raise UserError(f'autoresume: {folder} holds {", ".join(there)}, and none is whole: each lacks its '
                                'manifest, or a file that the manifest lists. To load one all the same give its file '
                                'as load_path, with another run_name; to start afresh move them away')
    start = FRESH
    if load_path:
        with explain_unreachable('load_path', load_path):
            start = start_from_path(load_path, 'weights' if weights_only else 'resume', folder)
    copied = folder and start.manifest and start.manifest == read_manifest(folder, start.manifest.name)
    if there and not (start.own or copied):  # retention would delete what another run has saved
        raise UserError(f'save_folder: {folder} already holds checkpoints. To go on from them set autoresume=true; to '
                        'start afresh set another run_name or save_folder, or move them away')
    return start


def start_from_path(path: str, kind: Literal['resume', 'weights'], own: Optional[Folder] = None,
                    setting: str = 'load_path') -> Start:
    """A checkpoint that somebody names.

    `path` is the file or the folder of a checkpoint, or a link to one; local or a URI. Of a run's folder the newest
    whole checkpoint is taken. Composer's runs have a link `latest-rank0.pt`: where there is none, the newest whole one
    beside it. `own` is the folder of the run. `setting` is where `path` is named, for messages.
    """
    path = path.replace('{rank}', '0').rstrip('/') or '/'
    parent, _, name = path.rpartition('/')
    folder = open_folder(parent or '.')
    sharded = folder.size(f'{name}/.metadata') >= 0
    if not sharded and folder.size(name) < 0:
        run = folder if re.fullmatch(r'latest(-rank0)?(\.pt)?', name) else open_folder(path)
        newest = find_newest_whole(run, setting)
        if newest is None:
            raise UserError(f'{setting}: {path}: no such file, and no folder of a sharded checkpoint, or of a run with '
                            'whole checkpoints; give one of them')
        log.info('%s: %s: the newest whole checkpoint there is %s', setting, path, run.uri(newest.path))
        return start_from_path(run.uri(newest.path), kind, own, setting)
    local, step = '://' not in path, STEP.match(name)
    manifest = read_manifest(folder, step[0]) if step else None
    if manifest is None and local and os.path.islink(path):  # the manifest lies beside what it points to
        return start_from_path(os.path.realpath(path), kind, own, setting)
    if manifest and not manifest.is_whole(folder):
        raise UserError(f'{setting}: {path} is not whole: its files are not those that {manifest.name}.json lists')
    where = os.path.realpath(str(own)) if isinstance(own, LocalFolder) else str(own)
    is_own = where == (os.path.realpath(parent or '.') if local else parent)
    return Start(kind, path, sharded, manifest, is_own, setting)
