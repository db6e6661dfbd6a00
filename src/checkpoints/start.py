"""Decides which checkpoint a run starts from."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Optional

from composer.utils import dist, format_name_with_dist

from src.checkpoints.manifest import STEP, Manifest, find_newest_whole, list_saves, read_manifest
from src.common.errors import UserError, first_line
from src.common.storage import Folder, LocalFolder, open_folder

log = logging.getLogger('src')


@dataclass(frozen=True)
class Start:
    """Where a run starts: from initial weights, from a checkpoint, or from the weights of one."""

    kind: Literal['fresh', 'resume', 'weights']
    path: Optional[str] = None  # of a file or folder; local or a URI
    sharded: bool = False
    manifest: Optional[Manifest] = None
    in_save_folder: bool = False  # whether the checkpoint lies in this run's own save_folder
    setting: str = 'load_path'  # the setting that names the checkpoint, for messages

    @property
    def is_weights_file(self) -> bool:
        """Whether the kit loads the weights of a full checkpoint: Composer would read the optimizer's state too."""
        return self.kind == 'weights' and not self.sharded

    @property
    def composer_load_path(self) -> Optional[str]:
        """The `load_path` of Composer's Trainer."""
        return None if self.is_weights_file else self.path

    def __str__(self) -> str:
        if self.kind == 'fresh':
            return 'fresh'
        at = f' at batch {self.manifest.batch}, {self.manifest.token:,} tokens' if self.manifest else ''
        return f'resumed from {self.path}{at}' if self.kind == 'resume' else f'weights only, from {self.path}'


FRESH = Start('fresh')


@contextmanager
def explain_unreachable(setting: str, path: str) -> Iterator[None]:
    """Raises a UserError that says why a path on a disk or in an object store cannot be read."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:  # each object store has its own error classes
        if '://' not in path and not isinstance(e, OSError):
            raise
        raise UserError(f'{setting}: {path} cannot be read: {type(e).__name__}: {first_line(e)}; check the address, '
                        'the network and the credentials') from None


def find_start(save_folder: Optional[str], name: Optional[str], autoresume: bool, load_path: Optional[str],
               weights_only: bool) -> Start:
    """Decides, on rank 0 for all ranks, where a run starts.

    Raises UserError if `load_path` is missing or not whole, or `save_folder` holds checkpoints of another run, or
    only damaged ones.
    """
    result: list[Any] = [None]
    if dist.get_global_rank() == 0:
        try:
            result = [_find_start(save_folder, name, autoresume, load_path, weights_only)]
        except UserError as e:
            result = [e]
    dist.broadcast_object_list(result)
    if isinstance(result[0], UserError):
        raise result[0]
    return result[0]


def _find_start(save_folder: Optional[str], name: Optional[str], autoresume: bool, load_path: Optional[str],
                weights_only: bool) -> Start:
    folder, saved = None, []
    if save_folder and (name is not None or '{run_name}' not in save_folder):  # else the run gets a new, random name
        with explain_unreachable('save_folder', save_folder):
            folder = open_folder(format_name_with_dist(save_folder, name or ''))
            saved, interrupted = list_saves(folder)
            if interrupted and autoresume:
                log.info('autoresume: ignoring the interrupted save %s in %s', ', '.join(interrupted), folder)
            if saved and autoresume:
                if manifest := find_newest_whole(folder, 'autoresume'):
                    path = folder.uri(manifest.path)
                    return Start('resume', path, manifest.sharded, manifest, in_save_folder=True, setting='autoresume')
                raise UserError(f'autoresume: {folder} holds {", ".join(saved)}, and none is whole: the manifest of '
                                'each is missing, or a file has another size than it lists. To load one that has no '
                                'manifest, name it as load_path and set another run_name; to start from the beginning, '
                                'move them away')
    start = FRESH
    if load_path:
        with explain_unreachable('load_path', load_path):
            start = start_from_path(load_path, 'weights' if weights_only else 'resume', folder)
    is_copy = folder and start.manifest and start.manifest == read_manifest(folder, start.manifest.name)
    if saved and not (start.in_save_folder or is_copy):  # this run would delete old checkpoints of another run
        raise UserError(f'save_folder: {folder} already holds checkpoints. To continue from them, set autoresume=true; '
                        'to start from the beginning, set another run_name or save_folder')
    return start


def start_from_path(path: str, kind: Literal['resume', 'weights'], save_folder: Optional[Folder] = None,
                    setting: str = 'load_path') -> Start:
    """Finds the checkpoint that a user names.

    `path` is the file or folder of a checkpoint, a link to one, or the folder of a run; local or a URI. From the folder
    of a run, the newest whole checkpoint is taken; also if `path` ends in `latest-rank0.pt`, a link that plain Composer
    writes, and the link does not exist. `save_folder` is this run's. Messages begin with `setting`. Raises UserError
    where there is no checkpoint, or it is not whole.
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
                            'whole checkpoints; name one of these')
        log.info('%s: %s: the newest whole checkpoint is %s', setting, path, run.uri(newest.path))
        return start_from_path(run.uri(newest.path), kind, save_folder, setting)
    is_local, step = '://' not in path, STEP.match(name)
    manifest = read_manifest(folder, step[0]) if step else None
    if manifest is None and is_local and os.path.islink(path):  # the manifest lies beside the file that is linked
        return start_from_path(os.path.realpath(path), kind, save_folder, setting)
    if manifest and not manifest.is_whole(folder):
        raise UserError(f'{setting}: {path} is not whole: a file is missing or has another size than '
                        f'{manifest.name}.json lists; name another checkpoint')
    own = os.path.realpath(str(save_folder)) if isinstance(save_folder, LocalFolder) else str(save_folder)
    in_save_folder = own == (os.path.realpath(parent or '.') if is_local else parent)
    return Start(kind, path, sharded, manifest, in_save_folder, setting)
