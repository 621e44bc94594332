"""The embedded default: a small base and procedural tissue, so that everything runs without weights or data.

`tissue` draws the patches, `base` made the weights beside this file. What differs from the paper's recipe is this table and
nothing else: train.py takes it for the defaults of its flags where the base is "toy".
"""

SETTINGS = dict(
    size=64,            # 16 x 16 latent pixels: the toy VAE halves twice, Stable Diffusion's three times
    hidden=256,         # the embedding has 192 numbers, not 1,536
    lr=5e-3,            # a tenth of the paper's steps must do
    lr_ratio=1.0,
    epochs=24,
    val_every=12,       # all 56 validation patches are sampled in the middle and at the end; of 32 at every sixth epoch the FID
                        # was noise, and one seed of three kept the adapter of epoch 6 as its best
)
DATA = "toy-tissue"     # what --data is called where it is drawn; in a run's folder it lies beside the run
TISSUE = dict(slides=32, patches=7)     # of each class: 896 patches
