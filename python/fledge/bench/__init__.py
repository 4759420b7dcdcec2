"""Measurements of this machine and of fledge on it, beside peers in the same run.

`fledge bench` and `fledge tok bench` call its modules; the product never does.
"""
