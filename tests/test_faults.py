"""What happens to files: flipped and lost bytes, kills, two writers, no space, no right to write, disguised pickles.

Whatever happens, reading gives what was written, by one writer, or raises and changes nothing. A small share of the
faults runs with the tests; `python tests/test_faults.py 50` tries fifty times as many and prints a table.
"""

import contextlib
import copy
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from functools import cache, partial
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # where this file runs as a script

import pytest
import torch
from battery import LAYERS, adapter, linear, seeded
from torch import nn

from lowrank_ref.adapters import LoRALinear, load_peft, save_peft
from lowrank_ref.core import io
from lowrank_ref.core.io import load_adapters, load_tensors, save_adapters, save_tensors
from lowrank_ref.core.layers import replace_linears
from lowrank_ref.lab import train as lab

# Kinds of files. Each writes a content that a number v tells, and reads it back as that number.


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6))


def model(v, **options):
    made = replace_linears(plain(), "", partial(LoRALinear, rank=2, generator=seeded(), **options), trainable="^1")
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p.fill_(v)
    return made


def number(tensors):
    """The one number that fills all tensors; None where they hold several."""
    values = {float(v) for t in tensors for v in t.detach().unique()}
    return values.pop() if len(values) == 1 else None


def unchanged(made, load):
    """Load into a model; where that raises, its state has to be as it was."""
    before = copy.deepcopy(made.state_dict())
    try:
        load(made)
    except Exception:
        after = made.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
        raise
    return made


def write_tensors(folder, v):
    save_tensors({"a": torch.full((300,), float(v)), "b": torch.full((2, 3), v)}, folder / "x", kind="k")


def read_tensors(folder):
    return number(load_tensors(folder / "x", kind="k").values())


def write_adapters(folder, v):
    save_adapters(model(v), folder / "x")


def read_adapters(folder):
    made = unchanged(model(-1), lambda made: load_adapters(made, folder / "x"))
    return number(p for p in made.parameters() if p.requires_grad)


def write_peft_folder(folder, v):
    save_peft(model(v, alpha=2 * v), folder)  # the scale is v too, and stands in the other file


def read_peft_folder(folder):
    made = unchanged(plain(), lambda made: load_peft(made, folder))
    scales = [torch.tensor(float(layer.scale)) for layer in (made[0], made[2])]
    return number([*scales, *(p for p in made.parameters() if p.requires_grad)])


def run(made, folder, **options):
    optimizer = torch.optim.Adam([p for p in made.parameters() if p.requires_grad], lr=0.0)
    x = torch.ones(2, 6)
    how = {"steps": 1, "checkpoint": folder / "x", "progress": False} | options
    return lab.train(made, lambda i: (x,), lambda made, x: made(x).mean(), optimizer, **how)


@cache
def checkpoint(v):
    """The bytes that a run of one step writes, at a rate of 0."""
    with tempfile.TemporaryDirectory() as folder:
        run(model(v), Path(folder))
        return (Path(folder) / "x").read_bytes()


def write_checkpoint(folder, v):
    io.write_file(folder / "x", checkpoint(v))


def read_checkpoint(folder):
    made = unchanged(model(-1), lambda made: run(made, folder))
    return number(p for p in made.parameters() if p.requires_grad)


KINDS = {
    "tensors": (write_tensors, read_tensors),
    "adapters": (write_adapters, read_adapters),
    "PEFT": (write_peft_folder, read_peft_folder),
    "checkpoint": (write_checkpoint, read_checkpoint),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def outcome(read, folder, allowed):
    """Say how reading ends: "refused", "whole", or what must not be."""
    try:
        got = read(folder)
    except ValueError:
        return "refused"
    return "whole" if got in allowed else f"WRONG: {got}"


# Damage.


def damaged(kind, folder, tries, seed=0):
    """Flip bits in all regions of all files of a kind, cut them, lengthen them and blank them."""
    write, read = KINDS[kind]
    draw, found = random.Random(seed), Counter()
    write(folder, 3)
    assert read(folder) == 3
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        good = path.read_bytes()
        bad = []
        for i in range(tries):
            place = min(i * len(good) // tries + draw.randrange(len(good) // tries + 1), len(good) - 1)
            bad.append(good[:place] + bytes([good[place] ^ 1 << draw.randrange(8)]) + good[place + 1 :])
        cuts = [0, 1, 7, 8, 9, len(good) - 1, *(draw.randrange(len(good)) for _ in range(tries // 8))]
        bad += [good[:cut] for cut in cuts] + [good + b"\0", good + good]
        for _ in range(tries // 8):
            start = draw.randrange(len(good))
            length = min(draw.choice([4, 64, 512]), len(good) - start)
            bad.append(good[:start] + bytes(length) + good[start + length :])
        for data in bad:
            if data != good:
                path.write_bytes(data)
                found[outcome(read, folder, {3})] += 1
        path.write_bytes(good)
    assert read(folder) == 3
    return found


@each_kind
def test_damaged_files_are_refused(kind, tmp_path):
    found = damaged(kind, tmp_path, tries=16)
    assert set(found) <= {"refused", "whole"} and found["refused"] > 20
    # What does not matter in a PEFT config, such as the name of the base model, may change unseen.
    assert found["whole"] <= (0.2 * found.total() if kind == "PEFT" else 0)


@pytest.mark.parametrize("name", LAYERS)
def test_damaged_files_of_every_method_are_refused(name, tmp_path):
    def build(seed):
        return replace_linears(nn.Sequential(linear()), "0", lambda base: adapter(name, base=base, seed=seed))

    path, draw = tmp_path / "x", random.Random(0)
    save_adapters(build(1), path)
    good = path.read_bytes()
    for i in range(8):
        place = draw.randrange(i * len(good) // 8, (i + 1) * len(good) // 8)
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << draw.randrange(8)]) + good[place + 1 :])
        with pytest.raises(ValueError, match="path: got"):
            unchanged(build(2), lambda made: load_adapters(made, path))


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_that_fails_undoes_those_before_it(name, tmp_path, monkeypatch):
    def build(seed):
        layers = nn.Sequential(linear(), nn.Tanh(), nn.Linear(10, 12), nn.Tanh(), linear())
        return replace_linears(layers, "^[04]$", lambda base: adapter(name, base=base, seed=seed))

    old, new = build(1), build(2)
    save_adapters(old, tmp_path / "x")
    x = torch.randn(3, 12).double()
    y = new[0](x)

    calls = []
    plain_load = type(new[4])._load_from_state_dict

    def fails(self, *args):
        calls.append(self)
        if len(calls) == 2:
            raise RuntimeError("a part of the layer is elsewhere")
        return plain_load(self, *args)

    monkeypatch.setattr(type(new[4]), "_load_from_state_dict", fails)
    with pytest.raises(ValueError, match="a part of the layer is elsewhere"):
        unchanged(new, lambda made: load_adapters(made, tmp_path / "x"))
    assert calls[0] is new[0] and torch.equal(new[0](x), y)


# Kills. A child process dies in the middle of a write.


def child(work):
    """Run work in a process of its own, which ends when it returns; return the process id."""
    pid = os.fork()
    if not pid:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            os._exit(1)
    return pid


def ends(pid):
    """Wait for a child; return its exit status, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def dies_at(point, work):
    """Work, and be killed at the point-th call that writes, makes durable or moves a file."""
    calls = 0

    def deadly(function):
        def instead(*args):
            nonlocal calls
            calls += 1
            if calls == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)

        return instead

    class Half:
        """A file of which every write takes two steps."""

        def __init__(self, *args):
            self.file = open(*args)  # noqa: SIM115

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            deadly(lambda: None)()
            self.file.write(data[len(data) // 2 :])

        def __getattr__(self, name):
            return getattr(self.file, name)

    io.open = Half
    io.os = type(os)("os")
    io.os.__dict__.update(os.__dict__, fsync=deadly(os.fsync), replace=deadly(os.replace))
    work()


def killed(kind, folder):
    """Kill a writer at every point of a write, once over a file that is there and once where none is."""
    write, read = KINDS[kind]
    found = Counter()
    write(folder.parent, 2)  # what a first time needs is done before anybody dies
    for point in count(1):  # until there is no such point
        before = found["killed"]
        for old in (None, 1):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            if old:
                write(folder, old)
            status = ends(child(lambda point=point: dies_at(point, lambda: write(folder, 2))))
            assert status in (0, -signal.SIGKILL)
            try:
                found[outcome(read, folder, {1.0, 2.0} if old else {2.0, -1.0})] += 1
            except FileNotFoundError:
                found["none" if not old else "WRONG: lost"] += 1
            found["killed"] += status != 0
            write(folder, 3)  # what the dead left behind is in nobody's way
            assert read(folder) == 3
        if found["killed"] == before:
            return found


@each_kind
def test_a_writer_killed_anywhere_leaves_a_whole_file(kind, tmp_path):
    found = killed(kind, tmp_path / "folder")
    assert not [key for key in found if "WRONG" in key]
    assert found["killed"] == (12 if kind == "PEFT" else 6) and found["whole"] >= 5
    assert found["refused"] <= (2 if kind == "PEFT" else 0)  # between the two moves of a folder


def dropped(made, x):
    return nn.functional.dropout(made(x), 0.1).square().mean()


def trained(folder, steps, pause=0.0):
    made = model(0.1)
    torch.manual_seed(os.getpid() if not (folder / "x").exists() else 5)
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=0.01)

    def batch(i):
        time.sleep(pause)
        return (torch.randn(4, 6, generator=seeded(i)),)

    how = {"checkpoint": folder / "x", "save_every": 1, "progress": False}
    return lab.train(made, batch, dropped, optimizer, steps=steps, **how), made


def resumed(folder, kills, seed=0):
    """Kill a run again and again at any time; it ends in the bits of a run that nobody touched."""
    draw, found, steps = random.Random(seed), Counter(), 30
    folder.mkdir(parents=True)
    trained(folder, 1)
    whole = folder / "whole"
    whole.mkdir()
    shutil.copy(folder / "x", whole / "x")
    wanted, straight = trained(whole, steps)
    for _ in range(kills):
        pid = child(lambda: trained(folder, steps, pause=0.01))
        time.sleep(draw.uniform(0, 0.15))
        os.kill(pid, signal.SIGKILL)
        found["killed" if ends(pid) else "ended"] += 1
    history, again = trained(folder, steps)
    assert history == wanted
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), straight.parameters()))
    found["whole"] += 1
    return found


def test_a_run_that_is_killed_again_and_again_ends_in_the_same_bits(tmp_path):
    assert resumed(tmp_path / "x", kills=4)["killed"] >= 1


# Two at once.


def together(kind, folder, rounds, how):
    """Let two write one place, as processes or as threads, while a third reads it."""
    write, read = KINDS[kind]
    write(folder, 1)
    found = Counter()

    def work(v):
        for _ in range(rounds):
            write(folder, v)

    if how == "processes":
        writers = [child(partial(work, v)) for v in (1, 2)]
        for _ in range(rounds):
            found[outcome(read, folder, {1.0, 2.0})] += 1
        assert [ends(pid) for pid in writers] == [0, 0]
    else:
        errors = []

        def kept(v):
            try:
                work(v)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=kept, args=(v,)) for v in (1, 2)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            found[outcome(read, folder, {1.0, 2.0})] += 1
        assert not errors
    found[outcome(read, folder, {1.0, 2.0})] += 1
    assert not list(folder.glob(".*"))
    return found


@each_kind
@pytest.mark.parametrize("how", ["processes", "threads"])
def test_two_writers_never_mix(kind, how, tmp_path):
    found = together(kind, tmp_path, 6, how)
    assert set(found) == {"whole"}


# No space, no right.


def limited(write, folder):
    """Write in a process whose files may hold 100 bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        write(folder, 2)
        os._exit(3)


def forbidden(write, folder):
    """Write as somebody who may not write to the folder."""
    if os.geteuid() == 0:
        os.setuid(65534)
    with contextlib.suppress(OSError):
        write(folder, 2)
        os._exit(3)


@each_kind
@pytest.mark.parametrize("limit", [limited, forbidden])
def test_a_write_that_fails_leaves_what_was_there(kind, limit):
    write, read = KINDS[kind]
    folder = Path(tempfile.mkdtemp())  # not below pytest's own folder, which only its owner may enter
    try:
        write(folder, 1)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        folder.chmod(0o555)
        pid = child(lambda: limit(write, folder))
        assert ends(pid) == 0
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before and read(folder) == 1
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


# Pickles in disguise.


class Bomb:
    """What touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@each_kind
def test_no_pickle_is_executed(kind, tmp_path):
    write, read = KINDS[kind]
    folder, mark = tmp_path / "folder", tmp_path / "mark"
    folder.mkdir()
    write(folder, 1)
    state = torch.load(folder / "x", weights_only=True) if kind == "checkpoint" else {"a": torch.ones(2)}
    path = folder / ("adapter_model.safetensors" if kind == "PEFT" else "x")
    for old_style in (True, False):
        torch.save(state | {"model": Bomb(mark)}, path, _use_new_zipfile_serialization=not old_style)
        sealed = path.read_bytes()
        for data in (sealed, lab._bytes(state | {"history": Bomb(mark)})):  # with the right SHA-256, too
            path.write_bytes(data)
            with pytest.raises(ValueError):
                read(folder)
    if kind == "PEFT":
        path.rename(folder / "adapter_model.bin")
        with pytest.raises(FileNotFoundError):
            read(folder)
    assert not mark.exists()
    torch.load(folder / "adapter_model.bin" if kind == "PEFT" else path, weights_only=False)
    assert mark.exists()  # the negative control: it would have worked


def main(times):
    """Print a table of what became of many faults."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for kind in KINDS:
            for name, fault in {
                "damaged": lambda folder, kind=kind: damaged(kind, folder, 40 * times),
                "killed": lambda folder, kind=kind: killed(kind, folder),
                "two processes": lambda folder, kind=kind: together(kind, folder, 6 * times, "processes"),
                "two threads": lambda folder, kind=kind: together(kind, folder, 6 * times, "threads"),
            }.items():
                folder = Path(place) / f"{kind} {name}"
                folder.mkdir()
                rows.append((kind, name, fault(folder)))
        rows.append(("run", "killed", resumed(Path(place) / "run", 4 * times)))
    columns = ["refused", "whole", "none", "killed"]
    print(f"{'file':12}{'fault':16}" + "".join(f"{c:>9}" for c in columns) + "    wrong")
    for kind, name, found in rows:
        wrong = {key: n for key, n in found.items() if key not in [*columns, "ended"]}
        print(f"{kind:12}{name:16}" + "".join(f"{found[c]:9}" for c in columns) + f"    {wrong or 0}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
