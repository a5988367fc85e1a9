#!/usr/bin/env python3
"""Makes the pictures beside it with Pillow, and prints the pixels that Pillow reads in the middle of their quarters.

    python3 data/tests/pictures.py
"""

import io
import pathlib

from PIL import Image

HERE = pathlib.Path(__file__).parent
SIDE = 16
TURN_RIGHT = 6


def quarters(mode, colours):
    picture = Image.new(mode, (2 * SIDE, 2 * SIDE))
    for place, colour in enumerate(colours):
        picture.paste(colour, (place % 2 * SIDE, place // 2 * SIDE, place % 2 * SIDE + SIDE, place // 2 * SIDE + SIDE))
    return picture


def show(name):
    picture = Image.open(HERE / name)
    pixels = picture.convert("RGB")
    middles = [(x, y) for y in (SIDE // 2, SIDE + SIDE // 2) for x in (SIDE // 2, SIDE + SIDE // 2)]
    print(name, picture.mode, picture.size, [pixels.getpixel(at) for at in middles])


def main():
    stream = io.BytesIO()
    inks = quarters("CMYK", [(0, 0, 0, 0), (200, 30, 60, 40), (10, 220, 120, 0), (30, 30, 30, 190)])
    inks.save(stream, "JPEG", quality=95)
    cmyk = bytearray(stream.getvalue())
    (HERE / "cmyk.jpg").write_bytes(cmyk)
    # The last byte of Adobe's segment says how the colours are to be understood: 2 is YCCK.
    cmyk[cmyk.index(b"Adobe") + 11] = 2
    (HERE / "ycck.jpg").write_bytes(cmyk)

    exif = Image.Exif()
    exif[0x112] = TURN_RIGHT
    flag = quarters("RGB", [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)]).crop((0, 0, 2 * SIDE, SIDE + 8))
    flag.save(HERE / "turned.png", exif=exif)
    flag.save(HERE / "turned.webp", exif=exif, lossless=True)
    for name in ["cmyk.jpg", "ycck.jpg"]:
        show(name)


if __name__ == "__main__":
    main()
