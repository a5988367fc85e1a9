#!/usr/bin/env python3
"""Cuts the emoji data set of this repository out of the larger collection it was taken from.

    make_emoji_shards.py SRC DST         writes train, val-base and val-compose shards (at most 11.8 MB in all) to DST
    make_emoji_shards.py SRC --all DST   writes all six styles with skin tones, without what the validation splits hold out
    make_emoji_shards.py SRC --thin DST  the same, but of the skin tones of each emoji one in each style

SRC holds emoji-train-*.tar and emoji-val-*.tar: KEY.webp and KEY.json with id, source, codepoints, emoji, group, en, zh,
keywords_en, keywords_zh, skin_tone. Whole base emoji are apart between the two. The output is the same on every run:
choices are made by hash, headers carry no time.
"""

import argparse
import collections
import hashlib
import io
import json
import pathlib
import sys
import tarfile

STYLES = {  # source: (name in English, name in Chinese)
    "noto": ("noto", "谷歌"),
    "fluent-3d": ("3D", "立体"),
    "fluent-flat": ("flat", "扁平"),
    "fluent-color": ("color", "彩色"),
    "twemoji": ("twemoji", "推特"),
    "openmoji": ("openmoji", "线描"),
}
SHIPPED = ("noto", "fluent-3d", "fluent-flat")
MAX_TOTAL_BYTES = 11_800_000
MAX_SHARD_BYTES = 4_000_000
MAX_JSON_BYTES = 512
HELD_OUT_ONE_IN = 6
SKIN_TONES = {f"{c:X}" for c in range(0x1F3FB, 0x1F400)}
VARIATION_SELECTORS = {"FE0E", "FE0F"}
# Red heart, dog face, cat face, red apple, sun, sun with face, pizza, rocket, rose, fish, house, car, two trees, star,
# soccer ball, birthday cake: what a first prompt asks for.
ALWAYS = {
    "2764", "1F436", "1F431", "1F34E", "2600", "1F31E", "1F355", "1F680", "1F339", "1F41F", "1F3E0", "1F697", "1F333",
    "1F332", "2B50", "26BD", "1F382",
}  # fmt: skip


def base_of(codepoints):
    """The emoji without skin tones and variation selectors."""
    return "-".join(c for c in codepoints.split("-") if c not in SKIN_TONES | VARIATION_SELECTORS)


def rank(purpose, text):
    """A number from 0 to 1 that depends on its arguments only."""
    return int.from_bytes(hashlib.sha256(f"{purpose}:{text}".encode()).digest()[:8], "big") / 2**64


def read(shards):
    """Samples as (record, picture bytes), by id."""
    samples = collections.defaultdict(dict)
    for shard in shards:
        with tarfile.open(shard) as archive:
            for member in archive:
                key, _, extension = member.name.partition(".")
                samples[key][extension] = archive.extractfile(member).read()
    loaded = ((json.loads(sample["json"]), sample["webp"]) for sample in samples.values())
    return sorted(loaded, key=lambda sample: sample[0]["id"])


def shippable(samples):
    """Samples that may be shipped, grouped by base emoji and then style."""
    bases = collections.defaultdict(dict)
    for record, picture in samples:
        named = record["en"] and record["zh"]
        if named and record["source"] in SHIPPED and not record["skin_tone"]:
            bases[base_of(record["codepoints"])].setdefault(record["source"], (record, picture))
    return bases


def held_out_style(base, styles):
    """The one style of this base emoji that only validation sees, or None."""
    if len(styles) < 3 or base in ALWAYS or rank("compose", base) >= 1 / HELD_OUT_ONE_IN:
        return None
    return min(styles, key=lambda style: rank("style", f"{base} {style}"))


def describe(record, keywords):
    en, zh = STYLES[record["source"]]
    wanted = {key: record[key] for key in ("id", "codepoints", "emoji", "group", "en", "zh")}
    wanted |= {"style": record["source"], "style_en": en, "style_zh": zh}
    if keywords:
        wanted |= {key: record[key] for key in ("keywords_en", "keywords_zh")}
    encoded = json.dumps(wanted, ensure_ascii=False, separators=(",", ":")).encode()
    if not keywords and len(encoded) > MAX_JSON_BYTES:
        sys.exit(f"{record['id']}: its JSON has {len(encoded)} bytes, expected at most {MAX_JSON_BYTES}")
    return encoded


def members_of(sample, keywords):
    record, picture = sample
    return [(f"{record['id']}.webp", picture), (f"{record['id']}.json", describe(record, keywords))]


def tar_bytes(members):
    """Room that members take in an archive."""
    return sum(512 + -(-len(data) // 512) * 512 for _, data in members)


def write(folder, split, samples, keywords=False):
    """Writes shards of a split in hash order and returns their size."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(f"{split}-*.tar"):
        stale.unlink()
    groups, size = [[]], 0
    for sample in sorted(samples, key=lambda s: rank("order", s[0]["id"])):
        members = members_of(sample, keywords)
        if size + tar_bytes(members) > MAX_SHARD_BYTES:
            groups.append([])
            size = 0
        size += tar_bytes(members)
        groups[-1].append(members)
    total = 0
    for number, group in enumerate(groups):
        path = folder / f"{split}-{number:06}.tar"
        part = path.with_suffix(".part")
        with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as archive:
            for name, data in (member for members in group for member in members):
                header = tarfile.TarInfo(name)
                header.size = len(data)
                archive.addfile(header, io.BytesIO(data))
        part.rename(path)
        total += path.stat().st_size
    return total


def choose(bases, budget):
    """Bases that fit into `budget` bytes: what a first prompt asks for, then those with all styles, then the others."""
    def order(base):
        return base not in ALWAYS, -len(bases[base]), rank("choose", base)

    chosen, used = [], 0
    for base in sorted(bases, key=order):
        size = sum(tar_bytes(members_of(sample, False)) for sample in bases[base].values())
        if used + size <= budget:
            chosen.append(base)
            used += size
    return chosen


def split_compose(bases, chosen):
    """Samples of `chosen` as (training, held out)."""
    train, compose = [], []
    for base in chosen:
        held_out = held_out_style(base, bases[base])
        for style, sample in bases[base].items():
            (compose if style == held_out else train).append(sample)
    return train, compose


def thin_out_skin_tones(samples):
    """Samples with one skin tone of each emoji and style, which need not be the same tone in each.

    With all of them every second picture would be one of a few people in another colour."""
    toned = collections.defaultdict(list)
    for sample in samples:
        if sample[0]["skin_tone"]:
            toned[base_of(sample[0]["codepoints"]), sample[0]["source"]].append(sample[0]["id"])
    kept = {min(ids, key=lambda id: rank("tone", id)) for ids in toned.values()}
    return [sample for sample in samples if not sample[0]["skin_tone"] or sample[0]["id"] in kept]


def report(split, samples, size):
    styles = collections.Counter(record["source"] for record, _ in samples)
    bases = len({base_of(record["codepoints"]) for record, _ in samples})
    print(f"{split}: {len(samples)} samples of {bases} emoji, {size / 1e6:.2f} MB; {dict(sorted(styles.items()))}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=pathlib.Path)
    parser.add_argument("destination", type=pathlib.Path)
    larger = parser.add_mutually_exclusive_group()
    larger.add_argument("--all", action="store_true", help="all six styles with skin tones")
    larger.add_argument("--thin", action="store_true", help="all six styles with one skin tone of each emoji")
    options = parser.parse_args()
    shards = {split: sorted(options.source.glob(f"emoji-{split}-*.tar")) for split in ("train", "val")}
    for split, found in shards.items():
        if not found:
            sys.exit(f"{options.source}: no emoji-{split}-*.tar")

    train_samples, val_samples = read(shards["train"]), read(shards["val"])
    bases, val_bases = shippable(train_samples), shippable(val_samples)
    if shared := bases.keys() & val_bases.keys():
        sys.exit(f"{len(shared)} base emoji are in training and validation, such as {min(shared)}")
    val = [sample for styles in val_bases.values() for sample in styles.values()]
    # Each shard ends with a mark and padding of at most 10,240 bytes.
    overhead = 5 * tarfile.RECORDSIZE
    budget = MAX_TOTAL_BYTES - overhead - sum(tar_bytes(members_of(sample, False)) for sample in val)
    train, compose = split_compose(bases, choose(bases, budget))

    if options.all or options.thin:
        # A held-out pair is held out with all its skin tones.
        pairs = {(base_of(record["codepoints"]), record["source"]) for record, _ in compose}
        wanted = thin_out_skin_tones(train_samples) if options.thin else train_samples
        kept = [s for s in wanted if (base_of(s[0]["codepoints"]), s[0]["source"]) not in pairs]
        report("train", kept, write(options.destination, "train", kept, keywords=True))
        return
    splits = {"train": train, "val-base": val, "val-compose": compose}
    sizes = {split: write(options.destination, split, samples) for split, samples in splits.items()}
    for split, samples in splits.items():
        report(split, samples, sizes[split])
    if sum(sizes.values()) > MAX_TOTAL_BYTES:
        sys.exit(f"{sum(sizes.values())} bytes in all, expected at most {MAX_TOTAL_BYTES}")


if __name__ == "__main__":
    main()
