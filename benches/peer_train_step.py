#!/usr/bin/env python3
"""Times `m6/benches/train_step.rs` against the PyTorch code that people train these shapes with, on one GPU.

    python3 benches/peer_train_step.py TRAIN_STEP [--llamagen LLAMAGEN] [--only SHAPE]

TRAIN_STEP is the program that `cargo bench -p m6 --features cuda --bench train_step --no-run` names. Theirs are
Hugging Face's Qwen2 and Qwen2-MoE with bf16 weights and moments, compiled but for the experts, whose routing cannot be;
and LlamaGen's GPT-L, from a checkout of its repository, with float32 weights under autocast, clipped as in its training
and without dropout. Each side of a shape runs alone, one after the other. Prints one line of JSON a shape with tokens/s,
peak memory and their ratio. Needs torch and transformers.
"""

import argparse
import json
import subprocess
import sys
import time

import torch

# Both sides are timed in rounds, as many of each: a GPU gets slower under load.
ROUNDS, WARM_UP, STEPS = 7, 4, 10
QWEN2 = {"vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 4096}
# The dtypes of our moments and weights.
OURS = {"m6": ("fp32", "fp32"), "m6_bf16_moments": ("bf16", "fp32"), "m6_bf16": ("bf16", "bf16")}
SHAPES = {
    "qwen2-0.5b": (8, 2048),
    "qwen2-1.5b": (8, 2048),
    "qwen2-moe-60": (8, 2048),
    "llamagen-gpt-l": (64, 256),
}


def qwen2(name):
    """Hugging Face's model of this name."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

    dense = {
        "qwen2-0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
        "qwen2-1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
    }
    if name in dense:
        config = Qwen2Config(**QWEN2, **dense[name], num_key_value_heads=2, attn_implementation="sdpa")
        return Qwen2ForCausalLM(config), config.vocab_size
    config = Qwen2MoeConfig(
        hidden_size=1024, intermediate_size=2816, moe_intermediate_size=704, shared_expert_intermediate_size=2816,
        num_experts=60, num_experts_per_tok=4, num_hidden_layers=12, num_attention_heads=16, num_key_value_heads=16,
        vocab_size=32000, tie_word_embeddings=False, attn_implementation="sdpa",
    )
    return Qwen2MoeForCausalLM(config), config.vocab_size


def step_of_qwen2(name, texts, length):
    """A training step."""
    model, rows = qwen2(name)
    model = model.to("cuda", torch.bfloat16).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, rows, (texts, length), device="cuda")
    compiled = model if name == "qwen2-moe-60" else torch.compile(model)

    def step():
        compiled(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def step_of_llamagen(folder, texts, length):
    """A training step as in LlamaGen's train_c2i.py."""
    sys.path.insert(0, folder)
    from autoregressive.models.gpt import GPT_models

    off = dict.fromkeys(["token_dropout_p", "resid_dropout_p", "ffn_dropout_p"], 0.0)
    model = GPT_models["GPT-L"](vocab_size=16384, block_size=length, **off).cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, betas=(0.9, 0.95), fused=True)
    codes = torch.randint(0, 16384, (texts, length), device="cuda")
    classes = torch.randint(0, 1000, (texts,), device="cuda")
    compiled = torch.compile(model)

    def step():
        with torch.autocast("cuda", dtype=torch.bfloat16):
            _, loss = compiled(cond_idx=classes, idx=codes[:, :-1], targets=codes)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def theirs(name, llamagen):
    """Tokens a second and peak memory of the other side."""
    torch.backends.cuda.matmul.allow_tf32 = True
    texts, length = SHAPES[name]
    make = step_of_llamagen if name == "llamagen-gpt-l" else step_of_qwen2
    step = make(llamagen if name == "llamagen-gpt-l" else name, texts, length)
    seconds = sum(time_round(step) for _ in range(ROUNDS))
    tokens = ROUNDS * STEPS * texts * length / seconds
    return {"tokens_per_s": tokens, "memory_peak_bytes": torch.cuda.max_memory_allocated()}


def time_round(step):
    """Seconds of some steps."""
    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def last_line(command):
    """What a program prints last, a line of JSON."""
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train_step")
    parser.add_argument("--llamagen", help="a checkout of LlamaGen; its shape is left out without one")
    parser.add_argument("--only", choices=SHAPES)
    parser.add_argument("--theirs", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.theirs:
        print(json.dumps(theirs(args.only, args.llamagen)))
        return
    for name, (texts, length) in SHAPES.items():
        if (args.only and name != args.only) or (name == "llamagen-gpt-l" and not args.llamagen):
            continue
        more = ["--llamagen", args.llamagen] if args.llamagen else []
        other = last_line([sys.executable, __file__, args.train_step, "--only", name, "--theirs", *more])
        row = {"gpu": torch.cuda.get_device_name(), "shape": name, "theirs": other}
        for key in OURS if name == "qwen2-moe-60" else ["m6"]:
            own = last_line([args.train_step, name, str(texts), str(length), "1", *OURS[key]])
            row[key] = own | {"ratio": own["tokens_per_s"] / other["tokens_per_s"]}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
