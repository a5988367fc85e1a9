#!/usr/bin/env python3
"""Times LlamaGen's VQ-16 image tokenizer, by its own code, on one GPU: encoding, decoding, and training with a VGG loss of
random weights and a PatchGAN, as its `vq_train.py` does one step, in bf16.

    git clone https://github.com/FoundationVision/LlamaGen
    python3 benches/peer_llamagen_vq.py LlamaGen

Beside it, on the same GPU:

    m6 vqgan bench configs/vqgan/vq16.toml --batch 64
    m6 vqgan train configs/vqgan/vq16.toml      # whose metrics.jsonl has images_per_second

Prints one line of JSON. Pictures are random, and nothing is read from a disk. `--vgg FILE` also writes the random
weights of VGG-16 and of LPIPS's heads, which `vq16.toml` names, as safetensors.
"""

import argparse
import json
import sys
import time

import torch
import torchvision

PIXELS = 256
WARM_UP, PASSES = 5, 20


def rate(batch, work):
    for _ in range(WARM_UP):
        work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(PASSES):
        work()
    torch.cuda.synchronize()
    return PASSES * batch / (time.perf_counter() - start)


def training(model, loss, batch):
    """One step of both updates, as in LlamaGen's vq_train.py."""
    pictures = torch.rand(batch, 3, PIXELS, PIXELS, device="cuda") * 2 - 1
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.95))
    critic = torch.optim.Adam(loss.discriminator.parameters(), lr=1e-4, betas=(0.9, 0.95))

    def update(which, loss_of, parameters):
        which.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            value, rest = loss_of()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        which.step()
        return rest

    def step():
        def of_model():
            made, codebook = model(pictures)
            last = model.decoder.last_layer
            value = loss(codebook, pictures, made, optimizer_idx=0, global_step=1, last_layer=last)
            return value, (made, codebook)

        made, codebook = update(optimizer, of_model, model.parameters())
        of_critic = lambda: (loss(codebook, pictures, made, optimizer_idx=1, global_step=1), None)
        update(critic, of_critic, loss.discriminator.parameters())

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llamagen", help="a checkout of LlamaGen")
    parser.add_argument("--batch", type=int, default=64, help="of encoding and decoding")
    parser.add_argument("--train-batch", type=int, default=32)
    parser.add_argument("--vgg", help="writes the random weights of the perceptual loss here")
    args = parser.parse_args()
    sys.path.insert(0, args.llamagen)
    vgg16 = torchvision.models.vgg16
    torchvision.models.vgg16 = lambda pretrained: vgg16(weights=None)
    from tokenizer.tokenizer_image import lpips
    from tokenizer.tokenizer_image.vq_loss import VQLoss
    from tokenizer.tokenizer_image.vq_model import VQ_models

    lpips.LPIPS.load_from_pretrained = lambda self: None
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    model = VQ_models["VQ-16"](codebook_size=16384, codebook_embed_dim=8).cuda()
    pictures = torch.rand(args.batch, 3, PIXELS, PIXELS, device="cuda") * 2 - 1
    codes = torch.randint(16384, (args.batch * 256,), device="cuda")
    model.eval()
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        encode = rate(args.batch, lambda: model.encode(pictures))
        decode = rate(args.batch, lambda: model.decode_code(codes, (args.batch, 8, 16, 16)))
    torch.cuda.reset_peak_memory_stats()
    loss = VQLoss(disc_start=0, image_size=PIXELS, reconstruction_loss="l2", disc_weight=0.5).cuda()
    if args.vgg:
        from safetensors.torch import save_file

        kept = ("net.", "lin")
        state = loss.perceptual_loss.state_dict()
        save_file({name: tensor.abs() if name.startswith("lin") else tensor for name, tensor in state.items() if name.startswith(kept)}, args.vgg)
    train = rate(args.train_batch, training(model.train(), loss.train(), args.train_batch))
    memory = torch.cuda.max_memory_allocated()
    names = ("encode_images_per_s", "decode_images_per_s", "train_images_per_s", "train_memory_peak_bytes")
    print(json.dumps(dict(zip(names, (encode, decode, train, memory)))))


if __name__ == "__main__":
    main()
