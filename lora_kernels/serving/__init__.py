"""The store of many adapters: host tier, slots on the device, transfers, batches.

Imports models and the rooms below, nothing of integrations.
"""
