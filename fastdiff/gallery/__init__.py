"""``fastdiff gallery``: a page that shows what a model of words draws.

sections.py lists what is drawn, as the calls that the page prints; page.py runs them and writes the folder.
"""
