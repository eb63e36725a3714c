"""Typed configuration: what can be set (schema), how it is read (load), which combinations make sense (check)."""
