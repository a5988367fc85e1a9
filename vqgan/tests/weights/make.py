"""Makes the golden files of `vqgan/tests/weights.rs`: what other implementations of the network compute.

Needs torch, diffusers and transformers. Weights are not stored: each number follows from the name of its tensor and its
place in it, here and in the test.
"""

import argparse
import json
import math
import zipfile
from pathlib import Path

import numpy as np
import torch
from diffusers import VQModel
from transformers import ChameleonVQVAEConfig, JanusVQVAEConfig
from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE
from transformers.models.janus.modeling_janus import JanusVQVAE

FOLDER = Path(__file__).parent
SIDE = 24
CH, CH_MULT, Z_CHANNELS, CODES = 32, [1, 1, 2], 16, 64


def noise(name: str, shape) -> np.ndarray:
    """Numbers from -1 to 1: MurmurHash3's finalizer over FNV-1a of the name and the place."""
    seed = 0x811C9DC5
    for byte in name.encode():
        seed = (seed ^ byte) * 0x01000193 & 0xFFFFFFFF
    x = np.arange(math.prod(shape), dtype=np.uint32) * np.uint32(0x9E3779B9) + np.uint32(seed)
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> np.uint32(13)
    x *= np.uint32(0xC2B2AE35)
    x ^= x >> np.uint32(16)
    return (x.astype(np.float64) / 2**31 - 1).reshape(shape)


def weight(name: str, shape) -> torch.Tensor:
    values = noise(name, shape)
    if len(shape) > 1:
        values *= math.sqrt(3 / math.prod(shape[1:]))
    else:
        values *= 0.1
        if name.endswith("weight"):
            values += 1
    return torch.from_numpy(values).float()


def of_length_3(codes: torch.Tensor) -> torch.Tensor:
    """Janus chooses codes by distance in transformers and by angle in its own program: the same for equal lengths."""
    return 3 * torch.nn.functional.normalize(codes, dim=-1)


def fill(module: torch.nn.Module, rename) -> dict:
    """Gives `module` the weights of the names that `rename` makes of its own; returns those."""
    state, named = module.state_dict(), {}
    for name, tensor in state.items():
        named[rename(name)] = tensor.copy_(weight(rename(name), tensor.shape))
    return named


def write(case: str, named: dict, codes: torch.Tensor, reconstruction: torch.Tensor, **more):
    golden = {
        "tensors": [[name, list(tensor.shape)] for name, tensor in named.items()],
        "codes": codes.flatten().tolist(),
        "reconstruction": [round(value, 6) for value in reconstruction.clamp(-1, 1).flatten().tolist()],
        **more,
    }
    print(case, len(named), "tensors,", len(set(golden["codes"])), "codes,", reconstruction.std())
    (FOLDER / f"{case}.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n")


def to_llamagen(name: str) -> str:
    """The way back of transformers' conversion of Janus, whose tokenizer is LlamaGen's."""
    for new, old in [("mid.block_1", "mid.0"), ("mid.attn_1", "mid.1"), ("mid.block_2", "mid.2"),
                     (".down.", ".conv_blocks."), (".up.", ".conv_blocks."), (".block.", ".res.")]:
        name = name.replace(new, old)
    return name


def to_taming(name: str) -> str:
    """Levels of Janus's decoder counted from the outermost."""
    parts = name.split(".")
    if parts[:2] == ["decoder", "up"]:
        parts[2] = str(len(CH_MULT) - 1 - int(parts[2]))
    return ".".join(parts)


def janus_model(code_dim: int) -> JanusVQVAE:
    config = JanusVQVAEConfig(
        embed_dim=code_dim, num_embeddings=CODES, latent_channels=Z_CHANNELS, num_patches=SIDE // 4, base_channels=CH,
        channel_multiplier=CH_MULT, num_res_blocks=1, dropout=0.0,
    )
    return JanusVQVAE(config).eval()


def diffusers(x):
    widths = [CH * multiple for multiple in CH_MULT]
    plain = len(widths) - 1
    model = VQModel(
        down_block_types=["DownEncoderBlock2D"] * plain + ["AttnDownEncoderBlock2D"],
        up_block_types=["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * plain,
        block_out_channels=widths, layers_per_block=1, latent_channels=Z_CHANNELS, num_vq_embeddings=CODES,
        vq_embed_dim=4, sample_size=SIDE,
    ).eval()
    named = fill(model, lambda name: name)
    latent = model.encode(x).latents
    _, _, (_, _, codes) = model.quantize(latent)
    write("diffusers", named, codes, model.decode(latent).sample, config=dict(model.config))


def janus(x):
    model = janus_model(8)
    named = fill(model, lambda name: f"model.vqmodel.{name}")
    model.quantize.embedding.weight.copy_(of_length_3(model.quantize.embedding.weight))
    codes = model.encode(x).image_tokens
    write("janus", named, codes, model.decode(codes.view(1, -1)))


def llamagen(x):
    model = janus_model(8)
    named = fill(model, to_llamagen)
    model.quantize.embedding.weight.copy_(of_length_3(model.quantize.embedding.weight))
    codes = model.encode(x).image_tokens
    # As LlamaGen's training saves it. The storages have the names 0, 1, ... in the order of the tensors.
    named["quantize.codebook_used"] = torch.zeros(65536)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    checkpoint = {"model": named, "optimizer": optimizer.state_dict(), "steps": 3, "args": argparse.Namespace(ema=False)}
    path = FOLDER / "llamagen.pt"
    torch.save(checkpoint, path)
    with zipfile.ZipFile(path) as file:
        (FOLDER / "llamagen.pkl").write_bytes(file.read("llamagen/data.pkl"))
    path.unlink()
    write("llamagen", named, codes, model.decode(codes.view(1, -1)))


def taming_halves(prefix: str):
    """Chameleon's encoder and codebook, and Janus's decoder, which make up taming's network, and their weights."""
    config = ChameleonVQVAEConfig(
        embed_dim=4, num_embeddings=CODES, latent_channels=Z_CHANNELS, resolution=SIDE, base_channels=CH,
        channel_multiplier=CH_MULT, num_res_blocks=1, attn_resolutions=[SIDE // 4], dropout=0.0,
    )
    model, other = ChameleonVQVAE(config).eval(), janus_model(4)
    named = fill(model, lambda name: prefix + name)
    rest = fill(other, lambda name: prefix + to_taming(name))
    named |= {name: tensor for name, tensor in rest.items() if name.startswith(f"{prefix}decoder.")}
    return model, other, named


def taming(x):
    model, other, named = taming_halves("first_stage_model.")
    latent = model.quant_conv(model.encoder(x))
    quantized, _, codes = model.quantize(latent)
    assert torch.equal(codes, model.encode(x).image_tokens.flatten())
    reconstruction = other.decoder(other.post_quant_conv(quantized))
    write("taming", named, codes, reconstruction)


def gumbel(x):
    """taming's network with its Gumbel quantiser: a convolution to logits, of which the largest says the row."""
    model, other, named = taming_halves("")
    del named["quantize.embedding.weight"]
    shapes = {"quantize.proj.weight": (CODES, 4, 1, 1), "quantize.proj.bias": (CODES,), "quantize.embed.weight": (CODES, 4)}
    named |= {name: weight(name, shape) for name, shape in shapes.items()}
    logits = torch.nn.functional.conv2d(
        model.quant_conv(model.encoder(x)), named["quantize.proj.weight"], named["quantize.proj.bias"]
    )
    codes = logits.argmax(dim=1)
    quantized = named["quantize.embed.weight"][codes].permute(0, 3, 1, 2)
    write("gumbel", named, codes, other.decoder(other.post_quant_conv(quantized)))


def main():
    x = torch.from_numpy(noise("picture", (1, 3, SIDE, SIDE))).float()
    with torch.no_grad():
        for case in [diffusers, janus, llamagen, taming, gumbel]:
            case(x)


main()
