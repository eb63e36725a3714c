"""Typed configuration: the keys (schema), composing and converting them (load, strict), their rules (validate)."""
