#!/usr/bin/env python3
"""Holds a build of m6 to transformers and to tiktoken.

    python3 m6/tests/parity/check.py target/release/m6

Three parts, of which `--only` names one:

`models`  makes the models of `make.py` and the golden file of `m6.py` anew and compares them with the committed ones; turns each into a folder of m6 and
          back by `m6 convert`, and compares what transformers makes of the result with what `m6 score` makes of all three
          folders. Needs the transformers that made the committed ones.
`tokens`  compares `m6 tokenizer encode` with tiktoken and with transformers' Qwen2 tokenizer: on texts of the repository
          with the cut vocabulary of a test, or on the lines of `--texts` with the ranks of `--ranks`; and on random texts.
          Needs tiktoken.
`bf16`    compares `m6 score --dtype bf16` on a device with transformers in float32 on the CPU, and holds its error to that
          of transformers in bf16 on the same device.
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

import m6
import make

COMMITTED = pathlib.Path(__file__).parent
M6 = "m6.safetensors"
# Of log-probabilities in float32, and of what another processor makes of the golden values.
TOLERANCE = 2e-5

# Keys that may differ: where the folder is, what has no effect without windows, and what is asked for in training alone.
SETTLED = {"_name_or_path", "max_window_layers", "output_router_logits"}
# What transformers takes where a rotary setting is absent.
ROTARY_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0}
# Our mean error in bf16 may be so many times that of transformers, which rounds in other places. Where weights lose one
# bit more it is 1.7 to 2.2 times as large. Absolute errors, not squared ones, since tokens that go to another expert for a
# near tie are far off in both.
ROUNDING = 1.5


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


def scored(m6, folder, ids, device="cpu", dtype="fp32"):
    """Log-probabilities of a text by `m6 score`."""
    tokens = ",".join(str(token) for token in ids.tolist())
    numbers = ["--device", device, "--dtype", dtype]
    line = subprocess.check_output([m6, "score", "--model", folder, "--tokens", tokens, *numbers, "--json"])
    return torch.tensor(json.loads(line)["logprobs"])


def log_probabilities(model, ids):
    """The same by transformers."""
    with torch.no_grad():
        logits = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0].float().cpu()
    return logits[:-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]


def regenerated_problems(name, regenerated):
    """What is made anew as something else than what is committed, a line each."""
    for file, tolerance in [("model.safetensors", 0.0), ("golden.safetensors", TOLERANCE)]:
        for tensor in same(load_file(regenerated / name / file), load_file(COMMITTED / name / file), tolerance):
            yield f"{file}: `{tensor}` is made anew as something else"


def model_problems(m6, name, regenerated, work):
    """What is wrong with one model, a line each."""
    committed, own, back = COMMITTED / name, work / f"{name}-own", work / f"{name}-back"
    yield from regenerated_problems(name, regenerated)
    subprocess.run([m6, "convert", committed, own], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([m6, "convert", own, back], check=True, stdout=subprocess.DEVNULL)
    published = [AutoConfig.from_pretrained(folder).to_dict() for folder in (committed, back)]
    for key in sorted(published[0].keys() | published[1].keys()):
        values = [without_defaults(config.get(key)) for config in published]
        # A width of heads may be said that was left to follow from the others.
        is_told = key == "head_dim" and values[0] is None
        if key not in SETTLED and not is_told and values[0] != values[1]:
            yield f"config.json: {key} = {values[1]}, expected {values[0]}"
    yield from score_problems(m6, name, back, [committed, own, back])


def score_problems(m6, name, published, folders):
    """Folders that are scored otherwise than transformers scores `published`."""
    ids = load_file(COMMITTED / name / "golden.safetensors")["ids"]
    model = AutoModelForCausalLM.from_pretrained(published, attn_implementation="eager", dtype=torch.float32)
    exact = log_probabilities(model, ids)
    for folder in folders:
        error = (scored(m6, folder, ids) - exact).abs().max().item()
        if not error < TOLERANCE:
            yield f"{folder.name}: log-probabilities differ by {error}"


def as_toml(value):
    """Settings in JSON as a value of TOML, which knows no null."""
    if not isinstance(value, dict):
        return json.dumps(value)
    return "{ " + ", ".join(f"{key} = {as_toml(inner)}" for key, inner in value.items() if inner is not None) + " }"


def made_problems(m6, name, own, made, *options):
    """What is wrong with what `m6 convert` makes of a folder and publishes."""
    back = made.with_name(f"{made.name}-back")
    for source, target, more in [(own, made, options), (made, back, [])]:
        subprocess.run([m6, "convert", source, target, *more], check=True, stdout=subprocess.DEVNULL)
    yield from score_problems(m6, name, back, [made, back])


def check_models(args, work):
    make.write(work / "made", seed=make.SEED)
    for name in make.MODELS:
        yield name, model_problems(args.m6, name, work / "made", work)
    name = "qwen2"
    own, experts = work / f"{name}-own", work / "experts.toml"
    model = json.loads((own / "config.json").read_text())["model"]
    model["moe"] = {"experts": 4, "active": 2, "every": 1, "hidden": 16, "shared": 24, "balance_loss": 0.0, "z_loss": 0.0, "balance": "model"}
    experts.write_text(f"model = {as_toml(model)}\n")
    yield f"{name} in bf16", made_problems(args.m6, name, COMMITTED / name, work / "bf16", "--dtype", "bf16")
    yield f"{name} given experts", made_problems(args.m6, name, COMMITTED / name, work / "given", "--experts", experts)
    yield "qwen", regenerated_problems("qwen", work / "made")
    m6.write(work / M6)
    changed = same(load_file(work / M6), load_file(COMMITTED / M6), TOLERANCE)
    yield "m6", [f"{M6}: `{tensor}` is made anew as something else" for tensor in changed]


def check_tokens(args, work):
    # Needs what the other parts do without.
    import tokens

    yield from tokens.comparisons(args.m6, args.ranks, args.texts, work)


def rounding(m6, folder, device):
    """Mean errors of log-probabilities in bf16, ours and those of transformers."""
    load = lambda dtype: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    exact = load(torch.float32)
    # The models with scaled positions take as many as the others.
    count = max(exact.config.max_position_embeddings, make.SIZES["max_position_embeddings"])
    generator = torch.Generator().manual_seed(make.SEED)
    ids = torch.randint(exact.config.vocab_size, (count,), generator=generator)
    expected = log_probabilities(exact, ids)
    in_bf16 = [scored(m6, folder, ids, device, "bf16"), log_probabilities(load(torch.bfloat16).to(device), ids)]
    return [(found - expected).abs().mean().item() for found in in_bf16]


def check_bf16(args, work):
    for name, config in make.MODELS.items():
        wide = work / f"{name}-wide"
        make.random_model(make.wide(config), make.SEED, make.WIDE_SPREAD).save_pretrained(wide)
        for folder in (COMMITTED / name, wide):
            ours, theirs = rounding(args.m6, folder, args.device)
            found = [] if ours < ROUNDING * theirs else [f"expected less than {ROUNDING} times as much"]
            yield f"{folder.name}, off by {ours:.4f}, transformers by {theirs:.4f}", found


PARTS = {"models": check_models, "tokens": check_tokens, "bf16": check_bf16}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("m6", type=pathlib.Path)
    parser.add_argument("--only", choices=PARTS, help="the part to run; all by default")
    parser.add_argument("--ranks", type=pathlib.Path, help="tokens: ranks of a vocabulary with Qwen's pattern (*.tiktoken)")
    parser.add_argument("--texts", type=pathlib.Path, help="tokens: a file with a text a line")
    parser.add_argument("--device", default="cpu", help="bf16: where to compute, such as `cuda:0`")
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
