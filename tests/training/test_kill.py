"""A killed run goes on as if nothing had happened: SIGKILL, a kill while saving, a full disk."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from twotower.checkpoint import atomic
from twotower.checkpoint.native import load_checkpoint, read_header
from twotower.hydra_app import compose
from twotower.runs import RunPaths
from twotower.settings import ConfigError
from twotower.training.run import train

RUN = [
    "model=openai_pretrain",
    "model.image_size=32",
    "data=synthetic",
    "train=smoke",
    "train.epochs=3",
    "train.save_steps=4",
    "train.figures=false",
    "evaluate.bootstrap=0",
    "run.name=mine",
]


def places(folder):
    return [
        f"run.models_dir={folder}/models",
        f"run.logs_dir={folder}/logs",
        f"data.folder={folder.parent}/synthetic",
    ]


def start(folder, *more):
    """The command as a user types it, in a process group of its own."""
    command = [sys.executable, "-m", "twotower", "train", *RUN, *places(folder), *more]
    return subprocess.Popen(
        command,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def steps_done(folder):
    try:
        lines = (folder / "logs" / "mine" / "metrics.jsonl").read_text().splitlines()
        return max(json.loads(line)["step"] for line in lines)
    except (OSError, ValueError):
        return -1


def wait_for(folder, step, process):
    deadline = time.monotonic() + 120
    while steps_done(folder) < step:
        assert process.poll() is None, process.stdout.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kill_all(process):
    """The launcher and its ranks, none of which can say a word."""
    session = process.pid
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                if os.getsid(int(entry)) == session:
                    os.kill(int(entry), signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue
    process.wait()
    process.stdout.close()


def end(process):
    output = process.communicate(timeout=300)[0].decode()
    return process.returncode, output


def weights(folder):
    tensors = load_checkpoint(folder / "models" / "mine" / "last.safetensors")[1]
    return {name: tensor for name, tensor in tensors.items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_two_killed_ranks_go_on_bit_for_bit(tmp_path):
    two = "distributed.nproc_per_node=2"
    code, output = end(start(tmp_path / "whole", two))
    assert code == 0, output
    steps = read_header(tmp_path / "whole" / "models" / "mine" / "last.safetensors")["step"]
    chosen = random.Random(time.time_ns()).randrange(1, steps)
    process = start(tmp_path / "killed", two)
    wait_for(tmp_path / "killed", chosen, process)
    kill_all(process)
    last = tmp_path / "killed" / "models" / "mine" / "last.safetensors"
    stopped = read_header(last) if last.is_file() else None
    assert stopped is None or not stopped["finished"]
    code, output = end(start(tmp_path / "killed", two, "train.resume=true"))
    assert code == 0, output
    assert stopped is None or f"going on from step {stopped['step']} of" in output
    assert_same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_two_ranks_that_are_told_to_stop_save_first(tmp_path, number):
    two = "distributed.nproc_per_node=2"
    process = start(tmp_path / "run", two, "train.save_steps=0", "train.epochs=200")
    wait_for(tmp_path / "run", 6, process)
    os.kill(process.pid, number)
    code, output = end(process)
    assert code == 128 + number, output
    header = read_header(tmp_path / "run" / "models" / "mine" / "last.safetensors")
    assert header["step"] >= 6 and not header["finished"]
    assert f"stopped: saved step {header['step']} to" in output and "Traceback" not in output


KILLED_WHILE_SAVING = """
import os, signal, sys
import safetensors.torch
from twotower.checkpoint import atomic
from twotower.hydra_app import compose
from twotower.training.run import train

saves = 0
replace, save_file = os.replace, safetensors.torch.save_file

def half_a_file(tensors, path, *more, **named):
    save_file(tensors, path, *more, **named)
    if "last.safetensors" in str(path):
        global saves
        saves += 1
        if saves == 3 and sys.argv[1] == "write":
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

def no_rename(source, target):
    if saves == 3 and "last.safetensors" in str(target):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

safetensors.torch.save_file, atomic.os.replace = half_a_file, no_rename
train(compose(sys.argv[2:]))
"""


@pytest.mark.parametrize("moment", ["write", "rename"])
def test_a_kill_while_saving_leaves_the_checkpoint_before(tmp_path, moment):
    folder = tmp_path / "killed"
    overrides = [*RUN, *places(folder)]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_SAVING, moment, *overrides],
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    paths = RunPaths.of(compose(overrides))
    assert read_header(paths.last)["step"] == 8
    train(compose(overrides))
    train(compose([*RUN, *places(tmp_path / "whole")]))
    assert_same(weights(folder), weights(tmp_path / "whole"))


def test_a_full_disk_while_saving_loses_nothing(tmp_path, monkeypatch):
    """The disk is full at the third save, as the file is synchronised to it."""
    folder, syncs = tmp_path / "full", 0
    plain = os.fsync

    def fsync(descriptor):
        nonlocal syncs
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        syncs += "last.safetensors" in name
        if syncs == 3 and "last.safetensors" in name:
            raise OSError(28, "No space left on device")
        plain(descriptor)

    monkeypatch.setattr(atomic.os, "fsync", fsync)
    config = compose([*RUN, *places(folder)])
    with pytest.raises(ConfigError, match=r"cannot write .*last.safetensors: No space left"):
        train(config)
    paths = RunPaths.of(config)
    assert read_header(paths.last)["step"] == 8
    assert not list(paths.models.glob(".*"))
    train(config)
    train(compose([*RUN, *places(tmp_path / "whole")]))
    assert_same(weights(folder), weights(tmp_path / "whole"))


def test_a_nan_in_one_layer_is_named_and_the_last_checkpoint_stays(tmp_path, monkeypatch):
    from twotower.training import build

    config = compose([*RUN, *places(tmp_path / "run")])
    plain = build.prepare_inputs

    def with_a_nan(bundle, *more, **named):
        inputs = plain(bundle, *more, **named)
        block = bundle.model.text_tower.trunk.transformer.resblocks[1].mlp
        seen = 0

        def poison(module, given, output):
            nonlocal seen
            seen += module.training
            return output * float("nan") if seen > 5 and module.training else output

        block.c_fc.register_forward_hook(poison)
        return inputs

    monkeypatch.setattr(build, "prepare_inputs", with_a_nan)
    with pytest.raises(ConfigError) as refused:
        train(config)
    sentence = str(refused.value)
    assert sentence.startswith("step 6: the loss is nan")
    assert "text_tower.trunk.transformer.resblocks.1.mlp.c_fc" in sentence
    assert "the last good checkpoint is" in sentence
    assert read_header(RunPaths.of(config).last)["step"] == 4
