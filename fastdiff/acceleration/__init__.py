"""The network's fast path: what ``fastdiff.accelerate`` puts in the place of a module's forward.

``known.py`` walks a network and decides what stands in for what; ``layers.py`` and ``convolutions.py`` have the single
layers, ``blocks.py`` and ``attention.py`` the blocks of a UNet, ``time_embedding.py`` what depends on the timestep
alone, ``module.py`` what they share, ``network.py`` the way in and out.
"""
