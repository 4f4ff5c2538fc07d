"""Ranks in network namespaces of their own: the bits of one rank, over wires that are counted."""

import ctypes
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from on_ranks import on_ranks
from tiny import lm_batch, tiny_adapted

from adazeta import ZerothOrder
from adazeta.distributed import Ranks
from adazeta.losses import lm_loss

RANKS, STEPS, QUERIES = 4, 6, 4
NEW_USER, NEW_NET = 0x10000000, 0x40000000  # CLONE_NEWUSER, CLONE_NEWNET


def unshare(kinds: int) -> None:
    if ctypes.CDLL(None, use_errno=True).unshare(kinds):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True, capture_output=True)


def own_network() -> None:
    """Give this process, and what it forks, a network that it may shape, as root of a user namespace."""
    user, group = os.getuid(), os.getgid()
    unshare(NEW_USER | NEW_NET)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    ip("link add hub type bridge")
    ip("link set hub up")
    ip("link add probe type veth peer name peer")  # bridges and pairs are modules of the kernel
    ip("link del probe")


def in_a_fork(work) -> str:
    """Return '' or what went wrong with ``work()`` in a forked process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work()
        except (OSError, subprocess.CalledProcessError, AssertionError) as error:
            os.write(writing, f"{error} {getattr(error, 'stderr', b'')}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        said = stream.read()
    os.waitpid(child, 0)
    return said


def sent_bytes() -> int:
    """Return the bytes that left by ``eth0`` of this network namespace."""
    line = next(line for line in Path("/proc/self/net/dev").read_text().splitlines() if "eth0:" in line)
    return int(line.split(":")[1].split()[8])


def train(opt):
    for k in range(STEPS):
        opt.estimate(lm_loss, lm_batch(6, seed=k))
        opt.step()
    return opt


def test_four_ranks_in_four_networks_end_with_the_bits_of_one(tmp_path):
    if not shutil.which("ip"):
        pytest.skip("network namespaces need the command ip (iproute2)")
    if reason := in_a_fork(own_network):
        pytest.skip(f"this machine does not let a process make networks: {reason}")
    model, threads = tiny_adapted(), torch.get_num_threads()
    torch.set_num_threads(1)
    settings = {"lr": 0.1, "eps": 0.05, "momentum": 0.9, "run_seed": 7, "probes_per_forward": 1, "queries": QUERIES}

    def wire(rank):
        """Move into a network that one cable joins with the hub."""
        ready, go = tmp_path / f"ready-{rank}", tmp_path / f"go-{rank}"
        os.mkfifo(go)
        unshare(NEW_NET)
        ready.write_text(str(os.getpid()))
        go.read_text()
        ip("link set lo up")
        ip(f"addr add 10.77.0.{rank + 1}/24 dev eth0")
        ip("link set eth0 up")
        os.environ["GLOO_SOCKET_IFNAME"] = "eth0"

    def plug():
        """Lay the cables of all ranks."""
        for rank in range(RANKS):
            ready = tmp_path / f"ready-{rank}"
            for _ in range(6000):
                if ready.exists() and ready.read_text():
                    break
                time.sleep(0.01)
            ip(f"link add cable{rank} type veth peer name eth0 netns {ready.read_text()}")
            ip(f"link set cable{rank} master hub up")
            (tmp_path / f"go-{rank}").write_text("go")

    def work(rank):
        opt = ZerothOrder(model, ranks=Ranks(check_every=1), **settings)
        before = sent_bytes()
        train(opt)
        torch.save((opt.fingerprint(), (sent_bytes() - before) / STEPS), tmp_path / f"rank-{rank}")

    def all_ranks():
        own_network()
        statuses, errors = on_ranks(RANKS, tmp_path / "work", work, wire=wire, meanwhile=plug)
        assert statuses == [0] * RANKS, errors

    try:
        assert in_a_fork(all_ranks) == ""
        found = [torch.load(tmp_path / f"rank-{rank}") for rank in range(RANKS)]
        assert {fingerprint for fingerprint, _ in found} == {train(ZerothOrder(model, **settings)).fingerprint()}
    finally:
        torch.set_num_threads(threads)
    print("bytes sent per rank and step, with the frames of gloo, TCP and Ethernet:", [round(n) for _, n in found])
    # A ring passes every message on to all others. Each is 64 bytes and 8 per query; frames and answers are the rest.
    message = 64 + 8
    assert all((RANKS - 1) * message < sent < 5000 for _, sent in found)
