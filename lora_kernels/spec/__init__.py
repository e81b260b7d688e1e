"""What is computed: the mathematics in plain torch (reference), one call as numbers (problem),
which row has which adapter (segments), and the loader of the C++ extensions that every room may
ask.

No choice made for speed, no check for a user. Imports nothing of the package.
"""
