"""Allocator settings of the actors: freed blocks are kept for the next step, but huge ones are returned."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from othink_ray.runtime.placement import PROCESS_ENVIRONMENT

# After each freed block a small allocation takes its place.
HOLES = """
import resource, sys, torch
kept = []
def grown(size, rounds):
    for _ in range(rounds):
        torch.ones(size, dtype=torch.uint8)
        kept.append(torch.ones(2**20, dtype=torch.uint8))
    held = [line for line in open('/proc/self/status') if line.startswith('VmRSS')][0]
    return int(held.split()[1]) // 1024
first = grown(800 << 20, 1)
print(first, grown(800 << 20, 4))
def faults_so_far():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = faults_so_far()
torch.ones(800 << 20, dtype=torch.uint8)
print(faults_so_far() - before)
for turn in range(60):  # the first rounds settle: memalign asks for a little more than the freed block
    if turn == 40:
        faults = faults_so_far()
    for size in (50, 100, 200):
        torch.ones(size << 20, dtype=torch.uint8)
print(faults_so_far() - faults)
for turn in range(20):
    if turn == 15:
        faults = faults_so_far()
    torch.ones(514 << 20, dtype=torch.uint8)
print(faults_so_far() - faults)
"""


def test_huge_blocks_leave_no_holes_and_smaller_ones_are_kept() -> None:
    environment = {**os.environ, **PROCESS_ENVIRONMENT}
    done = subprocess.run([sys.executable, "-c", HOLES], env=environment, capture_output=True, text=True, check=True)
    first, last, huge, faults, kept = map(int, done.stdout.split())
    assert last - first < 100  # MiB; if kept, each of four blocks of 800 would take new memory
    if "[never]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        assert huge < 2000  # page faults of a block of 800 MiB, which has 204,800 small pages
    assert faults < 2 * (100 << 20) // 4096  # in 20 rounds, each of which would fault every page if they were returned
    assert kept < 257  # in five turns, each of which would fault as often in pages of 2 MiB if its block were returned
