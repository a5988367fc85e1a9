#!/usr/bin/env python3
"""Checks by hand that Python's webdataset and `m6` read each other's shards byte for byte.

    python3 tests/interop_webdataset.py target/release/m6

webdataset's TarWriter writes samples with awkward names, and Python's tarfile does in the other formats of tar; `m6 data
pack` reads these shards and writes its own; webdataset reads those. So do shards of names, members and contents at random,
`--rounds` of them. `m6 data pack` also packs a folder of files. All samples have to come out as they went in, in the same
order. Needs webdataset, numpy and Pillow; ends with an error where something differs.
"""

import argparse
import io
import json
import os
import pathlib
import random
import subprocess
import sys
import tarfile
import tempfile

import numpy
import webdataset
from PIL import Image

# Such as the header of a tar cannot hold, alone or at all.
LONG, LONGER = "l" * 120, "/".join(["d" * 60] * 4 + ["l" * 90])


def picture(seed):
    pixels = numpy.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=numpy.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def array():
    stream = io.BytesIO()
    numpy.save(stream, numpy.arange(6, dtype=numpy.float32).reshape(2, 3))
    return stream.getvalue()


def samples(longest):
    """Key and members by extension, in the order of their shard; names of at most `longest` characters."""
    made = [
        ("plain", {"png": picture(0), "json": b'{"en": "a  cat"}', "cls": b"7"}),
        ("a/b/folders", {"png": picture(1), "seg.png": picture(2), "txt": "猫\n".encode()}),
        ("sub", {"depth.npy": array(), "a.b.c": b"\0\xff" * 700}),
        ("图/ключ é", {"png": picture(3), "txt": b"a cat"}),
        ("empty", {"txt": b"", "bin": b""}),
        ("blocks", {"bin": b"x" * 512, "raw": b"y" * 1024, "odd": b"z" * 513}),
        (LONG, {"png": picture(4), "seg.png": picture(5)}),
        ("folder/" + "é" * 60, {"txt": b"more bytes than characters"}),
        (LONGER, {"txt": b"longer than any header"}),
        ("__dunder__", {"txt": b"no metadata"}),
        ("last", {"txt": b"not lost behind the long ones"}),
    ]
    return [(key, members) for key, members in made if len(key.encode()) <= longest]


def random_samples(longest, rng):
    """As `samples`, at random."""
    letters = "abcXYZ019_- +@éß猫図ж🐱"

    def name(most):
        return "".join(rng.choices(letters, k=rng.randint(1, most))).strip() or "x"

    made = {}
    for _ in range(rng.randint(1, 20)):
        folders = [name(60) + rng.choice(["", ".d"]) for _ in range(rng.randint(0, 3))]
        key = "/".join([*folders, name(rng.choice([5, 120]))])
        extensions = rng.sample(["txt", "json", "seg.png", "cls", "a.b.c", "npy", "bin"], rng.randint(1, 4))
        sizes = [rng.choice([0, 1, 511, 512, 513, 1024, rng.randint(0, 5000)]) for _ in extensions]
        made[key] = {extension: rng.randbytes(size) for extension, size in zip(extensions, sizes)}
        if "txt" in made[key]:
            made[key]["txt"] = name(300).encode()
        if "json" in made[key]:
            made[key]["json"] = json.dumps({"en": name(50)}).encode()
    return [(key, members) for key, members in made.items() if len(key.encode()) <= longest]


def with_webdataset(compress):
    def write(shard, samples):
        with webdataset.TarWriter(str(shard), compress=compress) as writer:
            for key, members in samples:
                writer.write({"__key__": key, **members})

    return write


def with_tarfile(form):
    def write(shard, samples):
        with tarfile.open(shard, "w", format=form) as archive:
            for key, members in samples:
                for extension, content in members.items():
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))

    return write


def read(shards):
    """What webdataset reads: keys, and members by extension."""
    found = webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False)
    return [
        (sample["__key__"], {name: content for name, content in sample.items() if not name.startswith("__")})
        for sample in found
    ]


def pack(m6, source, out):
    command = [m6, "data", "pack", str(source), str(out), "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    report = json.loads(done.stdout)
    if report["skipped"] or report["warnings"]:
        sys.exit(f"{source}: {report}")
    return report["shards"]


def check(what, found, expected):
    if found != expected:
        differing = [key for (key, _), other in zip(expected, found) if (key, _) != other]
        sys.exit(f"{what}: {len(found)} samples, expected {len(expected)}; different: {differing}")
    print(f"{what}: {len(expected)} samples are the same")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("m6", help="the program")
    parser.add_argument("--rounds", type=int, default=50)
    args = parser.parse_args()
    m6 = args.m6
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        os.environ["M6_CACHE"] = str(folder / "cache")
        for name, write, longest in [
            ("webdataset", with_webdataset(False), 1000),
            ("gzip", with_webdataset("gz"), 1000),
            ("bzip2", with_webdataset("bz2"), 1000),
            ("xz", with_webdataset("xz"), 1000),
            # A header has 100 bytes for a name, and 155 for the folder that it is in.
            ("ustar", with_tarfile(tarfile.USTAR_FORMAT), 90),
            ("gnu", with_tarfile(tarfile.GNU_FORMAT), 1000),
        ]:
            # Compression is told by the content.
            expected, shard = samples(longest), folder / f"{name}.tar"
            write(shard, expected)
            check(f"{name}, read by webdataset", read([shard]), expected)
            check(f"{name}, packed by m6, read by webdataset", read(pack(m6, shard, folder / name)), expected)
            for number in range(args.rounds):
                expected = random_samples(longest, random.Random(number))
                if expected:
                    write(shard, expected)
                    out = folder / f"{name}-{number}"
                    check(f"{name}, packed by m6, round {number}", read(pack(m6, shard, out)), expected)

        files = folder / "files"
        expected = [("a", {"png": picture(6), "txt": b"text"}), ("b/c d", {"png": picture(7), "json": b'{"n": 1}'})]
        for key, members in expected:
            for extension, content in members.items():
                path = files / f"{key}.{extension}"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        check("files, packed by m6, read by webdataset", read(pack(m6, files, folder / "packed")), expected)


if __name__ == "__main__":
    main()
