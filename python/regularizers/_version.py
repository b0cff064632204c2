"""The version, in one place: setup, package and documentation read it here."""

__version__ = "0.1.0"
