"""The Slurm script of src/ranks/README.md: one launcher on each node, requeued when the run is stopped."""

import os
import re
import shutil
import signal
import subprocess
import time

import pytest
from launch import ROOT, clean_env

STUBS = {
    # runs its command once per node, at the same time, and exits with the highest exit code
    'srun': """
        while [[ $1 == --* ]]; do shift; done
        for ((node = 0; node < SLURM_NNODES; node++)); do SLURM_NODEID=$node "$@" & pids+=($!); done
        for pid in "${pids[@]}"; do wait "$pid"; code=$?; ((code > most)) && most=$code; done
        exit ${most:-0}""",
    'scontrol': """
        echo "$@" >> scontrol.txt
        if [[ $1 == show ]]; then printf 'host-a\\nhost-b\\n'; fi""",
    # starts two ranks and exits with the exit code of the first, as the real launcher does
    'composer': """
        export | sed 's/declare -x //' > "launcher-$NODE_RANK.env"
        printf '%s\\n' "$@" > "launcher-$NODE_RANK.args"
        trap 'touch "launcher-$NODE_RANK.signalled"' TERM
        for n in 0 1; do
            bash -c 'trap "touch rank-$0.stopped; exit 75" TERM; touch rank-$0.up
                     for i in {1..600}; do [ -e end ] && exit $(cat end); sleep 0.1; done' "$NODE_RANK-$n" &
            pids+=($!)
        done
        wait "${pids[0]}"; code=$?; wait "${pids[1]}"
        exit $code""",
}


@pytest.fixture
def slurm(tmp_path):
    """Runs the guide's script in a folder, with stand-ins for the commands of Slurm and Composer."""
    blocks = re.findall(r'^```\w*\n(.*?)^```$', (ROOT / 'src/ranks/README.md').read_text(), re.MULTILINE | re.DOTALL)
    scripts = [block for block in blocks if '#SBATCH' in block and 'srun' in block]
    assert len(scripts) == 1, 'one script for training under Slurm in the guide'
    (tmp_path / '.venv/bin').mkdir(parents=True)
    (tmp_path / '.venv/bin/activate').touch()
    (tmp_path / 'bin').mkdir()
    for name, text in STUBS.items():
        (tmp_path / 'bin' / name).write_text(f'#!/bin/bash\n{text}\n')
        (tmp_path / 'bin' / name).chmod(0o755)
    (tmp_path / 'job.sh').write_text(scripts[0])
    env = clean_env(SLURM_JOB_ID='4321987', SLURM_JOB_NAME='gpt-125m', SLURM_NNODES='2', SLURM_JOB_NODELIST='host-[a-b]')
    env['PATH'] = f'{tmp_path / "bin"}{os.pathsep}{env["PATH"]}'
    job = subprocess.Popen(['bash', 'job.sh'], cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           start_new_session=True)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob('rank-*.up'))) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    yield tmp_path, job
    if job.poll() is None:
        os.killpg(job.pid, signal.SIGKILL)
    job.communicate()


def test_slurm_starts_one_launcher_on_each_node(slurm):
    folder, job = slurm
    (folder / 'end').write_text('0')
    assert job.wait(60) == 0, job.stdout.read()
    for node in (0, 1):
        env = (folder / f'launcher-{node}.env').read_text()
        for part in (f'NODE_RANK="{node}"', 'WORLD_SIZE="16"', 'MASTER_ADDR="host-a"', 'MASTER_PORT="21987"'):
            assert part in env.splitlines()
        args = (folder / f'launcher-{node}.args').read_text().splitlines()
        assert args[:4] == ['-n', '8', 'main.py', 'yamls/mosaic_gpt/125m.yaml']
        assert args[4:] == ['run_name=gpt-125m', 'save_folder=checkpoints/{run_name}', 'autoresume=true']
    assert 'requeue' not in (folder / 'scontrol.txt').read_text()


def test_slurm_requeues_what_it_has_stopped_before_the_time_limit(slurm):
    folder, job = slurm
    os.kill(job.pid, signal.SIGUSR1)
    assert job.wait(60) == 75, job.stdout.read()
    assert len(list(folder.glob('rank-*.stopped'))) == 4
    assert not list(folder.glob('launcher-*.signalled'))
    assert (folder / 'scontrol.txt').read_text().splitlines()[1:] == ['requeue 4321987']
    assert not list(folder.glob('.launcher-*'))


def test_slurm_does_not_requeue_a_failure(slurm):
    folder, job = slurm
    (folder / 'end').write_text('1')
    assert job.wait(60) == 1, job.stdout.read()
    assert 'requeue' not in (folder / 'scontrol.txt').read_text()


def test_the_script_has_the_tools_that_it_names():
    assert shutil.which('pkill'), 'the script signals the ranks with it'
