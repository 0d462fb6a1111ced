"""Fine-tune a video transformer of diffusers with FPSAttention: the parts of examples/finetune_diffusers.py."""
