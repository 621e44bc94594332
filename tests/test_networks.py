"""The U-Net and the VAE equal Diffusers', from every layout in which Stable Diffusion 1.5 is met."""
import copy
import sys

import pytest
import torch
from make_sd15 import OLD_ATTENTION, make_sd15, networks, replace
from safetensors.torch import load_file, save_file

from ldm.app import Fail
from ldm.unet import Conv, UNet
from ldm.vae import VAE, draw_latent
from ldm.weights import TensorFile, load_unet, load_vae, open_sd15

CHANNELS = dict(unet=(32, 64, 128, 128), vae=(32, 64, 64, 64))

@pytest.mark.parametrize("build, tensors, parameters", [(UNet, 686, 859_520_964), (VAE, 248, 83_653_863)])
def test_full_size_names_and_shapes_equal_diffusers(build, tensors, parameters):
    with torch.device("meta"):
        ours, theirs = build().state_dict(), networks()[build.__name__.lower()].state_dict()
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    assert len(ours) == tensors and sum(t.numel() for t in ours.values()) == parameters

@pytest.mark.parametrize("settings", [dict(padding=1), dict(padding=1, stride=2), dict(stride=2)])
def test_a_convolution_of_few_positions_is_one(settings):
    conv = Conv(1280, 5, 3, **settings).double()
    x = torch.randn(2, 1280, 8, 7, dtype=torch.float64, requires_grad=True)
    outputs = conv(x), torch.nn.Conv2d.forward(conv, x)
    gradients = [torch.autograd.grad(y.square().sum(), [x, *conv.parameters()]) for y in outputs]
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)

def test_no_convolution_meets_strides_for_which_its_weights_would_be_copied():
    unet, vae, met = UNet((32, 64), layers=1), VAE((32, 64), layers=1), []
    for m in (*unet.modules(), *vae.modules()):
        if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3):
            m.register_forward_pre_hook(lambda m, inputs: met.append(inputs[0].is_contiguous()))
    unet(torch.randn(2, 4, 32, 32), torch.tensor([1, 2]), torch.randn(2, 4, 768))
    vae.decode(vae.encode(torch.randn(2, 3, 32, 32))[0])
    assert len(met) > 40 and all(met)

def test_unet_equals_diffusers_in_float64(diffusers_networks):
    theirs = diffusers_networks[0].double()
    ours = UNet(CHANNELS["unet"]).double()
    ours.load_state_dict(theirs.state_dict())
    z, c = torch.randn(3, 4, 16, 24, dtype=torch.float64), torch.randn(3, 4, 768, dtype=torch.float64)
    t = torch.tensor([0, 501, 999])
    with torch.no_grad():
        expected = theirs(z, t, c).sample
        assert (ours(z, t, c) - expected).abs().max() < 1e-10 * expected.abs().max()
    diffusers_networks[0].float()

@pytest.mark.parametrize("groups", [32, 8])
def test_vae_equals_diffusers_in_float64(groups, diffusers_networks, tmp_path):
    """32 groups in a norm as in SD1.5, or as many as the file declares."""
    theirs = copy.deepcopy(diffusers_networks[1]).double()
    for m in theirs.modules():
        if isinstance(m, torch.nn.GroupNorm):
            m.num_groups = groups
    header = {} if groups == 32 else {"norm_num_groups": str(groups)}
    save_file(theirs.state_dict(), tmp_path / "vae.safetensors", header)
    ours = load_vae(TensorFile(tmp_path / "vae.safetensors"), dtype=torch.float64)
    x = torch.rand(2, 3, 64, 96, dtype=torch.float64) * 2 - 1
    noise = torch.randn(2, 4, 8, 12, dtype=torch.float64)
    with torch.no_grad():
        posterior = theirs.encode(x).latent_dist
        mean, logvar = ours.encode(x)
        z0 = draw_latent(mean, logvar, noise)
        assert (mean - posterior.mean).abs().max() < 1e-10
        assert (logvar - posterior.logvar).abs().max() < 1e-10
        assert (z0 - 0.18215 * (posterior.mean + posterior.std * noise)).abs().max() < 1e-10
        assert (ours.decode(z0) - theirs.decode(z0 / 0.18215).sample).abs().max() < 1e-10

@pytest.mark.parametrize("groups", ["eight", "0", "7", "-8"])
def test_other_groups_are_refused(groups, diffusers_networks, tmp_path):
    save_file(diffusers_networks[1].state_dict(), tmp_path / "vae.safetensors", {"norm_num_groups": groups})
    with pytest.raises(Fail, match=f"declares norm_num_groups '{groups}'.* computes with '32'"):
        open_sd15("toy", str(tmp_path / "vae.safetensors"))

def test_the_posteriors_log_variance_is_clamped():
    vae = VAE((32, 32))
    torch.nn.init.constant_(vae.quant_conv.weight, 0)
    with torch.no_grad():
        vae.quant_conv.bias[:] = torch.tensor([0, 0, 0, 0, 99, -99, 20, -30])
        logvar = vae.encode(torch.zeros(1, 3, 16, 16))[1]
    assert logvar.amax((0, 2, 3)).tolist() == [20, -30, 20, -30]

def test_a_bfloat16_network_keeps_a_float32_state(diffusers_networks):
    ours = UNet(CHANNELS["unet"])
    ours.load_state_dict(diffusers_networks[0].float().state_dict())
    z, t, c = torch.randn(2, 4, 8, 8), torch.tensor([5, 900]), torch.randn(2, 4, 768)
    with torch.no_grad():
        exact, rounded = ours(z, t, c), ours.bfloat16()(z, t, c)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.03

def check(folder, networks):
    """open_sd15(folder) gives the networks of the fixture, and says the same of their content."""
    files = open_sd15(str(folder))
    unet, vae = load_unet(files[0]), load_vae(files[1])
    for ours, theirs in ((unet, networks[0]), (vae, networks[1])):
        theirs = theirs.state_dict()
        assert ours.state_dict().keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.state_dict().items())
        assert not any(p.requires_grad for p in ours.parameters())
    return [file.fingerprint() for file in files]

@pytest.fixture(scope="module")
def deep(diffusers_networks, tmp_path_factory):
    """The networks of that fixture as Diffusers saves them."""
    folder = tmp_path_factory.mktemp("deep")
    for network, part in zip(diffusers_networks, ("unet", "vae")):
        network.save_pretrained(folder / part)
    return folder

def test_a_diffusers_folder_loads_with_new_and_old_attention_names(deep, diffusers_networks, tmp_path):
    new = check(deep, diffusers_networks)
    (tmp_path / "unet").symlink_to(deep / "unet")
    vae = load_file(deep / "vae/diffusion_pytorch_model.safetensors")
    for name in [n for n in vae if "attentions" in n]:
        vae[replace(name, OLD_ATTENTION)] = vae.pop(name)
    (tmp_path / "vae").mkdir()
    save_file(vae, tmp_path / "vae/diffusion_pytorch_model.safetensors")
    assert sum("proj_attn" in n for n in vae) == 4
    assert check(tmp_path, diffusers_networks) == new

@pytest.fixture(scope="session")
def layouts(tmp_path_factory):
    """One network of random weights in the three layouts."""
    folder = tmp_path_factory.mktemp("layouts")
    paths = {"diffusers": folder / "new", "diffusers-old": folder / "old",
             "compvis": folder / "one.safetensors"}
    for layout, path in paths.items():
        make_sd15(path, layout, width=32)
    return paths

@pytest.mark.parametrize("layout", ["diffusers", "diffusers-old", "compvis"])
def test_every_layout_holds_the_network_that_diffusers_reads(layout, layouts):
    from diffusers import AutoencoderKL, UNet2DConditionModel
    theirs = [kind.from_pretrained(layouts["diffusers"], subfolder=part).eval()
              for kind, part in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"))]
    fingerprints = check(layouts[layout], theirs)
    assert fingerprints == [file.fingerprint() for file in open_sd15(str(layouts["diffusers"]))]

def test_our_names_for_a_compvis_file_are_those_of_diffusers_own_converter(layouts):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
    theirs = load_file(layouts["compvis"])
    unet_config = dict(down_block_types=[0] * 4, up_block_types=[0] * 4, layers_per_block=2,
                       class_embed_type=None,
                       addition_embed_type=None, block_out_channels=[32] * 4)
    vae_config = dict(down_block_types=[0] * 4, up_block_types=[0] * 4)
    files = open_sd15(str(layouts["compvis"]))
    for file, converted in ((files[0], convert_ldm_unet_checkpoint(dict(theirs), unet_config)),
                            (files[1], convert_ldm_vae_checkpoint(dict(theirs), vae_config))):
        assert file.names.keys() == converted.keys()
        for name, tensor in file.read(converted):
            assert torch.equal(tensor.flatten(), converted[name].flatten()), name

def test_a_float16_file_is_found_and_loads_in_the_wanted_type(base, tmp_path):
    for part in ("unet", "vae"):
        (tmp_path / part).mkdir()
        tensors = load_file(base / part / "diffusion_pytorch_model.safetensors")
        save_file({n: t.half() for n, t in tensors.items()},
                  tmp_path / part / "diffusion_pytorch_model.fp16.safetensors")
    unet = load_unet(open_sd15(str(tmp_path))[0], dtype=torch.bfloat16)
    expected = load_file(base / "unet/diffusion_pytorch_model.safetensors")
    for name, tensor in unet.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name].half().bfloat16())

def test_a_file_of_the_wanted_type_is_mapped_and_not_copied(base):
    """The tensor's memory is the file's: the kernel lists it under the file's name."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc/self/maps")
    unet = load_unet(open_sd15(str(base))[0])
    address = unet.conv_in.weight.data_ptr()
    maps = [line.split(maxsplit=5) for line in open("/proc/self/maps")]
    [owner] = [m[-1].strip() for m in maps if int(m[0].split("-")[0],
                                                  16) <= address < int(m[0].split("-")[1], 16)]
    assert owner.endswith("diffusion_pytorch_model.safetensors")
