"""A package, for Pgx installs one of this name, which would hide a mere folder."""
