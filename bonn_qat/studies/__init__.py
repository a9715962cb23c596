"""Studies: many runs side by side, as comparisons, the paper's tables, and reports."""
