"""Latent diffusion from scratch: `unet`, `vae`, `schedule`, and the files they come from: `weights`, `data`,
`files`.

No network here knows what the images show or what the condition means.
"""
