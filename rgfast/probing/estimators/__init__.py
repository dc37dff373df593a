"""From rows to measures: moments that are summed up, or rows that are measured at once."""
