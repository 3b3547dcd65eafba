"""Capstan: run, train and judge big models on the hardware that you have.

Importing this package imports nothing heavy. Each room is imported by name:
`from capstan.generation import Engine`.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
