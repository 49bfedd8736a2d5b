"""Shows what was measured: tables, figures."""
