"""Reads studies: statistics, tables, claims, figures."""
