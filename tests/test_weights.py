"""Weights as people have them: under any name, wrapped, damaged, or of another meaning."""
import json
import os
import pickle
import shutil
import sys
import types

import pytest
import torch
from make_sd15 import compvis, random_tensor
from safetensors.torch import save_file

from ldm import unet, vae
from ldm.app import Fail
from ldm.encoder import open_encoder
from ldm.schedule import alpha_bar
from ldm.weights import TensorFile, load_unet, load_vae, open_sd15

VAE = "first_stage_model."

@pytest.fixture(scope="module")
def parts():
    """{"unet": tensors, "vae": tensors} as deep as SD1.5, 32 wide, under Diffusers' names; use copies."""
    with torch.device("meta"):
        networks = {"unet": unet.UNet((32,) * 4, context=32), "vae": vae.VAE((32,) * 4)}
    return {part: {name: random_tensor(f"{part}.{name}", t.shape) for name, t in net.state_dict().items()}
            for part, net in networks.items()}

@pytest.fixture(scope="module")
def one(parts):
    """The same as the tensors of a single file."""
    return {name: t.contiguous() for name, t in compvis(**parts).items()}

@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory):
    """The same as a Diffusers folder without configs."""
    folder = tmp_path_factory.mktemp("folder")
    for part, tensors in parts.items():
        (folder / part).mkdir()
        save_file(tensors, folder / part / "diffusion_pytorch_model.safetensors")
    return folder

@pytest.fixture(scope="module")
def expected(folder):
    return fingerprints(folder)

def fingerprints(*source):
    return [file.fingerprint() for file in open_sd15(*map(str, source))]

def lightning(tensors, path):
    """A checkpoint of a trainer: its state dict beside objects of a class that is not installed here."""
    module = types.ModuleType("pytorch_lightning.callbacks")
    module.Callback = type("Callback", (dict,), {"__module__": module.__name__})
    sys.modules |= {"pytorch_lightning": types.ModuleType("pytorch_lightning"), module.__name__: module}
    try:
        callback = module.Callback(best=torch.ones(2))
        callback.state = [1, "x"]
        torch.save({"callbacks": {module.Callback: callback}, "hyper": callback, "global_step": 840000,
                    "state_dict": tensors}, path)
    finally:
        del sys.modules["pytorch_lightning"], sys.modules[module.__name__]

def save_pickle(tensors, path):
    torch.save(tensors, path)

def save_old_pickle(tensors, path):
    torch.save({"state_dict": tensors}, path, _use_new_zipfile_serialization=False)

@pytest.mark.parametrize("name, save", [
    ("a.ckpt", save_file), ("b.SFT", save_file), ("c", save_file), ("d.safetensors", save_pickle),
    ("e", save_pickle), ("f.ckpt", lightning), ("g.pt", save_old_pickle),
    ("h.pt", lambda tensors, path: save_pickle({"model": {"n": 8}, "state_dict": {"model": tensors}}, path))])
def test_the_first_bytes_decide_the_format_and_a_checkpoint_is_unwrapped(name, save, one, expected, tmp_path):
    save(one, tmp_path / "blob")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / name).symlink_to("../blob")  # as in the hub's cache
    assert fingerprints(tmp_path / "snapshot" / name) == expected

@pytest.mark.parametrize("content, words", [
    (b"<!DOCTYPE html><html>", "web page"), (b"GGUF\3\0\0\0" + bytes(30), "quantised"), (bytes(64), "zeros"),
    (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"), (b"", "truncated"),
    (pickle.dumps({"a": print}), "save its state dict alone"), (b"\x10\0\0\0\0\0\0\0{}", "truncated")])
def test_what_is_no_file_of_weights_is_named(content, words, tmp_path):
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(Fail, match=words) as problem:
        TensorFile(tmp_path / "x.ckpt")
    assert "\n" not in str(problem.value) and "weights_only" not in str(problem.value)

def renamed_attention(tensors, *names):
    """The VAE's attention with other names than CompVis's q, k, v, proj_out."""
    def new(name):
        for ours, other in zip(("q", "k", "v", "proj_out"), names):
            name = name.replace(f"attn_1.{ours}.", f"attn_1.{other}.")
        return name
    return {new(name): tensor for name, tensor in tensors.items()}

@pytest.mark.parametrize("change", [
    lambda t: renamed_attention(t, "to_q", "to_k", "to_v", "to_out.0"),
    lambda t: renamed_attention(t, "query", "key", "value", "proj_attn"),
    lambda t: t | {VAE + "loss.logvar": torch.zeros(()), VAE + "model_ema.decay": torch.tensor(0.9),
                   "model_ema.diffusion_modelx": torch.full((3,), torch.nan),
                   "control_model.x": torch.ones(1)}])
def test_variants_of_a_single_file_are_the_same_network(change, one, expected, tmp_path):
    save_file(change(one), tmp_path / "x.safetensors")
    assert fingerprints(tmp_path / "x.safetensors") == expected

def test_eight_bit_floats_are_read_exactly_and_said(one, tmp_path, capsys):
    small = {n: t.to(torch.float8_e4m3fn) for n, t in one.items() if t.is_floating_point()}
    save_file(small, tmp_path / "x.safetensors")
    unet = load_unet(open_sd15(str(tmp_path / "x.safetensors"))[0])
    weight = one["model.diffusion_model.out.2.weight"].to(torch.float8_e4m3fn).float()
    assert torch.equal(unet.conv_out.weight, weight) and "float8_e4m3fn" in capsys.readouterr().err

def test_a_file_without_a_vae_takes_another(one, expected, folder, tmp_path):
    no_vae = {name: tensor for name, tensor in one.items() if not name.startswith(VAE)}
    save_file(no_vae, tmp_path / "x.safetensors")
    with pytest.raises(Fail, match="contains no VAE; pass --vae"):
        open_sd15(str(tmp_path / "x.safetensors"))
    alone = {name.removeprefix(VAE): one[name] for name in one.keys() - no_vae.keys()}
    save_file(alone, tmp_path / "v.safetensors")
    assert fingerprints(tmp_path / "x.safetensors", tmp_path / "v.safetensors") == expected
    for source in (folder, folder / "vae"):
        assert fingerprints(tmp_path / "x.safetensors", source) == expected

@pytest.mark.parametrize("kind", ["bin", "fp16.bin", "non_ema.safetensors"])
def test_a_folder_may_hold_one_kind_of_weights_alone(kind, parts, expected, tmp_path):
    for part, tensors in parts.items():
        (tmp_path / part).mkdir()
        save = save_file if kind.endswith("safetensors") else torch.save
        save(tensors, tmp_path / part / f"diffusion_pytorch_model.{kind}")
    assert fingerprints(tmp_path) == expected

NAN, GAP = (lambda t: t.view(-1)[:1].fill_(torch.nan)), lambda t: t.zero_()

@pytest.mark.parametrize("name, damage, words", [
    ("model.diffusion_model.out.2.bias", NAN, "not finite"),
    (VAE + "decoder.conv_out.bias", NAN, "not finite"),
    (VAE + "decoder.conv_in.weight", lambda t: t.view(-1)[-1:].fill_(-torch.inf), "not finite"),
    ("model.diffusion_model.middle_block.0.in_layers.2.weight", GAP, "zero")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_numbers_that_no_training_left_are_refused_by_hash_and_by_load(
        name, damage, words, dtype, one, tmp_path):
    tensors = {n: t.to(dtype) for n, t in one.items()} | {name: one[name].to(dtype, copy=True)}
    damage(tensors[name])
    save_file(tensors, tmp_path / "x.safetensors")
    part = int(name.startswith(VAE))
    load, file = (load_unet, load_vae)[part], open_sd15(str(tmp_path / "x.safetensors"))[part]
    for use in (file.fingerprint, lambda: load(file)):
        with pytest.raises(Fail, match=words) as problem:
            use()
        assert name in str(problem.value)

def test_a_gap_inside_a_large_matrix_is_found_and_small_zeros_are_not(tmp_path):
    good, gap = torch.randn(1024, 1024), torch.randn(1024, 1024)
    good[:100] = 0
    gap[300:812] = 0            # 2 MB
    path = tmp_path / "x.safetensors"
    save_file({"a.weight": good, "a.bias": torch.zeros(9), "b": torch.zeros(3, 3)}, path)
    TensorFile(path).fingerprint()
    for damaged in (gap, torch.full((3, 3), 1e300, dtype=torch.float64)):
        save_file({"a.weight": damaged.clone()}, path)
        with pytest.raises(Fail, match=r"a\.weight (is zero|contains numbers)"):
            TensorFile(path).fingerprint()

def schedule(factor=1.0, dtype=torch.float32):
    beta = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000).double() ** 2
    return {"alphas_cumprod": (1 - beta * factor).cumprod(0).to(dtype)}

def zero_terminal_snr():
    r = alpha_bar().sqrt()
    return {"alphas_cumprod": (((r - r[-1]) * r[0] / (r[0] - r[-1])) ** 2).half()}

@pytest.mark.parametrize("extra, header, words", [
    ({"v_pred": torch.ones(1)}, {}, "v_pred"), ({"ztsnr": torch.tensor([])}, {}, "ztsnr"),
    (schedule(factor=1.1), {}, "alphas_cumprod"), ({"alphas_cumprod": torch.ones(500)}, {}, "alphas_cumprod"),
    (zero_terminal_snr(), {}, "alphas_cumprod"),
    ({}, {"modelspec.prediction_type": "v"}, "'v'.*'epsilon'"),
    ({}, {"ss_v_parameterization": "True"}, "ss_v"),
    (schedule(dtype=torch.float16), {"modelspec.prediction_type": "epsilon"}, None),
    (schedule(dtype=torch.bfloat16), {"ss_v_parameterization": "False"}, None),
    (schedule(dtype=torch.float64), {}, None)])
def test_a_single_file_that_declares_another_diffusion_is_refused(
        extra, header, words, one, expected, tmp_path):
    save_file(one | extra, tmp_path / "x.safetensors", header)
    if words is None:
        assert fingerprints(tmp_path / "x.safetensors") == expected
    else:
        with pytest.raises(Fail, match=words):
            open_sd15(str(tmp_path / "x.safetensors"))

UNET, VAE_CONFIG, SCHEDULER = "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"

# The configs of stable-diffusion-v1-5, written by Diffusers 0.6, and keys of later versions.
OFFICIAL = {
    UNET: dict(
        _class_name="UNet2DConditionModel", _diffusers_version="0.6.0", act_fn="silu", attention_head_dim=8,
        center_input_sample=False, cross_attention_dim=768, downsample_padding=1, flip_sin_to_cos=True,
        down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], freq_shift=0, in_channels=4,
        layers_per_block=2, mid_block_scale_factor=1, norm_eps=1e-05, norm_num_groups=32, out_channels=4,
        sample_size=64, up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3),
    VAE_CONFIG: dict(
        _class_name="AutoencoderKL", act_fn="silu", down_block_types=["DownEncoderBlock2D"] * 4,
        in_channels=3, latent_channels=4, layers_per_block=2, norm_num_groups=32, out_channels=3,
        sample_size=512, up_block_types=["UpDecoderBlock2D"] * 4),
    SCHEDULER: dict(
        _class_name="PNDMScheduler", beta_end=0.012, beta_schedule="scaled_linear", beta_start=0.00085,
        num_train_timesteps=1000, set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1,
        trained_betas=None, clip_sample=False)}

def copy(folder, to, configs):
    """A Diffusers folder with other configs; its weights are links."""
    shutil.copytree(folder, to, copy_function=os.link)
    for name, config in configs.items():
        (to / name).parent.mkdir(exist_ok=True)
        (to / name).write_text("\ufeff" + json.dumps(config), encoding="utf-8")

@pytest.mark.parametrize("file, key, value", [
    (UNET, "attention_head_dim", 4), (UNET, "attention_head_dim", [5, 10, 20, 20]),
    (UNET, "norm_num_groups", 16), (UNET, "norm_eps", 1e-6), (UNET, "act_fn", "gelu"),
    (UNET, "flip_sin_to_cos", False), (UNET, "freq_shift", 1), (UNET, "center_input_sample", True),
    (UNET, "only_cross_attention", [True, True, True, False]), (UNET, "class_embed_type", "timestep"),
    (UNET, "addition_embed_type", "text_time"), (UNET, "dual_cross_attention", True),
    (UNET, "down_block_types", ["DownBlock2D"] * 4), (UNET, "_class_name", "UNet2DModel"),
    (UNET, "resnet_time_scale_shift", "scale_shift"),
    (VAE_CONFIG, "scaling_factor", 0.13025), (VAE_CONFIG, "shift_factor", 0.0609),
    (VAE_CONFIG, "latents_mean", [0.1, 0, 0, 0]), (VAE_CONFIG, "use_quant_conv", False),
    (VAE_CONFIG, "mid_block_add_attention", False), (VAE_CONFIG, "act_fn", "relu"),
    (SCHEDULER, "prediction_type", "v_prediction"), (SCHEDULER, "rescale_betas_zero_snr", True),
    (SCHEDULER, "beta_schedule", "linear"), (SCHEDULER, "beta_end", 0.02),
    (SCHEDULER, "trained_betas", [0.1]), (SCHEDULER, "num_train_timesteps", 4000),
    (SCHEDULER, "prediction_type", []), (VAE_CONFIG, "scaling_factor", [])])
def test_a_config_that_contradicts_the_network_is_refused_with_key_and_both_values(
        file, key, value, folder, tmp_path):
    copy(folder, tmp_path / "x", {file: OFFICIAL[file] | {key: value}})
    with pytest.raises(Fail) as problem:
        open_sd15(str(tmp_path / "x"))
    words = str(problem.value)
    assert key in words and repr(value) in words and "computes with" in words and file in words

def test_what_a_scheduler_does_not_say_is_diffusers_default(folder, tmp_path):
    """Whose betas are linear from 0.0001 to 0.02; a flow's scheduler has none at all."""
    copy(folder, tmp_path / "x", {SCHEDULER: dict(_class_name="FlowMatchEulerDiscreteScheduler")})
    with pytest.raises(Fail, match="declares beta_schedule 'linear'"):
        open_sd15(str(tmp_path / "x"))

HARMLESS = {
    UNET: dict(upcast_attention=True, dropout=0.1, _name_or_path="x", only_cross_attention=[False] * 4,
               attention_head_dim=[8] * 4, act_fn="swish", class_embeddings_concat=None),
    VAE_CONFIG: dict(force_upcast=False, scaling_factor=0.18215, shift_factor=0, latents_std=[1.0] * 4),
    SCHEDULER: dict(OFFICIAL[SCHEDULER], timestep_spacing="trailing", _class_name="DDIMScheduler")}

BOTH = {name: OFFICIAL[name] | HARMLESS[name] for name in OFFICIAL}

@pytest.mark.parametrize("configs", [OFFICIAL, {}, HARMLESS, BOTH])
def test_configs_of_the_same_meaning_pass(configs, folder, expected, tmp_path):
    copy(folder, tmp_path / "x", configs)
    assert fingerprints(tmp_path / "x") == expected

def test_an_encoder_with_nan_is_refused(uni2h, tmp_path):
    state = torch.load(uni2h / "pytorch_model.bin", weights_only=True)
    state["blocks.1.mlp.fc2.bias"][3] = torch.nan
    torch.save({"model": state}, tmp_path / "x.pth")
    with pytest.raises(Fail, match=r"blocks\.1\.mlp\.fc2\.bias"):
        open_encoder(tmp_path / "x.pth").fingerprint()
