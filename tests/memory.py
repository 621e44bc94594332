"""GPU memory, counted on fake tensors without a GPU: what a training step, sampling and caching hold."""
import weakref
from functools import partial

import torch
import torch._functorch.config as functorch_config
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from ldm.encoder import build_encoder
from ldm.unet import UNet
from ldm.vae import VAE
from lora import inject
from train import MEMORY_BUDGET

GB = 1e9
CARDS = (6, 8, 12, 16, 24)
RESERVE = 1.2e9         # not counted: CUDA's context, the workspaces of its libraries, fragmentation

class Live(TorchDispatchMode):
    """Bytes of the tensors that operations made and that still exist: `now` and its `peak`."""

    def __init__(self, *networks):
        super().__init__()
        self.now = self.peak = 0
        self.known = {p.untyped_storage()._cdata for network in networks for p in network.parameters()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def free(self, key, size):
        self.known.discard(key)
        self.now -= size

def fake_step(batch, size, width, dtype):
    """The U-Net with LoRA and a batch's inputs; call it in a FakeTensorMode."""
    torch.set_default_dtype(dtype)
    unet = UNet(**width or {}).requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    z, t = torch.randn(batch, 4, size // 8, size // 8), torch.zeros(batch, dtype=torch.long)
    return inject(unet, 4), (z, t, torch.randn(batch, 4, 768, requires_grad=True))

def uncompiled_step(batch=16, size=512, width=None, dtype=torch.bfloat16, checkpointing=True):
    """-> bytes that a training step keeps between its two passes, bytes at its peak; without weights."""
    with FakeTensorMode():
        unet, inputs = fake_step(batch, size, width, dtype)
        for module in unet.modules():
            module.checkpointing = checkpointing
        with Live(unet) as live:
            loss = unet(*inputs).sum()
            kept = live.now
            loss.backward()
    return kept, live.peak

def compiled_step(batch=16, size=512, width=None, dtype=torch.bfloat16, budget=MEMORY_BUDGET):
    """The same of a compiled step whose share of kept activations is `budget` -> kept, peak, FLOPs.

    The peak is that of the graphs without fusion, an upper bound."""
    from functorch.compile import min_cut_rematerialization_partition
    found = dict(flops=0)

    def count(graph, inputs):
        found["flops"] += sum(map(node_flops, graph.graph.nodes))

        def run(args):
            with live:
                return torch.fx.Interpreter(graph).boxed_run(args)      # a tensor is freed after its last use
        run._boxed_call = True
        return run

    def forward(graph, inputs):
        [output] = [node for node in graph.graph.nodes if node.op == "output"]
        storages = {node.meta["val"].untyped_storage()._cdata: node.meta["val"].untyped_storage().nbytes()
                    for node in output.args[0][1:]
                    if node is not None and node.op != "placeholder"
                    and isinstance(node.meta.get("val"), torch.Tensor)}
        found["kept"] = sum(storages.values())
        return count(graph, inputs)

    backend = aot_autograd(fw_compiler=forward, bw_compiler=count,
                           partition_fn=min_cut_rematerialization_partition)
    torch._dynamo.reset()
    with functorch_config.patch(activation_memory_budget=budget), FakeTensorMode():
        unet, inputs = fake_step(batch, size, width, dtype)
        live = Live(unet)
        torch.compile(unet, backend=backend, dynamic=False, fullgraph=True)(*inputs).sum().backward()
    torch._dynamo.reset()
    return found["kept"], live.peak, found["flops"]

def node_flops(node):
    """Of a node of a traced graph: products and convolutions; CPU attention, which torch's table lacks."""
    packet = getattr(node.target, "_overloadpacket", None)
    values = partial(torch.fx.node.map_arg, fn=lambda n: n.meta["val"])
    if "flash_attention" in str(node.target):               # 4 L² C, and 10 L² C backward
        backward = "backward" in str(node.target)
        inputs = [a.meta["val"] for a in node.args[:3 if backward else 2]]
        q, k = [x for x in inputs if x.ndim == 4][-2:]
        return (10 if backward else 4) * q.shape[:3].numel() * k.shape[2] * q.shape[3]
    if packet in flop_registry:
        return flop_registry[packet](*values(node.args), **values(node.kwargs), out_val=node.meta["val"])
    return 0

def inference(build, *shapes, dtype=torch.float32, method="forward", mode=None):
    """-> bytes of a network's weights in a dtype, peak of what one pass without gradients adds."""
    with mode or FakeTensorMode(), torch.no_grad():
        torch.set_default_dtype(dtype)
        network = build()
        torch.set_default_dtype(torch.float32)
        inputs = [torch.zeros(shape, dtype=torch.long if len(shape) == 1 else torch.float32)
                  for shape in shapes]
        with Live(network) as live:
            getattr(network, method)(*inputs)
        return sum(p.nbytes for p in network.parameters()), live.peak

def table():
    """Print the README's table: GB at 512 px and rank 4, and the cards that have as much.

    Steps are counted for four images and taken in proportion."""
    weights, _ = inference(UNet, (1, 4, 8, 8), (1,), (1, 4, 768), dtype=torch.bfloat16)
    trained = 16 * (797_184 + 4_726_272)            # float32: value, gradient, two moments
    steps = {"training, not compiled": uncompiled_step(4)[1], "training, compiled": compiled_step(4)[1]}
    print("| | images at a time | GB | fits cards of |\n|---|---|---|---|")

    def row(what, images, size):
        cards = [str(card) for card in CARDS if size + RESERVE <= card * GB]
        print(f"| {what} | {images} | {size / GB:.1f} | {', '.join(cards)} GB |", flush=True)

    for what, size in steps.items():
        for images in (1, 2, 4, 8, 16):
            row(what, images, weights + trained + size / 4 * images)
    vae, decoded = inference(VAE, (2, 4, 64, 64), method="decode")
    for images in (1, 4, 16):
        b = 2 * images                              # with and without condition
        _, forward = inference(UNet, (b, 4, 64, 64), (b,), (b, 4, 768), dtype=torch.bfloat16)
        row("sampling", images, weights + vae + max(forward, decoded))
    _, encoded = inference(VAE, (2, 3, 512, 512), method="encode")
    encoder, embedded = inference(partial(build_encoder, 1536, 24), (4, 3, 224, 224),
                                  mode=torch.device("meta"))       # timm reads numbers, which fakes have not
    row("caching (VAE encoder, UNI2-h)", 4, vae + encoder + max(encoded, embedded))
