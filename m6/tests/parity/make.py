#!/usr/bin/env python3
"""Small random language models of Hugging Face transformers, and what transformers makes of them.

    python3 m6/tests/parity/make.py m6/tests/parity [--seed N]

Writes a folder for each model: `config.json` and `model.safetensors` as `save_pretrained` writes them, and
`golden.safetensors` with token ids, logits, the loss and its gradient for every weight, in float32 on the CPU. So does
`qwen.py`, which is no part of transformers, for Qwen's own layout. Needs torch, transformers (5.24 made the committed ones)
and safetensors.
"""

import argparse
import copy
import json
import pathlib

import torch
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

import qwen

TOKENS = 24
SEED = 1
SIZES = dict(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    attn_implementation="eager",
)
EXPERTS = dict(
    SIZES,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    shared_expert_intermediate_size=16,
    output_router_logits=True,
    router_aux_loss_coef=0.01,
)
ROPE = dict(rope_theta=10000.0)
# Sizes that the kernels of a GPU take as they take those of published models.
WIDE = dict(vocab_size=1024, hidden_size=256, intermediate_size=512, head_dim=64, max_position_embeddings=512)
WIDE_EXPERTS = dict(moe_intermediate_size=128, shared_expert_intermediate_size=256)
# How far from the start of training a weight is; products of wide rows sum more of it.
SPREAD = 0.15
WIDE_SPREAD = SPREAD * (SIZES["hidden_size"] / WIDE["hidden_size"]) ** 0.5
MODELS = {
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=False),
    "qwen2-tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2-window": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen2-linear": Qwen2Config(**SIZES, rope_parameters=dict(ROPE, rope_type="linear", factor=2.0)),
    "qwen2-dynamic": Qwen2Config(
        **SIZES | dict(max_position_embeddings=16), rope_parameters=dict(ROPE, rope_type="dynamic", factor=2.0)
    ),
    "qwen2-yarn": Qwen2Config(
        **SIZES, rope_parameters=dict(ROPE, rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
    ),
    # Nothing said of the width of heads, as in the published models, and keys for each of them.
    "qwen2-heads": Qwen2Config(
        **{key: size for key, size in SIZES.items() if key != "head_dim"}
        | dict(hidden_size=32, num_key_value_heads=4),
        tie_word_embeddings=False,
    ),
    "qwen2-moe": Qwen2MoeConfig(**EXPERTS, norm_topk_prob=False, decoder_sparse_step=1),
    "qwen2-moe-sparse": Qwen2MoeConfig(**EXPERTS, norm_topk_prob=True, decoder_sparse_step=2),
    "qwen2-moe-dense-layer": Qwen2MoeConfig(**EXPERTS, norm_topk_prob=False, mlp_only_layers=[0]),
    "qwen2-moe-window": Qwen2MoeConfig(
        **EXPERTS | dict(num_hidden_layers=3), use_sliding_window=True, sliding_window=5, max_window_layers=2
    ),
}


def hub_gradients(model, config):
    """Gradients under the names of the files, which keep experts apart."""
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if name.endswith("experts.gate_up_proj") or name.endswith("experts.down_proj"):
            stem = name.rsplit(".", 1)[0]
            for index, expert in enumerate(gradient):
                if name.endswith("down_proj"):
                    yield f"{stem}.{index}.down_proj.weight", expert
                else:
                    gate, up = expert.split(config.moe_intermediate_size)
                    yield f"{stem}.{index}.gate_proj.weight", gate
                    yield f"{stem}.{index}.up_proj.weight", up
        else:
            yield name, gradient


def wide(config):
    """The same settings at larger sizes."""
    config = copy.deepcopy(config)
    config.update(WIDE | (WIDE_EXPERTS if config.model_type == "qwen2_moe" else {}))
    return config


def random_model(config, seed, spread=SPREAD):
    """A model far from the start of training, where nothing would show."""
    torch.manual_seed(seed)
    kind = Qwen2MoeForCausalLM if config.model_type == "qwen2_moe" else Qwen2ForCausalLM
    model = kind(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * spread)
    return model


def write(out, seed):
    """Writes all models into a folder."""
    for name, config in MODELS.items():
        model = random_model(config, seed).train()
        ids = torch.randint(config.vocab_size, (1, TOKENS))
        result = model(input_ids=ids, labels=ids, use_cache=False)
        result.loss.backward()
        golden = {"ids": ids[0], "logits": result.logits[0].detach(), "loss": result.loss.detach()}
        golden |= {f"grad.{key}": value.contiguous() for key, value in hub_gradients(model, config)}
        model.save_pretrained(out / name)
        (out / name / "generation_config.json").unlink(missing_ok=True)
        save_file(golden, out / name / "golden.safetensors")
        for file in (out / name).iterdir():
            file.chmod(0o644)
    write_qwen(out / "qwen", seed)


def write_qwen(folder, seed):
    """Writes the model of Qwen's own layout."""
    weights, golden = qwen.golden(seed, SPREAD, TOKENS)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(qwen.CONFIG, indent=2) + "\n")
    save_file(weights, folder / "model.safetensors")
    save_file(golden, folder / "golden.safetensors")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    write(args.out, args.seed)


if __name__ == "__main__":
    main()
