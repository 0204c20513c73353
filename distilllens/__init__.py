"""Distils a large causal language model into a small one offline, through a cache of logit-lens targets."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("distilllens")
except PackageNotFoundError:  # a bare checkout on PYTHONPATH
    __version__ = "0+unknown"
