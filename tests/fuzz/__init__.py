"""Random calls, right ones and senseless ones, of everything that takes numbers: ``make fuzz``, tests/test_fuzz.py.

``python -m fuzz`` (in tests/) makes --calls of them from --seed. A call fails where its result is wrong, where the
process dies or hangs, and where it raises what is no ValueError or TypeError in words; it is then printed with the
command that repeats it.
"""
