"""Latent diffusion from scratch: networks, schedule, weights, data, and what the programs share.

No network here knows what the images show or what the condition means.
"""
