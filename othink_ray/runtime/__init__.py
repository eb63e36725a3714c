"""Everything distributed: Ray lives here and nowhere else."""
