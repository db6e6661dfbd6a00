"""Saves checkpoints that are whole or absent; see `src/checkpoints/start.py`."""

import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any, Optional

import torch
from composer.core import Callback, Event, State, TimeUnit
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist, format_name_with_dist, get_device
from composer.utils.checkpoint import save_checkpoint
from torch.distributed.checkpoint.api import CheckpointException

from src.checkpoints.manifest import UNFINISHED, Manifest, manifests
from src.checkpoints.start import FRESH, Start
from src.common.errors import UserError, first_line
from src.common.storage import RemoteFolder, open_folder


def in_background(work: Callable[[], None]) -> Future:
    """Runs it in a daemon thread, unlike those of an executor: a process that fails does not wait for it to end."""
    future: Future = Future()

    def run() -> None:
        try:
            work()
            future.set_result(None)
        except Exception as e:  # raised where the main thread looks
            future.set_exception(e)

    threading.Thread(target=run, name='checkpoint', daemon=True).start()
    return future


class CheckpointWriter(Callback):
    """Saves every `save_interval` and at the end; keeps the newest `keep`.

    In an object store files are sent in the background, while training goes on, and the manifest follows the last of them.

    Args:
        save_folder: A folder or a URI; may hold `{run_name}`.
        save_interval: As in Composer.
        keep: How many whole checkpoints stay; -1: all.
        start: Where the run started.
        model: Section `model` of the config, for the manifests.
        tokenizer_name, tokenizer_hash: Also for them.
        settings: Of this run, for them as well; see `src/checkpoints/resume.py`.
    """

    def __init__(self, save_folder: str, save_interval: str, keep: int = -1, start: Start = FRESH,
                 model: Optional[dict[str, Any]] = None, tokenizer_name: str = '', tokenizer_hash: str = '',
                 settings: Optional[dict[str, Any]] = None):
        self.save_folder, self.keep = save_folder, keep
        self.config = {'model': model or {}, 'tokenizer_name': tokenizer_name, 'tokenizer_hash': tokenizer_hash,
                       'settings': settings or {}}
        self.due: Callable[[State, Event], bool] = create_interval_scheduler(save_interval)
        self.last_batch = -1
        self.local = ''  # where Composer writes; known once the run has a name
        self.newest = start.path if start.own else None  # where the last whole checkpoint lies
        # A save that is not whole yet, the same on all ranks; and what this rank still has to send for it.
        self.unfinished: Optional[Manifest] = None
        self.sending: Optional[Future] = None
        self.all_sent = False

    def init(self, state: State, logger: Logger) -> None:
        self.folder = open_folder(format_name_with_dist(self.save_folder, state.run_name))
        self.local = str(self.folder)
        if isinstance(self.folder, RemoteFolder):
            # Named by what it is for, so that what a killed run left is found and removed by the next.
            self.local = os.path.join(tempfile.gettempdir(), f'checkpoints-{sha256(self.folder.root.encode()).hexdigest()[:12]}')
            if dist.get_local_rank() == 0:
                shutil.rmtree(self.local, ignore_errors=True)
        Path(self.local).mkdir(parents=True, exist_ok=True)
        dist.barrier()

    def check(self, state: State) -> None:
        """Before anything is computed: that the folder can take the checkpoints of this run. On all ranks.

        Raises:
            UserError: It holds later ones already, or is another folder on another node.
        """
        later: list[Any] = [None]
        if dist.get_global_rank() == 0:
            later = [[m.name for m in manifests(self.folder) if m.batch > int(state.timestamp.batch) and m.is_whole(self.folder)]]
        dist.broadcast_object_list(later)
        if later[0]:
            raise UserError(f'save_folder: {self.folder} already holds {", ".join(later[0])}, which this run would write again; '
                            'set another run_name or save_folder, or autoresume=true to go on from the newest')
        self.last_batch = int(state.timestamp.batch)
        self._check_shared()

    def _check_shared(self) -> None:
        """A folder that the nodes do not share would hold what no later run can load."""
        if isinstance(self.folder, RemoteFolder) or dist.get_world_size() == dist.get_local_world_size():
            return
        probe = [f'.probe-{os.getpid()}-{time.time_ns()}']
        dist.broadcast_object_list(probe)
        if dist.get_global_rank() == 0:
            self.folder.write(probe[0], '')
        dist.barrier()
        deadline = time.monotonic() + 10  # a network file system may be slow to show it
        while not (seen := self.folder.size(probe[0]) >= 0) and time.monotonic() < deadline:
            time.sleep(0.2)
        blind = sorted({node for node, sees in dist.all_gather_object((dist.get_node_rank(), seen)) if not sees})
        if dist.get_global_rank() == 0:
            self.folder.delete(probe)
        if blind:
            raise UserError(f'save_folder: {self.folder} on node {", ".join(map(str, blind))} is not the folder of node 0; '
                            'name one that all nodes share, or an object store such as s3://')

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        self._advance()
        if self.due(state, Event.BATCH_CHECKPOINT):
            self.save(state, logger)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        length = state.max_duration
        over = length is not None and length.unit == TimeUnit.EPOCH and state.timestamp >= length
        if over:
            self.last_batch = -1  # the save of the last batch does not count its epoch, so it cannot tell that the run is over
        if self.due(state, Event.EPOCH_CHECKPOINT) or over:
            self.save(state, logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        self.wait()

    def save_and_wait(self, state: State, logger: Logger) -> None:
        """For a run that is about to stop."""
        self.save(state, logger)
        self.wait()

    def wait(self) -> None:
        """Until the last save is whole, on every rank."""
        while self.unfinished:
            if not self._advance():
                time.sleep(0.05)

    def _advance(self) -> bool:
        """Lets a save become whole once every rank has sent its files: no rank waits in a collective for another's upload.

        Returns:
            Whether it is a step further.
        """
        if self.unfinished is None:
            return False
        done = get_device(None).tensor_to_device(torch.tensor(int(self.sending is None or self.sending.done())))
        dist.all_reduce(done, reduce_operation='MIN')
        if not done.item():
            return False
        manifest = self.unfinished
        if self.sending:
            with self._writing(manifest.name, str(self.folder)):
                self.sending.result()
        self.sending = None
        if self.all_sent:
            self.unfinished, self.newest = None, self.folder.uri(manifest.path)
        elif dist.get_global_rank() == 0:
            self.sending = in_background(lambda: self._finish(manifest))
        self.all_sent = not self.all_sent
        return True

    def save(self, state: State, logger: Logger) -> None:
        """Saves this batch, unless it is saved already. Every rank has to call it.

        Raises:
            UserError: The disk is full, or cannot be written.
        """
        batch = int(state.timestamp.batch)
        if batch == self.last_batch:
            return
        self.wait()
        self.last_batch = batch
        name = f'ep{int(state.timestamp.epoch)}-ba{batch}'
        sharded = state.fsdp_sharded_state_dict_enabled
        if dist.get_local_rank() == 0:  # what is left of half a save may have been written by more ranks
            shutil.rmtree(Path(self.local, name), ignore_errors=True)
        if dist.get_global_rank() == 0:
            with self._writing(name, str(self.folder)):
                self.folder.write(f'{name}{UNFINISHED}', '')
                if self.folder.size(f'{name}.json') >= 0:  # of a save that has lost a file since
                    self.folder.write(f'{name}.json', '')
        dist.barrier()
        with self._writing(name, self.local):
            saved = save_checkpoint(state, os.path.join(self.local, 'ep{epoch}-ba{batch}-rank{rank}.pt'))
            files = self._files(saved, sharded)
        sizes = {file: size for part in dist.all_gather_object({f: os.path.getsize(Path(self.local, f)) for f in files})
                 for file, size in part.items()}
        t, folder = state.timestamp, self.folder
        self.unfinished = Manifest(name, sharded, int(t.epoch), batch, int(t.sample), int(t.token), dist.get_world_size(), sizes,
                                   **self.config, sample_in_epoch=int(t.sample_in_epoch))
        if isinstance(folder, RemoteFolder):
            self.sending = in_background(lambda: self._send(folder, files))
        else:
            self.wait()

    @contextmanager
    def _writing(self, name: str, place: str) -> Iterator[None]:
        """Says in one message that a disk is full, or cannot be written."""
        try:
            yield
        except (OSError, RuntimeError, CheckpointException) as e:
            cause = e.__context__ or e  # torch's writer fails once more as it closes the file
            if not isinstance(cause, OSError) and 'inline_container' not in str(e) and 'OSError' not in str(e):
                raise
            raise UserError(f'save_folder: cannot write {name} to {place}: {first_line(cause)}; what was saved '
                            'before is untouched') from e

    def _files(self, saved: Optional[str], sharded: bool) -> list[str]:
        """What this rank has just written, relative to the folder, on the disk for good."""
        if saved is None:
            return []
        files = [Path(saved)]
        if sharded:
            rank = dist.get_global_rank()
            files = [*Path(saved).parent.glob(f'__{rank}_*'), *([Path(saved).parent / '.metadata'] if rank == 0 else [])]
        for file in files:
            with file.open('rb') as f:
                os.fsync(f.fileno())
        return [str(file.relative_to(self.local)) for file in files]

    def _send(self, folder: RemoteFolder, files: list[str]) -> None:
        for file in files:
            folder.upload(file, Path(self.local, file))
            Path(self.local, file).unlink()

    def _finish(self, manifest: Manifest) -> None:
        self.folder.write(f'{manifest.name}.json', json.dumps(asdict(manifest), indent=1))
        if self.folder.deletes:
            self.folder.delete([f'{manifest.name}{UNFINISHED}'])
        self.newest = self.folder.uri(manifest.path)
        try:
            if self.keep >= 0:
                self._delete_old()
        except OSError as e:
            raise UserError(f'save_folder: {self.folder} has older checkpoints, which cannot be deleted: {first_line(e)}; delete '
                            'them yourself, or set save_num_checkpoints_to_keep=-1') from e

    def _delete_old(self) -> None:
        """Keeps the newest whole checkpoints, and damaged ones among or above them; deletes everything older."""
        whole = 0
        for saved in list(manifests(self.folder)):
            if whole >= self.keep:  # the manifest first: half of what it lists is no checkpoint
                self.folder.delete([f'{saved.name}.json'])
                self.folder.delete(saved.files)
            elif saved.is_whole(self.folder):
                whole += 1

    def close(self, state: State, logger: Logger) -> None:
        if '://' in self.save_folder and dist.get_local_rank() == 0:
            shutil.rmtree(self.local, ignore_errors=True)
