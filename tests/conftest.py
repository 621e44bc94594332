"""Fixtures: narrow networks of SD1.5's and UNI2-h's depth and names, a small dataset, all made from seeds.

What is too large for the project is read from ../shared, or MORPH_SHARED; a test that needs it is skipped
with the reason where it is absent."""
import contextlib
import importlib
import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

if not any("test_cuda" in argument for argument in sys.argv):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""     # every other number here is the CPU's
os.environ["TORCH_HOME"] = os.devnull           # whose weights are in torch.hub's cache must not matter

import numpy as np
import pytest
import torch
from make_sd15 import networks
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ldm.app import run_program  # noqa: E402
from ldm.runs import Settings  # noqa: E402
from ldm.unet import UNet  # noqa: E402
from lora import inject  # noqa: E402
from projector import Projector  # noqa: E402
from train import Trainer  # noqa: E402

SHARED = Path(os.environ.get("MORPH_SHARED", ROOT.parent / "shared"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Warnings of other libraries about themselves or about what a test does to them on purpose.
EXPECTED = (
    "ignore:The `disp` argument is deprecated:DeprecationWarning:pytorch_fid",  # it calls SciPy the old way
    "ignore::UserWarning:PIL.TiffImagePlugin",          # of mutated and of hand-made TIFFs
    "ignore:Detected pickle protocol:UserWarning",    # of what is no state dict
    # an adapter is read into a network without memory: its checks are the test
    "ignore:for .* copying from a non-meta parameter:UserWarning:torch.nn.modules.module")

def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes long or gigabytes large; run with -m slow")
    for entry in EXPECTED:
        config.addinivalue_line("filterwarnings", entry)

def pytest_collection_modifyitems(config, items):
    """The plain run omits the slow tests; `-m slow` runs them, and a test that is named is always run."""
    if config.option.markexpr or any("::" in arg for arg in config.args):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]

@pytest.fixture(scope="session")
def shared():
    """shared("weights/x") -> the path of a large file, or a skip."""
    def find(name):
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"{name} is not in {SHARED} (set MORPH_SHARED to where it is)")
        return path
    return find

def diffusers_twins(unet_widths, vae_widths, layers):
    """(U-Net, VAE) of Diffusers with SD1.5's levels, float32, with every tensor random."""
    torch.manual_seed(0)
    unet, vae = networks(unet_widths, vae_widths, layers).values()
    with torch.no_grad():
        # the norms start as identities, which would hide a norm left out or exchanged
        for network in (unet, vae):
            for _name, p in network.named_parameters():
                if p.ndim == 1:
                    p.add_(0.1 * torch.randn_like(p))
    return unet.eval().requires_grad_(False), vae.eval().requires_grad_(False)

@pytest.fixture(scope="session")
def diffusers_networks():
    """(U-Net, VAE) of Diffusers, narrow, as deep as SD1.5."""
    return diffusers_twins((32, 64, 128, 128), (32, 64, 64, 64), layers=2)

@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A Diffusers folder for the programs: SD1.5's four levels, but narrow, and one block in each: fast.

    At 64 px the last two levels are one position. Less than 4 of its channels in a group of a norm would be
    nearly constant: a gradient of rounding errors, which AdamW makes as large as any other."""
    folder = tmp_path_factory.mktemp("base")
    for network, part in zip(diffusers_twins((32, 64, 128, 128), (32,) * 4, layers=1), ("unet", "vae")):
        network.save_pretrained(folder / part)
    return folder

def uni2h_of_timm(width=1536, depth=24):
    """The call on MahmoodLab/UNI2-h's page, also for narrower networks."""
    import timm
    torch.manual_seed(0)
    return timm.create_model(
        "vit_giant_patch14_224", img_size=224, patch_size=14, depth=depth, num_heads=width // 64,
        init_values=1e-5, embed_dim=width, mlp_ratio=2.66667 * 2, num_classes=0, no_embed_class=True,
        mlp_layer=timm.layers.SwiGLUPacked, act_layer=torch.nn.SiLU, reg_tokens=8,
        dynamic_img_size=True).eval()

def mahmoodlab_transform():
    """What `create_transform(**resolve_data_config(model.pretrained_cfg))` gives for the model of the hub."""
    from timm.data import create_transform
    return create_transform((3, 224, 224), is_training=False, interpolation="bilinear", crop_pct=1.0,
                            mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop_mode="center")

@pytest.fixture(scope="session")
def uni2h(tmp_path_factory):
    """A narrow UNI2-h (192 wide, 2 blocks) as the pickle that MahmoodLab's repository has."""
    folder = tmp_path_factory.mktemp("uni2h")
    torch.save(uni2h_of_timm(192, 2).state_dict(), folder / "pytorch_model.bin")
    return folder

def timm_folder(folder, architecture, config, **arguments):
    """A model of timm of random weights, with its config.json -> the model."""
    import timm
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=5, **arguments).eval()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    how = dict(classifier="head", input_size=[3, 64, 64], interpolation="bicubic", crop_pct=0.9,
               mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4])
    (folder / "config.json").write_text(json.dumps(dict(
        architecture=architecture, num_classes=5, num_features=model.num_features, model_args=arguments,
        pretrained_cfg=how | config)))
    return model

# What train.py writes into an adapter's header.
HEADER = dict(base="x", base_sha256="b", vae_sha256="v", encoder="y", encoder_sha256="e", resolution="64",
              step="7", seed="0", licence="CC BY-NC-ND")

def texture(seed, size=72):
    """A smooth pink and violet pattern, unlike every other seed's."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    waves = sum(np.sin(2 * np.pi * (rng.uniform(-4, 4) * x + rng.uniform(-4, 4) * y + rng.uniform()))
                for _ in range(4)) / 4
    colour = np.array([200, 120, 180]) + rng.normal(0, 20, 3)
    return Image.fromarray((colour + waves[..., None] * [60, 50, 40]).clip(0, 255).astype(np.uint8))

@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """36 images of 12 cases in the Chaoyang format."""
    root = tmp_path_factory.mktemp("dataset")
    rows = {"train": [], "test": []}
    for i in range(36):
        case, part = i // 3, "train" if i < 27 else "test"
        name = f"{part}/{5000 + case}_{i % 2}-IMG{i:03d}x{case:03d}-{case % 4}.JPG"
        (root / part).mkdir(exist_ok=True)
        texture(i).save(root / name, quality=95)
        rows[part].append({"name": name, "label": case % 4})
    for part, entries in rows.items():
        (root / f"{part}.json").write_text(json.dumps(entries))
    return root

SETTINGS = Settings(batch=4, no_compile=True)

class Memory:
    """A stand-in for the cache: named latents and embeddings."""

    def __init__(self, n, d_e):
        g = torch.Generator().manual_seed(0)
        self.rows = {f"h{i}": (torch.randn(2, 4, 16, 16, generator=g), torch.full((2, 4, 16, 16), -9.0),
                               torch.randn(d_e, generator=g))
                     for i in range(n)}

    def batch(self, hashes, mirrored):
        rows = [self.rows[h] for h in hashes]
        return (*(torch.stack([row[k][int(m)] for row, m in zip(rows, mirrored)]) for k in (0, 1)),
                torch.stack([row[2] for row in rows]))

def trainer(n=8, widths=(32, 64), layers=1, **changes):
    """A Trainer of a small network on n stored images."""
    torch.manual_seed(0)
    unet = inject(UNet(widths, layers).requires_grad_(False), 2)
    projector = Projector(d_e=12, d_h=16, n_c=2)
    return Trainer(replace(SETTINGS, **changes), unet, projector, Memory(n, 12),
                   [(f"{i}.png", f"h{i}") for i in range(n)], (4, 16, 16), torch.device("cpu"))

def program(name, *args, cwd, check=True):
    """Call a program in this process, as `python NAME ARGS` would -> returncode, stdout, stderr.

    A new process for each would import torch each time; `process` is for what needs one."""
    module, code = importlib.import_module(name.removesuffix(".py")), 0
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv, Path.cwd(), {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        sys.argv = [name, *map(str, args)]
        os.chdir(cwd)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_program(module.main)
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = before[0]
        os.chdir(before[1])
        for number, handler in before[2].items():
            signal.signal(number, handler)
    assert not check or code == 0, err.getvalue()
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())

def start(*command, cwd=ROOT, **environment):
    """Python with these arguments in a process of its own -> Popen."""
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=cwd, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=os.environ | environment)

def process(name, *args, cwd, check=True, **environment):
    """The same as `program` in a process of its own."""
    started = start(ROOT / name, *args, cwd=cwd, **environment)
    try:
        out, err = started.communicate(timeout=600)
    finally:
        started.kill()
    assert not check or started.returncode == 0, err
    return SimpleNamespace(returncode=started.returncode, stdout=out, stderr=err)

@pytest.fixture(scope="session")
def small(base, uni2h, dataset):
    """Arguments of a training run that takes seconds: four steps an epoch."""
    return ["--data", dataset, "--sd15", base, "--uni2h", uni2h, "--size", 64, "--rank", 2, "--hidden", 32,
            "--limit", 16, "--batch", 4, "--val-steps", 2]

@pytest.fixture(scope="session")
def trained(small, tmp_path_factory):
    """A finished run of two epochs -> its folder."""
    cwd = tmp_path_factory.mktemp("trained")
    program("train.py", *small, "--epochs", 2, "--val-samples", 2, "--run", "runs/x", cwd=cwd)
    return cwd / "runs" / "x"
