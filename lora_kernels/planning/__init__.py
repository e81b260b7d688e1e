"""Numbers in, numbers out: facts about a device, a plan with its tile sizes, what makes it valid,
which one answers a problem, the measured tables on disk, and the record of who answered.

No tensor and no kernel. Imports spec.
"""
