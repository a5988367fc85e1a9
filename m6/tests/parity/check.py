#!/usr/bin/env python3
"""Holds a build of m6 to transformers and to tiktoken.

    python3 m6/tests/parity/check.py target/release/m6

Two parts, of which `--only` names one:

`models`  makes the models of `make.py` anew and compares them with the committed ones; turns each into a folder of m6 and
          back by `m6 convert`, and compares what transformers makes of the result with what `m6 score` makes of all three
          folders. Needs the transformers that made the committed ones.
`tokens`  compares `m6 tokenizer encode` with tiktoken and with transformers' Qwen2 tokenizer: on texts of the repository
          with the cut vocabulary of a test, or on the lines of `--texts` with the ranks of `--ranks`; and on random texts.
          Needs tiktoken.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import make

COMMITTED = pathlib.Path(__file__).parent
# Of log-probabilities in float32, and of what another processor makes of the golden values.
TOLERANCE = 2e-5

# Keys that may differ: where the folder is, what has no effect without windows, and what is asked for in training alone.
SETTLED = {"_name_or_path", "max_window_layers", "output_router_logits"}
# What transformers takes where a rotary setting is absent.
ROTARY_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0}


def without_defaults(value):
    """A setting of a config, its rotary part without what is said by default."""
    if not isinstance(value, dict):
        return value
    return {key: part for key, part in value.items() if ROTARY_DEFAULTS.get(key) != part}


def same(found, expected, tolerance):
    """Names of tensors that differ."""
    names = found.keys() | expected.keys()
    close = lambda a, b: a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance)
    return sorted(n for n in names if n not in found or n not in expected or not close(found[n], expected[n]))


def scored(m6, folder, ids):
    """Log-probabilities of a text by `m6 score`."""
    tokens = ",".join(str(token) for token in ids.tolist())
    line = subprocess.check_output(
        [m6, "score", "--model", folder, "--tokens", tokens, "--device", "cpu", "--json"]
    )
    return torch.tensor(json.loads(line)["logprobs"])


def model_problems(m6, name, regenerated, work):
    """What is wrong with one model, a line each."""
    committed, own, back = COMMITTED / name, work / f"{name}-own", work / f"{name}-back"
    for file, tolerance in [("model.safetensors", 0.0), ("golden.safetensors", TOLERANCE)]:
        for tensor in same(load_file(regenerated / name / file), load_file(committed / file), tolerance):
            yield f"{file}: `{tensor}` is made anew as something else"
    subprocess.run([m6, "convert", committed, own], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([m6, "convert", own, back], check=True, stdout=subprocess.DEVNULL)
    published = [AutoConfig.from_pretrained(folder).to_dict() for folder in (committed, back)]
    for key in sorted(published[0].keys() | published[1].keys()):
        values = [without_defaults(config.get(key)) for config in published]
        if key not in SETTLED and values[0] != values[1]:
            yield f"config.json: {key} = {values[1]}, expected {values[0]}"
    ids = load_file(committed / "golden.safetensors")["ids"]
    model = AutoModelForCausalLM.from_pretrained(back, attn_implementation="eager")
    with torch.no_grad():
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
    exact = logits[:-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
    for folder in (committed, own, back):
        error = (scored(m6, folder, ids) - exact).abs().max().item()
        if not error < TOLERANCE:
            yield f"{folder.name}: log-probabilities differ by {error}"


def check_models(args, work):
    make.write(work / "made", seed=make.SEED)
    for name in make.MODELS:
        yield name, model_problems(args.m6, name, work / "made", work)


def check_tokens(args, work):
    # Needs what the other parts do without.
    import tokens

    yield from tokens.comparisons(args.m6, args.ranks, args.texts, work)


PARTS = {"models": check_models, "tokens": check_tokens}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("m6", type=pathlib.Path)
    parser.add_argument("--only", choices=PARTS, help="the part to run; all by default")
    parser.add_argument("--ranks", type=pathlib.Path, help="tokens: ranks of a vocabulary with Qwen's pattern (*.tiktoken)")
    parser.add_argument("--texts", type=pathlib.Path, help="tokens: a file with a text a line")
    args = parser.parse_args()
    args.m6 = args.m6.resolve()
    failed = False
    with tempfile.TemporaryDirectory() as work:
        for part in [args.only] if args.only else PARTS:
            for name, problems in PARTS[part](args, pathlib.Path(work)):
                found = list(problems)
                print(f"{name}: {'; '.join(found) or 'as expected'}", flush=True)
                failed |= bool(found)
    sys.exit(failed)


if __name__ == "__main__":
    main()
