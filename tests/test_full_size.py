"""The networks at their full size, from checkpoints of random weights: 10 GB of disk and some minutes. Run
with -m slow."""
import gc
import shutil

import pytest
import torch
from conftest import mahmoodlab_transform, texture, uni2h_of_timm
from make_sd15 import make_sd15
from peers import LOAD, python

from ldm.encoder import open_encoder
from ldm.weights import load_unet, load_vae, open_sd15

pytestmark = pytest.mark.slow

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

def test_loading_in_bfloat16_peaks_at_the_networks_sizes(expected):
    """A U-Net of 1.72 GB from 3.44 GB of float32: well under the two together; and a VAE in float32."""
    code = LOAD.format(ours=True, device="cpu", dtype=torch.bfloat16, folder=str(expected[0]))
    grown, weights = float(python("-c", code).split()[-1]), 2 * 859_520_964 + 4 * 83_653_863
    print(f"grown by {grown / 1e9:.2f} GB")
    assert weights < grown < 1.1 * weights

def test_the_full_size_encoder_loads_and_equals_timms_pipeline(tmp_path):
    torch.save(uni2h_of_timm().state_dict(), tmp_path / "pytorch_model.bin")
    encoder = open_encoder(tmp_path)
    network = encoder.load()
    assert sum(p.numel() for p in network.parameters()) == 681_394_176 and len(network.state_dict()) == 343
    image = texture(0, 512)
    ours = encoder.embed(network, [image])
    del network
    with torch.no_grad():
        expected = uni2h_of_timm()(mahmoodlab_transform()(image)[None])         # of the same seed
    assert ours.shape == (1, 1536)
    print(f"relative error {((ours - expected).norm() / expected.norm()).item():.2e}")
    assert (ours - expected).norm() < 1e-5 * expected.norm()
    shutil.rmtree(tmp_path)
