"""A small video diffusion transformer trained with FPSAttention; examples/train_tiny_dit.py is its command line.

- clips.py: videos, their split, the linear latent code.
- model.py: the transformer.
- flow.py: noise levels, the attention of each, the sampler.
- training.py: one resumable run.
- evaluation.py: the comparison of arXiv 2506.04648, Table 5.
- export.py: a trained model as one file. Two such files lie beside it; docs/training.md tells how they were made.
- denoise.py: trained models denoise a held-out clip, for examples/denoise_tiny_dit.py.
"""
