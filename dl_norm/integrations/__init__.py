"""Trainers of other libraries with the losses of this package, one module per library.

Nothing is imported here: each module needs its library, and says so when it is not installed.
"""
