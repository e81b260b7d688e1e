"""Modules: their parameters, state, merge and packed weights, the mixed batch that they take part
in.

Nothing about a whole model or a file. Imports functional and the rooms below.
"""
