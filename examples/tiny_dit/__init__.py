"""A small video diffusion transformer trained with FPSAttention; examples/train_tiny_dit.py is its command
line.

clips.py: videos, their split, the linear latent code. model.py: the transformer. flow.py: noise levels, which attention
runs at which, the sampler. training.py: one run, resumable. evaluation.py: the comparison of arXiv 2506.04648, Table 5.
export.py: a trained model as one file; two such files lie beside it, and docs/training.md says how they were made.
denoise.py: what they make of a held-out clip; examples/denoise_tiny_dit.py shows it.
"""
