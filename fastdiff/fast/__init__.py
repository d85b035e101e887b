"""The network's fast path: what ``fastdiff.accelerate`` puts in the place of a module's forward.

``replace.py`` walks a network and decides what stands in for what; ``leaves.py`` has the single layers, ``blocks.py``
and ``attention.py`` the blocks of a UNet, ``conditioning.py`` what depends on the timestep alone, ``forward.py`` what
they share, ``network.py`` the way in and out.
"""
