"""Staying right when inputs move."""
