"""Pictures from words: Stable Diffusion checkpoints on your disk, and the one in the package.

load.py finds the networks, single_file.py reads one .safetensors or .ckpt; pipeline.py draws: prompts.py and inputs.py
check what it is asked for, ``fastdiff.sample`` runs over the latents. diffusers and transformers are imported here only.
"""
