"""The processes of minir1/sandbox.py: a warden, which starts and watches a driver (the tests) and a candidate.

The warden runs with the standard library alone (`python -s -S`), so these modules import nothing else.
"""
