#!/usr/bin/env python3
"""Cuts square JPEGs at random out of photographs, into webdataset shards: something to time a loader with.

    python3 scripts/make_photo_shards.py PHOTOS OUT --side 256 --count 4000 --shards 8

The same arguments give the same pictures. Needs Pillow.
"""

import argparse
import io
import pathlib
import random
import tarfile

from PIL import Image


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=pathlib.Path, help="a folder of PNGs that are no smaller than --side")
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--count", type=int, default=4000, help="of pictures")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--quality", type=int, default=90)
    args = parser.parse_args()
    rng = random.Random(0)
    photos = [Image.open(path).convert("RGB") for path in sorted(args.photos.glob("*.png"))]
    args.out.mkdir(parents=True, exist_ok=True)
    for shard in range(args.shards):
        with tarfile.open(args.out / f"photos-{shard:06}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for number in range(shard, args.count, args.shards):
                photo = rng.choice(photos)
                x, y = (rng.randint(0, limit - args.side) for limit in photo.size)
                jpeg = io.BytesIO()
                photo.crop((x, y, x + args.side, y + args.side)).save(jpeg, "JPEG", quality=args.quality)
                for extension, content in (("jpg", jpeg.getvalue()), ("txt", f"photo {number}".encode())):
                    member = tarfile.TarInfo(f"{number:06}.{extension}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    main()
