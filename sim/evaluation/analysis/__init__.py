"""From the records of a study to what it shows: metrics, rules of evidence, verdicts, and the report."""
