"""The networks at their full size, from checkpoints of random weights: 10 GB of disk and some minutes. Run
with -m slow."""
import gc
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, texture
from make_sd15 import make_sd15
from timm.layers import SwiGLUPacked

from ldm.encoder import open_encoder
from ldm.weights import load_unet, load_vae, open_sd15

pytestmark = pytest.mark.slow
UNI2H = dict(           # from MahmoodLab/UNI2-h's page
    img_size=224, patch_size=14, depth=24, num_heads=24, init_values=1e-5, embed_dim=1536,
    mlp_ratio=2.66667 * 2,
    num_classes=0, no_embed_class=True, mlp_layer=SwiGLUPacked, act_layer=torch.nn.SiLU, reg_tokens=8,
    dynamic_img_size=True)

@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """(folder of the Diffusers layout, inputs, Diffusers' outputs)."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    folder = tmp_path_factory.mktemp("full") / "new"
    make_sd15(folder)
    torch.manual_seed(0)
    inputs = torch.randn(1, 4, 32,
                         32), torch.tensor([501]), torch.randn(1, 4, 768), torch.rand(1, 3, 128, 128) * 2 - 1
    z, t, c, x = inputs
    with torch.no_grad():
        unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
        eps = unet(z, t, c).sample
        vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
        posterior = vae.encode(x).latent_dist
        outputs = eps, posterior.mean, posterior.logvar, vae.decode(z / 0.18215).sample
    yield folder, inputs, outputs
    shutil.rmtree(folder.parent)

@pytest.mark.parametrize("layout", ["diffusers", "diffusers-old", "compvis"])
def test_full_size_outputs_equal_diffusers_from_every_layout(layout, expected, tmp_path):
    folder, (z, t, c, x), outputs = expected
    if layout != "diffusers":
        folder = tmp_path / ("one.safetensors" if layout == "compvis" else "old")
        make_sd15(folder, layout)
    files = open_sd15(str(folder))
    unet, vae = load_unet(files[0]), load_vae(files[1])
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964 and len(unet.state_dict()) == 686
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863 and len(vae.state_dict()) == 248
    with torch.no_grad():
        ours = unet(z, t, c), *vae.encode(x), vae.decode(z)
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(ours, outputs)]
    print(f"{layout}: relative errors of U-Net, mean, log-variance, decoder: {errors}")
    assert max(errors) < 1e-4
    del unet, vae
    gc.collect()
    shutil.rmtree(tmp_path)

def test_loading_in_bfloat16_peaks_at_the_networks_size(expected):
    """1.72 GB of bfloat16 from a file of 3.44 GB of float32: well under the two together."""
    folder = expected[0]
    code = f"""
import re, sys, torch
sys.path.insert(0, {str(ROOT)!r})
from ldm.weights import load_unet, open_sd15
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
unet = load_unet(open_sd15({str(folder)!r})[0], dtype=torch.bfloat16)
print(peak() - before)
"""
    grown = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True,
                               text=True).stdout)
    print(f"grown by {grown / 1e9:.2f} GB")
    assert 2 * 859_520_964 < grown < 1.1 * 2 * 859_520_964

def test_the_full_size_encoder_loads_and_equals_timms_pipeline(tmp_path):
    import timm
    from timm.data import create_transform
    torch.manual_seed(0)
    torch.save(timm.create_model("vit_giant_patch14_224", **UNI2H).state_dict(),
               tmp_path / "pytorch_model.bin")
    encoder = open_encoder(tmp_path)
    network = encoder.load()
    assert sum(p.numel() for p in network.parameters()) == 681_394_176 and len(network.state_dict()) == 343
    image = texture(0, 512)
    ours = encoder.embed(network, [image])
    del network
    theirs = timm.create_model("vit_giant_patch14_224", **UNI2H)
    theirs.load_state_dict(torch.load(tmp_path / "pytorch_model.bin", weights_only=True), strict=True)
    transform = create_transform((3, 224, 224), is_training=False, interpolation="bilinear",
                                 mean=(0.485, 0.456, 0.406),
                                 std=(0.229, 0.224, 0.225), crop_pct=1.0)
    with torch.no_grad():
        expected = theirs.eval()(transform(image)[None])
    assert ours.shape == (1, 1536)
    print(f"relative error {((ours - expected).norm() / expected.norm()).item():.2e}")
    assert (ours - expected).norm() < 1e-5 * expected.norm()
    shutil.rmtree(tmp_path)
