#!/usr/bin/env python3
"""Times `m6 data bench` against the Python pipeline that people use: webdataset, Pillow, torchvision, DataLoader.

    python3 benches/peer_webdataset.py M6 SHARDS --side 144 --crop 128 --workers 2

Both read the same shards, scale the short side, crop at random, flip half of the pictures and hand out 8-bit RGB in
memory of the consuming process, with as many workers. They take turns, so that what else the machine does hits both.
In between, one thread of libjpeg-turbo as it is released (by simplejpeg) decodes the same files out of memory, at the
smallest scale that the transform allows and that is fast: what a core could do that had nothing else to do.
Prints each round, then one line of JSON with the medians, their ratio, and what a core of ours makes of what the
decoder makes. Needs webdataset, torch, torchvision and simplejpeg.
Give as many shards as workers or more: webdataset deals whole shards out to its workers.
"""

import argparse
import glob
import json
import statistics
import subprocess
import sys
import tarfile
import time

import simplejpeg
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


def decoder_rate(shards, side, samples):
    """Pictures a second."""
    files = []
    for shard in shards:
        with tarfile.open(shard) as archive:
            members = (member for member in archive if member.name.endswith(".jpg"))
            files += [archive.extractfile(member).read() for member in members]
    # Other scales than these are made without SIMD.
    short = min(simplejpeg.decode_jpeg_header(files[0])[:2])
    least = next(short // part for part in (8, 4, 2, 1) if short // part >= side or part == 1)
    start = time.perf_counter()
    for number in range(samples):
        simplejpeg.decode_jpeg(files[number % len(files)], "RGB", min_height=least, min_width=least)
    return samples / (time.perf_counter() - start)


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
    theirs, decoder, ours = [], [], []
    for number in range(args.rounds):
        theirs.append(python_rate(*task))
        decoder.append(decoder_rate(shards, args.side, args.samples))
        report = m6_report(args.m6, *task)
        ours.append(report["samples_per_s"])
        line = f"python {theirs[-1]:.0f}/s, m6 {ours[-1]:.0f}/s, the decoder alone {decoder[-1]:.0f}/s"
        print(f"round {number}: {line}, {report['stages']}", file=sys.stderr)
    theirs, decoder, ours = (statistics.median(rates) for rates in (theirs, decoder, ours))
    report = {"python_samples_per_s": theirs, "m6_samples_per_s": ours, "ratio": ours / theirs}
    report |= {"decoder_samples_per_s": decoder, "of_decoder_per_worker": ours / args.workers / decoder}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
