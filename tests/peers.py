"""What tests/bench.py measures: each work by this program and by its peer, in every setting of the peer, with
equal random weights."""
import itertools
import os
import subprocess
import sys
from collections import namedtuple
from functools import lru_cache, partial
from types import SimpleNamespace

import numpy as np
import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F
from make_sd15 import make_sd15, networks, random_tensor
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

import fid
from ldm.app import ROOT, frozen_dtype, layout
from ldm.data import Cache, load_rgb, prefetch
from ldm.encoder import Inception, build_encoder, build_inception, open_encoder
from ldm.runs import Settings
from ldm.unet import UNet
from ldm.weights import load_vae, open_sd15
from lora import fold, inject, save_adapter
from projector import Projector
from sample import Sampling, sample
from train import Trainer

# One work: name, images, FLOPs of an image, and {who: (build, settings)}, ours first. settings: {name: its
# values, the one to begin with first}; build(name=value) -> step(), which may return its own Figures. warm: a
# first call is not timed.
Work = namedtuple("Work", "name images flop sides warm", defaults=[True])
Figures = namedtuple("Figures", "seconds peak")

EITHER = True, False
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")

def dtypes(args):
    """For the U-Net: first what `train.py` takes here; on the CPU also float32, and what a wide one gets."""
    others = [] if args.cuda else [torch.float32, frozen_dtype(args.device)]
    return tuple(dict.fromkeys([frozen_dtype(args.device, width=args.width), *others]))

def our_settings(args):
    """Of training and sampling."""
    return dict(dtype=dtypes(args), compiled=(False, True)[:1 + args.cuda])

def channels(width):
    return tuple(width * k for k in (1, 2, 4, 4))

@lru_cache
def random_state(build, *sizes):
    """Random tensors for the network build(*sizes)."""
    with torch.device("meta"):
        shapes = build(*sizes).state_dict()
    return {name: random_tensor(name, t.shape) for name, t in shapes.items()}

def load_unet(args, dtype, theirs=False, channels_last=False):
    """Our U-Net with LoRA in our layout, or Diffusers', with the same frozen weights."""
    widths = channels(args.width)
    with torch.device("meta"):
        unet = networks(widths)["unet"] if theirs else UNet(widths)
    state = {name: t.to(args.device, dtype) for name, t in random_state(UNet, widths).items()}
    unet.load_state_dict(state, assign=True)
    last = torch.channels_last if channels_last else torch.preserve_format
    unet.requires_grad_(False).to(memory_format=last if theirs else layout(args.device, dtype))
    return unet if theirs else inject(unet, 4)

def flops(args, train):
    """Of one U-Net pass of one image, counted: forward, or forward and backward of a LoRA step."""
    latent = args.size // 8
    with torch.device("meta"):
        unet, c = inject(UNet(channels(args.width)).requires_grad_(False), 4), torch.randn(1, 4, 768)
        with FlopCounterMode(display=False) as counter:
            y = unet(torch.randn(1, 4, latent, latent), torch.zeros(1, dtype=torch.long), c.requires_grad_())
            if train:
                y.sum().backward()
    return counter.get_total_flops()

# ---- training ----------------------------------------------------------------------------------------------

def random_cache(args, n=64):
    """A stand-in for the cache of n images: random latents and embeddings, in RAM."""
    h = args.size // 8
    rows = torch.randn(n, 4, h, h), torch.full((n, 4, h, h), -9.0), torch.randn(n, 1536)
    return SimpleNamespace(batch=lambda hashes, mirrored: [x[[int(h) for h in hashes]] for x in rows])

def our_step(args, batch, dtype, compiled):
    """Trainer.train_step in one pass of `batch` images."""
    images, latent = [(str(i), str(i)) for i in range(64)], (4, args.size // 8, args.size // 8)
    settings = Settings(batch=batch, micro_batch=batch, no_compile=not compiled)
    return Trainer(settings, load_unet(args, dtype), Projector().to(args.device), random_cache(args), images,
                   latent, args.device).train_step

def diffusers_step(args, dtype, compiled, checkpointing, channels_last):
    """The same step as Diffusers' training script for LoRA makes it, with PEFT."""
    from diffusers import DDPMScheduler
    from peft import LoraConfig
    functorch_config.activation_memory_budget = 1.0         # ours is not Diffusers' default
    unet = load_unet(args, dtype, True, channels_last).train()
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets))
    lora = [p for p in unet.parameters() if p.requires_grad]
    for p in lora:
        p.data = p.data.float()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    projector, memory, scheduler = Projector().to(args.device), random_cache(args), DDPMScheduler(**BETAS)
    rest = list(projector.parameters())
    groups = [dict(params=lora, lr=5e-5, weight_decay=1e-3), dict(params=rest, lr=5e-4, weight_decay=1e-4)]
    optimizer = torch.optim.AdamW(groups, fused=args.cuda)
    network = torch.compile(unet, dynamic=False) if compiled else unet

    def step():
        mean, logvar, e = (x.to(args.device) for x in memory.batch(range(args.batch), None))
        z0 = 0.18215 * (mean + (0.5 * logvar).exp() * torch.randn_like(mean))
        noise, t = torch.randn_like(z0), torch.randint(0, 1000, (len(z0),), device=args.device)
        c = projector(torch.where(torch.rand(len(e), 1, device=args.device) < 0.1, projector.null, e))
        with torch.autocast(args.device.type, dtype, enabled=dtype != torch.float32):   # accelerate's
            eps = network(scheduler.add_noise(z0, noise, t).to(dtype), t, c.to(dtype), return_dict=False)[0]
        loss = F.mse_loss(eps.float(), noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*lora, *rest], 1.0)
        optimizer.step()
        return loss.item()
    return step

def training(args):
    """A step of the recipe beside Diffusers' training script for LoRA with PEFT."""
    peer = dict(dtype=dtypes(args), compiled=(False, True), checkpointing=(args.cuda, not args.cuda),
                channels_last=EITHER)
    yield Work(f"training step, batch {args.batch}, {args.size} px", args.batch, flops(args, train=True),
               {"ours": (partial(our_step, args, args.batch), our_settings(args)),
                "Diffusers + PEFT": (partial(diffusers_step, args), peer)})

# ---- sampling ----------------------------------------------------------------------------------------------

def our_sampling(args, latent, e, dtype, compiled):
    unet, projector = fold(load_unet(args, dtype)), Projector().to(args.device).requires_grad_(False)
    network = torch.compile(unet, dynamic=False, fullgraph=True) if compiled else unet
    return lambda: sample(e, projector, network, Sampling(1.3, args.steps), range(args.batch), latent)

def diffusers_sampling(args, latent, e, dtype, channels_last, calls, fused, compiled):
    """Diffusers' U-Net and DDPMScheduler; guidance in `calls` of the U-Net; compiled: torch's mode."""
    from diffusers import DDPMScheduler
    unet = load_unet(args, dtype, True, channels_last)
    projector = Projector().to(args.device).requires_grad_(False)
    if fused:
        unet.fuse_qkv_projections()
    network = torch.compile(unet, dynamic=False, mode=compiled) if compiled else unet
    scheduler = DDPMScheduler(**BETAS, steps_offset=1, clip_sample=False)

    @torch.no_grad()
    def step():
        scheduler.set_timesteps(args.steps)
        c = torch.cat([projector(projector.null).expand(len(e), -1, -1), projector(e.to(args.device))])
        parts, z = c.to(dtype).chunk(calls), torch.randn(len(e), *latent, device=args.device, dtype=dtype)
        for t in scheduler.timesteps:
            pairs = zip(z.repeat(2, 1, 1, 1).chunk(calls), parts)
            both = torch.cat([network(x, t, part, return_dict=False)[0] for x, part in pairs])
            null, cond = both.chunk(2)
            z = scheduler.step(null + 1.3 * (cond - null), t, z, return_dict=False)[0]
        return z
    return step

def sampling(args):
    """Guided steps of Algorithm 2, `args.batch` images: `sample`, beside Diffusers' U-Net and scheduler."""
    how = (4, args.size // 8, args.size // 8), torch.randn(args.batch, 1536)
    modes = None, "default", *["max-autotune-no-cudagraphs"] * args.cuda
    peer = dict(dtype=dtypes(args), channels_last=EITHER, calls=(1, 2), fused=EITHER, compiled=modes)
    yield Work(f"{args.steps} guided steps, batch {args.batch}, {args.size} px", args.batch,
               2 * args.steps * flops(args, train=False),
               {"ours": (partial(our_sampling, args, *how), our_settings(args)),
                "Diffusers": (partial(diffusers_sampling, args, *how), peer)})

# ---- FID ---------------------------------------------------------------------------------------------------

def random_inception(path):
    """Write Inception's tensors, drawn so that the activations keep their size through the network."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in build_inception().state_dict().items()}
    g, tensors = torch.Generator().manual_seed(0), {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=g)
        if name.endswith("conv.weight"):
            tensors[name] = noise * (2 / shape[1:].numel()) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            tensors[name] = (0.1 * noise).exp()
        else:
            tensors[name] = 0.1 * noise
    save_file(tensors, path)
    return path

def as_released(state):
    """Inception's tensors as pytorch-fid's release file has them: with a classifier and counters."""
    counters = {name.replace("running_mean", "num_batches_tracked"): torch.tensor(0) for name in state
                if name.endswith("running_mean")}
    return state | counters | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}

def patches(args, n=None):
    """`n` or `args.images` PNGs of noise, at args.size."""
    folder, rng = args.folder / "patches", np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for i in range(n or args.images):
        coarse = Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8))
        coarse.resize((args.size, args.size), Image.Resampling.BICUBIC).save(
            folder / f"{i:04d}.png", compress_level=1)
    return sorted(folder.iterdir())

def features(args):
    """Inception's features, beside pytorch-fid; both load their network, as their programs do."""
    weights, files = random_inception(args.folder / "inception.safetensors"), patches(args)

    def peer(batch, workers, channels_last):
        import pytorch_fid.inception
        from pytorch_fid.fid_score import get_activations
        state = as_released(load_file(weights))
        pytorch_fid.inception.load_state_dict_from_url = lambda *_, **__: state

        def step():
            last = torch.channels_last if channels_last else torch.preserve_format
            network = pytorch_fid.inception.InceptionV3([3]).to(args.device, memory_format=last)
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                get_activations(files, network, batch, device=args.device, num_workers=workers)
        return step

    workers = sorted({min(os.cpu_count(), 8), 0}, reverse=True)
    settings = dict(batch=(32, 50), workers=workers, channels_last=EITHER)
    yield Work(f"Inception's features, {len(files)} images of {args.size} px", len(files), 0, {
        "ours": (lambda: lambda: Inception(weights).extract(files, args.device), {}),
        "pytorch-fid": (peer, settings)})

def distance(args):
    """The distance between two sets of features, beside pytorch-fid."""
    from pytorch_fid.fid_score import calculate_frechet_distance
    x, y = np.random.default_rng(0).random((2, args.images, 2048))

    def by_definition():
        return calculate_frechet_distance(*(m for f in (x, y) for m in (f.mean(0), np.cov(f, rowvar=False))))
    yield Work(f"distance of {len(x)} and {len(y)} features", 1, 0, {
        "ours": (lambda: lambda: fid.frechet_distance(x, y), {}),
        "pytorch-fid": (lambda: by_definition, {})}, warm=False)

# ---- files: loading, caching, the first image --------------------------------------------------------------

def python(*arguments):
    """Run Python in a process of its own -> what it prints."""
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, check=True, capture_output=True,
                          text=True).stdout

def base(args):
    """A folder with a base and a pathology encoder of random weights, for Diffusers and us -> the folder,
    VAE's file, Encoder. The encoder has UNI2-h's shape beside SD1.5's width."""
    folder = args.folder / "base"
    if not folder.exists():
        make_sd15(folder, width=args.width)
        encoder = random_state(build_encoder, *(1536, 24) if args.width == 320 else (192, 2))
        save_file(encoder, folder / "model.safetensors")
    return str(folder), open_sd15(str(folder)), open_encoder(folder)

LOAD = """
import re, time, torch
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
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
total = sum(float(p.sum()) for n in ready() for p in n.parameters())        # a mapped page counts when read
print(time.perf_counter() - start, peak() - before)
"""

def loading(args):
    """From a Diffusers folder to networks of which every weight was read once; imports are not counted. The
    peak is RAM's."""
    (folder, *_), dtype = base(args), dtypes(args)[0]

    def build(ours):
        code = LOAD.format(device=str(args.device), dtype=dtype, ours=ours, folder=folder)
        return lambda: Figures(*map(float, python("-c", code).split()[-2:]))
    yield Work(f"U-Net and VAE read, in {dtype}", 1, 0,
               {"ours": (partial(build, True), {}), "Diffusers": (partial(build, False), {})}, warm=False)

def caching(args):
    """Latents of each image and its mirror image, and embeddings: Cache.fill, beside Diffusers' VAE and timm
    in the same batches and dtype."""
    from torchvision.transforms import Compose, Normalize, Resize, ToTensor
    (folder, (_, vae_file), encoder), files, count = base(args), patches(args), itertools.count()
    view = Compose([Resize(224), ToTensor(), Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    pixels = Compose([Resize(args.size), ToTensor(), Normalize(0.5, 0.5)])

    def ours():
        encoders = load_vae(vae_file, args.device).encode, partial(encoder.embed, encoder.load(args.device))
        return lambda: Cache(args.folder / f"cache{next(count)}", "vae", "encoder",
                             args.size).fill(files, lambda: encoders)

    def peer(channels_last):
        from diffusers import AutoencoderKL
        last = torch.channels_last if channels_last else torch.preserve_format
        vae = AutoencoderKL.from_pretrained(folder, subfolder="vae").to(args.device, memory_format=last)
        network = encoder.load(args.device).to(memory_format=last)

        @torch.no_grad()
        def step():
            batches = [files[i:i + Cache.BATCH] for i in range(0, len(files), Cache.BATCH)]
            for images in prefetch(load_rgb, batches):
                x = torch.stack([pixels(image) for image in images]).to(args.device)
                posterior = vae.encode(torch.cat([x, x.flip(-1)])).latent_dist
                e = network(torch.stack([view(image) for image in images]).to(args.device))
                rows = posterior.mean.cpu(), posterior.logvar.cpu(), e.cpu()
                torch.save(rows, args.folder / f"peer{next(count)}.pt")
        return step
    yield Work(f"caching {len(files)} images of {args.size} px", len(files), 0,
               {"ours": (ours, {}), "Diffusers and timm": (peer, dict(channels_last=EITHER))})

FIRST = """
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from ldm.data import load_rgb
from lora import load_projector, open_adapter
from ldm.encoder import open_encoder
device, dtype, how = torch.device({device!r}), {dtype}, dict(memory_format=torch.{last})
unet = UNet2DConditionModel.from_pretrained({folder!r}, subfolder="unet", torch_dtype=dtype).to(device, **how)
vae = AutoencoderKL.from_pretrained({folder!r}, subfolder="vae").to(device, dtype, **how)
scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                          clip_sample=False)
pipe = StableDiffusionPipeline(vae, None, None, unet, scheduler, None, None, requires_safety_checker=False)
pipe.load_lora_weights({adapter!r})
projector, encoder = load_projector(open_adapter({adapter!r})), open_encoder({folder!r})
e = encoder.embed(encoder.load(device), [load_rgb({image!r})])
c, c_null = (projector(x).to(device, dtype) for x in (e, projector.null))
pipe(prompt_embeds=c, negative_prompt_embeds=c_null, guidance_scale=1.3,
     num_inference_steps={steps}, height={size}, width={size}).images[0].save({out!r})
"""

def first(args):
    """From the start of the program to its first image on the disk: sample.py, beside a Diffusers pipeline
    with our projector. Both load U-Net, VAE, encoder and adapter; sample.py checks the hashes of three."""
    (folder, (unet, vae), encoder), [image, *_], count = base(args), patches(args, 1), itertools.count()
    adapter, files = str(args.folder / "adapter.safetensors"), dict(base=unet, vae=vae, encoder=encoder)
    header = dict(base=folder, encoder=folder, licence="none", resolution=str(args.size), step="1")
    header |= {f"{part}_sha256": file.fingerprint() for part, file in files.items()}
    save_adapter(adapter, inject(UNet(channels(args.width)), 4), Projector(d_e=encoder.width), header)
    options = ["--adapter", adapter, "--ref", image, "--steps", args.steps, "--device", args.device]

    def ours():             # sample.py makes no image twice
        return lambda: python(ROOT / "sample.py", *options, "--out", args.folder / f"samples{next(count)}")

    def peer(dtype, channels_last):
        code = FIRST.format(device=str(args.device), dtype=dtype, folder=folder, adapter=adapter,
                            last="channels_last" if channels_last else "preserve_format", image=str(image),
                            steps=args.steps, size=args.size, out=str(args.folder / "peer.png"))
        return lambda: python("-c", code)
    yield Work(f"program start to first image, {args.size} px, {args.steps} guided steps", 1, 0,
               {"ours": (ours, {}), "Diffusers": (peer, dict(dtype=dtypes(args), channels_last=EITHER))},
               warm=False)
