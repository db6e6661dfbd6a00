"""Checkpoints that are whole or absent, on a disk or in an object store, and which of them a run starts from.

Composer writes the files. Each save ends with a manifest, `ep0-ba400.json` beside `ep0-ba400-rank0.pt` or the folder
`ep0-ba400`, that lists every file with its size: it is written last, so a checkpoint without one, or with a file of
another size, is half a save, which no run goes on from and the next save of that step replaces.
"""

import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Optional

from composer import Trainer
from composer.core import Time, Timestamp
from composer.utils import dist, format_name_with_dist, get_file, is_tar
from composer.utils.reproducibility import load_rng_state
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from src.config import parse
from src.errors import UserError, first_line
from src.folders import Folder, LocalFolder, open_folder
from src.safe_reading import no_code, read_weights
from src.schema import MODEL_CONFIGS

log = logging.getLogger('src')
STEP = re.compile(r'ep\d+-ba(\d+)')
WEIGHTS = 'state.model.'  # the prefix of the weights' names in a sharded checkpoint
UNFINISHED = '.unfinished'  # ep0-ba400.unfinished lies there until the manifest does


# ---------------------------------------------------------------- manifests


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
    # What the weights alone do not tell, for whoever uses them: section `model` of the config, and the tokenizer.
    model: dict[str, Any] = field(default_factory=dict)
    tokenizer_name: str = ''
    tokenizer_hash: str = ''  # empty: of an earlier version of the kit, or of a tokenizer that has none
    # For a run that goes on with other settings: those of this run (see src/resume.py), and its place in the epoch.
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
        unit = Time.from_timestring(max_duration)
        return Timestamp(epoch=self.epoch, batch=self.batch, sample=self.sample, token=self.token).get(unit.unit) >= unit


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


def manifests(folder: Folder) -> Iterator[Manifest]:
    """Those of a folder, whole or not, newest first."""
    names = [name[:-5] for name in folder.names() if re.fullmatch(rf'{STEP.pattern}\.json', name)]
    for name in sorted(names, key=lambda name: [int(n) for n in re.findall(r'\d+', name)][::-1], reverse=True):
        if manifest := read_manifest(folder, name):
            yield manifest


def saved_steps(folder: Folder) -> tuple[list[str], list[str]]:
    """The names of the checkpoints in a folder, whole or not, and of the saves that were interrupted.

    An interrupted save is no checkpoint. One that was whole once and is not now is a loss, which has to be said.
    """
    files = folder.names()
    half = {file[:-len(UNFINISHED)] for file in files if file.endswith(UNFINISHED)} - {file[:-5] for file in files}
    return sorted({match[0] for file in files if (match := STEP.match(file))} - half), sorted(half)


def newest_whole(folder: Folder, setting: str) -> Optional[Manifest]:
    """The newest whole checkpoint of a folder. A warning names the newer ones that are not whole."""
    whole = next((manifest for manifest in manifests(folder) if manifest.is_whole(folder)), None)
    if whole:
        damaged = [name for name in saved_steps(folder)[0] if int(name.rpartition('-ba')[2]) > whole.batch]
        if damaged:
            log.warning('%s: %s in %s is not whole: its manifest is missing, or a file that it lists. The newest whole '
                        'checkpoint is %s, and that is taken', setting, ', '.join(damaged), folder, whole.name)
    return whole


# ---------------------------------------------------------------- where a run starts


@dataclass(frozen=True)
class Start:
    """Where a run starts: the resolved plan."""

    kind: Literal['fresh', 'resume', 'weights']
    path: Optional[str] = None  # a file or folder, local or a URI
    sharded: bool = False
    manifest: Optional[Manifest] = None
    own: bool = False  # from this run's own save_folder

    @property
    def weights_of_a_file(self) -> bool:
        """Loaded by the kit itself: Composer would read the optimizer's state as well."""
        return self.kind == 'weights' and not self.sharded

    @property
    def setting(self) -> str:
        return 'autoresume' if self.own else 'load_path'

    def __str__(self) -> str:
        if self.kind == 'fresh':
            return 'fresh'
        at = f' at batch {self.manifest.batch}, {self.manifest.token:,} tokens' if self.manifest else ''
        return f'resumed from {self.path}{at}' if self.kind == 'resume' else f'weights only, from {self.path}'


FRESH = Start('fresh')


def run_folder(save_folder: str, name: Optional[str]) -> Optional[Folder]:
    """The folder of a run; None where its name is not known yet, so that it cannot be there."""
    if name is None and '{run_name}' in save_folder:
        return None
    return open_folder(format_name_with_dist(save_folder, name or ''))


@contextmanager
def reachable(setting: str, place: str) -> Iterator[None]:
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

    Raises:
        UserError: `load_path` is not there or not whole; `save_folder` holds checkpoints that this run would mix with, or
            only halves of them; or it cannot be reached.
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
    if save_folder:
        with reachable('save_folder', save_folder):
            folder = run_folder(save_folder, name)
            there, half = saved_steps(folder) if folder else ([], [])
            if half and autoresume:
                log.info('autoresume: %s in %s is an interrupted save; it is ignored', ', '.join(half), folder)
            if folder and autoresume and there:
                if manifest := newest_whole(folder, 'autoresume'):
                    return Start('resume', folder.uri(manifest.path), manifest.sharded, manifest, own=True)
                raise UserError(f'autoresume: {folder} holds {", ".join(there)}, and none is whole: each lacks its '
                                'manifest, or a file that the manifest lists. To load one all the same give its file '
                                'as load_path, with another run_name; to start afresh move them away')
    start = FRESH
    if load_path:
        with reachable('load_path', load_path):
            start = given_start(load_path, 'weights' if weights_only else 'resume', folder)
    copied = folder and start.manifest and start.manifest == read_manifest(folder, start.manifest.name)
    if there and not (start.own or copied):  # retention would delete what another run has saved
        raise UserError(f'save_folder: {folder} already holds checkpoints. To go on from them set autoresume=true; to '
                        'start afresh set another run_name or save_folder, or move them away')
    return start


def given_start(path: str, kind: Literal['resume', 'weights'], own: Optional[Folder] = None,
                setting: str = 'load_path') -> Start:
    """A checkpoint that somebody names.

    Args:
        path: The file or the folder of a checkpoint, or a link to one; local or a URI. Of a run's folder the newest
            whole checkpoint is taken. Composer's runs have a link `latest-rank0.pt`: where there is none, the newest
            whole one beside it.
        kind: What it is for.
        own: The folder of the run.
        setting: Where it is named, for messages.

    Raises:
        UserError: It is not there, or not whole.
    """
    path = path.replace('{rank}', '0').rstrip('/') or '/'
    parent, _, name = path.rpartition('/')
    folder = open_folder(parent or '.')
    sharded = folder.size(f'{name}/.metadata') >= 0
    if not sharded and folder.size(name) < 0:
        run = folder if re.fullmatch(r'latest(-rank0)?(\.pt)?', name) else open_folder(path)
        newest = newest_whole(run, setting)
        if newest is None:
            raise UserError(f'{setting}: {path}: no such file, and no folder of a sharded checkpoint, or of a run with '
                            'whole checkpoints; give one of them')
        log.info('%s: %s: the newest whole checkpoint there is %s', setting, path, run.uri(newest.path))
        return given_start(run.uri(newest.path), kind, own, setting)
    step = STEP.match(name)
    manifest = read_manifest(folder, step[0]) if step else None
    if manifest is None and '://' not in path and os.path.islink(path):  # the manifest lies beside what it points to
        return given_start(os.path.realpath(path), kind, own, setting)
    if manifest and not manifest.is_whole(folder):
        raise UserError(f'{setting}: {path} is not whole: its files are not those that {manifest.name}.json lists')
    where = own and os.path.realpath(str(own)) if isinstance(own, LocalFolder) else str(own)
    is_own = where == (os.path.realpath(parent or '.') if '://' not in path else parent)
    return Start(kind, path, sharded, manifest, is_own)


# ---------------------------------------------------------------- around the Trainer


def same_weights(start: Start, own: Mapping[str, Any]) -> Callable[[dict[str, Any]], None]:
    """A check of what a checkpoint holds, for Trainer's `load_ignore_keys`, which runs before the model is touched.

    Composer and torch leave a parameter that the checkpoint lacks as it was initialised, and say nothing.

    Args:
        start: Names the checkpoint.
        own: The model's state dict.
    """
    def shapes_of(weights: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        # The extra state of a module has no shape
        return {name: tuple(getattr(tensor, 'shape', ())) for name, tensor in weights.items()}

    shapes = shapes_of(own)

    def check(checkpoint: dict[str, Any]) -> None:
        there = checkpoint['state'].get('model')
        if there is None:  # a rank that rank 0 will send it to
            return
        found = _shapes_in_shards(start.path) if start.sharded and start.path else shapes_of(there)
        missing, unknown = set(shapes) - set(found), set(found) - set(shapes)
        other = sorted(name for name in set(shapes) & set(found) if shapes[name] != found[name])
        differ = [f'{name} has the shape {found[name]} there and {shapes[name]} here' for name in other[:1]]
        if missing or unknown:
            differ = [f'{len(missing)} are missing, {len(unknown)} are not known, such as {min(missing | unknown)}']
        if differ:
            raise UserError(f'{start.setting}: {start.path} holds other weights than this model has: {differ[0]}. Set '
                            'section model as the run had it that saved them')
    return check


def _shapes_in_shards(path: str) -> dict[str, tuple[int, ...]]:
    """Of the weights in a sharded checkpoint, by name."""
    with tempfile.TemporaryDirectory() as temp:
        if '://' in path:
            get_file(f'{path}/.metadata', os.path.join(temp, '.metadata'))
            path = temp
        with no_code():
            there = FileSystemReader(path).read_metadata().state_dict_metadata
    return {key.removeprefix(WEIGHTS): tuple(getattr(part, 'size', ()))
            for key, part in there.items() if key.startswith(WEIGHTS)}


def _load_weights(start: Start, path: str, model: nn.Module) -> None:
    """Into a model that may be sharded; every rank has to call it."""
    with tempfile.TemporaryDirectory() as temp:
        local = path
        if '://' in path:
            local = os.path.join(dist.all_gather_object(temp)[dist.get_global_rank() - dist.get_local_rank()], 'weights')
            if dist.get_local_rank() == 0:
                get_file(path, local)
        with dist.local_rank_zero_download_and_wait(local):  # a download may take longer than a barrier waits
            dist.barrier()
        weights = read_weights(local, start.setting, path)
        same_weights(start, get_model_state_dict(model))({'state': {'model': weights}})
        set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, strict=True))
        dist.barrier()


def check_loadable(start: Start, sharded: bool, trusted: bool = False) -> None:
    """Before the Trainer is built.

    Args:
        start: From `find_start`.
        sharded: Whether this run's checkpoints are sharded; Composer loads the kind that it saves.
        trusted: Whether the checkpoint may hold any object.

    Raises:
        UserError: The checkpoint is of the other kind.
    """
    if start.path is None or start.weights_of_a_file:
        return
    if start.sharded and not sharded:
        raise UserError(f'{start.setting}: {start.path} is a sharded checkpoint; set fsdp_config.state_dict_type=sharded, with '
                        'sharding_strategy FULL_SHARD or SHARD_GRAD_OP, also on one device')
    if sharded and not start.sharded:
        raise UserError(f'{start.setting}: {start.path} is a full checkpoint, and fsdp_config.state_dict_type is sharded; set '
                        'full to go on from it, or take its weights alone: load_path=FILE load_weights_only=true')
    if is_tar(start.path):  # which Composer would unpack, wherever its members point to
        raise UserError(f'{start.setting}: {start.path} is an archive; unpack it, and give the file of the checkpoint')
    if trusted:
        log.warning('trust_checkpoint: any object is loaded from %s. That runs code that it holds', start.path)


# Keys of the model that the shapes of the weights do not tell
UNTOLD = {'mosaic_gpt': ('n_heads', 'mlp_act'),
          'hf_causal_lm': ('n_head', 'num_heads', 'num_attention_heads', 'activation_function', 'hidden_act')}


def check_model(manifest: Optional[Manifest], model: Mapping[str, Any], setting: str) -> None:
    """Refuses a model that computes something else with weights of the same shapes.

    Args:
        manifest: Of the weights.
        model: Section `model` of the config.
        setting: Names the weights, for messages.

    Raises:
        UserError: It has other heads, say, than the model that was saved.
    """
    there, name = manifest.model if manifest else {}, model.get('name', 'mosaic_gpt')
    if name not in UNTOLD or there.get('name') != name:
        return
    prefix, here = 'model.', parse(MODEL_CONFIGS[name], model).model_dump()
    if name == 'hf_causal_lm':
        from transformers import CONFIG_MAPPING  # here: it takes seconds

        prefix, here, there = 'model.config_overrides.', here['config_overrides'], there['config_overrides']
        if there.get('model_type') in CONFIG_MAPPING:  # a manifest leaves out what is the class's own value
            there = CONFIG_MAPPING[there['model_type']]().to_dict() | there
    for key in UNTOLD[name]:
        if here.get(key) is not None and there.get(key, here[key]) != here[key]:
            raise UserError(f'{setting}: the model that was saved has {prefix}{key} {there[key]!r}, and here it is '
                            f'{here[key]!r}. The weights would fit and compute something else; set section model as '
                            'the run had it')


def check_place(start: Start, samples: int) -> None:
    """Refuses to go on behind the end of an epoch.

    Args:
        start: Where the run starts.
        samples: In an epoch of this run.
    """
    place = start.manifest.sample_in_epoch if start.kind == 'resume' and start.manifest else 0
    if place > samples:
        raise UserError(f'{start.setting}: {start.path} lies at sample {place:,} of its epoch, and an epoch has '
                        f'{samples:,} here. Go on with the data and epoch_size of its run, or start a new run from its '
                        'weights: load_path=FILE load_weights_only=true')


def finish_loading(start: Start, trainer: Trainer) -> None:
    """What Composer leaves to do once the Trainer has loaded a checkpoint.

    Raises:
        UserError: The weights are another model's, or there is no state of this optimizer.
    """
    if start.weights_of_a_file and start.path:
        _load_weights(start, start.path, trainer.state.model)
    if start.kind == 'resume':
        optimizer = trainer.state.optimizers[0]
        if not optimizer.state:
            raise UserError(f'{start.setting}: {start.path} holds no state of {type(optimizer).__name__}, this run\'s optimizer; '
                            'set the optimizer that it was saved with, or take its weights alone: load_path=FILE '
                            'load_weights_only=true')
        # Composer restores the random state only at the start of an epoch, or where it reads past what was trained on.
        load_rng_state(trainer._rng_state or [])
