"""What tests/ and bench/ share: the error budget, cases that can see the adapter, and the mistakes
that they have to notice.

Imports planning and spec.
"""
