"""A taskset without an end."""

from v1_sums import EndlessTaskset

__all__ = ["EndlessTaskset"]
