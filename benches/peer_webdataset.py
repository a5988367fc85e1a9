#!/usr/bin/env python3
"""Times `m6 data bench` against the Python pipeline that people use: webdataset, Pillow, torchvision, DataLoader.

    python3 benches/peer_webdataset.py M6 SHARDS --side 144 --crop 128 --workers 2

Both read the same shards, scale the short side, crop at random, flip half of the pictures and hand out 8-bit RGB in
memory of the consuming process, with as many workers. They take turns, so that what else the machine does hits both.
Prints each round, then one line of JSON with the medians and their ratio. Needs webdataset, torch and torchvision.
Give as many shards as workers or more: webdataset deals whole shards out to its workers.
"""

import argparse
import glob
import json
import statistics
import subprocess
import sys
import time

import torch
import webdataset as wds
from torchvision import transforms

BATCH = 64


def python_rate(shards, side, crop, workers, samples):
    """Samples a second, after a first stretch for which the worker processes start."""
    augment = transforms.Compose(
        [
            transforms.Resize(side),
            transforms.RandomCrop(crop),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )
    dataset = (
        wds.WebDataset(shards, resampled=True, shardshuffle=False, nodesplitter=None)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg")
        .map_tuple(augment)
        .batched(BATCH)
    )
    batches = iter(wds.WebLoader(dataset, batch_size=None, num_workers=workers))
    warm = 0
    while warm < 1000 + 2 * BATCH * workers:
        warm += len(next(batches)[0])
    done = 0
    start = time.perf_counter()
    while done < samples:
        done += len(next(batches)[0])
    return done / (time.perf_counter() - start)


def m6_report(m6, shards, side, crop, workers, samples):
    transform = f"resize:{side} | random_crop:{crop} | flip:0.5"
    command = [m6, "data", "bench", *shards, "--json", "--workers", str(workers)]
    command += ["--transform", transform, "--samples", str(samples)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("m6", help="the program")
    parser.add_argument("shards", help="a glob of tar files with .jpg members")
    parser.add_argument("--side", type=int, default=144, help="short side after scaling")
    parser.add_argument("--crop", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--samples", type=int, default=6000, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    shards = sorted(glob.glob(args.shards))
    if len(shards) < args.workers:
        sys.exit(f"{args.shards}: {len(shards)} shards for {args.workers} workers")
    torch.set_num_threads(1)
    task = (shards, args.side, args.crop, args.workers, args.samples)
    theirs, ours = [], []
    for number in range(args.rounds):
        theirs.append(python_rate(*task))
        report = m6_report(args.m6, *task)
        ours.append(report["samples_per_s"])
        print(f"round {number}: python {theirs[-1]:.0f}/s, m6 {ours[-1]:.0f}/s, {report['stages']}", file=sys.stderr)
    theirs, ours = statistics.median(theirs), statistics.median(ours)
    print(json.dumps({"python_samples_per_s": theirs, "m6_samples_per_s": ours, "ratio": ours / theirs}))


if __name__ == "__main__":
    main()
