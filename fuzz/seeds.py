#!/usr/bin/env python3
"""Writes what fuzzing starts from into `fuzz/corpus`: small shards in all formats with indexes, and pictures.

    python3 fuzz/seeds.py
"""

import bz2
import gzip
import io
import lzma
import pathlib
import tarfile

HERE = pathlib.Path(__file__).parent
PICTURES = HERE.parent / "data" / "tests"
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def archive(form, longest):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
        names = [("a.txt", b"a text"), ("a.json", b'{"en": "a"}'), ("b/c.seg.png", b""), ("n" * longest + ".txt", b"x")]
        for name, content in names:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    # Without the padding to a record of 20 blocks.
    return stream.getvalue()[: stream.tell()].rstrip(b"\0") + bytes(1536)


def index(shard):
    """As NVIDIA DALI's wds2idx: a line for each sample, four words for each member."""
    samples = {}
    with tarfile.open(fileobj=io.BytesIO(shard)) as tar:
        for member in tar:
            folder, _, name = member.name.rpartition("/")
            key, extension = name.split(".", 1)
            words = f"{extension} {member.offset_data} {member.size} {member.name}"
            samples.setdefault((folder, key), []).append(words)
    return "\n".join([f"v1.2 {len(samples)}", *map(" ".join, samples.values())]).encode()


def write(target, name, content):
    folder = HERE / "corpus" / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)


def main():
    for name, form in FORMATS.items():
        shard = archive(form, 90 if name == "ustar" else 150)
        lines = index(shard)
        write("shards", name, bytes(2) + shard)
        write("shards", f"{name}-index", len(lines).to_bytes(2, "little") + lines + shard)
        for suffix, compress in [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)]:
            write("shards", f"{name}-{suffix}", bytes(2) + compress(shard))
    for picture in PICTURES.iterdir():
        if picture.suffix in (".jpg", ".png", ".webp"):
            write("picture", picture.name, picture.read_bytes())


if __name__ == "__main__":
    main()
