#!/usr/bin/env python3
"""Makes data/assets/unifont.bin, the bitmap font that labels contact sheets, from GNU Unifont.

    make_font.py unifont.hex data/assets/unifont.bin

unifont.hex is in Debian's package `unifont` (15.0.01) and at https://unifoundry.com/unifont/. Taken are ASCII, Latin-1,
general and CJK punctuation, full-width forms, and all of GB 2312. Output, integers little-endian:

    u16 number of narrow glyphs (8 x 16), u16 number of wide glyphs (16 x 16),
    u16 code points of the narrow glyphs, ascending; the same of the wide glyphs,
    16 bytes a narrow glyph, then 32 bytes a wide glyph: rows from the top, the first bit is the left pixel.
"""

import pathlib
import struct
import sys

RANGES = [(0x20, 0x7E), (0xA0, 0xFF), (0x2010, 0x2027), (0x3000, 0x301F), (0xFF01, 0xFF5E)]


def wanted():
    yield from (code for first, last in RANGES for code in range(first, last + 1))
    for row in range(0xA1, 0xF8):
        for cell in range(0xA1, 0xFF):
            try:
                yield ord(bytes([row, cell]).decode("gb2312"))
            except UnicodeDecodeError:
                pass  # GB 2312 leaves some cells empty


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    source, target = map(pathlib.Path, sys.argv[1:])
    lines = (line.split(":") for line in source.read_text().split())
    font = {int(code, 16): bytes.fromhex(bitmap) for code, bitmap in lines}
    glyphs = {code: font[code] for code in sorted(set(wanted())) if code in font}
    narrow = [code for code, bitmap in glyphs.items() if len(bitmap) == 16]
    wide = [code for code, bitmap in glyphs.items() if len(bitmap) == 32]
    codes = struct.pack(f"<HH{len(glyphs)}H", len(narrow), len(wide), *narrow, *wide)
    target.write_bytes(codes + b"".join(glyphs[code] for code in narrow + wide))
    print(f"{len(narrow)} narrow and {len(wide)} wide glyphs, {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
