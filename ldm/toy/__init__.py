"""The embedded default: a small base and procedural tissue, so that everything runs without weights or data.

`tissue` draws the patches, `base` made the weights beside this file. What differs from the paper's recipe is the
column `toy` of the settings in ldm/runs.py and nothing else.
"""
