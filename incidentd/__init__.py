"""A payment service on a real PostgreSQL that falls into a named incident when `demo_control` says so."""

__version__ = "0.1.0"
