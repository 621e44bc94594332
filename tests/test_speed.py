"""What speed costs and saves, counted: bytes kept for the backward pass, and the same gradients with and
without."""
import math
from types import SimpleNamespace

import pytest
import torch
import torch._functorch.config as functorch_config
from conftest import HEADER, trainer

import memory
import train
from ldm.app import frozen_dtype, layout
from ldm.runs import Settings
from ldm.unet import UNet
from lora import inject, lora_parameters
from train import ACTIVATIONS, LOSS_SCALE, MEMORY_BUDGET, Trainer

SMALL = dict(channels=(64, 64), layers=1)

GIB = 2 ** 30

@pytest.mark.slow
def test_a_compiled_step_at_batch_16_and_512_px_keeps_5_5_gib_for_9_percent_more_flops():
    """The full network on fake tensors. The paper's step is 28.2 TFLOP; what eager mode keeps is 11.85 GiB.
    """
    all_of_it, _, flops = memory.compiled_step(budget=1.0)
    kept, peak, more = memory.compiled_step()
    print(f"kept {kept / GIB:.2f} of {all_of_it / GIB:.2f} GiB, peak {peak / GIB:.2f} GiB, "
          f"{more / 1e12:.2f} in place of {flops / 1e12:.2f} TFLOP ({more / flops - 1:+.1%})")
    assert flops == pytest.approx(28.2e12, rel=0.01)
    assert kept <= 5.5 * GIB < all_of_it and more <= 1.09 * flops
    assert peak <= 16 * ACTIVATIONS * 320 * 64 * 64 * 2

@pytest.mark.slow
def test_a_step_that_is_not_compiled_holds_6_gib_at_batch_16_and_3_in_passes_of_4():
    """At 512 px; without checkpointing 11.84 GiB. The peak is within what the default micro-batch expects."""
    for batch, most in ((16, 6), (4, 3)):
        kept, peak = memory.uncompiled_step(batch)
        print(f"{batch} images: kept {kept / GIB:.2f}, peak {peak / GIB:.2f} GiB")
        assert kept <= peak <= min(most * GIB, batch * ACTIVATIONS * 320 * 64 * 64 * 2)
    assert memory.uncompiled_step(4, checkpointing=False)[0] == pytest.approx(2.96 * GIB, rel=0.01)

def test_the_peak_of_what_operations_make_is_counted():
    with memory.Live() as live:
        x = torch.zeros(1000) + 1           # 4,000 bytes each: both exist for a moment
        y = x.view(10, 100)
        assert (live.now, live.peak) == (4000, 8000)
        del x, y
    assert live.now == 0

@pytest.mark.slow
def test_a_smaller_budget_keeps_less_and_computes_more():
    (a, _, more), (b, _, fewer) = (memory.compiled_step(2, 128, SMALL, budget=share) for share in (0.3, 1.0))
    assert a < 0.5 * b and fewer < more < 1.25 * fewer

def test_what_is_computed_again_gives_the_same_gradients():
    torch.manual_seed(0)
    unet = inject(UNet((32,), layers=1).requires_grad_(False), 4)       # of which the middle has attention
    with torch.no_grad():
        for _name, p in lora_parameters(unet).items():
            p.add_(0.02 * torch.randn_like(p))
    z, t, c = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 4, 768)
    gradients = []
    for network in (unet, torch.compile(unet, backend="aot_eager_decomp_partition", dynamic=False)):
        torch._dynamo.reset()
        with functorch_config.patch(activation_memory_budget=MEMORY_BUDGET):
            network(z, t, c).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in lora_parameters(unet).items()})
        unet.zero_grad()
    worst = max((((a - b).norm() / a.norm()).item(), name) for name,
                a in gradients[0].items() for b in [gradients[1][name]])
    print("largest relative difference of a gradient:", worst)
    assert worst[0] < 1e-4

def gradients(t):
    t.train_step()
    return torch.cat([p.grad.flatten() for p in t.parameters])

@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_a_step_in_pieces_is_the_step(micro_batch, compiled):
    """The draws are those of the whole batch of 5; a compiled network gets pieces of one size."""
    whole, t = trainer(batch=5), trainer(batch=5, micro_batch=micro_batch)
    sizes, unet, t.compiled = [], t.network, compiled
    t.network = lambda z, *others: sizes.append(len(z)) or unet(z, *others)
    a, b = gradients(whole), gradients(t)
    assert len(sizes) == math.ceil(5 / micro_batch) and (set(sizes) == {micro_batch}) >= compiled
    assert sum(sizes) == 5 or compiled
    assert (a - b).norm() < 1e-5 * a.norm() and t.losses == pytest.approx(whole.losses, rel=1e-6)

@pytest.mark.parametrize("free, size", [(8.6e9, 16), (5e9, 8), (2e9, 4), (1e6, 1)])
def test_the_largest_pieces_that_fit_the_free_memory_are_taken(monkeypatch, free, size):
    """SD1.5 in bfloat16, 512 px: 0.446 GB an image, and a tenth of the memory is left."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80e9))
    first = torch.zeros(320, 4, 3, 3, dtype=torch.bfloat16)
    t = SimpleNamespace(settings=Settings(), unet=SimpleNamespace(conv_in=SimpleNamespace(weight=first)),
                        z_shape=(4, 64, 64), device=torch.device("cuda"))
    assert Trainer.images_per_pass(t) == size
    monkeypatch.setattr(train, "all_gather", lambda rows: [*rows, 4])       # another GPU with less memory
    assert Trainer.images_per_pass(t) == min(size, 4)       # all divide the validation images alike

def test_checkpointed_blocks_give_the_same_gradients():
    plain, t = trainer(), trainer()
    for level in t.unet.modules():
        level.checkpointing = True
    assert torch.equal(gradients(plain), gradients(t))

def in_dtype(t, dtype):
    """A trainer with its U-Net as it is loaded in this dtype."""
    for p in t.unet.parameters():
        if not p.requires_grad:
            p.data = p.data.to(dtype)
    t.unet.to(memory_format=layout("cpu", dtype))
    t.scale = t.largest_scale = LOSS_SCALE if dtype == torch.float16 else 1.0
    return t

@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 0.01), (torch.bfloat16, 0.06)])
def test_a_step_in_16_bits_is_that_in_float32_to_its_precision(dtype, tolerance):
    plain, t = trainer(), in_dtype(trainer(), dtype)
    a, b = gradients(plain), gradients(t)
    print(f"{dtype}: relative difference of the gradient {((a - b).norm() / a.norm()).item():.4f}")
    assert (a - b).norm() < tolerance * a.norm() and t.losses == pytest.approx(plain.losses, rel=tolerance)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in t.parameters)

def test_a_step_that_overflows_in_float16_is_computed_again_at_half_the_scale(tmp_path):
    """A gradient is infinite from 2^14 on: three halvings, then the step as it is; the scale is kept."""
    plain, t = trainer(), trainer()
    t.scale = t.largest_scale = LOSS_SCALE
    b = next(p for name, p in t.named.items() if name.endswith("B"))
    b.register_hook(lambda g: g if t.scale <= 2 ** 13 else g * math.inf)
    assert (gradients(plain) - gradients(t)).abs().max() < 1e-6 and t.scale == 2 ** 13 and t.step == 1
    t.save(tmp_path, HEADER)
    again = in_dtype(trainer(), torch.float16)
    again.restore(tmp_path / "state.safetensors")
    assert again.scale == 2 ** 13
    t.step = 999
    t.train_step()
    assert t.scale == 2 ** 14               # tried again once in a thousand steps

def test_a_run_that_moves_to_a_gpu_without_bfloat16_begins_with_the_largest_scale(tmp_path):
    """Without one most gradients are below what float16 holds."""
    t, other = trainer(), in_dtype(trainer(), torch.float16)
    t.train_step()
    t.save(tmp_path, HEADER)
    other.restore(tmp_path / "state.safetensors")
    assert t.scale == 1 and other.scale == LOSS_SCALE

@pytest.mark.parametrize("device, has, width, dtype", [
    ("cuda", "bf16", 64, "bfloat16"), ("cuda", "", 320, "float16"), ("mps", "amx", 320, "float32"),
    ("cpu", "", 320, "float32"), ("cpu", "amx", 320, "bfloat16"), ("cpu", "avx512", 320, "bfloat16"),
    ("cpu", "amx", 64, "float32")])
def test_the_dtype_is_the_fastest_that_the_device_has(monkeypatch, device, has, width, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has == "bf16")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has == "amx")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has == "avx512")
    assert frozen_dtype(torch.device(device), width=width) == getattr(torch, dtype)
    assert frozen_dtype(torch.device(device), "float16") == torch.float16
