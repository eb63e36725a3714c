"""Optional CPU kernels that are faster than torch's."""
