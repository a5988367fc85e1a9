#!/usr/bin/env python3
"""Perplexity beyond the trained length, as in table 3 of Qwen's report (Bai et al. 2023), on a model that is made for it:
transformers trains a small Qwen2 on the bytes of a book in texts of 256, `m6 score` scores longer ones with and without
dynamic NTK, LogN and shorter windows in lower layers; and with dual chunk attention and YaRN, as Qwen2 has them.

    python3 scripts/long_texts.py M6 BOOK.txt OUT

Its last twentieth is held out. Prints a table; OUT gets the models. Needs a GPU, torch and transformers.
"""

import concurrent.futures
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

TRAINED = 256
LENGTHS = [128, 256, 512, 1024, 2048, 4096]
TEXTS = 8
STEPS, BATCH, LEARNING_RATE, WARM_UP = 3000, 64, 1e-3, 100
NTK = {"scaling": {"kind": "dynamic_steps", "trained": TRAINED}}
LOGN = {"logn": TRAINED}
CHUNKS = {"chunks": {"size": TRAINED * 3 // 4, "trained": TRAINED}}
YARN = {"scaling": {"kind": "yarn", "factor": LENGTHS[-1] / TRAINED, "original": TRAINED}}
WINDOW = {"size": TRAINED, "from": 0, "last": 4 * TRAINED}
# By name: what is changed of the rotary settings, and the window.
VARIANTS = {
    "as trained": ({}, None),
    "+ dynamic NTK": (NTK, None),
    "+ LogN": (NTK | LOGN, None),
    "+ window": (NTK | LOGN, WINDOW),
    "YaRN": (YARN, None),
    "dual chunk attention": (CHUNKS, None),
    "+ YaRN": (CHUNKS | YARN, None),
}


def train(book, folder):
    """A byte-level language model."""
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=256, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=True, max_position_embeddings=LENGTHS[-1], rope_theta=1e4,
    )
    model = Qwen2ForCausalLM(config).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    rate = lambda step: min((step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / STEPS))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    data = torch.tensor(list(book), dtype=torch.long).cuda()
    places = torch.arange(TRAINED, device="cuda")
    for step in range(STEPS):
        starts = torch.randint(0, len(book) - TRAINED, (BATCH, 1), device="cuda")
        texts = data[starts + places]
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=texts, labels=texts, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 500 == 499:
            print(f"step {step + 1}: loss {loss.item():.4f}", file=sys.stderr, flush=True)
    model.save_pretrained(folder)


def changed(own, folder, rotary, window):
    """The model with other settings."""
    shutil.copytree(own, folder)
    config = json.loads((own / "config.json").read_text())
    config["model"]["rotary"] |= rotary
    config["model"]["window"] = window
    (folder / "config.json").write_text(json.dumps(config))


def nats(m6, folder, text):
    """Mean cost of a token."""
    command = [m6, "score", "--model", folder, "--tokens", ",".join(map(str, text)), "--device", "cpu", "--json"]
    return json.loads(subprocess.check_output(command, env=os.environ | {"OMP_NUM_THREADS": "1"}))["nll"]


def main():
    m6, book, out = sys.argv[1], pathlib.Path(sys.argv[2]).read_bytes(), pathlib.Path(sys.argv[3])
    held_out = len(book) * 19 // 20
    train(book[:held_out], out / "published")
    subprocess.run([m6, "convert", out / "published", out / "own"], check=True, stdout=subprocess.DEVNULL)
    gap = (len(book) - held_out - LENGTHS[-1]) // TEXTS
    print("| | " + " | ".join(map(str, LENGTHS)) + " |\n|" + " --- |" * (len(LENGTHS) + 1))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, settings in VARIANTS.items():
            folder = out / name.replace("+ ", "with ").replace(" ", "-")
            changed(out / "own", folder, *settings)
            row = []
            for length in LENGTHS:
                texts = [book[start : start + length] for start in range(held_out, held_out + TEXTS * gap, gap)]
                costs = list(pool.map(lambda text: nats(m6, folder, text), texts))
                row.append(f"{math.exp(sum(costs) / len(costs)):.2f}")
            print(f"| {name} | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
