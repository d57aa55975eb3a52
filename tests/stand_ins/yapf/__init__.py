"""Stands in for yapf: mmengine formats the config five times a run, which takes seconds."""

__version__ = '1.0'
