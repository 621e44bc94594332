"""Ours beside its peers, on this machine and in this run: `python tests/bench.py` or `... train sample first
fid load cache kept memory`.

    python tests/bench.py train sample --full --size 256 --batch 1      # SD1.5's widths, the default on a GPU
    python tests/bench.py train --cap 12e9                  # GPU: nothing may allocate more than 12 GB
    python tests/bench.py fid --inception FILE --images 387

Candidates take turns and each figure is the median of --repeats. Networks have random weights, the same for
all. A ratio above 1 says that ours is faster than the fastest peer that fits. FLOPs are counted on the meta
device, recomputation left out; their share is of the rate of a large matrix multiplication that is measured
first.
"""
import argparse
import gc
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import fid  # noqa: E402
import memory  # noqa: E402
from ldm.app import frozen_dtype, pick_device  # noqa: E402
from ldm.data import Cache, list_images, load_rgb  # noqa: E402
from ldm.runs import Settings  # noqa: E402
from ldm.encoder import Inception, build_encoder, cached_inception, open_encoder, preprocess  # noqa: E402
from ldm.unet import UNet  # noqa: E402
from ldm.vae import VAE  # noqa: E402
from ldm.weights import open_sd15  # noqa: E402
from lora import fold, inject, save_adapter  # noqa: E402
from projector import Projector  # noqa: E402
from sample import Sampling, sample  # noqa: E402
from train import Trainer  # noqa: E402

UNI2H = 1536, 24        # width, depth
NARROW = dict(channels=(64, 128, 256, 256))

# ---- measuring ---------------------------------------------------------------------------------------------

def measure(candidates, args):
    """{name: build}, build() -> step() -> {name: (median seconds, peak bytes)}; those that run out of memory
    are None.

    Under a cap each candidate has it for itself: what the others hold meanwhile is added to it. On a GPU
    every timed step comes after one that is not, which fills the allocator's pool.
    """
    cuda, own, steps, figures = args.device.type == "cuda", {}, {}, {}
    total = torch.cuda.get_device_properties(args.device).total_memory if cuda else 0
    torch._dynamo.reset()           # whose limit of recompilations counts those of earlier candidates

    def held():
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(args.device) if cuda else 0

    def turn(name, times=1):
        """-> (seconds, peak), or None where the memory did not do; then the candidate is out."""
        try:
            others = held() - own[name]
            if cuda:
                torch.cuda.set_per_process_memory_fraction(min(1.0, (args.cap + others) / total), args.device)
                torch.cuda.reset_peak_memory_stats(args.device)
                steps[name]()
                torch.cuda.synchronize(args.device)
            start = time.perf_counter()
            for _ in range(times):
                steps[name]()
            if cuda:
                torch.cuda.synchronize(args.device)
            figures.setdefault(name, []).append(((time.perf_counter() - start) / times,
                                                 torch.cuda.max_memory_allocated(args.device) - others if cuda
                                                 else 0))
        except torch.OutOfMemoryError:
            del steps[name]

    for name, build in candidates.items():
        before, own[name] = held(), 0
        try:
            steps[name] = build()
        except torch.OutOfMemoryError:
            continue
        own[name] = held() - before
        turn(name, times=2)         # compilation, and the optimizer's state, which is its own as well
        own[name] = held() - before
        figures.pop(name, None)
    for _ in range(args.repeats):
        for name in list(steps):
            turn(name)
    if cuda:
        torch.cuda.set_per_process_memory_fraction(1.0, args.device)
    return {name: (statistics.median(t for t, _ in figures[name]), max(peak for _, peak in figures[name]))
            if name in steps else None for name in candidates}

def matmul_rate(args):
    """FLOP/s of a large matrix multiplication in the dtype of the frozen networks."""
    n = 8192 if args.device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=args.device).to(frozen_dtype(args.device)) for _ in range(2))
    seconds = measure({"": lambda: lambda: [a @ b for _ in range(4)]}, args)[""][0]
    return 4 * 2 * n ** 3 / seconds

def flops(args, train):
    """Of one U-Net pass of one image, counted: forward, or forward and backward of a LoRA step."""
    latent = args.size // 8
    with torch.device("meta"):
        unet = inject(UNet(**args.width).requires_grad_(False), 4)
        z, t = torch.randn(1, 4, latent, latent), torch.zeros(1, dtype=torch.long)
        c = torch.randn(1, 4, 768, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            y = unet(z, t, c)
            if train:
                y.sum().backward()
    return counter.get_total_flops()

def report(args, work, ours, result, images, flop=0):
    """Print a line for each candidate, the ratio in that of the fastest peer."""
    peers = {name: r for name, r in result.items() if r and name != ours}
    fastest = min(peers, key=lambda name: peers[name][0]) if peers else None
    for name, r in result.items():
        if r is None:
            print(f"| {work} | {name} | out of memory | | | |", flush=True)
            continue
        seconds, peak = r
        ratio = f"{peers[fastest][0] / seconds:.2f}x of {fastest}" if name == ours and fastest else ""
        rate = images * flop / seconds
        share = f"{rate / 1e12:.3g} ({rate / args.rate:.0%})" if flop else ""
        memory = f"{peak / 1e9:.2f} GB" if peak else ""
        speed = f"{1000 * seconds:.4g} ms, {images / seconds:.3g} images/s"
        print(f"| {work} | {name} | {speed} | {ratio} | {memory} | {share} |", flush=True)

# ---- the networks, and the peer's --------------------------------------------------------------------------

def networks(args):
    """Our U-Net's random weights, as a state dict that Diffusers' U-Net loads as well."""
    torch.manual_seed(0)
    return UNet(**args.width).state_dict()

def diffusers_unet(args, state, dtype):
    from diffusers import UNet2DConditionModel
    channels = args.width.get("channels", (320, 640, 1280, 1280))
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=args.size // 8, block_out_channels=channels,
                                    cross_attention_dim=768, attention_head_dim=8)
    unet.load_state_dict({name: t.to(args.device, dtype) for name, t in state.items()}, assign=True)
    return unet.requires_grad_(False)

def diffusers_vae(channels=(128, 256, 512, 512)):
    from diffusers import AutoencoderKL
    return AutoencoderKL(sample_size=512, block_out_channels=channels, layers_per_block=2, latent_channels=4,
                         down_block_types=("DownEncoderBlock2D",) * 4,
                         up_block_types=("UpDecoderBlock2D",) * 4)

def save_base(args, folder, **vae):
    """A Diffusers folder of random weights in float32."""
    torch.manual_seed(0)
    on_cpu = argparse.Namespace(**vars(args) | dict(device=torch.device("cpu")))
    diffusers_unet(on_cpu, networks(args), torch.float32).save_pretrained(f"{folder}/unet")
    diffusers_vae(**vae).save_pretrained(f"{folder}/vae")

def our_unet(args, state, dtype):
    with torch.device("meta"):
        unet = UNet(**args.width)
    unet.load_state_dict({name: t.to(args.device, dtype) for name, t in state.items()}, assign=True)
    return unet.requires_grad_(False)

class Memory:
    """A stand-in for the cache: random latents and embeddings, in RAM."""

    def __init__(self, args, n=64):
        h = args.size // 8
        self.rows = torch.randn(n, 4, h, h), torch.full((n, 4, h, h), -9.0), torch.randn(n, 1536)

    def batch(self, hashes, mirrored):
        return [x[[int(h) for h in hashes]] for x in self.rows]

def our_training_step(args, state, dtype):
    """Trainer.train_step, the recipe's."""
    unet, projector = inject(our_unet(args, state, dtype), 4), Projector().to(args.device)
    names, latent = [(str(i), str(i)) for i in range(64)], (4, args.size // 8, args.size // 8)
    return Trainer(Settings(batch=args.batch), unet, projector, Memory(args), names, latent,
                   args.device).train_step

def diffusers_training_step(args, state, dtype, checkpointing=False, channels_last=False, compiled=False):
    """The same step as Diffusers' training script for LoRA makes it, with PEFT."""
    from diffusers import DDPMScheduler
    from peft import LoraConfig
    functorch_config.activation_memory_budget = 1.0         # ours is not Diffusers' default
    unet = diffusers_unet(args, state, dtype)
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets))
    lora = [p for p in unet.parameters() if p.requires_grad]
    for p in lora:
        p.data = p.data.float()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    if channels_last:
        unet.to(memory_format=torch.channels_last)
    unet.train()
    projector, memory = Projector().to(args.device), Memory(args)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    rest = list(projector.parameters())
    optimizer = torch.optim.AdamW([dict(params=lora, lr=5e-5, weight_decay=1e-3),
                                   dict(params=rest, lr=5e-4, weight_decay=1e-4)])
    network = torch.compile(unet) if compiled else unet

    def step():
        mean, logvar, e = (x.to(args.device) for x in memory.batch(range(args.batch), None))
        z0 = 0.18215 * (mean + (0.5 * logvar).exp() * torch.randn_like(mean))
        noise, t = torch.randn_like(z0), torch.randint(0, 1000, (len(z0),), device=args.device)
        c = projector(torch.where(torch.rand(len(e), 1, device=args.device) < 0.1, projector.null, e))
        # what accelerate does
        with torch.autocast(args.device.type, dtype, enabled=dtype != torch.float32):
            eps = network(scheduler.add_noise(z0, noise, t).to(dtype), t, c.to(dtype), return_dict=False)[0]
        loss = F.mse_loss(eps.float(), noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*lora, *rest], 1.0)
        optimizer.step()
        return loss.item()
    return step

def train(args):
    """A step of the recipe beside Diffusers' training script for LoRA with PEFT."""
    weights = networks(args), frozen_dtype(args.device)
    ours, peer = partial(our_training_step, args, *weights), partial(diffusers_training_step, args, *weights)
    candidates = {"ours": ours, "Diffusers + PEFT": peer,
                  "the same, channels_last": partial(peer, channels_last=True),
                  "the same, checkpointing": partial(peer, checkpointing=True)}
    if args.device.type == "cuda":
        last = partial(peer, channels_last=True)
        candidates |= {"the same, checkpointing, channels_last": partial(last, checkpointing=True),
                       "the same, compiled": partial(last, compiled=True),
                       "the same, compiled, checkpointing": partial(last, compiled=True, checkpointing=True)}
    work = f"training step, batch {args.batch}, {args.size} px"
    report(args, work, "ours", measure(candidates, args), args.batch, flops(args, train=True))
    if args.device.type == "cuda":
        largest_batch(args, ours)

def largest_batch(args, ours):
    """The largest batch that a training step of ours fits into cards of 12, 16 and 24 GB."""
    for cap in (12e9, 16e9, 24e9):
        best, batch = 0, 8
        while batch <= 128:
            trial = argparse.Namespace(**vars(args) | dict(batch=batch, cap=cap, repeats=1))
            args.batch, keep = batch, args.batch
            fits = measure({"ours": ours}, trial)["ours"]
            args.batch = keep
            if not fits:
                break
            best, batch = batch, batch + 8
        print(f"largest batch at {args.size} px in {cap / 1e9:.0f} GB, in steps of 8: {best}", flush=True)

def sampling(args):
    """Guided steps of Algorithm 2, `args.batch` images: `sample`, beside Diffusers' U-Net and DDPMScheduler.
    """
    state, dtype = networks(args), frozen_dtype(args.device)
    e, latent = torch.randn(args.batch, 1536), (4, args.size // 8, args.size // 8)
    cuda = args.device.type == "cuda"

    def ours():
        unet, projector = fold(inject(our_unet(args, state, dtype),
                                      4)), Projector().to(args.device).requires_grad_(False)
        network = torch.compile(unet, dynamic=False) if cuda else unet
        return lambda: sample(e, projector, network, Sampling(1.3, args.steps), range(args.batch), latent)

    def peer(channels_last=False, fused=False, compiled=False):
        from diffusers import DDPMScheduler
        unet, projector = diffusers_unet(args, state,
                                         dtype), Projector().to(args.device).requires_grad_(False)
        if fused:
            unet.fuse_qkv_projections()
        if channels_last:
            unet.to(memory_format=torch.channels_last)
        network = torch.compile(unet, mode="max-autotune-no-cudagraphs") if compiled else unet
        scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                  steps_offset=1, clip_sample=False)

        @torch.no_grad()
        def step():
            scheduler.set_timesteps(args.steps)
            c = torch.cat([projector(projector.null).expand(args.batch, -1, -1),
                           projector(e.to(args.device))]).to(dtype)
            z = torch.randn(args.batch, *latent, device=args.device, dtype=dtype)
            for t in scheduler.timesteps:
                null, cond = network(torch.cat([z, z]), t, c, return_dict=False)[0].chunk(2)
                z = scheduler.step(null + 1.3 * (cond - null), t, z, return_dict=False)[0]
        return step

    candidates = {"ours": ours, "Diffusers": peer,
                  "the same, channels_last": partial(peer, channels_last=True),
                  "the same, channels_last, fused QKV": partial(peer, channels_last=True, fused=True)}
    if cuda:
        candidates["the same, compiled"] = partial(peer, channels_last=True, fused=True, compiled=True)
    report(args, f"{args.steps} guided steps, batch {args.batch}, {args.size} px", "ours",
           measure(candidates, args), args.batch, 2 * args.steps * flops(args, train=False))

# ---- FID, loading, caching ---------------------------------------------------------------------------------

def patches(args, folder):
    """`args.images` PNGs of noise, at args.size."""
    from PIL import Image
    rng = np.random.default_rng(0)
    for i in range(args.images):
        coarse = Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8))
        coarse.resize((args.size, args.size), Image.Resampling.BICUBIC).save(Path(folder) / f"{i:04d}.png")
    return list_images(folder)

def distance(args):
    """Inception's features, and the distance between two sets of them, beside pytorch-fid."""
    import pytorch_fid.inception
    from pytorch_fid.fid_score import calculate_frechet_distance, get_activations
    file = Inception(args.inception).file
    state = {name: file.get(name) for name in file.names}
    state |= {name.replace("running_mean", "num_batches_tracked"): torch.tensor(0) for name in state
              if name.endswith("running_mean")}
    state |= {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    pytorch_fid.inception.load_state_dict_from_url = lambda *_, **__: state
    features = {}
    with tempfile.TemporaryDirectory() as folder:
        files = patches(args, folder)

        def ours():
            features["ours"] = Inception(args.inception).extract(files, args.device)

        def peer():
            # both load their network, as their programs do
            theirs = pytorch_fid.inception.InceptionV3([3]).to(args.device)
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                features["pytorch-fid"] = get_activations(files, theirs, 50, device=args.device,
                                                          num_workers=min(os.cpu_count(), 8))
        result = measure({"ours": lambda: ours, "pytorch-fid": lambda: peer}, args)
    report(args, f"Inception's features, {len(files)} images of {args.size} px", "ours", result, len(files))
    print(f"largest difference of a feature: {np.abs(features['ours'] - features['pytorch-fid']).max():.1e}")
    x, values = features["ours"], {}
    y = 0.9 * x[::-1] + 0.05 * np.random.default_rng(0).random(x.shape)

    def of(name, f):
        def step():
            values[name] = f()
        return lambda: step

    def by_definition():
        moments = [moment for f in (x, y) for moment in (f.mean(0), np.cov(f, rowvar=False))]
        return calculate_frechet_distance(*moments)
    result = measure({
        "ours": of("ours", lambda: fid.frechet_distance(x, y)),
        "pytorch-fid": of("pytorch-fid", by_definition)},
        argparse.Namespace(**vars(args) | dict(repeats=min(args.repeats, 3))))
    report(args, f"distance of {len(x)} and {len(y)} features", "ours", result, 1)
    print(f"distances: {values}")

LOAD = """
import re, sys, time, torch
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
sys.path.insert(0, {root!r})
device, dtype = torch.device({device!r}), {dtype}
if {ours}:
    from ldm.weights import load_unet, load_vae, open_sd15
    def ready():
        unet, vae = open_sd15({folder!r})
        return load_unet(unet, device, dtype), load_vae(vae, device)
else:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    def ready():
        unet = UNet2DConditionModel.from_pretrained({folder!r}, subfolder="unet", torch_dtype=dtype)
        return unet.to(device), AutoencoderKL.from_pretrained({folder!r}, subfolder="vae").to(device)
torch.zeros(1, device=device)       # the device's own start is not the loader's
before, start = peak(), time.perf_counter()
networks = ready()
built = time.perf_counter() - start
total = sum(float(p.sum()) for n in networks for p in n.parameters())       # a mapped page counts when read
seconds, size = time.perf_counter() - start, sum(p.nbytes for n in networks for p in n.parameters())
print(built, seconds, peak() - before, size)
"""

def loading(args):
    """From a Diffusers folder to networks, and to networks of which every weight was read once, each in a
    process of its own.

    Imports are not counted.
    """
    with tempfile.TemporaryDirectory() as folder:
        dtype = frozen_dtype(args.device)
        save_base(args, folder)
        runs = {"ours": [], "Diffusers": []}
        for _ in range(args.repeats):
            for name in runs:
                code = LOAD.format(root=str(ROOT), device=str(args.device), dtype=dtype, ours=name == "ours",
                                   folder=folder)
                runs[name].append([float(x) for x in subprocess.run([sys.executable, "-c", code], check=True,
                                                                    capture_output=True,
                                                                    text=True).stdout.split()[-4:]])
    medians = {name: [statistics.median(column) for column in zip(*rows)] for name, rows in runs.items()}
    for name, (built, seconds, peak, size) in medians.items():
        for k, (what, value) in enumerate((("built", built), ("read", seconds))):
            ratio = f"{medians['Diffusers'][k] / value:.2f}x" if name == "ours" else ""
            memory = f"RAM grows by {peak / 1e9:.2f} GB = {peak / size:.2f}x"
            work = f"U-Net and VAE {what}, {size / 1e9:.2f} GB in {dtype}"
            print(f"| {work} | {name} | {value:.2f} s | {ratio} | {memory} | |", flush=True)

FIRST = """
import sys, torch
sys.path.insert(0, {root!r})
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from ldm.data import load_rgb
from lora import load_projector, open_adapter
from ldm.encoder import open_encoder
device, dtype = torch.device({device!r}), {dtype}
unet = UNet2DConditionModel.from_pretrained({folder!r}, subfolder="unet", torch_dtype=dtype).to(device)
vae = AutoencoderKL.from_pretrained({folder!r}, subfolder="vae").to(device, dtype)
scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                          clip_sample=False)
pipe = StableDiffusionPipeline(vae, None, None, unet, scheduler, None, None, requires_safety_checker=False)
pipe.load_lora_weights({adapter!r})
projector, encoder = load_projector(open_adapter({adapter!r})), open_encoder({folder!r})
e = encoder.embed(encoder.load(device), [load_rgb({image!r})])
c, c_null = (projector(x).to(device, dtype) for x in (e, projector.null))
pipe(prompt_embeds=c, negative_prompt_embeds=c_null, guidance_scale=1.3,
     num_inference_steps={steps}, height={size}, width={size}).images[0].save("peer.png")
"""

def first(args):
    """From the start of the program to its first image on the disk: sample.py, beside a Diffusers pipeline
    with our projector.

    Both load U-Net, VAE, encoder and adapter; sample.py checks the first three by their hashes.
    """
    small, dtype = args.width != {}, frozen_dtype(args.device)
    channels = (32, 64, 128, 128) if small else (128, 256, 512, 512)
    with tempfile.TemporaryDirectory() as folder:
        save_base(args, folder, channels=channels)
        save_file(build_encoder(*(192, 2) if small else UNI2H).state_dict(), f"{folder}/model.safetensors")
        files = dict(zip(("base", "vae", "encoder"), (*open_sd15(folder), open_encoder(folder))))
        header = dict(base=folder, encoder=folder, licence="none", resolution=args.size,
                      step=1) | {f"{part}_sha256": file.fingerprint() for part, file in files.items()}
        adapter = f"{folder}/adapter.safetensors"
        [image] = patches(argparse.Namespace(**vars(args) | dict(images=1)), folder)
        save_adapter(adapter, inject(UNet(**args.width), 4), Projector(d_e=192 if small else 1536),
                     {key: str(value) for key, value in header.items()})
        code = FIRST.format(root=str(ROOT), device=str(args.device), dtype=dtype, folder=folder,
                            adapter=adapter, image=str(image), steps=args.steps, size=args.size)

        def ours():
            out = f"{folder}/{time.perf_counter_ns()}"          # sample.py makes no image twice
            subprocess.run([sys.executable, ROOT / "sample.py", "--adapter", adapter, "--ref", image,
                            "--steps", str(args.steps), "--out", out,
                            "--device", str(args.device)], check=True, capture_output=True)
        candidates = {"ours": lambda: ours,
                      "Diffusers": lambda: lambda: subprocess.run([sys.executable, "-c", code], check=True,
                                                                  capture_output=True, cwd=folder)}
        report(args, f"program start to first image, {args.size} px, {args.steps} guided steps", "ours",
               measure(candidates, args), 1)

def caching(args):
    """Latents of each image and its mirror image, and embeddings: Cache.fill, beside Diffusers' VAE and timm
    in batches of four.
    """
    from torchvision import transforms
    small = args.width != {}
    channels = (32, 64, 128, 128) if small else (128, 256, 512, 512)
    view = transforms.Compose([transforms.Resize(224), transforms.ToTensor(),
                               transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    pixels = transforms.Compose([transforms.Resize(args.size), transforms.ToTensor(),
                                 transforms.Normalize(0.5, 0.5)])

    def encoder():
        torch.manual_seed(0)
        return build_encoder(*(192, 2) if small else UNI2H).to(args.device).eval().requires_grad_(False)

    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as out:
        files, count = patches(args, folder), iter(range(10 ** 6))

        def ours():
            vae, network = VAE(channels).to(args.device).requires_grad_(False), encoder()

            @torch.no_grad()
            def embed(images):
                return network(preprocess(images).to(args.device)).cpu()

            @torch.no_grad()
            def encode(x):
                return [part.cpu() for part in vae.encode(x.to(args.device))]
            return lambda: Cache(f"{out}/{next(count)}", "vae", "encoder",
                                 args.size).fill(files, lambda: (encode, embed))

        def peer():
            vae = diffusers_vae(channels).to(args.device).requires_grad_(False)
            network = encoder()

            @torch.no_grad()
            def step():
                for i in range(0, len(files), 4):
                    images = [load_rgb(path) for path in files[i:i + 4]]
                    x = torch.stack([pixels(image) for image in images]).to(args.device)
                    posterior = vae.encode(torch.cat([x, x.flip(-1)])).latent_dist
                    e = network(torch.stack([view(image) for image in images]).to(args.device))
                    torch.save((posterior.mean.cpu(), posterior.logvar.cpu(), e.cpu()), f"{out}/peer.pt")
            return step
        report(args, f"caching {len(files)} images of {args.size} px", "ours",
               measure({"ours": ours, "Diffusers and timm": peer}, args), len(files))

# ---- memory, counted ---------------------------------------------------------------------------------------

def kept(args):
    """Bytes that a compiled training step keeps for the backward pass, batch 16 at 512 px, and the FLOPs that
    this costs.
    """
    flop = None
    for budget in (1.0, 0.7, 0.5, 0.3):
        size, _, more = memory.compiled_step(budget=budget)
        flop = flop or more
        cost = f"{more / 1e12:.2f} TFLOP a step ({more / flop - 1:+.1%})"
        work = "kept for the backward pass, batch 16, 512 px"
        print(f"| {work} | budget {budget} | {size / 2 ** 30:.2f} GiB | | | {cost} |", flush=True)

def card(args):
    """What training, sampling and caching hold, and which cards have as much."""
    print()
    memory.table()

WORK = dict(train=train, sample=sampling, first=first, fid=distance, load=loading, cache=caching, kept=kept,
            memory=card)

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", nargs="*", metavar="WORK", help=f"{', '.join(WORK)} (default: all)")
    parser.add_argument("--full", action="store_true", default=None,
                        help="Stable Diffusion 1.5's widths (default on a GPU)")
    parser.add_argument("--size", type=int, help="pixels (default: 512 on a GPU, 256 on the CPU)")
    parser.add_argument("--batch", type=int, help="images (default: 16 on a GPU, 2 on the CPU)")
    parser.add_argument("--steps", type=int, help="of sampling (default: 30 on a GPU, 2 on the CPU)")
    parser.add_argument("--images", type=int, help="for fid and cache (default: 387 on a GPU, 64 on the CPU)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cap", type=float, default=12e9,
                        help="bytes of GPU memory that a candidate may take")
    parser.add_argument("--inception", metavar="FILE")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    if unknown := set(args.work) - set(WORK):
        parser.error(f"{min(unknown)}: there are {', '.join(WORK)}")
    args.device = pick_device(args.device)
    cuda = args.device.type == "cuda"
    args.width = {} if (cuda if args.full is None else args.full) else NARROW
    for name, (gpu, cpu) in dict(size=(512, 256), batch=(16, 2), steps=(30, 2), images=(387, 64)).items():
        if getattr(args, name) is None:
            setattr(args, name, gpu if cuda else cpu)
    args.rate = matmul_rate(args)
    cpu = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    print(f"{torch.cuda.get_device_name(args.device) if cuda else cpu}; torch {torch.__version__}; "
          f"{'narrow' if args.width else 'full'} width; matrix product {args.rate / 1e12:.3g} TFLOP/s; "
          f"medians of {args.repeats}\n\n| work | who | time | ratio | peak memory | TFLOP/s (share) |\n"
          "|---|---|---|---|---|---|", flush=True)
    for work in args.work or [name for name in WORK if name not in ("kept", "memory")]:
        if work == "fid" and not (args.inception or cached_inception().is_file()):
            print("fid: left out, pass --inception", flush=True)
            continue
        WORK[work](args)

if __name__ == "__main__":
    main()
