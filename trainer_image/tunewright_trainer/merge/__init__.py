"""Merging an adapter into its base model, file by file from storage to storage, in memory that does not grow with it.

Nothing here needs torch but the modules that run in a process of their own.
"""
