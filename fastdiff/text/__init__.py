"""Pictures from words: Stable Diffusion checkpoints on your disk, and the one in the package.

load.py finds the networks, single_file.py reads one .safetensors or .ckpt, pipeline.py draws. Only this folder imports
diffusers' pipelines and transformers.
"""
