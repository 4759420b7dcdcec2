"""fledge: train your own ChatGPT, end to end, and own every part of it.

Importing this package loads nothing heavy; torch is imported by the modules that need it.
"""

__version__ = "0.1.0"
