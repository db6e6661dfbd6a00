"""Saves checkpoints during training. A manifest marks each as whole: see `src/checkpoints/manifest.py`."""

import json
import os
import shutil
import tempfile
import time
from collections import ChainMap
from collections.abc import Callable
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any, Optional

from composer.core import Callback, Event, State, TimeUnit
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist, format_name_with_dist
from composer.utils.checkpoint import save_checkpoint

from src.checkpoints.manifest import UNFINISHED, Manifest, RunInfo, delete_old_checkpoints, list_manifests
from src.checkpoints.save_steps import (
    UnfinishedSave,
    begin_save,
    check_shared,
    explain_write_errors,
    flush_to_disk,
    upload,
)
from src.checkpoints.start import Start
from src.common.errors import UserError
from src.common.storage import RemoteFolder, open_folder


class CheckpointWriter(Callback):
    """Saves a checkpoint every `save_interval` and at the end; keeps the newest `keep` whole checkpoints (-1: all).

    `save_folder` is a folder or a URI, and may contain `{run_name}`. `save_interval` is as in Composer. Files for an
    object store are uploaded in the background while training goes on. Then comes the manifest, which contains `info`.
    """

    def __init__(self, save_folder: str, save_interval: str, keep: int, start: Start, info: RunInfo):
        self.save_folder, self.keep, self.info = save_folder, keep, info
        self.is_due: Callable[[State, Event], bool] = create_interval_scheduler(save_interval)
        self.last_batch = -1
        self.newest = start.path if start.in_save_folder else None  # path of the last whole checkpoint
        self.local = ''  # the folder that Composer writes to; set when the run has a name
        self.unfinished: Optional[UnfinishedSave] = None

    def init(self, state: State, logger: Logger) -> None:
        self.folder = open_folder(format_name_with_dist(self.save_folder, state.run_name))
        self.local = str(self.folder)
        if isinstance(self.folder, RemoteFolder):
            # The name depends only on `save_folder`, so that the next run finds and removes what a killed run has left.
            digest = sha256(self.folder.root.encode()).hexdigest()[:12]
            self.local = os.path.join(tempfile.gettempdir(), f'checkpoints-{digest}')
            if dist.get_local_rank() == 0:
                shutil.rmtree(self.local, ignore_errors=True)
        Path(self.local).mkdir(parents=True, exist_ok=True)
        dist.barrier()

    def check(self, state: State) -> None:
        """Raises UserError if this run would overwrite checkpoints, or nodes share no folder. Call on every rank."""
        self.last_batch = int(state.timestamp.batch)
        later: list[Any] = [None]
        if dist.get_global_rank() == 0:
            later = [[m.name for m in list_manifests(self.folder, self.last_batch) if m.is_whole(self.folder)]]
        dist.broadcast_object_list(later)
        if later[0]:
            raise UserError(f'save_folder: {self.folder} already holds {", ".join(later[0])}, which this run would '
                            'overwrite; set another run_name or save_folder, or set autoresume=true to continue from '
                            'the newest')
        if not isinstance(self.folder, RemoteFolder) and dist.get_world_size() > dist.get_local_world_size():
            check_shared(self.folder)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        self._advance()
        if self.is_due(state, Event.BATCH_CHECKPOINT):
            self.save(state)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        end = state.max_duration
        is_finished = end is not None and end.unit == TimeUnit.EPOCH and state.timestamp >= end
        if is_finished:  # save again: at the save of the last batch, its epoch was not counted yet
            self.last_batch = -1
        if self.is_due(state, Event.EPOCH_CHECKPOINT) or is_finished:
            self.save(state)

    def fit_end(self, state: State, logger: Logger) -> None:
        self.wait()

    def close(self, state: State, logger: Logger) -> None:
        if '://' in self.save_folder and dist.get_local_rank() == 0:
            shutil.rmtree(self.local, ignore_errors=True)

    def save_and_wait(self, state: State, logger: Logger) -> None:
        """Saves this batch, and waits until the checkpoint is whole. Every rank has to call it."""
        self.save(state)
        self.wait()

    def wait(self) -> None:
        """Waits until the last save is whole on every rank. Every rank has to call it."""
        while self.unfinished:
            if not self._advance():
                time.sleep(0.05)

    def _advance(self) -> bool:
        advanced = self.unfinished is not None and self.unfinished.advance()
        if self.unfinished and self.unfinished.is_whole:
            self.newest = self.folder.uri(self.unfinished.manifest.path)
            self.unfinished = None
        return advanced

    def save(self, state: State) -> None:
        """Begins to save this batch, unless it is already saved. Every rank has to call it."""
        t, batch, folder = state.timestamp, int(state.timestamp.batch), self.folder
        if batch == self.last_batch:
            return
        self.wait()
        self.last_batch = batch
        name, sharded = f'ep{int(t.epoch)}-ba{batch}', state.fsdp_sharded_state_dict_enabled
        begin_save(name, folder, self.local)
        with explain_write_errors(name, self.local):
            written = save_checkpoint(state, os.path.join(self.local, 'ep{epoch}-ba{batch}-rank{rank}.pt'))
            files = [str(path.relative_to(self.local)) for path in flush_to_disk(written, sharded)] if written else []
        sizes = ChainMap(*dist.all_gather_object({file: Path(self.local, file).stat().st_size for file in files}))
        manifest = Manifest(name, sharded, int(t.epoch), batch, int(t.sample), int(t.token), dist.get_world_size(),
                            dict(sizes), **self.info._asdict(), sample_in_epoch=int(t.sample_in_epoch))
        steps = [lambda: self._finish(manifest) if dist.get_global_rank() == 0 else None]
        if isinstance(folder, RemoteFolder):
            steps.insert(0, lambda: upload(files, folder, self.local))
        self.unfinished = UnfinishedSave(manifest, str(folder), steps)
        if not isinstance(folder, RemoteFolder):
            self.wait()

    def _finish(self, manifest: Manifest) -> None:
        self.folder.write(f'{manifest.name}.json', json.dumps(asdict(manifest), indent=1))
        if self.folder.can_delete:
            self.folder.delete([f'{manifest.name}{UNFINISHED}'])
        self.newest = self.folder.uri(manifest.path)
        if self.keep >= 0:
            delete_old_checkpoints(self.folder, self.keep)
