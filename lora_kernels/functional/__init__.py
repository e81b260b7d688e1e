"""LoRA as functions of tensors: checks for the user, rows [M, K], autograd; and the operators below
them: schemas, fakes, registration.

No module and no state. Imports backends, planning and spec.
"""
