"""The network's fast path: what ``fastdiff.accelerate`` puts in the place of a module's forward.

``known.py`` says which classes are known and what stands in for each; ``layers.py`` has the single layers,
``blocks.py`` and ``attention.py`` the blocks of a UNet, ``time_embedding.py`` what depends on the timestep alone,
``module.py`` what they share. ``network.py`` is the way in and out, ``guard.py`` compares before each call what was
assumed, ``pipeline.py`` takes a pipeline's networks and schedulers, ``report.py`` is what people read.
"""
